"""Pruned checkpoints give the same greedy tokens in every engine that the rules of `--target` say runs them, and in no
other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
EVERYWHERE = ["demo", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "granitemoe", "cohere2_moe"]
# vLLM's build for CPUs computes the unpruned checkpoints of these otherwise than transformers does, too: latent
# attention in its own way; routers with a selection bias and no groups without the bias, or not at all.
OTHERWISE = ["deepseek_v2", "deepseek_v3", "ernie4_5_moe", "minimax_m2", "lfm2_moe"]
NOT_ASKED = ["dbrx", "granitemoeshared", "llama4_text", "exaone_moe", "qwen3_next", "qwen3_5_moe_text"]  # of vLLM
ENGINES = {"vllm": "vllm", "vllm-0.33": "vllm", "llama.cpp": "llama.cpp"}  # environment -> engine
NAMES = {
    environment: EVERYWHERE if engine == "vllm" else [*EVERYWHERE, *OTHERWISE, *NOT_ASKED]
    for environment, engine in ENGINES.items()
}
CASES = [(environment, f"{name}-{count}") for environment in ENGINES for name in NAMES[environment]
         for count in ("odd", "even")]  # fmt: skip
TIE = 0.02  # logits whose standard deviation is 2: engines may differ about what is nearer


@dataclass
class Pruned:
    """Every case's folder, and what engines say of all of them, asked when the first one is wanted."""

    engines: Engines
    root: Path
    original: Callable[[str], Path]
    made: dict[str, tuple[Path, Greedy]] = field(default_factory=dict)
    found: dict[str, dict[Path, Answer]] = field(default_factory=dict)

    def of(self, case: str) -> tuple[Path, Greedy]:
        """A plan whose model is nowhere undecided, pruned by it, and the tokens that transformers gives."""
        if case in self.made:
            return self.made[case]
        name, _, count = case.rpartition("-")
        source = MODEL if name == DEMO else self.original(name)
        layout = find_layout(open_checkpoint(source))
        kept = layout.num_experts // layout.n_group // 2 + (count == "odd")  # of each group
        for seed in range(20):
            folder = self.root / f"{case}-{seed}"
            prune(source, random_plan(layout, seed, kept), folder)
            tokens = transformers(folder)
            if tokens.margin > TIE:
                return self.made.setdefault(case, (folder, tokens))
        raise AssertionError(f"{case}: every plan has a tie")

    def answer(self, environment: str, folder: Path) -> Answer:
        if environment not in self.found:
            folders = [self.of(case)[0] for where, case in CASES if where == environment]
            if environment == "llama.cpp":
                self.found[environment] = self.engines.llama_cpp(folders)
            else:
                folders += [self.original(name) for name in OTHERWISE] if environment == "vllm" else []
                self.found[environment] = self.engines.vllm(folders, environment)
        return self.found[environment][folder]


@pytest.fixture(scope="module")
def pruned(engines: Engines, tmp_path_factory: pytest.TempPathFactory, original: Callable[[str], Path]) -> Pruned:
    return Pruned(engines, tmp_path_factory.mktemp("pruned"), original)


@pytest.mark.parametrize(("environment", "case"), CASES)
def test_an_engine_agrees_where_the_rules_say_that_it_runs_it(
    environment: str, case: str, pruned: Pruned, needs: Callable[[str], None]
) -> None:
    needs(environment)
    folder, expected = pruned.of(case)
    answer, engine = pruned.answer(environment, folder), ENGINES[environment]
    row = check_folder(folder, [Target(engine)]).found[engine]
    if verdict(row):
        assert answer == expected.tokens
    else:
        assert answer != expected.tokens, f"refused by a rule: {row}"


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_compared_differs_before_it_is_pruned(
    name: str, pruned: Pruned, needs: Callable[[str], None], original: Callable[[str], Path]
) -> None:
    needs("vllm")
    assert pruned.answer("vllm", original(name)) != transformers(original(name)).tokens
