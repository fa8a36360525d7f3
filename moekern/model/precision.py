"""Which type layers are computed in where nobody names one."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from moekern.architectures import Layout
from moekern.checkpoint.folder import CONFIG, Checkpoint
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.files import sized
from moekern.kernels.checks import short
from moekern.model.budget import budget_of
from moekern.model.compute import Compute
from moekern.model.sizes import sizes_of

PLAIN = "float32"  # the type without emulation on every CPU


@dataclass(frozen=True, slots=True)
class Precision:
    """A type's name, and why it is another one than the checkpoint's, or a slow one; empty where there is no reason."""

    name: str
    why: str = ""

    @property
    def described(self) -> str:
        """For people."""
        return f"in {self.name}{f' ({self.why})' if self.why else ''}"


def precision(compute: Compute, checkpoint: Checkpoint, layout: Layout) -> Precision:
    """The type that `compute` names. Where it is "auto": the checkpoint's; or float32, where the CPU has no units for
    the checkpoint's and the budget has room for skeleton, largest layer and the reader's buffer at that size.

    Raises InputError for a type in config.json that torch does not have.
    """
    if compute.torch_dtype is not None:
        return Precision(str(compute.dtype_name))
    stored = stored_dtype(checkpoint, layout)
    if compute.place.type != "cpu" or not is_slow(stored):
        return Precision(stored)
    sizes, room = sizes_of(checkpoint, layout), budget_of(compute).host
    needed = 4 * (sizes.skeleton.weights + sizes.largest.weights) + sizes.largest.stored
    if needed <= room:
        return Precision(PLAIN, f"this CPU computes {stored} slowly")
    return Precision(
        stored, f"slow on this CPU, but {PLAIN} takes {sized(needed)} of memory and {sized(room)} are free"
    )


def settled(compute: Compute, checkpoint: Checkpoint, layout: Layout) -> Compute:
    """The same with a type in the place of "auto", which artefacts name; see `precision`."""
    if compute.dtype_name is not None:
        return compute
    return replace(compute, dtype=precision(compute, checkpoint, layout).name)


def stored_dtype(checkpoint: Checkpoint, layout: Layout) -> str:
    """The type that config.json gives the model: the root's, else that of the section of its text model, else float32.

    Raises InputError for one that torch does not have, or that is not of real numbers.
    """
    config: Any = checkpoint.config
    holder: Any = config
    for key in filter(None, layout.family.holder.split(".")):
        holder = holder.get(key) if isinstance(holder, dict) else None
    for section in (config, holder, config.get("text_config")):
        for key in ("dtype", "torch_dtype") if isinstance(section, dict) else ():
            name = section.get(key)
            if name is None:
                continue
            found = getattr(torch, name, None) if isinstance(name, str) else None
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise InputError(f"{checkpoint.folder / CONFIG}: {key} is {shown(name)}, expected one such as bfloat16")
            return short(found)
    return PLAIN


def is_slow(dtype: str) -> bool:
    """Whether CPUs like this one emulate products in a type: bfloat16 without AVX-512, float16 on an x86-64 without
    units for it. By what the CPU can do, and not by a timing, which would make the bits depend on chance."""
    if dtype == "float16":
        supported: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
        return platform.machine() == "x86_64" and not supported()
    return dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
