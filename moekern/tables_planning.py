"""Plans, comparisons and checks as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moekern.console import say, show, size

if TYPE_CHECKING:
    from moekern.plan.compare import Comparison
    from moekern.plan.document import Plan
    from moekern.plan.served import Report


def plans(made: Mapping[str, Plan], paths: Mapping[str, Path]) -> None:
    """One plan: its kept experts per layer. Several: a line each."""
    if len(made) > 1:
        several = [(paths[name], p.provenance["criterion"], _kept(p), p.digest[:12]) for name, p in made.items()]
        show("plans", ("file", "criterion", "kept", "digest"), several)
        return
    (name, plan), rows = next(iter(made.items())), []
    for key, layer in plan.layers.items():
        keep = " ".join(map(str, layer.keep))
        rows.append((key, len(layer.keep), keep if len(keep) <= 100 else keep[:97] + "..."))
    provenance = plan.provenance
    title = f"{paths[name]}: {provenance['criterion']}, {_kept(plan)} of {provenance['num_experts']} experts"
    show(title, ("layer", "kept", "experts"), rows)
    fit = provenance.get("fit")
    if fit:
        cache = f", KV cache {size(fit['cache'])}" if fit["context"] else "; no KV cache is counted without --context"
        say(f"weights {size(fit['weights'])}{cache}; limit {size(fit['limit'])}")
    if isinstance(provenance["kept"], dict):
        say("layers keep different numbers: moekern writes, verifies and evaluates this; no engine loads it")


def comparison(found: Comparison) -> None:
    """Agreement of every pair; what each plan drops."""
    if found.pairs:
        rows = [
            (pair.first, pair.second, f"{pair.jaccard:.3f}", f"{pair.layers[pair.lowest]:.3f} (layer {pair.lowest})")
            for pair in found.pairs
        ]
        show("kept by both / kept by either", ("plan", "and", "mean of layers", "lowest"), rows)
    if found.dropped:
        domains = list(next(iter(found.dropped.values())).domains)
        shares = [
            (name, f"{row.gates:.2%}", f"{row.outputs:.2%}", f"{row.worst[1]:.2%} (layer {row.worst[0]})",
             *(f"{row.domains[domain]:.2%}" for domain in domains))
            for name, row in found.dropped.items()
        ]  # fmt: skip
        show("dropped share, mean of layers", ("plan", "gates", "gate x norm", "worst layer", *domains), shares)


def report(found: Report) -> None:
    """Targets, and the rules that are broken."""
    low, high = min(found.counts.values()), max(found.counts.values())
    experts = f"{low}" if low == high else f"{low} to {high}"
    rows = []
    for name, findings in found.found.items():
        stops = [finding.text for finding in findings if finding.stops]
        verdict = "no" if stops else "yes, but" if findings else "yes"
        texts = stops or [finding.text for finding in findings]
        rows.append((name, verdict, "; ".join(texts) + found.nearest.get(name, "")))
    show(f"{found.folder}: {found.family}, {experts} experts a layer", ("target", "runs", "because"), rows)
    if low != high:
        say("layers hold different numbers of experts: no engine loads this; moekern verifies and evaluates it")


def _kept(plan: Plan) -> str:
    counts = [len(layer.keep) for layer in plan.layers.values()]
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}, {sum(counts)} in all"
