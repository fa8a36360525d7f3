from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from moekern.kernels.expert_gram import GramSums
from moekern.kernels.similarity import SimilaritySums
from moekern.kernels.sums import ExpertSums, MixtureSums, RouterSums
from moekern.kernels.weight_stats import WeightSums

# Sums are read by the names of their fields.

# codes, coding, scale, zero, group, rows, columns, block rows, block columns
Stored = tuple[Tensor, str, Tensor, Tensor | None, Tensor | None, int, int, int, int]

def router_stats(
    logits: Tensor | None,
    topk_idx: Tensor,
    topk_weight: Tensor,
    mask: Tensor | None,
    sums: RouterSums,
    score: str,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def combine_and_measure(
    y: Tensor,
    topk_weight: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    sums: ExpertSums,
    out: Tensor,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def mixture_stats(
    y: Tensor,
    topk_weight: Tensor,
    share: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    sums: MixtureSums | None,
    gram: Tensor | None,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def similarity(
    y: Tensor,
    norm_square: Tensor | None,
    mask: Tensor | None,
    sums: SimilaritySums,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def sketch(
    y: Tensor, z: Tensor, norm_square: Tensor, seed: int, start: int, threads: int, level: str, stream: int
) -> None: ...
def vocabulary(
    token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor, threads: int, stream: int
) -> None: ...
def popcount(bits: Tensor, count: Tensor, threads: int, level: str, stream: int) -> None: ...
def pair_popcount(bits: Tensor, count: Tensor, threads: int, level: str, stream: int) -> None: ...
def weight_stats(
    weight: Tensor | None,
    stored: Stored | None,
    sums: WeightSums,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def dequantize(stored: Stored, out: Tensor, threads: int, level: str, stream: int) -> None: ...
def sort_by_expert(
    topk_idx: Tensor, mask: Tensor | None, order: Tensor, offsets: Tensor, threads: int, stream: int
) -> None: ...
def expert_gram(
    a: Tensor,
    r: Tensor,
    tokens: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    sums: GramSums,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def gated_energy(
    rows: Tensor,
    gates: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    energy: Tensor,
    out: Tensor,
    threads: int,
    level: str,
    stream: int,
) -> None: ...
def scatter_residual(
    r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, offsets: Tensor, threads: int, level: str, stream: int
) -> None: ...
def levels() -> list[str]: ...
def cuda_architectures() -> str: ...
def cuda_device_count() -> int: ...
def write_file(
    path: str,
    pieces: Sequence[
        tuple[str, int, int]
        | bytes
        | tuple[str, int, Callable[[], bytes | memoryview]]
        | tuple[str, int, int, int, int, bytes]
    ],
    spans: Sequence[tuple[int, int]] = (),
    copy: str = "stream",
    progress: Callable[[int], object] | None = None,
) -> tuple[int, int, int, list[bytes | None]]: ...
def probe_copy(source: str, folder: str) -> Literal["reflink", "kernel", "stream"]: ...

class Xxh3:
    def __init__(self) -> None: ...
    def update(self, data: bytes | bytearray | memoryview) -> None: ...
    def digest(self) -> bytes: ...

def read_ranges(
    ranges: Sequence[tuple[str, int, int, int]],
    threads: int,
    keep_cache: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None: ...
