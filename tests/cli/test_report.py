"""The command `report`: a page, a table, a document; and one line for what does not fit together."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moekern.cli.report import judged_names, short_names, strip, told_original
from moekern.plan.document import Plan
from moekern.plan.groups import model_digest
from moekern.plan.make import make_plan
from tests.helpers import families
from tests.helpers.commands import document, moekern
from tests.helpers.measured import model_statistics


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """s.safetensors, two plans and losses of them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    statistics = model_statistics()
    statistics.save("s.safetensors")
    loss = {"nll": 1.0, "kl": 0.5, "top1": 0.5, "tokens": 9, "sequences": 2}
    for name in ("reap", "usage"):
        make_plan(statistics, name, 4).save(f"{name}.json")
    rows = {name: {"prose": loss} for name in ("original", "/elsewhere/reap.json", "usage.json")}
    layers = {"usage.json": {"prose": {key: {"error": 0.25, "orphans": 0.5} for key in ("0", "2", "10")}}}
    Path("losses.json").write_text(json.dumps({"losses": rows, "differences": [], "layers": layers}))
    return tmp_path


def test_a_page_a_table_and_a_document(folder: Path) -> None:
    given = ("report", "s.safetensors", "reap.json", "usage.json", "--evaluation", "losses.json")
    done = moekern(*given, "--out", "new/report.html", "--text")
    assert done.returncode == 0, done.stderr
    assert Path("new/report.html").read_text().startswith("<!DOCTYPE html>")
    shown = ("what plans remove", "held-out loss", "saliency removed", "router entropy", "usage, evaluated: orphans")
    for part in shown:
        assert part in done.stdout
    assert "warning: warning" not in done.stderr
    found = document(*given)
    assert list(found["kept"]) == ["reap", "usage"]
    assert [row["name"] for row in found["evaluation"]["rows"]] == ["original", "reap", "usage"]
    assert not any("none of these plans" in line for line in found["warnings"])


def test_rows_are_of_the_plans_that_make_their_models(folder: Path) -> None:
    losses = json.loads(Path("losses.json").read_text())
    digests = {name: {"plan": model_digest(Plan.load(f"{name}.json"))} for name in ("reap", "usage")}
    for of, name in ((digests["usage"], "usage"), ({"plan": "0" * 64}, "/elsewhere/reap.json (another plan)")):
        losses["models"] = {"/elsewhere/reap.json": of, "usage.json": {"plan": "1" * 64}}
        Path("losses.json").write_text(json.dumps(losses))
        found = document("report", "s.safetensors", "reap.json", "usage.json", "--evaluation", "losses.json")
        shown = [row["name"] for row in found["evaluation"]["rows"]]
        assert shown == ["original", name, "usage.json (another plan)"]
    plan, other = Plan.load("reap.json"), {"fingerprint": "0" * 64}
    models = {"original": other, "/elsewhere/reap.json": digests["reap"] | other}
    losses["models"] = models
    assert judged_names(losses, {"reap.json": plan}, {"reap.json": "reap"})["/elsewhere/reap.json"] != "reap"
    line = told_original(losses, {"reap.json": plan}, "losses.json")
    assert line is not None
    assert line.startswith("losses.json: its original is another one (fingerprint '000000000000', and of the plan's")
    models["/elsewhere/reap.json"]["fingerprint"] = plan.provenance["fingerprint"]  # the original is its twin
    assert judged_names(losses, {"reap.json": plan}, {"reap.json": "reap"})["/elsewhere/reap.json"] == "reap"
    assert told_original(losses, {"reap.json": plan}, "losses.json") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["s.safetensors"], "nowhere to write"),
        (["s.safetensors", "--out", "report.pdf"], "ends in .html"),
        (["s.safetensors", "--out", "reap.json"], "exists already"),
        (["s.safetensors", "--png", "report.jpg"], "ends in .png"),
        (["s.safetensors", "--png", "report.png"], "--png: needs matplotlib: pip install 'moekern[report]'"),
        (["none.safetensors", "--text"], "no such statistics file"),
        (["reap.json", "--text"], "reap.json"),
        (["s.safetensors", "losses.json", "--text"], "losses.json: expected an object"),
        (["s.safetensors", "other.json", "--text"], "made for another model"),
        (["s.safetensors", "reap.json", "reap.json", "--text"], "named twice"),
        (["s.safetensors", "--evaluation", "reap.json", "--text"], "--evaluation reap.json: no losses of plans"),
        (["s.safetensors", "--revision", "main", "--text"], "goes with --checkpoint"),
        (["s.safetensors", "--checkpoint", "model", "--text"], "measured on another model"),
    ],
)
def test_what_does_not_fit_is_one_line(
    folder: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    plan = make_plan(model_statistics(), "reap", 4)
    replace(plan, provenance={**plan.provenance, "fingerprint": "0" * 64}).save("other.json")
    if "model" in words:
        families.save("qwen3_moe", folder / "model")
    done = moekern("report", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(Path(name).exists() for name in ("report.html", "report.png"))


def test_names_are_short_where_they_tell_plans_apart() -> None:
    assert short_names(["a/x.json", "b/y.json"]) == {"a/x.json": "x", "b/y.json": "y"}
    assert short_names(["a/x.json", "b/x.json"]) == {"a/x.json": "a/x.json", "b/x.json": "b/x.json"}


def test_a_strip_has_a_block_a_number() -> None:
    assert strip([0, 0.5, 1, None]) == "▁▅█?"
    assert strip([0, 0]) == "▁▁"
    assert strip([0.5], 1.0) == "▅"
