"""The checkpoint's tokenizer, and its chat template."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import regular_size
from moekern.data.left_out import HeldNotes, Unreadable
from moekern.data.process import TokenizerProcess, TokenizerProcesses
from moekern.data.readers import PIECE, cut_of
from moekern.data.rows import Chat, Document, Passage, asked, before, check_characters
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
MOST_PROCESSES = 8


class Tokens(NamedTuple):
    """The ids [N] int64 of a document, or why there are none, and what is to be said of it."""

    ids: np.ndarray | Unreadable | InputError
    notes: HeldNotes


class Tokenizer:
    """The checkpoint's tokenizer, opened when the first text needs it, at work in a process for each core.

    With `ended`, a text ends with the end-of-text token that keeps it apart from the next. thinking: "on", "off", or
    "row" as rows say. answers: ids of what a row asks are told apart from those of its answer, by ~id in their place.
    With `prompting` a conversation ends where its last answer begins.
    """

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool,
        *,
        ended: bool = True,
        thinking: str = "row",
        answers: bool = False,
        prompting: bool = False,
    ) -> None:
        self.folder, self.trust_remote_code, self.ended, self.thinking = folder, trust_remote_code, ended, thinking
        self.answers, self.prompting = answers, prompting
        self.count = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)  # of processes
        self.loaded: Any = None
        self.processes: TokenizerProcesses | None = None
        self.around: tuple[list[int], list[int]] = ([], [])  # ids that the tokenizer puts before and behind a text

    def get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

            with self._guarded():
                self._check_files()
                loaded = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
                # Without tokenizer files transformers makes an empty one from config.json's model_type.
                if len(loaded) <= len(loaded.all_special_tokens):
                    raise self.unusable("its vocabulary is empty")
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
            raise self.unusable(first_line(error)) from error

    def _apart(self) -> TokenizerProcesses:
        """The processes that the loaded tokenizer works in, begun when they are first needed."""
        if self.processes is None:
            self.processes = TokenizerProcesses(self.loaded, self.count)
        return self.processes

    def unusable(self, reason: str) -> InputError:
        """The error for a tokenizer that cannot be had or does not work."""
        instead = "give token ids instead (.npy, or JSONL with input_ids)"
        return InputError(f"{self.folder}: no usable tokenizer; {instead}: {reason}")

    def close(self) -> None:
        """End the processes that texts have begun."""
        if self.processes is not None:
            self.processes.close()
            self.processes = None

    def _check_files(self) -> None:
        """Raise InputError for a file that was not fetched, or that transformers would read for minutes or for ever."""
        if not self.folder.is_dir():
            raise self.unusable("no such folder")
        for path in sorted(self.folder.iterdir()):
            if path.suffix in SUFFIXES and not path.is_dir():
                if is_pointer(path):
                    raise self.unusable(f"{path.name}: {A_POINTER}")
                cap = SETTINGS_CAP if path.name in SETTINGS else FILE_CAP
                if (size := regular_size(path)) > cap:
                    raise self.unusable(f"{path.name}: {size} bytes, more than the limit of {cap}")

    def start(self, documents: Sequence[Document]) -> Callable[[], list[Tokens]]:
        """Have documents tokenised; what is returned waits for their ids, in their order, up to the first InputError.

        Raises InputError where there is no tokenizer, unless all are ids already.
        """
        if all(isinstance(document, np.ndarray) for document in documents):
            return lambda: [self._given(ids) for ids in documents if isinstance(ids, np.ndarray)]
        self.get()
        return self._apart().submit(partial(self._tokens, documents)).result

    def _given(self, ids: np.ndarray) -> Tokens:
        """A document that is ids already."""
        sound = not self.answers or not len(ids) or int(ids.min()) >= 0
        return Tokens(ids if sound else Unreadable("token ids below 0"), HeldNotes())

    def ids(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text; `special`: with what the tokenizer puts around it. Raises InputError where it fails."""
        self.get()
        work = self._apart().submit(lambda process: Writing(self, process, HeldNotes()).piece(text, special))
        return [int(each) for each in work.result()]

    def _tokens(self, documents: Sequence[Document], process: TokenizerProcess) -> list[Tokens]:
        """Where one is refused, what comes behind it is not looked at."""
        found: list[Tokens] = []
        for document in documents:
            if isinstance(document, np.ndarray):
                found.append(self._given(document))
                continue
            notes = HeldNotes()
            try:
                found.append(Tokens(Writing(self, process, notes).ids(document), notes))
            except Unreadable as error:
                found.append(Tokens(error, notes))
            except InputError as error:
                return [*found, Tokens(error, notes)]
        return found

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and behind a text."""
        plain, whole = self._apart().submit(self._marked).result()
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def _marked(self, process: TokenizerProcess) -> tuple[list[int], list[int]]:
        """The ids of a text without, and with, what the tokenizer puts around it."""
        writing = Writing(self, process, HeldNotes())
        return writing.piece("a").tolist(), writing.piece("a", special=True).tolist()

    @cached_property
    def closing(self) -> tuple[str, ...]:
        """The tokens that a template may end a conversation with."""
        with self._guarded():
            return tuple({*self.loaded.all_special_tokens, *self.loaded.get_added_vocab()})


class Writing:
    """A document on its way to ids, in a process. A tokenizer that was opened is only read here."""

    def __init__(self, tokenizer: Tokenizer, process: TokenizerProcess, notes: HeldNotes) -> None:
        self.tokenizer, self.process, self.notes = tokenizer, process, notes
        self.end = tokenizer.loaded.eos_token_id if tokenizer.ended else None

    def ids(self, document: Passage | Chat) -> np.ndarray:
        """Token ids [N] int64. Raises Unreadable for what the chat template cannot render."""
        return self.passage(document) if isinstance(document, Passage) else self.chat(document)

    def passage(self, passage: Passage) -> np.ndarray:
        """A text with the tokenizer's own begin token where it begins, and one end-of-text token where it ends."""
        before, behind = self.tokenizer.around
        ids = self.plain(passage.text)
        if passage.begins and ids[: len(before)].tolist() != before:  # text may have been written by a template
            ids = _joined(before, ids)
        if not passage.ends:
            return ids
        if behind and ids[-len(behind) :].tolist() != behind:
            ids = _joined(ids, behind)
        return ids if self.end is None or (len(ids) and ids[-1] == self.end) else _joined(ids, [self.end])

    def plain(self, text: str) -> np.ndarray:
        """Without special tokens but those that are written in the text, piece by piece."""
        return _joined(*map(self.piece, _pieces(text)))

    def piece(self, text: str, special: bool = False) -> np.ndarray:
        try:
            return self.process.ids(text, special)
        except InputError as error:
            raise self.tokenizer.unusable(f"it {error}") from error

    def chat(self, chat: Chat) -> np.ndarray:
        """A conversation as the template writes it, which has all its special tokens.

        Raises Unreadable with what the template raised, and InputError where it takes too much.
        An end-of-text token follows only where the template ends with no token of the kind.
        """
        chat = asked(chat) if self.tokenizer.prompting else chat
        if not self.tokenizer.loaded.chat_template:
            if chat.plain is None:
                raise Unreadable("the tokenizer has no chat template")
            self.notes.say("the tokenizer has no chat template: questions and answers are joined by a blank line")
            ids = self.passage(Passage(chat.plain))
            return self._marked(ids, lambda: self.passage(Passage(chat.asked, ends=False)))
        self._check_carried(chat)
        text = self._rendered(chat)
        check_characters(text)
        ids = self.plain(text)
        if self.end is not None and not text.rstrip().endswith(self.tokenizer.closing):
            ids = _joined(ids, [self.end])
        return self._marked(ids, lambda: self.plain(self._asked(chat)))

    def _marked(self, ids: np.ndarray, asked: Callable[[], np.ndarray]) -> np.ndarray:
        """Where answers are told apart: ~id in the place of those with which it begins as what is asked does."""
        if not self.tokenizer.answers:
            return ids
        question = asked()
        most = min(len(ids), len(question))
        differs = np.flatnonzero(ids[:most] != question[:most])
        count = int(differs[0]) if len(differs) else most
        return np.concatenate([~ids[:count], ids[count:]])

    def _asked(self, chat: Chat) -> str:
        """A conversation up to its last message, an answer. Raises Unreadable where that is none."""
        if chat.messages[-1]["role"] != "assistant":
            raise Unreadable("messages: the last one is no answer (of the assistant)")
        return self._rendered(before(chat, len(chat.messages) - 1))

    def _check_carried(self, chat: Chat) -> None:
        """Say what a template passes over in silence."""
        template = str(self.tokenizer.loaded.chat_template)
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
        tokenizer, options = self.tokenizer, dict(chat.options)
        if tokenizer.thinking != "row":
            options |= dict.fromkeys(THINKING, tokenizer.thinking == "on")
            if not any(name in str(tokenizer.loaded.chat_template) for name in THINKING):
                said = f"--thinking {tokenizer.thinking}: the chat template does not ask for it; nothing changes"
                self.notes.warn(said)
        try:
            return self.process.render(list(messages), chat.tools, options)
        except InputError as error:
            raise InputError(f"{tokenizer.folder}: the chat template {error}") from error


def _joined(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE:
        stop = start + cut_of(text[start : start + 2 * PIECE])
        yield text[start:stop]
        start = stop
    yield text[start:]
