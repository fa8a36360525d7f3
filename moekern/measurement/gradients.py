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

from moekern.data.batches import Batch, Segment, TokenData
from moekern.errors import InputError
from moekern.files import scratch, sized
from moekern.measurement.gradient_sums import (
    Matrix,
    SegmentSums,
    Shares,
    Totals,
    accumulators,
    add_to,
    functionals,
    joint_fields,
    matrices,
    taylor,
    unknown,
)
from moekern.model.backward import Backward, eager_experts
from moekern.model.backward_apart import BackwardApart
from moekern.model.expert_lists import NO_GRADIENT, blocks_with_lists
from moekern.model.experts import experts_of
from moekern.model.finite import all_finite, expert_list, wrong_experts
from moekern.model.journal import Journal
from moekern.model.layerwise import LayerwiseModel
from moekern.model.room import Need

IN_MEMORY = 1 << 30  # bytes of one layer's G; more lie in a file that the system pages
Keep = Callable[[str, str, list[Tensor]], None]  # layer key, segment's name and its G, a tensor for each matrix
STAGES = ("gradients, forward", "gradients, backward")


def measure_gradients(
    layerwise: LayerwiseModel,
    data: TokenData,
    add: Callable[[str, str, Mapping[str, Tensor]], None],
    *,
    units: Sequence[Segment] | None = None,
    keep: Keep | None = None,
    in_memory: int = IN_MEMORY,
    step: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
    kept: Callable[[], Any] = lambda: None,
) -> None:
    """`add(layer key, domain, fields)` the gradient tier of every layer. `step()` after every layer, forward and back.

    A chunk of sequences is computed at a time, whatever the batches, and its gradients are added by segments. Of
    several processes each takes segments of its own, and the first adds up and is told. With a `journal` it goes on
    where a stopped run was; `kept` is what must be known beside this pass. `units` are the segments of the text (None:
    all). What is no sum itself is not taken of those of a part, each a domain of its own: their G goes to `keep`.

    Kept from the forward pass: the inputs of every decoder layer from the first MoE layer on, layers x tokens x H
    numbers of the model's dtype, in memory or in a file beyond the budget. Resident: one layer, its experts' gradients
    of one batch, and G in float32, of a segment, and in the first process of one domain and of all (in files beyond
    `in_memory` bytes). Raises InputError for families whose layers hand on more than hidden states, and for heads that
    do not predict the next token.
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

    shares = Shares.of_units(data.units() if units is None else units, layerwise.team)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(layerwise.spill or tempfile.gettempdir(), "spill"))
        stack.enter_context(eager_experts(model))
        states = stack.enter_context(layerwise.states())
        own = {number: data.batches[number] for number in shares.own()}
        back = Backward(layerwise, min(layerwise.moe_keys), states, own, loss, kept)
        forward, backward = (None if journal is None else journal.stage(name) for name in STAGES)
        if forward is None or not forward.passed:
            back.forward(lambda i: step(), forward)
        for i in back.layers(backward):
            key = layerwise.moe_keys.get(i)
            if key is None:
                for number in own:
                    back.through(i, number, lambda: ())
            else:
                E = layerwise.layout.layers[key].num_experts
                for domain, found in _layer(back, i, shares, E, folder, in_memory, keep):
                    _check_finite(layerwise, i, domain, found)
                    add(key, domain, found)
            step()


def check_gradients(layerwise: LayerwiseModel, data: TokenData, units: Sequence[Segment] | None = None) -> None:
    """Raise NoRoomForText where neither memory nor disk of a process has room for what waits beside the layers."""
    own = set(Shares.of_units(data.by_chunk().units() if units is None else units, layerwise.team).own())
    tokens = sum(batch.input_ids.numel() for number, batch in enumerate(data.by_chunk().batches) if number in own)
    inputs, size = len(layerwise.layers) - min(layerwise.moe_keys) + 1, layerwise.loader.dtype.itemsize
    nbytes = inputs * tokens * layerwise.embedding_size * size
    rows = layerwise.rows_apart(tokens)
    also = f" and experts' rows {sized(2 * rows)}" if rows else ""  # and their gradients
    what = f"--tier gradient: inputs of {inputs} layers take {sized(nbytes)}{also}"
    Need(tokens, nbytes + 2 * rows, what).check(layerwise.room, layerwise.spill, layerwise.team)


def _check_finite(layerwise: LayerwiseModel, i: int, domain: str, found: Mapping[str, Tensor]) -> None:
    """Raise InputError where gradients, or weights that they are multiplied by, are not finite."""
    for name, value in found.items():
        if not all_finite(value):
            cause = layerwise.blamed(i) or "the gradients overflow, though weights and outputs are finite"
            where = f"layer {layerwise.moe_keys[i]}, domain {domain}"
            raise InputError(f"--tier gradient: {where}: {name} for {expert_list(wrong_experts(value))}: {cause}")


def _layer(
    back: Backward[Batch], i: int, shares: Shares, E: int, folder: Path, in_memory: int, keep: Keep | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Domain -> the fields of its gradient tier, for one layer whose weights are in memory, or are filled in groups; of
    several processes in the first."""
    layerwise, first, domains = back.layerwise, shares.team.first, shares.domains
    H = layerwise.embedding_size
    parts = matrices(layerwise.layers[i], E, H)
    several, axes = len(domains) > 1 and keep is None, [part.hidden_axis for part in parts]
    names = ("segment", "domain", "joint")[: (2 + several) if first else 1]
    size = 4 * len(names) * sum(part.weight.numel() for part in parts)
    paged = folder if size > in_memory or i in layerwise.groups.cuts else None
    found: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        apart = stack.enter_context(BackwardApart(back, i)) if i in layerwise.groups.cuts else None
        sums = {name: stack.enter_context(accumulators(parts, E, paged, name)) for name in names}
        totals = Totals(sums["segment"], sums.get("domain", []))
        for domain in domains:
            share = shares.within(domain)
            for total in totals.domain:
                total.zero_()
            if apart is None:
                fields = _gradients_of(back, i, share, parts, totals)
            else:
                fields = _gradients_in_groups(apart, share, E, H, totals, last=domain == domains[-1])
            if first and keep is not None:
                keep(layerwise.moe_keys[i], domain, totals.domain)
                found[domain] = unknown(E) | fields
            elif first:
                found[domain] = functionals(axes, totals.domain) | fields
                for total, own in zip(sums.get("joint", []), totals.domain, strict=False):
                    add_to(total, own)
        united: dict[str, Tensor] = {}
        if first and keep is None:
            joint = functionals(axes, sums["joint"]) if several else next(iter(found.values()))
            united = joint_fields(joint, len(found))
    for domain, fields in found.items():
        yield domain, fields | united


def _gradients_of(
    back: Backward[Batch], i: int, shares: Shares, parts: list[Matrix], totals: Totals
) -> dict[str, Tensor]:
    """Add the gradients of a domain to `totals`, one for each of `parts`. The sums of G x weights and of gates'
    gradients [E] are returned."""
    layer, E = back.layerwise.layers[i], len(totals.segment[0])
    gate_sums, products, weights = SegmentSums(shares, E), SegmentSums(shares, E), _leaves(parts)

    def gradients(chunk: int) -> list[Tensor | None]:
        with watching_gates(layer, E) as gates:
            *got, of_gates = back.through(i, chunk, lambda: [*weights, gates.values])
        gate_sums.add(chunk, gates.per_expert(of_gates))
        return got

    totals.add(shares, gradients, lambda unit, G: products.add(unit.chunks[0], taylor(parts, G)))
    return {"taylor_sum": products.total(), "gate_gradient_sum": gate_sums.total()}


def _gradients_in_groups(
    apart: BackwardApart[Batch], shares: Shares, E: int, H: int, totals: Totals, *, last: bool
) -> dict[str, Tensor]:
    """As `_gradients_of`, of a layer whose experts are filled a group at a time; `last`: of no domain after this."""
    layer, own = apart.back.layerwise.layers[apart.layer], shares.own()
    gate_sums, products = SegmentSums(shares, E), SegmentSums(shares, E)
    for task in own:
        with watching_gates(layer, E) as gates:
            (got,) = apart.outputs(task, lambda: [gates.values])  # noqa: B023
        gate_sums.add(task, gates.per_expert(got))
    for experts, small in apart.groups(own, last=last):
        _gradients_of_group(apart, small, shares, experts, H, totals, products)
    for task in own:  # by way of the experts, where gates multiply what these are given
        with watching_gates(layer, E) as gates:
            (got,) = apart.inputs(task, lambda: [gates.values])  # noqa: B023
        gate_sums.add(task, gates.per_expert(got))
    return {"taylor_sum": products.total(), "gate_gradient_sum": gate_sums.total()}


def _gradients_of_group(
    apart: BackwardApart[Batch],
    small: nn.Module,
    shares: Shares,
    experts: range,
    H: int,
    totals: Totals,
    products: SegmentSums,
) -> None:
    """Add the gradients of some experts, which a layer holds, to their `totals`, and their sums of G x weights.

    No weight is known here any longer when the next group is filled.
    """
    parts, some = matrices(small, len(experts), H), slice(experts.start, experts.stop)
    weights = _leaves(parts)
    totals.of(some).add(
        shares,
        lambda chunk: apart.weights(chunk, experts, small, weights),
        lambda unit, G: products.add(unit.chunks[0], taylor(parts, G), some),
    )


def _leaves(parts: list[Matrix]) -> list[Tensor]:
    return [part.weight.requires_grad_() for part in parts]


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
