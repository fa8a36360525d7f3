"""Small trainings of tiny models, and the same by backward through a whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.model.compute import Compute
from moekern.recovery.course import Sample
from moekern.recovery.loaded import ready
from moekern.recovery.objective import Objective
from moekern.recovery.settings import Training
from moekern.recovery.steps import Steps
from moekern.recovery.teacher import Teacher
from tests.helpers import families

FLOAT32 = Compute("cpu", "float32")


def samples(name: str, count: int = 2, length: int = 12) -> list[Sample]:
    """Batches of two sequences, and their places."""
    return [Sample(n, Batch("a", families.input_ids(name, 2, length, n))) for n in range(count)]


def data(sequences: int = 40, length: int = 16, domains: str = "a") -> TokenData:
    """Text of random ids, a sequence a batch, the domains in turn."""
    ids = families.input_ids("qwen3_moe", sequences, length, 7)
    batches = tuple(Batch(domains[n % len(domains)], row[None]) for n, row in enumerate(ids))
    return TokenData(batches, {"seed": 0}, 2)


@contextmanager
def steps(
    folder: Path,
    training: Training,
    teacher: Teacher | None = None,
    compute: Compute = FLOAT32,
) -> Iterator[Steps]:
    with ready(open_checkpoint(folder), compute, training) as there:
        yield Steps(there.layerwise, there.trained, Objective(training.kl, training.next), teacher)


def gradients(own: Steps, some: Sequence[Sample]) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """By every value, of one step that changes nothing; and what is told of it."""
    found: dict[str, Tensor] = {}

    def stepped(rate: float) -> float:
        found.update({name: own.trained.numbers["gradient", name].clone() for name in own.trained.names})
        return 1.0

    own.trained.stepped = stepped  # type: ignore[method-assign]
    told = own.step(some, 1e-3, lambda share: None)
    return found, told


def whole(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The text part of a model in memory whose weights take gradients, and these."""
    model = getattr(model, "thinker", model)
    model.set_experts_implementation("eager")
    model.requires_grad_(True)
    return model, dict(model.named_parameters())


def backward(model: Any, some: Sequence[Sample], loss: Callable[[Tensor, Tensor, int], Tensor]) -> float:
    """Gradients of the mean over predicted tokens of `loss(logits [n, V], next ids [n], place)`, a sum; the mean."""
    total = sum(sample.predicted for sample in some)
    mean = 0.0
    for sample in some:
        ids = sample.batch.input_ids
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        found = loss(logits.float(), ids[:, 1:].flatten(), sample.place) / total
        found.backward()  # type: ignore[no-untyped-call]
        mean += float(found.detach())
    return mean
