"""What the original predicts of a text, kept in a file: of every predicted token the likeliest next ones with their log
probabilities.

A safetensors file: `ids` [N, top] int32 and `logp` [N, top] float16, 6 top bytes a token, the likeliest first; or
`logp` [N, V] float32 alone, of the whole vocabulary. N counts the predicted tokens, batch after batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.checkpoint.header import TensorEntry, read_shard
from moekern.checkpoint.writing import Described, header
from moekern.data.batches import Batch
from moekern.errors import InputError, memory_for
from moekern.evaluation.under_plans import Task, UnderPlans
from moekern.files import fsync, is_plain, reason, reserve, sized
from moekern.model.compute import few_tokens
from moekern.model.finite import NotFinite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.reader import DTYPES
from moekern.model.states import read_tensor, write_tensor

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
    """The predictions of `batches`, in a file of this path. top: None for the whole vocabulary of `classes`.

    Of the file no more than a batch is ever in memory.
    """

    def __init__(self, path: Path, batches: Sequence[Batch], top: int | None, classes: int) -> None:
        self.path, self.top, self.classes = path, top if top is None else min(top, classes), classes
        self.starts = [0, *accumulate(batch.input_ids[:, 1:].numel() for batch in batches)]
        self.entries: dict[str, TensorEntry] = {}

    @property
    def nbytes(self) -> int:
        """Of the file, but for its header."""
        return self.starts[-1] * (4 * self.classes if self.top is None else 6 * self.top)

    def open(self, key: str, *, anew: bool = False) -> bool:
        """Whether the file holds the predictions that `key` names. One that does not is written anew, with zeros.
        Raises InputError where the disk has no room."""
        there = not anew and is_plain(self.path) and self._names(key)  # whole, or put in part by a run that was stopped
        complete = there and is_plain(_done(self.path))
        if not there:
            self._make(key)
        self.share()
        return complete

    def share(self) -> None:
        """See what lies where in the file, which this rank or another one has opened."""
        self.entries = {entry.name: entry for entry in read_shard(self.path).tensors}

    def put(self, place: int, predicted: Predicted) -> None:
        """Those of a batch."""
        with open(self.path, "r+b", buffering=0) as file:
            for name, value in (("logp", predicted.logp), ("ids", predicted.ids)):
                if value is not None:
                    start, _, dtype = self._rows(name, place)
                    write_tensor(file.fileno(), start, value.cpu().to(dtype).contiguous())

    def flush(self) -> None:
        """All that was put is on the disk."""
        fsync(self.path)

    def finished(self) -> None:
        """Every rank has put its batches: the file holds what its key names."""
        self.flush()
        _done(self.path).touch()
        fsync(_done(self.path).parent)

    def of(self, place: int) -> Predicted:
        """Those of a batch."""
        found = {}
        try:
            with open(self.path, "rb", buffering=0) as file:
                for name in self.entries:
                    found[name] = read_tensor(file.fileno(), *self._rows(name, place), str(self.path))
        except OSError as error:
            raise InputError(f"{self.path}: what the original predicts cannot be read: {reason(error)}") from error
        ids = found.get("ids")
        return Predicted(None if ids is None else ids.long(), found["logp"].float())

    def _rows(self, name: str, place: int) -> tuple[int, tuple[int, int], torch.dtype]:
        """Where those of a batch begin in the file, their shape and their type."""
        entry, start, stop = self.entries[name], *self.starts[place : place + 2]
        dtype = DTYPES[entry.dtype]
        return entry.start + start * entry.shape[1] * dtype.itemsize, (stop - start, entry.shape[1]), dtype

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


class Teaching(UnderPlans[bool]):
    """Fills a teacher with what the original predicts of the text, in one pass over its weights, or in several where
    there is no room for all of it."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        batches: Sequence[Batch],
        teacher: Teacher,
        progress: Callable[[float, int], None],
    ) -> None:
        super().__init__(layerwise, batches, {}, progress)
        self.teacher = teacher

    def written(self, found: bool) -> Any:
        return found

    def read(self, written: Any) -> bool:
        return bool(written)

    def kept(self) -> Any:
        self.teacher.flush()
        return super().kept()

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        with few_tokens(task.batch.input_ids.numel(), self.layerwise.device), super().entering(task, layer):
            yield

    def forward(self, task: Task) -> None:
        logits = self.layerwise.compute(task.batch).logits
        check_head(self.layerwise, logits, self.teacher.classes)
        rows = logits[:, :-1].flatten(0, 1)
        with memory_for("what the original predicts", "fewer sequences at a time take less (--chunk)"):
            found = [Predicted.of(part, self.teacher.top) for part in rows.split(ROWS)]
        logp = torch.cat([each.logp for each in found]) if found else torch.zeros(0, 1)
        if bool(logp[:, :1].isnan().any()):  # -inf is an entry of the vocabulary that is ruled out
            raise NotFinite(len(self.layerwise.layers))
        ids = None if self.teacher.top is None else torch.cat([each.ids for each in found if each.ids is not None])
        if len(logp):
            self.teacher.put(task.place, Predicted(ids, logp))
        self.found[task.place, task.number] = True


def check_head(layerwise: LayerwiseModel, logits: Tensor, classes: int) -> None:
    """Raise InputError for a head that does not predict the next token of the vocabulary."""
    if logits.shape[-1] < classes:
        name = layerwise.layout.family.name
        raise InputError(f"recover: {name} does not predict the next token: {logits.shape[-1]} outputs")
