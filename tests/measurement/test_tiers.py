"""Each tier on tiny real models, against a literal computation on the whole model in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moekern
from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.criteria import CRITERIA
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.measurement.replay import sample
from moekern.measurement.weights import weigh_layer
from moekern.model.compute import Compute
from moekern.model.experts import experts_of
from moekern.model.masking import masked
from moekern.model.transformers_api import loader_of, router_modules
from moekern.statistics.file import Statistics, merge
from moekern.statistics.layer import TIERS
from tests.helpers import families
from tests.helpers.measured import close, differences

MakeCheckpoint = Callable[[str], Path]
E, K = families.EXPERTS, families.TOP_K
# Softmax with and without renormalisation, sigmoid with groups and a bias, biased experts, softmax after the choice.
NAMES = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "minimax_m2"]


@dataclass(frozen=True)
class Whole:
    """One MoE layer of a model run in memory: what its experts were called with, and every expert's output."""

    hidden: Tensor  # [T, H]
    ids: Tensor  # [T, K]
    gates: Tensor  # [T, K] float64
    logits: Tensor  # [T, E] float64
    y: Tensor  # [T, E, H] float64

    def dense(self, ids: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
        """[T, E] gates, 0 where not chosen."""
        ids, gates = self.ids if ids is None else ids, self.gates if gates is None else gates
        return torch.zeros(len(ids), E, dtype=torch.float64).scatter(1, ids, gates)


@torch.no_grad()
def called(model: Any, layer: torch.nn.Module, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, ids, gates and router logits of one layer."""
    seen: dict[str, Any] = {}
    experts = experts_of(layer)
    assert experts is not None
    ((path, index),) = router_modules(layer, model).items()
    with ExitStack() as stack:
        hook = experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
        stack.callback(hook.remove)
        hook = layer.get_submodule(path).register_forward_hook(lambda module, args, out: seen.update(out=out))
        stack.callback(hook.remove)
        families.forward(model, token_ids)
    hidden, ids, gates = seen["args"]
    logits = seen["out"][index] if isinstance(seen["out"], tuple) else seen["out"]
    return hidden, ids, gates.double(), logits.reshape(-1, E).double()


@torch.no_grad()
def whole(model: Any, layer: torch.nn.Module, token_ids: Tensor) -> Whole:
    hidden, ids, gates, logits = called(model, layer, token_ids)
    T = len(hidden)
    y = [experts_of(layer)(hidden, torch.full((T, 1), e), torch.ones(T, 1)) for e in range(E)]  # type: ignore[misc]
    return Whole(hidden, ids, gates, logits, torch.stack(y, 1).double())


class Case:
    """A family's last layer, streamed and in memory, over the same batches."""

    def __init__(self, name: str, folder: Path, model: Any, tiers: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        self.name, self.seeds = name, seeds
        self.token_ids = [families.input_ids(name, 2, 12, seed) for seed in seeds]
        self.data = TokenData(tuple(Batch("text", ids) for ids in self.token_ids), {})
        self.statistics = calibrate(folder, self.data, Compute(dtype=torch.float32), tiers=tiers)
        self.key = list(self.statistics.layers)[-1]
        self.sums = self.statistics.layer(self.key)
        self.model = model
        self.layout = find_layout(open_checkpoint(folder))
        self.loader = loader_of(self.model)
        self.layer = self.loader.decoder_layers()[1][self.loader.moe_places(self.layout)[self.key]]

    def gates_without(self, token_ids: Tensor, dropped: list[int]) -> Tensor:
        """[T, E] of the masked model: what comes before the layer is not changed by it."""
        with masked(self.loader, self.layout, {self.key: dropped}):
            _, ids, gates, _ = called(self.model, self.layer, token_ids)
        found = torch.zeros(len(ids), E, dtype=torch.float64).scatter(1, ids, gates)
        found[:, dropped] = 0
        return found


MakeCase, Runs = Callable[..., Case], Callable[[Case], list[Whole]]


@pytest.fixture
def case(family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]) -> MakeCase:
    """case(name, *tiers, seeds) -> the family's last layer."""

    def make(name: str, *tiers: str, seeds: tuple[int, ...] = (1, 2)) -> Case:
        return Case(name, family_checkpoint(name), whole_model(name), tiers, seeds)

    return make


@pytest.fixture(scope="module")
def runs() -> Runs:
    """runs(case) -> that layer of the model in memory, a batch each, run once for the tests of a family."""
    held: dict[tuple[str, int], Whole] = {}

    def make(case: Case) -> list[Whole]:
        for seed, ids in zip(case.seeds, case.token_ids, strict=True):
            if (case.name, seed) not in held:
                held[case.name, seed] = whole(case.model, case.layer, ids)
        return [held[case.name, seed] for seed in case.seeds]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_coalitions_and_logits(name: str, case: MakeCase, runs: Runs) -> None:
    it = case(name, "vocabulary", "token_counts", "coalitions")
    counts = torch.zeros(E, 64 * it.sums.vocabulary.shape[1], dtype=torch.int64)
    seen = torch.zeros(E, 64 * it.sums.vocabulary.shape[1], dtype=torch.bool)
    sets: Counter[tuple[int, ...]] = Counter()
    gram = torch.zeros(E, E, dtype=torch.float64)
    for token_ids, run in zip(it.token_ids, runs(it), strict=True):
        for token, ids in zip(token_ids.reshape(-1).tolist(), run.ids.tolist(), strict=True):
            seen[ids, token] = True
            counts[ids, token] += 1
            sets[tuple(sorted(ids))] += 1
        gram += run.logits.T @ run.logits
    bits = it.sums.vocabulary[:, :, None] >> torch.arange(64) & 1
    assert torch.equal(bits.reshape(E, -1).bool(), seen)
    assert torch.equal(it.sums.token_count, counts)
    assert it.sums.vocabulary.shape == (E, -(-families.VOCAB // 64))
    assert it.sums.coalitions.tolist() == [[*ids, n] for ids, n in sorted(sets.items())]
    close(it.sums.logit_gram, gram)
    assert it.sums.tiers == ("vocabulary", "token_counts", "coalitions")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.whole)])
def test_constants(name: str, case: MakeCase, runs: Runs) -> None:
    """Sums of gate^2 x output and of gate^2: their ratio is nearest to the outputs by gate^2."""
    it = case(name, "constants", "dimensions")
    value, weight, plain = torch.zeros(E, families.HIDDEN).double(), torch.zeros(E).double(), 0
    for run in runs(it):
        square = run.dense().square()
        value += torch.einsum("te,teh->eh", square, run.y)
        weight += square.sum(0)
        plain = plain + torch.einsum("te,teh->eh", (square > 0).double(), run.y)
    close(it.sums.gated_value_sum, value)
    close(it.sums.gated_value_weight, weight)
    close(it.sums.value_sum, plain)
    assert it.sums.tiers == ("dimensions", "constants")


@torch.no_grad()
def test_stream(case: MakeCase) -> None:
    """The energy of what goes into the norm whose output the experts are given."""
    it, energy, seen = case("qwen3_moe", "stream"), 0.0, list[Tensor]()
    hook = it.layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for token_ids in it.token_ids:
        families.forward(it.model, token_ids)
    hook.remove()
    for hidden in seen:
        for row in hidden.reshape(-1, families.HIDDEN).double():
            energy += float((row * row).sum())
    assert float(it.sums.stream_square_sum) == pytest.approx(energy, rel=1e-5)
    assert int(it.sums.residual_tokens) == int(it.sums.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_reap(name: str, case: MakeCase, runs: Runs) -> None:
    it = case(name, "reap")
    renormalised, count, compat = (torch.zeros(E, dtype=torch.float64) for _ in range(3))
    for run in runs(it):
        norm, gates = run.y.norm(dim=2), run.dense()
        renormalised += (gates / gates.sum(1, keepdim=True) * norm).sum(0)
        for t, logits in enumerate(run.logits):
            for e in logits.topk(K).indices.tolist():
                count[e] += 1
                compat[e] += logits.softmax(0)[e] * norm[t, e]
    close(it.sums.renormalised_norm_sum, renormalised)
    assert torch.equal(it.sums.compat_count.double(), count)
    close(it.sums.compat_gated_norm_sum, compat)
    assert torch.equal(it.sums.compat_count, it.sums.count) != (name in ("deepseek_v3", "minimax_m2"))


@pytest.mark.parametrize("name", NAMES)
def test_outliers(name: str, case: MakeCase, runs: Runs) -> None:
    it = case(name, "outliers")
    for e in range(E):
        rows = torch.cat([run.y[(run.ids == e).any(1), e] for run in runs(it)])
        far = ((rows - rows.mean()).abs() > 3 * rows.std(correction=0)).sum() if len(rows) else 0
        assert int(it.sums.outlier_sum[e]) == int(far)
    assert int(it.sums.outlier_sum.sum()) > 0
    assert it.sums.tiers == ("dimensions", "outliers")


@pytest.mark.parametrize("name", NAMES)
def test_replay(name: str, case: MakeCase, runs: Runs) -> None:
    it = case(name, "replay", seeds=(1,))
    s, run, token_ids = it.sums, runs(it)[0], it.token_ids[0]
    T, H = len(run.y), run.y.shape[2]
    assert int(s.replay_tokens) == T
    close(s.output_sum, run.y.sum(0))
    close(s.scored_output_sum, (run.logits.softmax(1)[..., None] * run.y).sum(0))
    close(s.output_gram, torch.einsum("tih,tjh->ij", run.y, run.y))
    unit = run.y / run.y.norm(dim=2, keepdim=True)
    close(s.output_cosine, torch.einsum("tih,tjh->ij", unit, unit))
    gates = run.dense()
    lost = torch.zeros(T, E, H, dtype=torch.float64)
    for e in range(E):
        change = gates - it.gates_without(token_ids, [e])
        mine = (run.ids == e).any(1)
        lost[mine, e] = torch.einsum("te,teh->th", change[mine], run.y[mine])
    close(s.deletion_norm_sum, lost.norm(dim=2).sum(0))
    close(s.deletion_gram, torch.einsum("tih,tjh->ij", lost, lost))
    close(s.deletion_sum, lost.sum(0))
    expected = torch.zeros(1 << E, dtype=torch.float64)
    kept_sets = [0, 1, 1 << 5, 3, 0b10010100, 0b11100111, 0b01111111, (1 << E) - 1]
    for kept in kept_sets:
        dropped = [e for e in range(E) if not kept >> e & 1]
        change = gates - (it.gates_without(token_ids, dropped) if E - len(dropped) >= K else 0)
        expected[kept] = torch.einsum("te,teh->th", change, run.y).square().sum()
    close(s.subset_loss[kept_sets], expected[kept_sets])
    assert float(s.subset_loss[-1]) == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gpt_oss"])
def test_the_residual_stream(name: str, case: MakeCase) -> None:
    """h is what the block's input was before its norm; the sum weighs a token by how far the experts turn it."""
    it = case(name)
    norm = next(child for n, child in it.layer.named_children() if n in ("post_attention_layernorm", "norm"))
    expected, seen = torch.zeros(E, dtype=torch.float64), list[Tensor]()
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    for token_ids in it.token_ids:
        run = whole(it.model, it.layer, token_ids)
        h, gates = seen.pop(), run.dense()
        turn = 1 - torch.cosine_similarity(h, h + torch.einsum("te,teh->th", gates, run.y), dim=1)
        expected += (gates * run.y.norm(dim=2) * turn.clamp(min=0)[:, None]).sum(0)
    handle.remove()
    assert int(it.sums.residual_tokens) == int(it.sums.tokens)
    close(it.sums.residual_sum, expected)


def test_weights(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("qwen3_moe")
    statistics = calibrate(folder, _two_domains("qwen3_moe"), tiers=("weights",))
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    for key, layer in layout.layers.items():
        expected = weigh_layer(checkpoint, layout, layer)
        for sums in statistics.layers[key].values():
            assert sums.tiers == ("weights",)
            assert int(sums.tokens) == 24
            for f in fields(sums):
                if f.metadata["tier"] == "weights":
                    assert torch.equal(getattr(sums, f.name), getattr(expected, f.name))
    assert {"weight_stats", "similarity", "dequantize"} <= statistics.header["runs"][0]["backend"].keys()


def _two_domains(name: str) -> TokenData:
    return TokenData(tuple(Batch(domain, families.input_ids(name, 2, 12, i)) for i, domain in enumerate("ab")), {})


Steps = list[tuple[float, int]]  # done, total


@pytest.fixture(scope="module")
def every_tier(family_checkpoint: MakeCheckpoint) -> Callable[[str], tuple[Statistics, Steps]]:
    """every_tier(name) -> a family's statistics of two domains, and the steps it took, measured once."""

    @cache
    def make(name: str) -> tuple[Statistics, Steps]:
        steps: Steps = []
        statistics = calibrate(
            family_checkpoint(name), _two_domains(name), tiers=TIERS, replay_tokens=10,
            progress=lambda done, total: steps.append((done, total)),
        )  # fmt: skip
        return statistics, steps

    return make


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v4",
        *(pytest.param(name, marks=pytest.mark.whole) for name in ("deepseek_v3", "llama4_text", "jetmoe")),
    ],
)
def test_every_tier_with_domains_apart(
    name: str, family_checkpoint: MakeCheckpoint, every_tier: Callable[[str], tuple[Statistics, Steps]], tmp_path: Path
) -> None:
    """A domain's sums do not depend on what else is calibrated, and all survive the file; two runs are the same.

    The joint gradient of all domains is a run's own.
    """
    folder, data = family_checkpoint(name), _two_domains(name)
    both, steps = every_tier(name)
    apart = [calibrate(folder, TokenData((batch,), {}), tiers=TIERS, replay_tokens=10) for batch in data.batches]
    both.save(tmp_path / "s.safetensors")
    loaded, merged = Statistics.load(tmp_path / "s.safetensors"), merge(apart)
    for key in both.layers:
        assert both.layer(key).tiers == TIERS
        assert int(both.layer(key).replay_tokens) == 20
        for domain, one in zip("ab", apart, strict=True):
            assert differences(both.layer(key, [domain]), one.layer(key), besides="alike") == []
            assert differences(both.layer(key, [domain]), loaded.layer(key, [domain])) == []
        assert differences(both.layer(key), merged.layer(key), besides="alike") == []
        assert not merged.layer(key).joint_gradient_norm.any()
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {int(done) for done, _ in steps} == set(range(steps[0][1] + 1))
    assert len({total for _, total in steps}) == 1


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_every_criterion_ranks_what_was_calibrated(
    name: str, every_tier: Callable[[str], tuple[Statistics, Steps]]
) -> None:
    statistics, _ = every_tier(name)
    for criterion in CRITERIA.values():
        plan = moekern.make_plan(statistics, criterion.name, keep=4)
        assert all(len(layer.keep) == 4 for layer in plan.layers.values())


def test_the_replayed_sample_is_even_seeded_and_exact() -> None:
    rows = sample([100, 300, 7, 93], 50)
    assert [len(r) for r in rows] == [10, 30, 0, 10]
    assert all(len(r.unique()) == len(r) and bool((r < n).all()) for r, n in zip(rows, [100, 300, 7, 93], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rows, sample([100, 300, 7, 93], 50), strict=True))
    assert [r.tolist() for r in sample([3, 2], 512)] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("name", ["gemma4_text", "longcat_flash"])
def test_a_router_that_cannot_be_asked_again_is_refused(name: str, family_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(InputError, match="--tier replay: .*(itself|no expert)"):
        calibrate(family_checkpoint(name), _two_domains(name), tiers=("replay",))
