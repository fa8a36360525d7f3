"""The gradient tier: the loss' gradients by every expert's weights and gates, a decoder layer at a time.

The loss is next-token cross-entropy, summed over a domain's predicted tokens, so G of an expert is the sum over the
domain's tokens; a mean would scale all G of a domain alike. G holds an expert's matrices (gate, up, down), not biases.
The joint G, over the tokens of all domains, is their sum: what is no sum itself (norms, cosines, logarithms, outliers)
is taken of it too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.files import scratch, sized
from moekern.model.backward import Backward, eager_experts
from moekern.model.backward_apart import BackwardApart
from moekern.model.expert_lists import NO_GRADIENT, blocks_with_lists
from moekern.model.experts import experts_of
from moekern.model.finite import all_finite, expert_list, wrong_experts
from moekern.model.journal import Journal
from moekern.model.layerwise import LayerwiseModel
from moekern.model.paged import paged_zeros

IN_MEMORY = 1 << 30  # bytes of one layer's G; more lie in a file that the system pages
STAGES = ("gradients, forward", "gradients, backward")
COLUMNS = 1 << 22  # numbers of all experts' G that are looked at together
PIECE = 1 << 20  # numbers of one expert's G that are


def measure_gradients(
    layerwise: LayerwiseModel,
    data: TokenData,
    add: Callable[[str, str, Mapping[str, Tensor]], None],
    *,
    in_memory: int = IN_MEMORY,
    step: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
    kept: Callable[[], Any] = lambda: None,
) -> None:
    """`add(layer key, domain, fields)` the gradient tier of every layer. `step()` after every layer, forward and back.

    A chunk of sequences is computed at a time, whatever the batches. With a `journal` it goes on where a stopped run
    was; `kept` is what must be known beside this pass.

    Kept from the forward pass: the inputs of every decoder layer from the first MoE layer on, layers x tokens x H
    numbers of the model's dtype, in memory or in a file beyond the budget. Resident: one layer, its experts' gradients
    of one batch, and G in float32, of one domain and of all (in files beyond `in_memory` bytes). Raises InputError for
    families whose layers hand on more than hidden states, and for heads that do not predict the next token.
    """
    model: Any = layerwise.model
    for _, block in blocks_with_lists(model):
        raise InputError(f"--tier gradient: {type(block).__name__}: {NO_GRADIENT}")
    model.requires_grad_(False)
    data = data.by_chunk()

    def loss(batch: Batch) -> Tensor:
        ids, logits = batch.input_ids.to(layerwise.device), layerwise.compute(batch).logits
        if logits.shape[-1] < layerwise.vocab_size:
            name = layerwise.layout.family.name
            raise InputError(f"--tier gradient: {name} does not predict the next token: {logits.shape[-1]} outputs")
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")

    with ExitStack() as stack:
        folder = stack.enter_context(scratch(layerwise.spill or tempfile.gettempdir(), "spill"))
        stack.enter_context(eager_experts(model))
        states = stack.enter_context(layerwise.states())
        back = Backward(layerwise, min(layerwise.moe_keys), states, data.batches, loss, kept)
        forward, backward = (None if journal is None else journal.stage(name) for name in STAGES)
        if forward is None or not forward.passed:
            back.forward(lambda i: step(), forward)
        for i in back.layers(backward):
            key = layerwise.moe_keys.get(i)
            if key is None:
                for number in range(len(data.batches)):
                    back.through(i, number, lambda: ())
            else:
                E = layerwise.layout.layers[key].num_experts
                for domain, found in _layer(back, i, data, E, folder, in_memory):
                    _check_finite(layerwise, i, domain, found)
                    add(key, domain, found)
            step()


def check_gradients(layerwise: LayerwiseModel, tokens: int) -> None:
    """Raise InputError where neither memory nor disk has room for what waits beside the layers."""
    inputs, size = len(layerwise.layers) - min(layerwise.moe_keys) + 1, layerwise.loader.dtype.itemsize
    nbytes = inputs * tokens * layerwise.embedding_size * size
    rows = layerwise.rows_apart(tokens)
    also = f" and experts' rows {sized(2 * rows)}" if rows else ""  # and their gradients
    what = f"--tier gradient: inputs of {inputs} layers take {sized(nbytes)}{also}"
    layerwise.check_room(nbytes + 2 * rows, what, tokens)


def _check_finite(layerwise: LayerwiseModel, i: int, domain: str, found: Mapping[str, Tensor]) -> None:
    """Raise InputError where gradients, or weights that they are multiplied by, are not finite."""
    for name, value in found.items():
        if not all_finite(value):
            cause = layerwise.blamed(i) or "the gradients overflow, though weights and outputs are finite"
            where = f"layer {layerwise.moe_keys[i]}, domain {domain}"
            raise InputError(f"--tier gradient: {where}: {name} for {expert_list(wrong_experts(value))}: {cause}")


def _layer(
    back: Backward[Batch], i: int, data: TokenData, E: int, folder: Path, in_memory: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Domain -> the fields of its gradient tier, for one layer whose weights are in memory, or are filled in groups."""
    layer = back.layerwise.layers[i]
    H = back.layerwise.embedding_size
    parts = matrices(layer, E, H)
    several = len(data.tokens) > 1
    size = 4 * (1 + several) * sum(part.weight.numel() for part in parts)
    paged = folder if size > in_memory or i in back.layerwise.groups.cuts else None
    found: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        apart = stack.enter_context(BackwardApart(back, i)) if i in back.layerwise.groups.cuts else None
        joint = stack.enter_context(_accumulators(parts, E, paged, "joint")) if several else []
        for domain in data.tokens:
            tasks = [number for number, batch in enumerate(data.batches) if batch.domain == domain]
            with _accumulators(parts, E, paged, "domain") as totals:
                if apart is None:
                    sums = _gradients_of(back, i, tasks, parts, totals)
                else:
                    sums = _gradients_in_groups(apart, layer, tasks, H, totals)
                found[domain] = functionals(parts, totals) | sums
                for total, own in zip(joint, totals, strict=False):
                    _add(total, own)
        united = joint_fields(functionals(parts, joint) if several else next(iter(found.values())), len(found))
    for domain, fields in found.items():
        yield domain, fields | united


def _gradients_of(
    back: Backward[Batch], i: int, tasks: Sequence[int], parts: list[Matrix], totals: list[Tensor]
) -> dict[str, Tensor]:
    """Add the gradients of a domain's tasks to `totals`, one for each of `parts`. The sums of G x weights and of gates'
    gradients [E] are returned."""
    layer, E = back.layerwise.layers[i], len(totals[0])
    gate_sum = torch.zeros(E, dtype=torch.float64)
    weights = _leaves(parts)
    for task in tasks:
        with watching_gates(layer, E) as gates:
            got = back.through(i, task, lambda: [*weights, gates.values])  # noqa: B023
        _add_all(totals, got[:-1])
        gate_sum += gates.per_expert(got[-1])
    return {"taylor_sum": _taylor(parts, totals), "gate_gradient_sum": gate_sum}


def _gradients_in_groups(
    apart: BackwardApart[Batch], layer: nn.Module, tasks: Sequence[int], H: int, totals: list[Tensor]
) -> dict[str, Tensor]:
    """As `_gradients_of`, of a layer whose experts are filled a group at a time."""
    E = len(totals[0])
    gate_sum, taylor = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for task in tasks:
        with watching_gates(layer, E) as gates:
            (got,) = apart.outputs(task, lambda: [gates.values])  # noqa: B023
        gate_sum += gates.per_expert(got)
    for experts, small in apart.groups(tasks):
        own = slice(experts.start, experts.stop)
        taylor[own] = _gradients_of_group(apart, small, tasks, experts, H, [total[own] for total in totals])
    for task in tasks:  # by way of the experts, where gates multiply what these are given
        with watching_gates(layer, E) as gates:
            (got,) = apart.inputs(task, lambda: [gates.values])  # noqa: B023
        gate_sum += gates.per_expert(got)
    return {"taylor_sum": taylor, "gate_gradient_sum": gate_sum}


def _gradients_of_group(
    apart: BackwardApart[Batch], small: nn.Module, tasks: Sequence[int], experts: range, H: int, totals: list[Tensor]
) -> Tensor:
    """Add the gradients of some experts, which a layer holds, to their `totals`; their sums of G x weights.

    No weight is known here any longer when the next group is filled.
    """
    parts = matrices(small, len(experts), H)
    weights = _leaves(parts)
    for task in tasks:
        _add_all(totals, apart.weights(task, experts, small, weights))
    return _taylor(parts, totals)


def _leaves(parts: list[Matrix]) -> list[Tensor]:
    return [part.weight.requires_grad_() for part in parts]


def _add_all(totals: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            _add(total, gradient)


@dataclass(frozen=True)
class Matrix:
    """One stacked weight of a layer's experts: expert e's rows follow one another along the first axis."""

    weight: nn.Parameter
    shape: tuple[int, int]  # of one expert's part
    hidden_axis: int  # which of the two is the hidden dimension


def matrices(layer: nn.Module, E: int, H: int) -> list[Matrix]:
    """The weights of a decoder layer's experts, biases and routers left out."""
    experts = experts_of(layer)
    assert experts is not None
    stacked = [(name, p) for name, p in experts.named_parameters() if p.ndim == 3 and len(p) == E]
    if not stacked:  # DBRX keeps rows of all experts in one matrix
        stacked = [(n, p) for n, p in experts.named_parameters() if p.ndim == 2 and not len(p) % E and len(p) > E]
    if not stacked:
        raise InputError(f"--tier gradient: {type(experts).__name__} keeps its experts' weights in no form known here")
    transposed = bool(getattr(experts, "is_transposed", False)) or type(experts).__name__ == "Llama4TextMoe"
    found = []
    for name, weight in stacked:
        rows, columns = weight.numel() // E // weight.shape[-1], weight.shape[-1]
        if (rows == H) != (columns == H):
            axis = 0 if rows == H else 1
        else:  # [out, in], and H comes out of the last one
            axis = int(any(word in name for word in ("down", "output", "w2")) == transposed)
        found.append(Matrix(weight, (rows, columns), axis))
    return found


@contextmanager
def _accumulators(parts: list[Matrix], E: int, folder: Path | None, name: str) -> Iterator[list[Tensor]]:
    """Zeros [E, rows, columns] float32 for each matrix, in memory or in a file each."""
    with ExitStack() as stack:
        totals = []
        for number, part in enumerate(parts):
            shape = (E, *part.shape)
            if folder is None:
                totals.append(torch.zeros(shape))
                continue
            path = folder / f"G-{name}-{number}"
            stack.callback(path.unlink, missing_ok=True)
            totals.append(paged_zeros(path, shape, "gradients"))
        yield totals


def _add(total: Tensor, gradient: Tensor) -> None:
    """total [E, rows, columns] += gradient, an expert at a time."""
    for mine, theirs in zip(total, gradient.view_as(total), strict=True):
        mine += theirs.to("cpu", torch.float32)


@dataclass
class Gates:
    """The gates of the batch that ran last, before they meet the outputs, and the expert of each."""

    values: Tensor
    experts: Tensor  # of values' shape
    num_experts: int

    def per_expert(self, gradient: Tensor | None) -> Tensor:
        """[E] float64: sum of gate x gradient (None: 0)."""
        if gradient is None:
            return torch.zeros(self.num_experts, dtype=torch.float64)
        share = (self.values.detach().double() * gradient.double()).flatten().to("cpu")
        ids = self.experts.flatten().to("cpu", torch.int64)
        real = (ids >= 0) & (ids < self.num_experts)
        return torch.zeros(self.num_experts, dtype=torch.float64).index_add_(0, ids[real], share[real])


@contextmanager
def watching_gates(layer: nn.Module, E: int) -> Iterator[Gates]:
    """Fills the gates whenever the layer's experts run while the context is open."""
    gates = Gates(torch.empty(0), torch.empty(0), E)
    experts: Any = experts_of(layer)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        gates.experts, gates.values = tensors[1], tensors[2]

    def llama4(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        gates.values = output[0]
        gates.experts = torch.arange(E, device=output[0].device).expand_as(output[0])

    def jetmoe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _, _, gates.values, sizes, _ = output
        gates.experts = torch.arange(E).repeat_interleave(torch.as_tensor(sizes).cpu())

    kind = type(experts).__name__
    if kind == "Llama4TextMoe":
        handle = experts.router.register_forward_hook(llama4)
    elif kind == "JetMoeMoE":
        handle = experts.router.register_forward_hook(jetmoe)
    else:
        handle = experts.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield gates
    finally:
        handle.remove()


def joint_fields(of_joint: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The fields of a joint G of `count` domains, from its `functionals`."""
    names = ("gradient_norm", "gradient_cosine", "gradient_log_std", "gradient_outlier")
    return {"joint_gradients": torch.tensor([count]), **{f"joint_{n}": of_joint[f"{n}_sum"] for n in names}}


def functionals(parts: list[Matrix], totals: list[Tensor]) -> dict[str, Tensor]:
    """What the gradient tier holds of one G, without weights: totals are [E, rows, columns] float32."""
    E = len(totals[0])
    n = sum(total[0].numel() for total in totals)
    gram, total = torch.zeros(E, E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for columns in _columns(totals):
        gram += columns @ columns.T
        total += columns.sum(1)
    norm = gram.diagonal().sqrt()
    unit = torch.where(norm > 0, 1 / norm, 0)
    mean = total / n
    sigma = (gram.diagonal() / n - mean.square()).clamp(min=0).sqrt()
    outliers = torch.zeros(E, dtype=torch.int64)
    for columns in _columns(totals):
        outliers += ((columns - mean[:, None]).abs() > 3 * sigma[:, None]).sum(1)
    return {
        "gradients": torch.ones(1, dtype=torch.int64),
        "gradient_norm_sum": norm,
        "gradient_cosine_sum": gram * unit[:, None] * unit,
        "gradient_log_std_sum": torch.stack([_log_std(parts, [total[e] for total in totals]) for e in range(E)]),
        "gradient_outlier_sum": outliers,
    }


def _columns(totals: list[Tensor]) -> Iterator[Tensor]:
    """All experts' G in pieces [E, some], float64."""
    for total in totals:
        flat = total.flatten(1)
        for piece in flat.split(max(1, COLUMNS // len(flat)), dim=1):
            yield piece.double()


def _taylor(parts: list[Matrix], totals: list[Tensor]) -> Tensor:
    """[E] float64: sum of weights x G."""
    E = len(totals[0])
    found = torch.zeros(E, dtype=torch.float64)
    for part, total in zip(parts, totals, strict=True):
        found += torch.stack([_dot(part.weight.view(E, -1)[e], total[e]) for e in range(E)])
    return found


def _dot(weight: Tensor, total: Tensor) -> Tensor:
    pieces = zip(weight.detach().split(PIECE), total.flatten().split(PIECE), strict=True)
    products = [own.to("cpu", torch.float64) @ theirs.double() for own, theirs in pieces]
    return sum(products[1:], products[0])


def _log_std(parts: list[Matrix], mine: list[Tensor]) -> Tensor:
    """Sum over hidden dimensions of log std of the entries of one expert's G that belong to them.

    A dimension that never varies counts as the least normal number, as in eae.
    """
    count, total, square = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for part, G in zip(parts, mine, strict=True):
        other = 1 - part.hidden_axis
        wide = G.double()
        count += part.shape[other]
        total, square = total + wide.sum(other), square + wide.square().sum(other)
    variance = square / count - (total / count).square()
    return variance.clamp(min=torch.finfo(torch.float64).tiny).log().sum() / 2
