"""Router rows of merged groups: least squares on logits written out by hand; the same rows in memory, in the checkpoint
and when they are computed again; what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL
from moekern.merging.merge import merge_experts
from moekern.merging.routers import fitted, plan_with_routers
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.router_rows import FITTED, router_rows
from moekern.pruning.prune import prune
from moekern.refit import Ridge
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.commands import model_and_ids, moekern
from tests.helpers.in_flight import REFUSED
from tests.helpers.synthetic import read

MakeCheckpoint = Callable[[str], Path]
KEEP = (0, 3, 4, 7)
GROUPS = (((0, 1.0),), ((1, 3.0), (2, 0.0), (3, 2.0), (6, 5.0)), ((4, 1.0), (5, 1.0)), ((7, 1.0),))
MEMBERS = {3: [1, 3, 6], 4: [4, 5]}
GOOD, NAN = "AACAPw==", "AADAfw=="  # float32 1 and NaN
# A table that chooses, a matrix that attention shares, classes in the place of tokens, no forward pass.
NOT_FITTED = ("deepseek_v4", "jetmoe", "openai_privacy_filter", "qwen3_omni_moe")
FLOAT32 = Compute(dtype="float32")


def text(name: str) -> TokenData:
    return TokenData(tuple(Batch("ab"[i % 2], families.input_ids(name, 2, 12, i)) for i in range(6)), {}, 4)


def plan_of(source: Path) -> Plan:
    return Plan({key: LayerPlan(KEEP, groups=GROUPS) for key in find_layout(open_checkpoint(source)).layers})


def logits_of(source: Path, name: str, domain: str) -> list[NDArray[np.float64]]:
    """Of each layer [T, E], as transformers gives them."""
    model, found = families.load(source), []
    for batch in text(name).batches:
        if batch.domain == domain:
            with torch.no_grad():
                found.append(model(batch.input_ids, output_router_logits=True).router_logits)
    return [torch.cat(each).double().numpy() for each in zip(*found, strict=True)]


def target(kind: str, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.exp(logits).sum(1)) if kind == "log-sum" else logits.max(1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", FITTED)
def test_rows_are_least_squares_and_a_constant_needs_a_bias(
    name: str, kind: str, family_checkpoint: MakeCheckpoint
) -> None:
    source = family_checkpoint(name)
    data, plan, checkpoint = text(name), plan_of(source), open_checkpoint(source)
    made = plan_with_routers(checkpoint, data, FLOAT32, plan, kind, domains=["a"])
    rows, layers = router_rows(made), logits_of(source, name, "a")
    assert len(rows) == len(layers)
    for own, logits in zip(rows.values(), layers, strict=True):
        assert own.keys() == MEMBERS.keys()
        for e, members in MEMBERS.items():
            ones = [np.ones((len(logits), 1))] if name == "gpt_oss" else []
            columns = np.concatenate([logits, *ones], 1)
            want = np.linalg.lstsq(columns, target(kind, logits[:, members]), rcond=None)[0]
            got = [*own[e].of, *([own[e].constant] if ones else [])]
            np.testing.assert_allclose(columns @ got, columns @ want, atol=2e-3 * np.abs(columns @ want).max())
            assert bool(own[e].constant) == bool(ones)
    assert Plan.from_json(made.to_json()).provenance == made.provenance
    again = TokenData(tuple(Batch(b.domain, row[None]) for b in data.batches for row in b.input_ids), {}, 4)
    assert plan_with_routers(checkpoint, again, FLOAT32, plan, kind, domains=["a"]).digest == made.digest
    assert plan_with_routers(checkpoint, data, FLOAT32, plan, "dominant") is plan


def test_normal_equations_are_solved() -> None:
    columns = np.random.default_rng(0).standard_normal((500, 40))
    gram = columns.T @ columns
    for n in (33, 39):
        own = gram[:n, :n] + np.eye(n) * 1e-6 * np.trace(gram[:n, :n]) / n
        np.testing.assert_allclose(fitted(gram, n), np.linalg.solve(own, gram[:n, n:]).T, rtol=1e-9, atol=1e-12)
    assert np.isnan(fitted(np.zeros((4, 4)), 3)).all()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_members_with_one_row_get_it_and_the_logarithm_of_their_number(name: str, tmp_path: Path) -> None:
    model = families.build(name)
    for path, value in model.named_parameters():
        if ".router." in path or path.endswith("mlp.gate.weight"):
            for e, members in MEMBERS.items():
                value.data[members] = value.data[e].clone()
    model.save_pretrained(tmp_path / "model")
    made = plan_with_routers(
        open_checkpoint(tmp_path / "model"), text(name), FLOAT32, plan_of(tmp_path / "model"), "log-sum"
    )
    for own, logits in zip(router_rows(made).values(), logits_of(tmp_path / "model", name, "a"), strict=True):
        for e, members in MEMBERS.items():
            got, want = logits @ own[e].of + own[e].constant, logits[:, e] + np.log(len(members))
            if name == "gpt_oss":
                np.testing.assert_allclose(got, want, atol=5e-3)
                np.testing.assert_allclose(own[e].constant, np.log(len(members)), atol=5e-3)
            else:
                assert own[e].constant == 0
                assert not np.allclose(got, want, atol=5e-3)


@pytest.mark.parametrize(("name", "dtype"), [("qwen3_moe", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_rows_in_memory_are_those_that_are_written_and_computed_again(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    families.build(name, 0, dtype).save_pretrained(source)
    compute, data, plan = Compute(dtype=str(dtype).removeprefix("torch.")), text(name), plan_of(source)
    made = plan_with_routers(open_checkpoint(source), data, compute, plan, "log-sum")
    before, outs = families.load(source), {}
    for word, each in (("dominant", plan), ("fitted", made)):
        whole = merge_experts(open_checkpoint(source), each, tmp_path / word / "layers")
        outs[word] = prune(source, whole, tmp_path / word / "out", refitted=tmp_path / word / "layers").out
        report = verify(source, Plan.from_json(whole.to_json()), outs[word], full=True)
        assert report.problems == ()
        assert report.recomputed == report.computed > 0
        assert compare_forward(open_checkpoint(source), whole, outs[word], compute=compute).equal
    one, two = read(outs["dominant"]), read(outs["fitted"])
    changed = {key for key, value in two.items() if value != one[key]}
    routers = {n for n in one if ".router." in n or n.endswith("gate.weight")}
    assert changed == routers
    old = {n: value for n, value in before.state_dict().items() if n in routers and n.endswith("weight")}
    new = families.load(outs["fitted"]).state_dict()
    for (key, row), (n, value) in zip(router_rows(made).items(), old.items(), strict=True):
        assert f".{key}." in n
        want = value[list(KEEP)].clone()
        for e, one_row in row.items():
            parts = [value[member].double() * coefficient for member, coefficient in enumerate(one_row.of)]
            want[KEEP.index(e)] = sum(parts[1:], parts[0]).to(dtype)
        assert torch.equal(new[n], want)
    losses = evaluate(source, data, {"dominant": plan, "fitted": made}, compute)
    for word, out in outs.items():
        assert evaluate(out, data, {}, compute)[ORIGINAL]["a"].nll == losses[word]["a"].nll
    assert losses["dominant"]["a"].nll != losses["fitted"]["a"].nll

    with pytest.raises(InputError, match="new: a refit writes no rows of routers"):
        refit(source, data, [Variant("new", made, ridge=Ridge(), folder=tmp_path / "refit")], compute)


def test_a_row_that_another_plan_would_make_is_found_out(tmp_path: Path) -> None:
    families.save("qwen3_moe", source := tmp_path / "model")
    made = plan_with_routers(open_checkpoint(source), text("qwen3_moe"), FLOAT32, plan_of(source), "least-squares")
    whole = merge_experts(open_checkpoint(source), made, tmp_path / "layers")
    prune(source, whole, tmp_path / "out", refitted=tmp_path / "layers")
    told: Any = json.loads(json.dumps(whole.provenance))
    told["merge"]["router"]["rows"]["0"]["3"] = told["merge"]["router"]["rows"]["0"]["4"]
    other = merge_experts(open_checkpoint(source), replace(whole, provenance=told), tmp_path / "others")
    assert other.provenance["refit"]["recipe"] != whole.provenance["refit"]["recipe"]
    told["refit"] = whole.provenance["refit"]
    forged = replace(whole, provenance=told)
    assert verify(source, forged, tmp_path / "out").problems != ()
    with pytest.raises(InputError, match="--full: plan: the recipe .* is none of what its groups make of this model"):
        verify(source, forged, tmp_path / "out", full=True)


def test_what_has_no_rows_to_combine_is_refused(family_checkpoint: MakeCheckpoint) -> None:
    source = family_checkpoint("deepseek_v3")
    data = text("deepseek_v3")
    with pytest.raises(InputError, match="--router log-sum: deepseek_v3: scores of its routers are sigmoid"):
        plan_with_routers(open_checkpoint(source), data, FLOAT32, plan_of(source), "log-sum")
    made = plan_with_routers(open_checkpoint(source), data, FLOAT32, plan_of(source), "least-squares")
    assert all(row.constant == 0 for rows in router_rows(made).values() for row in rows.values())
    for wrong, why in (
        ({"target": "mean", "rows": {}}, "expected"),
        ({"target": "log-sum", "rows": {"0": {"3": {"of": GOOD}}}}, "expected a row for each expert"),
        ({"target": "log-sum", "rows": {"1": {"3": {"of": GOOD}, "4": {"of": "AAA"}}}}, "base64 of float32"),
        ({"target": "log-sum", "rows": {"1": {"3": {"of": GOOD}, "4": {"of": NAN}}}}, "base64 of float32, finite"),
        ({"target": "log-sum", "rows": {"1": {"3": {"of": GOOD}, "4": {"of": GOOD, "constant": "x"}}}}, "a number"),
        ({"target": "log-sum", "rows": {"1": {"3": {"of": GOOD}, "4": {"of": GOOD}}}}, "1 coefficients, and the layer"),
    ):
        plan = replace(plan_of(source), provenance={"merge": {"router": wrong}})
        with pytest.raises(InputError, match=f"provenance.merge.router: .*{why}"):
            check_plan(plan, find_layout(open_checkpoint(source)), open_checkpoint(source))


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_rows_of_every_family_are_fitted_written_and_verified_or_refused(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint(name)
    layout = find_layout(open_checkpoint(source))
    step = layout.num_experts // layout.n_group
    keep = tuple(e for e in range(layout.num_experts) if e % step >= step // 2)
    groups = (((0, 1.0), (1, 3.0), (keep[0], 2.0)), *(((e, 1.0),) for e in keep[1:]))
    plan = Plan({key: LayerPlan(keep, groups=groups) for key in layout.layers})
    try:
        made = plan_with_routers(open_checkpoint(source), text(name), FLOAT32, plan, "least-squares")
        whole = merge_experts(open_checkpoint(source), made, tmp_path / "layers")
        prune(source, whole, tmp_path / "out", refitted=tmp_path / "layers")
        report = verify(source, whole, tmp_path / "out", full=True)
        assert report.problems == ()
        assert report.recomputed == report.computed
        written = evaluate(tmp_path / "out", text(name), {}, FLOAT32)[ORIGINAL]["a"]
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert name in NOT_FITTED, error  # noqa: PT017
        return
    assert name not in NOT_FITTED
    assert evaluate(source, text(name), {"fitted": made}, FLOAT32)["fitted"]["a"].nll == written.nll


def test_the_command_fits_rows_to_text_and_asks_for_it(tmp_path: Path) -> None:
    source = model_and_ids(tmp_path) / "model"
    command = ["merge-experts", source, "--keep", "0.5", "--method", "m-smoe", "--router", "log-sum", "--json"]
    refused = moekern(*command, "--statistics", tmp_path / "s", "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert "--router log-sum: rows are fitted to text" in refused.stderr
    assert not (tmp_path / "other").exists()
    given = ("--data", f"a={tmp_path / 'ids.npy'}", "--sequence-length", 40, "--out", tmp_path / "out")
    done = moekern(*command, *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verify"]["good"]
    assert router_rows(Plan.load(tmp_path / "out.moekern/plan.json"))
