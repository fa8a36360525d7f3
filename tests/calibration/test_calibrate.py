"""Streamed statistics are those of the whole model, counted exactly, without padding, and mergeable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern
from moekern.calibration.calibrate import calibrate
from moekern.calibration.observe import observe
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from moekern.measurement.batch import route
from moekern.measurement.recorder import Recorder
from moekern.model.compute import Compute
from moekern.statistics.file import Statistics, merge
from moekern.statistics.layer import TIERS, LayerStatistics
from tests.helpers import families
from tests.helpers.measured import differences
from tests.helpers.pairwise import thirds
from tests.helpers.threads import using_threads

MakeCheckpoint = Callable[[str], Path]
FLOAT32 = Compute(dtype="float32")


def _data(name: str, *seeds: int, domain: str = "text") -> TokenData:
    return TokenData(
        tuple(Batch(domain, families.input_ids(name, 2, 12, seed)) for seed in seeds), {"seeds": [*seeds]}, 2
    )


@pytest.mark.parametrize("name", thirds([n for n in families.FAMILIES if n not in families.NO_CALIBRATION], 1))
def test_streamed_statistics_are_the_whole_models_bit_for_bit(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]
) -> None:
    folder, data, whole = family_checkpoint(name), _data(name, 1, 2, 3), whole_model(name)
    plain = [families.forward(whole, batch.input_ids) for batch in data.batches]
    # Few tokens, which calibration computes with one thread.
    with using_threads(1), observe(whole, checkpoint=folder, tiers=["dimensions"]) as seen:
        measured = [families.forward(whole, batch.input_ids) for batch in data.batches]
    streamed = calibrate(folder, data, Compute(dtype=torch.float32), tiers=["dimensions"])
    assert list(streamed.layers) == list(seen.layers)
    for key in streamed.layers:
        assert differences(streamed.layer(key), seen.layer(key)) == []
        s = streamed.layer(key)
        assert int(s.tokens) == 72
        assert torch.equal(s.coactivation.diagonal(), s.count)
        torch.testing.assert_close(s.pair_sum.diagonal(), s.gated_norm_square_sum)
        torch.testing.assert_close(s.square_sum.sum(1), s.norm_square_sum, rtol=1e-5, atol=1e-9)
        assert bool((s.norm_sum > 0).eq(s.count > 0).all())
    for a, b in zip(measured, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for name_ in ("fingerprint", "family", "score", "top_k", "num_experts", "n_group", "topk_group", "group_top"):
        assert streamed.header[name_] == seen.header[name_]


def _expected(model: torch.nn.Module, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, gate sums and output-norm sums of a Qwen3-MoE layer by a plain loop over tokens and slots."""
    block = model.model.layers[layer].mlp
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        _, gates, chosen = block.gate(seen[0])
        count, gate_sum, norm_sum = (torch.zeros(8, dtype=torch.float64) for _ in range(3))
        for x, row_gates, row_ids in zip(seen[0], gates, chosen, strict=True):
            for gate, e in zip(row_gates, row_ids.tolist(), strict=True):
                g, u = (block.experts.gate_up_proj[e] @ x).chunk(2)
                y = block.experts.down_proj[e] @ (torch.nn.functional.silu(g) * u)
                count[e] += 1
                gate_sum[e] += gate.double()
                norm_sum[e] += y.double().norm()
    return count, gate_sum, norm_sum


def test_the_sums_mean_what_they_say(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("qwen3_moe")
    ids = families.input_ids("qwen3_moe", 2, 12, 5)
    s = calibrate(folder, TokenData((Batch("a", ids),), {}), Compute(dtype=torch.float32)).layer("2")
    count, gate_sum, norm_sum = _expected(families.load(folder), 2, ids)
    assert torch.equal(s.count.double(), count)
    torch.testing.assert_close(s.gate_sum, gate_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(s.norm_sum, norm_sum, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "deepseek_v3"])
def test_padding_does_not_count(name: str, whole_model: Callable[[str], Any]) -> None:
    model = whole_model(name)
    ids = families.input_ids(name, 1, 9, 3)
    padded = torch.cat([ids, torch.full((1, 3), 17)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    with observe(model) as plain, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with observe(model) as by_call, torch.no_grad():
        model(input_ids=padded, attention_mask=mask, use_cache=False)
    with observe(model, attention_mask=mask) as by_argument, torch.no_grad():
        model(input_ids=padded, use_cache=False)
    for masked in (by_call, by_argument):
        for key in plain.layers:
            a, b = plain.layer(key), masked.layer(key)
            assert int(b.tokens) == 9
            assert torch.equal(a.count, b.count)
            torch.testing.assert_close(a.gated_norm_sum, b.gated_norm_sum, rtol=1e-4, atol=1e-6)


def test_domains_are_kept_apart_and_add_up(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("olmoe")
    a, b = _data("olmoe", 1, domain="a"), _data("olmoe", 2, domain="b")
    both = calibrate(folder, TokenData(a.batches + b.batches, {}, 2))
    apart = [calibrate(folder, part) for part in (a, b)]
    merged = merge(apart)
    assert both.domains == merged.domains == ("a", "b")
    for key in both.layers:
        for domain, one in zip("ab", apart, strict=True):
            assert differences(both.layer(key, [domain]), one.layer(key)) == []
        assert differences(both.layer(key), merged.layer(key)) == []


def test_observing_leaves_the_model_as_it_was(family_checkpoint: MakeCheckpoint) -> None:
    model = families.load(family_checkpoint("qwen3_moe"))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._experts_implementation
    with observe(model):
        families.forward(model, families.input_ids("qwen3_moe"))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._experts_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_observed_model_can_be_planned(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = family_checkpoint("qwen3_moe")
    model = families.load(folder)
    with moekern.observe(model, checkpoint=folder) as statistics:
        families.forward(model, families.input_ids("qwen3_moe"))
    plan = moekern.make_plan(statistics, "reap", keep=0.5)
    moekern.prune(folder, plan, tmp_path / "out")
    assert moekern.verify(folder, plan, tmp_path / "out").problems == ()


def test_a_model_that_was_not_run_is_an_error(family_checkpoint: MakeCheckpoint) -> None:
    model = families.load(family_checkpoint("qwen3_moe"))
    with pytest.raises(InputError, match="not run"), observe(model):
        pass


def test_statistics_survive_the_file(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    statistics = calibrate(family_checkpoint("mixtral"), _data("mixtral", 1))
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.header == statistics.header
    for key in statistics.layers:
        assert differences(loaded.layer(key), statistics.layer(key)) == []


def test_slots_that_do_not_add_up_stop_the_run() -> None:
    recorder = Recorder("softmax")
    sums = LayerStatistics.zeros(4)
    sums.tokens[0], sums.count[1] = 3, 5
    recorder.sums["0"] = {"text": sums}
    with pytest.raises(RuntimeError, match="5 routed slots for 3 tokens x top-2"):
        recorder.take("0", 2)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_next", "deepseek_v4", "jetmoe"])
def test_the_size_of_batches_changes_no_bit(name: str, family_checkpoint: MakeCheckpoint) -> None:
    """Experts have a few rows each here, whose products take other roads in other batches."""
    ids, tail = families.input_ids(name, 7, 12, 1), families.input_ids(name, 1, 5, 2)
    tiers = ["dimensions", "coalitions", "reap"]
    found = []
    for size in (1, 2, 4, 7):
        batches = (*(Batch("text", part) for part in ids.split(size)), Batch("text", tail))
        data = TokenData(batches, {}, chunk=3)
        found.append(calibrate(family_checkpoint(name), data, Compute(dtype=torch.float32), tiers=tiers))
    for other in found[1:]:
        for key in other.layers:
            assert differences(found[0].layer(key), other.layer(key)) == []


BATCHES = [(1, 1), (2, 2), (4, 1), (7, 4)]  # sequences, threads


@pytest.mark.parametrize(
    ("dtype", "runs"),
    [
        *((dtype, [BATCHES[0], BATCHES[3]]) for dtype in ("float32", "bfloat16")),
        *(pytest.param(dtype, BATCHES, marks=pytest.mark.whole) for dtype in ("float32", "bfloat16")),
    ],
)
def test_batches_and_threads_change_no_byte(dtype: str, runs: list[tuple[int, int]], tmp_path: Path) -> None:
    """The whole file, on the model that ships, of every tier but the one whose bits hold for one number of threads."""
    tiers = [tier for tier in TIERS if tier != "gradient"]
    text = Text((f"c={TEXT / 'c' / 'calibration.txt'}", f"de={TEXT / 'german' / 'calibration.txt'}"), 1300, 64)
    files = _files(text, tmp_path, runs, tiers, dtype)
    assert all(file == files[0] for file in files)


def test_nor_where_rows_have_lengths_of_their_own(tmp_path: Path) -> None:
    whole = (TEXT / "c" / "calibration.txt").read_text()
    lines = [whole[at : at + 60 + at // 9 % 190] for at in range(0, 3000, 250)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text = Text((f"c={tmp_path / 'c.jsonl'}",), 600, 64, pack=False)
    files = _files(text, tmp_path, ((1, 1), (7, 4)), ["dimensions", "reap"], "float32")
    assert files[0] == files[1]


def _files(text: Text, folder: Path, runs: Sequence[tuple[int, int]], tiers: Sequence[str], dtype: str) -> list[bytes]:
    """Statistics of the model that ships, by batches of so many sequences and with so many threads."""
    files = []
    for size, threads in runs:
        data, out = replace(text, batch_size=size).read(open_checkpoint(MODEL)), folder / f"{size}-{threads}"
        with using_threads(threads):
            calibrate(MODEL, data, Compute(dtype=dtype), tiers=tiers, replay_tokens=40, out=out)
        files.append(out.read_bytes())
    return files


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "bailing_hybrid"])
def test_rows_of_their_own_are_measured_as_if_alone(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    """No row sees another, nor any padding: also where a layer hands a state from token to token."""
    lengths = (40, 7, 33, 7, 12, 33, 60, 2)
    lines = [families.input_ids(name, 1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
    checkpoint = open_checkpoint(family_checkpoint(name))
    text = Text((f"text={tmp_path / 't.jsonl'}",), sequence_length=33, chunk=4, pack=False)
    with using_threads(1):
        found = [calibrate(checkpoint, replace(text, batch_size=n).read(checkpoint), FLOAT32) for n in (1, 5)]
    with using_threads(1), observe(whole_model(name)) as alone:
        for line in lines:
            families.forward(whole_model(name), torch.tensor([line[:33]]))
    for key in alone.layers:
        assert differences(found[0].layer(key), found[1].layer(key)) == []
        a, b = found[0].layer(key), alone.layer(key)
        assert int(a.tokens) == sum(min(33, length) for length in lengths)
        assert torch.equal(a.count, b.count)
        for field in ("gate_sum", "norm_sum", "gated_norm_sum", "pair_sum", "max_abs"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-5, atol=1e-7)


def test_gradients_are_taken_by_sequence_whatever_the_batches(tmp_path: Path) -> None:
    text = Text((f"c={TEXT / 'c' / 'calibration.txt'}",), 260, 64)
    checkpoint, files = open_checkpoint(MODEL), []
    with using_threads(1):
        for size in (1, 3):
            data, out = replace(text, batch_size=size).read(checkpoint), tmp_path / str(size)
            calibrate(checkpoint, data, Compute(dtype="float32"), tiers=["gradient"], out=out)
            files.append(out.read_bytes())
    assert files[0] == files[1]


def test_a_file_and_memory_hold_the_same(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder, data, tiers = family_checkpoint("qwen3_moe"), _data("qwen3_moe", 1, 2), list(TIERS)
    with using_threads(1):
        held = calibrate(folder, data, Compute(dtype="float32"), tiers=tiers)
        filed = calibrate(folder, data, Compute(dtype="float32"), tiers=tiers, out=tmp_path / "filed")
    held.save(tmp_path / "held")
    assert (tmp_path / "held").read_bytes() == (tmp_path / "filed").read_bytes()
    assert filed.tiers == TIERS


def test_a_layers_sums_leave_when_it_is_done(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder holds one layer at most, and what is taken of it is in the file before the next is read."""
    held: list[tuple[str, int]] = []
    take = Recorder.take

    def taken(self: Recorder, layer: str, *more: Any) -> Any:
        held.append((layer, len(self.sums)))
        return take(self, layer, *more)

    monkeypatch.setattr(Recorder, "take", taken)
    calibrate(family_checkpoint("qwen3_moe"), _data("qwen3_moe", 1))
    assert held == [(str(i), 1) for i in range(4)]


def test_no_file_is_left_of_a_calibration_that_failed(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(family_checkpoint("mixtral"), _data("mixtral", 1), out=tmp_path / "s", progress=stop)
    assert not list(tmp_path.iterdir())


def test_an_observed_model_is_not_observed_again(family_checkpoint: MakeCheckpoint) -> None:
    model, ids = families.load(family_checkpoint("qwen3_moe")), families.input_ids("qwen3_moe")
    with observe(model) as statistics:
        with pytest.raises(InputError, match="observed already"), observe(model):
            pass
        families.forward(model, ids)
    assert int(statistics.layer("0").tokens) == ids.numel()


def test_a_file_that_is_there_is_not_written_over(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        calibrate(family_checkpoint("mixtral"), _data("mixtral", 1), out=tmp_path / "s")
    with pytest.raises(InputError, match="--device nowhere: not usable here"):
        calibrate(family_checkpoint("mixtral"), _data("mixtral", 1), Compute(device="nowhere"))
    assert (tmp_path / "s").read_bytes() == b"mine"


def test_a_padded_model_that_generates_is_observed(family_checkpoint: MakeCheckpoint) -> None:
    model = families.load(family_checkpoint("qwen3_moe"))
    ids, mask = families.input_ids("qwen3_moe", 2, 6, 3), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with observe(model, tiers=["vocabulary"]) as statistics:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for key in statistics.layers:
        assert int(statistics.layer(key).tokens) == 10 + 2 * 3  # the last of four new tokens is not read again
        assert int(statistics.layer(key).vocabulary.count_nonzero())


def test_routing_groups_slots_stably_and_leaves_out_empty_ones() -> None:
    ids = torch.tensor([[2, 0], [0, 7], [-1, 2]])
    routed = route(ids, 3, empty_slots=True)
    assert routed.order.tolist() == [1, 2, 0, 5]
    assert routed.offsets.tolist() == [0, 2, 2, 4]


def test_the_memory_for_output_dimensions_is_optional(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("qwen3_moe")
    with_, without = (calibrate(folder, _data("qwen3_moe", 1), tiers=tiers) for tiers in (["dimensions"], []))
    assert with_.layer("0").dimensions == 32
    assert without.layer("0").dimensions == 0
    assert torch.equal(with_.layer("0").pair_sum, without.layer("0").pair_sum)
    with pytest.raises(InputError, match="ean_dim"):
        moekern.make_plan(without, "ean_dim", keep=4)
