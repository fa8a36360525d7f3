"""What a report holds: numbers of layers and plans against plain loops over the statistics."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from moekern.criteria import criterion_named, score_layer
from moekern.errors import InputError
from moekern.plan.agreement import agreement_of_all
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import make_plan
from moekern.plan.replacement import Replacement
from moekern.report.collect import report_of
from tests.helpers.measured import E, model_statistics

KEYS = ("0", "2", "10")
HELD = model_statistics()


def changed(plan: Plan, **provenance: object) -> Plan:
    return replace(plan, provenance={**plan.provenance, **provenance})


def test_the_cut_of_a_plan_is_what_its_experts_hold() -> None:
    plan = make_plan(HELD, "reap", 4)
    found = report_of(HELD, {"half": plan})
    shares = []
    for number, key in enumerate(KEYS):
        sums, keep = HELD.layer(key), plan.layers[key].keep
        scores, count = score_layer(criterion_named("reap"), sums, key).tolist(), sums.count.tolist()
        gone = [e for e in range(E) if e not in keep]
        shares.append([sum(row[e] for e in gone) / sum(row) for row in (scores, count)])
        row = found["by_plan"]["half"][number]
        assert [row["saliency"], row["tokens"]] == pytest.approx(shares[-1])
        assert row["at_cut"] == pytest.approx(min(scores[e] for e in keep) / (sum(scores) / E))
        assert row["max_over_mean"] == pytest.approx(max(count[e] for e in keep) / (sum(count[e] for e in keep) / 4))
    (curve,) = found["curves"]
    assert curve["cut"] == pytest.approx(
        {"experts": 1 / 3, "saliency": sum(s for s, _ in shares) / 3, "tokens": sum(t for _, t in shares) / 3}
    )
    line = curve["saliency"]
    at = max(range(len(line)), key=lambda i: i / (len(line) - 1) - line[i])
    assert curve["knee"] == {"experts": at / (len(line) - 1), "saliency": line[at], "tokens": curve["tokens"][at]}
    assert [layer["key"] for layer in found["layers"]] == list(KEYS)
    assert found["kept"]["half"] == {key: list(plan.layers[key].keep) for key in KEYS}
    assert found["shown"] == {"half": "reap"}
    assert found["values"]["tokens"]["2"] == HELD.layer("2").count.tolist()


def test_spikes_are_beyond_those_of_all_layers() -> None:
    plan = make_plan(HELD, "usage", 2)
    rows = report_of(HELD, {"p": plan})["by_plan"]["p"]
    every = sorted(float(x) for key in KEYS for x in HELD.layer(key).max_abs)
    limit = every[12] + 0.75 * (every[13] - every[12])  # place 0.75 x 17 of 18 numbers
    for key, row in zip(KEYS, rows, strict=True):
        gone = [e for e in range(E) if e not in plan.layers[key].keep]
        assert row["spiking"] == sum(float(HELD.layer(key).max_abs[e]) > limit for e in gone) / len(gone)


def test_what_scores_follow_is_rank_correlation() -> None:
    found = report_of(HELD, {"p": make_plan(HELD, "reap", 4)})["follows"]["p"]
    for key, row in zip(KEYS, found, strict=True):
        sums = HELD.layer(key)
        scores = sums.gated_norm_sum / sums.count
        driven = {"count": sums.count, "gate": sums.gate_sum / sums.count, "norm": sums.norm_sum / sums.count}
        assert row == pytest.approx({name: spearmanr(scores, x).statistic for name, x in driven.items()})


def test_a_router_that_stays_whole_keeps_its_routing_term() -> None:
    plan = make_plan(HELD, "reap", 4)
    found = report_of(HELD, {"a": plan, "b": replace(plan, replace=Replacement("zero"))})["by_plan"]
    assert all(row["routing_term"] < 1 for row in found["a"])
    assert all(row["routing_term"] == 1 for row in found["b"])


def test_criteria_of_every_measured_tier_are_served_and_all_of_it_is_json() -> None:
    found = report_of(HELD, {"a": make_plan(HELD, "hope", 4), "b": make_plan(HELD, "random", 4)})
    assert {"gated_norm", "mone", "rcs_loo", "taylor", "shape"} <= set(found["values"])
    assert found["shown"]["b"] == "scores of b"
    json.dumps(found, allow_nan=False)


def test_halves_are_those_of_the_domains_that_a_plan_is_of() -> None:
    plans = {"all": make_plan(HELD, "usage", 4), "code": make_plan(HELD, "usage", 4, domains=["code"])}
    found = report_of(HELD, plans)["stability"]
    chosen = criterion_named("usage")
    for name, domains in (("all", None), ("code", ["code"])):
        assert found[name] == [asdict(each) for each in agreement_of_all(HELD, chosen, 4, domains).values()]
    assert found["all"] != found["code"]


def test_overlap_is_jaccard_of_kept_sets() -> None:
    plans = {name: make_plan(HELD, name, 4) for name in ("reap", "usage")}
    overlap = report_of(HELD, plans)["overlap"]
    table = dict(zip(overlap["names"], overlap["jaccard"], strict=True))
    left, right = ({key: set(plan.layers[key].keep) for key in KEYS} for plan in plans.values())
    alike = sum(len(left[key] & right[key]) / len(left[key] | right[key]) for key in KEYS) / 3
    assert table["plan reap"][1] == pytest.approx(alike)
    assert table["plan reap"][overlap["names"].index("reap")] == 1  # the criterion keeps what its plan keeps


def test_without_plans_the_first_criteria_are_shown() -> None:
    found = report_of(HELD, {})
    assert [curve["name"] for curve in found["curves"]] == ["gated_norm", "reap", "usage"]
    assert all(curve["cut"] is None for curve in found["curves"])
    assert found["by_plan"] == {}


def test_a_plan_written_by_hand_goes_in_the_order_of_a_criterion() -> None:
    plan = Plan({key: LayerPlan((0, 1, 2)) for key in KEYS})
    (curve,) = report_of(HELD, {"mine": plan})["curves"]
    assert curve["criterion"] == "not named, in the order of gated_norm"


def test_code_that_a_plan_names_is_not_run(tmp_path: Path) -> None:
    code, ran = tmp_path / "mine.py", tmp_path / "ran"
    code.write_text(f"open({str(ran)!r}, 'w')\ndef score(s):\n    return s.count.double()\n")
    plan = changed(make_plan(HELD, "reap", 4), criterion=f"rank({code}:score, reap)")
    found = report_of(HELD, {"mine": plan})
    assert found["curves"][0]["criterion"].startswith("rank(")
    assert not ran.exists()


def test_what_is_to_be_doubted_is_said() -> None:
    plan = make_plan(HELD, "reap", 4)
    uneven = replace(plan, layers={**plan.layers, "0": LayerPlan((0, 1), plan.layers["0"].scores)})
    lines = " | ".join(report_of(HELD, {"a": uneven, "b": changed(plan, ties={"0": 2})})["warnings"])
    for part in ("fewer than 64 tokens", "a: layers keep 2 to 4 experts", "b: scores tie at the cut in 1 layers"):
        assert part in lines
    found = report_of(HELD, {"a": replace(uneven, replace=Replacement("zero"))})
    assert not any("layers keep" in line for line in found["warnings"])  # the router chooses among all


@pytest.mark.parametrize("odd", [[], {}, 3, "x" * 5000, None, [["a"]], {"kind": []}])
def test_provenance_of_any_type_is_only_shown(odd: object) -> None:
    names = ("criterion", "keep", "domains", "budget", "ties", "statistics", "refit")
    plan = changed(make_plan(HELD, "reap", 4), **dict.fromkeys(names, odd))
    json.dumps(report_of(HELD, {"odd": plan}), allow_nan=False)


def test_plans_that_do_not_fit_are_refused() -> None:
    plan = make_plan(HELD, "reap", 4)
    with pytest.raises(InputError, match="mine: made for another model"):
        report_of(HELD, {"mine": changed(plan, fingerprint="0" * 64)})
    with pytest.raises(InputError, match="mine: layer 2 of the statistics is missing"):
        report_of(HELD, {"mine": replace(plan, layers={"0": plan.layers["0"], "10": plan.layers["10"]})})
    short = {**plan.layers, "2": LayerPlan((0, 1), (1.0, 2.0))}
    with pytest.raises(InputError, match="mine: layer 2: 2 scores, but it has 6 experts"):
        report_of(HELD, {"mine": replace(plan, layers=short)})
