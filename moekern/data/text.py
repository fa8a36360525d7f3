"""Which text goes through a model, as one object from the command line to the core."""

from __future__ import annotations

from dataclasses import dataclass

from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.data.read import read_data


@dataclass(frozen=True)
class Text:
    """Text of named domains ("name=path"), how much of it, and how it is packed; see `read_data`."""

    data: tuple[str, ...]
    tokens: int | None = None  # in all; None: everything
    sequence_length: int = 2048
    batch_size: int = 1  # sequences that losses are computed of at a time
    chunk: int | None = None  # sequences that statistics are computed of, and added, at a time; None: 2048 tokens
    seed: int = 0
    pack: bool = True  # documents one after another, cut to sequences; else a row each

    def read(self, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> TokenData:
        """The token batches for a checkpoint, by its tokenizer and within its vocabulary.

        Raises InputError as `read_data` does.
        """
        config = checkpoint.config
        nested = config.get("text_config")
        vocab = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
        return read_data(
            self.data,
            checkpoint.folder,
            vocab_size=vocab if isinstance(vocab, int) else None,
            tokens=self.tokens,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            chunk=self.chunk,
            pack=self.pack,
            seed=self.seed,
            trust_remote_code=trust_remote_code,
        )
