"""What was measured of routing, for tools that place experts in memory or on disk while they serve a model.

order: moekern's own, a permutation of each layer's experts in which those that tokens choose together lie side by side.

coli_usage: the history of colibri's engines (.coli_usage, PIN=FILE), a line "layer expert count" for each expert that
was chosen. Of its layouts the one without header records is written, which those engines read as it is: what a header
would name, the engine, statistics do not know. Taken from its documentation and from the header that reads it, of 2026.

mbolt: perms.json, which mbolt reads to lay out a GGUF file anew: for each decoder layer from 0 on `chain_perm`, the
order as above, `heat_perm`, the most chosen first, and `heat`, the counts; `pairs` of its profiles are
[i, j, tokens of both, lift], lift the share of tokens that chose both over the product of the shares of each, from 5
tokens and a lift of 1.5 on, the 2000 with most tokens. Taken from its code, of July 2026.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from moekern.version import __version__

TOOLS = ("order", "coli_usage", "mbolt")
LEAST_TOKENS, LEAST_LIFT, MOST_PAIRS = 5, 1.5, 2000  # of mbolt's pairs
MOST = 2**32 - 1  # a count of colibri's

Counts = NDArray[np.int64]


def placed(statistics: Statistics, tool: str) -> str:
    """The text of a file for one of TOOLS, of all domains together; one layer is read at a time.

    Raises InputError for layers that the tool has no place for.
    """
    if tool == "coli_usage":
        return "".join(coli_usage(statistics))
    if tool == "mbolt":
        return json.dumps(mbolt(statistics)) + "\n"
    layers = {key: order(layer) for key, layer in _layers(statistics)}
    made_of = {"moekern": __version__, "fingerprint": statistics.header["fingerprint"], "statistics": statistics.sha256}
    return json.dumps({"format": "moekern.order/1", "layers": layers, "provenance": made_of}) + "\n"


def order(statistics: LayerStatistics) -> list[int]:
    """The layer's experts, each beside those that most tokens chose together with it.

    Pairs are taken from the one with most tokens down, of equal ones the lowest numbers first, and joined where both
    ends are still free and not ends of one chain. Chains follow one another from the most chosen experts down, each
    with its more chosen end first.
    """
    both, count = statistics.coactivation.cpu().numpy(), statistics.count.tolist()
    E = len(count)
    beside: list[list[int]] = [[] for _ in range(E)]
    chain = list(range(E))  # which one an expert is of: the number of one of its members
    rows, columns = np.triu_indices(E, 1)
    tokens = both[rows, columns]
    for at in np.argsort(-tokens, kind="stable")[: np.count_nonzero(tokens)].tolist():
        i, j = int(rows[at]), int(columns[at])
        if len(beside[i]) < 2 and len(beside[j]) < 2 and chain[i] != chain[j]:
            beside[i].append(j)
            beside[j].append(i)
            chain = [chain[i] if of == chain[j] else of for of in chain]
    found = [_walked(e, beside) for e in range(E) if len(beside[e]) < 2]
    forward = [c for c in found if (-count[c[0]], c[0]) <= (-count[c[-1]], c[-1])]  # each chain is found from both ends
    return [e for c in sorted(forward, key=lambda c: (-sum(count[e] for e in c), c)) for e in c]


def _walked(end: int, beside: list[list[int]]) -> list[int]:
    walked, before = [end], -1
    while True:
        further = [e for e in beside[walked[-1]] if e != before]
        if not further:
            return walked
        before = walked[-1]
        walked.append(further[0])


def coli_usage(statistics: Statistics) -> Iterator[str]:
    """Lines "layer expert count"."""
    for key, layer in _layers(statistics):
        if not key.isdecimal():
            raise InputError(f"--to coli_usage: layer {key}: the file has a place for decoder layers alone")
        for e, count in enumerate(layer.count.tolist()):
            if count > MOST:
                raise InputError(f"--to coli_usage: layer {key}: {count} tokens of expert {e} are more than it holds")
            if count:
                yield f"{key} {e} {count}\n"


def mbolt(statistics: Statistics) -> dict[str, object]:
    """perms.json."""
    keys, experts = sorted(statistics.layers, key=natural), set[int]()
    if keys != [str(i) for i in range(len(keys))]:
        raise InputError(
            f"--to mbolt: its file has an entry for each decoder layer from 0 on, and this model has experts in layers "
            f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        )
    layers = []
    for key, layer in _layers(statistics):
        count = layer.count.tolist()
        experts.add(len(count))
        layers.append({
            "layer": int(key),
            "heat": count,
            "heat_perm": sorted(range(len(count)), key=lambda e: (-count[e], e)),  # noqa: B023
            "chain_perm": order(layer),
            "top_cliques": [],
            "pairs": pairs(layer),
        })  # fmt: skip
    if len(experts) > 1:
        raise InputError(f"--to mbolt: its file has one number of experts, and layers have {sorted(experts)}")
    tokens = sum(statistics.header["tokens"].values())
    return {"n_layers": len(keys), "n_expert": experts.pop(), "n_tokens": tokens, "layers": layers}


def pairs(statistics: LayerStatistics) -> list[tuple[int, int, int, float]]:
    """[i, j, tokens that chose both, lift], from the most tokens down."""
    both, count, n = statistics.coactivation.cpu().numpy(), statistics.count.tolist(), max(1, int(statistics.tokens))
    rows, columns = (both * (both >= LEAST_TOKENS)).nonzero()
    found = [(i, j, int(both[i, j])) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if i < j]
    lifted = [(i, j, tokens, tokens * n / (count[i] * count[j])) for i, j, tokens in found]
    most = sorted((pair for pair in lifted if pair[3] >= LEAST_LIFT), key=lambda pair: (-pair[2], pair))
    return [(i, j, tokens, round(lift, 2)) for i, j, tokens, lift in most[:MOST_PAIRS]]


def _layers(statistics: Statistics) -> Iterator[tuple[str, LayerStatistics]]:
    for key in sorted(statistics.layers, key=natural):
        yield key, statistics.layer(key, tiers=())
