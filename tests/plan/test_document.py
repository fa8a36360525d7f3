"""Plans: budgets, ties, guards, the document, and what is refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.errors import InputError
from moekern.plan import document
from moekern.plan.choose import choose_top, super_experts
from moekern.plan.document import FORMAT, LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.interchange import convert
from moekern.router import Router, count_problem, kept_count, parse_keep
from tests.helpers.measured import FINGERPRINT, Model

DEEPSEEK = Router(num_experts=64, top_k=6, n_group=8, topk_group=3, group_top=2)


def plan_of(keep, scores=None, **others):
    return Plan({key: LayerPlan(tuple(ids), scores) for key, ids in {"0": keep, "10": keep, **others}.items()})


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), (".5", 0.5), ("50%", 0.5), ("62.5%", 0.625), ("64", 64), ("1", 1), ("1.0", 1.0), ("100%", 1.0)],
)
def test_keep_is_read_as_people_write_it(text, value):
    got = parse_keep(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text", ["", "half", "0", "0.0", "0%", "-3", "-0.5", "1.5", "64.0", "150%", "nan", "inf", "%", "5 0"]
)
def test_a_keep_that_means_nothing_is_refused(text):
    with pytest.raises(InputError, match="--keep .*: expected a share .* or a count"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("keep", "router", "count"),
    [
        (0.5, Router(128, 8), 64),
        (1.0, Router(128, 8), 128),
        (128, Router(128, 8), 128),
        (8, Router(128, 8), 8),
        (0.29, Router(100, 8), 29),
        (0.35, Router(10, 2), 4),  # 3.5 goes up, although 0.35 is a little less in binary
        (0.1, Router(16, 2), 2),
        (0.5, DEEPSEEK, 32),
        (0.45, DEEPSEEK, 32),  # 28.8, to the nearest multiple of 8
        (0.43, DEEPSEEK, 24),
        (16, DEEPSEEK, 16),
    ],
)
def test_shares_are_rounded_and_counts_are_taken(keep, router, count):
    assert kept_count(keep, router) == count


@pytest.mark.parametrize(
    ("keep", "router", "message"),
    [
        (4, Router(64, 8), r"--keep 4: fewer than the 8 .* \(top_k\); nearest legal: 8$"),
        (0.05, Router(64, 8), "--keep 0.05 of 64 experts is 3: fewer than the 8 .* nearest legal: 8$"),
        (65, Router(64, 8), "--keep 65: more than the 64 experts there are; nearest legal: 64$"),
        (30, DEEPSEEK, r"--keep 30: not a multiple of .* 8 groups \(n_group\); nearest legal: 24 or 32$"),
        (8, DEEPSEEK, "--keep 8: 1 in each group, .* fewer than top_k = 6; nearest legal: 16$"),
        (0.12, DEEPSEEK, "--keep 0.12 of 64 experts is 8: 1 in each group"),
        (8, replace(DEEPSEEK, topk_group=8), "1 in each group, but a group is ranked by its best 2; .* 16$"),
        (0.01, DEEPSEEK, "--keep 0.01 of 64 experts is 0: fewer than the 6"),
        (True, Router(64, 8), "--keep True: expected"),
        (float("nan"), Router(64, 8), "--keep nan: expected"),
        (5, Router(4, 5), "no count is legal for this router"),
    ],
)
def test_a_count_the_router_cannot_work_with_is_refused(keep, router, message):
    with pytest.raises(InputError, match=message):
        kept_count(keep, router)


@settings(deadline=None)
@given(
    share=st.floats(0.01, 1),
    groups=st.sampled_from([1, 2, 4, 8]),
    size=st.integers(1, 16),
    top_k=st.integers(1, 8),
    group_top=st.integers(1, 2),
    data=st.data(),
)
def test_a_share_gives_a_legal_count_or_an_error(share, groups, size, top_k, group_top, data):
    router = Router(groups * size, top_k, groups, data.draw(st.integers(1, groups)), group_top)
    try:
        count = kept_count(share, router)
    except InputError as error:
        assert str(error).startswith(f"--keep {share} of {groups * size} experts is ")  # noqa: PT017
    else:
        assert count_problem(count, router) is None
        assert abs(count - share * router.num_experts) <= groups / 2 + 1e-6


def test_ties_go_to_the_lowest_number_in_each_group():
    assert choose_top([1, 2, 2, 1, 2], 2) == (1, 2)
    assert choose_top([0] * 8, 4, groups=2) == (0, 1, 4, 5)
    assert choose_top([9, 8, 7, 6, 1, 2, 3, 4], 4, groups=2) == (0, 1, 6, 7)


def test_protected_experts_stay_and_take_a_place():
    assert choose_top([5, 4, 3, 2], 2, protected=[3]) == (0, 3)
    assert choose_top([5, 4, 3, 2], 2, groups=2, protected=[1]) == (1, 2)
    with pytest.raises(InputError, match=r"layer 4: 2 protected experts \[0, 1\], but group 0 keeps 1; keep more"):
        choose_top([5, 4, 3, 2], 2, groups=2, protected=[0, 1], where="layer 4")
    with pytest.raises(InputError, match="3 protected experts .* but it keeps 2"):
        choose_top([5, 4, 3, 2], 2, protected=[0, 1, 2])


def test_super_experts_are_extreme_and_early():
    quiet = np.linspace(1, 2, 100).tolist()
    loud = [*quiet[:-1], 50.0]
    # the threshold is the tenth of the largest, 5: the percentile lies below it
    assert super_experts({"0": quiet, "1": loud, "2": quiet, "3": loud}) == {"1": (99,)}
    # many extremes: the percentile (99.5 of 400 values) decides
    louder = [*quiet[:90], *range(40, 50)]
    assert super_experts({"0": louder, "1": quiet, "2": quiet, "3": quiet}) == {"0": (98, 99)}
    assert super_experts({"0": [1.0, 1.0], "1": [1.0, 1.0]}) == {}


def test_the_document_is_sorted_readable_and_ends_in_a_newline():
    layers = {"10": LayerPlan((0, 2)), "2": LayerPlan((1, 3), (0.1, 2.0, -1.0, 1e-300))}
    plan = Plan(layers, {"b": {"y": [1], "x": []}, "a": 1})
    assert plan.to_json() == (
        "{\n"
        ' "format": "moekern.plan/1",\n'
        ' "layers": {\n'
        '  "2": {\n   "keep": [1, 3],\n   "scores": [0.1, 2.0, -1.0, 1e-300]\n  },\n'
        '  "10": {\n   "keep": [0, 2]\n  }\n'
        " },\n"
        ' "provenance": {\n  "a": 1,\n  "b": {\n   "x": [],\n   "y": [1]\n  }\n }\n'
        "}\n"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    layers=st.dictionaries(
        st.text(max_size=8),
        st.builds(
            LayerPlan,
            st.sets(st.integers(0, 600), min_size=1).map(lambda ids: tuple(sorted(ids))),
            st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5).map(tuple),
        ),
        min_size=1,
        max_size=4,
    ),
    provenance=st.dictionaries(st.text(), JSON, max_size=3),
)
def test_a_plan_survives_its_document(layers, provenance):
    plan = Plan(layers, provenance)
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert back.to_json() == text
    shuffled = Plan(dict(reversed(layers.items())), dict(reversed(provenance.items())))
    assert shuffled.digest == plan.digest
    assert json.loads(text)["format"] == "moekern.plan/1"


def test_a_plan_is_saved_and_loaded(tmp_path):
    plan = plan_of([1, 2])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").read_text() == plan.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_person_can_write_one():
    text = '{"format": "moekern.plan/1", "layers": {"0": {"keep": [5, 1]}, "10": {"keep": [0, 1]}}}'
    plan = Plan.from_json(text)
    assert plan.layers["0"] == LayerPlan((1, 5))
    check_plan(plan, Model(), FINGERPRINT)


HEAD = '{"format": "moekern.plan/1", "layers": {'
BAD_DOCUMENTS = {
    "empty": ("", "not a plan"),
    "not json": ("{keep: 1}", "not a plan"),
    "a list": ("[1]", r"expected an object with .format.: .moekern.plan/1. or .moekern.plan/2., got \[1\]"),
    "no format": ('{"layers": {"0": {"keep": [1]}}}', "expected an object with .format."),
    "other format": ('{"format": "moekern.plan/3", "layers": {}}', "got 'moekern.plan/3'"),
    "no layers": ('{"format": "moekern.plan/1"}', "layers: expected an object of layers, got None"),
    "empty layers": ('{"format": "moekern.plan/1", "layers": {}}', "layers: expected"),
    "layers list": ('{"format": "moekern.plan/1", "layers": [[1]]}', "layers: expected"),
    "typo": ('{"format": "moekern.plan/1", "layer": {}, "layers": {"0": {"keep": [1]}}}', "unknown key 'layer'"),
    "provenance": (HEAD + '"0": {"keep": [1]}}, "provenance": 3}', "provenance: expected"),
    "same layer twice": (HEAD + '"0": {"keep": [1]}, "0": {"keep": [2]}}}', "duplicate key '0'"),
    "nan": (HEAD + '"0": {"keep": [1], "scores": [NaN]}}}', "'NaN' is not a finite number"),
    "infinite": (HEAD + '}, "provenance": {"x": 1e999}}', "'1e999' is not a finite number"),
    "deep": ("[" * 100_000, "not a plan"),
    "deep provenance": (
        HEAD + '"0": {"keep": [1]}}, "provenance": ' + '{"a":' * 900 + "1" + "}" * 901,
        "nested more than 64 deep",
    ),
    "an expert twice, late": (
        HEAD + '"0": {"keep": ' + json.dumps([*range(200_000), 199_999]) + "}}}",
        "expert 199999 is listed twice",
    ),
    "a key twice, late": (
        HEAD + ",".join(f'"{i}": 1' for i in [*range(100_000), 99_999]) + "}}",
        "duplicate key '99999'",
    ),
    "a long key": (HEAD + f'"{"9" * 100_000}": {{"keep": [1]}}}}}}', "a name of 100000 characters; at most 256"),
    "many layers": (
        HEAD + ",".join(f'"{i}": {{"keep": [1]}}' for i in range(10_001)) + "}}",
        "10001 layers, more than the limit of 10000",
    ),
    "digits": ('{"format": ' + "9" * 5000 + "}", "not a plan"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_a_bad_document_is_refused(case):
    text, message = BAD_DOCUMENTS[case]
    with pytest.raises(InputError, match=message) as caught:
        Plan.from_json(text, "my.json")
    assert str(caught.value).startswith("my.json: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("[1, 2]", 'expected an object with "keep"'),
        ("{}", 'expected an object with "keep"'),
        ('{"keep": []}', 'expected an object with "keep"'),
        ('{"keep": {"1": 2}}', 'expected an object with "keep"'),
        ('{"keep": [1.0]}', "expected expert numbers, got 1.0"),
        ('{"keep": [true]}', "expected expert numbers, got True"),
        ('{"keep": ["1"]}', "expected expert numbers, got '1'"),
        ('{"keep": [null]}', "expected expert numbers, got None"),
        ('{"keep": [-1]}', "expected expert numbers, got -1"),
        ('{"keep": [3, 3]}', "expert 3 is listed twice"),
        ('{"keep": [1], "score": [1]}', "unknown key 'score'; known are keep, scores"),
        ('{"keep": [1], "scores": 1}', "scores: expected a list of finite numbers"),
        ('{"keep": [1], "scores": [true]}', "scores: expected a list of finite numbers"),
        ('{"keep": [1], "scores": ["a"]}', "scores: expected a list of finite numbers"),
        ('{"keep": [1], "scores": [1' + "0" * 400 + "]}", "scores: expected a list of finite numbers"),
    ],
)
def test_a_bad_layer_is_refused_by_name(layer, message):
    with pytest.raises(InputError, match=message) as caught:
        Plan.from_json(f'{{"format": "moekern.plan/1", "layers": {{"7": {layer}}}}}', "my.json")
    assert str(caught.value).startswith("my.json: layer '7': ")


@settings(deadline=None)
@given(st.text(max_size=40) | st.one_of(JSON, JSON.map(lambda v: {"format": FORMAT, "layers": v})).map(json.dumps))
def test_any_text_is_a_plan_or_an_input_error(text):
    try:
        plan = Plan.from_json(text)
    except InputError:
        return
    assert plan.layers


def test_an_unreadable_file_is_an_input_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    for path in (tmp_path, tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(InputError, match="not a readable plan"):
            Plan.load(path)


@pytest.mark.parametrize(
    ("plan", "model", "message"),
    [
        (plan_of([1, 8]), Model(), "layer 0: expert 8 is out of range; the layer has experts 0 to 7"),
        (plan_of([1, 10**30]), Model(), "layer 0: expert 10+ is out of range"),
        (plan_of([1, 1]), Model(), "layer 0: expert 1 is listed twice"),
        (plan_of([0]), Model(), r"layer 0: keeps 1 experts: fewer than the 2 .* nearest legal: 2"),
        (plan_of([]), Model(), "layer 0: keeps 0 experts"),
        (plan_of([0, 1], **{"10": [1, 2, 3]}), Model(), "layer 0 keeps 2 experts and layer 10 keeps 3; engines"),
        (plan_of([0, 1], **{"mtp.0": [1, 2, 3]}), Model(), "layer 0 keeps 2 experts and layer mtp.0 keeps 3"),
        (plan_of([0, 1], **{"11": [0, 1]}), Model(), "layer '11' is not a MoE layer of this .* has 0, 10, mtp.0"),
        (Plan({"0": LayerPlan((0, 1))}), Model(), "layer 10 is missing"),
        (plan_of([0, 1, 2]), Model(Router(8, 2, 2, 2)), "not a multiple of .* 2 groups .* legal: 2 or 4"),
        (plan_of([0, 1, 2, 4]), Model(Router(8, 2, 2, 2)), r"groups of 4 experts keep \[3, 1\]"),
        (plan_of([0, 4]), Model(Router(8, 2, 2)), "fewer than top_k = 2; nearest legal: 4"),
        (plan_of([0, 4]), Model(Router(8, 2, 2, 2, 2)), "a group is ranked by its best 2"),
        (plan_of([0, 1], scores=(1.0,) * 7), Model(), "layer 0: 7 scores for 8 experts"),
        (plan_of([0, 1.0]), Model(), "layer 0: expected expert numbers, got 1.0"),
        (replace(plan_of([0, 1]), provenance={"fingerprint": "e" * 64}), Model(), "made for another model"),
        (replace(plan_of([0, 1]), provenance={"fingerprint": 3}), Model(), "made for another model"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, model, message):
    with pytest.raises(InputError, match=message) as caught:
        check_plan(plan, model, FINGERPRINT, "my.json")
    assert str(caught.value).startswith("my.json: ")


@pytest.mark.parametrize(
    ("plan", "model"),
    [
        (plan_of([0, 7]), Model()),
        (plan_of(range(8)), Model()),
        (plan_of([0, 1], **{"mtp.0": [6, 7]}), Model()),
        (plan_of([0, 3, 4, 5], scores=(0.0,) * 8), Model(Router(8, 2, 2, 1, 2))),
        (replace(plan_of([0, 1]), provenance={"fingerprint": FINGERPRINT, "by": "hand"}), Model()),
    ],
)
def test_a_plan_that_fits_passes(plan, model):
    check_plan(plan, model, FINGERPRINT)


def test_what_is_no_file_of_a_plan(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(document.SIZE_CAP + 1)
    for name, reason in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        ("folder", "not a regular file"),
        ("large", f"more than the limit of {document.SIZE_CAP}"),
        ("none", "No such file"),
    ):
        with pytest.raises(InputError, match=f"{name}: not a readable plan .*{reason}"):
            Plan.load(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: not a readable plan .*{reason}"):
            convert(tmp_path / name, "moekern", None, lambda *_: {})
