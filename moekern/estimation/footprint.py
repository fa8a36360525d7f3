"""How much memory a pruned model takes: weights from the checkpoint's headers, the KV cache from its config."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.architectures.config_keys import LAYER_KEYS, first, sections
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.files import sized

CACHE_BYTES = 2  # of one number in the KV cache: 16 bits
# Left as stored when --bits is given, as quantisers do: embeddings and the output layer (and routers, known by their
# role).
UNQUANTISED = re.compile(r"(?:^|[._])(?:embed\w*|wte|lm_head)\.")
# Scales and zero points of a quantised source; --bits counts them in.
COMPANION = re.compile(r"scale|zero_point|qzeros|g_idx|weight_shape")
# Words of layer_types and its likes: layers whose memory does not grow with the text.
STATELESS = re.compile(r"linear|mamba|conv|recurrent|moe|mlp|dense|ssm")
WINDOWED = re.compile(r"sliding|chunked|local")


@dataclass(frozen=True, slots=True)
class Fit:
    """What a person wants to fit: bytes, bits a weight (None: as stored), tokens of each sequence, sequences, and the
    bytes of the limit that are left to what is not counted: activations, fragmentation, what an engine may not use."""

    limit: int
    bits: float | None = None
    context: int = 0
    sequences: int = 1
    reserve: int = 0

    def __post_init__(self) -> None:
        for flag, good, wanted in (
            ("--fit", self.limit >= 1, "at least one byte"),
            ("--bits", self.bits is None or 1 <= self.bits <= 32, "1 to 32 bits a weight"),
            ("--context", self.context >= 0, "a number of tokens"),
            ("--sequences", self.sequences >= 1, "at least one"),
            ("--reserve", 0 <= self.reserve < max(1, self.limit), "less than --fit"),
        ):
            if not good:
                raise InputError(f"{flag}: expected {wanted}")


@dataclass(frozen=True)
class Footprint:
    """Weights in bits: what stays, and each layer's share of one expert (its weights and router rows)."""

    fixed: int
    per_expert: Mapping[str, int]  # of the layers whose experts are pruned, MTP layers among them
    main: frozenset[str]  # the layers that a plan names; MTP layers keep as many experts as the fullest of these
    cut: int  # bytes of what per_expert is a share of, in all

    def weights(self, counts: Mapping[str, int]) -> int:
        """Bytes with so many experts in each layer."""
        most = max(counts[key] for key in self.main)
        bits = sum(size * counts.get(key, most) for key, size in self.per_expert.items())
        return (self.fixed + bits + 7) // 8

    def uniform(self, count: int) -> int:
        """Bytes with `count` experts in every layer."""
        return self.weights(dict.fromkeys(self.main, count))


@dataclass(frozen=True, slots=True)
class Fitted:
    """The largest count that fits, and what it takes in bytes."""

    count: int
    weights: int
    cache: int

    def document(self, fit: Fit) -> dict[str, Any]:
        """For a plan's provenance."""
        return asdict(fit) | {"weights": self.weights, "cache": self.cache}


def footprint(checkpoint: Checkpoint, layout: Layout, *, bits: float | None = None, mtp: str = "prune") -> Footprint:
    """Weights of a checkpoint as a function of the kept experts; exact at the stored sizes.

    With `bits`, every matrix but embeddings, routers and the output layer takes so many bits a weight, scales included.
    mtp as in prune. Raises InputError with `bits` for experts whose stored integers do not tell how many weights they
    pack.
    """
    pruned = {**layout.layers, **(layout.mtp if mtp == "prune" else {})}
    cut = {tensor.name: (layer, tensor) for layer in pruned.values() for tensor in layer.tensors}
    fixed, whole = 0, dict.fromkeys(pruned, 0)
    for entry in checkpoint.tensors.values():
        if mtp == "drop" and entry.name.startswith(layout.mtp_prefixes):
            continue
        layer, tensor = cut.get(entry.name, (None, None))
        size = _bits(entry, bits, tensor, checkpoint)
        if layer is None or tensor is None:
            fixed += size
            continue
        share = _share(entry, layer, tensor, size)
        whole[layer.key] += share
        fixed += size - share
    each = {key: n // pruned[key].num_experts for key, n in whole.items()}
    return Footprint(fixed, each, frozenset(layout.layers), sum(whole.values()) // 8)


def largest_count(
    checkpoint: Checkpoint, layout: Layout, fit: Fit, legal: Iterable[int], *, mtp: str = "prune"
) -> Fitted:
    """The largest of the `legal` counts whose weights and cache fit. Raises InputError with the least size if none
    do."""
    found = footprint(checkpoint, layout, bits=fit.bits, mtp=mtp)
    cache = cache_bytes(checkpoint.config, layout.family.holder, fit.context, fit.sequences) if fit.context else 0
    counts = sorted(legal)
    if not counts:
        raise InputError(f"{checkpoint.folder}: no expert count is legal with these flags and targets")
    fitting = [n for n in counts if found.uniform(n) + cache + fit.reserve <= fit.limit]
    if not fitting:
        least, cached = found.uniform(counts[0]) + cache, f", {sized(cache)} of it KV cache" if cache else ""
        cached += f"; {sized(fit.reserve)} of the limit are kept by --reserve" if fit.reserve else ""
        raise InputError(
            f"--fit {sized(fit.limit)}: nothing fits; the smallest this model gets is {sized(least)}, with {counts[0]} "
            f"experts a layer{cached}"
        )
    return Fitted(fitting[-1], found.uniform(fitting[-1]), cache)


def cache_bytes(config: Mapping[str, Any], holder: str, context: int, sequences: int = 1) -> int:
    """The KV cache of `sequences` sequences of `context` tokens, at 16 bits a number.

    A layer with multi-head or grouped attention keeps, for each token, H_kv x (d_key + d_value) numbers; one with
    multi-head latent attention the compressed kv_lora_rank + qk_rope_head_dim (and its indexer's index_head_dim).
    Layers with a sliding window keep at most the window; layers without attention (linear, Mamba, convolution) keep a
    state of constant size, which is not counted. What an engine adds (activations, fragmentation) is not counted
    either. Raises InputError for a config that lacks a number this needs.
    """

    def number(*names: str) -> int | None:
        return first(config, names, holder)

    layers = number(*LAYER_KEYS)
    if layers is None or layers < 1:
        raise InputError(f"--context: config.json does not say how many layers there are ({LAYER_KEYS[0]})")
    rank = number("kv_lora_rank")
    if rank:
        width = rank + (number("qk_rope_head_dim") or 0) + (number("index_head_dim") or 0)
    else:
        heads = number("num_attention_heads", "n_heads", "n_head")
        groups = number("num_key_value_heads", "kv_n_heads", "num_attention_groups") or heads
        hidden = number("hidden_size", "d_model")
        size = number("head_dim", "attention_head_dim") or (hidden // heads if hidden and heads else None)
        if not groups or not size:
            raise InputError("--context: config.json gives no size of keys and values (num_key_value_heads, head_dim)")
        width = groups * (size + (number("v_head_dim") or size))
    window = number("sliding_window", "attention_chunk_size") or context
    tokens = sum(_tokens(kind, context, window) for kind in _kinds(config, holder, layers, number))
    return sequences * tokens * width * CACHE_BYTES


def _kinds(config: Mapping[str, Any], holder: str, layers: int, number: Callable[..., int | None]) -> Iterator[str]:
    """What each layer attends with: "full", or the config's own word."""
    for _, section in sections(config, holder):
        for name in ("layer_types", "layers_block_type", "attn_type_list"):
            kinds = section.get(name)
            if isinstance(kinds, list) and len(kinds) == layers and all(isinstance(kind, str) for kind in kinds):
                yield from kinds
                return
        pattern = section.get("hybrid_override_pattern")  # Nemotron-H: M Mamba, - and E feed-forward, * attention
        if isinstance(pattern, str) and pattern:
            yield from ("full" if letter == "*" else "mamba" for letter in pattern)
            return
        linear = section.get("linear_attn_config")  # Kimi Linear
        if isinstance(linear, dict) and isinstance(linear.get("full_attn_layers"), list):
            yield from ("full" for _ in linear["full_attn_layers"])
            return
    every, period = number("full_attention_interval"), number("attn_layer_period")  # Qwen3-Next; Jamba
    offset = number("attn_layer_offset") or 0
    for i in range(layers):
        linear_here = (every and (i + 1) % every) or (period and i % period != offset)
        yield "linear" if linear_here else "full"


def _tokens(kind: str, context: int, window: int) -> int:
    if WINDOWED.search(kind):
        return min(context, window)
    return 0 if STATELESS.search(kind) else context


def _bits(entry: TensorEntry, bits: float | None, tensor: ExpertTensor | None, checkpoint: Checkpoint) -> int:
    """Bits that a tensor takes."""
    stored = entry.nbytes * 8
    if bits is None:
        return stored
    if COMPANION.search(entry.name.rpartition(".")[2]):
        return 0
    steers = tensor is not None and tensor.role != "expert"
    if steers or len(entry.shape) < 2 or UNQUANTISED.search(entry.name):
        return stored
    if not entry.dtype.startswith(("F", "BF")):
        if tensor is not None and entry.dtype in ("U8", "I8", "I32"):
            raise InputError(
                f"--bits: {checkpoint.folder}: {entry.name} holds {entry.dtype}, which packs an unknown number of "
                "weights; leave --bits out to count what is stored"
            )
        return stored
    return math.ceil(math.prod(entry.shape) * bits)


def _share(entry: TensorEntry, layer: MoeLayer, tensor: ExpertTensor, size: int) -> int:
    """Bits of a tensor that go with the layer's routed experts."""
    if tensor.action == "drop":
        return size if tensor.expert is not None and tensor.expert < layer.num_experts else 0
    if tensor.action == "remap":
        return 0
    rows = entry.shape[tensor.axis]
    return size * (rows - tensor.trailing) // rows if rows else 0
