"""What `recover` does: the stages joined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.cli import console, pipeline
from moekern.cli.before_after import pairs_document
from moekern.data.text import Text
from moekern.errors import InputError, add_note
from moekern.files import check_new, is_folder, work_path, working, write_bytes
from moekern.model.compute import Compute
from moekern.pruning.copying import Copy
from moekern.pruning.replaced import ReplacedReport, write_replaced
from moekern.pruning.work_folder import check_target
from moekern.recovery import Recovery, Training, recover
from moekern.recovery.recover import ADAPTER, STATE
from moekern.recovery.trained import Trained

WORK = "recover"  # in the work folder


@dataclass(frozen=True)
class Recovered:
    """What came of training, and where it was written. `against`: whether there was an original to compare with."""

    recovery: Recovery
    base: Path
    out: Path
    written: ReplacedReport | None  # None: an adapter was
    against: bool
    adapter: Path | None = None  # of products that go with what was written

    def document(self) -> dict[str, Any]:
        found = self.recovery
        return {
            **losses_of(found),
            "best": found.best,
            "steps": found.steps,
            "tensors": found.tensors,
            "curve": list(found.curve),
            "notes": list(found.notes),
            "factored": dict(found.factored),
            "settings": {".".join(path): number for path, number in found.settings.items()},
            "out": str(self.out),
            "adapter": None if self.adapter is None else str(self.adapter),
            "written": None if self.written is None else {**asdict(self.written), "out": str(self.out)},
        }


def losses_of(found: Recovery) -> dict[str, Any]:
    """held and judged, before and after, as JSON."""
    return pairs_document({"held": found.held, "judged": found.judged})


def recover_stages(
    pruned: Path,
    original: Path | None,
    text: Text,
    training: Training,
    compute: Compute,
    out: Path,
    copy: Copy = "auto",
    *,
    predictions: Path | None = None,
    restart: bool = False,
) -> Recovered:
    """Train, and write. What a run that was stopped has left is used again."""
    checkpoint = open_checkpoint(pruned)
    compute = pipeline.told_compute(compute, checkpoint, find_layout(checkpoint))
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    with working(out) as side, _told_how_to_go_on(side / WORK / STATE):
        with changing_progress() as shown:
            found = recover(
                checkpoint, original, data, side / WORK, training, compute,
                predictions=predictions, restart=restart, tell=console.say, progress=shown,
            )  # fmt: skip
        record = {
            **found.record,
            **losses_of(found),
            "curve": list(found.curve),
            **({"factored": dict(found.factored)} if found.factored else {}),
        }
        report, beside = None, adapter_of(out) if training.adapter and training.factored else None
        if beside is not None:
            record["adapter"] = beside.name
            put_adapter(found.folder.parent / ADAPTER, beside, out)
        if training.adapter and beside is None:
            write_bytes(found.folder / RECOVERY, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            found.folder.rename(out)
        else:
            with console.progress("writing", "bytes") as step:
                report = write_replaced(
                    checkpoint, out, found.folder, record, settings=found.settings, copy=copy, progress=step
                )
        shutil.rmtree(side / WORK)
    return Recovered(found, pruned, out, report, original is not None and training.kl > 0, beside)


def adapter_of(out: Path) -> Path:
    """The folder of the products that go with a checkpoint of what is beside them."""
    return out.with_name(out.name + "-adapter")


def check_targets(out: Path, pruned: Path, training: Training) -> None:
    """Raise InputError where something is in the place of what is to be written; what a run that ended has left of its
    work is removed. An adapter may be there that a run which was stopped has put there."""
    clean_up(out)
    check_target(out, pruned)
    if training.adapter and training.factored and not (work_path(out) / WORK / STATE).is_file():
        check_new(adapter_of(out), folder=True, source=pruned)


def put_adapter(made: Path, place: Path, base: Path) -> None:
    """Give an adapter its name, and the one of the checkpoint that it is put on. One of a stopped run is replaced."""
    config = made / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": str(base)}
    write_bytes(config, (json.dumps(said, indent=2) + "\n").encode())
    if is_folder(place) and {path.name for path in place.iterdir()} <= {path.name for path in made.iterdir()}:
        shutil.rmtree(place)
    check_new(place)
    made.rename(place)


@contextmanager
def _told_how_to_go_on(state: Path) -> Iterator[None]:
    """Who stops it is told what becomes of its work."""
    try:
        yield
    except KeyboardInterrupt as error:
        if state.is_file():
            add_note(error, f"the same command goes on after step {Trained.said_in(state).get('step')}")
        raise


def clean_up(out: Path, name: str = WORK) -> None:
    """Remove what a process that was killed between giving `out` its name and removing this has left in its work
    folder."""
    side = work_path(out) if out.name else out
    made = is_folder(out) and (out / RECOVERY).is_file() and not (side / "checkpoint").exists()
    if made and is_folder(side):
        with suppress(InputError), working(out):  # whose lock may be all that is left
            if is_folder(side / name):
                shutil.rmtree(side / name)


@contextmanager
def changing_progress() -> Iterator[Callable[[str, float, int], None]]:
    """As `console.progress`, of one thing after another: yields step(what, done, total)."""
    with ExitStack() as stack:
        current: list[tuple[str, console.Step]] = []

        def step(what: str, done: float, total: int) -> None:
            if not current or current[0][0] != what:
                stack.close()
                unit = "steps" if what == "training" else "layers"
                current[:] = [(what, stack.enter_context(console.progress(what, unit)))]
            current[0][1](done, total)

        yield step
