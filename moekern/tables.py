"""Results as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moekern.console import say, show, size

if TYPE_CHECKING:
    from moekern.estimation.overview import Overview
    from moekern.evaluation.losses import Evaluation
    from moekern.pruning.prune import PruneReport
    from moekern.stages import Run, Verdict
    from moekern.statistics.file import Statistics


def criteria(rows: Sequence[Mapping[str, str]]) -> None:
    """Name, meaning and paper of every criterion."""
    show("criteria", tuple(rows[0]), [tuple(row.values()) for row in rows])


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "".join(f"| {line.replace('|w|', 'abs w')} |\n" for line in lines)


def overview(found: Overview) -> None:
    """The checkpoint's experts and what pruning would leave."""
    layers = found.moe_layers
    groups = f"{found.n_group} (top {found.topk_group})" if found.n_group > 1 else "none"
    show(
        f"{found.folder}",
        ("what", "value"),
        (
            ("family", found.family),
            ("MoE layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
            ("experts a layer, top-k", f"{found.num_experts}, {found.top_k}"),
            ("router", f"{found.score}, groups: {groups}"),
            ("MTP layers with experts", ", ".join(found.mtp_layers) or "none"),
            ("files, tensors", f"{found.shards}, {found.tensors}"),
            ("size", size(found.total_bytes)),
            ("routed experts", f"{size(found.routed_bytes)} ({found.routed_bytes / max(1, found.total_bytes):.1%})"),
            ("their types", ", ".join(f"{name} {size(n)}" for name, n in found.dtypes.items())),
            ("one expert of one layer", size(found.bytes_per_expert)),
            ("transformers can run it", "yes" if found.in_transformers else "no: it can be pruned, not calibrated"),
            *((("note", found.note),) if found.note else ()),
        ),
    )
    shares = [n for n in found.legal_counts if n * 8 % found.num_experts == 0]
    show(
        "kept experts a layer (any legal count works; eighths shown)",
        ("kept", "share", "size"),
        [(n, f"{n / found.num_experts:.1%}", size(found.bytes_at(n))) for n in shares],
    )


def statistics(measured: Statistics, out: Path) -> None:
    """Tokens per domain and how evenly they reach the experts."""
    rows = []
    for key in measured.layers:
        s = measured.layer(key)
        counts = s.count.double()
        idle = int((counts == 0).sum())
        mean_norm = float(s.norm_sum.sum() / counts.sum().clamp(min=1))
        rows.append((key, s.num_experts, idle, int(counts.min()), int(counts.max()), f"{mean_norm:.4g}"))
    tokens: Mapping[str, int] = measured.header["tokens"]
    say("tokens: " + ", ".join(f"{name} {n}" for name, n in tokens.items()))
    show(str(out), ("layer", "experts", "idle", "fewest tokens", "most tokens", "mean output norm"), rows)


def scores(criterion: str, layers: Mapping[str, Sequence[float]]) -> None:
    """Per layer, experts from the best to the worst."""
    rows = []
    for key, values in layers.items():
        order = sorted(range(len(values)), key=lambda e: (-values[e], e))
        listed = [f"{e}:{values[e]:.3g}" for e in order]
        short = listed if len(listed) <= 16 else [*listed[:8], "...", *listed[-8:]]
        rows.append((key, " ".join(short)))
    show(f"{criterion}, best first (expert:score)", ("layer", "experts"), rows)


def pruned(report: PruneReport) -> None:
    """What was written."""
    if not report.finished:
        say(f"this part is written; {report.waiting} shards are left to other parts, the last of which finishes")
        return
    show(
        f"{report.out}",
        ("what", "before", "after"),
        (
            ("experts a layer", report.experts_before, report.experts_after),
            ("bytes", size(report.bytes_in), size(report.bytes_out)),
            ("tensors", report.tensors_in, report.tensors_out),
            ("files", report.shards_in, report.shards_out),
        ),
    )
    ways = (("copied", report.copied), ("shared with the source", report.cloned), ("holes", report.holes),
            ("written by an earlier run", report.reused))  # fmt: skip
    rate = f", {size((report.bytes_out - report.reused) / max(report.seconds, 1e-9))}/s"
    say(
        "; ".join(f"{size(n)} {what}" for what, n in ways if n)
        + f" in {report.seconds:.1f} s{rate} (--copy {report.copy})"
    )
    say(report.mtp)


def say_verdict(found: Verdict) -> None:
    """Problems, or what was compared."""
    for problem in found.report.problems:
        say(f"wrong: {problem}")
    if not found.report.problems:
        say(f"bytes: {found.report.tensors_compared} tensors, {size(found.report.bytes_compared)} equal")
    if found.forward is not None:
        f = found.forward
        say(
            f"logits ({f.dtype}, {f.tokens} tokens): largest difference {f.max_difference:.3g} at a standard deviation "
            f"of {f.logit_std:.3g}, same top-1 for {f.top1_agreement:.2%}: {'equal' if f.equal else 'NOT equal'} "
            "to the masked original"
        )
    say("verified" if found.good else "NOT verified: do not use this checkpoint")


def losses(table: Evaluation) -> None:
    """Loss per domain, a row a plan."""
    from moekern.evaluation.losses import mean_loss

    domains = list(next(iter(table.values())))
    rows = [
        (
            name,
            *(f"{row[d].nll:.4f}" for d in domains),
            f"{mean_loss({d: row[d].nll for d in domains}):.4f}",
            f"{mean_loss({d: row[d].kl for d in domains}):.4f}",
            f"{mean_loss({d: row[d].top1 for d in domains}):.1%}",
        )
        for name, row in table.items()
    ]
    show("held-out loss, nats per token", ("plan", *domains, "mean", "KL to original", "same top-1"), rows)


def run(done: Run) -> None:
    """The last two stages' results; the artefacts' places."""
    pruned(done.pruned)
    say_verdict(done.verdict)
    say(f"statistics: {done.statistics}; plan: {done.plan}")
