"""README.md and the pages of docs/: their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from tests.helpers import ROOT

DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Without comments and empty lines, continued ones joined."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def commands(self) -> list[list[str]]:
        """The words behind `moekern` of each line that starts with it, without comments."""
        return [shlex.split(line, comments=True)[1:] for line in self.lines if line.startswith("moekern ")]


BLOCKS = [Block(page.name, *found) for page in FILES for found in FENCE.findall(page.read_text())]
SHELL = [block for block in BLOCKS if block.language in ("", "bash")]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def code(page: str, block: int = 0) -> str:
    """An example in Python."""
    return [each.text for each in PYTHON if each.page == page][block]
