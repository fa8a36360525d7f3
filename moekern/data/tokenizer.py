"""The checkpoint's tokenizer, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekern.data.left_out import Notes, Unreadable
from moekern.data.readers import PIECE, cut_of
from moekern.data.rows import Chat, Document, Passage, check_characters
from moekern.errors import InputError, first_line

THINKING = ("enable_thinking", "thinking")  # what templates call it


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
        self.around: tuple[list[int], list[int]] = ([], [])  # ids that the tokenizer puts before and behind a text

    def get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

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

        An end-of-text token follows only where the template ends with no token of the kind.
        """
        tokenizer = self.get()
        if not tokenizer.chat_template:
            if chat.plain is None:
                raise Unreadable("the tokenizer has no chat template")
            self.notes.say("the tokenizer has no chat template: questions and answers are joined by a blank line")
            return self.encode(Passage(chat.plain))
        text = self._rendered(chat)
        check_characters(text)
        ids, end = self._plain(text), tokenizer.eos_token_id if self.ended else None
        closing = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        return ids if end is None or text.rstrip().endswith(closing) else [*ids, end]

    def _rendered(self, chat: Chat) -> str:
        try:
            return self._render(chat.messages, chat)
        except Exception as error:  # a chat template is a program of the checkpoint's author
            reason = f"the chat template cannot render it: {first_line(error)}"
            if chat.as_given is None:
                raise Unreadable(reason) from error
        try:
            text = self._render(chat.as_given, chat)
        except Exception as error:
            raise Unreadable(reason) from error
        self.notes.say("the chat template takes no objects as arguments of tool calls: they are given as JSON strings")
        return text

    def _render(self, messages: Sequence[dict[str, Any]], chat: Chat) -> str:
        options = dict(chat.options)
        if self.thinking != "row":
            options |= dict.fromkeys(THINKING, self.thinking == "on")
            if not any(name in str(self.get().chat_template) for name in THINKING):
                self.notes.warn(f"--thinking {self.thinking}: the chat template does not ask for it; nothing changes")
        return self.get().apply_chat_template(list(messages), tools=chat.tools, tokenize=False, **options)


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
