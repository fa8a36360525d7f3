"""Text of which memory and disk have no room for all: some batches of it at a time, a pass over the weights each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from moekern.data.batches import loads
from moekern.errors import NoRoomForText
from moekern.model.layerwise import LayerwiseModel


def batch_groups(
    layerwise: LayerwiseModel, sizes: Sequence[int], more: int = 0, named: str = "", memory: int = 0
) -> tuple[list[range], NoRoomForText | None]:
    """The fewest groups of batches of so many tokens, of about as many each, for which every rank has room, and, where
    that is not one, what there is no room for. A token takes `more` bytes of what is `named`, which has `memory` of its
    own.

    All ranks ask together, and find the same. Raises NoRoomForText where there is no room for a batch alone.
    """
    own = loads(sizes, layerwise.team.size)[layerwise.team.rank]
    try:
        layerwise.check_text(own, own * more, named, memory)
        return [range(len(sizes))], None
    except NoRoomForText as found:
        return _divided(sizes, layerwise.team.size, found), found


def _divided(sizes: Sequence[int], ranks: int, found: NoRoomForText) -> list[range]:
    ends = list(accumulate(sizes))
    if max(sizes) > found.tokens:
        raise found
    for number in range(max(2, -(-ends[-1] // (ranks * found.tokens))), ends[-1]):
        cuts = [0, *(bisect_right(ends, ends[-1] * i // number) for i in range(1, number + 1))]
        if all(max(loads(sizes[a:b], ranks)) <= found.tokens for a, b in pairwise(cuts)):
            return [range(a, b) for a, b in pairwise(cuts) if a < b]
    return [range(n, n + 1) for n in range(len(sizes))]
