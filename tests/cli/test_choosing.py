"""A criterion chosen by measurement: by `run --criterion auto`, and among plans by `evaluate --best`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.cli import choosing
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics
from tests.helpers import families
from tests.helpers.commands import document, moekern

CANDIDATES = ("gated_norm", "reap", "random")
TRIED = [word for name in CANDIDATES for word in ("--candidate", name)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and text."""
    folder = tmp_path_factory.mktemp("choosing")
    families.save("qwen3_moe", folder / "model")
    for seed, name in enumerate("ab"):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, 96, 960))
    return folder


def run(work: Path, *more: object) -> tuple[object, ...]:
    text = [word for name in "ab" for word in ("--data", f"{name}={work / name}.npy")]
    return ("run", work / "model", *text, "--sequence-length", 24, "--no-forward", *more)


def choice_of(plan: Path) -> dict[str, Any]:
    found: dict[str, Any] = Plan.load(plan).provenance["choice"]
    return found


def test_the_best_candidate_is_taken_and_the_table_kept(work: Path, tmp_path: Path) -> None:
    done = moekern(*run(work, "--keep", 4, "--criterion", "auto", *TRIED, "--out", tmp_path / "auto"))
    assert done.returncode == 0, done.stderr
    plan = tmp_path / "auto.moekern" / "plan.json"
    told = choice_of(plan)
    assert set(told["candidates"]) == set(CANDIDATES)
    assert told["chosen"] == min(told["candidates"], key=lambda name: told["candidates"][name]["kl"])
    assert Plan.load(plan).provenance["criterion"] == told["chosen"]
    assert "that are held back to choose by" in done.stdout
    held = Statistics.load(tmp_path / "auto.moekern" / "statistics.safetensors").header["runs"][0]["data"]["held_out"]
    assert held == {"a": 7 * 24, "b": 7 * 24}  # of 40 sequences 4 judge, and of the other 36 3 choose


def test_what_was_chosen_is_not_measured_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = run(work, "--keep", 4, "--criterion", "auto", *TRIED, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("moekern.cli.whole_run.prune_to", _stopped)
        assert moekern(*command).returncode != 0
    monkeypatch.setattr(choosing.pipeline, "losses_of", _stopped)
    again = document(*command)  # which is all that standard output has
    assert again["choice"] == choice_of(tmp_path / "out.moekern" / "plan.json")
    assert choice_of(tmp_path / "out.moekern" / "plan.json")["chosen"] in CANDIDATES


def _stopped(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_with_a_refit_candidates_are_refitted(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is nearest once it is refitted is taken, whatever it is before that."""
    made = choosing._refitted
    best: list[str] = []

    def refitted(*arguments: Any) -> Evaluation:
        found = dict(made(*arguments))
        names = sorted(name for name in found if name != ORIGINAL)
        assert {name.partition(" at ")[0] for name in names} == {"gated_norm", "random"}
        best.append(min(names, key=lambda name: sum(loss.kl for loss in found[name].values())))
        return found

    monkeypatch.setattr(choosing, "_refitted", refitted)
    tried = ("--candidate", "gated_norm", "--candidate", "random")
    done = moekern(
        *run(work, "--keep", 4, "--criterion", "auto", *tried, "--refit", "--out", tmp_path / "out", "--no-forward")
    )
    assert done.returncode == 0, done.stderr
    told = choice_of(tmp_path / "out.moekern" / "plan.json")
    assert told["refitted"]
    assert [f"{told['chosen']} at 4"] == best


def test_only_domains_that_count_choose(work: Path, tmp_path: Path) -> None:
    command = run(work, "--keep", 4, "--criterion", "auto", *TRIED, "--domain", "b", "--out", tmp_path / "out")
    assert moekern(*command).returncode == 0
    assert choice_of(tmp_path / "out.moekern" / "plan.json")["domains"] == ["b"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--candidate", "reap"), "--candidate reap: goes with --criterion auto"),
        (("--criterion", "auto", "--candidate", "reap"), "name two or more, each once"),
        (("--criterion", "auto", "--candidate", "reap", "--candidate", "reap"), "name two or more, each once"),
        (("--criterion", "auto", "--until-stable", "0.9"), "--until-stable: is by one criterion"),
        (("--criterion", "auto", "--tokens", 96), "no domain has the 4 sequences of which one is held back to choose"),
        (("--criterion", "auto", "--candidate", "raep", "--candidate", "hope"), "did you mean reap?"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(work: Path, tmp_path: Path, more: tuple[object, ...], says: str) -> None:
    done = moekern(*run(work, "--keep", 4, *more, "--out", tmp_path / "out"))
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_elsewhere_auto_says_where_it_goes(work: Path, tmp_path: Path) -> None:
    done = moekern("plan", tmp_path / "s.safetensors", "--keep", 4, "--criterion", "auto", "--out", tmp_path / "p.json")
    assert done.returncode == 2
    assert "`run` chooses by measurement" in done.stderr


def test_evaluate_takes_the_best_plan(work: Path, tmp_path: Path) -> None:
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.plan.document import LayerPlan

    layers = find_layout(open_checkpoint(work / "model")).layers
    for name, keep in {"half": (0, 2, 5, 7), "less": (0, 1)}.items():
        Plan({layer: LayerPlan(keep) for layer in layers}, {"by": name}).save(tmp_path / f"{name}.json")
    plans = [tmp_path / "less.json", tmp_path / "half.json"]
    command = ("evaluate", work / "model", *plans, "--data", f"a={work / 'a.npy'}", "--sequence-length", 24)
    found: Any = document(*command, "--best", tmp_path / "best.json")
    assert found["best"]["plan"] == str(plans[1])
    best = Plan.load(tmp_path / "best.json")
    assert best.layers == Plan.load(plans[1]).layers
    assert best.provenance["by"] == "half"
    assert best.provenance["choice"]["candidates"][str(plans[0])]["farther"]["mean"] > 0
    assert moekern(*command, "--best", tmp_path / "best.json").returncode == 2  # it is there
    one = moekern(*command[:3], *command[4:], "--best", tmp_path / "other.json")
    assert "takes one of several plans" in one.stderr
