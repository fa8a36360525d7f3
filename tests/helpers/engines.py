"""Greedy tokens of checkpoints in transformers, and in engines that lie in environments of their own, which
tests/engines/setup.sh makes."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moekern.plan.served import check_folder
from moekern.plan.targets import Target
from tests.helpers import ROOT, families
from tests.helpers.engine_models import LENGTH, NEW_TOKENS, PROMPTS

WORKERS = ROOT / "tests" / "engines"
LLAMA, NO_MTP = Target("llama.cpp"), "--no-mtp"
Answer = list[list[int]] | str  # tokens of each prompt, or why there are none
# vLLM alone would take half of the memory for its cache; one process, nothing asked of a network.
SURROUNDINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Engines:
    """The folder of the environments."""

    root: Path

    def has(self, environment: str) -> bool:
        return (self.root / environment / ".ready").exists()

    def vllm(
        self, folders: Sequence[Path], environment: str = "vllm", dtype: str = "float32", **options: Any
    ) -> dict[Path, Answer]:
        """What vLLM says of each folder."""
        request = _asked(dtype=dtype, options=options, folders=list(map(str, folders)))
        return _answers(self.lines(environment, WORKERS / "vllm_worker.py", json.dumps(request)), "folder")

    def llama_cpp(self, folders: Sequence[Path]) -> dict[Path, Answer]:
        """What llama.cpp says of each folder, converted to float32 with what the rules ask for."""
        made = []
        for option in ("", NO_MTP):
            asked = [folder for folder in folders if _waits(folder) == bool(option)]
            made += self.lines("llama.cpp", WORKERS / "convert_worker.py", "f32", option, *asked) if asked else []
        files = {line["file"]: Path(line["folder"]) for line in made if "file" in line}
        found: dict[Path, Answer] = {Path(line["folder"]): line["error"] for line in made if "error" in line}
        return found | {files[str(file)]: answer for file, answer in self.gguf(list(map(Path, files))).items()}

    def gguf(self, files: Sequence[Path]) -> dict[Path, Answer]:
        """What llama.cpp says of each file."""
        found, left = dict[Path, Answer](), list(files)
        while left:  # what llama.cpp does not take may end the process
            request = _asked(packages=str(self.root / "llama.cpp"), files=list(map(str, left)))
            done = self._run("node", WORKERS / "llama_worker.mjs", json.dumps(request))
            found |= _answers(map(json.loads, done.stdout.splitlines()), "file")
            left = [file for file in left if file not in found]
            if left:
                found[left.pop(0)] = f"died of signal {-done.returncode}: {done.stderr.strip()}"
        return found

    def lines(self, environment: str, *command: object) -> list[Any]:
        """The JSON lines that a script of tests/engines/ says in an environment."""
        done = self.run(environment, "python", *command)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def run(self, environment: str, *command: object) -> subprocess.CompletedProcess[str]:
        """A program of an environment, by its name, with these arguments."""
        program, *arguments = command
        return self._run(self.root / environment / "bin" / str(program), *arguments)

    def _run(self, *command: object) -> subprocess.CompletedProcess[str]:
        surroundings = {**os.environ, **SURROUNDINGS}
        return subprocess.run(list(map(str, command)), env=surroundings, capture_output=True, text=True)


@dataclass(frozen=True)
class Greedy:
    """The likeliest tokens after each prompt, and by how much at least the second was less likely, in logits."""

    tokens: list[list[int]]
    margin: float


def greedy(model: PreTrainedModel) -> Greedy:
    """What transformers goes on with, by whole forward passes."""
    ids, margin = [list(prompt) for prompt in PROMPTS], math.inf
    for _ in range(NEW_TOKENS):
        for each in ids:
            best = families.forward(model, torch.tensor([each]))[0, -1].float().topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            each.append(int(best.indices[0]))
    return Greedy([each[len(prompt) :] for each, prompt in zip(ids, PROMPTS, strict=True)], margin)


def transformers(folder: Path) -> Greedy:
    """The same of a checkpoint, in float32."""
    return greedy(families.load(folder))


def _waits(folder: Path) -> bool:
    """Whether the rules tell to convert without MTP layers."""
    return any(f"convert with {NO_MTP}" in finding.text for finding in check_folder(folder, [LLAMA]).found["llama.cpp"])


def _asked(**more: Any) -> dict[str, Any]:
    return {"prompts": PROMPTS, "tokens": NEW_TOKENS, "length": LENGTH, **more}


def _answers(lines: Iterable[Mapping[str, Any]], key: str) -> dict[Path, Answer]:
    return {Path(line[key]): line.get("tokens") or line["error"] for line in lines}
