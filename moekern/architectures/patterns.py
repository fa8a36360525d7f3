"""Names of tensors with an expert dimension. "#" stands for a number, "|" separates alternatives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one block stores its experts: head, then one of the projections, then anything (quantised companions)."""

    head: str
    parts: Mapping[str, str]  # name of a projection -> gate, up, gate_up (both in one tensor) or down
    rows: bool = False  # experts are folded into the rows of a matrix, all of them [I, H]

    @property
    def projections(self) -> frozenset[str]:
        return frozenset(self.parts)

    @property
    def indexed(self) -> bool:
        return "#" in self.head


def scheme(head: str, projections: str, rows: bool = False) -> Scheme:
    """projections: "name=projection" each, the name alone where it says all."""
    split = [text.partition("=") for text in projections.split()]
    return Scheme(head, {name: part or name for name, _, part in split}, rows)


GATE_UP_DOWN = "gate_proj=gate up_proj=up down_proj=down"
UP_DOWN = "up_proj=up down_proj=down"
SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "gate_up_down": (scheme("experts.#.", GATE_UP_DOWN),),
    "up_down": (scheme("experts.#.", UP_DOWN),),
    "w123": (scheme("experts.#.", "w1=gate w2=down w3=up"),),
    "short": (scheme("experts.#.", "gate up down"),),
    "grok": (scheme("moe.#.", "linear=gate linear_v=up linear_1=down"),),
    "named": (scheme("experts.expert_#.", "wi=up wo=down"), scheme("experts.expert_#.", "fc1=up fc2=down")),
    "pairs": (scheme("chunk_experts.#.", GATE_UP_DOWN),),
    "stacked": (scheme("experts.", "gate_up_proj=gate_up down_proj=down"), scheme("experts.", UP_DOWN)),
    "linears": (scheme("", "input_linear=gate_up output_linear=down"),),
    "bare": (scheme("moe.", GATE_UP_DOWN),),
    "fc": (scheme("experts.", "fc1=gate_up fc2=down"),),
    "w13": (scheme("experts.", "w13_weight=gate_up w2_weight=down"),),
    "folded": (scheme("experts.mlp.", "w1=gate v1=up w2=down", rows=True),),
    "embedded": (scheme("", "down_embed=down up_embed=up"),),
}
# Any family may be written this way: by a quantiser (one tensor an expert) or from transformers' modules (stacked).
COMMON = ("gate_up_down", "up_down", "stacked")

NUMBER = re.compile(r"(?:(?<=\.)|(?<=\.expert_)|^)(?:0|[1-9][0-9]{0,5})(?=\.|$)")
LAYER = re.compile(
    r"(?P<stack>(?:[\w#-]+\.)*?)(?P<container>layers|blocks|block|decoder_layer|h|mtp_layers|mtp_block|mtp)\.#\."
    r"(?P<inner>mtp_block\.|transformer_block\.|transformer\.|layer\.#\.)?(?P<rest>.+)"
)
# Stacks and config sections that stand beside the text decoder; they have counts of their own.
SIDE = re.compile(r"(?:^|\.)(?:vis|vit|image|audio|talker|code2wav|code_predictor|speech)[\w-]*(?=\.|$)")
MTP = re.compile(r"(?:^|\.)mtp\w*(?=\.)")
EXPERT_WORD = re.compile(r"(?:^|[._])(?<!shared_)(?<!share_)experts?(?:_#)?(?=\.|$)")
MOE_HINT = re.compile(rf"{EXPERT_WORD.pattern}|(?:^|\.)(?:moe|block_sparse_moe|router)(?=\.)")
STEERING = r"gate\.|\w*router\w*(?=\.|$)|\w+_bias$|\w*biases$|tid2eid|\w*statics|\w*per_expert"


def shape_of(name: str) -> str:
    """The key with "#" for each number that is a dotted part of its own, or that follows "expert_" there."""
    return NUMBER.sub("#", name.replace("#", "?"))


def literal(name: str) -> str:
    return re.escape(name).replace(r"\#", "#")


@dataclass(frozen=True, slots=True)
class Patterns:
    """Compiled regular expressions over the part of a shape that follows the layer number."""

    expert: re.Pattern[str]  # groups block and expert (head and projection)
    router: re.Pattern[str]
    bias: re.Pattern[str] | None
    table: re.Pattern[str] | None
    leave: re.Pattern[str] | None
    suspect: re.Pattern[str]


def names_under(block: str, names: str, suffix: str = "") -> re.Pattern[str] | None:
    """Names right under the block, or under the layer where they begin with "/"."""
    if not names:
        return None
    parts = [literal(name[1:]) if name[0] == "/" else block + literal(name) for name in names.split("|")]
    return re.compile(f"(?:{'|'.join(parts)}){suffix}")


def compile_patterns(
    block: str, schemes: tuple[Scheme, ...], router: str, bias: str, table: str, leave: str
) -> Patterns:
    """Patterns of one family. An empty alternative of block puts the experts right under the layer."""
    names = "|".join(re.escape(name) for name in block.split("|") if name)
    optional = "?" if "" in block.split("|") else ""
    prefix = rf"(?:(?P<block>{names})\.){optional}" if names else "(?P<block>)"
    plain = rf"(?:(?:{names})\.){optional}" if names else ""
    kinds = "|".join(f"{literal(s.head)}(?:{'|'.join(sorted(s.projections, reverse=True))})" for s in schemes)
    routers = names_under(plain, router, r"(?:_[a-z]\w*)?")
    assert routers is not None
    return Patterns(
        expert=re.compile(rf"{prefix}(?P<expert>{kinds})(?:[._][\w.#]+)?"),
        router=routers,
        bias=names_under(plain, bias),
        table=names_under(plain, table),
        leave=names_under(plain, leave, r"(?:\.[\w.#]+)?"),
        suspect=re.compile(rf"{EXPERT_WORD.pattern}|^{plain}(?:{STEERING})"),
    )
