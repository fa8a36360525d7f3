"""Scores at tasks of lm-evaluation-harness, against the harness's own model of the checkpoint in memory."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.demo import MODEL
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.tasks import Asked, harness, scores, task_scores
from tests.helpers.asked import KINDS, save_tasks
from tests.helpers.commands import document, moekern

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
EXACT = Compute("cpu", torch.float32)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever asks for a network fails, though no setting says that there is none."""
    import datasets
    import huggingface_hub.constants as hub

    def refused(*arguments: Any) -> Any:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for where in (hub, datasets.config):
        monkeypatch.setattr(where, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan, and the checkpoint that it makes."""
    plan = Plan({key: LayerPlan(tuple(range(0, 16, 2))) for key in find_layout(open_checkpoint(MODEL)).layers}, {})
    folder = tmp_path_factory.mktemp("pruned") / "half"
    prune(MODEL, plan, folder)
    return plan, folder


def test_scores_are_those_of_the_harness_on_the_pruned_checkpoint(
    half: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    plan, folder = half
    tasks = save_tasks(tmp_path / "tasks")
    texts = list[Any]()
    written = harness.written
    monkeypatch.setattr(harness, "written", lambda *given: texts.append(written(*given)) or texts[-1])
    opened, open_once = list[Path](), scores.open_layerwise
    monkeypatch.setattr(scores, "open_layerwise", lambda c, *more: opened.append(c.folder) or open_once(c, *more))
    found = task_scores(MODEL, {"half": plan}, Asked(tuple(KINDS), tasks, (2,), seed=3), EXACT)
    assert {score.model for score in found} == {"original", "half"}
    assert opened == [MODEL]  # for all models that write
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = simple_evaluate(
        HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder)),
        tasks=list(KINDS), num_fewshot=2, log_samples=True, fewshot_random_seed=harness.FEWSHOT_SEED + 3,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    mine = [score for score in found if score.model == "half"]
    assert [score.task for score in mine] == ["little_choice", "little_choice", "little_writing", "little_text"]
    for score in mine:
        assert score.value == pytest.approx(float(want["results"][score.task][f"{score.metric},none"]), rel=1e-4)
        if score.task == "little_choice":
            assert score.stderr == pytest.approx(want["results"][score.task][f"{score.metric}_stderr,none"])
        assert (score.shots, score.questions) == (2, 9)
    samples = want["samples"]["little_writing"]
    assert [texts[-1][key] for key in texts[-1]] == [each["resps"][0][0] for each in samples]
    assert texts[0] != texts[-1]  # of the original


def test_the_command_scores_the_original_plans_and_folders(half: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, folder = half
    plan.save(tmp_path / "half.json")
    tasks = save_tasks(tmp_path / "tasks")
    command = ("evaluate", MODEL, tmp_path / "half.json", folder, "--tasks", "little_choice", "--task-dir", tasks)
    found = document(*command, "--shots", "0,1", "--limit", 5, "--out", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    each_score: Any = found["scores"]
    assert {each["questions"] for each in each_score} == {5}
    by = {(each["model"], each["shots"], each["metric"]): each["value"] for each in each_score}
    for shots in (0, 1):
        for metric in ("acc", "acc_norm"):
            assert by[str(tmp_path / "half.json"), shots, metric] == by[str(folder), shots, metric]
    assert len(by) == 3 * 2 * 2
    table = moekern(*command)
    assert table.returncode == 0, table.stderr
    assert "original" in table.stdout
    assert "±" in table.stdout


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    tasks = save_tasks(tmp_path / "tasks")
    own = ("evaluate", MODEL, "--task-dir", tasks, "--tasks")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.yaml").write_text(
        "task: remote\ndataset_path: someone/something\noutput_type: multiple_choice\ntest_split: test\n"
    )
    missing = save_tasks(tmp_path / "missing")
    (missing / "rows.jsonl").unlink()
    refused = {
        (*own, "little_choise"): "little_choise: no such task; did you mean little_choice.; .* has little_choice, ",
        (*own, "little_choice", "--shots", "99"): "task little_choice: ",
        (*own[:3], tmp_path / "hub", "--tasks", "remote"): "task remote: .*someone/something",
        (*own[:3], missing, "--tasks", "little_choice"): "task little_choice: .*rows.jsonl",
    }
    for command, words in refused.items():
        done = moekern(*command)
        assert done.returncode == 2, (command, done)
        assert re.search(words, done.stderr.splitlines()[-1]), done.stderr
    (tasks / "broken.yaml").write_text("task: [unclosed\n")
    done = moekern(*own, "little_choice")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "broken.yaml: a task file that cannot be read" in done.stderr


def test_a_task_whose_file_takes_no_examples_says_so(tmp_path: Path) -> None:
    tasks = save_tasks(tmp_path / "tasks", num_fewshot=0)
    said: list[str] = []
    found = task_scores(MODEL, {}, Asked(("little_choice",), tasks, (2,), limit=2), EXACT, tell=said.append)
    assert [score.shots for score in found] == [0, 0]
    assert any("--shots 2 is 0 for it" in line for line in said)


def test_answers_that_are_written_need_the_layers_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.recovery import loaded

    monkeypatch.setattr(loaded, "SHARE", 1 << 40)
    tasks = save_tasks(tmp_path / "tasks")
    with pytest.raises(InputError, match="token by token, which needs all layers in memory"):
        task_scores(MODEL, {}, Asked(("little_writing",), tasks, limit=1), EXACT)
