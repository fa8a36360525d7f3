"""Which text goes through a model, as one object from the command line to the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.read import default_length, read_data
from moekern.errors import InputError, check_type

POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Text:
    """Text of named domains ("name=source:amount"), how much of it, and how it is read and packed; see `read_data`."""

    data: tuple[str, ...]
    tokens: int | None = None  # of the domains that name no amount, in all; None: everything
    sequence_length: int | None = None  # None: 2048, or as many positions as the model has, where these are fewer
    batch_size: int = 1  # sequences that losses are computed of at a time
    chunk: int | None = None  # sequences that statistics are computed of, and added, at a time; None: 2048 tokens
    seed: int = 0
    pack: bool = True  # documents one after another, cut to sequences; else a row each
    columns: tuple[str, ...] = ()  # where the text of rows is: "column", or "name=column"
    thinking: str = "row"  # on, off, or as the rows say
    answers: bool = False  # those of rows are marked, for training: see `Batch`
    strict: bool = False  # stop at what cannot be read, instead of counting it
    prompts: int | None = None  # so many beginnings of each domain, in the place of sequences
    tell: Callable[[str], None] | None = field(default=None, compare=False)  # what is said on the way; None: warnings

    def read(self, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> TokenData:
        """The token batches for a checkpoint, by its tokenizer and within its vocabulary.

        Raises InputError as `read_data` does.
        """
        return read_data(
            self.data,
            checkpoint.folder,
            vocab_size=config_number(checkpoint, "vocab_size"),
            max_positions=config_number(checkpoint, POSITIONS),
            tokens=self.tokens,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            chunk=self.chunk,
            pack=self.pack,
            seed=self.seed,
            columns=self.columns,
            thinking=self.thinking,
            answers=self.answers,
            strict=self.strict,
            prompts=self.prompts,
            tell=self.tell,
            trust_remote_code=trust_remote_code,
        )


def check_data(data: TokenData, checkpoint: Checkpoint) -> None:
    """Raise TypeError for what is no TokenData of Batch, InputError for token ids outside a checkpoint's vocabulary."""
    check_type("data", data, TokenData)
    vocabulary = config_number(checkpoint, "vocab_size")
    for batch in data.batches:
        check_type("data.batches", batch, Batch)
        high = int(batch.input_ids.max()) if batch.input_ids.numel() else 0
        if vocabulary is not None and high >= vocabulary:
            raise InputError(
                f"data: domain {batch.domain}: token id {high} does not fit the model's vocabulary of {vocabulary}",
                kind="data",
            )


def length_for(checkpoint: Checkpoint, given: int | None) -> int:
    """Tokens of a sequence: what was given, or 2048, or as many positions as the model has, where these are fewer."""
    return given or default_length(config_number(checkpoint, POSITIONS))


def config_number(checkpoint: Checkpoint, key: str) -> int | None:
    """A number of config.json, or of its text_config."""
    nested = checkpoint.config.get("text_config")
    value = checkpoint.config.get(key, nested.get(key) if isinstance(nested, dict) else None)
    return value if type(value) is int else None
