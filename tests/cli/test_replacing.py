"""The commands on plans whose dropped experts become constants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moekern.cli import console
from moekern.cli.app import app
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from tests.helpers import families


def invoked(*arguments: object) -> Any:
    """What a command prints as JSON. Raises InputError as the command does."""
    with console.output(False):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_text_to_a_folder_and_its_loss(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = family_checkpoint("qwen3_moe"), tmp_path / "half"
    rows = families.input_ids("qwen3_moe", 8, 40, 11).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    data = "--data", f"d={tmp_path / 'ids.jsonl'}", "--sequence-length", "40"
    asked = "--keep", "0.25", "--replace", "least-squares", "--budget", "relative", "--target", "vllm"
    done = invoked("run", model, *data, *asked, "--form", "compression-config", "--out", out)
    assert done["verify"]["good"]
    assert done["verify"]["forward"]["equal"]
    assert done["verify"]["constants_known"]
    assert done["pruned"]["replaced"] == sum(8 - len(layer.keep) for layer in Plan.load(done["plan"]).layers.values())
    assert done["serve"] == {"vllm": f"vllm serve {out}"}
    sums = done["statistics"]
    plans = invoked("evaluate", model, *data, done["plan"], "--statistics", sums)["losses"]
    alone = invoked("evaluate", out, *data)["losses"]
    assert alone["original"]["d"]["nll"] == plans[done["plan"]]["d"]["nll"]
    form = "--form", "approximate-experts"
    plain = Plan({key: LayerPlan((0, 1, 2, 5)) for key in Plan.load(done["plan"]).layers})
    plain.save(tmp_path / "plain.json")
    invoked("prune", model, tmp_path / "plain.json", "--replace", "zero", "--out", tmp_path / "zero")
    found = invoked("verify", model, tmp_path / "plain.json", tmp_path / "zero", "--replace", "zero")
    assert (found["constants"], found["constants_known"]) == (4 * len(plain.layers), True)
    assert invoked("check", out, "--target", "vllm")["targets"]["vllm"]["runs"]
    for words, reason in (
        (("prune", model, done["plan"], "--out", tmp_path / "no"), "--statistics: the plan replaces experts by"),
        (("prune", model, tmp_path / "plain.json", "--statistics", sums, "--out", tmp_path / "no"), "add --replace"),
        (("prune", model, done["plan"], "--replace", "zero", "--out", tmp_path / "no"), "the plan has least-squares"),
        (("verify", model, tmp_path / "plain.json", out, "--replace", "mean"), "--replace mean: needs --statistics"),
        (("run", model, *data, *asked, "--refit", "--out", tmp_path / "no"), "--replace, --refit"),
        (
            ("run", model, *data, "--keep", "4", *form, "--out", tmp_path / "no"),
            "--form: goes with --replace",
        ),
        (("calibrate", out, *data, "--out", tmp_path / "s"), "its dropped experts are constants"),
        (("refit", model, done["plan"], *data, "--out", tmp_path / "no"), "replaces dropped experts by constants"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            invoked(*words)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "no").exists()
