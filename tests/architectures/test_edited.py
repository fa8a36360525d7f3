"""Keys and settings that are changed at random: a layout that fits them, or one refusal."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from tests.helpers.layouts import BIAS, GUD, moe_keys, write_checkpoint

FIRST = "model.layers.0.mlp."
CHANGED = ["num_experts", "n_group", "topk_group", "num_experts_per_tok", "num_hidden_layers", "text_config"]
JUNK = st.sampled_from(["experts", "gate", "0", "7", "99999999", "weight", "mlp", "mtp", "layers", "", "#", "{}", "é"])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 6), JUNK), max_size=3),
    shape=st.lists(st.integers(0, 9), max_size=3),
    values=st.dictionaries(
        st.sampled_from(CHANGED),
        st.one_of(st.integers(-2, 9), st.none(), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=2)),
        max_size=2,
    ),
)
def test_edited_checkpoints_are_understood_or_refused(
    tmp_path: Path, edits: list[tuple[int, int, str]], shape: list[int], values: dict[str, Any]
) -> None:
    keys = moe_keys(FIRST, GUD, bias=BIAS, num_experts=4) | moe_keys("model.layers.1.mlp.", GUD, num_experts=4)
    names = list(keys)
    for which, part, word in edits:
        name = names[which % len(names)]
        if name in keys:
            parts = name.split(".")
            parts[part % len(parts)] = word
            dtype, old = keys.pop(name)
            keys[".".join(parts)] = (dtype, shape if part == 6 else old)
    config = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2} | values
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, keys))
    try:
        layout = find_layout(checkpoint)
    except InputError:
        return
    assert {t.name for layer in (*layout.layers.values(), *layout.mtp.values()) for t in layer.tensors} <= set(keys)
    assert layout.num_experts == 4
    assert 1 <= layout.router.top_k <= 4
