"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekern.errors import InputError, check_type, nearest_name

KINDS = {  # what trains -> the peak of the learning rate where nobody names one, of a model whose H is WIDTH
    "bias": 1e-2,
    "scale": 1e-2,
    "router": 3e-3,
    "norms": 1e-2,
    "lora": 3e-3,
    "down": 3e-3,
    "experts": 2e-3,
    "factors": 2e-3,
    "all": 1e-3,
}
WIDTH = 128  # of the model that they were measured on; of wider ones they are as much smaller (arXiv:2203.03466)
AT_ANY_WIDTH = ("bias", "scale")
FAR = 0.5  # nats of KL to the original, of the models that they were measured on; nearer ones move less
FACTORS = "factors"
TARGETS = ("attention", "experts", "linear")  # of lora: linear is every matrix but routers
VOCABULARY = "vocabulary"
STEPS, FEWEST, MOST = 24, 2048, 65536
LARGEST = 1000  # epochs, and rate


@dataclass(frozen=True)
class Training:
    """The text is gone through `epochs` times, in steps of about `step_tokens` (None: STEPS of them, where these have
    neither fewer than FEWEST tokens nor more than MOST). The loss is `kl` times KL(original || pruned) plus `next`
    times the cross-entropy of the next token, means over predicted tokens. `top`: the original's likeliest tokens that
    KL is over, the others as one; "vocabulary": all of them. Rates rise over a share `warmup` of the steps to `rate`
    (None: see `peak`) and fall by a cosine to a share `floor`. Every `every` steps (None: ten times in all) the loss on
    held-back text is looked at, and training ends where `patience` such looks brought nothing.
    `entropy` times the entropy of what routers choose from is added to the loss (see `entropy.py`). `top_k`: each token
    chooses fewer and fewer experts in the first half of the steps, which is not ended early, and so many from then on
    (None: as many as ever). `temperature`: of KL alone; where it is not 1, over the likeliest tokens alone. "factors"
    are experts as products, which hold `factor_ratio` of a matrix' numbers, and a share `kept_rows` of the rows of what
    these do not make (see `factors.py`); they train alone, with 0 epochs too.
    """

    train: tuple[str, ...] = ("all",)
    epochs: float = 1.0
    step_tokens: int | None = None
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
    adapter: bool = False  # what is written is an adapter of peft's, and no checkpoint
    entropy: float = 0.0
    top_k: int | None = None
    factor_ratio: float = 0.25
    kept_rows: float = 0.1
    temperature: float = 1.0

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
        if self.adapter and self.train not in (("lora",), (FACTORS,)):
            raise InputError(f"--adapter: goes with --train lora or {FACTORS}, alone")
        if FACTORS in self.train and len(self.train) > 1:
            raise InputError(f"--train {','.join(self.train)}: {FACTORS} train alone")
        if self.factored and self.top_k is not None:
            raise InputError(f"--top-k: goes without --train {FACTORS}")
        if self.adapter and self.top_k is not None:
            raise InputError("--adapter: goes without --top-k, which config.json says")
        least = {"--patience": self.patience, "--lora-rank": self.lora_rank}
        least |= {"--step-tokens": self.step_tokens or 1, "--every": self.every or 1}
        least |= {} if self.top_k is None else {"--top-k": self.top_k}
        for flag, value in least.items():
            check_type(flag, value, int)
            if value < 1:
                raise InputError(f"{flag} {value}: expected 1 or more")
        weights = {"--kl": self.kl, "--next": self.next, "--decay": self.decay, "--entropy": self.entropy}
        for flag, number in weights.items():
            if not 0 <= number < math.inf:
                raise InputError(f"{flag} {number}: expected 0 or more")
        if not self.kl and not self.next:
            raise InputError("--kl 0 --next 0: nothing is left to train towards")
        above = {"--clip": self.clip, "--lora-alpha": self.lora_alpha, "--temperature": self.temperature}
        for flag, number in above.items():
            if not 0 < number < math.inf:
                raise InputError(f"{flag} {number}: expected more than 0")
        if not 0 < self.factor_ratio < 1:
            raise InputError(f"--factor-ratio {self.factor_ratio}: expected a share of a matrix' numbers, below 1")
        for flag, number in {"--rate": self.peak(WIDTH), "--epochs": self.epochs}.items():
            if not 0 < number <= LARGEST and not (self.factored and flag == "--epochs" and number == 0):
                raise InputError(f"{flag} {number}: expected more than 0, and {LARGEST} at the most")
        for flag, number in {"--warmup": self.warmup, "--floor": self.floor, "--kept-rows": self.kept_rows}.items():
            if not 0 <= number <= 1:
                raise InputError(f"{flag} {number}: expected a share, from 0 to 1")
        if self.top != VOCABULARY and not (isinstance(self.top, int) and self.top > 0):
            raise InputError(f"--top {self.top}: expected a number of tokens, or {VOCABULARY}")

    @property
    def factored(self) -> bool:
        return self.train == (FACTORS,)

    def tokens_of_step(self, tokens: int) -> int:
        """Of each step, where all have so many."""
        return min(max(1, tokens), self.step_tokens or max(FEWEST, min(MOST, tokens // STEPS)))

    def looks(self, steps: int) -> int:
        """Steps from one look at held-back text to the next, of so many in all."""
        return self.every or max(1, steps // 10)

    def peak(self, width: int, distance: float | None = None) -> float:
        """The largest learning rate, of a model of so many hidden dimensions that is so far from the original: Adam's
        steps are as large for every weight, a wider sum of them moves its output as much further, and what is near to
        the original (refitted, say) is spoilt by steps that serve what is not."""
        if self.rate is not None:
            return self.rate
        share, near = min(1.0, WIDTH / width), 1.0 if distance is None else min(1.0, distance / FAR)
        return near * min(KINDS[kind] * (1.0 if kind in AT_ANY_WIDTH else share) for kind in self.train)

    def rate_at(self, step: int, steps: int, peak: float) -> float:
        """The learning rate of a step, counted from 0, of so many in all."""
        warm = round(self.warmup * steps)
        if step < warm:
            return peak * (step + 1) / (warm + 1)
        share = (step - warm) / max(1, steps - warm)
        return peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2)

    def top_k_at(self, step: int, steps: int, of: int) -> int:
        """What each token chooses in a step, counted from 0, of so many in all, where it chose `of` before: a line from
        there to `top_k` over the first half of the steps, rounded up (reconstructed: see `entropy.py`)."""
        least = of if self.top_k is None else self.top_k
        return least + max(0, -(-(of - least) * (steps - 2 * step) // steps))
