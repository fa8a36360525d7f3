"""What `recover` does: the stages joined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.cli import console, pipeline
from moekern.data.text import Text
from moekern.evaluation.losses import Loss, mean_loss
from moekern.files import working, write_bytes
from moekern.model.compute import Compute
from moekern.pruning.copying import Copy
from moekern.pruning.replaced import ReplacedReport, write_replaced
from moekern.recovery import Recovery, Training, recover

WORK = "recover"  # in the work folder
METRICS = ("nll", "kl", "top1")
Row = Mapping[str, Loss]


@dataclass(frozen=True)
class Recovered:
    """What came of training, and where it was written. `against`: whether there was an original to compare with."""

    recovery: Recovery
    base: Path
    out: Path
    written: ReplacedReport | None  # None: an adapter was
    against: bool

    def pairs(self, before: Row, after: Row) -> list[str]:
        """Means over domains before and after, for people."""
        cells = []
        for name in METRICS:
            pair = [mean_loss({d: getattr(loss, name) for d, loss in row.items()}) for row in (before, after)]
            shown = [f"{value:.1%}" if name == "top1" else f"{value:.4f}" for value in pair]
            cells.append(" -> ".join(shown) if self.against or name == "nll" else "-")
        return cells

    def document(self) -> dict[str, Any]:
        found = self.recovery
        return {
            **losses_of(found),
            "best": found.best,
            "steps": found.steps,
            "tensors": found.tensors,
            "curve": list(found.curve),
            "notes": list(found.notes),
            "settings": {".".join(path): number for path, number in found.settings.items()},
            "out": str(self.out),
            "written": None if self.written is None else {**asdict(self.written), "out": str(self.out)},
        }


def losses_of(found: Recovery) -> dict[str, Any]:
    """held and judged, before and after, as JSON."""
    return {
        name: dict(zip(("before", "after"), ({d: asdict(loss) for d, loss in r.items()} for r in pair), strict=True))
        for name, pair in (("held", found.held), ("judged", found.judged))
    }


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
    with working(out) as side:
        with changing_progress() as shown:
            found = recover(
                checkpoint, original, data, side / WORK, training, compute,
                predictions=predictions, restart=restart, tell=console.say, progress=shown,
            )  # fmt: skip
        record = {**found.record, **losses_of(found), "curve": list(found.curve)}
        report = None
        if training.adapter:
            write_bytes(found.folder / RECOVERY, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            found.folder.rename(out)
        else:
            with console.progress("writing", "bytes") as step:
                report = write_replaced(
                    checkpoint, out, found.folder, record, settings=found.settings, copy=copy, progress=step
                )
        shutil.rmtree(side / WORK)
    return Recovered(found, pruned, out, report, original is not None and training.kl > 0)


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
