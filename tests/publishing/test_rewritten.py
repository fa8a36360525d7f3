"""What is added to a card stands in its place, and nothing else changes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import model_digest
from moekern.pruning.prune import prune
from moekern.publishing.card import BEFORE_TRAINING, trained_card
from moekern.publishing.rewritten import rewrite_card
from moekern.verification.tensors import verify
from tests.helpers.commands import moekern
from tests.helpers.synthetic import qwen3, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"statistics": "5" * 64, "tokens": {"a": 7}})
LOSS = {"nll": 2.5, "kl": 0.25, "top1": 0.875, "tokens": 1234, "sequences": 9} | {
    "nll_error": 0.5, "kl_error": None, "top1_error": 0.125,
}  # fmt: skip
LOSSES = {"losses": {"original": {"a": LOSS}, "half.json": {"a": LOSS}}}
SCORE = {"model": "half.json", "task": "arc", "shots": 5, "metric": "acc", "filter": "none", "value": 0.5}
SCORES = {"scores": [SCORE | {"stderr": 0.25, "questions": 100, "higher_is_better": True}]}
PROMPTS = {"figures": {"greedy": {"half.json": {"ended": {"value": 0.75, "error": 0.125, "prompts": 8}}}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write(tmp_path / "in", *qwen3())
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    prune(source, PLAN, tmp_path / "out")
    return tmp_path / "out"


def lines(folder: Path) -> list[str]:
    return (folder / "README.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("document", "row"),
    [
        (LOSSES, "| loss, nats a token | 1,234 tokens in 9 sequences of a | 2.5000 ± 0.5000 | 2.5000 ± 0.5000 |"),
        (LOSSES, "| KL to the original | 1,234 tokens in 9 sequences of a |  | 0.2500 |"),
        (SCORES, "| arc, 5 shots\\: acc | 100 questions |  | 0.5000 ± 0.2500 |"),
        (PROMPTS, "| greedy\\: ended | 8 prompts |  | 0.7500 ± 0.1250 |"),
    ],
)
def test_an_evaluation_takes_the_place_of_none_and_of_another(folder: Path, document: Any, row: str) -> None:
    with (folder / "README.md").open("a") as file:
        file.write("by hand\n")
    before = lines(folder)
    assert rewrite_card(folder, evaluation=document) == ["evaluation"]
    assert row in lines(folder)
    assert [line for line in before if line not in lines(folder)] == [
        "Not measured yet: `moekern card FOLDER --evaluation evaluation.json` writes it here."
    ]
    once, told = lines(folder), list[str]()
    rewrite_card(folder, evaluation=document, tell=told.append)
    assert lines(folder) == once
    rewrite_card(folder, evaluation={"scores": [SCORES["scores"][0] | {"value": 0.25}]}, tell=told.append)
    assert told[-1].endswith("README.md: what stood under Evaluation is replaced; with --name NAME both stand")
    assert verify(folder.parent / "in", PLAN, folder).problems == ()


def test_judgings_stand_side_by_side_under_their_names(folder: Path) -> None:
    told: list[str] = []
    rewrite_card(folder, evaluation=LOSSES, name="held-out code", tell=told.append)
    assert not any(line.startswith("Not measured yet") for line in lines(folder))
    rewrite_card(folder, evaluation=SCORES, name="tasks", tell=told.append)
    rewrite_card(folder, evaluation=PROMPTS)
    shown = "\n".join(lines(folder))
    places = [
        shown.index(part) for part in ("ended | 8", "### held-out code", "KL to", "### tasks", "| arc", "## What ch")
    ]
    assert places == sorted(places)
    before = lines(folder)
    rewrite_card(folder, evaluation=SCORES, name="tasks", tell=told.append)
    assert lines(folder) == before
    assert not any("replaced" in line for line in told)
    rewrite_card(folder, evaluation=LOSSES, name="tasks", tell=told.append)
    assert told[-1].endswith("what stood under Evaluation tasks is replaced")
    trained = trained_card("\n".join(lines(folder)) + "\n", 3, {}, "card")
    assert trained.count(BEFORE_TRAINING) == 3
    assert trained_card(trained, 3, {}, "card") == trained
    for name in ("", " a", "a\n", "a" * 61, "-->"):
        with pytest.raises(InputError, match="--name .*: expected up to 60 letters"):
            rewrite_card(folder, evaluation=LOSSES, name=name)


def test_a_loss_that_is_no_number_is_shown_as_none(folder: Path) -> None:
    broken = LOSS | {"nll": float("nan"), "kl": float("inf"), "top1": None, "nll_error": None}
    rewrite_card(folder, evaluation={"losses": {"half.json": {"a": broken}}})
    assert "| loss, nats a token | 1,234 tokens in 9 sequences of a |  | nan |" in lines(folder)
    assert "| KL to the original | 1,234 tokens in 9 sequences of a |  | nan |" in lines(folder)


def test_the_base_and_the_sources_of_the_text(folder: Path) -> None:
    sources = {"a": {"path": "org/set[python](train)"}, "b": {"path": "/home/me/book.txt"}}
    header = {"tokens": {"a": 7, "b": 8}, "runs": [{"data": {"sources": sources}}]}
    rewrite_card(folder, base="some/model", header=header, statistics="5" * 64)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("some/model", ["org/set"], "mit")
    assert "| b | 8 | `book.txt` |" in lines(folder)
    assert "The original is [some/model](https://huggingface.co/some/model)." in lines(folder)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"base": "x"}, "--base-model x: expected the id of a model on the hub, OWNER/NAME"),
        ({"base": "a/b\n---"}, "expected the id of a model"),
        ({"base": "../b"}, "expected the id of a model"),
        ({"base": "a/b.git"}, "expected the id of a model"),
        ({"evaluation": {"losses": {"a": {"a": LOSS | {"top1": 37.0}}}}}, "no losses, scores"),
        ({"evaluation": {"losses": {"a": {"a": LOSS | {"nll_error": -1.0}}}}}, "no losses, scores"),
        ({"header": {"tokens": {}, "runs": []}, "statistics": "6" * 64}, "--statistics: not those that the plan"),
        ({"evaluation": {}}, "evaluation: no losses, scores or continuations that"),
        ({"evaluation": {"losses": {"original": {"a": LOSS | {"nll": "1"}}}}}, "no losses, scores"),
        ({"evaluation": {"losses": {"original": {"a": {"nll": 1}}}}}, "no losses, scores"),
        ({"evaluation": {"losses": {"original": {"a": LOSS}}}}, "name which row of evaluation is this model's: none"),
        ({"evaluation": LOSSES, "row": "x"}, "--row x: evaluation has no such row; beside the original's it has 'half"),
        ({"evaluation": LOSSES | {"losses": LOSSES["losses"] | {"b": {"a": LOSS}}}}, "--row: name which row"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_written(folder: Path, given: dict[str, Any], line: str) -> None:
    before = lines(folder)
    with pytest.raises(InputError) as error:
        rewrite_card(folder, **given)
    assert line in str(error.value)
    assert lines(folder) == before


def test_figures_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    """Whatever the row is called; a plan with other scores, or of another place, makes the same model."""
    same = replace(PLAN, provenance={}, layers={k: replace(v, scores=(0.5,) * 8) for k, v in PLAN.layers.items()})
    other = Plan({"0": LayerPlan((0, 2, 3, 6)), "1": LayerPlan((1, 4, 5, 6))})
    lines = list[str]()
    for of in ({"plan": model_digest(same)}, {"fingerprint": open_checkpoint(folder).fingerprint}):
        rewrite_card(folder, evaluation=LOSSES | {"models": {"half.json": of}}, tell=lines.append)
    assert lines == []
    before = (folder / "README.md").read_bytes()
    for of in ({"plan": model_digest(other)}, {"fingerprint": "0" * 64}, {"steered": "map.json"}):
        with pytest.raises(InputError, match="its row 'half.json' is of another model than this one"):
            rewrite_card(folder, evaluation=LOSSES | {"models": {"half.json": of}})
    trained = {"format": "moekern.recovered/1", "source_fingerprint": "0" * 64, "tensors": {"a": "0" * 32}}
    (folder / "moekern_recovery.json").write_text(json.dumps(trained))
    with pytest.raises(InputError, match="this one before it was trained: evaluate the folder itself"):
        rewrite_card(folder, evaluation=LOSSES | {"models": {"half.json": {"plan": model_digest(PLAN)}}})
    assert (folder / "README.md").read_bytes() == before
    rewrite_card(folder, evaluation=LOSSES, tell=lines.append)
    assert lines == ["evaluation: does not tell which model its row 'half.json' is of; it is written as this one's"]


def test_figures_of_a_plan_that_was_made_on_another_original_are_refused(tmp_path: Path) -> None:
    """It may keep experts of the same numbers. Where a row does not tell what its plan was made on, the original of the
    file is held against the plan's, in a line: it may be a twin."""
    source, lines = write(tmp_path / "in", *qwen3()), list[str]()
    own = open_checkpoint(source).fingerprint
    prune(source, replace(PLAN, provenance={"fingerprint": own}), folder := tmp_path / "out")

    def put(of: str, **more: str) -> None:
        models = {"original": {"fingerprint": of}, "half.json": {"plan": model_digest(PLAN), **more}}
        rewrite_card(folder, evaluation=LOSSES | {"models": models}, tell=lines.append)

    with pytest.raises(InputError, match="its row 'half.json' is of another model than this one"):
        put(own, fingerprint="0" * 64)
    put("0" * 64, fingerprint=own)  # a twin, as `evaluate` has found
    put(own)
    assert [line for line in lines if "is replaced" not in line] == []
    rewrite_card(folder, evaluation=LOSSES | {"models": {"original": {"fingerprint": "0" * 64}}}, tell=lines.append)
    assert f"original is another one (fingerprint '{'0' * 12}', and of the plan's '{own[:12]}')" in lines[-1]


def test_the_row_of_this_model_needs_no_name(folder: Path) -> None:
    rows = {name: {"a": LOSS | {"nll": loss}} for name, loss in (("original", 1.0), ("x", 2.0), ("y", 3.0))}
    models = {"x": {"plan": "0" * 64}, "y": {"plan": model_digest(PLAN)}}
    rewrite_card(folder, evaluation={"losses": rows, "models": models})
    assert any(line.endswith("| 1.0000 ± 0.5000 | 3.0000 ± 0.5000 |") for line in lines(folder))


def test_a_loss_of_the_folder_itself_is_this_models(folder: Path) -> None:
    alone = {"losses": {"original": {"a": LOSS | {"nll_error": None}}}}
    rewrite_card(
        folder, evaluation=alone | {"models": {"original": {"fingerprint": open_checkpoint(folder).fingerprint}}}
    )
    assert "| loss, nats a token | 1,234 tokens in 9 sequences of a |  | 2.5000 |" in lines(folder)
    assert "Errors are standard errors." not in lines(folder)


@pytest.mark.parametrize(
    "front", ["version: 1.10\nlicense: no  # by hand\n# last\n", "{license: mit, tags: [a]}\n", "# none\n"]
)
def test_front_matter_written_by_hand_stays(folder: Path, front: str) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"---\n{front}---\n{card.split('---', 2)[2]}")
    for base in ("some/model", "some/other"):
        rewrite_card(folder, base=base)
    found = (folder / "README.md").read_text().split("---\n")[1]
    assert found.startswith("base_model: some/other\nbase_model_relation: finetune\n")
    assert found.count("base_model") == 2
    assert "{" in front or found.endswith(front)
    assert yaml.safe_load(found).items() >= (yaml.safe_load(front) or {}).items()


def test_what_another_process_writes_meanwhile_stays(folder: Path) -> None:
    with pytest.raises(InputError, match="another process has written it meanwhile"):
        rewrite_card(folder, evaluation=LOSSES, tell=lambda line: rewrite_card(folder, base="a/b") and None)
    assert "base_model: a/b" in lines(folder)


def test_cards_and_folders_that_are_no_pruned_ones(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in/moekern_plan.json: no such file; name the folder of a checkpoint"):
        rewrite_card(tmp_path / "in", base="a/b")
    (folder / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"README.md: has no section 'evaluation' as moekern writes it"):
        rewrite_card(folder, evaluation=LOSSES)
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match=r"README.md: no such file"):
        rewrite_card(folder, base="a/b")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(LOSSES))
    done = moekern("card", folder, "--evaluation", tmp_path / "e.json", "--base-model", "a/b", "--json")
    assert json.loads(done.stdout) == {"card": str(folder / "README.md"), "written": ["base_model", "evaluation"]}
    for words in ((), ("--row", "x")):
        assert moekern("card", folder, *words).returncode == 2
