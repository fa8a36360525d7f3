"""What a card tells of a pruned checkpoint is so, whatever names and texts the original brings along."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import merge_recipe
from moekern.plan.replacement import Replacement
from moekern.pruning.prune import prune
from moekern.publishing.card import About, Facts, card
from tests.helpers.synthetic import deepseek_v3, qwen3, read, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"criterion": "reap", "tokens": {"a": 12345}})
COMMIT = "c0ffee" * 6 + "c0ff"


def card_of(source: Path, plan: Plan, out: Path, **more: Any) -> str:
    prune(source, plan, out, **more)
    ModelCard.load(out / "README.md")  # raises for front matter that is none
    return (out / "README.md").read_text()


def used_by_a_token(folder: Path, experts: int) -> tuple[str, str]:
    """Parameters, and those that a token uses, as a card has them."""
    found = {name: math.prod(shape) for name, (_, shape, _) in read(folder).items()}
    routed = sum(n for name, n in found.items() if ".experts." in name)
    top_k = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    whole = sum(found.values())
    return f"{whole:,}", f"{whole - routed * (experts - top_k) // experts:,}"


def test_sizes_layers_settings_and_method_are_those_of_the_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3())
    card = card_of(source, PLAN, tmp_path / "out")
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card, re.MULTILINE))
    (whole, used), (left, still) = used_by_a_token(source, 8), used_by_a_token(tmp_path / "out", 4)
    assert rows["parameters"] == f"{whole} | {left}"
    assert rows["of these used by a token"] == f"{used} | {still}"
    assert rows["0 to 1 \\(2 layers\\)"] == "8 | 4"
    assert rows["`num_experts`"] == "`8` | `4`"
    assert rows["criterion"] == "`reap`"
    assert rows["a"] == "12,345"
    assert rows["sha256 of the plan"] == f"`{PLAN.digest}`"


def test_layers_that_keep_other_numbers_have_rows_of_their_own(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3())
    plan = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4))}, {"allow_nonuniform": True})
    card = card_of(source, plan, tmp_path / "out")
    assert "| 0 | 8 | 4 |\n| 1 | 8 | 2 |\n" in card
    assert "2 to 4 of 8 experts" in card
    assert "No engine is known whose rules it passes" in card


@pytest.mark.parametrize("mtp", ["prune", "drop"])
def test_mtp_layers_are_told(tmp_path: Path, mtp: Any) -> None:
    source = write(tmp_path / "in", *deepseek_v3())
    plan = Plan({"1": LayerPlan((0, 3, 5, 6)), "2": LayerPlan((1, 2, 4, 7))})
    assert {"prune": "those with the largest router rows", "drop": "removed"}[mtp] in card_of(
        source, plan, tmp_path / "out", mtp=mtp
    )


def test_a_model_of_the_hub_is_named_and_stays_so_when_it_is_pruned_again(tmp_path: Path) -> None:
    """With its license, from the folder's place in the hub's cache, and then from the card."""
    source = write(tmp_path / f"models--some--model/snapshots/{COMMIT}", *qwen3())
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: its own\ntags: [x]\n---\n# Model\n")
    card = card_of(source, PLAN, tmp_path / "out")
    assert f"https://huggingface.co/some/model) at commit `{COMMIT}`" in card
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("some/model", "finetune")
    assert (data.license, data.license_name) == ("other", "its own")
    assert data.tags == ["moe", "expert-pruning", "pruned", "moekern"]
    again = card_of(tmp_path / "out", Plan({"0": LayerPlan((0, 1)), "1": LayerPlan((2, 3))}), tmp_path / "twice")
    assert ModelCard(again).data.base_model == "some/model"
    assert ModelCard(again).data.license == "other"


NEXT = list(zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True))
BOMB = "a: &a [x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in NEXT)
MERGES = "a: &a {k: v}\n" + "".join(f"{new}: &{new} {{<<: [*{old}, *{old}]}}\n" for old, new in NEXT)
HOSTILE = {
    "an object": "license: !!python/object/apply:os.system ['touch owned']",
    "a bomb": f"{BOMB}license: *z",
    "merged bombs": f"{MERGES}license: mit",
    "nested": f"license: {'[' * 5000}",
    "long": f"license: mit\nmore: {'x' * 70_000}",
    "no mapping": "- license",
    "odd values": "license: {a: b}\nlanguage: [1, 2]\nlibrary_name: \"a\\nb\"",
    "twice": "license: mit\nlicense: gpl",
    "numbers": f"license: {'9' * 5000}",
    "not closed": "license: [",
}  # fmt: skip


@pytest.mark.parametrize("front", HOSTILE.values(), ids=HOSTILE)
def test_front_matter_that_is_odd_is_not_taken_over(tmp_path: Path, front: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in", *qwen3())
    (source / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    data = ModelCard(card_of(source, PLAN, tmp_path / "out")).data.to_dict()
    assert data == {"tags": ["moe", "expert-pruning", "pruned", "moekern"]}
    assert not (tmp_path / "owned").exists()


ATTACK = "x`|*_<script>alert(1)</script>\n\n# no\n<!-- /moekern: text -->[a](javascript:b)"


def test_names_and_values_are_shown_and_mean_nothing(tmp_path: Path) -> None:
    """Of plan, statistics, evaluation, config and folder: no line of theirs begins one, and no tag is left."""
    config, tensors = qwen3()
    source = write(tmp_path / "in", config | {"num_experts": 8, "quant": {ATTACK: "8"}}, tensors)
    (source / "README.md").write_text('---\nlicense: "---"\nlicense_link: javascript:x\nlibrary_name: <b>\n---\n')
    provenance = {
        "criterion": ATTACK, "guards": {ATTACK: ATTACK}, "budget": {"kind": ATTACK}, "tokens": {ATTACK: ATTACK},
        "statistics": ATTACK, "optimise": ATTACK, "seed": ATTACK,
    }  # fmt: skip
    plan = replace(PLAN, provenance=provenance)
    loss = {name: 1.0 for name in ("nll", "kl", "top1", "nll_error", "kl_error", "top1_error")} | {
        "tokens": 3, "sequences": 2,
    }  # fmt: skip
    header = {"tokens": {ATTACK: 5}, "runs": [{"data": {"sources": {ATTACK: {"path": f"/home/me/{ATTACK}"}}}}]}
    evaluation = {"losses": {"original": {ATTACK: loss}, ATTACK: {ATTACK: loss}}}
    about = About(evaluation=evaluation, header=header)
    card = card_of(source, plan, tmp_path / "out", about=about)
    assert ModelCard(card).data.to_dict().keys() == {"license", "tags"}
    text = re.sub(r"(?<!\\)`[^`\n]*`", "", ModelCard(card).text)  # without what stands between backticks
    assert not re.search(r"<(?!!-- /?moekern: \w+ -->$)", text, re.MULTILINE)
    assert "/home/me" not in card
    assert "](javascript" not in text
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("<!-- /moekern")] == [
        f"<!-- /moekern: {name} -->" for name in ("base", "text", "evaluation", "training")
    ]
    assert "# no" not in lines
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):  # every row of a table has as many cells
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_how_to_make_it_again_is_told_of_each_kind_of_plan(tmp_path: Path) -> None:
    """Nothing is said to be fitted that was merged."""
    fingerprint = open_checkpoint(write(tmp_path / "in", *qwen3())).fingerprint
    groups = (((0, 1.0), (1, 1.0)), *(((e, 1.0),) for e in (2, 3, 7)))
    merging = Plan({**PLAN.layers, "0": LayerPlan((0, 2, 3, 7), groups=groups)})
    told = {"layers": {"0": {}}}
    merged = replace(merging, provenance={"refit": told | {"recipe": merge_recipe(merging, fingerprint)}})
    plain = Facts("m", None, None, fingerprint, {"0": (8, 4)}, 2, (4, 4), None, (2, 1), (), PLAN, "", {}, None)
    refitted = replace(PLAN, provenance={"refit": told | {"recipe": "1" * 64}})
    constants = replace(PLAN, replace=Replacement("mean"))
    for facts, line in (
        (plain, "prune ORIGINAL plan.json --out OUT"),
        (replace(plain, flags=("--mtp", "drop")), "prune ORIGINAL plan.json --mtp drop --out OUT"),
        (replace(plain, plan=constants), "prune ORIGINAL plan.json --statistics s.safetensors --out OUT"),
        (replace(plain, plan=refitted), "refit ORIGINAL plan.json --data TEXT --out OUT"),
        (replace(plain, plan=merged), "merge-experts ORIGINAL --plan plan.json --out OUT"),
    ):
        assert f"```bash\nmoekern {line}\n```" in card(facts)
        assert ("| fitted anew |" in card(facts)) == (facts.plan is refitted)
