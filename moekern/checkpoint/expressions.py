"""Regular expressions that a checkpoint's settings hold: compiled, unless they may never end."""

from __future__ import annotations

import re

MAX_REPEATS, MAX_LENGTH = 8, 4096  # of one expression; real ones have three and a hundred
MAX_WIDE = 4  # repeats of more than digits; each multiplies the time by the length of the name
DIGITS = re.compile(r"(?:\\d|\[0-9\])[*+]")


class Endless(ValueError):
    """An expression that may take exponential time."""


def compiled(text: str) -> re.Pattern[str] | None:
    """None for what is no regular expression. Raises Endless."""
    if may_never_end(text):
        raise Endless(text[:80])
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def may_never_end(text: str) -> bool:
    """Whether an expression repeats a group that itself repeats or branches, or has many repeats."""
    plain = _plain(text)
    if len(text) > MAX_LENGTH or _repeats(plain) > MAX_REPEATS or _repeats(_plain(DIGITS.sub("x", text))) > MAX_WIDE:
        return True
    groups: list[bool] = []  # open ones: whether a repeat or a branch is in them
    for at, sign in enumerate(plain):
        if sign == "(":
            groups.append(False)
        elif sign in "*+{|" and groups:
            groups[-1] = True
        elif sign == ")" and groups:
            inside = groups.pop()
            if inside and plain[at + 1 : at + 2] in ("*", "+", "{"):
                return True
            if groups:
                groups[-1] |= inside
    return False


def _plain(text: str) -> str:
    """Without escapes and classes of characters, whose signs are none."""
    return re.sub(r"\[\]?[^\]]*\]", "x", re.sub(r"\\.", "x", text))


def _repeats(plain: str) -> int:
    return len(re.findall(r"[*+{]", plain))
