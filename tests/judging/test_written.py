"""Continuations are those of the pruned checkpoint, token by token, and what is told of them is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.losses import ORIGINAL
from moekern.judging.decoding import decoding_of
from moekern.judging.written import Steering, Writer, continuations, end_tokens, fitting
from moekern.model import journal
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.plan.document import LayerPlan, Plan
from tests.helpers import families
from tests.helpers.in_flight import Half
from tests.helpers.tight import tighten

NAME, NEW = "qwen3_moe", 10


def prompts() -> TokenData:
    """Four of two lengths."""
    return TokenData(tuple(Batch("a", families.input_ids(NAME, 2, length, length)) for length in (6, 9)), {})


@torch.no_grad()
def greedy(model: Any, row: Tensor, new: int, ends: tuple[int, ...]) -> tuple[list[int], bool]:
    """Without a cache, one prompt at a time."""
    ids = row.tolist()
    for _ in range(new):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[len(row) : -1], True
    return ids[len(row) :], False


@pytest.fixture
def ending(family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any], tmp_path: Path) -> Path:
    """The family's checkpoint with another end token: one that its greedy continuation of the first prompt has."""
    ids, _ = greedy(whole_model(NAME), prompts().batches[0].input_ids[0], NEW, ())
    folder = tmp_path / "ending"
    folder.mkdir()
    for path in family_checkpoint(NAME).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[5], 10_000]}))
    return folder


def test_they_are_the_pruned_checkpoints(
    ending: Path, whole_model: Callable[[str], Any], half: Callable[[str], Half]
) -> None:
    pruned = half(NAME)
    (end,) = end_tokens(open_checkpoint(ending))
    steps: list[tuple[float, int]] = []
    found = continuations(
        ending, prompts(), {"half": pruned.plan}, [decoding_of("greedy")], Compute("cpu", "float32"),
        new_tokens=NEW, progress=lambda done, total: steps.append((done, total)),
    )["greedy"]  # fmt: skip
    assert steps == [(n, 4) for n in (1, 2, 3, 4)]
    rows = [row for batch in prompts().batches for row in batch.input_ids]
    for name, model in ((ORIGINAL, whole_model(NAME)), ("half", families.load(pruned.folder))):
        assert [(list(c.ids), c.ended) for c in found[name]] == [greedy(model, row, NEW, (end,)) for row in rows]
        for row, mine, theirs in zip(rows, found[name], found[ORIGINAL], strict=True):
            assert (mine.end_probability is not None) == theirs.ended
            if theirs.ended:
                given = torch.tensor([[*row.tolist(), *theirs.ids]])
                with torch.no_grad():
                    want = model(input_ids=given).logits[0, -1].softmax(-1)[end]
                assert mine.end_probability == pytest.approx(float(want), rel=1e-4)
    assert any(c.ended for c in found[ORIGINAL])
    for mine, theirs in zip(found["half"], found[ORIGINAL], strict=True):
        assert mine.agreed is not None
        assert mine.ids[: mine.agreed] == theirs.ids[: mine.agreed]
        assert mine.identical == ((mine.ids, mine.ended) == (theirs.ids, theirs.ended))
        if not mine.identical:
            ahead = [c.ids[mine.agreed : mine.agreed + 1] for c in (mine, theirs)]
            assert ahead[0] != ahead[1]


def test_drawn_tokens_come_of_the_seed_and_a_plan_that_drops_nothing_changes_none(
    family_checkpoint: Callable[[str], Path],
) -> None:
    nothing = Steering({"0": (1,)}, 1e-12)
    ways = [decoding_of("temperature=1.5"), decoding_of("guarded")]
    state = torch.get_rng_state()
    first, again, other = (
        continuations(
            family_checkpoint(NAME), prompts(), {"nothing": nothing}, ways, Compute("cpu", "float32"),
            new_tokens=6, seed=seed,
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    for way in ("temperature=1.5", "guarded"):
        assert first[way] == again[way]
        assert first[way] != other[way]
        assert [c.ids for c in first[way]["nothing"]] == [c.ids for c in first[way][ORIGINAL]]
        assert all(c.agreed is None for rows in first[way].values() for c in rows)
    assert first["guarded"] != first["temperature=1.5"]


def test_a_model_without_an_end_says_so(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    folder.mkdir()
    for path in family_checkpoint(NAME).iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    told: list[str] = []
    found = continuations(folder, prompts(), {}, [decoding_of("greedy")], new_tokens=3, tell=told.append)
    assert [line for line in told if "names no end token" in line]
    assert {len(c.ids) for c in found["greedy"][ORIGINAL]} == {3}


def test_a_model_without_room_says_how_much_it_takes(
    family_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(NAME)
    tighten(monkeypatch, folder, share=1.2)
    with pytest.raises(InputError, match="which needs all layers in memory, .* KiB, and as much again; give more"):
        continuations(folder, prompts(), {}, [decoding_of("greedy")], new_tokens=8)


def test_what_cannot_be_done_is_refused(family_checkpoint: Callable[[str], Path], half: Callable[[str], Half]) -> None:
    folder, ways = family_checkpoint(NAME), [decoding_of("greedy")]
    with pytest.raises(InputError, match="--new-tokens 60: all prompts are with 60 new tokens longer than the 64 posi"):
        continuations(folder, prompts(), {}, ways, new_tokens=60)
    told: list[str] = []
    kept = fitting(open_checkpoint(folder), prompts(), 56, told.append).batches
    assert [batch.input_ids.shape[1] for batch in kept] == [6]
    assert told == [
        "left out: 2 prompts, with 56 new tokens longer than the 64 positions that the model was made for "
        "(max_position_embeddings)"
    ]
    with pytest.raises(InputError, match="'original'"):
        continuations(folder, prompts(), {ORIGINAL: half(NAME).plan}, ways)
    with pytest.raises(InputError, match="too-hard: layer 1: without experts"):
        continuations(folder, prompts(), {"too-hard": Steering({"1": tuple(range(7))}, -torch.inf)}, ways)


def test_merged_experts_are_merged_and_a_refit_is_refused(ending: Path) -> None:
    groups = (((0, 1.0), (1, 3.0)), ((2, 1.0),), ((5, 1.0),), ((7, 1.0),))
    keys = find_layout(open_checkpoint(ending)).layers
    plan, merged = (Plan({key: LayerPlan((0, 2, 5, 7), groups=each) for key in keys}) for each in (None, groups))
    plans, compute = {"half": plan, "merged": merged}, Compute("cpu", "float32")
    found = continuations(ending, prompts(), plans, [decoding_of("greedy")], compute, new_tokens=NEW)["greedy"]
    assert found["half"] != found["merged"]
    refit = {"b": replace(plan, provenance={"refit": {"recipe": "0" * 64, "layers": {"0": {}}}})}
    with pytest.raises(InputError, match="b: its layers were refitted"):
        continuations(ending, prompts(), refit, [decoding_of("greedy")], compute, new_tokens=NEW)


def test_a_stopped_run_goes_on_at_the_batch_that_it_was_in(
    ending: Path, half: Callable[[str], Half], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same drawn continuations; nothing is left in the end, and another number of new tokens is another run."""
    monkeypatch.setattr(journal, "SHARE", 0)
    write, said = Writer.written, list[str]()

    def run(most: int, new: int = NEW, resume: bool = True) -> tuple[Any, int]:
        """What was written, or None where it was interrupted behind so many batches; how many were."""
        count = 0

        def counted(self: Writer, *given: Any) -> Any:
            nonlocal count
            if count == most:
                raise KeyboardInterrupt
            count += 1
            return write(self, *given)

        monkeypatch.setattr(Writer, "written", counted)
        where = Resume(tmp_path / "state", tell=said.append) if resume else None
        try:
            return continuations(
                ending, prompts(), {"half": half(NAME).plan}, [decoding_of("sampled")], Compute("cpu", "float32"),
                new_tokens=new, resume=where,
            ), count  # fmt: skip
        except KeyboardInterrupt:
            return None, count

    whole, batches = run(100, resume=False)
    assert batches == 4
    assert run(2) == (None, 2)
    assert run(1, new=NEW - 1) == (None, 1)
    assert run(1) == (None, 1)
    assert run(100) == (whole, 1)
    assert said == [f"going on at batch {n} of 4 (writing), where a stopped run was" for n in (3, 4)]
    assert run(100, new=NEW - 1)[1] == 3
    assert not list((tmp_path / "state").iterdir())
