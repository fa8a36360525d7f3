"""What training takes before it is begun, from headers, config and a probe of the machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from moekern.estimation.counted import Counted, Figure, Layer, Part, Stage
from moekern.estimation.estimate import HELD_LOGITS, Job
from moekern.estimation.refit import HELD, MOST
from moekern.model.sizes import Size
from moekern.recovery.settings import VOCABULARY, Training

STEP = 4  # forward passes that a step is worth: one, one more, and a backward pass of two; assumed
LOOKS = 11  # at held-back text, beside one at the end
STATES = 16  # bytes of a number that trains: itself, its gradient, two moments


def recovered(job: Job, training: Training, kept: float) -> Stage:
    """Of `recover` with these settings, whose text `job` has asked for, on the model with a share `kept` of its experts
    (1: as it is). The original is read once, for what it predicts."""
    model, tokens = job.model, job.asked.tokens
    cut = replace(model, layers=[_cut(layer, kept) for layer in model.layers])
    own = replace(job, model=cut)
    held = min(HELD * tokens, MOST * job.asked.domains)
    trained = training.epochs * (tokens - 2 * held)
    steps = max(int(training.epochs > 0), round(trained / training.tokens_of_step(round(trained))))
    share = {"step": trained / max(1, steps) / tokens, "look": held / tokens}
    teach = [job.layer_seconds(layer, measured=False) for layer in model.layers] if training.kl else []
    forward = [own.layer_seconds(layer, measured=False) for layer in cut.layers]
    states = STATES * _numbers(cut, training)
    layers = sum(layer.size.weights for layer in cut.layers) * cut.itemsize
    hidden = job.hidden * share["step"] * (len(cut.layers) + 1)
    more = [
        Part(f"{steps} steps", STEP * trained / tokens * sum(forward), "assumed"),
        Part("looks at held-back text", (LOOKS + 1) * share["look"] * sum(forward), "assumed"),
        Part("logits and losses", job.head_seconds(2 * trained + tokens + LOOKS * held), "assumed"),
    ]
    room = job.budget.host - states - hidden - own.largest.weights * cut.itemsize
    stays = layers <= room / 2
    if not stays:
        passes = 2 * steps + LOOKS + 1
        reading = sum(layer.size.stored for layer in cut.layers) / job.rates.read.value
        filling = sum(job.fill_seconds(layer.size) for layer in cut.layers)
        waits = max(0.0, passes * reading - sum(part.value for part in more))
        more.append(Part(f"making parameters, {passes} times", passes * filling, "assumed"))
        more.append(Part(f"waiting for the disk, weights read {passes} times", waits, job.rates.read.known))
    working = [
        Part("hidden states of a step, of every layer", hidden, "counted"),
        Part("what trains, or --spill", states, "counted"),
        *([Part("all layers", layers, "counted")] if stays else []),
    ]
    logits = cut.shapes.tokens * cut.vocabulary * 4
    device = [
        Part("logits of a batch", HELD_LOGITS * logits / 2, "assumed"),
        Part("gradients of a layer", 4 * own.largest.weights, "assumed"),
        Part("activations", 2 * own.activations(), "assumed"),
    ]
    per_token = 4 * cut.vocabulary if training.top == VOCABULARY else 6 * int(training.top)
    disk = [
        *([Part("what the original predicts", per_token * tokens, "counted")] if training.kl else []),
        Part("states, to go on from", 1.5 * states, "counted"),
        Part("the checkpoint", kept * job.checkpoint.nbytes, "assumed"),
    ]
    name = f"recover --train {','.join(training.train)}"
    found = own.stage(name, [teach] if teach else [], more, working, device, Figure(tuple(disk)), whole=True)
    where = "layers stay in memory" if stays else "every step reads the weights twice"
    return replace(found, notes=(*found.notes, f"{steps} steps of {ceil(trained / max(1, steps))} tokens; {where}"))


def _cut(layer: Layer, kept: float) -> Layer:
    """With a share of its experts."""
    if not layer.experts:
        return layer
    gone = round((1 - kept) * layer.routed)
    share = 1 - gone / max(1, layer.size.weights)
    size = Size(round(layer.size.stored * share), layer.size.weights - gone)
    return Layer(size, max(1, round(kept * layer.experts)), layer.routed - gone, layer.copied)


def _numbers(model: Counted, training: Training) -> int:
    """How many numbers train, about: of low rank and of norms few beside the others."""
    hidden = model.shapes.hidden
    per: dict[str, float] = {
        "bias": sum(layer.experts for layer in model.layers),
        "scale": sum(layer.experts for layer in model.layers),
        "router": sum(layer.experts * hidden for layer in model.layers),
        "norms": 4.0 * hidden * len(model.layers),
        "lora": 8.0 * training.lora_rank * hidden * len(model.layers),
        "down": sum(layer.routed / 3 for layer in model.layers),
        "experts": sum(layer.routed for layer in model.layers),
        "factors": sum((1 + training.factor_ratio) * layer.routed for layer in model.layers),
        "all": sum(layer.size.weights for layer in model.layers),
    }
    if {"experts", "linear"} & set(training.lora_targets):  # of each expert's three matrices
        per["lora"] += 3 * training.lora_rank * (hidden + model.shapes.inner) * sum(x.experts for x in model.layers)
    return round(sum(per[kind] for kind in training.train))
