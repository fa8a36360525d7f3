"""Tokenizers and rows for tests of text: one token a byte, with special tokens of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from moekern.data.batches import TokenData
from moekern.data.read import read_data

BEGIN, END, CLOSE = "<s>", "</s>", "<|im_end|>"
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
CALLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% for k, v in c.function.arguments|items %}"
    " {{ k }}={{ v }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def folder_of(folder: Path, template: str | None = CHATML, *, begins: bool = True) -> Path:
    """A folder with a byte tokenizer, which puts a begin token before a text where asked for, and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END, CLOSE])
    if begins:
        special = [(BEGIN, tokenizer.token_to_id(BEGIN))]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=special
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def shown(data: TokenData, folder: Path) -> list[str]:
    """The text of each sequence."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [row.tolist() for batch in data.batches for row in batch.input_ids]
    return [tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def read(folder: Path, *specs: Path | str, **options: Any) -> tuple[str, list[str]]:
    """All the text that is read in one sequence a domain, and what is said of it."""
    said: list[str] = []
    data = read_data(
        [str(spec) for spec in specs], folder, **{"sequence_length": 1 << 20, "tell": said.append, **options}
    )
    return "\n--\n".join(shown(data, folder)), said


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ids_of(data: TokenData) -> list[int]:
    return np.concatenate([row.numpy() for batch in data.batches for row in batch.input_ids]).tolist()
