"""The text that chose the experts: domains, tokens, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from moekern.plan.document import Plan
from moekern.publishing.markdown import code, plain, table

ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(\[[^\]]*\])?(\([^)]*\))?", re.ASCII)
MOST = 100  # domains that are listed


def text_section(plan: Plan, header: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Markdown, and the data sets of the hub among the sources. header: that of the statistics; None: what the plan
    says of them."""
    if header is None:
        return _known(_tokens(plan), {}, plan), []
    sources: dict[str, str] = {}
    for run in header["runs"]:
        data = run.get("data")
        found = data.get("sources") if isinstance(data, Mapping) else None
        for name, each in found.items() if isinstance(found, Mapping) else ():
            if isinstance(each, Mapping) and isinstance(each.get("path"), str):
                sources.setdefault(str(name), each["path"])
    datasets = [found[1] for path in sources.values() if (found := ON_HUB.fullmatch(path)) and (found[2] or found[3])]
    return _known(header["tokens"], sources, plan), sorted(set(datasets))


def _tokens(plan: Plan) -> Mapping[str, Any]:
    found = plan.provenance.get("tokens")
    return found if isinstance(found, Mapping) else {}


def _known(tokens: Mapping[str, Any], sources: Mapping[str, str], plan: Plan) -> str:
    counted = plan.provenance.get("domains")
    names = [each for each in tokens if not isinstance(counted, list) or each in counted]
    if not names:
        return "The plan does not tell.\n"
    if not any(tokens[name] for name in names):
        return "None: the experts were chosen by their weights alone.\n"
    rows = []
    for name in names[:MOST]:
        count = tokens[name]
        cells = [plain(name), f"{count:,}" if type(count) is int else code(count)]
        rows.append([*cells, code(_shown(sources.get(name, "")))] if sources else cells)
    more = f"\nand {len(names) - MOST} domains more.\n" if len(names) > MOST else ""
    made_of = plan.provenance.get("statistics")
    digest = f"\nsha256 of the statistics: {code(made_of)}.\n" if isinstance(made_of, str) else ""
    return table(("domain", "tokens", *(("source",) if sources else ())), rows) + more + digest


def _shown(path: str) -> str:
    """A data set of the hub as it is; of a file its name alone: where it lay is nobody's business."""
    found = ON_HUB.fullmatch(path)
    return path if found and (found[2] or found[3]) else PurePath(path).name
