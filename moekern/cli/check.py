"""The command `check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekern.cli.console import say, show
from moekern.cli.given import headers_of, result
from moekern.cli.options import HeadersOf, Json, Revision, Targets

if TYPE_CHECKING:
    from moekern.plan.served import Report


def check(
    model: HeadersOf,
    target: Targets = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Which engines load and run a checkpoint with its expert counts; exit code 1 if one named by --target does not."""
    from moekern.plan.served import check_folder
    from moekern.plan.targets import parse_target

    targets = [parse_target(text) for text in target or ()]
    report = check_folder(headers_of(model, revision), targets)
    result(report.document(), lambda: show_report(report), good=report.good or not targets)


def show_report(found: Report) -> None:
    """Targets, and the rules that are broken."""
    from moekern.plan.served import verdict

    low, high = min(found.counts.values()), max(found.counts.values())
    experts = f"{low}" if low == high else f"{low} to {high}"
    rows = []
    for name, findings in found.found.items():
        runs = verdict(findings)
        word = {False: "no", None: "not known", True: "yes, but" if findings else "yes"}[runs]
        texts = [finding.text for finding in findings if finding.stops or runs is not False]
        rows.append((name, word, "; ".join(texts) + found.nearest.get(name, "")))
    show(f"{found.model}: {found.family}, {experts} experts a layer", ("target", "runs", "because"), rows)
    if low != high and not found.replaced:
        say("layers hold different numbers of experts: no engine loads this; moekern verifies and evaluates it")
