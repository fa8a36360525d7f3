"""How fast this machine is at what the stages do, at a model's own shapes: a few seconds of measuring."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import moekern._C as _C
from moekern import kernels
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import CHUNK_TOKENS
from moekern.errors import InputError, memory_for
from moekern.files import reason, told
from moekern.model.products import gathered, grouped_linear
from moekern.model.reader import PAGE, THREADS

Known = Literal["counted", "measured", "assumed"]  # from headers and config; on this machine; without looking

SECONDS = 0.6  # of one probe, unless its first call takes longer
PROBED = 256 << 20  # bytes that are read, written and copied, at most
# Of what products are timed with, at most: numbers in experts, more than caches hold; operations, a second of them
# where a CPU is slow.
CPU, GPU = (64 << 20, 4e9), (1 << 30, 4e12)
HUB_READ = 1e9  # bytes a second, of a disk that nobody has read from yet


class Rate(NamedTuple):
    """What the machine does in a second, and how that is known."""

    value: float
    unit: str
    known: Known = "measured"


@dataclass(frozen=True)
class Shapes:
    """What a layer computes with: T tokens at a time, in sequences of S."""

    tokens: int  # T
    sequence: int  # S
    hidden: int  # H
    inner: int  # F, of one expert with gate, up and down
    experts: int  # E
    top_k: int  # K
    heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def most(self) -> tuple[int, float]:
        """Numbers in weights, and operations, that are timed."""
        return CPU if self.device.type == "cpu" else GPU

    @property
    def timed(self) -> int:
        """Tokens, so many that their routed rows are no more than the numbers of an experts block."""
        return max(1, min(self.tokens, CHUNK_TOKENS, 4 * self.most[0] // (self.top_k * self.hidden)))

    @property
    def rows(self) -> int:
        """Of one expert where all are chosen alike; as the measured experts fill them up."""
        return max(16, -(-self.tokens * self.top_k // self.experts // 8) * 8)


@dataclass(frozen=True)
class Rates:
    """Of this machine at these shapes."""

    read: Rate  # bytes of the checkpoint
    write: Rate  # bytes of what is made
    fill: Rate  # bytes of parameters that are made of the bytes that were read
    transfer: Rate | None  # bytes to the GPU
    experts: Rate  # operations of the routed experts
    dense: Rate  # operations of all other matrices
    attention: Rate  # sequences
    measuring: Rate  # tokens whose sums are taken


def probe(checkpoint: Checkpoint, shapes: Shapes, out: Path) -> Rates:
    """Ten seconds of measuring at most, on a machine that is fast enough for a layer of the model.

    A temporary file without a name is written in the folder `out`. Raises InputError where that cannot be.
    """
    on_gpu = shapes.device.type != "cpu"
    what, remedy = "measuring this machine at the model's shapes", "shorter sequences take less (--sequence-length)"
    with torch.no_grad(), memory_for(what, remedy):
        return Rates(
            read=read_rate(checkpoint),
            write=Rate(write_rate(out), "B/s"),
            fill=Rate(fill_rate(shapes.dtype), "B/s"),
            transfer=Rate(transfer_rate(shapes.device), "B/s") if on_gpu else None,
            experts=Rate(experts_rate(shapes), "FLOP/s"),
            dense=Rate(dense_rate(shapes), "FLOP/s"),
            attention=Rate(1 / attention_seconds(shapes), "sequences/s"),
            measuring=Rate(measuring_rate(shapes), "tokens/s"),
        )


def seconds(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Median of as many calls as SECONDS allow, three at least but where one takes longer; the first is not counted."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    spent = once()
    found: list[float] = []
    while not found or (spent + found[-1] < SECONDS and len(found) < 20):
        found.append(once())
        spent += found[-1]
    return statistics.median(found)


def read_rate(checkpoint: Checkpoint) -> Rate:
    """Of the largest shard, as layers are read; assumed where its bytes are not on this machine."""
    ends: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        ends[entry.shard] = max(ends.get(entry.shard, 0), entry.stop)
    shard = max(checkpoint.shards, key=lambda each: ends.get(each.name, 0))
    size = ends.get(shard.name, 0) // 2 // PAGE * PAGE
    piece = min(size, PROBED // 2)
    if not piece or not _is_there(shard.path, 2 * size):
        return Rate(HUB_READ, "B/s", "assumed")
    buffer = torch.empty(piece + PAGE, dtype=torch.uint8)
    address = -(-buffer.data_ptr() // PAGE) * PAGE
    buffer.zero_()
    path, starts = os.fspath(shard.path), iter(range(size, -1, -piece))

    def read() -> None:
        _C.read_ranges([(path, max(0, next(starts, 0)), piece, address)], THREADS)

    try:
        return Rate(piece / seconds(read), "B/s")
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error


def _is_there(path: Path, size: int) -> bool:
    """Whether a file's bytes are on a disk here, and not the header, or a hole, alone."""
    found = path.stat()
    return found.st_size >= size and found.st_blocks * 512 >= size // 2


def write_rate(out: Path) -> float:
    """Bytes a second to the disk of a folder, the last one safe."""
    data = bytes(PROBED // 16)
    with told(out), tempfile.TemporaryFile(dir=out) as file:
        start, written = time.perf_counter(), 0
        while written < PROBED and time.perf_counter() - start < SECONDS:
            file.write(data)
            written += len(data)
        file.flush()
        os.fsync(file.fileno())
        return written / (time.perf_counter() - start)


def fill_rate(dtype: torch.dtype) -> float:
    """Bytes of parameters that are copied into memory of their own in a second, as experts that are stacked are."""
    pieces = [torch.ones(1 << 20, dtype=dtype) for _ in range(PROBED // 4 // (1 << 20) // dtype.itemsize)]
    return sum(piece.nbytes for piece in pieces) / seconds(lambda: torch.stack(pieces))


def transfer_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory."""
    source = torch.empty(PROBED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return source.nbytes / seconds(lambda: source.to(device), device)


def _numbers(shapes: Shapes, *size: int) -> Tensor:
    """Numbers like those of activations and weights: zeros would be faster."""
    values = torch.linspace(-1, 1, size[-1], dtype=torch.float32).to(shapes.dtype).to(shapes.device)
    return values.expand(size).contiguous()


def experts_rate(shapes: Shapes) -> float:
    """Operations a second of an experts block as it is called: as many experts as fit, each with its share of rows."""
    weights, operations = shapes.most
    H, inner = shapes.hidden, max(1, min(shapes.inner, 4 * weights // (3 * shapes.hidden)))
    rows = max(1, min(shapes.rows, int(operations / (6 * H * inner))))
    count = max(1, min(shapes.experts, weights // (3 * H * inner), int(operations / (6 * rows * H * inner))))
    up, down = _numbers(shapes, count, 2 * inner, H), _numbers(shapes, count, H, inner)
    hidden = _numbers(shapes, rows * count, H)
    tokens = torch.arange(rows * count, device=shapes.device)
    ends = rows * torch.arange(1, count + 1, dtype=torch.int32, device=shapes.device)

    def run() -> Tensor:
        gate, linear = grouped_linear(gathered(hidden, tokens), up, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * linear, down, ends)

    return 6 * rows * count * H * inner / seconds(run, shapes.device)


def dense_rate(shapes: Shapes) -> float:
    """Operations a second of T tokens through a matrix of up to H x H."""
    T, H = shapes.timed, shapes.hidden
    wide = max(16, min(H, int(shapes.most[1] / (2 * T * H))))
    weight, x = _numbers(shapes, wide, H), _numbers(shapes, T, H)
    return 2 * T * H * wide / seconds(lambda: F.linear(x, weight), shapes.device)


def attention_seconds(shapes: Shapes) -> float:
    """Of one sequence, all heads; where it is long, of a shorter one by the square of its length."""
    heads, size = max(1, shapes.heads), max(8, shapes.head_size)
    length = min(shapes.sequence, max(64, int((shapes.most[1] / (4 * heads * size)) ** 0.5)))
    x = _numbers(shapes, 1, heads, length, size)
    found = seconds(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True), shapes.device)
    return found * (shapes.sequence / length) ** 2


def measuring_rate(shapes: Shapes) -> float:
    """Tokens a second of the ops that take the routed tier's sums."""
    T, E, K = shapes.timed, shapes.experts, shapes.top_k
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(shapes.device)
    gates, ids = logits.softmax(1).topk(K, dim=1)
    order, offsets = kernels.sort_by_expert(ids, E)
    y = _numbers(shapes, T * K, shapes.hidden)
    router, sums = kernels.router_sums(E, shapes.device), kernels.expert_sums(E, 0, shapes.device)

    def run() -> None:
        kernels.sort_by_expert(ids, E)
        kernels.router_stats(logits, ids, gates, None, router)
        kernels.combine_and_measure(y, gates, ids, order, offsets, None, sums)

    return T / seconds(run, shapes.device)
