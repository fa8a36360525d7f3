"""README.md of a pruned checkpoint: the original's, with a notice in front of its text."""

import re

MODEL_CARD = "README.md"
FRONT_MATTER = re.compile(rb"(?:\xef\xbb\xbf)?---[ \t]*\r?\n(?:.*?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def notice(
    kept: int,
    before: int,
    plan_sha256: str,
    left: int | None = None,
    width: int | None = None,
    *,
    merges: bool = False,
    replaced: bool = False,
) -> bytes:
    """Markdown; `kept` of `before` experts stay in the layer that keeps most, and `left` of the `width` channels of
    each, where some go; the others are merged into them, `replaced` by constants, or gone."""
    most, others = ("up to ", ", and constants stand for the others") if replaced else ("", "")
    narrow = ", with others merged into them" if merges else ""
    narrow += "" if left is None else f", with {left} of {width} channels each"
    return (
        f"> **Pruned by moekern**: {most}{kept} of {before} experts are left in a layer{narrow}{others} (plan "
        f"{plan_sha256}, in `moekern_plan.json`). What follows is the original's card: its numbers of experts and "
        "parameters, its sizes and its results are the original's.\n\n"
    ).encode()


def split_at(start: bytes, size: int) -> int:
    """The byte of a card of `size` bytes at which its text begins, behind YAML front matter; `start` is its beginning.

    The card's end, where front matter does not end within `start` or at all.
    """
    found = FRONT_MATTER.match(start)
    if found:
        return found.end()
    return size if start.removeprefix(b"\xef\xbb\xbf").startswith((b"---\n", b"---\r\n")) else 0
