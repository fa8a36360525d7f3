"""What `inspect` tells about a checkpoint, from its config, index and shard headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Family, built_by_transformers, family_named, find_layout
from moekern.architectures.config_keys import model_types, own_code
from moekern.architectures.quantisation import inputs_line, quantisation_of, unread
from moekern.architectures.substitution import Constants, as_whole
from moekern.architectures.widths import narrow_problem
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.recovery import RECOVERY, read_recovery
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.estimation.footprint import footprint
from moekern.router import count_problem

OWN_CODE = "its own code"


@dataclass(frozen=True)
class Overview:
    """A checkpoint's experts, in numbers; bytes are those of the safetensors data."""

    folder: str
    model: str  # the folder, or a hub id and its commit
    family: str
    fingerprint: str
    moe_layers: tuple[str, ...]
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    score: str
    mtp_layers: tuple[str, ...]
    shards: int
    tensors: int
    total_bytes: int
    routed_bytes: int  # routed experts of the main decoder
    cut_bytes: int  # what goes with experts: they, of MTP layers too, and their router rows
    bytes_per_expert: int  # one expert of one layer, on average
    dtypes: dict[str, int]  # safetensors dtype -> bytes of routed experts
    in_transformers: bool  # transformers has the model class
    run_by: str  # what calibrates and evaluates it: "transformers", "its own code", or "" for nothing that is known
    not_run: str  # why nothing does
    no_gradient: str  # why the gradient tier is not measured, where that is known
    note: str  # what is special about the family
    notes: tuple[str, ...]  # what files and config.json leave open or say wrong, and what keeps it from being pruned
    left_out: Mapping[str, str]  # files that a pruned checkpoint will not have -> why
    legal_counts: tuple[int, ...]  # kept experts a layer that the router can work with
    width: int | None  # channels of each expert, where the tensors say it
    not_narrowed: str | None  # why experts cannot lose channels; None: they can

    def bytes_at(self, kept: float, width: int | None = None) -> int:
        """Size after pruning to `kept` experts a layer, or a mean of so many, of `width` channels (None: all): exact
        for whole experts where layers have as many of one size, up to router rows for narrower ones."""
        of = self.width or 1
        whole, left = self.num_experts * of, kept * (of if width is None else width)
        return self.total_bytes - int(self.cut_bytes * (whole - left) // whole)


def overview(source: str | Path | Checkpoint) -> Overview:
    """Read a checkpoint's headers. Raises InputError for one that is not a MoE or whose keys are not understood."""
    stored = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint, constants = as_whole(stored)
    layout = find_layout(checkpoint)
    experts = [
        checkpoint.tensors[tensor.name]
        for layer in layout.layers.values()
        for tensor in layer.tensors
        if tensor.role == "expert" and tensor.name in stored.tensors
    ]
    told = (*_running(checkpoint), *_recovered(checkpoint))
    replaced = sum(len(each.tensors) for each in constants.values())
    dtypes: Counter[str] = Counter()
    for entry in experts:
        dtypes[entry.dtype] += entry.nbytes
    routed = sum(dtypes.values())
    refused = (f"{name!r}: {wrong}" for name, wrong in checkpoint.contents.refused.items())
    counts = range(1, layout.num_experts + 1)
    known, run_by, not_run = running(layout.family, checkpoint.config)
    return Overview(
        folder=str(checkpoint.folder),
        model=checkpoint.name,
        family=layout.family.name,
        fingerprint=stored.fingerprint,
        moe_layers=tuple(layout.layers),
        num_experts=layout.num_experts,
        top_k=layout.router.top_k,
        n_group=layout.router.n_group,
        topk_group=layout.router.topk_group,
        score=layout.family.score,
        mtp_layers=tuple(layout.mtp),
        shards=len(checkpoint.shards),
        tensors=len(stored.tensors),
        total_bytes=stored.nbytes,
        routed_bytes=routed,
        cut_bytes=0 if constants else footprint(checkpoint, layout).cut,
        bytes_per_expert=routed // max(1, sum(layer.num_experts for layer in layout.layers.values()) - replaced),
        dtypes=dict(dtypes.most_common()),
        in_transformers=known,
        run_by=run_by,
        not_run=not_run,
        no_gradient=layout.family.no_gradient,
        note=layout.family.note,
        notes=(*_replaced(constants), *checkpoint.notes, *layout.notes, *told, *refused),
        left_out=checkpoint.contents.left_out,
        legal_counts=tuple(n for n in counts if not constants and count_problem(n, layout.router) is None),
        width=layout.width,
        not_narrowed="its dropped experts are constants" if constants else narrow_problem(checkpoint, layout),
    )


def running(family: Family, config: Mapping[str, Any]) -> tuple[bool, str, str]:
    """Whether transformers has the model's class, what can run it, and why nothing can.

    A layout is found from the keys of tensors, and a model is built by the model_type of its config.json: a new one may
    have the tensors of a family that transformers knows.
    """
    name = next(iter(model_types(config)), "")
    known = built_by_transformers(name)
    if family.only_pruned:
        return known, "", family.only_pruned
    if known:
        return True, "transformers", ""
    if own_code(config):
        return False, OWN_CODE, ""
    if family_named(name) is None:
        return False, "", f"it is not known whether transformers has a class for model_type {shown(name)}"
    return False, "", f"transformers has no class for model_type {shown(name)}"


def _replaced(constants: Mapping[str, Constants]) -> Iterator[str]:
    """That experts are constants, where some are."""
    if constants:
        counts = [len(each.tensors) for each in constants.values()]
        each = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        what = f"{each} experts in each of {len(counts)} layers are constants (vLLM's expert substitution)"
        yield f"{what}: vLLM loads it, evaluate measures it, and transformers does not load it"


def _recovered(checkpoint: Checkpoint) -> Iterator[str]:
    """That tensors were trained after pruning, where a file says so."""
    try:
        found = read_recovery(checkpoint.folder)
    except InputError as error:
        yield str(error)
        return
    if found is not None:
        fewer = "".join(f"; {name} is {number} since" for name, number in found.get("settings", {}).items())
        yield f"recovered: {len(found['tensors'])} of its tensors were trained after pruning, as {RECOVERY} says{fewer}"
        if "adapter" in found:
            name = shown(found["adapter"])
            yield f"incomplete: its experts lack their products, the adapter {name}; alone it is no model to be used"


def _running(checkpoint: Checkpoint) -> Iterator[str]:
    """What stands in the way of a forward pass, or is left out of it, in the format of the weights."""
    reason, line = unread(quantisation_of(checkpoint.config)), inputs_line(checkpoint.tensors)
    if reason is not None:
        yield f"{reason}: it can be pruned and verified, with a plan made on an unquantised twin too, not calibrated"
    elif line is not None:
        yield f"in a forward pass {line}"
