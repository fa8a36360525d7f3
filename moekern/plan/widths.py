"""What engines ask of the width of an expert: how many channels (rows of gate and up) each rank has of it.

Read from their sources, as in `targets`; that of transformers was also run, on a CPU with torch 2.13. Every rule is a
number that divides the width, so that those of several engines together are the least common multiple.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from moekern.plan.shards import Shards

# Families whose code in transformers multiplies experts without its grouped product.
OWN_PRODUCTS = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7")
WNA16 = ("gptq", "awq", "compressed-tensors/pack-quantized")  # formats that Marlin's kernels are for


@dataclass(frozen=True, slots=True)
class Stored:
    """Experts as far as rules of width look at them; `quantization` as `formats.weight_format` names it."""

    family: str
    quantization: str
    shards: Shards


@dataclass(frozen=True, slots=True)
class WidthRule:
    """multiple(experts) -> what must divide a rank's channels, 1 where anything may. stops: whether the engine does not
    run others; False: it does, at a cost that `text` names."""

    engines: tuple[str, ...]
    stops: bool
    multiple: Callable[[Stored], int]
    text: str


def _aligned(stored: Stored) -> int:
    """torch's grouped product: strides of whole 16 bytes."""
    plain = not stored.quantization and stored.family not in OWN_PRODUCTS
    return max(1, 16 // stored.shards.bytes) if plain else 1


WIDTHS: tuple[WidthRule, ...] = (
    # torch._grouped_mm refuses strides that are no multiple of 16 bytes; transformers/integrations/moe.py calls it
    # unless told otherwise (experts_implementation), and its fallback is not for this.
    WidthRule(
        ("transformers",), True, _aligned,
        "its grouped product takes multiples of {multiple}, unless loaded with experts_implementation='eager'",
    ),
    # quantization/fp8.py of both: what a rank has of gate and up by block_n.
    WidthRule(
        ("vllm", "sglang"), True, lambda stored: max(1, stored.shards.block),
        "a scale goes with {multiple} rows, and these are no whole blocks",
    ),
    # sglang's activation (silu_and_mul, of gate and up together): rows of whole 16 bytes.
    WidthRule(
        ("sglang",), True, lambda stored: max(1, 8 // stored.shards.bytes),
        "its activation takes multiples of {multiple}",
    ),
    # quantization/utils/marlin_utils.py of vLLM, check_moe_marlin_supports_layer; else the Triton kernel.
    WidthRule(
        ("vllm",), False, lambda stored: 64 if stored.quantization.startswith(WNA16) else 1,
        "its Marlin kernels take multiples of {multiple}; others take a slower path",
    ),
    # src/llama-quant.cpp: rows of down that a K-quant's block does not divide get a larger type (q4_K becomes q5_0,
    # q6_K q8_0), and F16 where 32 does not divide them either.
    WidthRule(
        ("llama.cpp", "ik_llama.cpp"), False, lambda stored: 256,
        "K-quants are for multiples of {multiple}; of others down becomes a larger type",
    ),
    # mlx_lm/utils.py, quantize_model: by default in groups of 64; other matrices stay as they are, without a word.
    WidthRule(
        ("mlx-lm",), False, lambda stored: 64,
        "its quantisation takes multiples of {multiple} by default; others stay as they are",
    ),
)  # fmt: skip


def width_problem(engine: str, stored: Stored, ranks: int = 1) -> str | None:
    """Why the engine does not run experts of `stored.shards.width` channels over so many ranks, and the nearest widths
    that it does run; None where it does, and where the width is not known."""
    width = stored.shards.width
    reason = _reason(engine, stored, ranks, stops=True)
    return reason and f"{reason}; nearest width that runs: {nearest(width, multiple_of(engine, stored, ranks))}"


def width_cost(engine: str, stored: Stored, ranks: int = 1) -> str | None:
    """What experts of this width cost there, and the nearest widths without this; None where nothing is known."""
    reason = _reason(engine, stored, ranks, stops=False)
    step = multiple_of(engine, stored, ranks, whole=True)
    return reason and f"{reason}; nearest width without this: {nearest(stored.shards.width, step)}"


def multiple_of(engine: str, stored: Stored, ranks: int = 1, *, whole: bool = False) -> int:
    """What divides the widths that the engine runs; `whole`: those that break no rule."""
    return ranks * lcm(*(rule.multiple(stored) for rule in _rules(engine) if rule.stops or whole))


def nearest(width: int, step: int) -> str:
    """The multiples of `step` below and above a width."""
    below = width // step * step
    return f"{below} or {below + step}" if below else str(step)


def _reason(engine: str, stored: Stored, ranks: int, *, stops: bool) -> str | None:
    """The first rule that is broken."""
    width = stored.shards.width
    if width % ranks:
        return f"{ranks} ranks do not divide an expert's {width} channels" if stops else None
    for rule in _rules(engine):
        multiple = rule.multiple(stored)
        if rule.stops is stops and (width // ranks) % multiple:
            over = f" over {ranks} ranks" if ranks > 1 else ""
            return f"experts have {width} channels{over}: {rule.text.format(multiple=multiple)}"
    return None


def _rules(engine: str) -> list[WidthRule]:
    return [rule for rule in WIDTHS if engine in rule.engines]
