"""What a checkpoint says of the format of its weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Of activations: not applied.
OF_INPUTS = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "qscale_act")
# And all that begin with modelopt.
METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "auto-round", "quark")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
# Of codes that are packed into words. AutoRound and vLLM do not agree on what AWQ's order is of 8 bits.
BITS = {"gptq": (2, 3, 4, 8), "awq": (4, 8), "auto_awq": (4,), "pack-quantized": (2, 3, 4, 8)}
FORMS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}  # the others' words are arranged for a kernel
# AutoRound's packings: whose bytes they are, and the version of the zero points.
PACKINGS = {
    "auto_round:auto_gptq": ("gptq", 1), "auto_round:gptq": ("gptq", 1),
    "auto_round": ("gptq", 2), "auto_round:gptqmodel": ("gptq", 2),
    "auto_round:auto_awq": ("auto_awq", 2), "auto_round:awq": ("auto_awq", 2),
    **dict.fromkeys(("auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8"), ("floats", 0)),
}  # fmt: skip
ROUNDED_FLOATS = {"mx_fp": (4, 8), "nv_fp": (4,), "fp": (8,)}  # the beginnings of AutoRound's types: bits
PACKING = "auto_round:auto_gptq"  # where AutoRound names none
# Quark's weights: dtype -> the schemes of scales. Integers in groups are turned, and those of 4 bits have signs.
QUARK = {
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), ("per_tensor", "per_channel", "per_group", "per_block")),
    "int8": ("per_tensor", "per_channel"),
    "fp4": ("per_group",),
}
POWERS = "e8m0"


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
    method = method_of(config)
    if method and method not in METHODS and not method.startswith("modelopt"):
        return f"a forward pass over {method:.40} weights is not supported"
    if strange := next(_strange(method, config), None):
        return f"a forward pass over {strange} is not supported"
    transforms = config.get("transform_config")
    if transforms and not (isinstance(transforms, dict) and set(transforms) == {"expert_substitution"}):
        return "a forward pass with transforms of activations (transform_config) is not supported"
    return None


def method_of(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method", "")).replace("_tensors", "-tensors").removeprefix("intel/")


def block_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sizes of blocks of scales that a quantisation config names: DeepSeek's, compressed-tensors' or Quark's."""
    found = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in group_weights(config))]
    found += [weights.get("block_size") for weights in _quark_weights(config) if isinstance(weights, dict)]
    pairs = (pair for pair in found if isinstance(pair, (list, tuple)) and len(pair) == 2)
    return [(a, b) for a, b in pairs if type(a) is int and type(b) is int and min(a, b) > 0]


def group_weights(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors' groups of modules say of weights."""
    found = [group.get("weights") for group in _values(config.get("config_groups"))]
    return [weights for weights in found if isinstance(weights, dict)]


def packed_bits(config: Mapping[str, Any]) -> list[int]:
    """How many bits compressed-tensors' integers have, by group of modules."""
    found = [weights.get("num_bits") for weights in group_weights(config) if weights.get("type", "int") == "int"]
    return [bits for bits in found if type(bits) is int]


def zero_points_of(config: Mapping[str, Any]) -> tuple[int, bool]:
    """The version of GPTQ's zero points (see `kernels.quantised.gptq`), and whether GPTQModel has written them."""
    meta = config.get("meta")
    by_gptqmodel = isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer", "")).lower()
    if method_of(config) == "auto-round":
        return PACKINGS.get(_packing(config), ("", 1))[1], by_gptqmodel
    return (2 if "gptq_v2" in (config.get("checkpoint_format"), config.get("format")) else 1), by_gptqmodel


def form_of_awq(config: Mapping[str, Any]) -> object:
    return config.get("version", config.get("checkpoint_format"))


def bits_of(config: Mapping[str, Any], kind: str) -> tuple[int, ...]:
    """How many bits the codes of a module may have, which is packed as `gptq` or `awq` do it."""
    return BITS["auto_awq" if kind == "awq" and method_of(config) == "auto-round" else kind]


def _packing(config: Mapping[str, Any]) -> str:
    named = config.get("packing_format", config.get("backend", PACKING))
    return PACKING if named in ("auto", None) else str(named)


def _strange(method: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What config.json names that no layout is known of, in words."""
    if method in FORMS:
        yield from _unknown_bits(method, method, config.get("bits", config.get("w_bit", 4)))
        form = config.get("checkpoint_format") if method == "gptq" else form_of_awq(config)
        form = "marlin" if config.get("is_marlin_format") else form
        if form is not None and str(form).lower() not in FORMS[method]:
            yield f"{method} weights of the form {form!s:.20}"
    if method == "auto-round":
        yield from _strange_rounded(config)
    if method == "compressed-tensors":
        for group in _values(config.get("config_groups")):
            if (group.get("format") or config.get("format")) == "pack-quantized":
                for bits in packed_bits({"config_groups": {"": group}}):
                    yield from _unknown_bits("packed", "pack-quantized", bits)
    if method == "quark":
        yield from _strange_quark(config)


def _unknown_bits(what: str, kind: str, bits: object) -> Iterator[str]:
    if type(bits) is not int or bits not in BITS[kind]:
        yield f"{what} weights of {bits!r:.20} bits (of {', '.join(map(str, BITS[kind]))} it is)"


def _strange_rounded(config: Mapping[str, Any]) -> Iterator[str]:
    packing = _packing(config)
    if packing not in PACKINGS:
        yield f"auto-round weights in the packing {packing:.60}"
        return
    modules = config.get("extra_config")
    own = modules.items() if isinstance(modules, dict) else ()
    for name, given in [
        ("", config),
        *((f" of {name:.80}", {**config, **g}) for name, g in own if isinstance(g, dict)),
    ]:
        bits, kind, inputs = given.get("bits", 4), str(given.get("data_type", "int")), given.get("act_bits")
        form = PACKINGS[packing][0]
        if type(bits) is int and bits >= 16:
            continue  # plain
        if form == "floats":
            known = next((ROUNDED_FLOATS[start] for start in ROUNDED_FLOATS if kind.startswith(start)), ())
            if bits not in known or given.get("sym") is False:
                yield f"auto-round weights of the type {kind:.20} with {bits!r:.20} bits{name}"
            continue
        for line in _unknown_bits("auto-round", form, bits):
            yield f"{line}{name}"
        if not kind.startswith("int"):
            yield f"auto-round weights of the type {kind:.20} in words{name}"
        if type(inputs) is int and inputs < 16:
            yield f"auto-round weights for activations of {inputs} bits{name}"


def _strange_quark(config: Mapping[str, Any]) -> Iterator[str]:
    for weights in _quark_weights(config):
        if weights is None:
            continue
        if not isinstance(weights, dict):
            yield "quark weights that are quantised twice"
            continue
        kind, scheme, scale = weights.get("dtype"), weights.get("qscheme"), weights.get("scale_format")
        groups = weights.get("group_size") == 32 and scale == POWERS if kind == "fp4" else scale != "e5m3"
        axis = weights.get("ch_axis") in ((None, 0, -2) if scheme == "per_channel" else (None, 1, -1))
        if scheme not in QUARK.get(str(kind), ()) or not groups or not (axis or scheme in ("per_tensor", "per_block")):
            yield f"quark weights of {kind!s:.20} ({scheme!s:.20}, scales {scale!s:.20})"
    algorithms = config.get("algo_config")
    for algorithm in algorithms if isinstance(algorithms, list) else (algorithms,):
        name = str(algorithm.get("name", "")) if isinstance(algorithm, dict) else ""
        if name in ("rotation", "quarot"):
            yield f"quark weights that are rotated ({name})"


def _quark_weights(config: Mapping[str, Any]) -> Iterator[Any]:
    """What Quark's settings, of all modules and of some, say of weights."""
    of_all = config.get("global_quant_config")
    for given in [of_all, *(one for key in ("layer_quant_config", "layer_type_quant_config")
                            for one in _values(config.get(key)))]:  # fmt: skip
        if isinstance(given, dict):
            yield given.get("weight")


def _values(table: object) -> list[Mapping[str, Any]]:
    return [value for value in table.values() if isinstance(value, dict)] if isinstance(table, dict) else []


def inputs_line(names: Iterable[str]) -> str | None:
    """That scales of activations are left out, where tensors of these names are such; None where none is."""
    found = {name.rpartition(".")[2] for name in names} & {*OF_INPUTS}
    if not found:
        return None
    return f"activations are not quantised: {', '.join(sorted(found))} of the checkpoint are not applied"
