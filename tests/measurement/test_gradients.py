"""The streamed backward pass against an ordinary one through the whole model in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import Layout, family_named, find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.criteria import CRITERIA, score_layer
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.measurement.gradients import matrices, measure_gradients, watching_gates
from moekern.model.compute import Compute
from moekern.model.expert_groups import Takes
from moekern.model.layerwise import open_layerwise
from moekern.model.transformers_api import loader_of
from moekern.statistics.file import Statistics, merge
from moekern.statistics.layer import LayerStatistics
from tests.helpers import families
from tests.helpers.commands import moekern as command
from tests.helpers.measured import close_gradients
from tests.helpers.pairwise import USUAL

MakeCheckpoint = Callable[[str], Path]
E = families.EXPERTS
FIELDS = [f.name for f in fields(LayerStatistics) if f.metadata["tier"] == "gradient"]
JOINT = [name for name in FIELDS if name.startswith("joint_")]
CHECKED = [name for name in families.FAMILIES if name not in families.NO_CALIBRATION]
REFUSED = [name for name in CHECKED if (row := family_named(name.split("-")[0])) and row.no_gradient]


def data_of(name: str) -> TokenData:
    """Two batches of one domain, one of another."""
    batches = [Batch(domain, families.input_ids(name, 2, 12, seed)) for seed, domain in enumerate("aba")]
    return TokenData(tuple(batches), {})


def whole(model: Any, layout: Layout, batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer key -> fields of the tier, by backward through the model in memory, entry by entry in Python."""
    model = getattr(model, "thinker", model)
    model.set_experts_implementation("eager")
    model.zero_grad()
    loader = loader_of(model)
    layers = loader.decoder_layers()[1]
    places = loader.moe_places(layout)
    gate_sums = {key: torch.zeros(E, dtype=torch.float64) for key in places}
    for token_ids in batches:
        with torch.enable_grad():
            contexts = {key: watching_gates(layers[place], E) for key, place in places.items()}
            gates = {key: context.__enter__() for key, context in contexts.items()}
            logits = model(input_ids=token_ids, use_cache=False).logits
            for context in contexts.values():
                context.__exit__(None, None, None)
            kept = {key: each.values for key, each in gates.items()}
            for each in kept.values():
                each.retain_grad()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum")
            loss.backward()
        for key, each in gates.items():
            ids = each.experts.expand_as(each.values).reshape(-1).tolist()
            shares = (each.values.grad.double() * each.values.detach().double()).reshape(-1).tolist()
            for e, share in zip(ids, shares, strict=True):
                if 0 <= e < E:
                    gate_sums[key][e] += share
    return {key: literal(layers[place], layout, gate_sums[key], model) for key, place in places.items()}


def literal(layer: Any, layout: Any, gate_sum: Tensor, model: Any) -> dict[str, Tensor]:
    H = model.get_input_embeddings().weight.shape[1]
    parts = matrices(layer, E, H)
    G = [[p.weight.grad.double().reshape(E, *p.shape)[e] for p in parts] for e in range(E)]
    W = [[p.weight.detach().double().reshape(E, *p.shape)[e] for p in parts] for e in range(E)]
    flat = [torch.cat([g.flatten() for g in each]) for each in G]
    norm = torch.stack([g.norm() for g in flat])
    unit = torch.stack([g / n if n > 0 else g for g, n in zip(flat, norm, strict=True)])
    log_std = []
    for each in G:
        total = 0.0
        for j in range(parts[0].shape[parts[0].hidden_axis]):
            column = torch.cat([g.select(p.hidden_axis, j) for g, p in zip(each, parts, strict=True)])
            total += math.log(max(float(column.var(correction=0)), torch.finfo(torch.float64).tiny)) / 2
        log_std.append(total)
    far = [int(((g - g.mean()).abs() > 3 * g.std(correction=0)).sum()) for g in flat]
    taylor = [float(torch.cat([w.flatten() for w in W[e]]) @ flat[e]) for e in range(E)]
    return {
        "gradients": torch.ones(1, dtype=torch.int64),
        "gradient_norm_sum": norm,
        "gradient_cosine_sum": unit @ unit.T,
        "gradient_log_std_sum": torch.tensor(log_std, dtype=torch.float64),
        "gradient_outlier_sum": torch.tensor(far),
        "taylor_sum": torch.tensor(taylor, dtype=torch.float64),
        "gate_gradient_sum": gate_sum,
    }


def both_ways(
    name: str, folder: Path, data: TokenData, whole_model: Callable[[str], Any]
) -> tuple[Statistics, Callable[[list[Tensor]], dict[str, dict[str, Tensor]]]]:
    """The gradient tier of `data` as it is streamed, and `whole` of a copy of the model, for any batches."""
    model, layout = copy.deepcopy(whole_model(name)), find_layout(open_checkpoint(folder))
    statistics = calibrate(folder, data, Compute(dtype=torch.float32), tiers=("gradient",))
    return statistics, lambda batches: whole(model, layout, batches)


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.whole) for n in CHECKED if n not in REFUSED]
)
def test_gradients_are_those_of_a_whole_backward_pass(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]
) -> None:
    folder, data = family_checkpoint(name), data_of(name)
    statistics, in_memory = both_ways(name, folder, data, whole_model)
    for domain in "ab":
        batches = [batch.input_ids for batch in data.batches if batch.domain == domain]
        for key, want in in_memory(batches).items():
            got = statistics.layers[key][domain]
            assert got.tiers == ("gradient",)
            for field in set(FIELDS) - set(JOINT):
                close_gradients(field, getattr(got, field), want[field])
            assert float(got.gradient_norm_sum.max()) > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx"])
def test_the_joint_gradient_is_that_of_all_text(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]
) -> None:
    """Criteria of all domains are those of one domain that holds all text; each domain is scored by its own."""
    folder, data = family_checkpoint(name), data_of(name)
    statistics, in_memory = both_ways(name, folder, data, whole_model)
    one = TokenData(tuple(Batch("all", batch.input_ids) for batch in data.batches), {})
    united = calibrate(folder, one, Compute(dtype=torch.float32), tiers=("gradient",))
    for key, want in in_memory([batch.input_ids for batch in data.batches]).items():
        total = statistics.layer(key)
        assert int(total.joint_gradients) == int(total.gradients) == 2
        for field in JOINT[1:]:
            close_gradients(field, getattr(total, field), want[f"{field.removeprefix('joint_')}_sum"])
            assert torch.equal(getattr(total, field), getattr(statistics.layers[key]["b"], field))
        for criterion in ("egs", "ege", "egn", "taylor"):
            row = CRITERIA[criterion]
            close_gradients(criterion, score_layer(row, total, key), score_layer(row, united.layer(key), key))
            own = score_layer(row, statistics.layer(key, ["b"]), key)
            assert torch.equal(own, score_layer(row, statistics.layers[key]["b"], key))
            assert not torch.equal(own, score_layer(row, total, key))


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_hand_on_more_are_refused_by_name(name: str, family_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(
        InputError, match="--tier gradient: .*(more of the layers before it|does not predict the next token)"
    ):
        calibrate(family_checkpoint(name), data_of(name), Compute(dtype=torch.float32), tiers=("gradient",))


def test_files_in_place_of_memory_change_no_bit(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = family_checkpoint("qwen3_moe"), data_of("qwen3_moe")
    plain = calibrate(folder, data, tiers=("gradient",))
    with monkeypatch.context() as patch:
        patch.setattr(Takes, "room", property(lambda self: 4000))
        spilled = calibrate(folder, data, Compute(spill=tmp_path), tiers=("gradient",))
    checkpoint = open_checkpoint(folder)
    with open_layerwise(checkpoint, find_layout(checkpoint)) as layerwise:
        paged: dict[tuple[str, str], Mapping[str, Tensor]] = {}
        add = lambda key, domain, found: paged.update({(key, domain): found})  # noqa: E731
        measure_gradients(layerwise, data, add, in_memory=0)
    assert not list(tmp_path.iterdir())
    for key, domains in plain.layers.items():
        for domain, sums in domains.items():
            for field in FIELDS:
                assert torch.equal(getattr(sums, field), getattr(spilled.layers[key][domain], field))
                assert torch.equal(getattr(sums, field), paged[key, domain][field])


def test_one_layer_is_resident_on_the_way_back(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekern.model.backward import Backward

    filled: list[int] = []
    through = Backward.through

    def counted(self: Backward, i: int, *rest: Any) -> Any:
        filled.append(sum(not next(layer.parameters()).is_meta for layer in self.layerwise.layers))
        return through(self, i, *rest)

    monkeypatch.setattr(Backward, "through", counted)
    steps: list[tuple[float, int]] = []
    calibrate(
        family_checkpoint("qwen3_moe"), data_of("qwen3_moe"), tiers=("gradient",),
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert filled
    assert set(filled) == {1}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {int(done) for done, _ in steps} == set(range(steps[0][1] + 1))


def test_runs_add(family_checkpoint: MakeCheckpoint) -> None:
    folder, data = family_checkpoint("mixtral"), data_of("mixtral")
    parts = [
        calibrate(folder, TokenData((batch,), {"n": i}), tiers=("gradient",)) for i, batch in enumerate(data.batches)
    ]
    both = merge(parts)
    for key in both.layers:
        layer = both.layer(key)
        assert int(layer.gradients) == 3
        total = sum(part.layer(key).gradient_norm_sum for part in parts)
        torch.testing.assert_close(layer.gradient_norm_sum, total)
        for criterion in ("egs", "ege", "ego", "egn"):
            with pytest.raises(InputError, match=f"{criterion}: of these 3 gradients no joint one is known"):
                score_layer(CRITERIA[criterion], layer, key)
        for criterion, field in (("taylor", "taylor_sum"), ("gate_taylor", "gate_gradient_sum")):
            sums = sum(getattr(part.layer(key), field) for part in parts)
            scores = score_layer(CRITERIA[criterion], layer, key)
            torch.testing.assert_close(scores, sums.abs() if criterion == "taylor" else -sums)


def test_of_two_runs_the_domains_of_one_have_a_joint_gradient(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = family_checkpoint("mixtral")
    for run, domains in (("1", "ab"), ("2", "cd")):
        batches = tuple(Batch(d, families.input_ids("mixtral", 2, 12, ord(d))) for d in domains)
        calibrate(folder, TokenData(batches, {"run": run}), tiers=("gradient",), out=tmp_path / run)
    first, second = (Statistics.load(tmp_path / run) for run in "12")
    merge([first, second]).save(tmp_path / "both")
    both, egn = Statistics.load(tmp_path / "both"), CRITERIA["egn"]
    want = score_layer(egn, first.layer("0"), "0")
    assert torch.equal(score_layer(egn, both.layer("0", ["a", "b"]), "0"), want)
    assert torch.equal(score_layer(egn, both.layer("0", ["d"]), "0"), score_layer(egn, second.layer("0", ["d"]), "0"))
    for domains in (["a", "d"], ["a", "b", "c"], ["b", "c", "d"], ["a", "b", "c", "d"]):
        with pytest.raises(InputError, match="no joint one is known: take one domain or all domains of one run"):
            score_layer(egn, both.layer("0", domains), "0")


def test_older_files_open_and_hold_no_joint_gradient(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = family_checkpoint("mixtral")
    new = calibrate(folder, data_of("mixtral"), tiers=("gradient",))
    layers = {
        key: {d: replace(s, **{n: getattr(s, n)[:0] for n in JOINT if n != "joint_gradient_cosine"},
                         joint_gradient_cosine=torch.zeros(0, 0, dtype=torch.float64)) for d, s in parts.items()}
        for key, parts in new.layers.items()
    }  # fmt: skip
    Statistics(new.header, layers).save(tmp_path / "old")
    old, egn = Statistics.load(tmp_path / "old"), CRITERIA["egn"]
    assert torch.equal(score_layer(egn, old.layer("0", ["a"]), "0"), score_layer(egn, new.layer("0", ["a"]), "0"))
    with pytest.raises(InputError, match="egn: the statistics hold no joint gradient of their 2 domains; calibrate"):
        score_layer(egn, old.layer("0"), "0")
    more = TokenData((Batch("c", families.input_ids("mixtral", 2, 12, 5)),), {})
    other = calibrate(folder, more, tiers=("gradient",))
    merge([old, other]).save(tmp_path / "mixed")
    assert int(Statistics.load(tmp_path / "mixed").layer("0").gradients) == 3


def test_the_command(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [' + ", ".join(str(20 + i % 70) for i in range(90)) + "]}")
    folder, out = family_checkpoint("olmoe"), tmp_path / "s.safetensors"
    arguments = ("calibrate", folder, "--data", tmp_path / "ids.jsonl", "--out", out, "--tier", "gradient")
    done = command(*arguments, "--spill", tmp_path / "no")
    assert (done.returncode, done.stderr) == (
        2,
        f"moekern: --spill {tmp_path / 'no'}: no folder that can be written to\n",
    )
    done = command(*arguments, "--spill", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Statistics.load(out).layer("0").tiers == ("gradient",)
    for criterion in ("egs", "ege", "ego", "egn", "taylor", "gate_taylor"):
        plan = command("plan", out, "--criterion", criterion, "--keep", 4, "--out", tmp_path / f"{criterion}.json")
        assert plan.returncode == 0, plan.stderr
