"""The header of a statistics file: the model, its router, the text, and the runs that measured it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.twins import router_numbers
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.strict_json import check_depth, parse_json, shown
from moekern.errors import InputError
from moekern.router import Router

FORMAT = "moekern.statistics/3"
READABLE = (FORMAT, "moekern.statistics/2", "moekern.statistics/1")
HEADER_KEY = "moekern"
ROUTER = tuple(field.name for field in fields(Router))
COUNT_CAP, DOMAIN_CAP = 1 << 16, 1 << 12  # experts; domains
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "identity")  # of the table of families
PART = "part"  # of the header of a file that holds a part of a calibration; see `parts`
IDENTITY = ("fingerprint", "family", "score", *ROUTER)  # a Source, as keys of the header


@dataclass(frozen=True, slots=True)
class Source:
    """The model that was measured: what two files must share before their sums may be added."""

    fingerprint: str  # empty where no checkpoint is known
    family: str
    score: str
    router: Router
    routers: Mapping[str, str] = field(default_factory=dict, compare=False)  # by which a twin is known

    @staticmethod
    def of(checkpoint: Checkpoint, layout: Layout) -> Source:
        family, routers = layout.family, router_numbers(checkpoint, layout)
        return Source(checkpoint.fingerprint, family.name, family.score, layout.router, routers)


def make_header(
    source: Source,
    *,
    tokens: Mapping[str, int],
    data: Any,
    backend: Any,
    versions: Mapping[str, str],
    dtype: str | None = None,
    model: str | None = None,
    config: str | None = None,
) -> dict[str, Any]:
    """The header of one calibration run.

    `tokens` counts tokens per domain, in the order that domains are numbered in. `data` (the recipe), `backend` and
    `versions` are any JSON; with `dtype` (None: the checkpoint's), `model` where it is a commit of the hub, and
    `config`, the sha256 of a checkpoint's, they become the one entry of "runs", which grows when files are merged. The
    router's numbers let a plan be made without the checkpoint.
    """
    known = {name: value for name, value in (("model", model), ("config", config)) if value is not None}
    run = {"data": data, "backend": backend, "versions": dict(versions), "dtype": dtype, **known}
    return {
        "format": FORMAT,
        "fingerprint": source.fingerprint,
        "family": source.family,
        "score": source.score,
        **asdict(source.router),
        **({"routers": dict(source.routers)} if source.routers else {}),
        "domains": list(tokens),
        "tokens": dict(tokens),
        "runs": [run],
    }


def router_of(header: Mapping[str, Any]) -> Router:
    """The router of a statistics file, as calibration recorded it."""
    return Router(**{name: header[name] for name in ROUTER})


def merged_header(headers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    domains = list(dict.fromkeys(name for header in headers for name in header["domains"]))
    return {
        **headers[0],
        "domains": domains,
        "tokens": {name: sum(header["tokens"].get(name, 0) for header in headers) for name in domains},
        "runs": [run for header in headers for run in header["runs"]],
    }


def read_header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in metadata:
        raise InputError(f"{path}: a safetensors file, but not moekern statistics (no {HEADER_KEY!r} metadata)")
    header = parse_json(metadata[HEADER_KEY].encode(), f"{path}: header", strict=True)
    check_depth(header, f"{path}: header")
    if header.get("format") not in READABLE:
        found = shown(header.get("format"))
        raise InputError(f"{path}: format {found} is not {FORMAT!r}; calibrate again with this version")
    problem = header_problem(header)
    if problem:
        raise InputError(f"{path}: header: {problem}")
    return {**header, "format": FORMAT}


def header_problem(header: Mapping[str, Any]) -> str | None:
    for name in ("fingerprint", "family", "score"):
        if not isinstance(header.get(name), str):
            return f"{name}: expected a string, got {shown(header.get(name))}"
    if header["score"] not in SCORES:
        return f"score: expected one of {', '.join(SCORES)}, got {shown(header['score'])}"
    for name in ROUTER:
        if type(header.get(name)) is not int or not 1 <= header[name] <= COUNT_CAP:
            return f"{name}: expected a count of at most {COUNT_CAP}, got {shown(header.get(name))}"
    router = router_of(header)
    if router.top_k > router.num_experts or router.topk_group > router.n_group or router.num_experts % router.n_group:
        groups = f"n_group {router.n_group} and topk_group {router.topk_group}"
        return f"top_k {router.top_k}, {groups} do not agree with num_experts {router.num_experts}"
    domains, tokens, runs = header.get("domains"), header.get("tokens"), header.get("runs")
    if not isinstance(domains, list) or not domains or not _distinct_strings(domains):
        return f"domains: expected distinct names, got {shown(domains)}"
    if len(domains) > DOMAIN_CAP:
        return f"domains: {len(domains)} of them, more than the limit of {DOMAIN_CAP}"
    if not isinstance(tokens, dict) or set(tokens) != set(domains):
        return "tokens: expected one count for each domain"
    if any(type(n) is not int or n < 0 for n in tokens.values()):
        return f"tokens: expected counts, got {shown(tokens)}"
    routers = header.get("routers", {})
    if not isinstance(routers, dict) or not all(isinstance(text, str) for text in routers.values()):
        return f"routers: expected a string for each layer, got {shown(routers)}"
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        return "runs: expected a list of objects"
    return None


def _distinct_strings(values: Iterable[Any]) -> bool:
    values = list(values)
    return all(isinstance(v, str) for v in values) and len(set(values)) == len(values)
