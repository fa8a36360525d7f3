"""Names, numbers and counts of experts in settings: renamed, refused, or told in a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import PruneReport, prune
from moekern.verification.tensors import verify
from tests.helpers.synthetic import qwen3, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))})
SAME = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((0, 2, 3, 7))})
NAME = "model.layers.1.mlp.experts.{}.down_proj"


def pruned(folder: Path, more: Any, plan: Plan = PLAN) -> tuple[Any, PruneReport]:
    """The config and the report, where `more` stands in the original's config; verified."""
    config, tensors = qwen3()
    source = write(folder / "in", config | more, tensors)
    report = prune(source, plan, folder / "out")
    assert verify(source, plan, folder / "out").problems == ()
    after = json.loads((folder / "out/config.json").read_text())
    return {key: after[key] for key in more}, report


def inside(settings: Any) -> Any:
    return {"quantization_config": settings}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (inside({"ignore": NAME.format(5)}), inside({"ignore": NAME.format(2)})),
        (inside({"rules": [{"name": NAME.format(5), "a": 4}]}), inside({"rules": [{"name": NAME.format(2), "a": 4}]})),
        (inside({"ignore": r"re:.*experts\.5\..*"}), inside({"ignore": r"re:(?:.*\.)?layers\.1\.mlp\.experts\.2\..*"})),
        (inside({"ignore": [NAME.format(5) + ".act"]}), inside({"ignore": [NAME.format(2) + ".act"]})),
        (
            inside({"a": [NAME.format(5), {"b": [NAME.format(6)]}]}),
            inside({"a": [NAME.format(2), {"b": [NAME.format(3)]}]}),
        ),
        (
            inside({"ignore": "experts.3", "b": "mlp.experts.6.up_proj"}),
            inside({"ignore": "model.layers.0.mlp.experts.2", "b": "model.layers.1.mlp.experts.3.up_proj"}),
        ),
        ({"device_map": {NAME.format(5): 0, NAME.format(0): 1, "x": 2}}, {"device_map": {NAME.format(2): 0, "x": 2}}),
        ({"tied_experts": [NAME.format(6), NAME.format(3)]}, {"tied_experts": [NAME.format(3)]}),
        ({"tied": {NAME.format(5): NAME.format(6)}}, {"tied": {NAME.format(2): NAME.format(3)}}),
        ({"base_model_tp_plan": {"layers.*.mlp.experts.*.up_proj": "row"}},) * 2,
        ({"prompt": "1.", "note": "no expert", "list": [r"(a+)+\.5", "experts"]},) * 2,
    ],
)  # fmt: skip
def test_names_are_replaced_wherever_they_stand(tmp_path: Path, before: Any, after: Any) -> None:
    got, _ = pruned(tmp_path, before)
    assert got == after
    if got != before:
        config = json.loads((tmp_path / "out/config.json").read_text())
        (tmp_path / "out/config.json").write_text(json.dumps(config | before))
        assert verify(tmp_path / "in", PLAN, tmp_path / "out").problems


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (inside({"ignore": NAME.format(0)}), "names experts, and none of these stay; make it a list"),
        (inside({"ignore": f"{NAME.format(5)}, {NAME.format(6)}"}), "names several modules; make it a list"),
        (
            inside({"ignore": r"re:.*experts\.[0-9]\.up_proj|.*experts\.5\..*"}),
            "several names are needed|names experts",
        ),
    ],
)
def test_a_string_that_one_name_cannot_replace(tmp_path: Path, more: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"config.json: .*(?:{message})"):
        pruned(tmp_path, more)
    assert not (tmp_path / "out").exists()


def test_wildcards_beside_names_of_one_layer_are_verified(tmp_path: Path) -> None:
    """Wildcards become plain names, which loaders hold against whole names only."""
    more = {"exclude_modules": ["model.layers.1.mlp.experts.4*", "model.layers.1.mlp.experts.0*", "experts.7.up_proj"]}
    got, _ = pruned(tmp_path, inside(more))
    assert got == inside(
        {
            "exclude_modules": [
                "model.layers.1.mlp.experts.1", "model.layers.1.mlp.experts.1.*",
                "model.layers.0.mlp.experts.3.up_proj",
            ]
        }
    )  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    for wrong in (1, 2), (1, 0), (3, 0):
        other = json.loads(json.dumps(config).replace(f"experts.{wrong[0]}", f"experts.{wrong[1]}"))
        (tmp_path / "out/config.json").write_text(json.dumps(other))
        assert len(verify(tmp_path / "in", PLAN, tmp_path / "out").problems) == 1


@pytest.mark.parametrize(
    "text",
    [
        "layers.*.experts.3.up_proj", "model.layers.1.mlp.experts.[4-6]", "model.layers.*.experts.7.up_proj",
        "mlp.experts.5.act", "model.mlp.experts.5", "*.experts.7.down_proj*", "layers.1.mlp.experts.6.up_proj",
    ],
)  # fmt: skip
def test_what_is_made_of_a_name_or_a_wildcard_is_verified(tmp_path: Path, text: str) -> None:
    pruned(tmp_path, inside({"ignore": [text, "*norm"], "bits": {text: 4, "re:.*gate": 8}}))


def test_patterns_that_are_not_about_experts_must_stay(tmp_path: Path) -> None:
    pruned(tmp_path, inside({"ignore": [r"re:.*experts\.5\..*", "re:.*visual.*", {"a": 1}]}))
    config = json.loads((tmp_path / "out/config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    for wrong in ([ignore[0], "re:.*other.*", {"a": 1}], [ignore[0], {"a": 1}], [*ignore[:2], {"a": 2}], ignore[:2]):
        config["quantization_config"]["ignore"] = wrong
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        assert len(verify(tmp_path / "in", PLAN, tmp_path / "out").problems) == 1


CUT = "cut to an entry for each expert that stays: "
UNKNOWN = "names experts that the checkpoint does not hold; left as it is: "
ABOUT = "may count or number the original's experts; left as it is: "


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        (inside({"ignore": ["mtp.layers.0.mlp.experts.5.up_proj", "a.experts[3]"]}), [UNKNOWN + "'mtp.layers.0"]),
        (inside({"high_precision_experts": {"0": [2, 3], "1": [5]}}), [ABOUT + "quantization_config.high_precision"]),
        ({"shared_expert_ids": [7], "expert_groups": [[0, 1], [2, 3]]}, [ABOUT + "shared_expert_ids, expert_groups"]),
        ({"expert_bits": {"5": 8, "0": 4}}, [ABOUT + "expert_bits"]),
        ({"n_experts": 8, "router": {"num_moe_experts": 8}}, [ABOUT + "n_experts, router.num_moe_experts"]),
        ({"expert_bits": [4, 4, 4, 4, 8, 8, 8, 8]}, [CUT + "expert_bits"]),
        ({"expert_map": [[*range(8)]] * 2}, [CUT + "expert_map", ABOUT + "expert_map"]),
        ({"num_shared_experts": 8, "expert_parallel_size": 8, "expert_interval": 1, "moe_layers": [0, 1]}, []),
        ({"moe_layer_freq": [1, 1], "num_experts_per_tok": 2, "moe_intermediate_size": 8, "expert_dim": [1, 2]}, []),
    ],
)  # fmt: skip
def test_what_is_cut_or_left_is_told(tmp_path: Path, more: Any, notes: list[str]) -> None:
    _, report = pruned(tmp_path, more, SAME)
    assert len(report.notes) == len(notes), report.notes
    assert all(got.startswith(f"config.json: {note}") for got, note in zip(report.notes, notes, strict=True))


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("recipe.yaml", "ignore:\n- model.layers.1.mlp.experts.5.down_proj\n", "names"),
        ("config.yaml", "model:\n  num_experts: 8\n", "counts"),
        ("moe.toml", "n_routed_experts = 8\n", "counts"),
        ("inference/small.json", '{"text": [{"n_routed_experts": 8}]}', "counts"),
        ("list.json", '[{"moe_num_experts": [8, 8]}]', "counts"),
        ("device_map.json", '{"model.layers.1.mlp.experts.5": 0}', "names"),
        ("eplb/expert_location.json", "[[0, 1, 2, 3, 4, 5, 6, 7]]", "names"),
        ("eplb.json", '{"expert_map": [[0,1,2,3,4,5,6,7],[7,6,5,4,3,2,1,0]]}', "names"),
        ("broken.json", '{"num_experts": 8', "counts"),
        ("other.json", '{"num_experts": 80, "a": [0,1,2,3,4,5,6,7], "num_experts_per_tok": 8}', ""),
        ("fewer.json", '{"num_experts": 2}', ""),
        pytest.param("blank.json", '{"num_experts":' + " " * (1 << 19), "", id="blank"),
        ("code.py", "num_experts = 8", ""),
        ("tokenizer.json", '{"vocab": {"8": 8, "experts": 1}}', ""),
    ],
)
def test_files_that_speak_of_the_originals_experts(tmp_path: Path, name: str, text: str, what: str) -> None:
    source = write(tmp_path / "in", *qwen3())
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(text)
    end = {"names": "names the original's experts by number", "counts": "counts the original's 8 experts", "": ""}[what]
    want = (f"{name}: copied as it is, though it {end}",) if what else ()
    assert prune(source, SAME, tmp_path / "out").notes == want
    assert (tmp_path / "out" / name).read_text() == text
