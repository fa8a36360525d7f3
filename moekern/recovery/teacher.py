"""What the original predicts of a text, kept in a file: of every predicted token the likeliest next ones with their log
probabilities.

A safetensors file: `ids` [N, top] int32 and `logp` [N, top] float16, 6 top bytes a token, the likeliest first; or
`logp` [N, V] float32 alone, of the whole vocabulary. N counts the predicted tokens, batch after batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moekern.checkpoint.header import read_shard
from moekern.checkpoint.writing import Described, header
from moekern.data.batches import Batch, dealt
from moekern.errors import InputError, memory_for
from moekern.files import fsync, is_plain, reserve, sized
from moekern.model.compute import few_tokens
from moekern.model.finite import NotFinite
from moekern.model.journal import Stage
from moekern.model.layerwise import LayerwiseModel
from moekern.model.walk import Pass

TYPES = {"I32": "<i4", "F16": "<f2", "F32": "<f4"}  # of safetensors, as numpy says it
ROWS = 512  # predicted tokens that are looked at together


@dataclass(frozen=True)
class Predicted:
    """Of some tokens: ids int64 [n, top] (None: of the whole vocabulary) and log probabilities float32 [n, top]."""

    ids: Tensor | None
    logp: Tensor

    def rows(self, part: slice | Tensor) -> Predicted:
        return Predicted(None if self.ids is None else self.ids[part], self.logp[part])

    def moved(self, device: torch.device) -> Predicted:
        return Predicted(None if self.ids is None else self.ids.to(device), self.logp.to(device))

    @property
    def likeliest(self) -> Tensor:
        """int64 [n]"""
        return self.logp.argmax(1) if self.ids is None else self.ids[:, 0]

    @staticmethod
    def of(logits: Tensor, top: int | None) -> Predicted:
        """What logits [n, V] predict."""
        logp = logits.float().log_softmax(-1)
        if top is None:
            return Predicted(None, logp)
        found = logp.topk(min(top, logp.shape[1]), dim=1)
        return Predicted(found.indices, found.values)


class Teacher:
    """The predictions of `batches`, in a file of this path. top: None for the whole vocabulary of `classes`."""

    def __init__(self, path: Path, batches: Sequence[Batch], top: int | None, classes: int) -> None:
        self.path, self.top, self.classes = path, top if top is None else min(top, classes), classes
        sizes = [batch.input_ids[:, 1:].numel() for batch in batches]
        self.starts = [0, *np.cumsum(sizes).tolist()]
        self.arrays: dict[str, np.memmap[Any, Any]] = {}

    @property
    def nbytes(self) -> int:
        """Of the file, but for its header."""
        return self.starts[-1] * (4 * self.classes if self.top is None else 6 * self.top)

    def open(self, key: str, *, anew: bool = False) -> bool:
        """Map the file; whether it holds the predictions that `key` names. One that does not is written anew, with
        zeros. Raises InputError where the disk has no room."""
        there = not anew and is_plain(self.path) and self._names(key)  # whole, or put in part by a run that was stopped
        complete = there and is_plain(_done(self.path))
        if not there:
            self._make(key)
        self._map("r" if complete else "r+")
        return complete

    def share(self) -> None:
        """Map the file that another rank has opened, to put into it."""
        self._map("r+")

    def _map(self, mode: Literal["r", "r+"]) -> None:
        for entry in read_shard(self.path).tensors:
            self.arrays[entry.name] = np.memmap(self.path, TYPES[entry.dtype], mode, entry.start, entry.shape)

    def close(self) -> None:
        self.arrays.clear()

    def put(self, place: int, predicted: Predicted) -> None:
        """Those of a batch."""
        rows = slice(self.starts[place], self.starts[place + 1])
        self.arrays["logp"][rows] = predicted.logp.cpu().numpy()
        if predicted.ids is not None:
            self.arrays["ids"][rows] = predicted.ids.cpu().numpy()

    def flush(self) -> None:
        """All that was put is on the disk."""
        for array in self.arrays.values():
            array.flush()

    def finished(self) -> None:
        """Every rank has put its batches: the file holds what its key names."""
        self.flush()
        _done(self.path).touch()
        fsync(_done(self.path).parent)

    def of(self, place: int) -> Predicted:
        """Those of a batch."""
        rows = slice(self.starts[place], self.starts[place + 1])
        logp = torch.from_numpy(np.array(self.arrays["logp"][rows], dtype=np.float32))
        ids = self.arrays.get("ids")
        return Predicted(None if ids is None else torch.from_numpy(np.array(ids[rows], dtype=np.int64)), logp)

    def _names(self, key: str) -> bool:
        try:
            return read_shard(self.path).metadata.get("key") == key
        except InputError:
            return False

    def _make(self, key: str) -> None:
        _done(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        N, top = self.starts[-1], self.top
        if top is None:
            parts: dict[str, Described] = {"logp": ("F32", [N, self.classes])}
        else:
            parts = {"ids": ("I32", [N, top]), "logp": ("F16", [N, top])}
        start, nbytes = header(parts, {"key": key})
        try:
            with open(self.path, "wb") as file:
                file.write(start)
                file.flush()
                reserve(file.fileno(), len(start) + nbytes)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            what = f"no room for what the original predicts ({sized(nbytes)}): {error.strerror}"
            raise InputError(f"{self.path.parent}: {what}; fewer tokens, or a smaller --top, take less") from error


def _done(path: Path) -> Path:
    """There when the file is whole."""
    return path.with_suffix(".done")


class Teaching(Pass[tuple[int, Batch]]):
    """Fills a teacher: tasks are batches with their places."""

    def __init__(self, layerwise: LayerwiseModel, teacher: Teacher, progress: Callable[[float, int], None]) -> None:
        self.layerwise, self.teacher, self.progress = layerwise, teacher, progress

    def run(self, batches: Sequence[Batch], stage: Stage | None = None) -> None:
        """One pass over the original's weights, or what a stopped one has left."""
        layerwise = self.layerwise
        owners = dealt([batch.input_ids.numel() for batch in batches], layerwise.team.size)
        tasks = [(n, batch) for n, batch in enumerate(batches) if owners[n] == layerwise.team.rank]
        layerwise.expect(sum(batch.input_ids.numel() for _, batch in tasks))
        layerwise.run(tasks, self, stage)
        self.teacher.flush()
        layerwise.team.meet()

    def label(self, number: int, task: tuple[int, Batch]) -> int:
        return task[0]

    def name(self, task: tuple[int, Batch]) -> str:
        return f"the original, domain {task[1].domain}"

    def kept(self) -> Mapping[str, Any]:
        self.teacher.flush()
        return {}

    @contextmanager
    def entering(self, task: tuple[int, Batch], layer: int) -> Iterator[None]:
        with few_tokens(task[1].input_ids.numel(), self.layerwise.device):
            yield

    def done(self, layer: int) -> None:
        self.progress(layer + 1, len(self.layerwise.layers))

    def forward(self, task: tuple[int, Batch]) -> None:
        place, batch = task
        logits = self.layerwise.compute(batch).logits
        check_head(self.layerwise, logits, self.teacher.classes)
        rows = logits[:, :-1].flatten(0, 1)
        with memory_for("what the original predicts", "fewer sequences at a time take less (--chunk)"):
            found = [Predicted.of(part, self.teacher.top) for part in rows.split(ROWS)]
        logp = torch.cat([each.logp for each in found]) if found else torch.zeros(0, 1)
        if bool(logp[:, :1].isnan().any()):  # -inf is an entry of the vocabulary that is ruled out
            raise NotFinite(len(self.layerwise.layers))
        ids = None if self.teacher.top is None else torch.cat([each.ids for each in found if each.ids is not None])
        if len(logp):
            self.teacher.put(place, Predicted(ids, logp))


def check_head(layerwise: LayerwiseModel, logits: Tensor, classes: int) -> None:
    """Raise InputError for a head that does not predict the next token of the vocabulary."""
    if logits.shape[-1] < classes:
        name = layerwise.layout.family.name
        raise InputError(f"recover: {name} does not predict the next token: {logits.shape[-1]} outputs")
