"""What a row of a data set holds, whatever its shape: plain text, a conversation, or token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moekern.data.left_out import Unreadable

SHAPES = (
    "text, messages, conversations, input_ids, prompt and completion, instruction and output, question and answer, or "
    "query, tools and answers"
)
PAIRS = (  # of a question and its answer, after the names of published data sets
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
# Keys by which an object is a row itself, not one that holds rows.
ROW_KEYS = frozenset(
    {"input_ids", "text", "messages", "conversations", "query", *(key for pair in PAIRS for key in pair)}
)
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a row may not say of a template: how moekern calls it.
NOT_OPTIONS = frozenset(
    ("conversation", "tools", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors")
    + ("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens")
)


@dataclass(frozen=True)
class Passage:
    """Plain text: a whole document, or a piece of one that does not begin or end with it."""

    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Chat:
    """A conversation for the chat template. Arguments of tool calls are objects where they hold JSON objects."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the template: the row's chat_template_kwargs
    as_given: list[dict[str, Any]] | None = None  # messages with arguments as strings, where the row has such
    plain: str | None = None  # what stands for a pair where there is no chat template
    asked: str = ""  # what of that is the question
    parts: tuple[str, ...] = ()  # types of content that is no text, and is not in the messages


Document = Passage | Chat | np.ndarray


def asked(chat: Chat) -> Chat:
    """What comes before the last answer of a conversation, which the template is told to begin. Raises Unreadable where
    nothing does."""
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    end = answers[-1] if answers else len(chat.messages)
    if not end:
        raise Unreadable("messages begin with the answer: there is nothing to ask")
    return before(chat, end)


def before(chat: Chat, end: int) -> Chat:
    """A conversation up to the answer that is message `end`, which the template is told to begin; of a pair the
    question."""
    return replace(
        chat,
        messages=chat.messages[:end],
        as_given=None if chat.as_given is None else chat.as_given[:end],
        options={**chat.options, "add_generation_prompt": True},
        plain=None if chat.plain is None else chat.asked,
    )


def document_of(row: Any, column: str | None = None) -> Document:
    """The text, conversation or token ids of a row; of one column of it, where that is named.

    Raises Unreadable, which says what was expected.
    """
    if isinstance(row, str) and column is None:
        return _passage(row)
    if not isinstance(row, dict):
        raise Unreadable(f"expected an object with {SHAPES}")
    if column is not None:
        return _of_column(row, column)
    ids = row.get("input_ids")
    if _is_ids(ids):
        return np.asarray(ids, dtype=np.int64)
    if isinstance(row.get("text"), str):
        return _passage(row["text"])
    for key in ("messages", "conversations"):
        messages = _parsed(row.get(key), list)
        if messages is not None:
            return _chat(messages, row)
    if isinstance(row.get("query"), str) and _parsed(row.get("answers"), list) is not None:
        calls = _parsed(row["answers"], list)
        return _chat([_said("user", row["query"]), {"role": "assistant", "content": "", "tool_calls": calls}], row)
    for asked, answered in PAIRS:
        if row.get(asked) and row.get(answered) is not None:
            return _pair(row, asked, answered)
    raise Unreadable(f"expected {SHAPES}; name the column with --column (the row has {_named(row)})")


def _of_column(row: Mapping[str, Any], column: str) -> Document:
    value = row.get(column)
    if _is_ids(value):
        return np.asarray(value, dtype=np.int64)
    if isinstance(value, list):
        return _chat(value, row)
    if not isinstance(value, str):
        raise Unreadable(f"column {column!r} holds no text, messages or token ids (the row has {_named(row)})")
    return _passage(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and abs(i) < 1 << 63 for i in value)


def _named(row: Mapping[Any, Any]) -> str:
    keys = ", ".join(map(str, row))
    return keys if len(keys) <= 80 else f"{keys[:77]}..."


def _passage(text: str) -> Passage:
    check_characters(text)
    return Passage(text)


def check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unreadable("text holds half a surrogate pair, which is no character") from error


def _parsed(value: Any, kind: type) -> Any:
    """A value of this kind, or the one that a JSON string holds; None where there is none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, kind) else None


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> Chat:
    """A question, with what is given to it (alpaca's input), and an answer; each is a string or messages."""
    question, answer = row[asked], row[answered]
    if isinstance(question, list) or isinstance(answer, list):
        ask = question if isinstance(question, list) else [_said("user", question)]
        return _chat([*ask, *(answer if isinstance(answer, list) else [_said("assistant", answer)])], row)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise Unreadable(f"{asked}, {answered}: expected strings or messages")
    given = row.get("input") if asked == "instruction" else None
    if isinstance(given, str) and given.strip():
        question = f"{question}\n\n{given}"
    return _chat([_said("user", question), _said("assistant", answer)], row, (f"{question}\n\n", answer))


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _chat(messages: Iterable[Any], row: Mapping[str, Any], plain: tuple[str, str] | None = None) -> Chat:
    parts: list[str] = []
    read = [_message(message, parts) for message in messages]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not read or read[0]["role"] != "system"):
        read.insert(0, _said("system", system))
    if not any(message.get("content") or message.get("tool_calls") for message in read):
        raise Unreadable("messages hold no text")
    objects = [_with_objects(message) for message in read]
    as_given = None if objects == read else read
    options, pair = _options(row.get("chat_template_kwargs")), None if plain is None else "".join(plain)
    asked = "" if plain is None else plain[0]
    return Chat(objects, _tools(row.get("tools")), options, as_given, pair, asked, tuple(parts))


def _tools(given: Any) -> list[Any] | None:
    if given is None or given in ("", []):
        return None
    tools = _parsed(given, list)
    if tools is None:
        raise Unreadable("tools: expected a list, or a string that holds one as JSON")
    return [_named_function(tool) for tool in tools] or None


def _named_function(tool: Any) -> Any:
    """A bare {"name", ...}, in the form that templates are written for."""
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool


def _options(given: Any) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    options = _parsed(given, dict)
    if options is None:
        raise Unreadable("chat_template_kwargs: expected an object")
    taken = sorted(NOT_OPTIONS & options.keys())
    if taken:
        raise Unreadable(f"chat_template_kwargs: {taken[0]} is no option of a template")
    return options


def _message(message: Any, parts: list[str]) -> dict[str, Any]:
    """A message with role and content, whose content is text; kinds of other content are appended to `parts`."""
    if not isinstance(message, dict):
        raise Unreadable("messages: expected objects with role and content, or from and value")
    message = dict(message)
    role = message.pop("from") if "role" not in message and "from" in message else message.get("role")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    message["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    if message["role"] not in KNOWN_ROLES:
        raise Unreadable(f"messages: a role of {role!r:.40} is not known")
    calls = _parsed(message.get("tool_calls"), list) or []
    if role == "function_call":  # of conversations: the call is the value
        call = _parsed(message["content"], dict)
        if call is not None:
            calls, message["content"] = [call], ""
    if isinstance(message.get("function_call"), dict):  # of an older form of messages
        calls = [message.pop("function_call")]
    if calls:
        message["tool_calls"] = [_named_function(call) for call in calls]
    message["content"] = _content(message.get("content"), parts)
    return message


def _content(content: Any, parts: list[str]) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):  # a tool's answer
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        raise Unreadable(f"messages: content is {type(content).__name__}, expected text or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            parts.append(str(part.get("type", "unnamed")) if isinstance(part, dict) else type(part).__name__)
    return "".join(texts)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have arguments as objects, where they are strings that hold such."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Unreadable("messages: tool_calls: expected objects with a function")
        arguments = _parsed(function.get("arguments"), dict)
        calls.append(call if arguments is None else {**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}
