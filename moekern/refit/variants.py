"""What is tried on a model, side by side in one pass, and the text that it is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekern.architectures import MoeLayer
from moekern.data.batches import Batch, TokenData
from moekern.evaluation.held_out import held_back
from moekern.plan.document import Plan
from moekern.refit.choice import Choice
from moekern.refit.refine import Refine
from moekern.refit.ridge import Ridge
from moekern.refit.units import Unit

UNITS = 8  # of the text, whose sums are added one after another; no more processes than these share it


@dataclass(frozen=True)
class Variant:
    """A way to make the model smaller. `plan` says which experts stay, and may say which channels of them.

    `width` M: that many channels of each expert stay, those with the most energy on the text as it then flows. `ridge`
    and `refine` say how what stays is computed anew, if it is. What is computed is written to `folder`, in the format
    that `computed` asks for (`plan.formats.COMPUTED`). With a `choice` each layer keeps as many experts as the plan
    says, chosen anew by what the layer does with the pruned model's stream.
    """

    name: str
    plan: Plan
    width: int | None = None
    ridge: Ridge | None = None
    refine: Refine | None = None
    folder: Path | None = None
    computed: str = "source"
    choice: Choice | None = None

    @property
    def fits(self) -> bool:
        """Whether weights are computed."""
        return self.ridge is not None or self.refine is not None

    def all_parts(self, layer: MoeLayer) -> bool:
        """Whether all that an expert of a layer is may have become another, and not its down projection alone."""
        narrow = self.width is not None or self.plan.width not in (None, layer.width)
        return all_parts(layer.step, refine=self.refine is not None, narrow=narrow, merges=self.plan.merges)

    @property
    def needs_text(self) -> bool:
        """Whether it is made from the text, or only held against the original on what is held back."""
        return self.fits or self.width is not None or self.choice is not None


def all_parts(step: int, *, refine: bool, narrow: bool, merges: bool = False) -> bool:
    """The rule of `Variant.all_parts`: narrow experts of a quantised layer (`step` above 0) are stored anew."""
    return refine or merges or (narrow and step > 0)


FITTED, HELD, JUDGED = range(3)  # what a batch is for: weights are fitted to it, or candidates, or results, are judged


@dataclass(frozen=True)
class Split:
    """Text in chunks, of which some are held back: nothing is fitted to these. Some of them choose between candidates,
    and others, that nothing has seen, tell how good the result is."""

    batches: tuple[Batch, ...]
    uses: tuple[int, ...]  # of each batch
    numbers: tuple[int, ...]  # of the unit that each batch belongs to, rising

    @staticmethod
    def of(data: TokenData, judged: TokenData | None = None) -> Split:
        """Of each domain a tenth of the sequences is held back to choose by, and another one, unless it is given, to
        judge by; see `evaluation.held_out`."""
        rest, judge = held_back(data) if judged is None else (data, judged)
        fitted, held = held_back(rest)
        parts = [part.by_chunk().batches for part in (fitted, held, judge)]
        batches = tuple(batch for part in parts for batch in part)
        total, start, numbers = sum(batch.input_ids.numel() for batch in batches), 0, []
        for batch in batches:
            numbers.append(start * UNITS // total)
            start += batch.input_ids.numel()
        uses = [use for use, part in enumerate(parts) for _ in part]
        return Split(batches, tuple(uses), tuple(numbers))

    def tokens(self, use: int) -> int:
        """How many are there for it."""
        return sum(b.input_ids.numel() for b, each in zip(self.batches, self.uses, strict=True) if each == use)

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
