"""Quantising after pruning, once: what llama.cpp's quantiser and llm-compressor make of a pruned checkpoint is what
they make of the original, less the experts that were dropped; and it runs."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import Plan
from moekern.plan.served import check_folder, verdict
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from tests.helpers import ROOT, families
from tests.helpers.engine_models import PROMPTS, SIZES, write_tokenizer
from tests.helpers.engines import WORKERS, Engines
from tests.helpers.in_flight import random_plan

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

WIDE = {**SIZES, "moe_intermediate_size": 128}  # groups of 128 numbers share a scale
SCHEMES = ("FP8_DYNAMIC", "W4A16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "whole"
    config = functools.partial(families.configured, "qwen3_moe", **WIDE)
    families.save("qwen3_moe", folder, dtype=torch.bfloat16, config=config)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def plan(whole: Path) -> Plan:
    return random_plan(find_layout(open_checkpoint(whole)), 1, 5)


@pytest.fixture(scope="module")
def pruned(whole: Path, plan: Plan) -> Path:
    prune(whole, plan, whole.with_name("pruned"))
    return whole.with_name("pruned")


def compressed(engines: Engines, source: Path, scheme: str) -> Path:
    """What the example of docs/engines.md makes of a checkpoint, once."""
    out = source.with_name(f"{source.name}-{scheme}")
    if not out.exists():
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engines.md").read_text(), re.DOTALL)
        for name, value in (("MODEL-half-w4a16", out), ("MODEL-half", source), ("W4A16", scheme)):
            assert f'"{name}"' in example
            example = example.replace(f'"{name}"', f'"{value}"')
        done = engines.run("llm-compressor", "python", "-c", example)
        assert done.returncode == 0, done.stderr
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_llm_compressor_before_and_after_pruning(
    scheme: str, engines: Engines, needs: Callable[[str], None], whole: Path, plan: Plan, pruned: Path
) -> None:
    """Byte for byte, and config.json too."""
    needs("llm-compressor")
    after, before = compressed(engines, pruned, scheme), whole.with_name(f"before-{scheme}")
    prune(compressed(engines, whole, scheme), plan, before)
    expected, found = tensors(after), tensors(before)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
    assert json.loads((before / "config.json").read_text()) == json.loads((after / "config.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compressed_checkpoint_runs(
    scheme: str, engines: Engines, needs: Callable[[str], None], pruned: Path
) -> None:
    """In transformers; vLLM's CPU build has no kernels for such experts."""
    needs("llm-compressor")
    folder, ids = compressed(engines, pruned, scheme), torch.tensor(PROMPTS[:1])
    assert verdict(check_folder(folder, [Target("transformers")]).found["transformers"])
    rounded, plain = (families.forward(families.load(each), ids).flatten() for each in (folder, pruned))
    assert torch.cosine_similarity(rounded, plain, dim=0) > 0.5  # 0.95 of FP8, 0.70 of 4 bits; of other models near 0


@pytest.mark.parametrize("kind", ["q8_0", "Q4_K_M"])  # what the converter writes itself, and what the quantiser makes
def test_gguf_before_and_after_pruning(
    kind: str, engines: Engines, needs: Callable[[str], None], whole: Path, plan: Plan, pruned: Path
) -> None:
    """Each expert that stays has the bytes that it has in the original's file."""
    needs("llama.cpp")
    held = {}
    for folder in (whole, pruned):
        outtype = kind if kind == "q8_0" else "f32"
        (made,) = engines.lines("llama.cpp", WORKERS / "convert_worker.py", outtype, "", folder)
        out = Path(made["file"])
        if kind != outtype:
            out = out.with_suffix(f".{kind}.gguf")
            (library,) = engines.root.glob("llama.cpp/node_modules/@node-llama-cpp/*/bins/*")
            done = engines.run("llama.cpp", "python", WORKERS / "quantise_worker.py", library, made["file"], out, kind)
            assert done.returncode == 0, done.stderr
        (held[folder],) = engines.lines("llama.cpp", WORKERS / "gguf_worker.py", out)
    assert held[whole].keys() == held[pruned].keys()
    for name, (stored, *experts) in held[whole].items():
        assert stored.startswith("Q"), name
        assert held[pruned][name] == [stored, *(experts[e] for e in plan.layers[name.split(".")[1]].keep)]
    assert isinstance(engines.gguf([out])[out], list)
