"""Rows of every published shape reach the model whole, with their special tokens once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.data.left_out import Unreadable
from moekern.data.rows import Chat, document_of
from tests.helpers.text import CALLS, CHATML, folder_of, lines, read

CALL = {"name": "weather", "arguments": '{"city": "Bern"}'}
ASKED = [{"role": "user", "content": "Rain?"}]
TALK = [*ASKED, {"role": "assistant", "content": "No."}]
WANT = "<user>Rain?<|im_end|>\n<assistant>No.<|im_end|>\n"
CALLED = "<user>Rain?<|im_end|>\n<assistant>CALL weather city=Bern<|im_end|>\n"
TOOL = [{"name": "weather"}]
TOOLS = 'TOOLS [{"type": "function", "function": {"name": "weather"}}]\n'


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "Rain?"}, "<s>Rain?</s>"),
        ({"messages": TALK}, WANT),
        ({"messages": json.dumps(TALK)}, WANT),
        ({"conversations": TALK}, WANT),
        ({"conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "No."}]}, WANT),
        ({"prompt": "Rain?", "completion": "No."}, WANT),
        ({"prompt": ASKED, "completion": TALK[1:]}, WANT),
        ({"question": "Rain?", "answer": "No."}, WANT),
        ({"instruction": "Rain?", "output": "No."}, WANT),
        ({"instruction": "Rain?", "input": "", "output": "No.", "system": "Hi."}, "<system>Hi.<|im_end|>\n" + WANT),
        ({"instruction": "Rain?", "input": "In Bern.", "output": "No."}, WANT.replace("Rain?", "Rain?\n\nIn Bern.")),
        ({"query": "Rain?", "answers": json.dumps([CALL]), "tools": json.dumps(TOOL)}, TOOLS + CALLED),
        ({"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}]}, CALLED),
        ({"messages": [*ASKED, {"role": "assistant", "function_call": CALL}], "tools": TOOL}, TOOLS + CALLED),
        ({"conversations": [*ASKED, {"from": "function_call", "value": json.dumps(CALL)}]}, CALLED),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Ra"}, {"text": "in?"}]}, TALK[1]]}, WANT),
        ({"messages": [{"role": "tool", "content": {"rain": 3}}]}, '<tool>{"rain": 3}<|im_end|>\n'),
    ],
)  # fmt: skip
def test_shapes(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", CALLS)
    assert read(folder, lines(tmp_path / "a.jsonl", [row])) == (text, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "expected an object with text"),
        ({"body": "x"}, r"name the column with --column \(the row has body\)"),
        ({"input_ids": [1.5]}, "expected text"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "a role of 'alien' is not known"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages hold no text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [3]}]}, "tool_calls: expected objects"),
        ({"messages": TALK, "tools": "rain"}, "tools: expected a list"),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "tokenize is no option of a template"),
        ({"prompt": "x", "completion": 3}, "prompt, completion: expected strings or messages"),
        ({"text": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_what_is_no_text_says_why(row: Any, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        document_of(row)


def test_a_named_column_holds_text_messages_or_ids() -> None:
    assert document_of({"body": "x", "text": "y"}, "body").text == "x"  # type: ignore[union-attr]
    assert isinstance(document_of({"talk": TALK}, "talk"), Chat)
    assert list(document_of({"codes": [3, 4]}, "codes")) == [3, 4]  # type: ignore[arg-type]
    with pytest.raises(Unreadable, match="column 'other' holds no text"):
        document_of({"body": "x"}, "other")


def test_a_template_that_takes_arguments_as_strings_gets_them_and_it_is_said_once(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '->' + c.function.arguments }}{% endfor %}",
    )
    row = {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}]}
    text, said = read(folder_of(tmp_path / "model", template), lines(tmp_path / "a.jsonl", [row, row]))
    assert text.count('->{"city": "Bern"}') == 2
    assert [line for line in said if "given as JSON strings" in line] == said
    assert len(said) == 1


def test_what_a_template_passes_over_is_told_once(tmp_path: Path) -> None:
    calls = {"role": "assistant", "content": "Look.", "tool_calls": [{"function": CALL}], "reasoning_content": "Hm."}
    path = lines(tmp_path / "a.jsonl", [{"messages": [*ASKED, calls], "tools": TOOL}] * 2)
    assert read(folder_of(tmp_path / "model"), path)[1] == [
        f"the chat template does not look at {key}: those of the rows are not in the text"
        for key in ("tools", "tool_calls", "reasoning_content")
    ]


@pytest.mark.parametrize("begins", [True, False])
def test_special_tokens_are_never_doubled(begins: bool, tmp_path: Path) -> None:
    """By the template and by the tokenizer, in conversations and in text that a template has written before."""
    bare = folder_of(tmp_path / "bare", "{{ bos_token }}" + CHATML.replace("<|im_end|>", ""), begins=begins)
    closed = folder_of(tmp_path / "closed", "{{ bos_token }}" + CHATML, begins=begins)
    path = lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"text": "<s>written before</s>"}, {"text": "plain"}])
    mark = "<s>" if begins else ""
    written = f"<s>written before</s>{mark}plain</s>"
    assert read(closed, path)[0] == f"<s>{WANT}{written}"
    assert read(bare, path)[0] == f"<s>{WANT.replace('<|im_end|>', '')}</s>{written}"


def test_a_tokenizer_without_template_takes_pairs_as_text_and_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", None)
    path = lines(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "2 3", "output": "5"}, {"messages": TALK}])
    text, said = read(folder, path)
    assert text == "<s>Add.\n\n2 3\n\n5</s>"
    assert said == [
        "the tokenizer has no chat template: questions and answers are joined by a blank line",
        "text: left out: 1 of 2 rows of a.jsonl: first: line 2: the tokenizer has no chat template",
    ]


def test_pictures_are_named_and_leave_no_placeholder(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Rain?"}, {"type": "audio"}]
    path = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": parts}, TALK[1]]}] * 2)
    text, said = read(folder_of(tmp_path / "model"), path)
    assert text == WANT * 2
    assert said == ["text: left out: 4 parts of messages that are no text (audio 2, image_url 2)"]


def test_thinking_is_what_the_option_says_or_else_the_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "{{ 'T' if enable_thinking else 'F' }}" + CHATML)
    path = lines(
        tmp_path / "a.jsonl",
        [{"messages": TALK, "chat_template_kwargs": {"enable_thinking": True}}, {"messages": TALK}],
    )
    found = {thinking: read(folder, path, thinking=thinking)[0] for thinking in ("row", "on", "off")}
    assert {key: text.replace(WANT, "") for key, text in found.items()} == {"row": "TF", "on": "TT", "off": "FF"}
    plain = folder_of(tmp_path / "plain")
    assert read(plain, path, thinking="on")[1] == [
        "--thinking on: the chat template does not ask for it; nothing changes"
    ]
