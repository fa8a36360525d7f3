"""What --data, --tokens and --preset say."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekern.cli.options import Mix
from moekern.data.mixes import PRESETS, Amount, Domain, budgets, domains_of, parse_tokens
from moekern.errors import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "b,c.txt", "odd:3", "rows.v2.jsonl.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "domains"),
    [
        ("a.txt", [Domain("text", "a.txt")]),
        ("code=src", [Domain("code", "src")]),
        ("code=src:200k", [Domain("code", "src", Amount(tokens=200_000))]),
        ("code=src:1.5M", [Domain("code", "src", Amount(tokens=1_500_000))]),
        ("code=src:64", [Domain("code", "src", Amount(sequences=64))]),
        ("code=src:0.5", [Domain("code", "src", Amount(share=0.5))]),
        ("code=src:25%", [Domain("code", "src", Amount(share=0.25))]),
        ("x=odd:3", [Domain("x", "odd:3")]),
        ("x=odd:3:4", [Domain("x", "odd:3", Amount(sequences=4))]),
        ("x=b,c.txt:4", [Domain("x", "b,c.txt", Amount(sequences=4))]),
        (
            "src:10k,prose=a.txt,rows.v2.jsonl.gz",
            [
                Domain("src", "src", Amount(tokens=10_000)),
                Domain("prose", "a.txt"),
                Domain("rows.v2", "rows.v2.jsonl.gz"),
            ],
        ),
        (
            "theblackcat102/evol-codealpaca-v1:8,open-r1/Mixture-of-Thoughts[code]:9,SWE-bench/SWE-smith-trajectories(tool):7",
            [
                Domain("evol-codealpaca-v1", "theblackcat102/evol-codealpaca-v1", Amount(sequences=8), True),
                Domain("Mixture-of-Thoughts-code", "open-r1/Mixture-of-Thoughts", Amount(sequences=9), True, "code"),
                Domain(
                    "SWE-smith-trajectories-tool",
                    "SWE-bench/SWE-smith-trajectories",
                    Amount(sequences=7),
                    True,
                    None,
                    "tool",
                ),
            ],
        ),
        ("src(test)", [Domain("src-test", "src", Amount(), True, None, "test")]),
    ],
)
def test_what_a_text_names(spec: str, domains: list[Domain], here: Path) -> None:
    assert domains_of([spec]) == domains


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([], "expected at least one NAME=PATH, or a --preset"),
        ([","], "expected at least one NAME=PATH"),
        (["a="], "no path is given"),
        pytest.param(["a=src:" + "9" * 5000], "no such file or folder|File name too long", id="5000 digits"),
        (["a/b=a.txt"], "plain name"),
        (["a=/nowhere/at/all"], "no such file or folder"),
        (["src/missing.jsonl"], "no such file or folder"),
        (["src/missing"], "no such file or folder"),
        (["a.txt,missing"], "no such file or folder: missing"),
        (["a=a.txt", "a=src"], "named twice"),
        (["chats=src:20q"], "'20q' is no amount of src: an amount is a number of sequences"),
        (["src:20 k"], "'20 k' is no amount of src"),
        (["src:-5"], "'-5' is no amount of src"),
        (["a.txt:10,src:1e6"], "src:1e6: '1e6' is no amount of src"),
        (["org/name[part]:20q"], r"'20q' is no amount of org/name\[part\]"),
        (["a=missing:20q"], "no such file or folder: missing:20q"),
        (["a.txt:2.0"], "a share of --tokens is more than 0 and at most 1"),
    ],
)
def test_what_is_not_there_or_not_clear_is_refused(specs: list[str], reason: str, here: Path) -> None:
    with pytest.raises(InputError, match=reason):
        domains_of(specs)


def test_budgets_are_numbers_shares_or_even() -> None:
    def of(*amounts: Amount, tokens: int | None = 1000) -> list[int | None]:
        return budgets([Domain(str(n), "x", amount) for n, amount in enumerate(amounts)], tokens, 32)

    assert of(Amount(), Amount(), Amount()) == [334, 333, 333]
    assert of(Amount(sequences=5), Amount(tokens=70), Amount(), Amount(share=0.25), Amount()) == [
        160,
        70,
        375,
        250,
        375,
    ]
    assert of(Amount(), Amount(tokens=9), tokens=None) == [None, 9]
    with pytest.raises(InputError, match=r"add up to 1\.2"):
        of(Amount(share=0.6), Amount(share=0.6))
    with pytest.raises(InputError, match="a share is of --tokens"):
        of(Amount(share=0.6), tokens=None)
    with pytest.raises(InputError, match="at least 2 for each of 2 domains"):
        of(Amount(share=1), Amount())
    with pytest.raises(InputError, match="--data 0: expected at least 2 tokens"):
        of(Amount(sequences=0))


@pytest.mark.parametrize(
    ("text", "tokens"), [("64", 64), ("500k", 500_000), ("2M", 2_000_000), ("0.5m", 500_000), ("all", None)]
)
def test_numbers_of_tokens(text: str, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2.5",
        "many",
        "-3",
        "3G",
        pytest.param("9" * 5000, id="5000 digits"),
        pytest.param("9" * 400 + ".5k", id="k"),
    ],
)
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(InputError, match="expected a number such as"):
        parse_tokens(text)


def test_presets_are_mixes_of_hub_data_sets() -> None:
    assert [mix.value for mix in Mix] == list(PRESETS)
    for mix in PRESETS.values():
        assert all(domain.on_hub for domain in domains_of([mix]))
