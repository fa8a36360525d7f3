"""Fewer experts for each token: changed in memory as another config.json would, annealed, written down and verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moekern.architectures import find_layout
from moekern.architectures.config_keys import TOP_K_KEYS, values
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.cli.app import app
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL
from moekern.model.compute import Compute
from moekern.model.top_k import TopK
from moekern.model.transformers_api import loader_of
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.pruning.replaced import write_replaced
from moekern.recovery import Recovery, Training, recover
from moekern.recovery.course import Course
from moekern.recovery.lottery import Lottery, lottery
from moekern.verification.tensors import verify
from tests.helpers import families

MakeCheckpoint = Callable[[str], Path]
SHORT = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "dbrx", "llama4_text", "gemma4_text")
NAMES = [name for name in families.FAMILIES if name not in families.NO_CALIBRATION]
OTHERS = {
    "deepseek_v4": "a table holds the ids of each token's experts",
    "longcat_flash": "transformers' code does not run one expert a token",
    "phimoe": "two are chosen whatever config.json says",
    "zaya": "it is one expert a token already",
}
CHANGED = [name for name in NAMES if name not in OTHERS]


def with_top_k(source: Path, folder: Path, k: int) -> Path:
    """The same checkpoint with another number wherever its config.json says how many experts a token chooses."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for (*sections, key), _ in list(values(config, TOP_K_KEYS)):
        part = config
        for name in sections:
            part = part[name]
        part[key] = k
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return getattr(model, "thinker", model)(input_ids=families.input_ids(name, 2, 12), use_cache=False).logits


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.whole) for n in CHANGED])
def test_a_change_in_memory_is_that_of_config(name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = family_checkpoint(name)
    model, layout = families.load(folder), find_layout(open_checkpoint(folder))
    chosen = TopK(loader_of(getattr(model, "thinker", model)), layout)
    chosen.check(1)
    before, want = logits(model, name), logits(families.load(with_top_k(folder, tmp_path / "one", 1)), name)
    assert not torch.equal(before, want)
    for k, expected in ((1, want), (2, before), (1, want)):
        chosen.choose(k)
        assert chosen.now == k
        assert torch.equal(logits(model, name), expected)


def test_numbers_that_no_model_has_are_refused(family_checkpoint: MakeCheckpoint) -> None:
    for name, k, line in (
        ("qwen3_moe", 3, "--top-k 3: each token chooses 2 experts now; give 1 to 2"),
        ("phimoe", 1, "--top-k 1: phimoe: its code chooses 2 experts for each token, whatever config.json says"),
        ("deepseek_v4", 1, r"--top-k 1: deepseek_v4: layer 0.mlp.gate.tid2eid has the shape \[96, 2\] for 2 experts a"),
    ):
        folder = family_checkpoint(name)
        chosen = TopK(loader_of(families.load(folder)), find_layout(open_checkpoint(folder)))
        with pytest.raises(InputError, match=line):
            chosen.check(k)
    with pytest.raises(InputError, match="--top-k 0: expected 1 or more"):
        Training(top_k=0).check()


@pytest.mark.parametrize(
    ("of", "to", "steps", "want"),
    [
        (2, 1, 8, [2, 2, 2, 2, 1, 1, 1, 1]),
        (2, 1, 5, [2, 2, 2, 1, 1]),
        (4, 1, 12, [4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1]),
        (8, 2, 4, [8, 5, 2, 2]),
        (2, 2, 3, [2, 2, 2]),
        (4, 1, 1, [4]),
    ],
)
def test_the_number_falls_in_the_first_half_of_the_steps(of: int, to: int, steps: int, want: list[int]) -> None:
    assert [Training(top_k=to).top_k_at(step, steps, of) for step in range(steps)] == want
    assert [Training().top_k_at(step, steps, of) for step in range(steps)] == [of] * steps


PLAN = Plan({str(i): LayerPlan((0, 2, 3, 7)) for i in range(families.LAYERS)})


def text(name: str, sequences: int = 8, seed: int = 0) -> TokenData:
    rows = families.input_ids(name, sequences, 16, seed)
    return TokenData(tuple(Batch("a", row[None]) for row in rows), {})


TRAINING = Training(("router", "norms"), 3, step_tokens=48, kl=0, next=1, rate=1e-2, every=100, top_k=1)
JUDGED = text("qwen3_moe", 2, 9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recovery]:
    """in: a model of two experts a token. pruned: by PLAN. out: trained then to choose one. And what came of that."""
    tmp_path = tmp_path_factory.mktemp("top_k")
    families.save("qwen3_moe", tmp_path / "in")
    prune(tmp_path / "in", PLAN, tmp_path / "pruned")
    done = recover(
        tmp_path / "pruned", None, text("qwen3_moe"), tmp_path / "work", TRAINING, Compute("cpu"), judged=JUDGED
    )
    write_replaced(tmp_path / "pruned", tmp_path / "out", done.folder, done.record, settings=done.settings)
    return tmp_path, done


def loss(folder: Path, data: TokenData) -> float:
    return evaluate(folder, data, {}, Compute("cpu"))[ORIGINAL]["a"].nll


def test_losses_before_are_with_all_and_after_with_fewer(made: tuple[Path, Recovery], tmp_path: Path) -> None:
    folder, done = made
    steps = [each["top_k"] for each in done.curve if "norm" in each]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (2, 1)
    before, after = (row["a"].nll for row in done.judged)
    assert before == pytest.approx(loss(folder / "pruned", JUDGED), rel=1e-5)
    assert after == pytest.approx(loss(folder / "out", JUDGED), rel=1e-5)
    held = TokenData(tuple(s.batch for s in Course.of(text("qwen3_moe"), TRAINING, JUDGED).held), {})
    only = with_top_k(folder / "pruned", tmp_path / "only", 1)
    first, last = (row["a"].nll for row in done.held)
    assert first == pytest.approx(loss(only, held), rel=1e-5)
    assert last == pytest.approx(loss(folder / "out", held), rel=1e-5)
    assert abs(first - loss(folder / "pruned", held)) > 1e-3
    assert any(
        note.startswith("each token chooses 1 of the experts instead of 2: losses before are") for note in done.notes
    )


def test_the_output_says_so_and_nothing_else_of_config_changes(made: tuple[Path, Recovery]) -> None:
    folder, done = made
    assert done.settings == {("num_experts_per_tok",): 1}
    before, after = ((folder / name / "config.json").read_text() for name in ("pruned", "out"))
    assert after == before.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
    record = json.loads((folder / "out" / RECOVERY).read_text())
    assert record["settings"] == {"num_experts_per_tok": 1}
    assert "2404.05089" in record["reconstructed"]
    model = families.load(folder / "out")
    assert model.config.num_experts_per_tok == 1
    ids = [batch.input_ids for batch in JUDGED.batches]
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(model(input_ids=each).logits[0, :-1].float(), each[0, 1:]) for each in ids
        ]
    assert float(torch.stack(found).mean()) == pytest.approx(done.judged[1]["a"].nll, rel=1e-4)


def test_what_comes_after_knows_the_number(made: tuple[Path, Recovery], tmp_path: Path) -> None:
    folder, _ = made
    report = verify(folder / "in", PLAN, folder / "out")
    assert (report.problems, report.trained > 0) == ((), True)
    statistics = calibrate(folder / "out", text("qwen3_moe"), Compute("cpu"))
    assert statistics.header["top_k"] == 1
    assert int(statistics.layers["0"]["a"].count.sum()) == 8 * 16
    plan = Plan({str(i): LayerPlan((1,)) for i in range(families.LAYERS)})
    prune(folder / "out", plan, tmp_path / "again")
    assert verify(folder / "out", plan, tmp_path / "again").problems == ()
    told = json.loads(CliRunner().invoke(app, ["inspect", str(folder / "out"), "--json"]).stdout)
    assert any(note.endswith("num_experts_per_tok is 1 since") for note in told["notes"])


def test_stopped_on_the_way_and_gone_on(made: tuple[Path, Recovery], tmp_path: Path) -> None:
    """From a look on, to the same bytes."""
    pruned, data = made[0] / "pruned", text("qwen3_moe", 2)
    training = Training(("router",), 1, step_tokens=16, kl=0, next=1, every=1, entropy=0.1, top_k=1)
    whole = recover(pruned, None, data, tmp_path / "whole", training, Compute("cpu"))

    def stop(what: str, done: float, total: int) -> None:
        if what == "training" and done > 1.5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        recover(pruned, None, data, tmp_path / "parts", training, Compute("cpu"), progress=stop)
    parts = recover(pruned, None, data, tmp_path / "parts", training, Compute("cpu"))
    assert parts.curve == whole.curve
    assert [each["top_k"] for each in parts.curve if "norm" in each] == [2, 1]
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (parts.folder / path.name).read_bytes()


def test_steps_in_which_nothing_reaches_the_router_are_told(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A single gate that is divided by its own sum is 1."""
    for weight in (0.0, 0.1):
        training = Training(("router",), step_tokens=16, kl=0, next=1, every=100, top_k=1, entropy=weight)
        where = tmp_path / str(weight)
        done = recover(family_checkpoint("mixtral"), None, text("mixtral", 2), where, training, Compute("cpu"))
        told = [note for note in done.notes if "no gradient reached what trains" in note]
        assert [note.split(" steps")[0] for note in told] == ([] if weight else ["in 1 of 2"])


def test_it_does_not_end_before_the_number_has_fallen(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Looks that bring nothing count from the step on before which it has: 4 of 7."""
    training = Training(("norms",), step_tokens=16, kl=0, next=1, rate=1e-30, every=1, patience=1, top_k=1)
    folder = family_checkpoint("qwen3_moe")
    done = recover(folder, None, text("qwen3_moe"), tmp_path, training, Compute("cpu"), judged=JUDGED)
    assert (done.steps, done.best) == (4, 0)
    assert any("no weight is changed; a lower --rate may help" in note for note in done.notes)


def test_rounds_of_a_lottery_do_not_take_it(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    method = Lottery(0.5, training=Training(top_k=1))
    with pytest.raises(InputError, match="lottery: .*is trained by recover"):
        lottery(family_checkpoint("qwen3_moe"), text("qwen3_moe"), method, tmp_path / "out", tmp_path / "work")
