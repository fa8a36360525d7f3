"""What is expected of an engine's finding."""

from __future__ import annotations

from moekern.plan.engines import Finding


def check_finding(said: Finding | None, expected: tuple[bool | None, str] | None) -> None:
    """expected: whether it stops the engine, and words of its text; None: nothing is said."""
    if expected is None:
        assert said is None
    else:
        assert said is not None
        assert said.stops is expected[0]
        assert expected[1] in said.text
