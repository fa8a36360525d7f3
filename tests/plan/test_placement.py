"""Orders by co-activation, and what serving tools are told of routing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moekern.errors import InputError
from moekern.plan.placement import order, pairs, placed
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.commands import moekern as command
from tests.helpers.measured import model_statistics


def layer(chosen: list[list[int]], E: int = 8) -> LayerStatistics:
    """Tokens that chose these experts."""
    s = LayerStatistics.zeros(E)
    for ids in chosen:
        s.tokens.add_(1)
        for i in ids:
            s.count[i] += 1
            for j in ids:
                s.coactivation[i, j] += 1
    return s


def test_experts_that_are_chosen_together_lie_side_by_side() -> None:
    """Planted pairs 0-5, 2-7 and 1-6 in noise that joins everything a little; 3 with 4 in nothing."""
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randperm(7, generator=draw)[:2].tolist() for _ in range(40)]
    s = layer([[0, 5]] * 50 + [[2, 7]] * 40 + [[1, 6]] * 30 + noise)
    found = order(s)
    assert sorted(found) == list(range(8))
    for a, b in ((0, 5), (2, 7), (1, 6)):
        assert abs(found.index(a) - found.index(b)) == 1
    assert order(s) == found


def test_a_chain_and_what_stands_alone() -> None:
    chain = [3, 1, 4, 0]
    s = layer([pair for n, pair in enumerate(map(list, pairwise(chain))) for _ in range(9 - n)] + [[5]] * 30 + [[2]])
    assert order(s) == [3, 1, 4, 0, 5, 2, 6, 7]  # the busiest chain, its busier end, first; idle ones last, by number
    assert order(LayerStatistics.zeros(4)) == [0, 1, 2, 3]


def test_an_order_goes_with_the_experts_names() -> None:
    s = next(iter(model_statistics().layers["0"].values()))
    s.count.copy_(torch.tensor([9, 4, 11, 7, 0, 5]))
    perm = torch.tensor([3, 5, 0, 1, 4, 2])
    s.coactivation.copy_(torch.arange(36).view(6, 6) + torch.arange(36).view(6, 6).T)
    assert [int(perm[e]) for e in order(s.permuted(perm))] == order(s)


def test_pairs_that_meet_more_often_than_by_chance() -> None:
    s = layer([[0, 1]] * 6 + [[2, 3]] * 4 + [[0, 4], [1, 4]] * 5 + [[5]] * 10)
    want = [(i, j, n, lift) for i, j, n, lift in ((0, 1, 6, 6 * 30 / 121), (0, 4, 5, 150 / 110), (1, 4, 5, 150 / 110))]
    assert pairs(s) == [(i, j, n, round(lift, 2)) for i, j, n, lift in want if lift >= 1.5]
    often = layer([[0, 1]] * 6 + [[5]] * 30)
    assert pairs(often) == [(0, 1, 6, 6.0)]


def test_what_tools_read() -> None:
    s = model_statistics(layers=("0", "1", "2"))
    usage = [tuple(map(int, line.split())) for line in placed(s, "coli_usage").splitlines()]
    counts = {key: s.layer(key).count.tolist() for key in s.layers}
    assert usage == [(int(key), e, n) for key, row in counts.items() for e, n in enumerate(row) if n]
    perms = json.loads(placed(s, "mbolt"))
    assert (perms["n_layers"], perms["n_expert"], perms["n_tokens"]) == (3, 6, 80)
    for key, found in zip(counts, perms["layers"], strict=True):
        assert found["layer"] == int(key)
        assert found["heat"] == counts[key]
        assert found["chain_perm"] == order(s.layer(key))
        assert [counts[key][e] for e in found["heat_perm"]] == sorted(counts[key], reverse=True)
    own = json.loads(placed(s, "order"))
    assert own["format"] == "moekern.order/1"
    assert own["layers"] == {key: order(s.layer(key)) for key in counts}
    assert own["provenance"]["fingerprint"] == s.header["fingerprint"]


@pytest.mark.parametrize(
    ("tool", "layers", "error"),
    [
        ("mbolt", ("1", "2"), "--to mbolt: its file has an entry for each decoder layer from 0 on"),
        ("coli_usage", ("0", "mtp.0"), "--to coli_usage: layer mtp.0: "),
    ],
)
def test_layers_that_a_tool_has_no_place_for(tool: str, layers: tuple[str, ...], error: str) -> None:
    with pytest.raises(InputError, match=error):
        placed(model_statistics(layers=layers), tool)


def test_counts_that_a_tool_cannot_hold() -> None:
    s = model_statistics(layers=("0",), domains=("a",))
    wide = replace(s.layers["0"]["a"], count=torch.full((6,), 2**32))
    with pytest.raises(InputError, match="4294967296 tokens of expert 0 are more than it holds"):
        placed(Statistics(s.header, {"0": {"a": wide}}), "coli_usage")


def test_the_command(tmp_path: Path) -> None:
    source, out = tmp_path / "s.safetensors", tmp_path / "out"
    statistics = model_statistics(layers=("0", "1"))
    statistics.save(source)
    for tool in ("order", "coli_usage", "mbolt"):
        assert command("convert", source, "--to", tool, "--out", out / tool).returncode == 0
        assert (out / tool).read_text() == placed(Statistics.load(source), tool)
    failed = command("convert", source, "--to", "mbolt", "--out", tmp_path / "x", "--model", tmp_path)
    assert failed.returncode == 2
    assert "--to mbolt: statistics say all that it holds: leave out --model" in failed.stderr
    failed = command("convert", source, "--to", "moekern", "--out", tmp_path / "x")
    assert failed.returncode == 2
