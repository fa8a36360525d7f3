"""Where calibration puts the sums of the layers that are done: in memory, or straight into a file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from moekern import files
from moekern.errors import InputError
from moekern.statistics.disk import Gradients, Layers, StatisticsWriter
from moekern.statistics.file import Statistics
from moekern.statistics.layer import HALVES, LayerStatistics


class Store(Protocol):
    """Takes layers in any order, each with all of its domains, and fields of a later pass after that."""

    def expect(self, hidden: int, words: int) -> None:
        """Before the first layer: the model's H and the 64-bit words of its vocabulary, as far as they are known."""

    def put(self, key: str, sums: Mapping[str, LayerStatistics]) -> None:
        """A layer that is done; `sums` must lie on the CPU."""

    def add(self, key: str, domain: str, values: Mapping[str, Tensor]) -> None:
        """Fields of a layer that was put before."""

    def keep(self, key: str, domain: str, totals: Sequence[Tensor]) -> None:
        """G of a segment of a part, float32 [E, rows, columns] for each matrix; see `StatisticsWriter`."""

    def layer(self, key: str) -> dict[str, LayerStatistics]:
        """Domain -> what was put."""

    def kept(self) -> Any:
        """What another process must know, as JSON, to go on with what was put, which is on the disk now."""

    def take_up(self, left: Any) -> None:
        """Go on with what a stopped process had `kept`. Raises ValueError, or the like, where that cannot be."""


@dataclass(frozen=True)
class HeldStore:
    """Holds all layers."""

    layers: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)

    def expect(self, hidden: int, words: int) -> None:
        pass

    def put(self, key: str, sums: Mapping[str, LayerStatistics]) -> None:
        self.layers[key] = dict(sums)

    def add(self, key: str, domain: str, values: Mapping[str, Tensor]) -> None:
        self.layers[key][domain] = replace(self.layers[key][domain], **values)

    def keep(self, key: str, domain: str, totals: Sequence[Tensor]) -> None:
        raise RuntimeError("gradients of a part are kept in a file")

    def layer(self, key: str) -> dict[str, LayerStatistics]:
        return dict(self.layers[key])

    def kept(self) -> Any:
        """Nothing: it is gone with the process."""

    def take_up(self, left: Any) -> None:
        """Nothing: another process has what is left."""


@dataclass
class FileStore:
    """Holds no layer: each goes into the file at once.

    `experts` says how many each layer has, `tiers` what is measured beside the routed one: with H and the vocabulary
    this tells the sizes of all. Room for them is taken before the first layer is measured, and anew for the H that its
    outputs turn out to have.
    """

    path: Path
    file: BinaryIO
    header: Mapping[str, Any]
    experts: Mapping[str, int]  # layer key -> E
    tiers: Collection[str]
    gradients: Gradients = field(default_factory=dict)
    writer: StatisticsWriter | None = None
    expected: tuple[int, int] = (0, 0)

    def expect(self, hidden: int, words: int) -> None:
        self.expected = hidden, words
        with files.told(self.path):
            self.writer = StatisticsWriter(self.file, self.header, self._sizes(hidden, words), self.gradients)

    def put(self, key: str, sums: Mapping[str, LayerStatistics]) -> None:
        if self.writer is None or not self.writer.written:
            first = next(iter(sums.values()))
            words = first.vocabulary.shape[-1] or first.token_count.shape[-1] // 64
            self.expect(first.hidden, words)
        assert self.writer is not None
        self._check_there()
        for domain, s in sums.items():
            self.writer.write(key, domain, s.tensors())

    def add(self, key: str, domain: str, values: Mapping[str, Tensor]) -> None:
        assert self.writer is not None
        self._check_there()
        self.writer.write(key, domain, values)

    def keep(self, key: str, domain: str, totals: Sequence[Tensor]) -> None:
        assert self.writer is not None
        self._check_there()
        with files.told(self.path):
            self.writer.keep(key, domain, totals)

    def layer(self, key: str) -> dict[str, LayerStatistics]:
        assert self.writer is not None
        return {domain: self.writer.read(key, domain) for domain in self.header["domains"]}

    def kept(self) -> Any:
        assert self.writer is not None
        with files.told(self.path):
            return {"expected": self.expected, **self.writer.kept()}

    def take_up(self, left: Any) -> None:
        hidden, words = self.expected = tuple(left["expected"])
        self.writer = StatisticsWriter(self.file, self.header, self._sizes(hidden, words), self.gradients, left=left)

    def _check_there(self) -> None:
        """Raise InputError when nobody could find the numbers any more: better now than after the last layer."""
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise InputError(f"{self.path}: not finished: its file was removed while it was written")

    def _sizes(self, H: int, words: int) -> Layers:
        K = self.header["top_k"]
        sizes = {}
        for key, E in self.experts.items():
            tiers, dimensions = self.tiers, H if "dimensions" in self.tiers else 0
            some = LayerStatistics.zeros(E, dimensions, "meta", tiers=(*tiers, HALVES), hidden=H, words=words)
            if "coalitions" in tiers:
                some = replace(some, coalitions=torch.empty(1, K + 1, dtype=torch.int64, device="meta"))
            sizes[key] = dict.fromkeys(self.header["domains"], some)
        return sizes


@contextmanager
def file_store(
    path: str | Path,
    header: Mapping[str, Any],
    experts: Mapping[str, int],
    tiers: Collection[str],
    position: Path | None = None,
) -> Iterator[FileStore]:
    """A store whose file appears at `path`, where nothing is, when the context ends well, whole or not at all.

    While a `position` is there, a file that says how far a run is, the unfinished one stays for the next run.
    """
    with files.replacing(path, new=True, keep=True, position=position) as temporary, temporary.open("r+b") as file:
        store = FileStore(Path(path), file, header, experts, tiers)
        yield store
        if store.writer is None:
            raise RuntimeError("statistics: no layer was measured")
        store.writer.finish()


def statistics_of(header: Mapping[str, Any], store: HeldStore, keys: Collection[str]) -> Statistics:
    """What a store in memory holds, its layers in the order of `keys`."""
    return Statistics(header, {key: store.layers[key] for key in keys})
