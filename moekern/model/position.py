"""How far a run is, as JSON, and the key that tells runs apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekern.data.batches import TokenData
from moekern.kernels.checks import short
from moekern.model.stepwise import Beside

# Names of the files in a folder that says how far a run is.
OWN = re.compile(r"position\.json|\.position\.json\.moekern\.tmp|(states|lasting|seen)-[0-9]{1,9}\.[0-9]{1,9}")
SHOWN = 24  # characters of a value that is shown in words


@dataclass(frozen=True)
class Position:
    """Decoder layers 0 to `layer` - 1 of the `of` ones of a stage are done, or what else `unit` says."""

    stage: str
    layer: int
    of: int
    kept: Any  # what the stage must know beside states
    returns: Mapping[int, Beside]  # what layers that have run return
    files: tuple[str, ...]
    unit: str = "layer"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        named = {i: None if each is None else [_named(item) for item in each] for i, each in self.returns.items()}
        return {**vars(self), "returns": named}

    @staticmethod
    def of_document(found: dict[str, Any]) -> Position:
        """Raises one of what `undamaged` knows for JSON that is none."""
        returns = {int(i): None if each is None else [_typed(e) for e in each] for i, each in found["returns"].items()}
        position = Position(**{**found, "returns": returns, "files": tuple(found["files"])})
        sound = all(type(n) is int for n in (position.layer, position.of)) and 0 < position.layer <= position.of
        if not sound or type(position.unit) is not str or not all(OWN.fullmatch(name) for name in position.files):
            raise ValueError("a position that cannot be")
        return position

    @property
    def complete(self) -> bool:
        """The stage is done."""
        return self.layer >= self.of

    @property
    def described(self) -> str:
        """For people, as what follows "goes on"."""
        where = "behind the last" if self.complete else f"at {self.unit} {self.layer + 1}"
        return f"{where} of {self.of} ({self.stage})"


def digest(key: Mapping[str, Any]) -> str:
    """Hex sha256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def text_key(data: TokenData) -> dict[str, Any]:
    """What tells texts apart: their recipe, and the token ids themselves, batch by batch."""
    found = hashlib.sha256()
    for batch in data.batches:
        found.update(f"{batch.domain} {tuple(batch.input_ids.shape)}\n".encode())
        found.update(batch.input_ids.contiguous().numpy().tobytes())
        if batch.answers is not None:
            found.update(batch.answers.contiguous().numpy().tobytes())
    return {"recipe": data.recipe, "ids": found.hexdigest()}


def differences(then: Any, now: Any) -> str:
    """Which entries of two keys differ, in words; of short values, how. Empty where none does.

    Raises ValueError for what is no key.
    """
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        raise ValueError("a key that is none")
    found = []
    for name in dict.fromkeys((*now, *then)):
        one, two = then.get(name), now.get(name)
        if one == two:
            continue
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found.append(f"{name} ({differences(one, two)})")
        elif all(len(str(value)) <= SHOWN and not isinstance(value, Mapping | list) for value in (one, two)):
            then_now = ("none" if value in (None, "") else value for value in (one, two))
            found.append("{} ({} then, {} now)".format(name, *then_now))
        else:
            found.append(str(name))
    return ", ".join(found)


def _named(item: tuple[torch.dtype, int] | None) -> tuple[str, int] | None:
    return None if item is None else (short(item[0]), item[1])


def _typed(item: Sequence[Any] | None) -> tuple[torch.dtype, int] | None:
    if item is None:
        return None
    dtype, ndim = getattr(torch, item[0]), int(item[1])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{item[0]} is no type")
    return dtype, ndim
