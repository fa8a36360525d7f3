"""What the planning commands do: plans from statistics, checks of checkpoints, conversions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moekern.errors import InputError
from moekern.plan.document import Plan


def check_destination(out: Path, plans: int) -> None:
    """Raise InputError when `out` cannot take so many plans: known before anything is measured."""
    if "{}" not in out.name and plans > 1 and out.suffix == ".json":
        raise InputError(f"--out {out}: {plans} plans need a folder, or a name with {{}} in it such as plan-{{}}.json")
    if plans == 1 and out.is_file():
        raise InputError(f"--out {out}: exists already")


def destinations(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name -> the file to write. One plan goes to `out`; several, or one where `out` is a folder, to NAME.json in it,
    or, where its name has {} in it, to the files with NAME in that place. Raises InputError for a file that exists."""
    if "{}" in out.name:
        paths = {name: out.with_name(out.name.replace("{}", name)) for name in names}
    elif len(names) > 1 or out.is_dir():
        paths = {name: out / f"{name}.json" for name in names}
    else:
        paths = {names[0]: out}
    for path in paths.values():
        if path.exists() or (path.parent.exists() and not path.parent.is_dir()):
            raise InputError(f"--out {path if path.exists() else path.parent}: exists already")
    return paths


def save_plans(plans: Mapping[str, Plan], paths: Mapping[str, Path]) -> None:
    """Write every plan; a folder for several is made where its parent is there."""
    for name, plan in plans.items():
        folder = paths[name].parent
        if len(plans) > 1 and folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
        plan.save(paths[name])
