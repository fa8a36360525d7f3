"""Families asked for, from the tensors of their published checkpoints: each that is an expert's is found and goes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.numpy import save_file

from moekern.architectures import find_layout
from moekern.architectures.id_tables import replace_experts
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import random_plan
from tests.helpers.published import EXPERTS, PUBLISHED, write

NUMBERED = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
OF_ONE = re.compile(r".*\.experts\.\d+\..*|.*\.tid2eid")
Read = dict[str, tuple[tuple[int, ...], bytes]]


def read(folder: Path) -> Read:
    files = sorted(folder.glob("*.safetensors"))
    return {n: (tuple(t["shape"]), bytes(t["data"])) for f in files for n, t in deserialize(f.read_bytes())}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_belongs_to_experts_goes_with_them_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "in")
    layout = find_layout(open_checkpoint(folder))
    source, plan = read(folder), random_plan(layout, seed=1)
    assert layout.family.name == name
    found = {t.name for layer in (*layout.layers.values(), *layout.mtp.values()) for t in layer.tensors}
    sized = {
        n for n, (shape, _) in source.items() if EXPERTS in shape or NUMBERED.fullmatch(n) or n.endswith("tid2eid")
    }
    assert found == sized

    prune(folder, plan, tmp_path / "out")
    assert verify(folder, plan, tmp_path / "out").problems == ()
    got = read(tmp_path / "out")
    for key, layer in layout.layers.items():
        of_layer = {n for n in got if n.startswith(f"{layer.prefix}.")}
        assert {n: got[n] for n in of_layer} == expected(source, f"{layer.prefix}.", plan.layers[key].keep)
    for layer in layout.mtp.values():
        mine = [(n, shape) for n, (shape, _) in got.items() if n.startswith(f"{layer.prefix}.")]
        numbers = {int(m[2]) for n, _ in mine if (m := NUMBERED.fullmatch(n))}
        assert numbers in (set(), set(range(EXPERTS // 2)))
        assert not [n for n, shape in mine if EXPERTS in shape]
    layers = [*layout.layers.values(), *layout.mtp.values()]
    outside = {n for n in source if not any(n.startswith(f"{layer.prefix}.") for layer in layers)}
    assert all(got[n] == source[n] for n in outside)


def expected(source: Read, prefix: str, keep: tuple[int, ...]) -> Read:
    """A pruned layer, one tensor and one expert at a time."""
    want = {}
    for name, (shape, raw) in source.items():
        numbered = NUMBERED.fullmatch(name)
        if not name.startswith(prefix) or (numbered and int(numbered[2]) not in keep):
            continue
        if numbered:
            want[f"{numbered[1]}{keep.index(int(numbered[2]))}{numbered[3]}"] = shape, raw
        elif name.endswith("tid2eid"):
            ids = np.frombuffer(raw, "<i8").reshape(shape)
            want[name] = shape, remapped(ids, keep).tobytes()
        elif shape[:1] == (EXPERTS,):
            size = len(raw) // EXPERTS
            want[name] = (len(keep), *shape[1:]), b"".join(raw[e * size : (e + 1) * size] for e in keep)
        else:
            want[name] = shape, raw
    return want


def remapped(ids: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    got = replace_experts(ids, keep, EXPERTS)
    for old, new in zip(ids.tolist(), got.tolist(), strict=True):  # kept ones are renumbered, no token has one twice
        assert all(keep.index(e) == n for e, n in zip(old, new, strict=True) if e in keep)
        assert len(set(new)) == len(new)
    return got.astype("<i8")


def test_a_bias_for_images_is_cut_and_text_runs_without_it(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """DeepSeek V4 that sees: transformers builds its text model, which has no place for the second bias."""
    folder = shutil.copytree(family_checkpoint("deepseek_v4"), tmp_path / "in")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    layers = find_layout(open_checkpoint(folder)).layers.values()
    names = [t.name.replace(".weight", ".bias_vl") for layer in layers for t in layer.of_role("router")]
    save_file({name: np.arange(EXPERTS, dtype="<f4") for name in names}, folder / "model-vl.safetensors")
    index["weight_map"] |= dict.fromkeys(names, "model-vl.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layout = find_layout(open_checkpoint(folder))
    plan = random_plan(layout, seed=2)
    prune(folder, plan, tmp_path / "out")
    assert verify(folder, plan, tmp_path / "out").problems == ()
    assert compare_forward(folder, plan, tmp_path / "out").equal
    for i, name in enumerate(names):
        want = np.array(plan.layers[str(i)].keep, "<f4").tobytes()
        assert read(tmp_path / "out")[name] == ((EXPERTS // 2,), want)
    data = TokenData((Batch("a", families.input_ids("deepseek_v4")),), {})
    plain = calibrate(family_checkpoint("deepseek_v4"), data)
    for key, domains in calibrate(folder, data).layers.items():
        assert torch.equal(domains["a"].gated_norm_sum, plain.layers[key]["a"].gated_norm_sum)
