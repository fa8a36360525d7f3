"""A bias an expert on the routers of the whole model, whose trained values are the ranking (MoRA, arXiv:2610.00367).

Of the paper the abstract is known: a learnable bias for each expert on the router, trained with the loss of the next
token and a regulariser of routing diversity; the bias that is learned is the ranking. Reconstructed: it is added to the
router's logits before anything else is made of them, begins with 0, and Adam trains it; the regulariser is minus the
entropy of the mean over a batch's tokens of softmax(logits + bias), a mean over layers. KL to the original would have
no gradient where training begins, since there nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.errors import InputError
from moekern.masks.logits import BETAS, Adam
from moekern.model.backward import Backward, eager_experts
from moekern.model.finite import all_finite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.masking import changed_logits
from moekern.recovery.course import Sample
from moekern.recovery.entropy import entropy
from moekern.recovery.objective import Objective
from moekern.recovery.teacher import check_head

WHAT = "optimise --method bias"
RECONSTRUCTED = (
    "MoRA (arXiv:2610.00367): that a bias an expert is trained with the loss of the next token and a regulariser of "
    "routing diversity, and ranks, is known of its abstract; where it is added, the regulariser's form, its weight, "
    "steps and rate are not"
)


class Biases(Adam):
    """Of which each has a second moment of its own."""

    def stepped(self, gradient: Tensor, rate: float) -> None:
        """One step against a gradient by the biases."""
        self.steps += 1
        mean = BETAS[0] * self.mean.double() + (1 - BETAS[0]) * gradient
        square = BETAS[1] * self.square.double() + (1 - BETAS[1]) * gradient.square()
        values = self.values.double() - self.towards(mean, square, rate)
        self.values, self.mean, self.square = values.float(), mean.float(), square.float()


@dataclass
class Biased:
    """The whole model with biases on its routers' logits."""

    layerwise: LayerwiseModel
    diversity: float
    layer: int = -1  # which is in memory
    seen: list[Tensor] = field(default_factory=list)  # logits with their bias, of the layer that has run

    def slopes(
        self, samples: Sequence[Sample], biases: Mapping[str, Tensor], progress: Callable[[float], None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The derivative of the mean loss of samples by each layer's biases, float64 [E]; and the sums that the
        objective tells. Raises InputError for numbers that are not finite."""
        layerwise, total = self.layerwise, sum(sample.predicted for sample in samples)
        tokens = sum(sample.batch.input_ids.numel() for sample in samples)
        leaves = {key: bias.clone().to(layerwise.device).requires_grad_() for key, bias in biases.items()}
        found = {key: torch.zeros(len(bias), dtype=torch.float64) for key, bias in biases.items()}
        sums, objective = torch.zeros(4, dtype=torch.float64), Objective(0.0, 1.0)

        def loss(sample: Sample) -> Tensor:
            nonlocal sums
            with self._applied(leaves):
                logits = layerwise.compute(sample.batch).logits
            check_head(layerwise, logits, layerwise.vocab_size)
            value, parts = objective(*sample.counted(logits, None))
            sums = sums + parts
            return value / total

        def term() -> Tensor | None:
            if not self.seen:
                return None
            with torch.enable_grad():
                rows = self.seen[0].flatten(0, -2)
                spread = entropy(rows.float().softmax(-1).mean(0).log())
                self.seen.clear()
                return -spread * (self.diversity / len(biases) * len(rows) / tokens)

        first, layers = min(layerwise.moe_keys), len(layerwise.layers)
        with eager_experts(layerwise.model), layerwise.states() as states:
            back = Backward(
                layerwise, first, states, dict(enumerate(samples)), loss, what=WHAT, loaded=self._at, beside=term
            )
            back.forward(lambda i: progress((i + 1) / layers / 3))
            for i in back.layers():
                self._at(i)
                key = layerwise.moe_keys.get(i)
                for number in range(len(samples)):
                    wanted = [] if key is None else [leaves[key]]
                    for gradient in back.through(i, number, lambda wanted=wanted: wanted):  # type: ignore[misc]
                        if key is not None and gradient is not None:
                            found[key] += gradient.double().cpu()
                progress(1 / 3 + 2 / 3 * (layers - i) / (layers - first))
        if not all(all_finite(value) for value in found.values()):
            raise InputError(f"{WHAT}: the gradients are not finite; --dtype float32 may mend it")
        return found, sums

    def _at(self, layer: int) -> None:
        self.layer = layer

    @contextmanager
    def _applied(self, leaves: Mapping[str, Tensor]) -> Iterator[None]:
        """The bias holds in the layer that is in memory."""
        key = self.layerwise.moe_keys.get(self.layer)
        self.seen.clear()

        def change(logits: Tensor) -> Tensor:
            bias = leaves[key or ""]
            own: Tensor = logits + F.pad(bias, (0, logits.shape[-1] - len(bias))).to(logits.dtype)
            if torch.is_grad_enabled():
                self.seen.append(own[..., : len(bias)])
            return own

        with ExitStack() as stack:
            if key is not None:
                layer, module = self.layerwise.layout.layers[key], self.layerwise.layers[self.layer]
                stack.enter_context(changed_logits(self.layerwise.loader, layer, module, change))
            yield
