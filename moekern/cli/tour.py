"""`moekern demo`: calibrate, score, plan, prune, verify, load and generate, what each criterion costs in loss, what
a refit and training bring."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console
from moekern.cli.before_after import pairs_document
from moekern.cli.pipeline import Verdict, evaluate_plans, measured, told_compute, verify_both
from moekern.cli.prune import prune_to
from moekern.cli.refitting import DROPPED, REFITTED, show_quality
from moekern.cli.verify import show_verdict
from moekern.cli.whole_recovery import changing_progress
from moekern.criteria import CRITERIA
from moekern.criteria.table import DEFAULT
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.evaluation.held_out import apart
from moekern.evaluation.losses import ORIGINAL, losses_document, mean_loss, mean_of
from moekern.files import check_new, scratch, sized
from moekern.model.compute import Compute
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.recovery import Recovery, Training, recover
from moekern.refit import Ridge
from moekern.refit.refit import Refitting, refit
from moekern.refit.variants import Variant
from moekern.statistics.file import Statistics

SHARES = (0.75, 0.5, 0.25)
CHOSEN = (DEFAULT, 0.5)  # the plan that is carried out
BASELINE = "random"
TIERS = ("dimensions",)
SHOWN = tuple(name for name, row in CRITERIA.items() if set(row.tiers) <= set(TIERS))  # one calibration serves them
LENGTH, BATCH = 128, 16
# On a CPU without bfloat16 units float32 is several times faster than the checkpoint's bfloat16.
COMPUTE = Compute(dtype="float32")
EVALUATION_TOKENS = 12288
REFIT_TOKENS = 24576
PROMPTS = ("The system administrator", "Der Administrator", "def __init__(self,")

Key = tuple[str, float, int]  # criterion, kept share, seed


def run_demo(out: Path | None, seeds: int) -> dict[str, Any]:
    """The whole tour. Artefacts go to the new folder `out`, or to a temporary one. Returns everything as JSON data.

    Raises InputError when `out` cannot be made or `seeds` is below 1.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected at least 1")
    if out is not None:
        check_new(out, folder=True)
    with ExitStack() as stack:
        if out is None:
            work = stack.enter_context(scratch(tempfile.gettempdir(), "demo"))
        else:
            out.mkdir(parents=True)
            work = out
        try:
            return _tour(work, seeds)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _tour(work: Path, seeds: int) -> dict[str, Any]:
    console.say(f"the model: {MODEL}")
    console.say(
        "it is calibrated, planned, evaluated, pruned and verified: three quarters of a minute on two idle cores"
    )
    checkpoint = open_checkpoint(MODEL)
    judged = _text("evaluation", EVALUATION_TOKENS).read(checkpoint)
    data, both = apart(_text("calibration", None).read(checkpoint), judged)
    compute = told_compute(COMPUTE, checkpoint, find_layout(checkpoint))
    statistics = measured(checkpoint, data, compute, tiers=TIERS, out=work / "statistics.safetensors")
    console.say(
        f"calibrated on {sum(statistics.header['tokens'].values())} tokens of {', '.join(statistics.domains)}, without "
        f"what is evaluated on too ({both} of the sequences: headers of licences)"
    )
    plans = make_plans(statistics, seeds)
    losses = _evaluate(plans)
    criterion, share = CHOSEN
    plan = plans[criterion, share, 0]
    plan.save(work / "plan.json")
    pruned = work / "pruned"
    report = prune_to(MODEL, plan, pruned)
    console.say(
        f"pruned to {report.experts_after} of {report.experts_before} experts by {CHOSEN[0]}: "
        f"{sized(report.bytes_in)} -> {sized(report.bytes_out)}"
    )
    verdict = verify_both(MODEL, plan, pruned, forward=True)
    if not console.as_json():
        show_verdict(verdict)
    texts = generate(pruned)
    for prompt, said in texts.items():
        console.say(f"generated: {prompt!r} -> {said!r}")
    rows = table_rows(losses, seeds)
    if not console.as_json():
        _show(rows)
        console.say(beating_random(rows))
        console.say(
            f"losses are of one calibration, on {EVALUATION_TOKENS:,} tokens: those of docs/comparison.md are means of "
            "several; --json has every criterion's by domain"
        )
    data, _ = apart(_text("calibration", REFIT_TOKENS).read(checkpoint), judged)
    fitted = _refit(plan, data, judged)
    if not console.as_json():
        show_quality(fitted)
        console.say(f"refitted: the {share:.0%} that stay, their down projections fitted to {REFIT_TOKENS:,} tokens")
    trained = _recover(pruned, data, judged, work / "training")
    before, after = ({"nll": mean_of(row, "nll"), "kl": mean_of(row, "kl")} for row in trained.judged)
    console.say(
        f"trained instead, experts towards the original's predictions of the same text ({trained.steps} steps): loss "
        f"{before['nll']:.4f} -> {after['nll']:.4f}, KL to original {before['kl']:.4f} -> {after['kl']:.4f}"
    )
    document = {**_document(rows, verdict, texts), "refit": losses_document(fitted.losses)}
    return {**document, **pairs_document({"recover": trained.judged})}


def make_plans(statistics: Statistics, seeds: int) -> dict[Key, Plan]:
    """A plan for every criterion and share; several seeds of the random one."""
    return {
        (name, share, seed): make_plan(statistics, name, share, seed=seed)
        for share in SHARES
        for name in SHOWN
        for seed in range(seeds if name == BASELINE else 1)
    }


def _evaluate(plans: Mapping[Key, Plan]) -> dict[Key | str, Mapping[str, float]]:
    text = _text("evaluation", EVALUATION_TOKENS)
    names = {str(key): key for key in plans}
    what = f"evaluating {len(plans)} plans in one pass"
    found = evaluate_plans(MODEL, text, COMPUTE, {str(key): plan for key, plan in plans.items()}, what)
    return {names.get(name, name): {domain: loss.nll for domain, loss in row.items()} for name, row in found.items()}


def _text(part: str, tokens: int | None) -> Text:
    return Text(text_sources(part), tokens=tokens, sequence_length=LENGTH, batch_size=BATCH)


def _refit(plan: Plan, data: TokenData, judged: TokenData) -> Refitting:
    """The plan that is carried out, with what stays fitted by least squares; nothing is written."""
    variants = Variant(DROPPED, plan), Variant(REFITTED, plan, ridge=Ridge())
    with console.progress("refitting") as step:
        return refit(open_checkpoint(MODEL), data, variants, COMPUTE, judged=judged, progress=step)


def _recover(pruned: Path, data: TokenData, judged: TokenData, folder: Path) -> Recovery:
    """The checkpoint that was written, with its experts trained; nothing of it is kept."""
    with changing_progress() as step:
        found = recover(pruned, MODEL, data, folder, Training(("experts",)), COMPUTE, judged=judged, progress=step)
    shutil.rmtree(folder)
    return found


def table_rows(losses: Mapping[Key | str, Mapping[str, float]], seeds: int) -> list[dict[str, Any]]:
    """Original first, then per share the criteria from the best mean loss to the worst; random is the mean of seeds."""
    rows = [_row(ORIGINAL, 1.0, [losses[ORIGINAL]])]
    for share in SHARES:
        some = [
            _row(name, share, [losses[name, share, seed] for seed in range(seeds if name == BASELINE else 1)])
            for name in SHOWN
        ]
        rows += sorted(some, key=lambda row: row["mean"])
    return rows


def _row(name: str, share: float, runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    means = [mean_loss(run) for run in runs]
    return {
        "criterion": name,
        "kept": share,
        "loss": {domain: sum(run[domain] for run in runs) / len(runs) for domain in runs[0]},
        "mean": sum(means) / len(means),
        "best": min(means),
        "worst": max(means),
        "seeds": len(runs),
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a criterion, from the best at the share that is carried out to the worst; and two rows by domain."""
    found = {(row["criterion"], row["kept"]): row for row in rows}
    name, share = CHOSEN
    order = sorted(SHOWN, key=lambda name: found[name, share]["mean"])
    shown = [("no expert dropped", *(f"{found[ORIGINAL, 1.0]['mean']:.3f}" for _ in SHARES))]
    for each in order:
        seeds = found[each, share]["seeds"]
        for kind in ("mean",) if seeds == 1 else ("best", "mean", "worst"):
            label = each if seeds == 1 else f"{each}, {kind} of {seeds} seeds"
            shown.append((label, *(f"{found[each, s][kind]:.3f}" for s in SHARES)))
    console.show("held-out loss, nats per token", ("criterion", *(f"{s:.0%} kept" for s in SHARES)), shown)
    before, after = found[ORIGINAL, 1.0]["loss"], found[name, share]["loss"]
    columns = ("text", "no expert dropped", f"{name}, {share:.0%} kept")
    console.show("by domain", columns, [(d, f"{before[d]:.3f}", f"{after[d]:.3f}") for d in before])


def beating_random(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which criteria are better than the best random seed at every share, and which are not."""
    best_random = {row["kept"]: row["best"] for row in rows if row["criterion"] == BASELINE}
    lost = {
        row["criterion"]
        for row in rows
        if row["criterion"] not in (BASELINE, ORIGINAL) and row["mean"] >= best_random[row["kept"]]
    }
    ahead = [name for name in SHOWN if name not in lost and name != BASELINE]
    behind = f"; not so: {', '.join(name for name in SHOWN if name in lost)}" if lost else ""
    return f"better than every random seed at every share: {', '.join(ahead)}{behind}"


def generate(folder: Path, new_tokens: int = 24) -> dict[str, str]:
    """Greedy continuations by transformers, loaded from `folder` as any user would; every key must match."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder}: transformers reports {wrong}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts[prompt] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _document(rows: list[dict[str, Any]], verdict: Verdict, texts: Mapping[str, str]) -> dict[str, Any]:
    return {"rows": rows, "verified": verdict.document(), "generated": dict(texts)}
