"""What a refit takes beside the hidden states of its streams, held against memory and disk before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moekern.errors import InputError, NoRoomForText
from moekern.estimation.refit import numbers_bytes, row_bytes
from moekern.files import sized
from moekern.model.layerwise import LayerwiseModel
from moekern.model.projections import views
from moekern.refit.live import block_of
from moekern.refit.rows import Room
from moekern.refit.stored import stored_bytes
from moekern.refit.variants import Variant


@dataclass(frozen=True)
class Needs:
    """Bytes that a layer takes: `rows` of all text and `downs`, copies of its down projections, in memory or in a file;
    `numbers` of rows, and what is `stored` of a quantised layer, in memory alone."""

    rows: int
    downs: int
    numbers: int
    stored: int

    @staticmethod
    def of(layerwise: LayerwiseModel, tokens: int, variants: Sequence[Variant]) -> Needs:
        """Of so many tokens of this process. `check_layers` has looked at the model."""
        fits = [variant for variant in variants if variant.fits]
        copies = max((len(v.ridge.factors) if v.ridge else 1 for v in fits), default=-2)
        rows = row_bytes(tokens, layerwise.embedding_size, layerwise.loader.dtype.itemsize, copies)
        return Needs(
            rows,
            max((_downs(layerwise, variant) for variant in fits), default=0),
            numbers_bytes(tokens, layerwise.layout.router.top_k),
            stored_bytes(layerwise.checkpoint, layerwise.layout),
        )

    def room(self, layerwise: LayerwiseModel) -> Room:
        """What memory has for rows and downs, and where they go beyond it."""
        return Room(max(0, layerwise.reserved - self.numbers - self.stored), layerwise.spill)

    def expect(self, layerwise: LayerwiseModel, tokens: int, text: int) -> None:
        """Say what all streams' tokens take. Raises InputError, which says how many of the tokens of the `text` there
        is room for, where there is none for all."""
        memory = layerwise.reserved - self.numbers - self.stored - self.downs
        try:
            if self.numbers > layerwise.reserved:
                what = f"{sized(self.numbers)} that say which rows experts have, and memory {sized(layerwise.reserved)}"
                fitting = tokens * layerwise.reserved // self.numbers
                raise NoRoomForText(f"{tokens} tokens take {what}; give more (--memory) or less (--tokens)", fitting)
            layerwise.expect(tokens, self.rows, "rows of a layer", memory)
        except NoRoomForText as found:
            fits = f"a refit takes all of it at once: about {text * found.tokens // tokens} of {text} tokens would fit"
            raise InputError(f"{found.message}; {fits}", found.kind) from found


def halved(layerwise: LayerwiseModel) -> LayerwiseModel:
    """The same, half of whose memory for hidden states is for a layer's rows."""
    room = layerwise.takes.room
    return replace(layerwise, reserved=room - room // 2)


def _downs(layerwise: LayerwiseModel, variant: Variant) -> int:
    """Of the down projections as they were, and as each of several candidates has them, in the largest layer."""
    if variant.ridge is None:
        return 0
    candidates, largest = len(variant.ridge.factors), 0
    for i, key in layerwise.moe_keys.items():
        if key in variant.plan.layers:
            _, hidden, width = views(block_of(layerwise.layers[i])).down.shape
            largest = max(largest, 4 * len(variant.plan.layers[key].keep) * hidden * (variant.width or width))
    return largest * (1 + candidates * (candidates > 1))
