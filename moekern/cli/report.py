"""The command `report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli.console import hint, say, show
from moekern.cli.given import check_statistics, headers_of, named_plans, result
from moekern.cli.options import Json, Revision, check_model
from moekern.errors import InputError
from moekern.files import check_new, make_parents, sized, write_bytes

if TYPE_CHECKING:
    from moekern.plan.document import Plan
    from moekern.report.recipe import Sizes
    from moekern.statistics.file import Statistics

BLOCKS = "▁▂▃▄▅▆▇█"
CONTEXT = 32_768  # tokens of the KV cache that memory is told with, at most


def report(
    statistics: Annotated[Path, typer.Argument(help="A statistics file.")],
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans of the same model.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `evaluate --out losses.json` has written of these plans.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The model, of which headers are read: sizes before and after.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the page there: one file of HTML.")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a picture there: the cut curve, and the experts that go.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the essentials here.")] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """One page that shows a pruning: recipe, losses, cut curves, experts layer by layer, stability; in one file that
    loads nothing from elsewhere (--out), or in the terminal (--text); and a picture of it (--png)."""
    check_statistics(statistics)
    if out is None and png is None and not text and not as_json:
        raise InputError("report: nowhere to write; name the page with --out report.html, or add --text or --json")
    _check_written(out, png)
    if checkpoint is not None:
        check_model(checkpoint)
    elif revision is not None:
        raise InputError(f"--revision {revision}: goes with --checkpoint")

    from moekern.report.collect import report_of
    from moekern.statistics.file import Statistics

    losses = None
    if evaluation is not None:
        from moekern.report.losses import read_losses

        losses = read_losses(evaluation)
    measured, given = Statistics.load(statistics), named_plans("report", plans or ())
    hint(None if losses is None else told_original(losses, given, f"--evaluation {evaluation}"))
    names = short_names(given)
    judged = {} if losses is None else judged_names(losses, given, names)
    named = {names[path]: plan for path, plan in given.items()}
    sizes = None if checkpoint is None else _sizes(checkpoint, revision, measured, named)
    found = report_of(measured, named, losses, sizes, judged)
    _write(found, out, png)
    result(found, lambda: show_report(found) if text else None)


def _check_written(out: Path | None, png: Path | None) -> None:
    """Raise InputError for files that may not be written, or not as what their names say."""
    if out is not None:
        check_new(out)
        if out.suffix not in (".html", ".htm"):
            raise InputError(f"--out {out}: a report is HTML; name a file that ends in .html")
    if png is not None:
        check_new(png, "--png")
        if png.suffix != ".png":
            raise InputError(f"--png {png}: name a file that ends in .png")
        from moekern.report.picture import check_installed

        check_installed()


def _write(found: Mapping[str, Any], out: Path | None, png: Path | None) -> None:
    """The page and the picture, both made before either is written."""
    made: dict[Path, bytes] = {}
    if out is not None:
        from moekern.report.page import page_of

        made[out] = page_of(found).encode()
    if png is not None:
        from moekern.report.picture import picture_of

        made[png] = picture_of(found)
    for path, content in made.items():
        make_parents(path)
        write_bytes(path, content, new=True)
        say(f"{path}: {sized(len(content))}")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The stem of each path, or the whole of it where two share one."""
    known = list(paths)
    count = Counter(Path(path).stem for path in known)
    return {path: Path(path).stem if count[Path(path).stem] == 1 else path for path in known}


def judged_names(losses: Mapping[str, Any], given: Mapping[str, Plan], names: Mapping[str, str]) -> dict[str, str]:
    """By which names rows of losses are shown beside the plans `given`: where the file tells what a row is of, that of
    the plan that makes this model, and of no other; else by the file's name."""
    from moekern.publishing.evaluation import is_of, models_of

    plans = {names[path]: plan for path, plan in given.items()}
    told, shown = models_of(losses), short_names(losses["losses"])
    known = {row: of for row, of in told.items() if row in shown and "plan" in of}
    same = {row for row, of in known.items() if shown[row] in plans and is_of(of, plans[shown[row]])}
    free = [name for name in plans if name not in {shown[row] for row in same}]
    for row in (row for row in known if row not in same):
        name = next((name for name in free if is_of(known[row], plans[name])), None)
        if name is not None:
            free.remove(name)
        shown[row] = name or (f"{row} (another plan)" if shown[row] in plans else shown[row])
    return shown


def told_original(losses: Mapping[str, Any], given: Mapping[str, Plan], source: str) -> str | None:
    """The line for losses beside another original than that of the plans `given`, where no plan's row tells that it was
    made on the same; None elsewhere."""
    from moekern.publishing.evaluation import is_of, models_of, other_original

    models = models_of(losses)
    if any(is_of(of, plan) and "fingerprint" in of for of in models.values() for plan in given.values()):
        return None
    lines = (other_original(models, plan.provenance.get("fingerprint"), source) for plan in given.values())
    return next((line for line in lines if line is not None), None)


def _sizes(name: str, revision: str | None, statistics: Statistics, plans: Mapping[str, Plan]) -> Sizes:
    """What the checkpoint's headers tell, and its KV cache, where config.json tells. Raises InputError for a checkpoint
    that the statistics are not of, and for plans that do not fit it."""
    from moekern.architectures import find_layout
    from moekern.architectures.twins import router_numbers, same_routers
    from moekern.data.text import config_number
    from moekern.estimation.footprint import cache_bytes
    from moekern.estimation.overview import overview
    from moekern.plan.fits_model import check_plan
    from moekern.pruning.shards import bytes_after
    from moekern.report.recipe import Sizes

    checkpoint = headers_of(name, revision)
    layout = find_layout(checkpoint)
    seen, header = overview(checkpoint), statistics.header
    if seen.fingerprint != header["fingerprint"]:
        known = header.get("routers")
        if not known or not same_routers(known, router_numbers(checkpoint, layout)):
            raise InputError(
                f"--checkpoint {checkpoint.name}: the statistics were measured on another model (fingerprint "
                f"{header['fingerprint'][:12]}, this checkpoint has {seen.fingerprint[:12]}), and no twin of it"
            )
    longest = config_number(checkpoint, "max_position_embeddings") or CONTEXT
    try:
        tokens = min(longest, CONTEXT)
        cache = {"tokens": tokens, "bytes": cache_bytes(checkpoint.config, layout.family.holder, tokens)}
    except InputError:
        cache = None
    for plan in plans.values():
        check_plan(plan, layout, checkpoint, replaced=True)
    return Sizes(seen, {name: bytes_after(checkpoint, layout, plan) for name, plan in plans.items()}, cache)


def strip(values: Sequence[float | None], top: float | None = None) -> str:
    """A block a number, as high as it is."""
    high = max([value for value in values if value is not None], default=0.0) if top is None else top
    return "".join(
        "?" if v is None else BLOCKS[round(min(1.0, max(0.0, v / high)) * (len(BLOCKS) - 1)) if high else 0]
        for v in values
    )


def show_report(found: Mapping[str, Any]) -> None:
    """The essentials, in tables."""
    from moekern.report.page import figure, mean_of, number, percent

    model = found["model"]
    experts = " or ".join(map(str, model["experts"]))
    show(f"{model['name'] or model['family']}, fingerprint {model['fingerprint'][:12]}", ("what", "value"), [
        ("family", model["family"]),
        ("MoE layers, experts, top-k", f"{model['layers']}, {experts}, {model['top_k']}"),
        *((("size", sized(model["bytes"])),) if model["bytes"] else ()),
        *((f"after {name}", sized(after)) for name, after in model["after"].items()),
        *(((f"KV cache of {number(model['cache']['tokens'])} tokens", sized(model["cache"]["bytes"])),)
          if model["cache"] else ()),
        *((f"text: {each['name']}", f"{number(each['tokens'])} tokens") for run in found["runs"]
          for each in run["domains"]),
    ])  # fmt: skip
    if evaluation := found["evaluation"]:
        show("held-out loss, nats a token", ("plan", "loss", "KL to original", "same top-1"), [
            (row["name"], figure(row["nll"]), figure(row["kl"]), percent(row["top1"]["value"]))
            for row in evaluation["rows"]
        ])  # fmt: skip
    cuts = [curve for curve in found["curves"] if curve["cut"]]
    if cuts:
        show("what plans remove, means of layers", ("plan", "criterion", "experts", "saliency", "traffic"), [
            (c["name"], c["criterion"], *(percent(c["cut"][name]) for name in ("experts", "saliency", "tokens")))
            for c in cuts
        ])  # fmt: skip
    show("saliency removed when so many experts go", ("order", "25 %", "50 %", "75 %", "knee: experts", "0 to 100 %"), [
        (c["name"], *(percent(c["saliency"][len(c["saliency"]) * n // 4]) for n in (1, 2, 3)),
         percent(c["knee"]["experts"]) if c["knee"] else "-", strip(c["saliency"][::2], 1.0)) for c in found["curves"]
    ])  # fmt: skip
    show("rank correlation of scores, means of layers", ("order", "with tokens", "mean gate", "mean output norm"), [
        (name, *(number(mean_of([layer[what] for layer in layers])) for what in ("count", "gate", "norm")))
        for name, layers in found["follows"].items()
    ])  # fmt: skip
    show("layer by layer, a block a layer", ("what", "layers", "highest"), _strips(found))
    for line in found["warnings"]:
        say(f"warning: {line}")


def _strips(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    from moekern.report.page import number

    rows: dict[str, list[float | None]] = {}
    for name, layers in found["by_plan"].items():
        for what, told in (("saliency", "saliency removed"), ("spiking", "tail risk"), ("absorbed", "absorbed")):
            rows[f"{name}: {told}"] = [layer[what] for layer in layers]
    for name, stream in (found["evaluation"] or {"layers": {}})["layers"].items():
        for what, told in (("error", "relative error"), ("orphans", "orphans")):
            rows[f"{name}, evaluated: {told}"] = [each[what] for each in stream.values()]
    rows["router entropy, of ln E"] = [layer["router"]["entropy"] for layer in found["layers"]]
    rows["load, Gini"] = [layer["router"]["gini"] for layer in found["layers"]]
    rows["dead experts"] = [layer["router"]["dead"] for layer in found["layers"]]
    for name, layers in found["stability"].items():
        if layers:
            rows[f"{name}: halves keep alike"] = [layer["kept"] for layer in layers]
    return [
        (name, strip(row), number(max((v for v in row if v is not None), default=None))) for name, row in rows.items()
    ]
