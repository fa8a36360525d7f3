"""What training made, as tensors of the checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS
from moekern.checkpoint.writing import write_tensors
from moekern.errors import InputError
from moekern.files import write_bytes
from moekern.model.finite import all_finite
from moekern.model.reader import DTYPES
from moekern.model.requantised import as_stored
from moekern.model.saved import places, saved
from moekern.recovery.factors import LEFT, RIGHT, SPARSE, Factored
from moekern.recovery.selection import Chosen, named
from moekern.recovery.trained import Trained

PREFIX = "base_model.model"  # peft's, of the model that an adapter is put on


def write_trained(trained: Trained, folder: Path, *, as_it_was: bool = False, sparse: bool = False) -> int:
    """Write what changes, by its names in the checkpoint and in its types, a file for each layer; of several ranks the
    first writes. Returns how many tensors there are. `as_it_was`: with their bytes in the checkpoint, which numbers of
    another type may not make. Raises InputError for numbers that the checkpoint's types cannot hold."""
    layerwise, count = trained.layerwise, 0
    layers = sorted({one.layer for one in trained.some if one.layer is not None})
    for i in layerwise.visit(layers):
        own = named(layerwise.layers_name, i, layerwise.layers[i])
        made = (trained.sparse if sparse else trained.made)(i)
        count += _write(trained, i, own, made, folder / f"layer-{i:05d}.safetensors", as_it_was)
    behind: dict[str, Tensor] = {one.name: layerwise.model.get_parameter(one.name) for one in trained.of_layer(None)}
    if behind:
        count += _write(trained, None, behind, trained.made(None), folder / "behind.safetensors", as_it_was)
    return count


def write_adapter(trained: Trained, folder: Path) -> int:
    """Write the products as an adapter of peft's (adapter_config.json, adapter_model.safetensors), whose names go from
    the model of transformers that the checkpoint is loaded as. Returns how many matrices there are."""
    if not trained.layerwise.team.first:
        return 0
    model = trained.layerwise.model
    pairs = [(one.name, *_product(trained, one)) for one in trained.some]
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    modules, parameters = list[str](), list[str]()
    for name, left, right in pairs:
        ranks[name] = left.shape[-1]
        if left.ndim == 2:
            modules.append(name.removesuffix(".weight"))
            place, A, B = modules[-1], right, left
        else:
            parameters.append(name)
            place, (A, B) = _nested(model, name, [n for n, *_ in pairs]), _stacked(model, name, left, right)
        tensors |= {f"{PREFIX}.{place}.lora_A.weight": A, f"{PREFIX}.{place}.lora_B.weight": B}
    folder.mkdir(exist_ok=True)
    stored = {name: as_stored(value.contiguous()) for name, value in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", stored, {"format": "pt"})
    most = max(ranks.values())
    scale = 1.0 if trained.training.factored else trained.training.lora_alpha / most
    less = {re.escape(name): rank for name, rank in ranks.items() if rank < most}
    patterns = {"rank_pattern": less, "alpha_pattern": {name: scale * rank for name, rank in less.items()}}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(trained.layerwise.checkpoint.folder),
        "r": most,
        "lora_alpha": scale * most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        **(patterns if less else {}),
    }
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return len(tensors)


def factored_size(trained: Trained) -> dict[str, int]:
    """What experts take as factors, of the type that they are stored in, and as matrices, in bytes; how many rows
    there are beside the products, of how many. {} where nothing is factored."""
    if trained.rows is None:
        return {}
    found = dict.fromkeys(("bytes", "of_bytes", "rows", "of_rows"), 0)
    layer = next(iter(trained.layerwise.layout.layers.values()))
    itemsize = DTYPE_BITS[trained.layerwise.checkpoint.tensors[next(layer.of_role("expert")).name].dtype] // 8
    for one in trained.some:
        values = {part: trained.numbers["value", name] for part, name, _ in one.values()}
        stays, width = values[SPARSE].any(-1), values[SPARSE].shape[-1]
        rows = int(stays.sum())
        factors = values[LEFT].numel() + values[RIGHT].numel()
        found["bytes"] += (factors + rows * width) * itemsize + -(-stays.numel() // 8)  # a bit a row
        found["of_bytes"] += values[SPARSE].numel() * itemsize
        found["rows"] += rows
        found["of_rows"] += stays.numel()
    return found


def _product(trained: Trained, one: Chosen) -> tuple[Tensor, Tensor]:
    """Two factors [..., rows, rank] and [..., rank, columns] of what is added to a parameter."""
    values = {part: trained.numbers["value", name] for part, name, _ in one.values()}
    if isinstance(one.form, Factored):
        return one.form.product(values)
    return values["lora_B"], values["lora_A"]


def _stacked(model: nn.Module, name: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [E, rows, rank] and [E, rank, columns] as peft has them: experts by experts, and ranks by ranks."""
    if getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False):
        left, right = right.mT, left.mT
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


def _nested(model: nn.Module, name: str, names: Sequence[str]) -> str:
    """Where peft keeps the factors of a parameter: of those of one module, each wraps the one before it."""
    owner = name.rpartition(".")[0]
    own = [f"{owner}.{part}" for part, _ in model.get_submodule(owner).named_parameters(recurse=False)]
    own = [each for each in own if each in names]
    return owner + ".base_layer" * (len(own) - 1 - own.index(name))


def _write(
    trained: Trained,
    layer: int | None,
    parameters: dict[str, Tensor],
    changed_to: dict[str, Tensor],
    path: Path,
    as_it_was: bool,
) -> int:
    names = {one.name for one in trained.of_layer(layer)}
    made = {name: value.detach().cpu() for name, value in parameters.items()} | changed_to
    loader, checkpoint = trained.layerwise.loader, trained.layerwise.checkpoint
    tensors: dict[str, tuple[str, Sequence[int], Any]] = {}
    changed = places(checkpoint, loader, parameters, names)
    for name, value in saved(loader, made).items():
        if name not in changed:
            continue
        if as_it_was:
            tensors[name] = _stored(checkpoint, name)
            continue
        own = value.to("cpu", DTYPES[checkpoint.tensors[name].dtype]).contiguous()
        if not all_finite(own):
            raise InputError(
                f"recover: {name}: became numbers that {own.dtype} cannot hold; a lower --rate may mend it"
            )
        tensors[name] = as_stored(own)
    if trained.layerwise.team.first:
        write_tensors(path, tensors, {})
    return len(tensors)


def _stored(checkpoint: Checkpoint, name: str) -> tuple[str, Sequence[int], bytes]:
    """dtype, shape and bytes of a tensor of the checkpoint."""
    entry = checkpoint.tensors[name]
    with (checkpoint.folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        return entry.dtype, entry.shape, file.read(entry.stop - entry.start)
