"""Lists of a config that have an entry for each expert are cut with the experts, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.expert_lists import ExpertLists
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers.synthetic import EXPERTS, deepseek_v3, write

ONE, TWO = (0, 3, 5, 6), (1, 2, 4, 7)
EACH = [10 * n for n in range(EXPERTS)]
CASES: dict[str, tuple[Any, Any]] = {
    "a row for each layer": (
        {"expert_bits": [[], EACH, EACH]},
        {"expert_bits": [[], [EACH[e] for e in ONE], [EACH[e] for e in TWO]]},
    ),
    "a row for each layer with experts": (
        {"moe_map": [EACH, EACH]},
        {"moe_map": [[EACH[e] for e in ONE], [EACH[e] for e in TWO]]},
    ),
    "layers by number": ({"expert_bits": {"0": 4, "2": EACH}}, {"expert_bits": {"0": 4, "2": [EACH[e] for e in TWO]}}),
    "layers by name": (
        {"quantization_config": {"bits": {"model.layers.1.mlp.experts": EACH}}},
        {"quantization_config": {"bits": {"model.layers.1.mlp.experts": [EACH[e] for e in ONE]}}},
    ),
    "experts by number": (
        {"bits": {"1": {"experts": {str(n): n for n in range(EXPERTS)}}}},
        {"bits": {"1": {"experts": {str(n): e for n, e in enumerate(ONE)}}}},
    ),
    "equal entries": ({"expert_bits": [4] * EXPERTS}, {"expert_bits": [4] * 4}),
    "not about experts": ({"sections": EACH, "moe_sizes": [1, 2]}, {"sections": EACH, "moe_sizes": [1, 2]}),
    "of another part": ({"vision_config": {"expert_bits": EACH}}, {"vision_config": {"expert_bits": EACH}}),
}


def pruned(folder: Path, more: Any, plan: Plan) -> tuple[Path, Path]:
    config, tensors = deepseek_v3(mtp=False)
    source = write(folder / "in", {**config, "num_nextn_predict_layers": 0, **more}, tensors)
    (source / "hf_quant_config.json").write_text(json.dumps(more))
    prune(source, plan, folder / "out")
    return source, folder / "out"


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES)
def test_lists_are_cut(tmp_path: Path, before: Any, after: Any) -> None:
    plan = Plan({"1": LayerPlan(ONE), "2": LayerPlan(TWO)})
    source, out = pruned(tmp_path, before, plan)
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in after} == after
    assert json.loads((out / "hf_quant_config.json").read_text()) == after
    assert verify(source, plan, out).problems == ()
    if before != after:
        (out / "config.json").write_text(json.dumps({**config, **before}))
        assert verify(source, plan, out).problems


def test_where_all_layers_keep_the_same(tmp_path: Path) -> None:
    plan = Plan({"1": LayerPlan(ONE), "2": LayerPlan(ONE)})
    source, out = pruned(tmp_path, {"expert_bits": EACH}, plan)
    assert json.loads((out / "config.json").read_text())["expert_bits"] == [EACH[e] for e in ONE]
    assert verify(source, plan, out).problems == ()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"expert_bits": EACH}, "config.json: expert_bits: an entry for each expert, of which layers keep different"),
        ({"a": {"expert_map": [EACH] * 5}}, r"a.expert_map: 5 rows of an entry for each expert, which are no layers"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path: Path, more: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pruned(tmp_path, more, Plan({"1": LayerPlan(ONE), "2": LayerPlan(TWO)}))
    assert not (tmp_path / "out").exists()


def test_entries_that_may_as_well_be_layers(tmp_path: Path) -> None:
    config, tensors = deepseek_v3(mtp=False)
    layout = find_layout(open_checkpoint(write(tmp_path / "in", {**config, "num_nextn_predict_layers": 0}, tensors)))
    lists = ExpertLists("config.json", layout, {"1": ONE, "2": TWO}, num_layers=EXPERTS)
    with pytest.raises(InputError, match="expert_bits: there are as many experts as layers"):
        lists.cut({"expert_bits": EACH})
