"""A model in memory as if it was pruned, or with experts that it chooses more or less often; undone afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moekern.architectures import Layout, find_layout
from moekern.architectures.twins import router_numbers
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError, check_type
from moekern.judging.in_memory import checkpoint_of
from moekern.model import masking
from moekern.model.substituted import substituted_layer
from moekern.model.transformers_api import Loader, loader_of
from moekern.plan.constants import Live, Measured, live_constants, measured
from moekern.plan.contrast import Contrast, check_routers
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.guards import DISTINCTIVE
from moekern.plan.refit import refit_of
from moekern.plan.replacement import Replacement
from moekern.statistics.file import Statistics
from moekern.verification.logits import dropped_experts, kept_channels

SUPPRESS = -math.inf  # the strength at which an expert is never chosen


@contextmanager
def masked(
    model: PreTrainedModel,
    plan: Plan,
    *,
    checkpoint: str | Path | None = None,
    statistics: Statistics | str | Path | None = None,
) -> Iterator[None]:
    """Run a transformers model as if it was pruned by a plan while the context is open.

        with moekern.masked(model, moekern.Plan.load("plan.json")):
            model.generate(**inputs)

    Its logits are the pruned checkpoint's but for the order of sums. Nothing is copied but what masks replace
    (selection biases, id tables, down matrices where experts lose channels), and all of it is put back, after an
    exception too. The model must not be used by another thread meanwhile. `checkpoint` is the folder that it came from,
    against whose fingerprint the plan is held; without one, against the model's routers. Where the plan replaces
    experts by constants the router stays whole, and they return these, which `statistics` give where they are no zeros.
    Raises InputError, naming the layer, for a plan that does not fit, and for one whose layers were refitted or whose
    experts are merged, since no mask makes their weights.
    """
    check_type("model", model, PreTrainedModel)
    check_type("plan", plan, Plan)
    check_no_refit(plan)
    loader = loader_of(model)
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
        layout = find_layout(source)
    else:
        source = checkpoint_of(loader)
        layout = find_layout(source)
        check_routers(plan.provenance, routers_of(source, layout), "plan")
        plan = replace(plan, provenance={k: v for k, v in plan.provenance.items() if k != "fingerprint"})
    check_plan(plan, layout, source, replaced=True)
    constants = None
    if plan.replace is not None:
        vectors = _vectors(plan.replace, statistics, source, layout, known=checkpoint is not None)
        constants = live_constants(plan, source, layout, vectors)
    with constants_applied(loader, layout, constants) if constants else plan_applied(loader, layout, plan):
        yield


@contextmanager
def plan_applied(loader: Loader, layout: Layout, plan: Plan) -> Iterator[None]:
    """The same with a plan that is known to fit, and that drops experts."""
    with masking.masked(loader, layout, dropped_experts(layout, plan), kept_channels(plan)):
        yield


@contextmanager
def constants_applied(loader: Loader, layout: Layout, constants: Live) -> Iterator[None]:
    """The same with what experts return that a plan replaces."""
    places, (_, layers) = loader.moe_places(layout), loader.decoder_layers()
    with ExitStack() as stack:
        for key, layer in layout.layers.items():
            stack.enter_context(substituted_layer(layers[places[key]], key, layer.num_experts, constants(key)))
        yield


def _vectors(
    asked: Replacement,
    statistics: Statistics | str | Path | None,
    source: Checkpoint,
    layout: Layout,
    *,
    known: bool,
) -> Measured | None:
    """The constants that a plan asks for; None of zeros. `known`: the checkpoint's fingerprint can be taken."""
    if asked.tier is None:
        return None
    if statistics is None:
        raise InputError("--statistics: the plan replaces experts by constants: give the file they are made of")
    read = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    if known:
        return measured(read, asked, source, layout)
    check_routers(read.header, routers_of(source, layout), "--statistics")
    return measured(read, asked)


def check_no_refit(plan: Plan) -> None:
    """Raise InputError for a plan whose layers were refitted, or whose experts are merged."""
    if plan.merges or refit_of(plan) is not None:
        made = "experts are merged" if plan.merges else "layers were refitted"
        what = f"its {made}, and a mask has the original's weights"
        raise InputError(f"plan: {what}; open the pruned checkpoint itself", kind="plan")


@contextmanager
def steered(
    model: PreTrainedModel, contrast: Contrast | str | Path, strength: float = SUPPRESS, count: int = DISTINCTIVE
) -> Iterator[None]:
    """Let a model choose the most distinctive experts of a contrast more often, or less, while the context is open.

    `strength` is added to the router logits of the `count` experts; minus infinity means that they are never chosen,
    exactly as if they had been dropped (MoTE, arXiv:2502.11096). Selection biases and limits to groups stay as they
    are. Raises InputError, naming the layer, for a contrast that is not of this model, where too few experts would be
    left to choose from, and where a layer takes its experts from a table of ids, which has nothing that a finite
    strength could be added to.
    """
    check_type("model", model, PreTrainedModel)
    check_type("contrast", contrast, Contrast, str, Path)
    found = contrast if isinstance(contrast, Contrast) else Contrast.load(contrast)
    loader = loader_of(model)
    source = checkpoint_of(loader)
    layout = find_layout(source)
    found.check(layout, routers_of(source, layout))
    experts = found.distinctive(count)
    check_steering(layout, experts, strength)
    with steering_applied(loader, layout, experts, strength):
        yield


@contextmanager
def steering_applied(
    loader: Loader, layout: Layout, experts: Mapping[str, Sequence[int]], strength: float
) -> Iterator[None]:
    """The same with experts by layer, which are known to be the model's (`check_steering`)."""
    if strength == SUPPRESS:
        with masking.masked(loader, layout, experts):
            yield
        return
    places, (_, layers) = loader.moe_places(layout), loader.decoder_layers()
    with ExitStack() as stack:
        for key, numbers in experts.items():
            module = layers[places[key]]
            stack.enter_context(masking.changed_logits(loader, layout.layers[key], module, _raised(numbers, strength)))
        yield


def _raised(experts: Sequence[int], strength: float) -> Callable[[Tensor], Tensor]:
    """The strength added to the columns of experts."""
    columns = list(experts)

    def change(logits: Tensor) -> Tensor:
        logits[..., columns] += strength
        return logits

    return change


def check_steering(layout: Layout, experts: Mapping[str, Sequence[int]], strength: float, source: str = "map") -> None:
    """Raise InputError for a strength that is none, and for layers that cannot be steered so."""
    if math.isnan(strength) or strength in (0, math.inf):
        raise InputError(f"{source}: strength {strength}: expected a number other than 0, or -inf to suppress")
    if not experts:
        raise InputError(f"{source}: no expert is used more by the class than by the others: nothing to steer")
    for key, numbers in experts.items():
        layer, router = layout.layers[key], layout.router.of(layout.layers[key].num_experts)
        if strength != SUPPRESS and next(layer.of_role("table"), None) is not None:
            why = "takes its experts from a table of ids, to which no strength is added"
            raise InputError(f"{source}: layer {key} {why}; suppress them (-inf), or name fewer experts")
        size = layer.num_experts // router.n_group
        left = sorted(
            sum(e not in numbers for e in range(group * size, (group + 1) * size)) for group in range(router.n_group)
        )
        if strength == SUPPRESS and sum(left[: router.topk_group]) < router.top_k:
            what = f"without experts {', '.join(map(str, numbers))} a token may find fewer than the {router.top_k}"
            raise InputError(f"{source}: layer {key}: {what} that it chooses; name fewer experts")


def routers_of(source: Checkpoint, layout: Layout) -> dict[str, str]:
    """`router_numbers` of a model in memory; none where it holds routers otherwise than a checkpoint does."""
    try:
        return router_numbers(source, layout)
    except InputError:
        return {}
