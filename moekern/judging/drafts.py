"""Continuations so far, written down batch by batch, so that the same command goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moekern.judging.figures import Continuation, Written
from moekern.model.journal import Stage, undamaged
from moekern.model.states import States


class Drafts:
    """What is written so far, batch by batch, and written down with a `stage`."""

    def __init__(self, stage: Stage | None, of: int, progress: Callable[[float, int], None]) -> None:
        self.stage, self.total, self.progress = stage, of, progress
        self.found: dict[str, dict[str, list[list[Continuation]]]] = {}
        if stage is not None and stage.left is not None:
            with undamaged(stage.journal.folder):
                for decoding, table in stage.left.kept.items():
                    for name, rows in table.items():
                        self.of(decoding, name).extend([[_read(row) for row in batch] for batch in rows])

    def of(self, decoding: str, name: str) -> list[list[Continuation]]:
        """The batches that are done."""
        return self.found.setdefault(decoding, {}).setdefault(name, [])

    def add(self, rows: list[list[Continuation]], batch: list[Continuation]) -> None:
        """A batch of a decoding and a model."""
        rows.append(batch)
        done = sum(len(rows) for table in self.found.values() for rows in table.values())
        self.progress(done, self.total)
        if self.stage is not None:
            self.stage.save(done, self.total, States(0), self._document, {}, "batch")

    def whole(self) -> dict[str, Written]:
        """Of all batches, in their order."""
        return {
            decoding: {name: [row for batch in rows for row in batch] for name, rows in table.items()}
            for decoding, table in self.found.items()
        }

    def _document(self) -> Any:
        return {
            decoding: {name: [[asdict(row) for row in batch] for batch in rows] for name, rows in table.items()}
            for decoding, table in self.found.items()
        }


def _read(row: dict[str, Any]) -> Continuation:
    return Continuation(**{**row, "ids": tuple(map(int, row["ids"]))})
