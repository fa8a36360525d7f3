"""The checkpoint's tokenizer, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import regular_size
from moekern.data.chat import Templates
from moekern.data.left_out import Notes, Unreadable
from moekern.data.readers import PIECE, cut_of
from moekern.data.rows import Chat, Document, Passage, check_characters
from moekern.errors import InputError, first_line

CARRIED = ("tools", "tool_calls", "reasoning_content")  # of a conversation, beside its contents
THINKING = ("enable_thinking", "thinking")  # what templates call it
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".vocab", ".py")  # of files that it may read
SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
SETTINGS_CAP, FILE_CAP = 4 << 20, 256 << 20  # bytes, where real ones have up to 1 and 40 MB


class Tokenizer:
    """The checkpoint's tokenizer, opened when the first text needs it.

    With `ended`, a text ends with the end-of-text token that keeps it apart from the next. thinking: "on", "off", or
    "row" as rows say.
    """

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool,
        *,
        ended: bool = True,
        thinking: str = "row",
        notes: Notes | None = None,
    ) -> None:
        self.folder, self.trust_remote_code, self.ended = folder, trust_remote_code, ended
        self.thinking, self.notes = thinking, notes or Notes()
        self.loaded: Any = None
        self.templates: Templates | None = None
        self.around: tuple[list[int], list[int]] = ([], [])  # ids that the tokenizer puts before and behind a text

    def get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

            self._check_files()
            try:
                loaded = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
            except Exception as error:  # a tokenizer's files are anybody's, and so is what they make transformers raise
                raise self._unusable(first_line(error)) from error
            # Without tokenizer files transformers makes an empty one from config.json's model_type.
            if len(loaded) <= len(loaded.all_special_tokens):
                raise self._unusable("its vocabulary is empty")
            self.loaded = loaded
            self.around = _around(loaded)
        return self.loaded

    def _unusable(self, reason: str) -> InputError:
        instead = "give token ids instead (.npy, or JSONL with input_ids)"
        return InputError(f"{self.folder}: no usable tokenizer; {instead}: {reason}")

    def close(self) -> None:
        """End what conversations have begun."""
        if self.templates is not None:
            self.templates.close()
            self.templates = None

    def _check_files(self) -> None:
        """Raise InputError for a file that was not fetched, or that transformers would read for minutes or for ever."""
        for path in sorted(self.folder.iterdir()):
            if path.suffix in SUFFIXES and not path.is_dir():
                if is_pointer(path):
                    raise self._unusable(f"{path.name}: {A_POINTER}")
                cap = SETTINGS_CAP if path.name in SETTINGS else FILE_CAP
                if (size := regular_size(path)) > cap:
                    raise self._unusable(f"{path.name}: {size} bytes, more than the limit of {cap}")

    def ids(self, document: Document) -> np.ndarray:
        """Token ids [N] int64. Raises Unreadable for what the chat template cannot render."""
        if isinstance(document, np.ndarray):
            return document
        ids = self.encode(document) if isinstance(document, Passage) else self.chat(document)
        return np.asarray(ids, dtype=np.int64)

    def encode(self, passage: Passage) -> list[int]:
        """A text with the tokenizer's own begin token where it begins, and one end-of-text token where it ends."""
        tokenizer = self.get()
        before, behind = self.around
        ids = self._plain(passage.text)
        if passage.begins and ids[: len(before)] != before:  # text may have been written by a template
            ids = [*before, *ids]
        if not passage.ends:
            return ids
        if behind and ids[-len(behind) :] != behind:
            ids = [*ids, *behind]
        end = tokenizer.eos_token_id if self.ended else None
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _plain(self, text: str) -> list[int]:
        """Without special tokens but those that are written in the text, piece by piece."""
        tokenizer, ids = self.get(), []
        for piece in _pieces(text):
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def chat(self, chat: Chat) -> list[int]:
        """A conversation as the template writes it, which has all its special tokens.

        Raises Unreadable with what the template raised, and InputError where it takes too much.
        An end-of-text token follows only where the template ends with no token of the kind.
        """
        tokenizer = self.get()
        if not tokenizer.chat_template:
            if chat.plain is None:
                raise Unreadable("the tokenizer has no chat template")
            self.notes.say("the tokenizer has no chat template: questions and answers are joined by a blank line")
            return self.encode(Passage(chat.plain))
        self._check_carried(chat)
        text = self._rendered(chat)
        check_characters(text)
        ids, end = self._plain(text), tokenizer.eos_token_id if self.ended else None
        closing = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        return ids if end is None or text.rstrip().endswith(closing) else [*ids, end]

    def _check_carried(self, chat: Chat) -> None:
        """Say what a template passes over in silence."""
        template = str(self.get().chat_template)
        for key in CARRIED:
            given = chat.tools if key == "tools" else any(message.get(key) for message in chat.messages)
            if given and key not in template:
                self.notes.warn(f"the chat template does not look at {key}: those of the rows are not in the text")

    def _rendered(self, chat: Chat) -> str:
        try:
            return self._render(chat.messages, chat)
        except Unreadable:
            if chat.as_given is None:
                raise
        text = self._render(chat.as_given, chat)
        self.notes.say("the chat template takes no objects as arguments of tool calls: they are given as JSON strings")
        return text

    def _render(self, messages: Sequence[dict[str, Any]], chat: Chat) -> str:
        tokenizer, options = self.get(), dict(chat.options)
        if self.thinking != "row":
            options |= dict.fromkeys(THINKING, self.thinking == "on")
            if not any(name in str(tokenizer.chat_template) for name in THINKING):
                self.notes.warn(f"--thinking {self.thinking}: the chat template does not ask for it; nothing changes")
        if self.templates is None:
            self.templates = Templates(tokenizer)
        try:
            return self.templates.render(list(messages), chat.tools, options)
        except InputError as error:
            raise InputError(f"{self.folder}: the chat template {error}") from error


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and behind a text."""
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE:
        stop = start + cut_of(text[start : start + 2 * PIECE])
        yield text[start:stop]
        start = stop
    yield text[start:]
