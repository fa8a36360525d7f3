"""The page: one file of HTML with its style, its script and its numbers in it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moekern.files import sized
from moekern.report.collect import SHARES
from moekern.rows import with_error
from moekern.statistics.coverage import THIN
from moekern.version import __version__

PARTS = Path(__file__).parent / "page"
VALUES = 800_000  # bytes of the values that the map shows; those of plans come first
STEP = 16  # of a factor of two, in what is held as bytes
COLUMNS = 16  # domains of a table of layers
LOAD = ("max_over_mean", "variation", "gini")
UNKNOWN, NEVER = -128, -127  # in the place of such a byte


def page_of(found: Mapping[str, Any]) -> str:
    """HTML of what `report_of` gives. Whatever files say in it is escaped."""
    model = found["model"]
    name = model["name"] or model["family"]
    title = f"Expert pruning of {Path(name).name if Path(name).is_absolute() else name}"
    environment = Environment(
        loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "sized": sized, "percent": percent, "number": number, "figure": figure, "percents": _percents,
    }  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False, "separators": (",", ":")}
    own = {name: Markup((PARTS / f).read_text()) for name, f in (("style", "style.css"), ("script", "charts.js"))}
    return environment.get_template("template.html").render(
        title=title, version=__version__, thin=THIN, data=_packed(found), **own, **_tables(found)
    )


def number(value: Any) -> str:
    """Four digits at the least, whole numbers whole."""
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def figure(told: Mapping[str, Any]) -> str:
    """A value with its standard error, where it has one."""
    return "not known" if told["value"] is None else with_error(told["value"], told["error"])


def _percents(told: Mapping[str, float | None]) -> str:
    """The same as a share."""
    return percent(told["value"]) + ("" if told["error"] is None else f" ± {percent(told['error'])}")


def _tables(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows without a script."""
    layers, curves, evaluation = found["layers"], found["curves"], found["evaluation"]
    runs = [{**run, "domains": [{**d, "tokens_known": d["tokens"] or 0} for d in run["domains"]]}
            for run in found["runs"]]  # fmt: skip
    points = len(curves[0]["saliency"])
    return {
        **{name: found[name] for name in ("model", "commands", "warnings", "overlap")},
        "runs": runs,
        "plans": [{**row, "also": _also(row)} for row in found["plans"]],
        "evaluation": evaluation and {**evaluation, "pair_rows": [
            (p["plan"], p["than"], p["metric"], *(number(p[end]) for end in ("mean", "low", "high")),
             "yes" if p["clear"] else "no") for p in evaluation["pairs"]
        ], **_evaluation_tables(evaluation)},
        "from_lowest": [curve["name"] for curve in curves if curve["from_lowest"]],
        "curve_head": ("experts removed", *(f"{c['name']}, {w}" for c in curves for w in ("saliency", "traffic"))),
        "curve_rows": [
            (percent(i / (points - 1)), *(percent(c[what][i]) for c in curves for what in ("saliency", "tokens")))
            for i in range(0, points, 4)
        ],
        "cut_rows": [
            (c["name"], c["criterion"], *(percent(c["cut"][what]) for what in SHARES))
            for c in curves if c["cut"]
        ],
        "knee_rows": [(c["name"], *(percent(c["knee"][what]) for what in SHARES)) for c in curves if c["knee"]],
        "follows_rows": {name: [(layer["key"], *map(number, row.values()))
                                for layer, row in zip(layers, rows, strict=True)]
                         for name, rows in found["follows"].items()},
        "variance_rows": [_variance_row(layer["key"], layer["router"]["variance"]) for layer in layers]
        if any(layer["router"]["variance"] for layer in layers) else [],
        "term_rows": [(name, number(mean_of([row["routing_term"] for row in rows])))
                      for name, rows in found["by_plan"].items()],
        "by_plan": {name: [_layer_row(layer["key"], row) for layer, row in zip(layers, rows, strict=True)]
                    for name, rows in found["by_plan"].items()},
        "coverage_rows": [(name, *map(number, row.values())) for name, row in found["coverage"].items()],
        "layer_rows": [(layer["key"], *(number(layer[what]) for what in
                        ("experts", "idle", "thin", "least", "median", "most"))) for layer in layers],
        "stability_rows": {
            name: [(layer["key"], number(row["kept"]), number(row["rank"]), percent(row["differ"]),
                    percent(row["undecided"])) for layer, row in zip(layers, rows, strict=True)]
            for name, rows in found["stability"].items() if rows and _some_known(rows)
        },
        "router_rows": [_router_row(layer["key"], layer["router"]) for layer in layers],
        **_domain_table(layers),
    }  # fmt: skip


def _evaluation_tables(found: Mapping[str, Any]) -> dict[str, Any]:
    more = {"one_minus_tv": "1 - TV", "bits_per_byte": "bits a byte"}
    names = [row["name"] for row in found["rows"] if row["name"] != found["original"]]
    return {
        "more": {what: told for what, told in more.items()
                 if any(row[what]["value"] is not None for row in found["rows"])},
        "bucket_head": (*(f"{what}, {name}" for name in names for what in ("KL", "same top-1")),),
        "bucket_rows": {axis: [
            (row["label"], *(form(row["plans"][name][what]) if name in row["plans"] else "-"
                             for name in names for what, form in (("kl", figure), ("top1", _percents))))
            for row in rows
        ] for axis, rows in found["buckets"].items() if rows},
        "layer_rows": {name: [(key, *map(number, row.values())) for key, row in layers.items()]
                       for name, layers in found["layers"].items() if layers},
    }  # fmt: skip


def _some_known(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(value is not None for row in rows for value in row.values())


def _also(row: Mapping[str, Any]) -> str:
    said = [
        f"{row['width']} channels" if row["width"] else "",
        f"constants: {row['replace']}" if row["replace"] else "",
    ]
    said += ["merged" if row["merged"] else "", "refitted" if row["refitted"] else ""]
    return ", ".join(filter(None, said))


def _layer_row(key: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (percent(row[name]) for name in ("saliency", "tokens", "spiking", "absorbed"))
    load = (number(row[name]) for name in LOAD)
    return key, number(row["kept"]), number(row["at_cut"]), *shares, *load


def _router_row(key: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    z = (
        "-" if each is None else f"{each['z']:+.2f} (expert {each['expert']})"
        for each in (row["load_z"], row["norm_z"])
    )
    load = (number(row[name]) for name in ("dead", *LOAD))
    return key, percent(row["entropy"]), number(row["margin"]), *load, *z


def _variance_row(key: str, found: Mapping[str, Any] | None) -> tuple[str, ...]:
    if found is None:
        return key, *["not known"] * 4
    numbers = (number(found[name]) for name in ("clusters", "within", "between"))
    return key, *numbers, percent(_within(found))


def _within(found: Mapping[str, Any]) -> float | None:
    whole = found["within"] + found["between"]
    return found["within"] / whole if whole > 0 else None


def _domain_table(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Degradation and underfitting by layer, where there are domains to compare."""
    told_of = (name for layer in layers if layer["domains"] for name in layer["domains"]["served"])
    names = list(dict.fromkeys(told_of))[:COLUMNS]
    rows = []
    for layer in layers if names else ():
        found = layer["domains"] or {"owned": None, "most": None, "served": {}}
        most = found["most"]
        told = "-" if most is None else f"{percent(most['share'])} {most['domain']} (expert {most['expert']})"
        rows.append((layer["key"], number(found["owned"]), told, *(percent(found["served"].get(n)) for n in names)))
    head = ("layer", "experts of one domain", "most of one domain", *(f"{name} on its own experts" for name in names))
    return {"domain_head": head, "domain_rows": rows}


def _packed(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the script shows: numbers of five digits, and long rows of them as base64."""
    keys, experts = [layer["key"] for layer in found["layers"]], sum(layer["experts"] for layer in found["layers"])
    values, most = found["values"], max(2, VALUES * 3 // (4 * 4 * max(1, experts)))
    held = {name: _base64(_floats(v for key in keys for v in values[name][key])) for name in [*values][:most]}
    small = ("by_plan", "stability", "shown", "follows")
    evaluation = found["evaluation"]
    return _rounded({
        **{name: found[name] for name in small},
        "names": list(found["kept"]),
        "layers": [_layer(layer) for layer in found["layers"]],
        "curves": found["curves"],
        "evaluation": evaluation and {
            name: evaluation[name] for name in ("original", "rows", "pairs", "buckets", "layers")
        },
        "kept": {name: _bits(layers, found["layers"]) for name, layers in found["kept"].items()},
        "values": held,
        "preferences": [{name: _base64(_bytes(row)) for name, row in layer.items()} for layer in found["domains"]],
        "pairs": [{**each, "lift": _lifts(each["lift"]), "alike": each["alike"] and _cosines(each["alike"])}
                  for each in found["pairs"]],
    })  # fmt: skip


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    router = layer["router"]
    variance = router["variance"] and {"share": _within(router["variance"])}
    kept = {name: layer[name] for name in ("key", "experts", "thin", "median", "domains")}
    return {**kept, "router": {**router, "variance": variance}}


def _bits(keep: Mapping[str, Sequence[int]], layers: Sequence[Mapping[str, Any]]) -> str:
    """A bit an expert, of all layers one after another, the lowest bit of a byte first."""
    rows = [np.isin(np.arange(layer["experts"]), keep[layer["key"]]) for layer in layers]
    return _base64(np.packbits(np.concatenate(rows), bitorder="little"))


def _floats(values: Iterable[float]) -> np.ndarray:
    """float32, little end first; what is too large for it is the largest it has."""
    most = float(np.finfo(np.float32).max)
    return np.array(list(values), np.float64).clip(-most, most).astype("<f4")


def _bytes(row: Sequence[float | None]) -> np.ndarray:
    """Logarithms to base 2 as int8, STEP for one."""
    at = [UNKNOWN if v is None else NEVER if v < -1e6 else max(-126, min(127, round(STEP * v))) for v in row]
    return np.array(at, np.int8)


Table = Sequence[Sequence[float | None]]


def _lifts(table: Table) -> str:
    """128 + STEP log2 of each; 0 where it is not known, 1 of pairs that never were together."""
    values = _triangle(table)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.clip(np.round(128 + STEP * np.log2(values)), 2, 255)
    at = np.where(np.isnan(values), 0, np.where(values <= 0, 1, at))
    return _base64(at.astype(np.uint8))


def _cosines(table: Table) -> str:
    """128 + 127 times each; 0 where it is not known."""
    values = _triangle(table)
    return _base64(np.where(np.isnan(values), 0, np.clip(np.round(128 + 127 * values), 1, 255)).astype(np.uint8))


def _triangle(table: Table) -> np.ndarray:
    """What stands above the diagonal, row by row."""
    return np.array(table, np.float64)[np.triu_indices(len(table), 1)]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value
