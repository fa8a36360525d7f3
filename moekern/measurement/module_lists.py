"""Experts that are modules of their own, measured while the code of their block calls them one by one.

The block runs as it is, with its experts' calls seen. What it did is then described as ids, gates and outputs, and held
against the block: each expert's rows must be those of the tokens that chose it, and gates x outputs must add up to what
the block makes of the same outputs when its other parts are silent. Anything else is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekern.errors import InputError
from moekern.kernels.reference import SCORES
from moekern.measurement.probe import Probe
from moekern.model.expert_lists import LIST, expert_modules, list_router
from moekern.model.experts import Outputs
from moekern.model.finite import all_finite
from moekern.model.masking import PRODUCTS
from moekern.model.products import filled

Answer = Callable[[int, Tensor], Tensor]  # (expert, rows [n, H]) -> [n, H]
Call = tuple[tuple[Any, ...], dict[str, Any]]
ROUNDINGS = 8  # of a sum over K experts, beside one for each
PIECE = 1024  # rows that are compared and added at a time


@dataclass
class Run:
    """What was seen while a block ran once: of each call of an expert its number, rows [n, H] and outputs [n, H]."""

    experts: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)  # what the router returned
    logits: Tensor | None = None
    before: list[Tensor] = field(default_factory=list)  # what other parts put out before the first expert ran
    after: list[Tensor] = field(default_factory=list)  # what they were given after that
    out: Any = None  # what the block returned


@dataclass(frozen=True)
class Choice:
    """Which experts each token chose: flat slot order[n] = t * K + k is the n-th row, rows of one expert together."""

    ids: Tensor  # [T, K] int64
    gates: Tensor  # [T, K]
    order: Tensor  # [N] int64

    @property
    def tokens(self) -> Tensor:
        """[N]: the token of each row."""
        return self.order // self.ids.shape[1]

    @property
    def experts(self) -> Tensor:
        """[N]: the expert of each row."""
        return self.ids.flatten()[self.order]


@torch.no_grad()
def measured_block(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a block with a list of experts: its own output, and its experts measured."""
    probe: Probe = self._moekern_probe
    experts, call = expert_modules(self), (args, kwargs)
    assert experts is not None
    seen = run(self, call, computed(self, experts))
    choice, rows, y = described(self, call, seen, len(experts))
    if seen.logits is not None and scored_by(probe.recorder.score, seen.logits, choice, y.dtype):
        probe.logits = seen.logits
    probe.measure(rows, choice.ids, choice.gates, len(experts), outputs_of(experts, rows, choice, y))
    return seen.out


def described(block: nn.Module, call: Call, seen: Run, E: int) -> tuple[Choice, Tensor, Tensor]:
    """What a block did: which experts were chosen, the rows [T, H] that experts were given, and their outputs [N, H].

    The rows are what the block was given or what one of its parts made of that.

    Raises InputError where ids and gates, as the router returned them or as the block shows them when it is asked,
    are not what it did.
    """
    given = [value.reshape(-1, value.shape[-1]) for value in (*tensors(call), *seen.before) if value.ndim > 1]
    for choice in choices(block, call, seen, len(given[0]), E):
        for rows in given:
            place = places(seen, rows, choice, E)
            if place is not None:
                y = torch.cat(seen.outputs)[place]
                if adds_up(block, call, seen, choice, y):
                    return choice, rows, y
    raise refusal(block, "what it does with its experts is not gates x outputs of the experts that its tokens choose")


def choices(block: nn.Module, call: Call, seen: Run, T: int, E: int) -> Iterator[Choice]:
    """The choice that the router returned, if it did, then the one that the block shows."""
    ids = [value for value in seen.chosen if not value.is_floating_point() and value.dtype != torch.bool]
    if len(ids) == 1 and ids[0].numel() and not ids[0].numel() % T and bool(((ids[0] >= 0) & (ids[0] < E)).all()):
        gates = [v for v in seen.chosen if v.is_floating_point() and v.shape == ids[0].shape]
        if len(gates) == 1:
            yield choice_of(ids[0].reshape(T, -1), gates[0].reshape(T, -1))
    dense = dense_gates(block, call, seen, T, E)
    if dense is not None:
        filled = dense != 0
        K = int(filled[0].sum())
        if K and bool((filled.sum(1) == K).all()):
            top = dense.masked_fill(~filled, -torch.inf).topk(K)
            yield choice_of(top.indices, top.values)


def choice_of(ids: Tensor, gates: Tensor) -> Choice:
    return Choice(ids.long().contiguous(), gates.contiguous(), ids.flatten().sort(stable=True).indices)


def dense_gates(block: nn.Module, call: Call, seen: Run, T: int, E: int) -> Tensor | None:
    """[T, E]: what the block multiplies each expert's output by, 0 where a token did not choose it.

    Its experts put out a one in a column of their own, its other parts zeros. None where its output is another's.
    """
    width = seen.outputs[0].shape[-1] if seen.outputs else 0
    found = []
    for start in range(0, E, width or E):

        def column(expert: int, rows: Tensor, start: int = start) -> Tensor:
            ones = rows.new_zeros(len(rows), width)
            if 0 <= expert - start < width:
                ones[:, expert - start] = 1
            return ones

        out = first_tensor(run(block, call, column, silent=True).out)
        if out is None or out.numel() != T * width:
            return None
        found.append(out.reshape(T, width)[:, : E - start])
    return torch.cat(found, 1) if found else None


def places(seen: Run, rows: Tensor, choice: Choice, E: int) -> Tensor | None:
    """[N]: which of the experts' rows, in the order of calls, is the n-th of `choice`, if these are `rows` [T, H].

    None where an expert was given another number of rows, or others than those of the tokens that chose it. Equal rows
    of one expert have equal outputs.
    """
    if not seen.rows or len(choice.gates) != len(rows) or seen.rows[0].shape[-1] != rows.shape[-1]:
        return None
    given = torch.cat(seen.rows)
    lengths = torch.tensor([len(part) for part in seen.rows], device=rows.device)
    experts = torch.tensor(seen.experts, device=rows.device).repeat_interleave(lengths)
    if not torch.equal(experts.bincount(minlength=E), choice.ids.flatten().bincount(minlength=E)):
        return None
    mine, theirs = sorted_rows(given, experts), sorted_rows(rows, choice.experts, choice.tokens)
    pairs = zip(mine.split(PIECE), choice.tokens[theirs].split(PIECE), strict=True)
    if not all(torch.equal(given[row], rows[token]) for row, token in pairs):
        return None
    place = torch.empty_like(mine)
    place[theirs] = mine
    return place


def sorted_rows(rows: Tensor, experts: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The order that puts rows (of `tokens`, where given) by expert, and within one by a number made of the row."""
    direction = torch.arange(1, rows.shape[-1] + 1, device=rows.device).double().cos()
    keys = torch.cat([(part.double() * direction).sum(1) for part in rows.split(PIECE)])
    by_key = (keys if tokens is None else keys[tokens]).sort(stable=True).indices
    return by_key[experts[by_key].sort(stable=True).indices]


def adds_up(block: nn.Module, call: Call, seen: Run, choice: Choice, y: Tensor) -> bool:
    """Whether the block makes gates x outputs [T, H] of its experts' outputs: it returns them, or gives them to a part.

    Within the roundings of K products and sums in the type of the outputs or of the gates. Outputs that are not finite
    add up to nothing that could be compared: the pass ends behind the layer, and says which weights made them so.
    """
    if not all_finite(y):
        return True
    T, K = choice.ids.shape
    gates = choice.gates.flatten()[choice.order].float()[:, None]
    want, size = (torch.zeros(T, y.shape[1], device=y.device) for _ in range(2))
    for tokens, gate, part in zip(choice.tokens.split(PIECE), gates.split(PIECE), y.split(PIECE), strict=True):
        want.index_add_(0, tokens, gate * part.float())
        size.index_add_(0, tokens, (gate * part.float()).abs())
    again = run(block, call, replayed(seen), silent=True)
    eps = max(torch.finfo(value.dtype).eps for value in (y, choice.gates))
    room = (K + ROUNDINGS) * eps * size + torch.finfo(torch.float32).tiny
    made = (value for value in (first_tensor(again.out), *again.after) if value is not None)
    return any(
        value.numel() == want.numel() and bool(((value.reshape_as(want).float() - want).abs() <= room).all())
        for value in made
    )


def scored_by(score: str, logits: Tensor, choice: Choice, dtype: torch.dtype) -> bool:
    """Whether a token's gates are to each other as the scores of its logits: a family is found by the names of tensors,
    and code of its own may score otherwise. For 7 of 8 tokens, since scores of no size leave gates that are rounded."""
    scores = SCORES[score](logits.float()).gather(1, choice.ids)
    ratio = choice.gates.float() / scores
    low, high = ratio.aminmax(dim=1)
    eps = max(torch.finfo(kind).eps for kind in (dtype, choice.gates.dtype))
    alike = (high - low) <= 16 * eps * high.abs()
    return int(alike.sum()) * 8 >= len(alike) * 7


def outputs_of(experts: nn.ModuleList, rows: Tensor, choice: Choice, y: Tensor) -> Outputs:
    """As in `batch.Seen`: the rows that ran are looked up, others are computed."""
    E = len(experts)
    place = torch.full((len(rows), E), -1, device=rows.device)
    place[choice.tokens, choice.experts] = torch.arange(len(y), device=rows.device)

    def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
        expert = torch.arange(E, device=rows.device).repeat_interleave(offsets.diff())
        known = place[tokens, expert]
        if bool((known >= 0).all()):
            return y[known]
        bounds = offsets.tolist()
        own = [(experts[e], tokens[a:b]) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]
        return torch.cat([steadily(expert, rows[few]) for expert, few in own])

    return outputs


def computed(block: nn.Module, experts: nn.ModuleList) -> Answer:
    """What each expert makes of its rows, with the same bits whatever the number of threads."""

    def answer(expert: int, rows: Tensor) -> Tensor:
        module = experts[expert]
        out = steadily(functools.partial(type(module).forward, module), rows)
        if not isinstance(out, Tensor) or len(out) != len(rows):
            raise refusal(block, "its experts return something else than a row for each row")
        return out

    return answer


def steadily(expert: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What an expert makes of its rows, which are filled up with the last one; see `model.products`."""
    if rows.device.type != "cpu" or not len(rows):
        return expert(rows)
    more = rows[-1:].expand(filled(len(rows)) - len(rows), -1)
    return expert(torch.cat([rows, more]))[: len(rows)]


def replayed(seen: Run) -> Answer:
    """What each expert has put out before, call by call."""
    kept: dict[int, list[Tensor]] = {}
    for expert, outputs in zip(seen.experts, seen.outputs, strict=True):
        kept.setdefault(expert, []).append(outputs)
    return lambda expert, rows: kept[expert].pop(0).clone()


def run(block: nn.Module, call: Call, answer: Answer, *, silent: bool = False) -> Run:
    """Run the block's own forward with `answer` in place of its experts; `silent` makes zeros of what its other parts
    put out, but for numbers of experts, by which it may choose."""
    experts, router, seen = expert_modules(block), list_router(block), Run()
    assert experts is not None
    with ExitStack() as stack, _Products(len(experts)) as products:
        for number, expert in enumerate(experts):
            stack.enter_context(answered(block, expert, number, answer, seen))
        for name, part in block.named_children():
            if name == router:
                stack.callback(part.register_forward_pre_hook(products.begin).remove)
                stack.callback(part.register_forward_hook(_keep_choice(seen, products)).remove)
            elif name != LIST:
                hook = _keep_part(seen, len(experts) if silent else None)
                stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
        args, kwargs = call
        seen.out = type(block).forward(block, *args, **kwargs)
    seen.logits = products.found
    return seen


@contextmanager
def answered(block: nn.Module, expert: nn.Module, number: int, answer: Answer, seen: Run) -> Iterator[None]:
    """Let an expert give `answer`, and note what it was given and what it gave."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = [value for value in chain(args, kwargs.values()) if value is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise refusal(block, "its experts are given more than their rows")
        rows = given[0].reshape(-1, given[0].shape[-1])
        out = answer(number, rows)
        seen.experts.append(number)
        seen.rows.append(rows)
        seen.outputs.append(out)
        return out.clone().reshape(*given[0].shape[:-1], out.shape[-1])  # the block may change it in place

    expert.forward = forward
    try:
        yield
    finally:
        del expert.forward


class _Products(TorchFunctionMode):
    """Finds the router's logits: the first product of its width that it makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.inside, self.found = width, False, None

    def begin(self, *_: Any) -> None:
        self.inside = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside and self.found is None and func in PRODUCTS and out.shape[-1] == self.width:
            self.found = out.reshape(-1, self.width)
        return out


def _keep_choice(seen: Run, products: _Products) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        products.inside = False
        seen.chosen = list(tensors(output))

    return hook


def _keep_part(seen: Run, silent: int | None) -> Callable[..., Any]:
    """With `silent`, the number of experts, what a part puts out becomes zeros."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if seen.experts:
            seen.after += tensors((args, kwargs))
        else:
            seen.before += tensors(output)
        return None if silent is None else zeroed(output, silent)

    return hook


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(tensors, value.values()))
    elif isinstance(value, (tuple, list)):
        yield from chain.from_iterable(map(tensors, value))


def first_tensor(value: Any) -> Tensor | None:
    return next(tensors(value), None)


def zeroed(value: Any, experts: int) -> Any:
    """Zeros in place of the floating-point tensors of nested tuples and lists that hold no number for each expert."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value) if value.is_floating_point() and value.shape[-1:] != (experts,) else value
    return type(value)(zeroed(item, experts) for item in value) if type(value) in (tuple, list) else value


def refusal(block: nn.Module, why: str) -> InputError:
    """The error for a block that is not understood, which names its layer."""
    probe: Any = block._moekern_probe
    return InputError(f"layer {probe.layer}: {type(block).__name__} cannot be measured: {why}")
