"""`evaluate --continue` and `contrast`: what is shown and written, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.contrast import Contrast
from moekern.plan.document import LayerPlan, Plan
from tests.helpers.commands import document, model_and_ids, moekern


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ids, plans that keep all and three experts, and a map."""
    folder = model_and_ids(tmp_path_factory.mktemp("continuing"))
    layers = find_layout(open_checkpoint(folder / "model")).layers
    for name, keep in {"all": range(8), "three": (1, 2, 6)}.items():
        Plan({key: LayerPlan(tuple(keep)) for key in layers}).save(folder / f"{name}.json")
    Contrast({"1": (0.1, 0.2, 0, 0, 0, 0, 0, 0)}).save(folder / "map.json")
    return folder


def asked(folder: Path, *more: object) -> tuple[object, ...]:
    ids = f"ids={folder / 'ids.npy'}"
    return ("evaluate", folder / "model", *more, "--continue", ids, "--prompts", 6, "--prompt-tokens", 5)


def test_what_is_shown_and_written(folder: Path, tmp_path: Path) -> None:
    plans = folder / "all.json", folder / "three.json"
    command = asked(folder, *plans, "--new-tokens", 12, "--steer", f"{folder / 'map.json'}=1:-2.5")
    found = document(*command, "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found
    figures = found["figures"]
    assert set(figures) == {"greedy", "sampled"}
    assert set(figures["greedy"]) == {"original", *map(str, plans), f"{folder / 'map.json'}=1:-2.5"}
    whole, all_kept, three = (figures["greedy"][name] for name in ("original", *map(str, plans)))
    assert whole["ended"] == all_kept["ended"]
    assert all_kept["identical"]["value"] == 1
    assert three["identical"]["value"] < 1
    assert whole["ended"]["prompts"] == 6
    rows = [row for row in found["continuations"] if row["decoding"] == "greedy" and row["plan"] == str(plans[1])]
    assert np.mean([row["agreed"] for row in rows]) == pytest.approx(three["agreed"]["value"])
    pairs = {(d["decoding"], d["plan"], d["measure"]): d for d in found["differences"]}
    none = pairs["sampled", str(plans[0]), "ended"]
    assert none["mean"] == 0
    assert none["interval"][0] < 0 < none["interval"][1]
    shown = moekern(*command, "--decode", "greedy")
    assert shown.returncode == 0, shown.stderr
    assert "what 6 prompts are continued by" in shown.stdout
    assert "more than the original" in shown.stdout
    assert "--new-tokens 12: loops are seen in 64 tokens or more" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", 3, "--data", "IDS"), "--prompts 3: goes with --continue"),
        (("--decode", "greedy", "--data", "IDS"), "--decode greedy: goes with --continue"),
        (("--continue", "IDS", "--data", "IDS"), "--continue: goes without --data"),
        (("--continue", "IDS", "--tasks", "boolq"), "--continue: goes without --tasks"),
        (("--continue", "missing.txt"), "--continue missing.txt"),
        (("--continue", "IDS", "--out", "x.csv"), "continuations are written as .json"),
        (("--continue", "IDS", "--steer", "none.json=3"), "--steer none.json=3: no such file as none.json"),
        (("--continue", "IDS", "--decode", "beam"), "--decode beam: beam is neither a name"),
        (("--continue", "IDS", "--layers"), "--layers: goes with losses, not with continuations"),
        (("PLAN", "--continue", "IDS", "--spill", "MODEL"), "lies inside the model"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    places = {"IDS": folder / "ids.npy", "MODEL": folder / "model", "PLAN": folder / "all.json"}
    words = [places.get(str(word), word) for word in arguments]
    done = moekern("evaluate", folder / "model", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_contrast_of_statistics(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.random.default_rng(1).integers(16, 20, 400))
    sums, data = tmp_path / "s.safetensors", (f"a={folder / 'ids.npy'}", f"b={tmp_path / 'other.npy'}")
    words = ("--data", data[0], "--data", data[1], "--sequence-length", 40, "--out", sums)
    assert moekern("calibrate", folder / "model", *words).returncode == 0
    found = document("contrast", sums, "--of", "b", "--count", 3, "--out", tmp_path / "map.json")
    first = found["experts"][0]
    assert first["difference"] == pytest.approx(first["of"] - first["against"])
    layers = Contrast.load(tmp_path / "map.json").layers
    assert first["difference"] == max(max(row) for row in layers.values()) == layers[first["layer"]][first["expert"]]
    assert moekern("contrast", sums, "--of", "b", "--out", tmp_path / "map.json").returncode == 2
    assert "--of c: no such domain" in moekern("contrast", sums, "--of", "c").stderr
    steered = moekern(*asked(folder, "--steer", tmp_path / "map.json", "--new-tokens", 4, "--decode", "greedy"))
    assert steered.returncode == 0, steered.stderr
