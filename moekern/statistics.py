"""What calibration measures: sums per layer, domain and expert. Batches, domains and machines merge by adding."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekern import files
from moekern.errors import InputError
from moekern.keys import natural

FORMAT = "moekern.statistics/1"
HEADER_KEY = "moekern"
# What two files must share before their sums may be added.
IDENTITY = ("format", "fingerprint", "family", "score", "top_k", "num_experts", "n_group", "topk_group", "group_top")

Views = TypeVar("Views")


def _sum(dtype: torch.dtype, shape: str, *, negative: bool = False, merge: str = "add") -> Any:
    return field(metadata={"dtype": dtype, "shape": shape, "negative": negative, "merge": merge})


def _integers(shape: str) -> Any:
    return _sum(torch.int64, shape)


def _reals(shape: str) -> Any:
    return _sum(torch.float64, shape)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the counted tokens of one MoE layer: E experts, H output dimensions (0: per-dimension sums not taken).

    y is an expert's output row before the gate, a = gate * ‖y‖₂. Integers are int64, reals float64.
    """

    tokens: Tensor = _integers("1")  # counted tokens
    logit_tokens: Tensor = _integers("1")  # of these, tokens whose router logits were seen
    count: Tensor = _integers("E")  # slots routed to e
    top1_count: Tensor = _integers("E")  # tokens whose largest gate (lowest slot on ties) is e's
    gate_sum: Tensor = _sum(torch.float64, "E", negative=True)  # Σ gate
    gate_square_sum: Tensor = _reals("E")  # Σ gate²
    score_sum: Tensor = _sum(torch.float64, "E", negative=True)  # Σ over all logit_tokens of the full score of e
    entropy_sum: Tensor = _sum(torch.float64, "1", negative=True)  # Σ entropy of score / Σ score, nats
    margin_sum: Tensor = _sum(torch.float64, "1", negative=True)  # Σ (k-th minus (k+1)-th largest score)
    coactivation: Tensor = _integers("E E")  # tokens that chose both; the diagonal is count
    norm_sum: Tensor = _reals("E")  # Σ ‖y‖₂
    norm_square_sum: Tensor = _reals("E")  # Σ ‖y‖₂²
    gated_norm_sum: Tensor = _sum(torch.float64, "E", negative=True)  # Σ a
    gated_norm_square_sum: Tensor = _reals("E")  # Σ a²
    max_abs: Tensor = _sum(torch.float64, "E", merge="max")  # max |y|
    pair_sum: Tensor = _sum(torch.float64, "E E", negative=True)  # Σ aᵢ aⱼ; the diagonal is gated_norm_square_sum
    square_sum: Tensor = _reals("E H")  # Σ y² per output dimension

    @property
    def num_experts(self) -> int:
        """E."""
        return self.count.shape[0]

    @property
    def dimensions(self) -> int:
        """H, or 0 when per-dimension sums were not taken."""
        return self.square_sum.shape[1]

    @classmethod
    def zeros(cls, num_experts: int, dimensions: int = 0, device: str | torch.device = "cpu") -> "LayerStatistics":
        """Nothing seen yet."""
        size = {"1": 1, "E": num_experts, "H": dimensions}
        return cls(
            *(
                torch.zeros([size[d] for d in f.metadata["shape"].split()], dtype=f.metadata["dtype"], device=device)
                for f in fields(cls)
            )
        )

    def views(self, cls: type[Views]) -> Views:
        """The fields that the named tuple `cls` asks for, sharing memory with this object."""
        return cls(*(getattr(self, name) for name in cls._fields))  # type: ignore[attr-defined]

    def to(self, device: str | torch.device) -> "LayerStatistics":
        """The same sums on another device."""
        return LayerStatistics(*(getattr(self, f.name).to(device) for f in fields(self)))

    def permuted(self, perm: Tensor) -> "LayerStatistics":
        """Experts renamed: the result's expert i is this object's expert perm[i]."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            for axis, name in enumerate(f.metadata["shape"].split()):
                value = value.index_select(axis, perm) if name == "E" else value
            changed[f.name] = value
        return LayerStatistics(**changed)

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        """Sums of both; max_abs by maximum. Raises ValueError when E or H differ."""
        mine, theirs = (self.num_experts, self.dimensions), (other.num_experts, other.dimensions)
        if mine != theirs:
            raise ValueError(f"[LayerStatistics] add: expected E, H = {mine}, got {theirs}")
        merged = {}
        for f in fields(self):
            add = torch.maximum if f.metadata["merge"] == "max" else torch.add
            merged[f.name] = add(getattr(self, f.name), getattr(other, f.name))
        return LayerStatistics(**merged)

    def problem(self, top_k: int) -> str | None:
        """The first field that cannot be what it claims, with the reason; None when all is well."""
        size = {"1": 1, "E": self.num_experts if self.count.ndim == 1 else -1}
        for f in fields(self):
            value: Tensor = getattr(self, f.name)
            if value.dtype != f.metadata["dtype"]:
                return f"{f.name}: expected dtype {f.metadata['dtype']}, got {value.dtype}"
            names = f.metadata["shape"].split()
            if value.ndim != len(names) or any(
                n != size.setdefault(d, n) for d, n in zip(names, value.shape, strict=True)
            ):
                return f"{f.name}: expected shape [{', '.join(names)}] with E={size['E']}, got {list(value.shape)}"
            if not value.isfinite().all():
                return f"{f.name}: not finite"
            if not f.metadata["negative"] and (value < 0).any():
                return f"{f.name}: negative"
        # Python integers, because a damaged file's counts could overflow an int64 sum.
        tokens, slots = int(self.tokens), sum(self.count.tolist())
        if slots > tokens * top_k:
            return f"count: {slots} routed slots exceed {tokens} tokens x top-{top_k}"
        return None


def make_header(
    *,
    fingerprint: str,
    family: str,
    score: str,
    top_k: int,
    num_experts: int,
    domains: Sequence[str],
    tokens: Mapping[str, int],
    data: Any,
    backend: Any,
    versions: Mapping[str, str],
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 1,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The header of one calibration run.

    `tokens` counts tokens per domain. `data` (the recipe), `backend` and `versions` are any JSON; with `dtype` (None:
    the checkpoint's) they become the one entry of "runs", which grows when files are merged. The router's numbers let a
    plan be made without the checkpoint.
    """
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "family": family,
        "score": score,
        "top_k": top_k,
        "num_experts": num_experts,
        "n_group": n_group,
        "topk_group": topk_group,
        "group_top": group_top,
        "domains": list(domains),
        "tokens": dict(tokens),
        "runs": [{"data": data, "backend": backend, "versions": dict(versions), "dtype": dtype}],
    }


@dataclass(frozen=True, eq=False)
class Statistics:
    """A model's sums: `layers` maps layer key -> domain name -> LayerStatistics; `header` is what make_header gives.

    `sha256` is the digest of the file it was loaded from, None before it was saved.
    """

    header: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, LayerStatistics]]
    sha256: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of their numbers in the file."""
        return tuple(self.header["domains"])

    def layer(self, key: str, domains: Sequence[str] | None = None) -> LayerStatistics:
        """One layer's sums over the named domains (None: all). Raises InputError for an unknown layer or domain."""
        if key not in self.layers:
            raise InputError(f"statistics: no layer {key!r}; it holds {', '.join(self.layers)}")
        names = self.domains if domains is None else tuple(dict.fromkeys(domains))
        for name in names:
            if name not in self.domains:
                raise InputError(f"statistics: no domain {name!r}; it holds {', '.join(self.domains)}")
        parts = self.layers[key]
        some = next(iter(parts.values()))
        total = LayerStatistics.zeros(some.num_experts, some.dimensions, some.count.device)
        for name in names:
            if name in parts:
                total = total + parts[name]
        return total

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same statistics give the same bytes. The file appears whole or not at all."""
        problem = _problem(self.header, self.layers)
        if problem:
            raise ValueError(f"[Statistics.save] {problem}")
        number = {name: i for i, name in enumerate(self.domains)}
        tensors = {
            f"{key}/{number[domain]}/{f.name}": getattr(sums, f.name).detach().cpu().clone()
            for key, parts in self.layers.items()
            for domain, sums in parts.items()
            for f in fields(sums)
        }
        # One metadata key, because safetensors writes several in no fixed order.
        header = json.dumps(dict(self.header), sort_keys=True, ensure_ascii=False, allow_nan=False)
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER_KEY: header})

    @staticmethod
    def load(path: str | Path) -> "Statistics":
        """Read and check a statistics file. Raises InputError, naming file and tensor, for one that cannot be right."""
        if not Path(path).is_file():
            raise InputError(f"{path}: no such statistics file")
        try:
            with safe_open(path, framework="pt") as file:
                header = _header(path, file.metadata() or {})
                names = file.keys()
                layers = _layers(path, header, {name: file.get_tensor(name).clone() for name in names})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable statistics file ({error}); calibrate again") from error
        problem = _problem(header, layers)
        if problem:
            raise InputError(f"{path}: {problem}")
        return Statistics(header, layers, files.sha256(path))


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add the statistics of one model gathered in several runs; domains and runs are united.

    Raises InputError when model, router, format, layers, experts or measured dimensions differ, or a file comes twice.
    """
    if not parts:
        raise InputError("merge: expected at least one statistics file")
    first = parts[0]
    known = [part.sha256 for part in parts if part.sha256 is not None]
    if len(set(known)) < len(known):
        raise InputError("merge: the same file is given twice; its tokens would count double")
    layers: dict[str, dict[str, LayerStatistics]] = {key: {} for key in first.layers}
    for number, part in enumerate(parts, start=1):
        for name in IDENTITY:
            if part.header.get(name) != first.header.get(name):
                raise InputError(
                    f"merge: part {number} has {name} {part.header.get(name)!r}, part 1 {first.header.get(name)!r}; "
                    "only runs of one model can be added"
                )
        if set(part.layers) != set(first.layers):
            odd = sorted(set(part.layers) ^ set(first.layers))
            raise InputError(f"merge: part {number} and part 1 measured different layers: {', '.join(odd)}")
        for key, domains in part.layers.items():
            _add_layer(layers[key], domains, first.layers[key], f"merge: part {number}, layer {key}")
    return Statistics(_merged_header([part.header for part in parts]), layers)


def _add_layer(
    total: dict[str, LayerStatistics],
    added: Mapping[str, LayerStatistics],
    model: Mapping[str, LayerStatistics],
    where: str,
) -> None:
    expected = next(iter(model.values()))
    for domain, sums in added.items():
        if (sums.num_experts, sums.dimensions) != (expected.num_experts, expected.dimensions):
            raise InputError(
                f"{where}: {sums.num_experts} experts and {sums.dimensions} measured dimensions, "
                f"part 1 has {expected.num_experts} and {expected.dimensions}"
            )
        total[domain] = total[domain] + sums if domain in total else sums


def _merged_header(headers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    domains = list(dict.fromkeys(name for header in headers for name in header["domains"]))
    return {
        **headers[0],
        "domains": domains,
        "tokens": {name: sum(header["tokens"].get(name, 0) for header in headers) for name in domains},
        "runs": [run for header in headers for run in header["runs"]],
    }


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in metadata:
        raise InputError(f"{path}: a safetensors file, but not moekern statistics (no {HEADER_KEY!r} metadata)")
    try:
        header = json.loads(metadata[HEADER_KEY])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the statistics header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise InputError(f"{path}: format {found!r} is not {FORMAT!r}; calibrate again with this version")
    problem = _header_problem(header)
    if problem:
        raise InputError(f"{path}: header: {problem}")
    return header


def _header_problem(header: Mapping[str, Any]) -> str | None:
    for name in ("fingerprint", "family", "score"):
        if not isinstance(header.get(name), str):
            return f"{name}: expected a string, got {header.get(name)!r}"
    for name in ("top_k", "num_experts", "n_group", "topk_group", "group_top"):
        if type(header.get(name)) is not int or header[name] < 1:
            return f"{name}: expected a count, got {header.get(name)!r}"
    domains, tokens, runs = header.get("domains"), header.get("tokens"), header.get("runs")
    if not isinstance(domains, list) or not domains or not _distinct_strings(domains):
        return f"domains: expected distinct names, got {domains!r}"
    if not isinstance(tokens, dict) or set(tokens) != set(domains):
        return "tokens: expected one count for each domain"
    if any(type(n) is not int or n < 0 for n in tokens.values()):
        return f"tokens: expected counts, got {tokens!r}"
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        return "runs: expected a list of objects"
    return None


def _distinct_strings(values: Iterable[Any]) -> bool:
    values = list(values)
    return all(isinstance(v, str) for v in values) and len(set(values)) == len(values)


def _layers(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, LayerStatistics]]:
    """Tensors by name <layer>/<domain number>/<field>, grouped; layers in natural order."""
    names = [f.name for f in fields(LayerStatistics)]
    numbers = {str(i): i for i in range(len(header["domains"]))}
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition("/")
        domain, _, what = rest.partition("/")
        if what not in names or domain not in numbers:
            raise InputError(
                f"{path}: tensor {name!r} is not <layer>/<domain number>/<field> with a known field and one of "
                f"{len(numbers)} domains"
            )
        found.setdefault((key, numbers[domain]), {})[what] = tensor
    layers: dict[str, dict[str, LayerStatistics]] = {}
    for key, number in sorted(found, key=lambda pair: (natural(pair[0]), pair[1])):
        missing = [name for name in names if name not in found[key, number]]
        if missing:
            raise InputError(f"{path}: tensor '{key}/{number}/{missing[0]}' is missing")
        layers.setdefault(key, {})[header["domains"][number]] = LayerStatistics(**found[key, number])
    return layers


def _problem(header: Mapping[str, Any], layers: Mapping[str, Mapping[str, LayerStatistics]]) -> str | None:
    """Why this cannot be a statistics file; None when it can."""
    wrong = _header_problem(header)
    if wrong:
        return f"header: {wrong}"
    if not layers:
        return "no layers"
    number = {name: i for i, name in enumerate(header["domains"])}
    for key, parts in layers.items():
        if "/" in key or not parts:
            return f"layer {key!r}: expected a key without '/' and at least one domain"
        sizes = set()
        for domain, sums in parts.items():
            if domain not in number:
                return f"layer {key}: domain {domain!r} is not in the header"
            wrong = sums.problem(header["top_k"])
            if wrong:
                return f"tensor {key}/{number[domain]}/{wrong}"
            sizes.add((sums.num_experts, sums.dimensions))
        if len(sizes) > 1 or not header["top_k"] <= max(sizes)[0] <= header["num_experts"]:
            return (
                f"layer {key}: (experts, dimensions) {sorted(sizes)} do not agree with each other or with "
                f"top_k {header['top_k']} and num_experts {header['num_experts']}"
            )
    return None
