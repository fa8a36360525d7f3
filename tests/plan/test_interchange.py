"""Plans in other tools' words, and how plans are compared."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.compare import compare
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan, planned_mtp
from moekern.plan.interchange import TOOLS, convert, exported, read_plan
from moekern.pruning.cuts import kept_experts
from tests.helpers import synthetic
from tests.helpers.in_flight import random_plan
from tests.helpers.measured import model_statistics

MakeCheckpoint = Callable[[str], Path]
NAMED = {
    "qwen3_moe": ("model.layers.1.mlp", "model.layers.1.mlp.gate.weight"),
    "mixtral": ("model.layers.1.mlp", "model.layers.1.mlp.gate.weight"),
    "gpt_oss": ("model.layers.1.mlp", "model.layers.1.mlp.router.weight"),
    "granitemoe": ("model.layers.1.block_sparse_moe", "model.layers.1.block_sparse_moe.router.layer.weight"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", NAMED)
def test_there_and_back(name: str, tool: str, family_checkpoint: MakeCheckpoint) -> None:
    layout = find_layout(open_checkpoint(family_checkpoint(name)))
    plan = random_plan(layout, 3)
    text = exported(plan, layout, tool)
    document = json.loads(text)
    names = [n.replace("model.layers.1.mlp", "model.layers.1.block_sparse_moe") for n in NAMED[name]]
    assert {NAMED[name][TOOLS.index(tool)], names[TOOLS.index(tool)]} & document.keys()
    assert list(document.values()) == [list(layer.keep) for layer in plan.layers.values()]
    back = read_plan(text, "other.json", layout)
    assert back.layers == plan.layers
    assert back.provenance["converted_from"] == tool
    assert read_plan(text, "other.json").layers == plan.layers  # by the layers' numbers alone
    assert exported(back, layout, tool) == text


def test_the_mtp_layer_has_a_name_too(tmp_path: Path) -> None:
    layout = find_layout(open_checkpoint(synthetic.write(tmp_path / "in", *synthetic.deepseek_v3())))
    plan = Plan({key: LayerPlan((0, 1, 4, 5)) for key in (*layout.layers, *layout.mtp)})
    for tool in TOOLS:
        assert read_plan(exported(plan, layout, tool), "x", layout).layers == plan.layers


def _converted(path: Path, tool: str, model: Path) -> dict[str, list[int]]:
    text = convert(path, tool, model, lambda c, layout, plan: kept_experts(c, layout, plan, planned_mtp(plan)))
    return json.loads(text)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mtp", ["prune", None])
def test_a_plan_that_prunes_mtp_layers_names_their_routers(mtp: str | None, tmp_path: Path) -> None:
    """compressed-tensors looks every router up; llm-compressor's model has no MTP layers."""
    model = synthetic.write(tmp_path / "in", *synthetic.deepseek_v3())
    checkpoint = open_checkpoint(model)
    plan = Plan({key: LayerPlan((0, 1, 4, 5)) for key in ("1", "2")}, {"mtp": mtp} if mtp else {})
    plan.save(tmp_path / "plan.json")
    found = _converted(tmp_path / "plan.json", "compressed-tensors", model)
    layout = find_layout(checkpoint)
    assert set(found) == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2, 3)}
    kept = kept_experts(checkpoint, layout, plan, "prune")
    assert found["model.layers.3.mlp.gate.weight"] == list(kept[next(iter(layout.mtp))])
    assert set(_converted(tmp_path / "plan.json", "llm-compressor", model)) == {f"model.layers.{i}.mlp" for i in (1, 2)}


@pytest.mark.parametrize(("mtp", "words"), [("drop", "drops MTP layer"), ("keep", "keeps 8 experts of MTP layer")])
def test_what_compressed_tensors_cannot_do_with_mtp_layers(mtp: str, words: str, tmp_path: Path) -> None:
    model = synthetic.write(tmp_path / "in", *synthetic.deepseek_v3())
    Plan({key: LayerPlan((0, 1, 4, 5)) for key in ("1", "2")}, {"mtp": mtp}).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=f"plan.json: {words} .*--mtp prune"):
        _converted(tmp_path / "plan.json", "compressed-tensors", model)
    assert len(_converted(tmp_path / "plan.json", "llm-compressor", model)) == 2


def test_mtp_layers_that_stay_whole_are_named_whole(tmp_path: Path) -> None:
    model = synthetic.write(tmp_path / "in", *synthetic.deepseek_v3())
    Plan({key: LayerPlan(tuple(range(8))) for key in ("1", "2")}, {"mtp": "keep"}).save(tmp_path / "plan.json")
    found = _converted(tmp_path / "plan.json", "compressed-tensors", model)
    assert found["model.layers.3.mlp.gate.weight"] == list(range(8))


def test_the_argument_may_be_wrapped() -> None:
    text = json.dumps({"retained_experts": {"model.layers.10.mlp.gate.weight": [3, 1]}})
    assert read_plan(text, "x").layers == {"10": LayerPlan((1, 3))}


BAD = {
    "not json": ("{", "not a plan"),
    "a list": ("[1]", "expected an object of MoE blocks"),
    "empty": ("{}", "expected an object of MoE blocks"),
    "scores": ('{"saliency": [[0.1]], "count": [[1]]}', "holds scores, not kept experts"),
    "no number": ('{"mlp": [1]}', "mlp: no layer number in it; name the model"),
    "mtp": ('{"mtp.layers.0.mlp": [1]}', "no layer number"),
    "twice": ('{"a.layers.1.mlp": [1], "b.layers.1.mlp": [1]}', "layer 1 comes twice"),
    "no list": ('{"a.layers.1.mlp": 3}', "expected a list of the experts"),
    "nothing kept": ('{"a.layers.1.mlp": []}', "expected a list of the experts"),
    "names": ('{"a.layers.1.mlp": ["3"]}', "expected expert numbers, got '3'"),
    "doubled": ('{"a.layers.1.mlp": [3, 3]}', "expert 3 is listed twice"),
    "deep": ("[" * 100_000, "not a plan"),
    "nested": ('{"retained_experts": ' + '{"a":' * 900 + "1" + "}" * 901, "nested more than 64 deep"),
    "a block twice": ('{"a.layers.1.mlp": [1], "a.layers.1.mlp": [2]}', "duplicate key 'a.layers.1.mlp'"),
    "two lists": ('{"retained_experts": {"a.layers.1.mlp": [1]}, "retained_experts": 5}', "duplicate key"),
    "no number of an expert": ('{"a.layers.1.mlp": [NaN]}', "'NaN' is not a finite number"),
    "a long name": (json.dumps({"layers.1." + "x" * 100_000: [1]}), "a name of 100009 characters; at most 256"),
    "many blocks": (json.dumps({f"layers.{n}.mlp": [1] for n in range(10_001)}), "10001 layers, more than the limit"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_report_is_refused(case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        read_plan(text, "r.json")
    assert str(caught.value).startswith("r.json")
    assert len(str(caught.value)) < 300


def test_a_block_the_model_lacks_is_refused(family_checkpoint: MakeCheckpoint) -> None:
    layout = find_layout(open_checkpoint(family_checkpoint("qwen3_moe")))
    with pytest.raises(InputError, match="model.layers.99.mlp: the model has no such MoE block"):
        read_plan('{"model.layers.99.mlp": [1]}', "r.json", layout)


@settings(deadline=None)
@given(st.text(max_size=30) | st.dictionaries(st.text(), st.lists(st.integers()), max_size=3).map(json.dumps))
def test_any_text_is_a_plan_or_an_input_error(text: str) -> None:
    try:
        plan = read_plan(text, "r.json")
    except InputError:
        return
    assert plan.layers


def test_different_counts_are_marked_only_where_they_are_accepted() -> None:
    text = '{"a.layers.1.mlp": [1], "a.layers.2.mlp": [1, 2]}'
    assert NONUNIFORM not in read_plan(text, "x").provenance
    assert read_plan(text, "x", allow_nonuniform=True).provenance[NONUNIFORM] is True


def test_agreement_is_intersection_over_union() -> None:
    a = Plan({"0": LayerPlan((0, 1, 2, 3)), "1": LayerPlan((0, 1))})
    b = Plan({"0": LayerPlan((2, 3, 4, 5)), "1": LayerPlan((0, 1))})
    found = compare({"a": a, "b": b, "c": a})
    assert [(p.first, p.second) for p in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found.pairs[0].layers == {"0": 2 / 6, "1": 1.0}
    assert (found.pairs[0].jaccard, found.pairs[0].lowest) == ((2 / 6 + 1) / 2, "0")
    assert found.pairs[1].jaccard == 1
    assert found.dropped == {}


def test_dropped_shares_are_those_of_the_sums() -> None:
    s = model_statistics()
    plan = Plan({key: LayerPlan((0, 2, 4)) for key in s.layers})
    found = compare({"p": plan}, s).dropped["p"]
    outputs = {}
    for key in s.layers:
        mass = s.layer(key).gated_norm_sum
        outputs[key] = float(mass[[1, 3, 5]].sum() / mass.sum())
    assert found.outputs == pytest.approx(sum(outputs.values()) / 3, abs=1e-12)
    assert found.worst == (max(outputs, key=lambda k: outputs[k]), pytest.approx(max(outputs.values()), abs=1e-12))
    code = [s.layer(key, ["code"]).gated_norm_sum for key in s.layers]
    assert found.domains["code"] == pytest.approx(sum(float(m[[1, 3, 5]].sum() / m.sum()) for m in code) / 3, abs=1e-12)
    everything = Plan({key: LayerPlan(tuple(range(6))) for key in s.layers})
    assert compare({"p": everything}, s).dropped["p"].gates == pytest.approx(0, abs=1e-12)


def test_plans_that_cannot_be_compared_are_refused() -> None:
    s = model_statistics()
    plan = Plan({key: LayerPlan((0, 2, 4)) for key in s.layers})
    other = Plan({"0": LayerPlan((1, 2))})
    with pytest.raises(InputError, match="one plan alone"):
        compare({"p": plan})
    with pytest.raises(InputError, match="layer 10 is in one of p and q only"):
        compare({"p": plan, "q": other})
    with pytest.raises(InputError, match="q: layer 2 of the statistics is missing"):
        compare({"q": other}, s)
    with pytest.raises(InputError, match="p: layer 0: expert 9, but it has 0 to 5"):
        compare({"p": Plan({key: LayerPlan((0, 9)) for key in s.layers})}, s)
    with pytest.raises(InputError, match="p: made for another model than the statistics"):
        compare({"p": Plan(plan.layers, {"fingerprint": "0" * 64})}, s)
