"""What a checkpoint says of the format of its weights."""

from collections.abc import Iterable, Mapping
from typing import Any

OF_INPUTS = ("input_scale", "input_global_scale", "qscale_act")  # of activations: not applied
METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "gptq", "awq")  # and all that begin with modelopt
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the format that weights are stored in; empty for plain ones."""
    for place in (config, config.get("text_config")):
        for key in QUANTIZATION_KEYS:
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                found: Mapping[str, Any] = place[key]
                return found
    return {}


def unread(config: Mapping[str, Any]) -> str | None:
    """Why weights are not what their stored numbers say, by what config.json says of the format; None where they are.

    A method that is not known may store them under any names, and one that rotates activations stores rotated ones.
    """
    method = str(config.get("quant_method", "")).replace("_tensors", "-tensors")
    if method and method not in METHODS and not method.startswith("modelopt"):
        return f"a forward pass over {method:.40} weights is not supported"
    transforms = config.get("transform_config")
    if transforms and not (isinstance(transforms, dict) and set(transforms) == {"expert_substitution"}):
        return "a forward pass with transforms of activations (transform_config) is not supported"
    return None


def inputs_line(names: Iterable[str]) -> str | None:
    """That scales of activations are left out, where tensors of these names are such; None where none is."""
    found = {name.rpartition(".")[2] for name in names} & {*OF_INPUTS}
    if not found:
        return None
    return f"activations are not quantised: {', '.join(sorted(found))} of the checkpoint are not applied"
