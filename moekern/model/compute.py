"""Where and in what type layers are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moekern.errors import InputError, first_line
from moekern.team import ALONE, Member, Team

FEW = 32  # tokens
AUTO = "auto"


@dataclass(frozen=True)
class Compute:
    """Where, in what type and by which kernels layers are computed, from the command line to the core.

    device: "auto" (the first CUDA device where torch has one, else the CPU) or torch's name for one. dtype: a name such
    as "float32", or torch's; "auto" is the checkpoint's, or float32 where the CPU computes that slowly and memory
    allows (`precision.settled`). backend: of the kernels (None: the best); a named one never falls back.
    trust_remote_code: run code that comes with a checkpoint. memory, gpu_memory: bytes that the process may take of the
    host's and of the GPU's (None: what is free). spill: a folder for what does not fit (None: the system's for
    temporary files). team: the processes that share text and layers.
    """

    device: str = "auto"
    dtype: str | torch.dtype = AUTO
    backend: str | None = None
    trust_remote_code: bool = False
    memory: int | None = None
    gpu_memory: int | None = None
    spill: Path | None = None
    team: Team = ALONE

    @property
    def place(self) -> torch.device:
        """The device itself. Raises InputError for a name that is none of torch's."""
        return device_named(self.device)

    @property
    def described(self) -> str:
        """Where layers are computed, for people."""
        team = f", {self.team.described}" if self.team.described else ""
        if self.place.type == "cpu":
            threads = torch.get_num_threads()
            return f"computing on the CPU, {threads} thread{'s' if threads > 1 else ''}{team}"
        name = f" ({torch.cuda.get_device_name(self.place)})" if self.place.type == "cuda" else ""
        return f"computing on {self.place}{name}{team}"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None while the type is "auto". Raises InputError for a name that is none of torch's types."""
        if not isinstance(self.dtype, str):
            return self.dtype
        if self.dtype == AUTO:
            return None
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise InputError(f"--dtype {self.dtype}: no such type; expected a name such as float32 or bfloat16")
        return found

    @property
    def dtype_name(self) -> str | None:
        """As artefacts name it; None while the type is "auto"."""
        return None if self.dtype in (AUTO, None) else str(self.dtype).removeprefix("torch.")


def device_named(device: str) -> torch.device:
    """The device that `device` names, there or not; "auto" is the first CUDA device where torch has one, else the CPU.
    Of several processes on a node each has a CUDA device of its own, unless `device` numbers one.

    Raises InputError for a name that is none of torch's.
    """
    member = Member.of_torchrun()
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device == "auto" or (device == "cuda" and member is not None):
        return torch.device("cuda", member.local_rank if member is not None else 0)
    try:
        return torch.device(device)
    except Exception as error:
        raise InputError(f"--device {device}: not usable here ({first_line(error)})") from error


def check_device(device: str) -> None:
    """Raise InputError for a device torch does not know or does not have."""
    place, member = device_named(device), Member.of_torchrun()
    if member is not None and place.type == "cuda" and device in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
        if member.local_size > gpus:
            raise InputError(
                f"--device {device}: {member.local_size} processes on a node with {gpus} GPUs; start no more than it "
                "has (--nproc_per_node), or number one for all"
            )
    try:
        torch.empty(1, device=place)
    except Exception as error:  # each of torch's devices raises its own
        raise InputError(f"--device {device}: not usable here ({first_line(error)})") from error
    if place.type == "meta":
        raise InputError(f"--device {device}: holds no numbers")


@contextmanager
def few_tokens(tokens: int, device: torch.device) -> Iterator[None]:
    """Compute with one thread while the context is open, where a CPU is given fewer tokens than FEW.

    With several threads a matrix product of so few rows is divided otherwise, and rounds otherwise.
    """
    threads = torch.get_num_threads()
    if tokens >= FEW or device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
