"""The table of criteria: what `moekern criteria`, the docs and the tests are made from. One row a criterion.

It needs no torch: a criterion's module is imported when its function is first called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from moekern.errors import InputError, nearest_name

Drop = Literal["min", "max", "set", "none"]
Kind = Literal["score", "selector", "seeded", "domains"]
Family = Literal["weight", "inference", "activation", "gradient", "redundancy", "combined", "baseline", "plug-in"]

MC = "arXiv:2504.05586"
# What is taken where nobody names a criterion: on the model that ships its loss is the lowest of the routed tier's at
# 50 and 25 % kept, and 0.004 nats above the lowest at 75 % (docs/comparison.md). rcs_loo, of another tier, is as low.
DEFAULT = "gated_norm"
AUTO = "auto"  # no criterion: the best of CANDIDATES by measurement
CANDIDATES = ("gated_norm", "gated_square", "hope_all_tokens", "rcs_loo", "reap")
AUTO_ELSEWHERE = (
    f"--criterion {AUTO}: `run` chooses by measurement; elsewhere make several plans (`plan --criterion A --criterion "
    "B --out plans/`), and `evaluate MODEL plans/*.json --data TEXT --best plan.json` takes the best"
)
HTS = "arXiv:2606.15716"
REAP = "arXiv:2510.13999"
RAZOR = "arXiv:2609.30465"
HC = "arXiv:2410.08589"


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a module of criteria, which is imported when it is called."""

    module: str
    __name__: str

    @property
    def itself(self) -> Callable[..., Any]:
        """The function, imported."""
        found: Callable[..., Any] = getattr(import_module(f"moekern.criteria.{self.module}"), self.__name__)
        return found

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.itself(*arguments, **options)


class Module:
    """A module of criteria by its name: its functions are named, and it is not imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Function:
        return Function(self.name, function)


activation, gradient, mixture, pairs, pursuit, scores, selectors, subsets, weights = map(
    Module, ("activation", "gradient", "mixture", "pairs", "pursuit", "scores", "selectors", "subsets", "weights")
)


@dataclass(frozen=True, slots=True)
class Criterion:
    """One way to choose experts.

    kind "score": function(LayerStatistics) -> [E] float64, higher is kept.
    kind "selector": function(LayerStatistics, kept, groups, protected) -> Selection.
    kind "domains": as a selector, with a mapping from domain to LayerStatistics in the first place.
    kind "seeded": function(experts, seed, layer key) -> [E] float64.
    `drop` is the end of the published quantity that goes first: where it is "max", the score is its negative. `tiers`
    are what calibration must have measured beside the routed one. The family "weight" needs no text.
    """

    name: str
    function: Callable[..., Any]
    kind: Kind
    family: Family
    tiers: tuple[str, ...]
    drop: Drop
    meaning: str
    paper: str


def _rows(module: Module, family: Family, tier: str, *rows: tuple[str, Drop, str, str]) -> tuple[Criterion, ...]:
    """Criteria of one module, family and tier: name (of the function too), drop, meaning, paper."""
    tiers = () if tier == "routed" else (tier,)
    return tuple(
        Criterion(name, getattr(module, name), "selector" if drop == "set" else "score", family, tiers, drop, *words)
        for name, drop, *words in rows
    )


MC_SUITE = (
    *_rows(
        weights, "weight", "weights",
        ("ews", "max", "cosine of the weights with the other experts' (EWS)", MC),
        ("rwn", "max", "norm of the router's row (RWN)", MC),
        ("wsr", "max", "stable rank of the weights (WSR)", MC),
        ("ewn", "min", "norm of the weights (EWN)", MC),
    ),
    *_rows(scores, "inference", "routed", ("usage", "min", "share of tokens routed to the expert (EUF)", MC)),
    *_rows(pairs, "inference", "routed", ("ecc", "max", "the less used of the pair chosen together most (ECC)", MC)),
    *_rows(scores, "inference", "vocabulary", ("evtc", "min", "distinct token ids seen (EVTC)", MC)),
    *_rows(pairs, "inference", "vocabulary", ("ets", "max", "the less used of the pair sharing most ids (ETS)", MC)),
    *_rows(
        activation, "activation", "dimensions",
        ("eas", "max", "cosine of the outputs with the other experts' (EAS)", MC),
        ("eae", "min", "sum of log std of the output's dimensions (EAE)", MC),
    ),
    *_rows(activation, "activation", "outliers", ("eao", "min", "output entries beyond 3 sigma (EAO)", MC)),
    *_rows(
        activation, "activation", "dimensions",
        ("ean_dim", "min", "norm over tokens of each output dimension, summed (EAN)", MC),
    ),
    *_rows(
        gradient, "gradient", "gradient",
        ("egs", "max", "cosine of the gradient with the other experts' (EGS)", MC),
        ("ege", "min", "sum of log std of the gradient's dimensions (EGE)", MC),
        ("ego", "min", "gradient entries beyond 3 sigma (EGO)", MC),
        ("egn", "min", "norm of the gradient (EGN)", MC),
    ),
)  # fmt: skip
HTS_FAMILY = (
    *_rows(scores, "inference", "routed", ("gate_mass", "min", "sum of gates (SEER-MoE)", "arXiv:2404.05089")),
    *_rows(
        scores, "activation", "routed",
        ("ean", "min", "sum of output norms (EAN, per token)", REAP),
        ("reap", "min", "mean gate x norm (REAP)", REAP),
        ("man", "min", "mean output norm (MAN)", HTS),
        ("msan", "min", "mean squared output norm (MSAN)", HTS),
        ("gated_norm", "min", "sum of gate x norm", HTS),
        ("gated_square", "min", "sum of (gate x norm) squared", HTS),
    ),
)  # fmt: skip
LATER = (
    *_rows(pairs, "inference", "token_counts", ("ets_tokens", "max", "as ets, an id counting as often as seen", MC)),
    *_rows(
        scores, "activation", "reap",
        ("reap_renormalised", "min", "REAP with each token's gates made to sum to 1", REAP),
        ("reap_compat", "min", "REAP as its code took it until March 2026, for comparison", REAP),
    ),
    *_rows(
        selectors, "activation", "routed",
        ("hope", "set", "least joint gate x norm of the dropped set (HOPE)", "arXiv:2609.18916"),
        ("hope_all_tokens", "set", "as hope, averaged over all tokens (HOPE's bound)", "arXiv:2609.18916"),
    ),
    *_rows(
        mixture, "activation", "mixture",
        ("rcs", "min", "sum of (gate x distance from the token's mixture) squared (RAZOR)", RAZOR),
        ("rcs_sum", "min", "as rcs, the sum itself", RAZOR),
        ("rcs_mean", "min", "as rcs, the mean", RAZOR),
        ("rcs_rms", "min", "as rcs, the root mean square, as published", RAZOR),
        ("rcs_loo", "min", "as rcs, over 1 - share of the gates: exact for one expert left out (RAZOR)", RAZOR),
        ("rcs_loo_sum", "min", "as rcs_loo, the sum itself", RAZOR),
        ("rcs_loo_mean", "min", "as rcs_loo, the mean", RAZOR),
        ("rcs_loo_rms", "min", "as rcs_loo, the root mean square, as published", RAZOR),
    ),
    *_rows(
        mixture, "activation", "replay",
        ("razor", "min", "as rcs_loo_rms, with the expert that the router promotes (RAZOR)", RAZOR),
    ),
    *_rows(
        pursuit, "activation", "gram",
        ("omp", "set", "kept set that best makes up the sum of all contributions (OMP-MoE)", "arXiv:2609.31631"),
    ),
    *_rows(
        scores, "activation", "routed",
        ("easy_ep", "min", "sum of gate x norm x turn of the residual stream (EASY-EP)", "arXiv:2504.06792"),
    ),
    *_rows(
        activation, "activation", "dimensions",
        ("mone", "min", "spread of the output x sum of gates (MoNE)", "arXiv:2507.00390"),
    ),
    *_rows(weights, "weight", "weights", ("aimer", "max", "mean |w| over RMS of weights (AIMER)", "arXiv:2603.18492")),
    *_rows(
        pairs, "inference", "coalitions",
        ("shape", "min", "Shapley-like share of the chosen sets (SHAPE)", "arXiv:2606.09886"),
    ),
    *_rows(
        gradient, "gradient", "gradient",
        ("taylor", "min", "first-order change of the loss without the weights", "arXiv:1611.06440"),
        ("gate_taylor", "min", "first-order rise of the loss without the gate", ""),
    ),
)  # fmt: skip
REDUNDANCY = (
    *_rows(
        subsets, "redundancy", "weights",
        ("stun", "set", "one of each cluster of router rows and co-activation (STUN)", "arXiv:2409.06211"),
    ),
    *_rows(
        pairs, "redundancy", "routed",
        ("m_smoe", "max", "likeness of router logits to a more used expert's (M-SMoE)", "arXiv:2310.01334"),
        ("router_redundancy", "max", "cosine of router logits with the other experts'", ""),
    ),
    *_rows(
        subsets, "redundancy", "replay",
        ("naee", "set", "kept set whose output is nearest to the whole layer's (NAEE)", "arXiv:2402.14800"),
        ("hc_smoe_clusters", "set", "the central one of each cluster of mean outputs (HC-SMoE)", HC),
        ("hc_smoe_clusters_cosine", "set", "the most used of each cluster of mean outputs, by cosine", HC),
        ("leave_one_out_greedy", "set", "dropped one by one, least added loss of output first", ""),
        ("diet", "set", "kept set that covers the deletion signatures (DIET)", "DIET, 2026"),
    ),
    *_rows(
        pairs, "redundancy", "replay",
        ("hc_smoe", "min", "distance of mean outputs from a more used expert's (HC-SMoE)", HC),
        ("hc_smoe_cosine", "max", "cosine of mean outputs with a more used expert's", HC),
        ("ream", "max", "likeness of outputs and logits to an expert of higher REAP (REAM)", "arXiv:2604.04356"),
        ("ream_tokens", "max", "as ream, by the cosine of outputs token by token", "arXiv:2604.04356"),
        ("output_redundancy", "max", "mean cosine of outputs with the other experts'", ""),
        ("leave_one_out", "min", "what the output loses when the expert is dropped alone", ""),
    ),
)  # fmt: skip
RANDOM = Criterion("random", scores.random, "seeded", "baseline", (), "none", "numbers from --seed: a baseline", "")

CRITERIA: dict[str, Criterion] = {row.name: row for row in (*MC_SUITE, *HTS_FAMILY, *LATER, *REDUNDANCY, RANDOM)}
# The other end of criteria whose negative is not that: they part one pair after the other.
OTHER_ENDS: dict[str, Callable[..., Any]] = {
    "ecc": pairs.ecc_apart, "ets": pairs.ets_apart, "ets_tokens": pairs.ets_tokens_apart
}  # fmt: skip
# Of these MC-Suite prints the formula alone: the end that goes first is moekern's reading.
INFERRED = ("ewn", "eao", "egs", "ego", "egn")
# Other names that papers use.
ALIASES = {"euf": "usage", "frequency": "usage", "seer": "gate_mass", "ean_token": "ean"}
COMBINATORS: dict[str, Kind] = {
    "rank": "score",
    "zscore": "score",
    "inverse": "score",
    "union": "selector",
    "intersection": "selector",
    "worst_domain": "domains",
    "round_robin": "domains",
}
FORMS = "hts(b,alpha,beta), " + ", ".join(f"{name}(...)" for name in COMBINATORS) + ", file.py:function"


def unknown(text: str) -> InputError:
    """The error for a criterion of no known name."""
    near = nearest_name(re.split(r"\W", text.strip())[0], (*CRITERIA, *ALIASES, *COMBINATORS, "hts"))
    return InputError(f"--criterion {text:.80}: unknown{near}; `moekern criteria` lists them, beside {FORMS}")


def check_name(text: str) -> None:
    """Raise InputError for a plain name that is none; calls and plug-ins are looked at by `criterion_named`."""
    if text.strip() == AUTO:
        raise InputError(AUTO_ELSEWHERE)
    if re.fullmatch(r"\s*\w+\s*", text) and text.strip() not in (*CRITERIA, *ALIASES):
        raise unknown(text)


def described() -> list[dict[str, str]]:
    """The rows of the table in words, for people and docs."""
    return [
        {
            "name": c.name,
            "family": c.family,
            "tier": ", ".join(c.tiers) or "routed",
            "drop first": f"{c.drop} (inferred)" if c.name in INFERRED else c.drop,
            "meaning": c.meaning,
            "paper": c.paper,
        }
        for c in CRITERIA.values()
    ]
