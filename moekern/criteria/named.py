"""From what a person writes after --criterion to a criterion: a name, hts(b, alpha, beta), a combination, a plug-in."""

from __future__ import annotations

import importlib
import importlib.util
import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moekern import files
from moekern.checkpoint.strict_json import shown
from moekern.criteria import combine, scores
from moekern.criteria.combine import Part
from moekern.criteria.needs import NotForLayer
from moekern.criteria.table import ALIASES, COMBINATORS, CRITERIA, Criterion, Family, unknown
from moekern.errors import InputError, first_line
from moekern.statistics.layer import TIERS, LayerStatistics

SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)  # of a plug-in
WEIGHT_CAP, DEPTH_CAP = 1e9, 64  # of combinations
POWER_CAP = 16.0  # of counts: beyond, scores leave the range of numbers
CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def criterion_named(text: str) -> Criterion:
    """The criterion that `text` asks for.

    A name of the table; "hts(1,1,1)"; a combination such as "rank(reap*2, usage)", "union(reap, hope)",
    "worst_domain(reap)" or "inverse(wsr)"; a plug-in "path/to/file.py:function" or "package.module:function", whose
    function takes LayerStatistics and gives [E] scores, higher kept. Raises InputError, naming what is known.
    """
    name = text.strip()
    name = ALIASES.get(name, name)
    if name in CRITERIA:
        return CRITERIA[name]
    if name.count("(") > DEPTH_CAP:
        raise InputError(f"--criterion {text:.80}: more than {DEPTH_CAP} combinations")
    call = CALL.fullmatch(name)
    if call and call[1] == "hts":
        return _hts(name, call[2])
    if call and call[1] in COMBINATORS:
        return _combined(name, call[1], _arguments(call[2]))
    if ":" in name and not call:
        return _plug_in(name)
    raise unknown(text)


def score_layer(criterion: Criterion, statistics: LayerStatistics, key: str, seed: int = 0) -> Tensor:
    """[E] float64, higher is kept. A selector scores the cost of dropping each expert alone.

    Raises InputError, naming the layer, where the criterion has nothing to say of it.
    """
    if criterion.kind == "seeded":
        found: Tensor = criterion.function(statistics.num_experts, seed, key)
        return found
    try:
        if criterion.kind == "domains":
            chosen = criterion.function({"": statistics}, statistics.num_experts)
            return chosen.scores  # type: ignore[no-any-return]
        return combine.scored(criterion, statistics)
    except NotForLayer as error:
        raise InputError(f"layer {key}: {error}") from None


def _hts(text: str, inside: str) -> Criterion:
    try:
        b, alpha, beta = (float(number) for number in inside.split(","))
    except ValueError:
        raise InputError(f"--criterion {text}: expected three numbers, as in hts(1,1,1)") from None
    if not abs(b) <= POWER_CAP:
        raise InputError(f"--criterion {text}: b must be finite, from -{POWER_CAP:g} to {POWER_CAP:g}")
    if (alpha, beta) not in scores.MOMENTS:
        scores.hts(LayerStatistics.zeros(1), b, alpha, beta)  # says which are known
    function = partial(scores.hts, b=b, alpha=alpha, beta=beta)
    return Criterion(text, function, "score", "activation", (), "min", "S(b, alpha, beta)", "arXiv:2606.15716")


def plug_ins(text: str) -> dict[str, str]:
    """The files or modules of the plug-ins in a criterion's text, as it names them, and the sha256 of their code."""
    found = {}
    for piece in re.split(r"[(),]", text):
        name, star, _ = piece.rpartition("*")
        where = (name if star else piece).strip().rpartition(":")[0]
        spec = importlib.util.find_spec(where) if where and not where.endswith(".py") else None
        path = where if spec is None else spec.origin
        if path and Path(path).is_file():
            found[where] = files.sha256(path)
    return found


def _arguments(inside: str) -> list[str]:
    """Split at the commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inside):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [part for part in [*parts, inside[start:]] if part.strip()]


def _combined(text: str, combinator: str, arguments: list[str]) -> Criterion:
    parts = [_part(text, argument) for argument in arguments]
    if not parts:
        raise InputError(f"--criterion {text}: expected criteria between the parentheses")
    kind, function = COMBINATORS[combinator], getattr(combine, combinator)
    if (kind == "domains" or combinator == "inverse") and len(parts) != 1:
        raise InputError(f"--criterion {text}: {combinator} takes one criterion")
    first = parts[0].criterion
    if combinator == "inverse" and first.kind == "selector":
        raise InputError(f"--criterion {text}: {first.name} chooses a set as a whole, which has no other end")
    if combinator == "inverse" and first.name.startswith("inverse("):
        raise InputError(f"--criterion {text}: the inverse of an inverse is the criterion itself")
    tiers = tuple(dict.fromkeys(tier for part in parts for tier in part.criterion.tiers))
    family: Family = "weight" if all(part.criterion.family == "weight" for part in parts) else "combined"
    return Criterion(text, partial(function, parts), kind, family, tiers, "set", "a combination", "")


def _part(text: str, argument: str) -> Part:
    name, star, weight = argument.rpartition("*")
    try:
        factor = float(weight) if star else 1.0
    except ValueError:
        raise InputError(f"--criterion {text}: {weight.strip()!r} is no weight, as in reap*0.5") from None
    if not 1 / WEIGHT_CAP <= factor <= WEIGHT_CAP:
        raise InputError(f"--criterion {text}: weights must be positive, from {1 / WEIGHT_CAP:g} to {WEIGHT_CAP:g}")
    part = Part(criterion_named(name if star else argument), factor)
    if part.criterion.kind in ("seeded", "domains"):
        raise InputError(f"--criterion {text}: {part.criterion.name} cannot be part of a combination")
    return part


def _plug_in(text: str) -> Criterion:
    where, _, name = text.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"moekern_plug_in_{Path(where).stem}", where)
            if spec is None or spec.loader is None:
                raise ImportError(f"{where} is no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # anybody's code
        raise InputError(f"--criterion {text}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise InputError(f"--criterion {text}: {name} is no function of a layer's statistics")
    meaning = (function.__doc__ or "").strip().partition("\n")[0]
    tiers = getattr(function, "tiers", ())
    if not isinstance(tiers, (tuple, list)) or not all(tier in ("routed", *TIERS) for tier in tiers):
        raise InputError(f"--criterion {text}: its tiers are {shown(tiers)}, expected some of {', '.join(TIERS)}")
    return Criterion(text, partial(_checked, text, function), "score", "plug-in", tuple(tiers), "min", meaning, "")


def _checked(text: str, function: Callable[[LayerStatistics], Tensor], statistics: LayerStatistics) -> Tensor:
    """What a plug-in gives, as [E] float64 on the CPU. Raises InputError for anything else, and for what it raises."""
    E = statistics.num_experts
    try:
        scores = function(statistics)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # anybody's code
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {where.name}, line {where.lineno}: {first_line(error)}"
        raise InputError(f"--criterion {text}: {reason}") from error
    if not isinstance(scores, Tensor) or scores.shape != (E,):
        got = f"{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"--criterion {text}: expected a tensor of {E} finite scores, got {got}")
    if scores.is_meta or scores.layout != torch.strided or scores.dtype not in SCORE_DTYPES:
        got = f"{scores.dtype} {scores.layout} on {scores.device}"
        raise InputError(f"--criterion {text}: expected a dense tensor of numbers, got {got}")
    scores = scores.detach().to("cpu", torch.float64)
    if not scores.isfinite().all():
        raise InputError(f"--criterion {text}: expected a tensor of {E} finite scores, got one that is not finite")
    return scores
