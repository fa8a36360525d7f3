"""The checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekern.errors import InputError, first_line


class Tokenizer:
    """The checkpoint's tokenizer, opened when the first text needs it.

    With `ended`, a text ends with the end-of-text token that keeps it apart from the next.
    """

    def __init__(self, folder: Path, trust_remote_code: bool, *, ended: bool = True) -> None:
        self.folder, self.trust_remote_code, self.ended = folder, trust_remote_code, ended
        self.loaded: Any = None

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
        return self.encode(self.get().apply_chat_template(messages, tokenize=False))
