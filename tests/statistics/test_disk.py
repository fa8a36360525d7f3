"""Layers are written where the finished file has them, read one at a time, and never held."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moekern import files
from moekern.errors import InputError
from moekern.statistics import disk
from moekern.statistics.disk import StatisticsWriter
from moekern.statistics.file import Statistics, merge
from moekern.statistics.layer import LayerStatistics
from tests.helpers import ROOT
from tests.helpers.measured import E, H, header, layer_statistics, model_statistics

DOMAINS = ("prose", "code")
SIZES = LayerStatistics.zeros(E, H, "meta", tiers=("coalitions",))
SIZES = replace(SIZES, coalitions=torch.empty(1, 3, dtype=torch.int64, device="meta"))


def measured(seed: int, sets: int = 4) -> LayerStatistics:
    """Random sums of the sizes above."""
    rows = torch.randint(0, E, (sets, 3), generator=torch.Generator().manual_seed(seed))
    return replace(layer_statistics(seed), coalitions=rows)


def written(path: Path, order: list[tuple[str, str]]) -> bytes:
    sums = {("0", "prose"): measured(1), ("0", "code"): measured(2, 7), ("11", "prose"): measured(3, 1)}
    sizes = {"0": {"prose": SIZES, "code": SIZES}, "11": {"prose": SIZES}}
    with files.replacing(path) as temporary, temporary.open("r+b") as file:
        writer = StatisticsWriter(file, header(DOMAINS), sizes)
        for key, domain in order:
            values = sums[key, domain].tensors()
            half = len(values) // 2  # as a tier that a later pass measures
            writer.write(key, domain, dict(list(values.items())[:half]))
            writer.write(key, domain, dict(list(values.items())[half:]))
            assert torch.equal(writer.read(key, domain).pair_sum, sums[key, domain].pair_sum)
        writer.finish()
    for (key, domain), expected in sums.items():
        found = Statistics.load(path).layers[key][domain].tensors()
        assert all(torch.equal(found[name], value) for name, value in expected.tensors().items())
    return path.read_bytes()


def test_a_layer_at_a_time_and_whole_give_the_same_bytes(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [("0", "prose"), ("0", "code"), ("11", "prose")])
    Statistics.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == one
    held = {key: dict(parts) for key, parts in Statistics.load(tmp_path / "one").layers.items()}
    Statistics(header(DOMAINS), held).save(tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == one


def test_the_order_of_writing_moves_nothing_but_lists(tmp_path: Path) -> None:
    written(tmp_path / "one", [("11", "prose"), ("0", "code"), ("0", "prose")])


def test_the_safetensors_library_reads_the_same(tmp_path: Path) -> None:
    s = model_statistics()
    s.save(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert json.loads(file.metadata()["moekern"]) == s.header
        for key, parts in s.layers.items():
            for number, domain in enumerate(s.domains):
                for name, value in parts[domain].tensors().items():
                    if value.numel():
                        assert torch.equal(file.get_tensor(f"{key}/{number}/{name}"), value)


def test_what_was_announced_must_come(tmp_path: Path) -> None:
    with (tmp_path / "s").open("w+b") as file:
        writer = StatisticsWriter(file, header(DOMAINS), {"0": {"prose": SIZES}})
        with pytest.raises(RuntimeError, match=r"0/0/count: shape \[7\] was announced as \[6\]"):
            writer.write("0", "prose", {"count": torch.zeros(7, dtype=torch.int64)})
        with pytest.raises(RuntimeError, match="was announced and never measured"):
            writer.finish()


def test_tiers_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    s = model_statistics()
    s.save(tmp_path / "s")
    some = Statistics.load(tmp_path / "s").layer("0", tiers=())
    assert not some.square_sum.numel()
    assert torch.equal(some.pair_sum, s.layer("0").pair_sum)


def test_whether_a_domain_is_there_is_known_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = model_statistics()
    s.save(tmp_path / "s")
    stored = Statistics.load(tmp_path / "s")
    monkeypatch.setattr(disk, "read_tensor", lambda *arguments: pytest.fail("it was read"))
    for found in (stored, merge([stored])):
        assert set(s.domains) == {name for name in (*s.domains, "none") if name in found.layers["0"]}


def test_a_file_that_is_replaced_while_it_is_open_is_refused(tmp_path: Path) -> None:
    model_statistics().save(tmp_path / "s")
    opened = Statistics.load(tmp_path / "s")
    model_statistics(layers=("0", "1", "2")).save(tmp_path / "s")
    with pytest.raises(InputError, match="was changed after it was opened"):
        opened.layer("0")


def test_weights_that_differ_are_refused_when_they_are_added(tmp_path: Path) -> None:
    one, two = (
        Statistics(
            header(DOMAINS),
            {"0": {"prose": replace(layer_statistics(0), weight_abs_sum=torch.full((E,), float(n)).double())}},
        )
        for n in (1, 2)
    )
    with pytest.raises(InputError, match="part 2, layer 0: weight_abs_sum: the two sides are of different weights"):
        merge([one, two]).save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_text_that_two_parts_have_measured_is_not_added(tmp_path: Path) -> None:
    recipe = {"sources": {"prose": {"path": "a.txt", "sha256": "0"}}, "seed": 1}
    one, two, other = (
        Statistics(header(DOMAINS, data={**recipe, "seed": seed}), {"0": {"prose": layer_statistics(seed)}})
        for seed in (1, 1, 2)
    )
    merged = merge([one, other])
    with pytest.raises(InputError, match="parts 1 and 2 measured the same text;"):
        merge([one, two])
    merged.save(tmp_path / "merged")
    with pytest.raises(InputError, match="parts 1 and 2 measured the same text"):
        merge([Statistics.load(tmp_path / "merged"), one])
    with pytest.raises(InputError, match="the same file is given twice"):
        merge([one, one])


def test_the_same_token_ids_are_not_added_however_they_were_read(tmp_path: Path) -> None:
    def of(ids: str, **recipe: int) -> Statistics:
        data = {"sources": {"prose": {"path": "a.txt", "tokens": 9, "ids_sha256": ids}}, **recipe}
        return Statistics(header(DOMAINS, data=data), {"0": {"prose": layer_statistics(1)}})

    assert len(merge([of("a", chunk=1), of("b", chunk=1)]).header["runs"]) == 2
    with pytest.raises(InputError, match="parts 1 and 3 measured the same text;"):
        merge([of("a", chunk=1), of("b"), of("a", chunk=2)])


def test_a_relative_path_holds_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_statistics().save(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    opened = Statistics.load("s")
    monkeypatch.chdir("/")
    assert int(opened.layer("0").tokens)
    assert opened.sha256 == files.sha256(tmp_path / "s")


MEMORY = """
import sys, torch
from pathlib import Path
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics, merge
from tests.statistics.test_disk import synthetic
layers, domains, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
for name in ("one", "two"):
    synthetic(folder / name, layers, domains, name)
one, two = (Statistics.load(folder / name) for name in ("one", "two"))
assert len(make_plan(one, "ean_dim", 0.5).layers) == layers
merge([one, two]).save(folder / "both")
assert len(make_plan(Statistics.load(folder / "both"), "hope_all_tokens", 0.5).layers) == layers
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def synthetic(path: Path, layers: int, count: int, data: str) -> None:
    """A file of `count` domains with the dimensions tier in which every expert has one token; the rest are holes."""
    E, H, domains = 384, 7168, [f"d{i}" for i in range(count)]
    head = {**header(domains), "num_experts": E, "top_k": 1, "n_group": 1, "topk_group": 1}
    head["runs"] = [{"data": data}]
    sizes = LayerStatistics.zeros(E, H, "meta")
    with files.replacing(path) as temporary, temporary.open("r+b") as file:
        writer = StatisticsWriter(file, head, {str(i): dict.fromkeys(domains, sizes) for i in range(layers)})
        ones = {
            "count": torch.ones(E, dtype=torch.int64),
            "tokens": torch.tensor([E]),
            "coactivation": torch.eye(E, dtype=torch.int64),
            "norm_sum": torch.ones(E).double(),
        }
        for i in range(layers):
            for domain in domains:
                writer.write(str(i), domain, ones)
        writer.written |= set(writer.entries)
        writer.finish()


@pytest.mark.parametrize(("layers", "domains"), [(3, 2), pytest.param(61, 6, marks=pytest.mark.whole)])
def test_memory_is_one_layers_whatever_the_number_of_layers(tmp_path: Path, layers: int, domains: int) -> None:
    """Sizes of Kimi-K2: a layer's sums of one domain take 70 MB, of six domains 420 MB, of all layers 25 GB."""
    command = [sys.executable, "-c", MEMORY, str(layers), str(domains), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600
