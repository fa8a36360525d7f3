"""The tables of `bench.comparison`: a record's rows by share, and what stands where on the axis of bits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.criteria import spread
from bench.ruler import row_of_sums
from moekern.evaluation.losses import ORIGINAL, Difference, difference

Line = dict[str, Any]
Seeds = dict[int, Line]
LOSSES = (("mean", "loss"), ("mean_kl", "KL"), ("mean_top1", "top-1"))


def markdown(lines: Sequence[Line]) -> str:
    """A table a share, the nearest to the original first; what was refused; and the axis of bits."""
    groups = groups_of(lines)
    tokens = next(line["sequences"] for line in lines if line["row"] == ORIGINAL)
    text = []
    for share in sorted({share for share, _ in groups if share < 1}, reverse=True):
        rows = {row: seeds for (of, row), seeds in groups.items() if of == share}
        text.append(f"{share:.0%} kept:\n\n" + _table(*of_share(rows, tokens), left=2))
    text.append(
        "By bits a routed weight, of each kind the nearest to the original:\n\n" + _table(*axis(groups), left=2)
    )
    refused = dict.fromkeys(f"- {line['row']}: {line['refused']}\n" for line in lines if "refused" in line)
    return "\n".join([*text, *(["Refused:\n\n" + "".join(refused)] if refused else [])])


def groups_of(lines: Sequence[Line]) -> dict[tuple[float, str], Seeds]:
    """(share, row) -> seed -> line."""
    groups: dict[tuple[float, str], Seeds] = {}
    for line in lines:
        if "refused" not in line:
            groups.setdefault((line["keep"], line["row"]), {})[line["seed"]] = line
    return groups


def kl_of(seeds: Seeds) -> float:
    return statistics.fmean(line["mean_kl"] for line in seeds.values())


def of_share(rows: Mapping[str, Seeds], tokens: Mapping[str, Sequence[int]]) -> tuple[list[str], list[list[str]]]:
    """Rows of one share. "farther": how much more KL than the best row, on the draws that both have."""
    order = sorted(rows, key=lambda row: kl_of(rows[row]))
    header = ["row", "kind", "bits", *(word for _, word in LOSSES), "farther (95 %)", "passes", "CPU s", "draws"]
    cells = []
    for row in order:
        some = list(rows[row].values())
        apart = farther(rows[row], rows[order[0]], tokens) if row != order[0] else None
        cells.append([
            row, some[0]["kind"], _bits(some),
            *(spread([line[kind] for line in some]) for kind, _ in LOSSES),
            "best" if row == order[0] else _interval(apart),
            f"{statistics.fmean(line['passes'] for line in some):.0f}",
            f"{statistics.fmean(line['cpu_seconds'] for line in some):.0f}", str(len(some)),
        ])  # fmt: skip
    return header, cells


def farther(seeds: Seeds, best: Seeds, tokens: Mapping[str, Sequence[int]]) -> Difference | None:
    """KL of the one less that of the other, sequence by sequence, means over the draws that both have."""
    both = sorted(seeds.keys() & best.keys())
    if not both:
        return None
    one, other = (
        row_of_sums({d: _means([of[seed]["kl_sums"][d] for seed in both]) for d in tokens}, tokens)
        for of in (seeds, best)
    )
    return difference(one, other, "kl")


def _means(columns: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def _interval(found: Difference | None) -> str:
    if found is None:
        return "no draw in common"
    return f"{found.mean:+.3f} ({found.low:.3f} to {found.high:.3f})" + ("" if found.clear else ", not told apart")


def axis(groups: Mapping[tuple[float, str], Seeds]) -> tuple[list[str], list[list[str]]]:
    """The original, its twins, and of each share and kind the row with the least KL, by bits."""
    best: dict[tuple[Any, ...], tuple[float, str]] = {}
    for key, seeds in groups.items():
        line = next(iter(seeds.values()))
        own = (key[0], line["kind"]) if key[0] < 1 else key
        if own not in best or kl_of(seeds) < kl_of(groups[best[own]]):
            best[own] = key
    rows = [(key, list(groups[key].values())) for key in best.values()]
    rows.sort(key=lambda row: (-statistics.fmean(line["bits"] for line in row[1]), kl_of(groups[row[0]])))
    cells = [
        [_bits(some), f"{key[1]}" + ("" if key[0] == 1 else f", {key[0]:.0%} kept"),
         *(spread([line[kind] for line in some]) for kind, _ in LOSSES)]
        for key, some in rows
    ]  # fmt: skip
    return ["bits", "row", *(word for _, word in LOSSES)], cells


def _bits(some: Sequence[Line]) -> str:
    return f"{statistics.fmean(line['bits'] for line in some):.2f}"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> str:
    table = [header, ["---"] * left + ["---:"] * (len(header) - left), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)
