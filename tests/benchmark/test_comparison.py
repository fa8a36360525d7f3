"""The comparison on one ruler: its rows, that all ways to measure agree, bits, tables, and that it goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import comparison
from bench.comparison_tables import markdown
from bench.criteria import COMPUTE, read
from bench.rounding import rounded, twin
from bench.ruler import Routed, Ruler, same
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from moekern.pruning.prune import prune
from moekern.refit import Refine, Ridge
from tests.helpers import ROOT

SMALL = ("--demo", "--keeps", "0.5", "--tokens", 3072, "--held-out-tokens", 768, "--bits", "4", "--seeds", 1)
HALF = Plan({str(layer): LayerPlan(tuple(range(0, 16, 2))) for layer in range(4)})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.comparison", *map(str, arguments)])
    comparison.main()


def text(part: str, tokens: int = 768) -> TokenData:
    checkpoint = open_checkpoint(MODEL)
    return Text(text_sources(part), tokens=tokens, sequence_length=128).read(checkpoint).by_chunk()


@pytest.mark.whole
def test_rows_tables_and_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "r.jsonl", ["gated_norm", "gated_norm, mean constants", "m-smoe, merged"]
    run(monkeypatch, *SMALL, "--out", out, "--only", *asked)
    before = out.read_text()
    lines = {line["row"]: line for line in map(json.loads, before.splitlines())}
    assert list(lines) == ["original", *asked]
    assert lines["original"]["mean_kl"] == 0
    assert [lines[row]["bits"] for row in ("original", "gated_norm")] == [16, 8]
    assert lines["gated_norm, mean constants"]["bits"] == pytest.approx(8 + 16 * 128 / (3 * 96 * 128) / 2)
    assert lines["gated_norm, mean constants"]["mean_kl"] < lines["gated_norm"]["mean_kl"]
    run(monkeypatch, *SMALL, "--out", out, "--only", *asked, "reap")
    assert out.read_text().startswith(before)
    assert [json.loads(line)["row"] for line in out.read_text()[len(before) :].splitlines()] == ["reap"]
    capsys.readouterr()
    run(monkeypatch, "--show", out)
    shown = capsys.readouterr().out
    assert "| gated_norm | choice | 8.00 |" in shown
    assert "| reap | choice | 8.00 |" in shown
    assert shown.count("| best | 1 |") == 1
    assert "| 16.00 | original |" in shown
    with pytest.raises(SystemExit, match="measured with tokens_asked 3072, and this is 4096; name another --out"):
        run(monkeypatch, *SMALL, "--tokens", 4096, "--out", out)


def test_a_folder_is_judged_as_the_plan_that_made_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODEL)
    ruler = Ruler(checkpoint, text("evaluation"), tmp_path / "predictions", COMPUTE)
    prune(checkpoint, HALF, tmp_path / "half")
    plan, folder = ruler.plans({"half": HALF})["half"], ruler.folder(tmp_path / "half")
    for domain, loss in plan.items():
        torch.testing.assert_close(loss.sums[:, :5], folder[domain].sums, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        same(plan, ruler.original)


def test_the_tables_of_the_page_are_the_records() -> None:
    lines = read(ROOT / "bench/records/vm3-comparison.jsonl")
    page = (ROOT / "docs/comparison.md").read_text()
    tables = [table.strip() for table in re.split(r"(?m)^(?=\d+% kept:|By bits)", markdown(lines)) if table.strip()]
    assert len(tables) == 4
    assert all(table in page for table in tables)
    assert {line["seed"] for line in lines if line["keep"] < 1} == {0, 1, 2}


def test_bits_count_constants_and_channels() -> None:
    routed = Routed.of(open_checkpoint(MODEL))
    assert (routed.numbers, routed.constant) == (4 * 16 * 3 * 128 * 96, 2 * 128)
    assert routed.bits(HALF) == 8
    zeros, means = (Plan(HALF.layers, replace=Replacement(kind)) for kind in ("zero", "mean"))
    assert routed.bits(zeros) == 8
    assert routed.bits(means) == pytest.approx(8 + 16 / (3 * 96) / 2)
    narrow = {key: LayerPlan(layer.keep, None, ("f" * 12,) * 8) for key, layer in HALF.layers.items()}
    assert routed.bits(Plan(narrow)) == 4


@pytest.mark.parametrize("bits", [2, 8])
def test_rounding_is_to_the_nearest_level_of_each_group(bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    values[0, :32] = 0
    found = rounded(values, bits, 32)
    for part in (slice(0, 32), slice(32, 40)):
        for row, own in zip(values[:, part], found[:, part], strict=True):
            step = (max(row.max(), 0) - min(row.min(), 0)) / (2**bits - 1)
            assert len(np.unique(own)) <= 2**bits
            assert np.abs(row - own).max() <= step * (1 if bits == 2 else 1.1)  # zero is a level: ends are cut a little
            assert np.abs(row - own).mean() <= step / 2


def test_a_twin_counts_codes_scales_and_zero_points(tmp_path: Path) -> None:
    found = twin(open_checkpoint(MODEL), tmp_path / "out", tmp_path / "work", 3, 64)
    assert found == pytest.approx(3 + (16 + 3) * (2 / 128 + 2 / 128 + 2 / 96) / 3)  # two groups a row of each matrix


@pytest.mark.whole
def test_masks_training_and_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "FITS", {"ridge": (Ridge(), None), "ridge, refine": (Ridge(), Refine(epochs=1))})
    out = tmp_path / "r.jsonl"
    run(monkeypatch, *SMALL, "--steps", 2, "--out", out, "--only", "masks", "trained", "refitted", "twin")
    lines = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(lines) == ["original", "rounded to 4 bits", *comparison.fitted()]
    assert lines["rounded to 4 bits"]["bits"] == 4.625
    assert lines["dropped, trained"]["bits"] == lines["ridge"]["bits"] == 8
    assert lines["ridge, refine"]["mean_kl"] < lines["masks"]["mean_kl"]
    assert lines["shape, ridge, refine, trained"]["bits"] == lines["shape, ridge, refine"]["bits"] <= 8
    assert lines["shape, ridge, refine, trained"]["passes"] > lines["shape, ridge, refine"]["passes"]
