"""Commands of a report: what they make is what the files hold."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import make_plan
from moekern.report.commands import commands_of
from moekern.statistics.file import Statistics
from tests.helpers.commands import moekern
from tests.helpers.measured import model_statistics

OPTIONS = {
    "plain": "--criterion reap --keep 4",
    "seeded": "--criterion random --keep 0.5 --seed 3",
    "uneven": "--criterion usage --keep 0.5 --budget global --normalise max --floor 2 --allow-nonuniform",
    "adaptive": "--criterion gate_mass --keep 0.7 --budget adaptive --adaptive-by entropy --multiple-of 2"
    " --allow-nonuniform",
    "guarded": "--criterion ean --keep 4 --protect-super --keep-always 0:5 --drop-first '2:1,3' --guard code=1"
    " --suppress prose=1 --domain-floor code=0.25",
    "replaced": "--criterion gated_norm --keep 3 --replace mean",
    "of one domain": "--criterion reap --keep 4 --domain 'my code' --target vllm --mtp drop",
}


def test_plan_commands_make_the_same_plans_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_statistics(domains=("prose", "code", "my code")).save("s.safetensors")
    statistics = Statistics.load("s.safetensors")
    for name, options in OPTIONS.items():
        done = moekern("plan", "s.safetensors", *shlex.split(options), "--out", f"{name}.json")
        assert done.returncode == 0, (name, done.stderr)
    plans = {name: Plan.load(f"{name}.json") for name in OPTIONS}
    _, *lines = commands_of(statistics, plans)
    for (name, plan), line in zip(plans.items(), lines, strict=True):
        Path(f"{name}.json").unlink()
        done = moekern(*shlex.split(line)[1:])
        assert done.returncode == 0, (line, done.stderr)
        assert Path(f"{name}.json").read_text() == plan.to_json(), line


def test_every_run_has_its_command() -> None:
    statistics = model_statistics(model="owner/name@" + "0" * 40, dtype="bfloat16")
    first = {**statistics.header["runs"][0], "data": {"sources": {"a b": {"path": "x.txt", "tokens": 7}}, "seed": 1}}
    second = {**first, "data": {**first["data"], "pack": False, "thinking": "off", "chunk": 2}, "model": None}
    statistics.header["runs"][:] = [first, second]
    lines = commands_of(statistics, {"p": make_plan(statistics, "usage", 4)}, {"domains": ["a b"], "layers": {"x": {}}})
    tiers = " ".join(f"--tier {tier}" for tier in statistics.tiers)
    of = "--data 'a b=x.txt:7'"
    assert lines == [
        f"moekern calibrate owner/name --revision {'0' * 40} {of} --seed 1 --dtype bfloat16 {tiers}"
        " --out s-1.safetensors",
        f"moekern calibrate MODEL {of} --chunk 2 --seed 1 --no-pack --thinking off --dtype bfloat16 {tiers}"
        " --out s-2.safetensors",
        "moekern merge s-1.safetensors s-2.safetensors --out s.safetensors",
        "moekern plan s.safetensors --criterion usage --keep 4 --out p.json",
        "moekern evaluate MODEL p.json --data 'a b=TEXT' --layers --out losses.json",
    ]


def test_plans_of_other_commands_are_said_to_be() -> None:
    statistics = model_statistics()
    plan = make_plan(statistics, "reap", 4)
    groups = tuple(((e, 1.0),) for e in plan.layers["0"].keep)
    plans = {
        "merged": replace(plan, layers={**plan.layers, "0": replace(plan.layers["0"], groups=groups)}),
        "searched": replace(plan, provenance={**plan.provenance, "optimise": {}}),
        "my own": Plan({key: LayerPlan((0, 1, 2)) for key in statistics.layers}),
    }
    assert commands_of(statistics, plans)[1:] == [
        "# merged.json was made by merge-experts, and does not tell how",
        "# searched.json was made by optimise, and does not tell how",
        "# 'my own.json' was made by hand, or by what it does not name",
    ]
