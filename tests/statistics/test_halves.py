"""What is kept of each half of the text: it merges half by half, and says where it is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.errors import InputError
from moekern.statistics.file import Statistics, merge
from moekern.statistics.halves import NotKept, halves_of
from moekern.statistics.layer import HALVED, LayerStatistics
from tests.helpers.measured import E, assert_same, header, layer_statistics, with_halves


def _held(*seeds: int, halves: bool = True) -> Statistics:
    """One layer and a domain for each seed: domain d has the sums of seed d, and of seed d + 50 in its other half."""
    parts = {f"d{s % 10}": with_halves(layer_statistics(s), layer_statistics(s + 50)) for s in seeds}
    if not halves:
        parts = {d: replace(s, **{f"half_{n}": getattr(s, f"half_{n}")[:0] for n in HALVED}) for d, s in parts.items()}
    return Statistics(header(list(parts), data={"seeds": seeds, "known": halves}), {"0": parts})


def _assert_halves(sums: LayerStatistics, even: LayerStatistics, odd: LayerStatistics) -> None:
    for name in HALVED:
        assert torch.equal(getattr(sums, f"half_{name}"), torch.stack([getattr(even, name), getattr(odd, name)])), name


def test_files_are_merged_half_by_half(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, seed in zip(paths, (1, 11), strict=True):
        _held(seed).save(path)
    merged = merge([Statistics.load(path) for path in paths])
    even, odd = layer_statistics(1) + layer_statistics(11), layer_statistics(51) + layer_statistics(61)
    _assert_halves(merged.layer("0"), even, odd)
    merged.save(tmp_path / "both")
    assert_same(Statistics.load(tmp_path / "both").layer("0"), merged.layer("0"))


@pytest.mark.parametrize("known_first", [True, False])
def test_halves_that_one_file_does_not_know_are_not_known_of_both(tmp_path: Path, known_first: bool) -> None:
    """Of the domain that both have measured; of the other it stays known."""
    parts = [_held(1, 2), _held(11, halves=False)]
    merged = merge(parts if known_first else parts[::-1])
    merged.save(tmp_path / "both")
    back = Statistics.load(tmp_path / "both")
    assert halves_of(back.layer("0", ["d1"])) is None
    assert halves_of(back.layer("0")) is None
    _assert_halves(back.layer("0", ["d2"]), layer_statistics(2), layer_statistics(52))
    assert torch.equal(back.layer("0").pair_sum, merged.layer("0").pair_sum)


def test_a_half_is_statistics_of_what_it_holds() -> None:
    found = halves_of(with_halves(layer_statistics(1), layer_statistics(2)))
    assert found is not None
    for half, seed in zip(found, (1, 2), strict=True):
        for name in HALVED:
            assert torch.equal(getattr(half, name), getattr(layer_statistics(seed), name))
        assert half.num_experts == E
        for name in ("coactivation", "pair_sum", "logit_gram", "vocabulary", "half_count"):
            with pytest.raises(NotKept, match=name):
                getattr(half, name)
    assert halves_of(layer_statistics(1)) is None
    assert halves_of(with_halves(layer_statistics(1), layer_statistics(2, tokens=0))) is None


def test_experts_are_renamed_in_both_halves() -> None:
    perm = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    renamed = with_halves(layer_statistics(1), layer_statistics(2)).permuted(perm)
    _assert_halves(renamed, layer_statistics(1).permuted(perm), layer_statistics(2).permuted(perm))


@pytest.mark.parametrize("name", ["count", "gated_norm_sum", "max_abs", "tokens"])
def test_halves_that_do_not_make_the_whole_are_refused(tmp_path: Path, name: str) -> None:
    _held(1).save(tmp_path / "s")
    found = load_file(tmp_path / "s")
    found[f"0/0/half_{name}"][0, 0] += 1 if name != "max_abs" else 1000
    told = Statistics.load(tmp_path / "s").header
    _save(found, tmp_path / "wrong", told)
    with pytest.raises(InputError, match=f"half_{name}: the two halves do not make {name}"):
        Statistics.load(tmp_path / "wrong").layer("0")
    del found[f"0/0/half_{name}"]
    _save(found, tmp_path / "part", told)
    if name != "tokens":
        with pytest.raises(InputError, match=f"half_{name}: missing beside half_tokens"):
            Statistics.load(tmp_path / "part").layer("0")


def _save(tensors: dict[str, torch.Tensor], path: Path, told: object) -> None:
    save_file(tensors, path, metadata={"moekern": json.dumps(told)})
