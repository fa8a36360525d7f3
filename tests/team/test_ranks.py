"""Any number of processes gives the bytes of one, empty ones included; one that dies ends all."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import dealt
from moekern.demo import MODEL, TEXT
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.statistics.layer import TIERS
from tests.helpers.commands import Done, contents, model_and_ids, moekern
from tests.helpers.ranks import ended, started, torchrun
from tests.helpers.tight import little_room, tighten

C, GERMAN = TEXT / "c" / "calibration.txt", TEXT / "german" / "calibration.txt"
TEXTS = ["--data", f"c={C}:0.7", "--data", f"de={GERMAN}:0.3", "--tokens", 700, "--sequence-length", 32]
WORDS = [*TEXTS, "--chunk", 1]
FLOAT32 = ["--dtype", "float32"]
pytestmark = pytest.mark.xdist_group("ranks")  # they are forked from one process
SPLIT = [word for tier in TIERS if tier != "gradient" for word in ("--tier", tier)]


def well(done: list[Done]) -> None:
    """All have ended well, and only rank 0 has spoken."""
    for rank, each in enumerate(done):
        assert each.returncode == 0, (rank, each.stderr, done[0].stderr)
        assert rank == 0 or (each.stdout, each.stderr) == ("", "")


@pytest.mark.parametrize("ranks", [[(4, 2)], pytest.param([(2, 1), (3, 1)], marks=pytest.mark.whole)])
def test_statistics_are_those_of_one_process(tmp_path: Path, ranks: list[tuple[int, int]]) -> None:
    """Every tier but gradients, for 1 to 4 ranks, the last of them on two nodes."""
    command = ["calibrate", MODEL, *WORDS, *FLOAT32, *SPLIT, "--replay-tokens", 20]
    for size, nodes in ((1, 1), *ranks):
        well(torchrun(tmp_path / str(size), size, *command, "--out", tmp_path / f"{size}.s", nodes=nodes))
        assert (tmp_path / f"{size}.s").read_bytes() == (tmp_path / "1.s").read_bytes()


def test_ranks_without_text_help_too(tmp_path: Path) -> None:
    """One chunk of text, so one segment."""
    command = [
        "calibrate",
        MODEL,
        "--data",
        f"c={C}",
        "--tokens",
        100,
        "--sequence-length",
        128,
        *FLOAT32,
        "--tier",
        "outliers",
    ]
    for size in (1, 3):
        well(torchrun(tmp_path / str(size), size, *command, "--out", tmp_path / f"{size}.s"))
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "3.s").read_bytes()


def in_groups(folder: Path, rank: int) -> None:
    """Layers are larger than the budget."""
    tighten(pytest.MonkeyPatch(), folder, Compute(dtype=torch.float32))


@pytest.mark.parametrize(
    ("budget", "nodes"),
    [("groups", 1), *(pytest.param(*each, marks=pytest.mark.whole) for each in (("groups", 3), ("layers", 1)))],
)
def test_gradients_are_those_of_one_process(tmp_path: Path, budget: str, nodes: int) -> None:
    """Of three ranks each of two has a domain, and one no text."""
    model_and_ids(tmp_path)
    model, ids = tmp_path / "model", tmp_path / "ids.npy"
    text = ["--data", f"a={ids}:3", "--data", f"b={ids}:2", "--tokens", 40, "--sequence-length", 24]
    command = ["calibrate", model, *text, *FLOAT32, "--tier", "gradient"]
    for size in (1, 3):
        out, places = tmp_path / f"{size}.s", nodes if size > 1 else 1
        tight = partial(in_groups, model) if budget == "groups" else None
        well(torchrun(tmp_path / f"said-{size}", size, *command, "--out", out, before=tight, nodes=places))
    assert ("experts run in 2 groups" in (tmp_path / "said-1" / "0.err").read_text()) == (budget == "groups")
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "3.s").read_bytes()


@pytest.mark.whole  # test_resume.py compares both, too
def test_plans_of_rounds_and_losses_are_those_of_one_process(tmp_path: Path) -> None:
    iterate = ["iterate", MODEL, *WORDS, *FLOAT32, "--keep", 8, "--rounds", 2]
    evaluate = ["evaluate", MODEL, tmp_path / "1.json", *TEXTS, *FLOAT32, "--json"]
    found = []
    for size in (1, 3):
        well(torchrun(tmp_path / str(size), size, *iterate, "--out", tmp_path / f"{size}.json"))
        done = torchrun(tmp_path / str(size), size, *evaluate)
        well(done)
        found.append(json.loads(done[0].stdout))
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()
    assert found[0] == found[1]
    assert not (tmp_path / "3.json.moekern").exists()


def room_for(memory: int, disk: int, rank: int) -> None:
    """So many bytes for hidden states; what rank 1 has of memory is half of it."""
    little_room(pytest.MonkeyPatch(), memory // (1 + rank), disk)


TOKEN = 4 * int(json.loads((MODEL / "config.json").read_text())["hidden_size"])


def test_text_that_ranks_have_no_room_for_is_measured_in_groups(tmp_path: Path) -> None:
    """The rank with the least room decides; of the disk, each has its share."""
    command = ["calibrate", MODEL, *WORDS, *FLOAT32, "--out"]
    assert moekern(*command, tmp_path / "1.s").returncode == 0
    done = torchrun(tmp_path / "2", 2, *command, tmp_path / "2.s", before=partial(room_for, 200 * TOKEN, 80 * TOKEN))
    well(done)
    said = "the text is measured in 3 groups, each a pass over the weights"
    assert any(line.startswith("rank 1: ") and line.endswith(said) for line in done[0].stderr.splitlines())
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "2.s").read_bytes()


@pytest.mark.whole
def test_losses_that_ranks_have_no_room_for_are_measured_in_groups(tmp_path: Path) -> None:
    command = ["evaluate", MODEL, _half(tmp_path), *TEXTS, *FLOAT32, "--batch-size", 1, "--json"]
    one = moekern(*command)
    done = torchrun(tmp_path / "2", 2, *command, before=partial(room_for, 400 * TOKEN, 80 * TOKEN))
    well(done)
    assert "groups, each a pass over the weights" in done[0].stderr
    assert done[0].stdout == one.stdout
    done = torchrun(tmp_path / "none", 2, *command, before=partial(room_for, 40 * TOKEN, 0))
    assert [each.returncode for each in done] == [2, 2]
    (line,) = [line for each in done for line in each.stderr.splitlines() if line.startswith('{"error": ')]
    assert "give more (--memory), another folder (--spill) or less text (--tokens)" in line


def test_run_makes_the_same_checkpoint(tmp_path: Path) -> None:
    command = ["run", MODEL, *WORDS, *FLOAT32, "--keep", 8, "--no-forward"]
    for size in (1, 2):
        well(torchrun(tmp_path / f"said-{size}", size, *command, "--out", tmp_path / str(size)))
        assert (tmp_path / f"{size}.moekern" / "quality.json").exists()
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    manifest = "moekern_manifest.jsonl"
    assert one.pop(manifest)
    assert two.pop(manifest)
    assert one == two


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(700, (1, 3)), *(pytest.param(n, (1, 2, 3), marks=pytest.mark.whole) for n in (700, 1400))]
)
def test_refit_makes_the_same_checkpoint(tmp_path: Path, tokens: int, sizes: tuple[int, ...]) -> None:
    """Shares of the text are no whole units for some sizes, and some ranks may have none that is fitted. Experts are
    chosen anew on the way."""
    text = [*(word if word != 700 else tokens for word in WORDS), "--reestimate"]
    made = []
    for size in sizes:
        out = tmp_path / f"{size}" / "out"
        out.parent.mkdir()
        command = ["refit", MODEL, _half(tmp_path), *text, *FLOAT32, "--no-forward", "--out", out]
        well(torchrun(tmp_path / f"words-{size}", size, *command))
        made.append({name: value for name, value in contents(out.parent).items() if "manifest" not in name})
    assert all(each == made[0] for each in made[1:])


@pytest.mark.parametrize("command", ["refit", "run"])
def test_refine_is_refused_before_anything_is_read(tmp_path: Path, command: str) -> None:
    what = [_half(tmp_path)] if command == "refit" else ["--keep", 0.5, "--refit"]
    out = tmp_path / "out"
    done = torchrun(tmp_path / "words", 2, command, MODEL, *what, *WORDS, "--refine", "--out", out)
    assert done[0].returncode == 2, done[0].stderr
    assert "--refine: experts are trained by one process" in done[0].stderr
    assert "reading" not in done[0].stderr
    assert not out.exists()


def _half(folder: Path) -> Path:
    """A plan that keeps half of the experts."""
    layers = find_layout(open_checkpoint(MODEL)).layers
    told = {"criterion": "hope_all_tokens"}
    Plan({key: LayerPlan(tuple(range(layer.num_experts // 2))) for key, layer in layers.items()}, told).save(
        folder / "plan.json"
    )
    return folder / "plan.json"


def test_layers_that_hand_on_more_make_all_begin_again(tmp_path: Path) -> None:
    """A rank without text does not see it by itself."""
    model_and_ids(tmp_path, 12, "inkling2_text")
    command = ["calibrate", tmp_path / "model", "--data", tmp_path / "ids.npy", "--sequence-length", 12, *FLOAT32]
    for size in (1, 2):
        done = torchrun(tmp_path / str(size), size, *command, "--out", tmp_path / f"{size}.s")
        assert [each.returncode for each in done] == [0] * size, done
        assert done[0].stderr.count("the pass begins again") == 1
        assert "begins again" not in done[-1].stderr or size == 1
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "2.s").read_bytes()


def test_what_no_ranks_share_is_done_by_one(tmp_path: Path) -> None:
    plan = {"format": "moekern.plan/1", "layers": {str(i): {"keep": [0, 1, 2, 3]} for i in range(4)}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = torchrun(tmp_path / "check", 2, "inspect", MODEL)
    well(done)
    assert done[0].stdout
    done = torchrun(tmp_path / "prune", 2, "prune", MODEL, tmp_path / "plan.json", "--out", tmp_path / "pruned")
    assert [each.returncode for each in done] == [0, 0], done
    assert (tmp_path / "pruned" / "config.json").exists()


def test_an_error_of_the_input_is_one_line(tmp_path: Path) -> None:
    command = ["calibrate", MODEL, *WORDS, "--tier", "outliers", "--part", "1/2", "--out", tmp_path / "s"]
    done = torchrun(tmp_path / "said", 2, *command)
    assert [each.returncode for each in done] == [2, 2]
    assert done[0].stderr.startswith("moekern: --tier outliers: it needs all of the text, and --part 1/2 has a share")
    assert (done[0].stderr.count("\n"), done[1].stderr) == (1, "")
    assert not (tmp_path / "s").exists()


def fail_in_a_layer(failing: int, how: str, rank: int) -> None:
    """In one rank, what happens when it has come to the third layer."""
    from moekern.calibration.passes import MeasuringPass

    def loaded(self: MeasuringPass, layer: int) -> None:
        if layer == 2 and rank == failing:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("its disk is gone")
        before(self, layer)

    before = MeasuringPass.loaded
    MeasuringPass.loaded = loaded  # type: ignore[method-assign]


@pytest.mark.parametrize(("failing", "how"), [(1, "killed"), (0, "killed"), (2, "raised")])
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, failing: int, how: str) -> None:
    command = ["calibrate", MODEL, *WORDS, *FLOAT32, "--out", tmp_path / "s"]
    processes = started(tmp_path / "said", 3, command, partial(fail_in_a_layer, failing, how))
    done = ended(tmp_path / "said", processes, seconds=100)
    assert all(each.returncode for each in done)
    others = [rank for rank in range(3) if rank != failing]
    assert [done[rank].returncode for rank in others] == [2, 2], done
    what = "has died; the run ends on all ranks" if how == "killed" else "RuntimeError: its disk is gone"
    then = "; the same command goes on at layer "
    told = [line for rank in others for line in done[rank].stderr.splitlines() if line.startswith("moekern: ")]
    assert len(told) == 1, done
    assert told[0].startswith(f"moekern: rank {failing} (on ")
    assert f"{what}{then}" in told[0]
    assert not any("Traceback" in done[rank].stderr for rank in others)
    assert {path.name for path in tmp_path.iterdir()} == {"said", ".s.moekern.tmp", "s.moekern"}


def count_reads(folder: Path, rank: int) -> None:
    """Append what each process reads of the model's files: bytes, a line a call."""
    import moekern._C as _C

    read = _C.read_ranges

    def counted(ranges, threads, **more):  # type: ignore[no-untyped-def]
        with (folder / f"{rank}.read").open("a") as file:
            file.write(f"{sum(length for _, _, length, _ in ranges)}\n")
        return read(ranges, threads, **more)

    _C.read_ranges = counted


def test_weights_are_read_once_a_node(tmp_path: Path) -> None:
    from moekern.checkpoint.folder import open_checkpoint

    command = ["calibrate", MODEL, *WORDS, *FLOAT32, "--out", tmp_path / "s"]
    well(torchrun(tmp_path, 4, *command, before=partial(count_reads, tmp_path), nodes=2))
    read = [sum(map(int, (tmp_path / f"{rank}.read").read_text().split())) for rank in range(4)]
    whole = open_checkpoint(MODEL).nbytes
    assert read == [whole, 0, whole, 0]


@pytest.mark.parametrize("tier", ["replay", pytest.param("gradient", marks=pytest.mark.whole)])
def test_parts_of_several_processes_are_those_of_one(tmp_path: Path, tier: str) -> None:
    command = ["calibrate", MODEL, *WORDS, *FLOAT32, "--part", "2/2", "--tier", "dimensions", "--tier", tier]
    for size in (1, 2):
        well(torchrun(tmp_path / str(size), size, *command, "--out", tmp_path / f"{size}.s"))
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "2.s").read_bytes()


def other_threads(rank: int) -> None:
    """Three threads in rank 1, which round otherwise."""
    import torch

    torch.set_num_threads(1 + 2 * rank)


def test_ranks_that_would_round_otherwise_are_refused(tmp_path: Path) -> None:
    command = ["calibrate", MODEL, *WORDS, *FLOAT32, "--out", tmp_path / "s"]
    done = torchrun(tmp_path / "said", 2, *command, before=other_threads)
    assert [each.returncode for each in done] == [2, 2]
    assert "rank 1 has threads 3, rank 0 1, 2, 4, ...: their sums would have other bits\n" in done[0].stderr
    assert done[1].stderr == ""
    assert not (tmp_path / "s").exists()


def without_shared_memory(rank: int) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    os.memfd_create = refuse  # type: ignore[assignment]


def test_without_shared_memory_each_reads(tmp_path: Path) -> None:
    command = ["calibrate", MODEL, *WORDS, *FLOAT32]
    done = torchrun(tmp_path / "2", 2, *command, "--out", tmp_path / "2.s", before=without_shared_memory)
    assert [each.returncode for each in done] == [0, 0], done
    assert "cannot share memory (No space left on device): each reads all weights" in done[0].stderr
    assert done[1].stderr == ""
    well(torchrun(tmp_path / "1", 1, *command, "--out", tmp_path / "1.s"))
    assert (tmp_path / "1.s").read_bytes() == (tmp_path / "2.s").read_bytes()


def test_work_is_dealt_evenly_and_rank_0_is_never_empty() -> None:
    assert dealt([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert dealt([7], 3) == [0]
    assert dealt([], 2) == []
