"""The checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import regular_size
from moekern.data.chat import Templates
from moekern.errors import InputError, first_line

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

    With `ended`, a text ends with the end-of-text token that keeps it apart from the next.
    """

    def __init__(self, folder: Path, trust_remote_code: bool, *, ended: bool = True) -> None:
        self.folder, self.trust_remote_code, self.ended = folder, trust_remote_code, ended
        self.loaded: Any = None
        self.templates: Templates | None = None

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
        return self.loaded

    def _unusable(self, reason: str) -> InputError:
        instead = "give token ids instead (.npy, or JSONL with input_ids)"
        return InputError(f"{self.folder}: no usable tokenizer; {instead}: {reason}")

    def encode(self, text: str) -> list[int]:
        tokenizer = self.get()
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id if self.ended else None
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def chat(self, messages: Any) -> list[int]:
        """The ids of a conversation. Raises InputError with the reason why the template gives no text."""
        if self.templates is None:
            self.templates = Templates(self.get())
        return self.encode(self.templates.render(messages))

    def close(self) -> None:
        """End what `chat` has begun."""
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
