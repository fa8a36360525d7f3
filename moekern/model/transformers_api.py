"""Every semi-public transformers function moekern leans on. Nothing else imports from transformers' insides.

Checked against transformers 5.17 to 5.23. `tests/model/test_transformers_api.py` fails loudly when one of them changes.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import moe
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from moekern.architectures import Layout
from moekern.architectures.config_keys import check_sizes, own_code
from moekern.architectures.quantisation import OF_INPUTS, QUANTIZATION_KEYS, quantisation_of, unread
from moekern.checkpoint.folder import CONFIG
from moekern.checkpoint.strict_json import read_json
from moekern.errors import MEMORY, InputError, first_line
from moekern.model import dequantised
from moekern.model.aligned import eager_where_odd
from moekern.model.config_numbers import Numbers, put_numbers
from moekern.model.expert_lists import blocks_with_lists, expert_modules, list_router
from moekern.model.layer_lists import is_experts_module, layer_index, module_list, outermost_list
from moekern.model.memory import Unfilled, with_layer_alone
from moekern.model.stacked import only_stacked, stacked

BUFFERS_CAP = 1 << 30  # bytes, where real ones take a few MB
_ONE = threading.RLock()
_ROUTERS: WeakKeyDictionary[nn.Module, list[tuple[type, int]]] = WeakKeyDictionary()  # of models, found once
EXPERTS_FUNCTIONS, grouped_linear = moe.ALL_EXPERTS_FUNCTIONS, moe._grouped_linear
turned_back = revert_weight_conversion  # what a model holds, as its checkpoint does
TWIN = "; prune and verify work, and so does a plan that was made on an unquantised twin of the model"


@dataclass(frozen=True)
class Loader:
    """A model on the meta device and transformers' own way of filling it from checkpoint tensors.

    Quantised weights are made plain before, so that the model is the one that plain weights have.
    """

    model: PreTrainedModel
    mapping: list[Any]  # transformers' ordered renamings and converters for this model
    names: Mapping[str, Tensor]  # the model's own state dict: what a renamed key must be found in
    dtype: torch.dtype
    quantisation: Mapping[str, Any] = field(default_factory=dict)  # what config.json says of stored weights

    def model_key(self, key: str) -> str | None:
        """The model's name for a checkpoint key (of the first target, where one key fills several); None if unknown.

        The parts of a quantised weight (codes, scales, ...) are all known by the weight's name.
        """
        return self.part_of(key)[2]

    def part_of(self, key: str) -> tuple[str, str, str | None]:
        """The plain weight that a checkpoint tensor is a part of, which part, and the model's name for the weight."""
        for weight, part in dequantised.readings(key):
            target = self._renamed(weight)
            if target is not None:
                return weight, part, target
        return key, dequantised.WEIGHT, None

    def _renamed(self, key: str) -> str | None:
        return self.way(key)[0]

    def way(self, key: str) -> tuple[str | None, str | None]:
        """The model's name for a weight, and the pattern of the converter that takes it; None where there is none."""
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, self.names)
        if renamed not in self.names and key in self.names:
            renamed, pattern = rename_source_key(key, [], [], prefix, self.names)
        return (renamed, pattern) if renamed in self.names else (None, None)

    def decoder_layers(self) -> tuple[str, nn.ModuleList]:
        """Name and modules of the decoder: the outermost module list with MoE blocks; of several, the text decoder's.

        Raises InputError when no module list holds MoE blocks.
        """
        names = [name for name, module in self.model.named_modules() if is_experts_module(module)]
        names += [*(name for name, _ in blocks_with_lists(self.model)), *router_modules(self.model, self.model)]
        lists = dict.fromkeys(filter(None, (outermost_list(self.model, name) for name in names)))
        if not lists:
            raise InputError(f"{type(self.model).__name__}: no decoder layers with experts found in the model")
        depth = self.model.config.get_text_config(decoder=True).num_hidden_layers
        fitting = [name for name in lists if len(module_list(self.model, name)) == depth] or list(lists)
        name = next((n for n in fitting if "language" in n or "thinker" in n), fitting[0])
        return name, module_list(self.model, name)

    def moe_places(self, layout: Layout) -> dict[str, int]:
        """Plan key -> which decoder layer it is. Raises InputError for a layer the model has no place for."""
        name, _ = self.decoder_layers()
        places: dict[str, int] = {}
        for key, layer in layout.layers.items():
            indices = (layer_index(name, self.model_key(tensor.name)) for tensor in layer.tensors)
            index = next((i for i in indices if i is not None), None)
            if index is None:
                raise InputError(f"{type(self.model).__name__} has no place for the experts of layer {key} in {name}")
            places[key] = index
        return places

    def alone(self, layers_name: str, i: int, layer: nn.Module) -> Loader:
        """For a model with this layer alone: what is loaded changes nothing that another thread computes with."""
        return replace(self, model=with_layer_alone(self.model, layers_name, i, layer))

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Convert checkpoint tensors and put them into the model, quantised ones a few weights at a time: beside what
        is loaded there are as many dequantised bytes as the largest of them has.

        Raises InputError for a shape that config.json does not imply and for a tensor that cannot be converted.
        """
        for plain in self._plain(tensors, device):
            if rest := self.stacked(plain, device):
                self._load(rest, device)

    def stacked(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """See `model.stacked`."""
        return stacked(self.model, tensors, self.way, self.mapping, self.model._get_dtype_plan(self.dtype), device)

    def only_stacked(self, keys: Iterable[str]) -> bool:
        return only_stacked(keys, self.way, self.mapping, self.model._get_dtype_plan(self.dtype))

    def _load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        plan, mapping = self.model._get_dtype_plan(self.dtype), copy.deepcopy(self.mapping)
        config = LoadStateDictConfig(device_map={"": device}, dtype=self.dtype, dtype_plan=plan, weight_mapping=mapping)
        with _quiet(), _in_turn():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        if info.mismatched_keys:
            name, got, expected = sorted(info.mismatched_keys, key=str)[0]
            raise InputError(f"{name}: the checkpoint holds shape {tuple(got)}, config.json implies {tuple(expected)}")
        if info.conversion_errors:
            name, reason = sorted(info.conversion_errors.items())[0]
            if MEMORY.search(str(reason)):
                raise MemoryError(f"converting {name}")
            raise InputError(f"{name}: transformers could not convert it: {str(reason).splitlines()[0]}")

    def _plain(self, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[Mapping[str, Tensor]]:
        """The same tensors with quantised ones dequantised; what fills one parameter of the model comes together."""
        if not any(dequantised.is_coded(key, tensor) for key, tensor in tensors.items()):
            yield tensors
            return
        weights: dict[str, dict[str, dict[str, Tensor]]] = {}  # parameter -> weight of the checkpoint -> its parts
        for key, tensor in tensors.items():
            weight, part, target = self.part_of(key)
            if target is not None and part not in OF_INPUTS:
                weights.setdefault(target, {}).setdefault(weight, {})[part] = tensor
        coded = {
            t: self.names[t].numel() for t, found in weights.items() if any(map(self._is_coded, found, found.values()))
        }
        yield {key: parts[dequantised.WEIGHT] for t in weights if t not in coded for key, parts in weights[t].items()}
        batch, held, most = dict[str, Tensor](), 0, max(coded.values(), default=0)
        for target, size in sorted(coded.items(), key=lambda item: -item[1]):
            if held and held + size > most:
                yield batch
                batch, held = {}, 0
            batch |= {key: self._dense(key, parts, device) for key, parts in weights.pop(target).items()}
            held += size
        if batch:
            yield batch

    def _is_coded(self, key: str, parts: Mapping[str, Tensor]) -> bool:
        """Whether a weight's numbers are to be made of its parts. FP8 alone is codes where config.json says so."""
        weight = parts.get(dequantised.WEIGHT)
        if weight is None or len(parts) > 1:
            return True
        if weight.dtype in dequantised.FLOAT8:
            return bool(self.quantisation)
        target = self.names.get(self.part_of(key)[2] or "")
        return not weight.is_floating_point() and target is not None and target.is_floating_point()

    def _dense(self, key: str, parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
        if not self._is_coded(key, parts):
            return parts[dequantised.WEIGHT]
        there = {part: tensor.to(device, non_blocking=True) for part, tensor in parts.items()}
        try:
            dtype = self.dtype if self.dtype in dequantised.FLOATS else torch.float32  # as which it is then cast
            return dequantised.dense(there, self.quantisation, dtype)
        except ValueError as error:
            raise InputError(f"{key}: {first_line(error)}{TWIN}") from error


def loader_of(model: PreTrainedModel) -> Loader:
    """The loader of a model already in memory, for its names of checkpoint keys."""
    return Loader(model, get_model_conversion_mapping(model), model.state_dict(), model.dtype)


def open_loader(
    folder: Path,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    layout: Layout | None = None,
    tensors: int = 1 << 20,
) -> Loader:
    """The model of a checkpoint folder with meta parameters and real buffers, in the checkpoint's dtype unless given.

    With `layout`, layers that hold fewer experts than config.json says are built with their own number. Raises
    InputError when transformers knows no such model, and for one that is larger than the checkpoint's `tensors` can be.
    """
    source = str(folder / CONFIG)
    given = read_json(folder / CONFIG)
    check_sizes(given, source)
    try:
        quantisation = quantisation_of(given)
        config, cls = _read_config(folder, quantisation, trust_remote_code)
        wanted = dtype or config.dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    except InputError:
        raise
    except Exception as error:  # a config is anybody's, and so is what it makes transformers raise
        if own_code(given) and not trust_remote_code:
            what = "the code of its model lies beside the weights, and runs with --trust-remote-code alone"
            raise InputError(f"{source}: {what}; inspect, prune and verify work without") from error
        raise InputError(f"{source}: transformers cannot read it: {first_line(error)}") from error

    def build(numbers: Numbers) -> Loader:
        changed = put_numbers(copy.deepcopy(config), numbers)
        try:
            _check_room(cls, copy.deepcopy(changed), wanted, tensors)
            model = _empty_model(cls, changed, wanted)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except Exception as error:
            raise InputError(f"{source}: no model can be built from it: {first_line(error)}") from error
        return Loader(model, get_model_conversion_mapping(model), model.state_dict(), wanted, quantisation)

    loader = build({})
    return loader if layout is None else _with_own_counts(loader, layout, build)


def _read_config(
    folder: Path, quantisation: Mapping[str, Any], trust_remote_code: bool
) -> tuple[Any, type[PreTrainedModel]]:
    """The config as transformers reads it, but of plain weights, and the model class."""
    if reason := unread(quantisation):
        raise InputError(f"{folder}: {reason}{TWIN}")
    with _quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config(decoder=True)):
        for key in QUANTIZATION_KEYS:
            vars(part).pop(key, None)
    return config, _model_class(config, trust_remote_code)


def _check_room(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype, tensors: int) -> None:
    """Build the model once without memory. Raises InputError where it has more modules than so many tensors could fill,
    or buffers larger than any model's: a config can ask for any number of either."""
    cap, count = 1000 + 4 * tensors, 0  # a decoder layer has up to two modules for each of its tensors

    def counted(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > cap:
            raise InputError(f"its model has more than {cap} modules, too many for the checkpoint's {tensors} tensors")

    handle = nn.modules.module.register_module_module_registration_hook(counted)
    try:
        with torch.device("meta"), Unfilled(), _quiet():
            model = cls._from_config(config, dtype=dtype)
    finally:
        handle.remove()
    nbytes = sum(buffer.nbytes for buffer in model.buffers())
    if nbytes > BUFFERS_CAP:
        raise InputError(f"its model has buffers of {nbytes} bytes beside its weights, more than {BUFFERS_CAP}")


def _empty_model(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model in eval mode with meta parameters and real buffers."""
    with _quiet(), init_empty_weights(include_buffers=False):
        with Unfilled():  # a stack of experts would be allocated before it is a parameter
            model = cls._from_config(copy.deepcopy(config), dtype=dtype)
        if any(buffer.is_meta for buffer in model.buffers()):
            model = cls._from_config(config, dtype=dtype)
    return eager_where_odd(model.eval(), filter(is_experts_module, model.modules()))


def layers_with(loader: Loader, numbers: Numbers) -> nn.ModuleList:
    """The decoder layers of the same model with these numbers in its config, by path: parameters on the meta device."""
    model = _empty_model(type(loader.model), put_numbers(copy.deepcopy(loader.model.config), numbers), loader.dtype)
    return module_list(model, loader.decoder_layers()[0])


def _with_own_counts(loader: Loader, layout: Layout, build: Callable[[Numbers], Loader]) -> Loader:
    """The loader with each decoder layer that has fewer experts taken from a model that is built with so many."""
    fewer = {key: layer.num_experts for key, layer in layout.layers.items() if layer.num_experts < layout.num_experts}
    places, (_, layers) = loader.moe_places(layout) if fewer else {}, loader.decoder_layers()
    for count in sorted(set(fewer.values())):
        _, others = build(dict.fromkeys(layout.count_paths, count)).decoder_layers()
        for key in (key for key, n in fewer.items() if n == count):
            layers[places[key]] = others[places[key]]
    return replace(loader, names=loader.model.state_dict()) if fewer else loader


def _model_class(config: Any, trust_remote_code: bool) -> type[PreTrainedModel]:
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], config._name_or_path)
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise InputError(
            f"transformers {transformers.__version__} has no causal language model for model_type "
            f"{config.model_type!r} (architectures {config.architectures}); inspect, prune and verify still work"
        ) from None


def router_modules(part: nn.Module, model: nn.Module) -> dict[str, int]:
    """Names within `part` of the routers of `model`, each with the index of the router logits in its output."""
    if model not in _ROUTERS:
        _ROUTERS[model] = _router_classes(model)
    found = {f"{name}.{list_router(block)}".lstrip("."): 0 for name, block in blocks_with_lists(part)}
    return found | {
        name: index
        for target, index in _ROUTERS[model]
        for name, module in part.named_modules()
        if expert_modules(module) is None and isinstance(module, target)
    }


def _router_classes(model: nn.Module) -> list[tuple[type, int]]:
    """The classes that record router logits, and the index of these in their output, by a walk over the whole model."""
    found: list[tuple[type, int]] = []
    for owner in model.modules():
        recorder = getattr(owner, "_can_record_outputs", None) or {}
        recorder = recorder.get("router_logits") if isinstance(recorder, dict) else None
        for entry in recorder if isinstance(recorder, list) else [recorder] if recorder is not None else []:
            target, index = getattr(entry, "target_class", entry), getattr(entry, "index", 0)
            if target is not None and (target, index) not in found:
                found.append((target, index))
    return found


@contextmanager
def experts_implementation(modules: list[nn.Module], name: str) -> Iterator[None]:
    """Let these experts modules call the registered function `name`; what they called before is put back."""
    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = name
        yield
    finally:
        for config, own in before:
            config._experts_implementation_internal = own


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no load report while one layer of many is filled. In one thread at a time: building models
    and filling them changes settings of transformers, and of torch's modules, that threads share."""
    with _ONE:
        bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity(logging.CRITICAL)  # what it would log as an error, it raises or we refuse
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


@contextmanager
def _in_turn() -> Iterator[None]:
    """transformers makes tensors in this thread, each when it is needed: its own would copy on another stream."""
    own, here = core_model_loading.spawn_materialize, threading.get_ident()

    def made(pool: Any, *args: Any, **options: Any) -> Any:
        return own(None if threading.get_ident() == here else pool, *args, **options)

    core_model_loading.spawn_materialize = made
    try:
        yield
    finally:
        core_model_loading.spawn_materialize = own
