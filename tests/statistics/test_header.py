"""The header of statistics: its bytes are a format, and everyone who measures a model says the same of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.measurement.weights import weigh
from moekern.router import Router
from moekern.statistics.file import Statistics
from moekern.statistics.header import HEADER_KEY, IDENTITY, Source, header_problem, make_header, router_of
from tests.helpers.measured import layer_statistics

DEEPSEEK = Source("f" * 64, "deepseek_v3", "sigmoid", Router(8, 2, 2, 1, 2))
BYTES = (
    '{"domains": ["prose", "code"], "family": "deepseek_v3", "fingerprint": "' + "f" * 64 + '", '
    '"format": "moekern.statistics/3", "group_top": 2, "n_group": 2, "num_experts": 8, '
    '"runs": [{"backend": {"router_stats": "native"}, "data": "caf\u00e9", "dtype": "float32", '
    '"versions": {"torch": "2"}}], "score": "sigmoid", "tokens": {"code": 3, "prose": 40}, "top_k": 2, "topk_group": 1}'
)


def test_the_bytes_of_a_header(tmp_path: Path) -> None:
    """Written out by hand: files that exist are compared and merged by these keys and values."""
    header = make_header(
        DEEPSEEK,
        tokens={"prose": 40, "code": 3},
        data="caf\u00e9",
        backend={"router_stats": "native"},
        versions={"torch": "2"},
        dtype="float32",
    )
    Statistics(header, {"0": {"prose": layer_statistics(0, experts=8)}}).save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {HEADER_KEY: BYTES}
    assert header_problem(header) is None
    assert Statistics.load(tmp_path / "s").header == header


def test_a_run_without_dtype_says_so() -> None:
    header = make_header(DEEPSEEK, tokens={"a": 0}, data=None, backend=None, versions={})
    assert header["runs"] == [{"data": None, "backend": None, "versions": {}, "dtype": None}]
    assert header["domains"] == ["a"]


def test_a_run_on_a_model_of_the_hub_names_its_commit() -> None:
    header = make_header(DEEPSEEK, tokens={"a": 0}, data=None, backend=None, versions={}, model="a/b@c0ffee")
    assert header["runs"][0]["model"] == "a/b@c0ffee"


@pytest.mark.parametrize("router", [DEEPSEEK.router, Router(6, 2), Router(8, 2, group_top=0)])
def test_a_header_gives_its_router_back(router: Router) -> None:
    header = make_header(replace(DEEPSEEK, router=router), tokens={"a": 0}, data=None, backend=None, versions={})
    assert router_of(header) == router
    assert header_problem(header) is None


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_source_is_what_the_checkpoint_says(name: str, family_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(family_checkpoint(name))
    layout = find_layout(checkpoint)
    source, header = Source.of(checkpoint, layout), weigh(checkpoint, costly=False).header
    assert source == Source(checkpoint.fingerprint, name, layout.family.score, layout.router)
    assert source == Source(header["fingerprint"], header["family"], header["score"], router_of(header))
    assert set(IDENTITY) <= set(header)
