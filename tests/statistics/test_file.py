"""Statistics: they add, they merge, and a file of them is read back exactly or refused."""

import json
from contextlib import suppress
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moekern import files
from moekern.errors import InputError
from moekern.statistics.contradictions import ROUTED
from moekern.statistics.file import Statistics, merge
from moekern.statistics.header import FORMAT
from tests.helpers.measured import H, assert_same, header, layer_statistics, model_statistics, with_tiers


def raw_tensors(statistics):
    number = {d: i for i, d in enumerate(statistics.header["domains"])}
    return {
        f"{key}/{number[d]}/{f.name}": getattr(s, f.name).clone()
        for key, parts in statistics.layers.items()
        for d, s in parts.items()
        for f in fields(s)
    }


@pytest.mark.parametrize("dimensions", [0, H])
def test_save_and_load_are_bit_exact_and_stable(tmp_path, dimensions):
    sums = {domain: layer_statistics(i, dimensions=dimensions) for i, domain in enumerate("ab")}
    if dimensions:
        sums = {domain: with_tiers(s) for domain, s in sums.items()}
    s = Statistics(header(["a", "b"]), {"3": sums})
    s.save(tmp_path / "one")
    back = Statistics.load(tmp_path / "one")
    back.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert back.header == s.header
    assert back.sha256 == files.sha256(tmp_path / "one")
    for domain in "ab":
        assert_same(back.layers["3"][domain], s.layers["3"][domain])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_file_of_the_first_version_is_read_and_merged(tmp_path):
    new = model_statistics()
    later = ("logit_gram", "value_sum", "unit_sum", "residual_sum", "residual_tokens", "replay_tokens", "gradients")
    old = {name: t for name, t in raw_tensors(new).items() if name.rpartition("/")[2] not in later and t.numel()}
    metadata = {"moekern": json.dumps({**new.header, "format": "moekern.statistics/1"})}
    save_file(old, tmp_path / "old", metadata=metadata)
    back = Statistics.load(tmp_path / "old")
    assert back.header["format"] == FORMAT
    assert back.layers["0"]["code"].logit_gram.shape == (0, 0)
    twin = Statistics(back.header, {key: dict(parts) for key, parts in back.layers.items()})
    both = merge([back, twin])
    assert torch.equal(both.layer("0").pair_sum, 2 * back.layer("0").pair_sum)


def test_layers_come_back_in_natural_order(tmp_path):
    model_statistics(layers=("10", "mtp.0", "2")).save(tmp_path / "s")
    assert list(Statistics.load(tmp_path / "s").layers) == ["2", "10", "mtp.0"]


def test_a_layer_sums_the_named_domains():
    s = model_statistics()
    parts = s.layers["2"]
    assert_same(s.layer("2"), parts["prose"] + parts["code"])
    assert_same(s.layer("2", ["code"]), parts["code"])
    assert_same(s.layer("2", ["code", "code"]), parts["code"])
    with pytest.raises(InputError, match="no domain 'poetry'; it holds prose, code"):
        s.layer("2", ["poetry"])
    with pytest.raises(InputError, match="no layer '3'"):
        s.layer("3")


def test_merging_adds_sums_and_unites_domains_and_runs():
    a, b = model_statistics(0, domains=("prose", "code")), model_statistics(1, domains=("code", "law"))
    both = merge([a, b])
    assert both.domains == ("prose", "code", "law")
    assert both.header["tokens"] == {"prose": 40, "code": 80, "law": 40}
    assert both.header["runs"] == a.header["runs"] + b.header["runs"]
    for key in a.layers:
        assert_same(both.layers[key]["prose"], a.layers[key]["prose"])
        assert_same(both.layers[key]["code"], a.layers[key]["code"] + b.layers[key]["code"])
        assert_same(both.layers[key]["law"], b.layers[key]["law"])


def test_a_merged_file_is_saved_and_merged_again(tmp_path):
    merge([model_statistics(i) for i in range(2)]).save(tmp_path / "m")
    whole = merge([Statistics.load(tmp_path / "m"), model_statistics(2)])
    direct = merge([model_statistics(i) for i in range(3)])
    assert whole.header == direct.header
    assert_same(whole.layer("2"), direct.layer("2"), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model_statistics(1, fingerprint="e" * 64), "part 2 has fingerprint"),
        (model_statistics(1, top_k=1), "part 2 has top_k 1, part 1 2"),
        (model_statistics(1, n_group=2), "part 2 has n_group 2"),
        (model_statistics(1, num_experts=8), "part 2 has num_experts 8"),
        (model_statistics(1, layers=("0", "2")), "different layers: 10"),
        (
            Statistics(header(["prose"]), {k: {"prose": layer_statistics(0, dimensions=0)} for k in ("0", "2", "10")}),
            r"part 2, layer 0: dimensions \(square_sum\) is measured on one side only",
        ),
    ],
    ids=["fingerprint", "top_k", "groups", "experts", "layers", "dimensions"],
)
def test_what_does_not_match_is_not_merged(other, message):
    with pytest.raises(InputError, match=message):
        merge([model_statistics(0), other])


def test_nothing_is_not_merged():
    with pytest.raises(InputError, match="at least one"):
        merge([])


def _change(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def _put(value):
    def change(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return change


def _clear(expert):
    def change(tensor):
        tensor[expert] = 0
        if tensor.ndim == 2 and len(tensor) == tensor.shape[1]:
            tensor[:, expert] = 0
        return tensor

    return change


def _idle(where, but):
    """Expert 1 is chosen by nobody, and one field knows nothing of it."""

    def apply(tensors):
        for name in ROUTED + ("count", "top1_count"):
            if name != but:
                tensors[where + name] = _clear(1)(tensors[where + name])

    return apply


DAMAGE = {
    "nan": (_change("2/1/norm_sum", _put(float("nan"))), "tensor 2/1/norm_sum: not finite"),
    "negative": (_change("0/0/count", _put(-1)), "tensor 0/0/count: negative"),
    "too many slots": (_change("0/0/count", _put(500)), "tensor 0/0/count: .* exceed 40 tokens x top-2"),
    "overflow": (_change("0/0/count", lambda t: torch.full_like(t, 2**62)), "tensor 0/0/count: .* exceed"),
    "more logits than tokens": (_change("0/0/logit_tokens", lambda t: t + 50), "0/0/logit_tokens: .* exceed 40 tokens"),
    "first choices": (
        _change("0/0/top1_count", lambda t: t + 40),
        "0/0/top1_count: 280 first choices exceed 40 tokens",
    ),
    "first without a choice": (_change("0/0/count", _clear(1)), "0/0/top1_count: expert 1 is the first choice of more"),
    "diagonal": (
        _change("2/0/coactivation", lambda t: t.fill_diagonal_(3)),
        "2/0/coactivation: its diagonal is not co",
    ),
    "idle with norms": (
        _idle("0/0/", "norm_sum"),
        "tensor 0/0/norm_sum: not 0 for expert 1, which no token has chosen",
    ),
    "idle with pairs": (
        _idle("0/0/", "pair_sum"),
        "tensor 0/0/pair_sum: not 0 for expert 1, which no token has chosen",
    ),
    "pairs one way": (_change("10/1/pair_sum", _put(99.0)), "tensor 10/1/pair_sum: not symmetric"),
    "infinite": (_change("10/1/max_abs", _put(float("inf"))), "tensor 10/1/max_abs: not finite"),
    "dtype": (_change("0/0/gate_sum", torch.Tensor.float), "tensor 0/0/gate_sum: expected dtype F64, got F32"),
    "shape": (_change("0/0/pair_sum", lambda t: t[:, :3].clone()), r"tensor 0/0/pair_sum: expected shape \[E, E\]"),
    "rank": (_change("0/0/count", lambda t: t[None]), "tensor 0/0/count: expected shape"),
    "empty": (_change("0/0/count", lambda t: t[:0]), "tensor 0/0/"),
    "missing": (lambda t: t.pop("10/1/max_abs"), "tensor '10/1/max_abs' is missing"),
    "foreign": (lambda t: t.update({"lm_head.weight": torch.zeros(1)}), "tensor 'lm_head.weight' is not"),
    "domain": (lambda t: t.update({"0/2/count": t["0/0/count"].clone()}), "tensor '0/2/count' is not .* 2 domains"),
    "no layers": (lambda t: t.clear(), "no layers"),
}


def read(path):
    """Every number of a file."""
    return [parts[domain] for parts in Statistics.load(path).layers.values() for domain in parts]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_tensor(tmp_path, damage):
    s = model_statistics()
    tensors = raw_tensors(s)
    spoil, message = DAMAGE[damage]
    spoil(tensors)
    save_file(tensors, tmp_path / "s", metadata={"moekern": json.dumps(s.header)})
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "s")
    assert str(caught.value).startswith(f"{tmp_path / 's'}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "moekern.statistics/9"}, f"format 'moekern.statistics/9' is not '{FORMAT}'"),
        ({"top_k": 0}, "header: top_k"),
        ({"top_k": True}, "header: top_k"),
        ({"top_k": 7}, "do not agree"),
        ({"num_experts": 4}, "do not agree"),
        ({"fingerprint": None}, "header: fingerprint"),
        ({"domains": ["a", "a"]}, "header: domains"),
        ({"domains": []}, "header: domains"),
        ({"tokens": {"prose": 40}}, "header: tokens"),
        ({"tokens": {"prose": 40, "code": -1}}, "header: tokens"),
        ({"runs": "once"}, "header: runs"),
        ({"score": "argmax"}, "header: score: expected one of softmax, .*, got 'argmax'"),
        ({"n_group": 4}, "header: top_k 2, n_group 4 and topk_group 1 do not agree with num_experts 6"),
        ({"topk_group": 2}, "n_group 1 and topk_group 2 do not agree"),
        ({"num_experts": 1 << 62}, "header: num_experts: expected a count of at most 65536"),
        ({"domains": list(map(str, range(5000)))}, "header: domains: 5000 of them, more than the limit of 4096"),
        ({"runs": [{"data": float("nan")}]}, "header: not valid JSON: NaN"),
        ({"runs": [{"data": "\ud800"}]}, "header: not valid JSON"),
        ({"runs": [{"data": json.loads("[" * 900 + "]" * 900)}]}, "header: not valid JSON: nested more than 64 deep"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, change, message):
    s = model_statistics()
    save_file(raw_tensors(s), tmp_path / "s", metadata={"moekern": json.dumps({**s.header, **change})})
    with pytest.raises(InputError, match=message):
        Statistics.load(tmp_path / "s")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"moekern": "{"}, {"moekern": "[]"}, {"moekern": "[" * 99999}]
)
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"x": torch.zeros(2)}, tmp_path / "s", metadata=metadata)
    with pytest.raises(InputError, match=r"s: "):
        Statistics.load(tmp_path / "s")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(InputError, match="no such statistics file"):
            Statistics.load(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "s"
    model_statistics(layers=("0",), domains=("a",)).save(path)
    return path


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_truncated_or_flipped_file_is_refused_or_well_formed(saved, data):
    content = bytearray(saved.read_bytes())
    damaged = saved.with_name("damaged")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        damaged.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            Statistics.load(damaged)
        return
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged.write_bytes(content)
    with suppress(InputError):
        found = Statistics.load(damaged)
        assert found.layer(next(iter(found.layers))).problem(found.header["top_k"]) is None


def test_saving_refuses_what_loading_would(tmp_path):
    s = model_statistics()
    s.layers["2"]["code"].norm_sum[0] = float("inf")
    with pytest.raises(ValueError, match=r"\[Statistics.save\] tensor 2/1/norm_sum: not finite"):
        s.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_saving_into_no_folder_is_an_input_error(tmp_path):
    (tmp_path / "no").touch()
    with pytest.raises(InputError, match="no is no folder"):
        model_statistics().save(tmp_path / "no" / "s")
