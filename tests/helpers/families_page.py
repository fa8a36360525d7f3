"""docs/families.md, made of the table of families and of what tests do: python -m tests.helpers.families_page"""

from __future__ import annotations

from moekern.architectures import FAMILIES, Family, built_by_transformers, family_named
from moekern.architectures.quantisation import METHODS
from moekern.model.expert_lists import NO_GRADIENT
from tests.helpers import ROOT, families
from tests.helpers.hub_names import HUB_FILES, experts_of, forms
from tests.helpers.published import PUBLISHED

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Families

What moekern does with each family of models. `python -m tests.helpers.families_page` writes this page from the table
of families (`moekern/architectures/table.py`) and the models and layouts of the tests; a test fails where it is stale.

- **pruned**: every tensor that belongs to one expert, or holds a row or a number for each, goes with its expert; all
  others are copied byte for byte, and `verify` reads both again.
- **quantised sources**: forms of the experts in which the tests find each companion (scales, zero points, packed
  shapes) with its expert, so that they are pruned as they are. A model is run from them, dequantised, where config.json
  names the method METHODS or one of modelopt's.
- **run**: calibrated, evaluated, `iterate`, `verify --forward`. *transformers*: transformers 5.23 builds the model.
  *own code*: where the checkpoint brings its model's code (`auto_map` of config.json), with `--trust-remote-code`;
  nothing of a checkpoint is executed without it. Blocks that keep their experts in a list, one module each, are
  measured while their own code calls them, or refused by name where that is not a sum of gates x outputs.
- **gradient**: the tier `gradient` and its criteria.
- **tests**: *whole model*: pruned, streamed and measured like a tiny model of transformers in memory. *published
  names*: layout and bytes, from the names of published checkpoints.

A checkpoint is understood from the names of its tensors; a new model_type with the tensors of a known family is pruned
like it. `moekern inspect MODEL` says what runs it.

"""
COLUMNS = ("family", "pruned", "run", "gradient", "quantised sources", "tests")


def page() -> str:
    """The whole text."""
    lines = [HEAD.replace("METHODS", ", ".join(METHODS)) + _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += (_line(_cells(row)) for row in sorted(FAMILIES, key=lambda row: row.name))
    return "\n".join(lines) + "\n"


def _cells(row: Family) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (row.name, *row.also))
    if row.refused:
        return names, f"no: {row.refused}", "no", "no", "", _tests(row)
    note = f"; {row.note}" if row.note else ""
    others = ", ".join(f"`{name}`" for name in (row.name, *row.also) if not built_by_transformers(name))
    run = "own code" if not row.transformers else f"transformers; {others}: own code" if others else "transformers"
    gradient = f"no: {row.no_gradient}" if row.no_gradient else "yes" if row.transformers else f"no: {NO_GRADIENT}"
    if row.only_pruned:
        run, gradient = f"no: {row.only_pruned}", "no"
    return names, f"yes{note}", run, gradient, _quantised(row), _tests(row)


def _quantised(row: Family) -> str:
    """The forms of test_quantised_experts_of_every_family."""
    return ", ".join(form for form in forms(experts_of(row)) if form not in ("plain", "weight"))


def _tests(row: Family) -> str:
    whole = any(family_named(name.split("-")[0]) is row for name in families.NAMES.split())
    hub = row.name in PUBLISHED or any(hub[0] == row.name for hub in HUB_FILES)
    return ", ".join(["whole model"] * whole + ["published names"] * hub)


def _line(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


if __name__ == "__main__":
    PAGE.write_text(page())
