"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekern.errors import InputError, check_type, nearest_name

KINDS = {  # what trains -> the peak of the learning rate where nobody names one
    "bias": 1e-2,
    "scale": 1e-2,
    "router": 1e-3,
    "norms": 1e-3,
    "lora": 1e-3,
    "down": 3e-4,
    "experts": 3e-4,
    "all": 3e-4,
}
TARGETS = ("attention", "experts", "linear")  # of lora: linear is every matrix but routers
VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Training:
    """tokens: of all steps, each of about `step_tokens`. The loss is `kl` times KL(original || pruned) plus `next`
    times the cross-entropy of the next token, means over predicted tokens. `top`: the original's likeliest tokens that
    KL is over, the others as one; "vocabulary": all of them. Rates rise over a share `warmup` of the steps to `rate`
    (None: the least of those of KINDS) and fall by a cosine to a share `floor`. Every `every` steps (None: twenty times
    in all) the loss on held-back text is looked at, and training ends where `patience` such looks brought nothing.
    """

    train: tuple[str, ...] = ("all",)
    tokens: int = 100_000
    step_tokens: int = 4096
    kl: float = 1.0
    next: float = 0.0
    top: int | str = 64
    rate: float | None = None
    floor: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    every: int | None = None
    patience: int = 5
    seed: int = 0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("attention",)

    def check(self) -> None:
        """Raise InputError for what no training can be."""
        for kind in self.train:
            if kind not in KINDS:
                raise InputError(f"--train {kind}: expected some of {', '.join(KINDS)}{nearest_name(kind, KINDS)}")
        for target in self.lora_targets:
            if target not in TARGETS:
                expected = f"expected some of {', '.join(TARGETS)}"
                raise InputError(f"--lora-targets {target}: {expected}{nearest_name(target, TARGETS)}")
        if not self.train:
            raise InputError(f"--train: name what trains: {', '.join(KINDS)}")
        least = {"--tokens": self.tokens, "--step-tokens": self.step_tokens, "--patience": self.patience}
        least |= {"--lora-rank": self.lora_rank} | ({} if self.every is None else {"--every": self.every})
        for flag, value in least.items():
            check_type(flag, value, int)
            if value < 1:
                raise InputError(f"{flag} {value}: expected 1 or more")
        for flag, number in {"--kl": self.kl, "--next": self.next, "--decay": self.decay}.items():
            if not 0 <= number < math.inf:
                raise InputError(f"{flag} {number}: expected 0 or more")
        if not self.kl and not self.next:
            raise InputError("--kl 0 --next 0: nothing is left to train towards")
        for flag, number in {"--rate": self.peak, "--clip": self.clip, "--lora-alpha": self.lora_alpha}.items():
            if not 0 < number < math.inf:
                raise InputError(f"{flag} {number}: expected more than 0")
        for flag, number in {"--warmup": self.warmup, "--floor": self.floor}.items():
            if not 0 <= number <= 1:
                raise InputError(f"{flag} {number}: expected a share, from 0 to 1")
        if self.top != VOCABULARY and not (isinstance(self.top, int) and self.top > 0):
            raise InputError(f"--top {self.top}: expected a number of tokens, or {VOCABULARY}")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.step_tokens)

    @property
    def looks(self) -> int:
        """Steps from one look at held-back text to the next."""
        return self.every or max(1, self.steps // 20)

    @property
    def peak(self) -> float:
        return self.rate if self.rate is not None else min(KINDS[kind] for kind in self.train)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.peak * (step + 1) / (warm + 1)
        share = (step - warm) / max(1, self.steps - warm)
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2)
