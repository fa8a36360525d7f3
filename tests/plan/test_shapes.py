"""Shapes of the same bytes."""

import pytest

from moekern.errors import InputError
from moekern.plan.shapes import Shape, candidates, parse_shape
from moekern.router import Router

EIGHTS = range(8, 4096, 8)


def test_a_shape_is_a_number_of_experts_and_of_channels() -> None:
    assert parse_shape("21x48") == Shape(21, 48)
    assert str(Shape(21, 48)) == "21x48"
    assert parse_shape("auto") is None
    for text in ("21", "x48", "0x8", "21x048", "21 x 48", "2x3x4", "Auto", "1000000x8"):
        with pytest.raises(InputError, match="--shape .*expected auto, or experts x channels such as 64x512"):
            parse_shape(text)


@pytest.mark.parametrize(
    ("router", "width", "share", "wanted"),
    [
        (Router(32, 4), 64, 0.5, ["16x64", "18x56", "21x48", "25x40", "32x32"]),
        (Router(32, 4, 4, 2, 2), 64, 0.5, ["16x56", "16x64", "20x48", "24x40", "32x32"]),  # as many of each group
        (Router(8, 6), 64, 0.5, ["6x40", "8x32"]),  # fewer than six serve no token
        (Router(4, 2), 12, 1.0, ["4x8", "4x12"]),
    ],
)
def test_shapes_hold_the_share_at_most_and_are_what_the_router_works_with(
    router: Router, width: int, share: float, wanted: list[str]
) -> None:
    found = candidates(router, width, share, [*EIGHTS, width])
    assert [str(shape) for shape in found] == wanted
    assert [s for s in candidates(router, width, share, EIGHTS) if s.width != width] == [
        s for s in found if s.width != width
    ]
    for shape in found:
        assert shape.experts * shape.width <= share * router.num_experts * width
