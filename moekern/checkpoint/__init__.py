"""A safetensors checkpoint folder: every header is checked once at the door, and everything after trusts it."""

from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.header import Shard, TensorEntry

__all__ = ["Checkpoint", "Shard", "TensorEntry", "open_checkpoint"]
