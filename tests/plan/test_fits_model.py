"""One plan for all twins of a model, and for no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console
from moekern.cli.app import app
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.plan.compare import compare
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.fits_model import TWIN, check_plan
from moekern.plan.make import make_plan
from moekern.plan.several import Planning, make_plans
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.quantised import rewrite
from tests.helpers.quantised_models import plain, twins

DATA = TokenData((Batch("d", families.input_ids("qwen3_moe", 2, 12, 1)),), {}, 2)
FORMATS = ("fp8_block", "compressed_int4")


@dataclass(frozen=True)
class Made:
    source: Path
    statistics: Statistics
    plan: Plan
    others: tuple[Path, ...]  # the source's twins
    tuned: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("twins")
    source = plain("qwen3_moe", root / "source")
    statistics = calibrate(source, DATA, out=root / "s.safetensors")
    tuned = rewrite(source, root / "tuned", lambda name, t: {name: t * 1.02 if ".mlp.gate." in name else t})
    others = tuple(twins(source, root, kind)[0] for kind in FORMATS)
    return Made(source, statistics, make_plan(statistics, "gated_norm", keep=4), others, tuned)


@pytest.mark.parametrize("text", ["zz", "", "0", "FF", "f" * (1 << 19), None, 3, [0, 1]])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_what_a_program_says_of_channels_is_checked_where_it_stands(
    text: Any, place: tuple[int, int], family_checkpoint: Callable[[str], Path]
) -> None:
    """In the first layer, whose width is that of the plan, and in a later one."""
    folder = family_checkpoint("qwen3_moe")
    layers = {key: LayerPlan((1, 3), None, ("ff", "ff")) for key in find_layout(open_checkpoint(folder)).layers}
    key, (number, which) = str(place[0]), place
    layers[key] = replace(layers[key], channels=tuple(text if i == which else "ff" for i in range(2)))
    assert list(layers)[number] == key
    with pytest.raises(InputError, match=rf"layer '?{key}'?: channels of expert {1 + 2 * which}: expected .*, got "):
        _check(Plan(layers), folder)


def _check(plan: Plan, folder: Path) -> str | None:
    checkpoint = open_checkpoint(folder)
    return check_plan(plan, find_layout(checkpoint), checkpoint, "p.json")


def test_a_plan_is_carried_out_on_every_twin(made: Made, tmp_path: Path) -> None:
    assert _check(made.plan, made.source) is None
    for twin in made.others:
        assert _check(made.plan, twin) == f"p.json: {TWIN}"
        report = prune(twin, made.plan, tmp_path / twin.name)
        assert [note for note in report.notes if TWIN in note] == [f"plan: {TWIN}"]
        assert verify(twin, made.plan, tmp_path / twin.name).problems == ()
        assert evaluate(twin, DATA, {"half": made.plan})["half"]["d"].tokens == 22
        assert (
            make_plan(calibrate(twin, DATA), "gated_norm", keep=4).provenance["routers"]
            == (made.plan.provenance["routers"])
        )


def test_the_command_says_so_in_a_line(made: Made, tmp_path: Path) -> None:
    made.plan.save(tmp_path / "p.json")
    made.statistics.save(tmp_path / "s.safetensors")
    runner, twin = CliRunner(), str(made.others[0])
    with console.output(False):
        asked = ["plan", str(tmp_path / "s.safetensors"), "--model", twin, "--keep", "4", "--out"]
        out = runner.invoke(app, [*asked, str(tmp_path / "again.json")])
    assert (out.exit_code, out.stderr.count(TWIN)) == (0, 1)
    with console.output(False):
        out = runner.invoke(app, ["prune", twin, str(tmp_path / "p.json"), "--out", str(tmp_path / "o")])
    assert out.exit_code == 0
    assert out.stderr.count(TWIN) == 1
    with console.output(False):
        out = runner.invoke(app, ["verify", twin, str(tmp_path / "p.json"), str(tmp_path / "o")])
    assert (out.exit_code, out.stderr.count(TWIN)) == (0, 1)


def test_a_fine_tune_is_no_twin(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.json: made for another model \(fingerprint .*not for a twin of this one"):
        _check(made.plan, made.tuned)
    with pytest.raises(InputError, match="made for another model"):
        prune(made.tuned, made.plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [None, {}, "routers", {"0": "F32 8x32 00"}, ["x"]])
def test_a_plan_that_knows_no_routers_is_refused_on_a_twin(known: object, made: Made) -> None:
    old = {key: value for key, value in made.plan.provenance.items() if key != "routers"}
    plan = Plan(made.plan.layers, old if known is None else {**old, "routers": known})
    assert _check(plan, made.source) is None
    with pytest.raises(InputError, match="for a plan that knows no routers, remove provenance.fingerprint"):
        _check(plan, made.others[0])


def test_statistics_of_a_twin_make_plans_for_the_model(made: Made) -> None:
    plans = make_plans(made.statistics, Planning(("gated_norm",), (4,), model=open_checkpoint(made.others[1])))
    assert list(plans.values()) == [made.plan]
    with pytest.raises(InputError, match="measured on another model .*no twin of it"):
        make_plans(made.statistics, Planning(("gated_norm",), (4,), model=open_checkpoint(made.tuned)))
    other = make_plan(calibrate(made.others[0], DATA), "gated_norm", keep=4)
    assert compare({"twin's": other, "own": made.plan}, made.statistics).dropped.keys() == {"twin's", "own"}


def test_statistics_without_routers_are_read(made: Made, tmp_path: Path) -> None:
    document = json.loads(json.dumps(dict(made.statistics.header)))
    assert set(document.pop("routers")) == set(made.statistics.layers)
    old = Statistics(document, {k: {"d": made.statistics.part(k, "d")} for k in made.statistics.layers})
    old.save(tmp_path / "old.safetensors")
    assert "routers" not in make_plan(Statistics.load(tmp_path / "old.safetensors"), "frequency", keep=4).provenance
