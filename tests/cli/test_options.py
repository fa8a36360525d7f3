"""MODEL on the command line: what a hub id costs each command, and what is refused before the hub is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import families
from tests.helpers.commands import contents, document, model_and_ids, moekern
from tests.helpers.hub import COMMIT, Hub, client, serving

ID = "someone/tiny-moe"
SHARD = ".safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids and a plan."""
    folder = model_and_ids(tmp_path_factory.mktemp("options"))
    layers = {key: {"keep": [0, 3, 4, 7]} for key in "0123"}
    (folder / "plan.json").write_text(json.dumps({"format": "moekern.plan/1", "layers": layers}))
    return folder


@pytest.fixture
def hub(work: Path, tmp_path: Path) -> Iterator[Hub]:
    with serving() as served, client(served, tmp_path / "home"):
        served.add(ID, work / "model")
        yield served


def test_what_headers_tell_needs_no_weights(hub: Hub, work: Path, tmp_path: Path) -> None:
    here, there = document("inspect", work / "model"), document("inspect", ID)
    assert there.pop("model") == f"{ID}@{COMMIT}"
    assert here.pop("model") == here["folder"] == str(work / "model")
    assert {**there, "folder": here["folder"]} == here
    assert document("check", ID)["targets"] == document("check", work / "model")["targets"]
    out = tmp_path / "plan.json"
    fit = ("--criterion", "aimer", "--fit", "400KiB", "--model", ID)
    assert moekern("plan", work / "model", *fit, "--out", out).returncode == 0
    converted = ("convert", work / "plan.json", "--to", "llm-compressor", "--out", tmp_path / "report.json")
    assert moekern(*converted, "--model", ID).returncode == 0
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (work / "model").glob(f"*{SHARD}"))
    assert hub.sent(SHARD) <= headers + 64 * 4096
    assert all(each.status in (302, 206) for each in hub.answers if each.path.endswith(SHARD))
    assert not (tmp_path / "home" / "hub").exists()


def test_a_hub_id_is_pruned_as_its_folder_is(hub: Hub, work: Path, tmp_path: Path) -> None:
    done = moekern("prune", ID, work / "plan.json", "--out", tmp_path / "a", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    assert f"{ID} (commit {COMMIT[:12]})" in done.stderr
    assert "to download in" in done.stderr
    assert moekern("prune", work / "model", work / "plan.json", "--out", tmp_path / "b").returncode == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[name] == b[name] for name in a if name not in ("moekern_manifest.jsonl", "README.md"))
    assert f"https://huggingface.co/{ID})".encode() in a["README.md"]
    hub.forget()
    assert document("verify", ID, work / "plan.json", tmp_path / "a")["good"] is True
    assert hub.sent() == 0


def test_progress_of_a_download_is_json(hub: Hub, work: Path, tmp_path: Path) -> None:
    done = moekern("prune", ID, work / "plan.json", "--out", tmp_path / "a", "--json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {f"reading headers of {ID}", f"downloading {ID}"} <= {line.get("stage") for line in lines}


def test_what_cannot_be_pruned_is_not_downloaded(hub: Hub, work: Path, tmp_path: Path) -> None:
    folder = families.save("qwen3_moe", tmp_path / "dense")
    for path in folder.glob(f"*{SHARD}"):
        path.write_bytes(path.read_bytes().replace(b".experts.", b".exterts.").replace(b".gate.", b".gote."))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".experts.", ".exterts.").replace(".gate.", ".gote."))
    hub.add(ID, folder, "dead" * 10)
    data = ("--data", f"a={work / 'ids.npy'}", "--out", tmp_path / "s.safetensors")
    done = moekern("calibrate", ID, *data)
    assert done.returncode == 2
    assert not (tmp_path / "home" / "hub").exists()


OUT: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "calibrate": lambda work: ("calibrate", ID, "--data", f"a={work / 'ids.npy'}"),
    "iterate": lambda work: ("iterate", ID, "--data", f"a={work / 'ids.npy'}", "--keep", 4),
    "run": lambda work: ("run", ID, "--data", f"a={work / 'ids.npy'}", "--keep", 4),
    "prune": lambda work: ("prune", ID, work / "plan.json"),
    "plan": lambda work: ("plan", work / "model", "--criterion", "aimer", "--keep", 4, "--model", ID),
    "convert": lambda work: ("convert", work / "plan.json", "--to", "moekern", "--model", ID),
}


@pytest.mark.parametrize("command", OUT)
def test_a_target_that_exists_is_refused_before_the_hub_is_asked(
    hub: Hub, work: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "there").touch()
    done = moekern(*OUT[command](work), "--out", tmp_path / "there")
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert hub.answers == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("calibrate", ID, "--data", "a=nowhere.txt", "--out", "OUT"), "no such file or folder"),
        (("evaluate", ID, "--data", "a=nowhere.txt"), "no such file or folder"),
        (("run", ID, "--data", "a=IDS", "--keep", "4", "--device", "tpu", "--out", "OUT"), "--device tpu"),
        (("prune", ID, "no-plan.json", "--out", "OUT"), "no-plan.json"),
        (("calibrate", ID, "--data", "a=IDS", "--replay-tokens", "20", "--out", "OUT"), "20: goes with --tier replay"),
        (("evaluate", ID, "PLAN", "--data", "a=IDS", "--statistics", "PLAN"), "--statistics: no plan that is named"),
        (("verify", ID, "PLAN", "no-folder"), "no-folder: no such folder"),
        (("verify", ID, "no-plan.json", "MODEL"), "no-plan.json"),
    ],
)
def test_other_mistakes_too(hub: Hub, work: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    places = {"OUT": tmp_path / "out", "IDS": work / "ids.npy", "PLAN": work / "plan.json", "MODEL": work / "model"}
    given = [f"a={places['IDS']}" if word == "a=IDS" else places.get(word, word) for word in arguments]
    done = moekern(*given)
    assert done.returncode == 2
    assert words in done.stderr
    assert hub.answers == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", ID, "--revision", "v9"), f"--revision v9: {ID} has no such branch"),
        (("inspect", "MODEL", "--revision", "main"), "only a hub id has revisions"),
        (("plan", "MODEL", "--out", "OUT", "--revision", "main"), "goes with --model"),
        (("inspect", "tiny-moe"), f"did you mean {ID}?"),
    ],
)
def test_one_line_says_what_is_wrong(
    hub: Hub, work: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"OUT": tmp_path / "out.json", "MODEL": work / "model"}
    done = moekern(*(places.get(word, word) for word in arguments))
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_environment_names_the_hub(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, where nothing is patched; and offline afterwards."""
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE")
    plain = {key: value for key, value in os.environ.items() if key not in names}
    environment = {**plain, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "own")}
    command = [sys.executable, "-m", "moekern", "inspect", ID, "--json"]
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"] == f"{ID}@{COMMIT}"
        hub.forget()
    assert hub.answers == []
