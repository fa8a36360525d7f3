"""Predicted sizes against the checkpoints that pruning writes, and KV caches against counts by hand."""

import re

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.estimation.footprint import Fit, cache_bytes, footprint, largest_count
from moekern.files import sized
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.pruning.shards import bytes_after
from moekern.router import count_problem
from tests.helpers import synthetic

CHECKPOINTS = {
    **{name: lambda name=name: synthetic.qwen3(name) for name in synthetic.COMPANIONS},
    "mxfp4": synthetic.gpt_oss_mxfp4,
    "mtp": synthetic.deepseek_v3,
}


def opened(tmp_path, name):
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "in", *CHECKPOINTS[name]()))
    return checkpoint, find_layout(checkpoint)


@pytest.mark.parametrize("mtp", ["prune", "drop", "keep"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_prediction_is_the_size_that_pruning_writes(tmp_path, name, mtp):
    checkpoint, layout = opened(tmp_path, name)
    found = footprint(checkpoint, layout, mtp=mtp)
    if mtp != "drop":
        assert found.uniform(layout.num_experts) == checkpoint.nbytes
    for count in (n for n in range(1, layout.num_experts) if count_problem(n, layout.router) is None):
        size = layout.num_experts // layout.n_group
        keep = tuple(e for e in range(layout.num_experts) if e % size < count // layout.n_group)
        plan = Plan({key: LayerPlan(keep) for key in layout.layers}, {"mtp": mtp})
        prune(checkpoint, plan, tmp_path / f"out{count}")
        size = open_checkpoint(tmp_path / f"out{count}").nbytes
        assert size == found.uniform(count) == bytes_after(checkpoint, layout, plan)


def test_different_counts_add_up(tmp_path):
    checkpoint, layout = opened(tmp_path, "mtp")
    counts = {"1": 4, "2": 8}
    keep = {"1": (0, 1, 4, 5), "2": tuple(range(8))}
    prune(checkpoint, Plan({k: LayerPlan(ids) for k, ids in keep.items()}, {NONUNIFORM: True}), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").nbytes == footprint(checkpoint, layout).weights(counts)


def test_bits_count_matrices_and_leave_routers_vectors_and_embeddings(tmp_path):
    checkpoint, layout = opened(tmp_path, "fp8_block")
    found = footprint(checkpoint, layout, bits=4)
    stored = matrices = 0
    for entry in checkpoint.tensors.values():
        if re.search(r"experts|_proj", entry.name):
            matrices += 0 if "scale" in entry.name or len(entry.shape) < 2 else entry.shape[0] * entry.shape[1]
            stored += entry.nbytes if len(entry.shape) < 2 else 0
        else:
            stored += entry.nbytes
    assert found.uniform(8) == stored + matrices // 2
    # an expert is three matrices of 6 x 4; a router row 4 numbers
    rows = [t for layer in layout.layers.values() for t in layer.of_role("router")]
    row = sum(checkpoint.tensors[t.name].nbytes for t in rows) // 8
    assert found.uniform(8) - found.uniform(7) == 2 * 3 * 6 * 4 // 2 + row


def test_packed_integers_do_not_tell_their_weights(tmp_path):
    checkpoint, layout = opened(tmp_path, "gptq")
    with pytest.raises(InputError, match="--bits: .* holds I32, which packs an unknown number of weights"):
        footprint(checkpoint, layout, bits=4)


QWEN3_30B = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "sliding_window": None,
}  # fmt: skip
CACHES = {
    # one token of one sequence, in bytes: 2 for each number
    "grouped": (QWEN3_30B, "", 48 * 4 * (128 + 128) * 2),
    "no head_dim": ({"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8}, "", 2 * 8 * (8 + 8) * 2),
    "latent": (
        {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        "",
        61 * (512 + 64) * 2,
    ),
    "latent with an indexer": (
        {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128},
        "",
        61 * (512 + 64 + 128) * 2,
    ),
    "other value size": (
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 192,
            "v_head_dim": 128,
        },
        "",
        3 * 2 * (192 + 128) * 2,
    ),
    "nested": ({"text_config": QWEN3_30B, "vision_config": {"num_hidden_layers": 3}}, "text_config", 98304),
    "every fourth": (QWEN3_30B | {"full_attention_interval": 4}, "", 12 * 4 * 256 * 2),
    "every eighth from the fifth on": (
        QWEN3_30B | {"attn_layer_period": 8, "attn_layer_offset": 4},
        "",
        6 * 4 * 256 * 2,
    ),
    "a pattern": (QWEN3_30B | {"hybrid_override_pattern": "M-ME*-" * 8}, "", 8 * 4 * 256 * 2),
    "a list": (QWEN3_30B | {"linear_attn_config": {"full_attn_layers": [4, 8]}}, "", 2 * 4 * 256 * 2),
    "types": (QWEN3_30B | {"layer_types": ["linear_attention", "full_attention"] * 24}, "", 24 * 4 * 256 * 2),
}


@pytest.mark.parametrize("case", CACHES)
def test_caches_are_those_counted_by_hand(case):
    config, holder, token = CACHES[case]
    assert cache_bytes(config, holder, 1) == token
    assert cache_bytes(config, holder, 1000, 3) == 3000 * token


def test_windows_end_the_growth():
    config = QWEN3_30B | {"layer_types": ["sliding_attention", "full_attention"] * 24, "sliding_window": 128}
    layer = 4 * 256 * 2
    assert cache_bytes(config, "", 100) == 48 * 100 * layer
    assert cache_bytes(config, "", 1000) == 24 * (1000 + 128) * layer


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": 0}, {"num_hidden_layers": "4"}, {"num_hidden_layers": 4, "hidden_size": 64}]
)
def test_a_config_without_sizes_is_refused(config):
    with pytest.raises(InputError, match="--context: config.json"):
        cache_bytes(config, "", 10)


def test_the_largest_count_that_fits(tmp_path):
    checkpoint, layout = opened(tmp_path, "bf16")
    found = footprint(checkpoint, layout)
    for count in (2, 5, 8):
        for limit, want in ((found.uniform(count), count), (found.uniform(count) + 1, count)):
            fitted = largest_count(checkpoint, layout, Fit(limit), range(2, 9))
            assert (fitted.count, fitted.weights, fitted.cache) == (want, found.uniform(count), 0)
    least = found.uniform(2)
    with pytest.raises(
        InputError, match=f"nothing fits; the smallest this model gets is {sized(least)}, with 2 experts"
    ):
        largest_count(checkpoint, layout, Fit(least - 1), range(2, 9))
    with pytest.raises(InputError, match="no expert count is legal"):
        largest_count(checkpoint, layout, Fit(least), [])


def test_the_cache_takes_its_part(tmp_path):
    config, tensors = synthetic.qwen3()
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "in", config, tensors))
    layout = find_layout(checkpoint)
    cache = 2 * 2 * 10 * 1 * (2 + 2) * 2  # sequences, layers, tokens, heads, key and value, bytes
    size = footprint(checkpoint, layout).uniform(6)
    assert largest_count(checkpoint, layout, Fit(size + cache, None, 10, 2), range(2, 9)).count == 6
    assert largest_count(checkpoint, layout, Fit(size + cache - 1, None, 10, 2), range(2, 9)).count == 5
    with pytest.raises(InputError, match=rf"smallest .*, {sized(cache)} of it KV cache"):
        largest_count(checkpoint, layout, Fit(1, None, 10, 2), range(2, 9))


@pytest.mark.parametrize("values", [{"limit": 0}, {"bits": 0.5}, {"bits": 64}, {"context": -1}, {"sequences": 0}])
def test_a_fit_that_means_nothing_is_refused(values):
    with pytest.raises(InputError, match=f"--{'fit' if 'limit' in values else next(iter(values))}: expected"):
        Fit(**{"limit": 1, **values})
