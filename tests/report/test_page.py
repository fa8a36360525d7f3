"""The page: it is whole, holds everything, loads nothing, and says what files say as text."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from moekern.plan.make import make_plan
from moekern.report.collect import report_of
from moekern.report.page import page_of
from moekern.report.recipe import text_of
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import header, layer_statistics, model_statistics, with_halves

VOID = ("meta", "br", "img", "link", "input", "hr", "base")
MARK = "</script><script>alert(1)</script><img src=//x.y/z onerror='alert(2)'>\"&"


class Page(HTMLParser):
    """Elements of a page, each closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def data(self) -> Any:
        return json.loads(next(text for text in self.texts["script"] if text.startswith("{")))


def test_the_page_is_whole_and_loads_nothing() -> None:
    statistics = model_statistics()
    page = Page(page_of(report_of(statistics, {"half": make_plan(statistics, "reap", 4)})))
    assert page.open == []
    ids = [found["id"] for _, found in page.seen if "id" in found]
    assert len(set(ids)) == len(ids)
    links = [found["href"] for _, found in page.seen if "href" in found]
    assert {f"#{name}" for name in ids} >= set(links)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.seen}
    assert not any(name in found for _, found in page.seen for name in ("src", "srcset", "action", "background"))
    code = "".join(page.texts["script"] + page.texts["style"])
    assert not any(word in code for word in ("import(", "fetch(", "XMLHttp", "url(", "@import", "innerHTML", "eval("))
    assert code.count("http") == code.count("http://www.w3.org/2000/svg")  # a name, not a place
    assert any("default-src 'none'" in str(found.get("content")) for _, found in page.seen)
    labels = [found for tag, found in page.seen if tag == "canvas"]
    assert all(found["role"] == "application" and found["tabindex"] == "0" for found in labels)


def test_what_files_say_is_text() -> None:
    statistics = model_statistics(domains=(MARK, "code"), layers=(MARK, "1"), backend=MARK, dtype=MARK)
    statistics.header["runs"][0]["data"] = {"sources": {MARK: {"path": MARK, "tokens": 3}}, "seed": MARK}
    plans = {MARK: make_plan(statistics, "reap", 4)}
    loss = {"nll": 1.0, "kl": 0.5, "top1": 0.5, "tokens": 9, "sequences": 2}
    losses = {"losses": {MARK: {MARK: loss}, "original": {MARK: loss}}, "differences": []}
    page = Page(page_of(report_of(statistics, plans, losses)))
    assert page.open == []
    assert [tag for tag, _ in page.seen].count("script") == 2
    assert not {"img"} & {tag for tag, _ in page.seen}
    assert page.data["names"] == [MARK]
    assert MARK in page.texts["th"]


def test_values_and_kept_experts_are_those_of_the_report() -> None:
    statistics = model_statistics()
    plan = make_plan(statistics, "usage", 2)
    data = Page(page_of(report_of(statistics, {"p": plan}))).data
    tokens = np.frombuffer(base64.b64decode(data["values"]["tokens"]), "<f4")
    assert tokens.tolist() == [n for key in ("0", "2", "10") for n in statistics.layer(key).count.tolist()]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["kept"]["p"]), np.uint8), bitorder="little")
    assert bits[:18].tolist() == [e in plan.layers[key].keep for key in ("0", "2", "10") for e in range(6)]


def test_61_layers_of_384_experts_are_less_than_2_mb() -> None:
    E, layers = 384, [str(i) for i in range(61)]
    draw = torch.Generator().manual_seed(0)
    count = torch.randint(1, 500, (E,), generator=draw)
    pairs = torch.randint(0, 50, (E, E), generator=draw)
    half = LayerStatistics.zeros(E)
    half.tokens.fill_(4000)
    half.count.copy_(count)
    half.coactivation.copy_((pairs + pairs.T).fill_diagonal_(0) + torch.diag(count))
    half.logit_gram.copy_(torch.eye(E) + 1)
    half.logit_tokens.fill_(4000)
    for name in ("gate_sum", "norm_sum", "gated_norm_sum", "gated_norm_square_sum", "max_abs"):
        getattr(half, name).copy_(torch.rand(E, generator=draw, dtype=torch.float64))
    sums = with_halves(half, half.to("cpu"))
    told = header(["a", "b"], num_experts=E, top_k=8, n_group=8, topk_group=4)
    held = Statistics(told, {key: {"a": sums, "b": sums} for key in layers})
    page = page_of(report_of(held, {"half": make_plan(held, "gated_norm", 192)}))
    assert len(page.encode()) < 2_000_000
    data = Page(page).data
    assert {"tokens", "gated_norm", "reap"} <= set(data["values"])
    for pairs in data["pairs"]:
        n = len(pairs["experts"])
        assert n > 64
        assert len(base64.b64decode(pairs["lift"])) == len(base64.b64decode(pairs["alike"])) == n * (n - 1) // 2


@pytest.mark.parametrize("value", [None, 3, ["a"], "x" * 9999])
def test_what_a_file_says_is_short(value: Any) -> None:
    assert len(text_of(value)) <= 300


def test_a_model_without_tokens_has_a_page() -> None:
    empty = {"0": {"a": layer_statistics(0, tokens=0, dimensions=0)}}
    page_of(report_of(Statistics(header(["a"], tokens={"a": 0}), empty), {}))
