"""Which rows of the table explain a checkpoint's keys. Keys that differ in numbers only are looked at once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moekern.architectures.patterns import EXPERT_WORD, LAYER, MTP, SIDE, shape_of
from moekern.architectures.table import Family

Role = Literal["expert", "router", "bias", "table"]


@dataclass(frozen=True, slots=True)
class Place:
    """Keys of one shape, such as "model.layers.#.mlp.experts.#.w1.weight"."""

    shape: str
    names: tuple[str, ...]
    stack: str = ""  # "model.layers", or "" outside the layers
    rest: str = ""  # what follows the layer's number and any wrapper
    layer_part: int = 0  # which of the key's dotted parts is the layer's number
    rest_part: int = 0
    layers: frozenset[int] = frozenset()

    @property
    def beside(self) -> bool:
        return SIDE.search(self.stack or self.shape) is not None

    @property
    def mtp(self) -> bool:
        return MTP.search(self.shape.removesuffix(self.rest)) is not None


@dataclass(frozen=True, slots=True)
class Found:
    """Keys of one shape that a family explains. For experts: block, head and projection as in the family's schemes."""

    place: Place
    role: Role
    block: str = ""
    head: str = ""
    projection: str = ""
    expert_part: int = 0  # which of the key's dotted parts is the expert's number, if the head has one


@dataclass(frozen=True)
class Fit:
    family: Family
    found: tuple[Found, ...]
    unknown: tuple[Place, ...]  # look like part of the expert machinery, but the family does not explain them

    @property
    def complete(self) -> bool:
        roles = {item.role for item in self.found}
        return not self.unknown and {"expert", "router"} <= roles


def find_places(names: Iterable[str]) -> tuple[Place, ...]:
    """Keys grouped by shape, without those of side stacks (vision, audio, talker)."""
    shapes: dict[str, list[str]] = {}
    for name in names:
        shapes.setdefault(shape_of(name), []).append(name)
    places = (parse(shape, tuple(found)) for shape, found in shapes.items())
    return tuple(place for place in places if not place.beside)


def parse(shape: str, names: tuple[str, ...]) -> Place:
    match = LAYER.fullmatch(shape)
    if match is None:
        return Place(shape, names)
    stack = match["stack"] + match["container"]
    layer_part = stack.count(".") + 1
    rest_part = layer_part + 1 + (match["inner"] or "").count(".")
    layers = frozenset(int(name.split(".", layer_part + 1)[layer_part]) for name in names)
    return Place(shape, names, stack, match["rest"], layer_part, rest_part, layers)


def number_part(place: Place) -> int:
    """The first dotted part behind the layer that is a number, 0 if there is none."""
    parts = place.shape.split(".")
    return next((i for i in range(place.rest_part, len(parts)) if "#" in parts[i]), 0)


def fit(family: Family, places: Iterable[Place]) -> Fit:
    patterns = family.patterns
    others: tuple[tuple[Role, re.Pattern[str] | None], ...] = (
        ("router", patterns.router),
        ("bias", patterns.bias),
        ("table", patterns.table),
    )
    found: list[Found] = []
    suspects: list[Place] = []
    for place in places:
        match = patterns.expert.fullmatch(place.rest)
        role = next((role for role, pattern in others if pattern and pattern.fullmatch(place.rest)), None)
        if match:
            head, _, projection = match["expert"].rpartition(".")
            found.append(
                Found(place, "expert", match["block"] or "", head and f"{head}.", projection, number_part(place))
            )
        elif role:
            found.append(Found(place, role))
        elif patterns.leave and patterns.leave.fullmatch(place.rest):
            continue
        elif patterns.suspect.search(place.rest or place.shape):
            suspects.append(place)
    layers = {(item.place.stack, n) for item in found if item.role == "expert" for n in item.place.layers}
    unknown = (
        place
        for place in suspects
        if not place.stack or EXPERT_WORD.search(place.rest) or any((place.stack, n) in layers for n in place.layers)
    )
    return Fit(family, tuple(found), tuple(unknown))
