"""Commands of which torchrun starts several processes."""

from __future__ import annotations

from pathlib import Path

from moekern.cli import app, ranks


def test_every_command_that_joins_the_ranks_has_their_help() -> None:
    """Else they would end at once, and rank 0 would wait for them in vain."""
    folder = Path(app.__file__).parent
    joining = {path.stem for path in folder.glob("*.py") if "ranks.together(" in path.read_text()}
    assert joining == set(ranks.TOGETHER)
