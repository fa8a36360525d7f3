"""What is tried on a model, side by side in one pass, and the text that it is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekern.data.batches import Batch, TokenData
from moekern.evaluation.held_out import held_back
from moekern.plan.document import Plan
from moekern.refit.refine import Refine
from moekern.refit.ridge import Ridge
from moekern.refit.units import Unit

UNITS = 8  # of the text, whose sums are added one after another; no more processes than these share it


@dataclass(frozen=True)
class Variant:
    """A way to make the model smaller. `plan` says which experts stay, and may say which channels of them.

    `width` M: that many channels of each expert stay, those with the most energy on the text as it then flows. `ridge`
    and `refine` say how what stays is computed anew, if it is. What is computed is written to `folder`.
    """

    name: str
    plan: Plan
    width: int | None = None
    ridge: Ridge | None = None
    refine: Refine | None = None
    folder: Path | None = None

    @property
    def fits(self) -> bool:
        """Whether weights are computed."""
        return self.ridge is not None or self.refine is not None

    @property
    def needs_text(self) -> bool:
        """Whether it is made from the text, or only held against the original on what is held back."""
        return self.fits or self.width is not None


@dataclass(frozen=True)
class Split:
    """Text in chunks, some of which are held back: nothing is fitted to these."""

    batches: tuple[Batch, ...]
    held: tuple[bool, ...]  # of each batch
    numbers: tuple[int, ...]  # of the unit that each batch belongs to, rising

    @staticmethod
    def of(data: TokenData) -> Split:
        """A tenth of each domain's sequences is held back; see `evaluation.held_out`."""
        fitted, held = held_back(data)
        parts = fitted.by_chunk().batches, held.by_chunk().batches
        batches = parts[0] + parts[1]
        total, start, numbers = sum(batch.input_ids.numel() for batch in batches), 0, []
        for batch in batches:
            numbers.append(start * UNITS // total)
            start += batch.input_ids.numel()
        return Split(batches, (False,) * len(parts[0]) + (True,) * len(parts[1]), tuple(numbers))

    def sizes(self) -> list[int]:
        """The tokens of each batch."""
        return [batch.input_ids.numel() for batch in self.batches]

    def units(self, places: Sequence[int]) -> list[Unit]:
        """The units of a process that has the batches at these places, whole units in their order."""
        found: list[Unit] = []
        stop = 0
        for place in places:
            number, start = self.numbers[place], stop
            stop += self.batches[place].input_ids.numel()
            if found and found[-1].number == number:
                start = found.pop().start
            found.append(Unit(number, start, stop))
        return found
