"""The checkpoint's tokenizer, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import regular_size
from moekern.data.left_out import Notes, Unreadable
from moekern.data.process import TokenizerProcess
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
        self.process: TokenizerProcess | None = None
        self.around: tuple[list[int], list[int]] = ([], [])  # ids that the tokenizer puts before and behind a text

    def get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

            with self._guarded():
                self._check_files()
                loaded = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
                # Without tokenizer files transformers makes an empty one from config.json's model_type.
                if len(loaded) <= len(loaded.all_special_tokens):
                    raise self._unusable("its vocabulary is empty")
            self.loaded = loaded
            self.around = self._around()
        return self.loaded

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Its files are anybody's, and so is what they make libraries raise: a panic in Rust is no Exception."""
        try:
            yield
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise self._unusable(first_line(error)) from error

    def _apart(self) -> TokenizerProcess:
        """The process that the tokenizer works in, begun when it is first needed."""
        if self.process is None:
            self.process = TokenizerProcess(self.get())
        return self.process

    def _unusable(self, reason: str) -> InputError:
        instead = "give token ids instead (.npy, or JSONL with input_ids)"
        return InputError(f"{self.folder}: no usable tokenizer; {instead}: {reason}")

    def close(self) -> None:
        """End the process that texts have begun."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def _check_files(self) -> None:
        """Raise InputError for a file that was not fetched, or that transformers would read for minutes or for ever."""
        if not self.folder.is_dir():
            raise self._unusable("no such folder")
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
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._piece(piece)
        return ids

    def _piece(self, text: str, special: bool = False) -> list[int]:
        try:
            return self._apart().ids(text, special)
        except InputError as error:
            raise self._unusable(f"it {error}") from error

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and behind a text."""
        plain, whole = self._piece("a"), self._piece("a", special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

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
        return ids if end is None or text.rstrip().endswith(self._closing) else [*ids, end]

    @cached_property
    def _closing(self) -> tuple[str, ...]:
        """The tokens that a template may end a conversation with."""
        tokenizer = self.get()
        with self._guarded():
            return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})

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
        try:
            return self._apart().render(list(messages), chat.tools, options)
        except InputError as error:
            raise InputError(f"{self.folder}: the chat template {error}") from error


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE:
        stop = start + cut_of(text[start : start + 2 * PIECE])
        yield text[start:stop]
        start = stop
    yield text[start:]
