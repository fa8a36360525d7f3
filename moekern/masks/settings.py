"""How masks are searched for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekern.errors import InputError, check_type, nearest_name
from moekern.recovery.settings import VOCABULARY

BUDGETS = ("uniform", "global")
METHODS = {"masks": 0.1, "bias": 0.03}  # and the learning rate where nobody names one


@dataclass(frozen=True)
class Search:
    """`steps` of Adam at `rate`, each on about `step_tokens` tokens, which are dealt to `masks` masks of it (as many as
    it has batches at the most). The temperature of the straight-through estimator falls from `hot` to `cold`
    geometrically. budget: "uniform", each layer keeps as many experts as the plan it begins with; "global", all layers
    together do, and each as many as a token chooses at the least. `top`: the original's likeliest tokens that KL is
    over, the others as one; "vocabulary": all of them. Every `every` steps (None: twenty times in all) the masks'
    likeliest is looked at on held-back text.

    method "bias": no masks are drawn. Biases of all experts are added to the router's logits of the whole model and
    trained by the loss of the next token and `diversity` times a routing-diversity term; see `biased.py`.
    """

    steps: int = 100
    step_tokens: int = 4096
    masks: int = 4
    rate: float | None = None
    hot: float = 1.0
    cold: float = 0.05
    budget: str = "uniform"
    top: int | str = 64
    every: int | None = None
    seed: int = 0
    method: str = "masks"
    diversity: float = 0.01

    def check(self) -> None:
        """Raise InputError for what no search can be."""
        least = {"--steps": self.steps, "--step-tokens": self.step_tokens, "--masks": self.masks}
        for flag, value in (least | {"--every": self.every or 1}).items():
            check_type(flag, value, int)
            if value < 1:
                raise InputError(f"{flag} {value}: expected 1 or more")
        if self.method not in METHODS:
            expected = f"expected {' or '.join(METHODS)}"
            raise InputError(f"--method {self.method}: {expected}{nearest_name(self.method, METHODS)}")
        if not 0 < self.peak < math.inf:
            raise InputError(f"--rate {self.rate}: expected more than 0")
        if not 0 <= self.diversity < math.inf:
            raise InputError(f"--diversity {self.diversity}: expected 0 or more")
        if not 0 < self.cold <= self.hot < math.inf:
            raise InputError(f"temperature: expected it to fall to more than 0, got {self.hot} to {self.cold}")
        if self.budget not in BUDGETS:
            expected = f"expected {' or '.join(BUDGETS)}"
            raise InputError(f"--budget {self.budget}: {expected}{nearest_name(self.budget, BUDGETS)}")
        if self.top != VOCABULARY and not (isinstance(self.top, int) and self.top > 0):
            raise InputError(f"--top {self.top}: expected a number of tokens, or {VOCABULARY}")

    @property
    def peak(self) -> float:
        """The learning rate."""
        return METHODS[self.method] if self.rate is None else self.rate

    @property
    def apart(self) -> int:
        """How many parts the text of a step must have at least."""
        return self.masks if self.method == "masks" else 1

    @property
    def looks(self) -> int:
        """Steps from one look at held-back text to the next."""
        return self.every or max(1, self.steps // 20)

    def temperature(self, step: int) -> float:
        """Of a step, counted from 0."""
        return self.hot * (self.cold / self.hot) ** (step / max(1, self.steps - 1))
