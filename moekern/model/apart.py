"""The rows of a layer's experts, computed outside of its forward pass, a group of experts at a time.

Every task goes to the call of the experts and leaves the pass there, with what they are given (`Asked`). When all have
asked, one group of experts after another is filled and runs its rows of all tasks. Then each task goes through the
layer again, and the call takes the rows that are there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.kernels import sort_by_expert
from moekern.model.experts import Outputs, RowOutputs, Scales, experts_of, in_place, scaled, steady
from moekern.model.states import State, States

TOKENS = ("tokens",)
MORE = "experts that are run in groups run no other rows than the model's, and some are asked for; give more (--memory)"
Filled = Callable[[Sequence[int]], Iterator[tuple[int, nn.Module]]]  # groups by number -> each with its layer


class Asked(BaseException):
    """Leaves a forward pass at its experts' call; no Exception, so that no model's own code takes it for one."""


@dataclass(frozen=True)
class Request:
    """Rows that a task wants, grouped by expert; what they are made of is kept elsewhere."""

    of_rows: RowOutputs
    offsets: Sequence[int]  # by the layer's experts
    held: Sequence[int]  # the original number of each of these, rising
    steadily: bool  # see `steady`
    threads: int

    def within(self, experts: range) -> tuple[slice, Tensor]:
        """Which of the rows are of these experts, and their offsets [len(experts) + 1]."""
        counts = torch.zeros(len(experts), dtype=torch.int64)
        first, stop = bisect_left(self.held, experts.start), bisect_left(self.held, experts.stop)
        for e in range(first, stop):
            counts[self.held[e] - experts.start] = self.offsets[e + 1] - self.offsets[e]
        rows = slice(self.offsets[first], self.offsets[stop])
        return rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass
class RowsApart:
    """Of one layer. `kept` holds what tasks ask for and what comes of it; it is cleared in the end."""

    groups: Sequence[range]
    kept: States
    device: torch.device
    requests: dict[int, list[Request]] = field(default_factory=dict)  # by task
    task: int = 0
    held: Sequence[int] | None = None  # the original numbers of the experts that the layer has now; None: all
    steadily: bool = True
    asking: bool = True

    @contextmanager
    def installed(self, layer: nn.Module, task: int, held: Sequence[int] | None) -> Iterator[None]:
        """Let a task's pass through the layer ask for its rows, or be answered."""
        block = experts_of(layer)
        assert block is not None
        self.task, self.held, self.steadily = task, held, hasattr(block, "_moekern_probe")
        with ExitStack() as stack:
            block._moekern_apart = self  # type: ignore[assignment]
            stack.callback(delattr, block, "_moekern_apart")
            if not self.steadily:
                stack.enter_context(in_place(block, Combining()))
            yield

    def outputs(self, hidden: Tensor, of_rows: RowOutputs, scales: Scales | None) -> Rows:
        """As `experts.rows_of`."""
        return Rows(self, hidden, of_rows, scales)

    def ask(self, rows: Rows, wanted: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep what the task in flight asks for, and leave its pass."""
        requests = []
        for n, (tokens, offsets) in enumerate(wanted):
            bounds = offsets.tolist()
            hidden, tokens = rows.given(tokens, offsets)
            held = range(len(bounds) - 1) if self.held is None else self.held
            requests.append(Request(rows.of_rows, bounds, held, self.steadily, torch.get_num_threads()))
            self.kept.put(("asked", self.task, n), State(hidden, {TOKENS: tokens}))
        self.requests[self.task] = requests
        raise Asked

    def answer(self, rows: Rows, n: int, offsets: Tensor) -> Tensor:
        """The n-th of the task's requests."""
        requests = self.requests[self.task]
        if n >= len(requests) or offsets.tolist() != list(requests[n].offsets):
            raise InputError(MORE)
        parts = [self.kept.take(("rows", self.task, n, g)).hidden for g in self._groups_of(requests[n])]
        return torch.cat(parts).to(self.device) if parts else rows.hidden.new_zeros(0, rows.hidden.shape[1])

    def _groups_of(self, request: Request) -> list[int]:
        rows = [request.within(experts)[0] for experts in self.groups]
        return [g for g, own in enumerate(rows) if own.stop > own.start]

    def compute(self, filled: Filled) -> None:
        """Run all rows that were asked for, group by group; afterwards tasks are answered."""
        wanted = {
            (task, n): self._groups_of(request)
            for task, requests in self.requests.items()
            for n, request in enumerate(requests)
        }
        needed = sorted(set().union(*wanted.values()))
        threads = torch.get_num_threads()
        try:
            for g, layer in filled(needed):
                module = experts_of(layer)
                for (task, n), own in wanted.items():
                    if g in own:
                        self.kept.put(("rows", task, n, g), State(self._rows(task, n, g, module), {}))
        finally:
            torch.set_num_threads(threads)
        self.asking = False

    def _rows(self, task: int, n: int, g: int, module: Any) -> Tensor:
        """[N, H]: what a group of experts makes of its rows of one request."""
        request = self.requests[task][n]
        own, offsets = request.within(self.groups[g])
        given = self.kept.rows(("asked", task, n), TOKENS, own).to(self.device)
        if torch.get_num_threads() != request.threads:
            torch.set_num_threads(request.threads)
        offsets = offsets.to(self.device)
        if request.steadily:
            return steady(request.of_rows, module, given, torch.arange(len(given), device=self.device), offsets)
        return request.of_rows(module, given, offsets)


@dataclass
class Rows:
    """As `experts.Asking`, of one call of a layer's experts."""

    apart: RowsApart
    hidden: Tensor
    of_rows: RowOutputs
    scales: Scales | None
    answered: int = 0

    def given(self, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """What rows [N, H] are made of, and which of its rows each of them is."""
        if self.scales is None:
            return self.hidden, tokens
        own = scaled(self.hidden, tokens, offsets, self.scales)  # a row of its own for each expert
        return own, torch.arange(len(tokens), device=tokens.device)

    def ask(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Leaves the pass where the rows are not there yet."""
        if self.apart.asking:
            self.apart.ask(self, wanted)

    def __call__(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        self.ask([(tokens, offsets)])
        self.answered += 1
        return self.apart.answer(self, self.answered - 1, offsets)


@dataclass
class Combining:
    """A watcher that measures nothing: gates x outputs, added as transformers' grouped experts do."""

    empty_slots: bool = False
    differentiable: bool = True

    def measure(
        self,
        hidden: Tensor,
        ids: Tensor,
        gates: Tensor,
        num_experts: int,
        outputs: Outputs,
        *,
        gates_applied: bool = False,
    ) -> Tensor:
        """As `experts.Watcher`."""
        T, K = ids.shape
        order, offsets = sort_by_expert(ids, num_experts)
        order = order[: int(offsets[-1])]
        y = outputs(order // K, offsets)
        weighed = y if gates_applied else y * gates.flatten()[order][:, None]
        rows = weighed.new_zeros(T * K, y.shape[1])
        rows[order] = weighed
        return rows.view(T, K, -1).sum(1)
