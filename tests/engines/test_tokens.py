"""Pruned checkpoints give the same greedy tokens in every engine that the rules of `--target` say runs them, and in no
other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.demo import MODEL
from moekern.plan.served import check_folder, verdict
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from tests.helpers.engines import Answer, Engines, Greedy, transformers
from tests.helpers.in_flight import random_plan

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]  # the first test runs an engine for all of them

DEMO = "demo"  # the model that ships
NAMES = """
    demo mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 gpt_oss glm4_moe granitemoe ernie4_5_moe minimax_m2
    lfm2_moe cohere2_moe
"""
CASES = [f"{name}-{count}" for name in NAMES.split() for count in ("odd", "even")]
TIE = 0.02  # logits whose standard deviation is 2: engines may differ about what is nearer
ENGINES = {"vllm": "vllm", "vllm-0.33": "vllm", "llama.cpp": "llama.cpp"}  # environment -> engine


@dataclass
class Pruned:
    """Every case's folder, and what engines say of all of them, asked when the first one is wanted."""

    engines: Engines
    root: Path
    original: Callable[[str], Path]
    found: dict[str, dict[Path, Answer]] = field(default_factory=dict)

    @cached_property
    def expected(self) -> dict[Path, Greedy]:
        return dict(self._case(case) for case in CASES)

    def _case(self, case: str) -> tuple[Path, Greedy]:
        """A plan whose model is nowhere undecided, and the tokens that transformers gives."""
        name, _, count = case.partition("-")
        source = MODEL if name == DEMO else self.original(name)
        layout = find_layout(open_checkpoint(source))
        kept = layout.num_experts // layout.n_group // 2 + (count == "odd")
        for seed in range(20):
            folder = self.root / f"{case}-{seed}"
            prune(source, random_plan(layout, seed, kept), folder)
            if (tokens := transformers(folder)).margin > TIE:
                return folder, tokens
        raise AssertionError(f"{case}: every plan has a tie")

    def answer(self, environment: str, case: str) -> tuple[Path, Answer]:
        folder = next(folder for folder in self.expected if folder.name.rpartition("-")[0] == case)
        if environment not in self.found:
            folders = list(self.expected)
            run = self.engines.llama_cpp if environment == "llama.cpp" else self.engines.vllm
            self.found[environment] = run(folders) if environment == "llama.cpp" else run(folders, environment)
        return folder, self.found[environment][folder]


@pytest.fixture(scope="module")
def pruned(engines: Engines, tmp_path_factory: pytest.TempPathFactory, original: Callable[[str], Path]) -> Pruned:
    return Pruned(engines, tmp_path_factory.mktemp("pruned"), original)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("environment", ENGINES)
def test_an_engine_agrees_where_the_rules_say_that_it_runs_it(
    environment: str, case: str, pruned: Pruned, needs: Callable[[str], None]
) -> None:
    needs(environment)
    folder, answer = pruned.answer(environment, case)
    row = check_folder(folder, [Target(ENGINES[environment])]).found[ENGINES[environment]]
    if verdict(row):
        assert answer == pruned.expected[folder].tokens
    else:
        assert answer != pruned.expected[folder].tokens, f"refused by a rule: {row}"
