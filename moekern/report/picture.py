"""The picture of a report, for a model card: the cut curve, and which experts of each layer go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from moekern.errors import InputError
from moekern.report.shares import order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDERS = 4  # curves of the picture at most
WIDEST = 48  # characters of a name
COLOURS = ("#2f7ed8", "#d55e00", "#009e73", "#cc79a7")


def check_installed() -> None:
    """Raise InputError where matplotlib is not installed."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise InputError("--png: needs matplotlib: pip install 'moekern[report]'") from error


def picture_of(found: Mapping[str, Any]) -> bytes:
    """A PNG of 1500 x 600 pixels of what `report_of` gives, the same bytes for the same report and matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"text.parse_math": False, "font.size": 9.0, "axes.titlesize": 10.0, "axes.titlelocation": "left"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # of the names that files give
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
        _curves(left, found["curves"])
        _experts(right, found)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= WIDEST else f"{name[: WIDEST - 3]}..."


def _curves(axes: Axes, curves: list[Mapping[str, Any]]) -> None:
    """Solid the share of saliency, dashed that of traffic; a dot where a plan cuts, a diamond at the knee."""
    handles, labels = axes.plot([0, 100], [0, 100], color="#888888", linestyle=":"), ["random"]
    for curve, colour in zip(curves[:ORDERS], COLOURS, strict=False):
        at = np.linspace(0, 100, len(curve["saliency"]))
        for what, style in (("saliency", "-"), ("tokens", "--")):
            handles += axes.plot(at, 100 * np.array(curve[what]), color=colour, linestyle=style)
            labels.append(f"{_short(curve['name'])}: {'traffic' if what == 'tokens' else what}")
        for told, mark in ((curve["cut"], "o"), (curve["knee"], "D")):
            if told:
                place = (100 * told["experts"], 100 * told["saliency"])
                axes.plot(*place, mark, color=colour, markerfacecolor=colour if mark == "o" else "white")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="% of the experts removed", ylabel="% removed with them")
    axes.set_title("cut curve, mean of layers\ndots: where plans cut, diamonds: knees")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(handles, labels, fontsize=7, loc="upper left", frameon=False)


def _experts(axes: Axes, found: Mapping[str, Any]) -> None:
    """Tokens, or what the first plan goes by, as ranks within a layer; what it drops is grey."""
    keys = [layer["key"] for layer in found["layers"]]
    plan = next(iter(found["kept"]), None)
    what = "tokens" if plan is None else found["shown"][plan]
    table = np.full((len(keys), max(layer["experts"] for layer in found["layers"])), np.nan)
    gone = np.zeros_like(table)
    for row, key in enumerate(keys):
        values = found["values"][what][key]
        table[row, order(values)] = np.linspace(0, 1, len(values))
        if plan is not None:
            gone[row, : len(values)] = ~np.isin(np.arange(len(values)), found["kept"][plan][key])
    axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
    grey = np.zeros((*table.shape, 4))
    grey[gone > 0] = (0.72, 0.72, 0.72, 1.0)
    axes.imshow(grey, aspect="auto", interpolation="nearest")
    step = -(-len(keys) // 16)
    axes.set_yticks(range(0, len(keys), step), [_short(key)[:12] for key in keys[::step]])
    of = "" if plan is None else f"grey: dropped by {_short(plan)}"
    axes.set_title(f"{_short(what)}, by rank in the layer, yellow the highest\n{of}")
    axes.set(xlabel="expert", ylabel="layer")
