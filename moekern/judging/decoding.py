"""How a model's next token is taken from its logits, as a person writes it."""

from __future__ import annotations

from dataclasses import dataclass

from moekern.errors import InputError, nearest_name


@dataclass(frozen=True)
class Decoding:
    """temperature 0: the likeliest token; else one is drawn. repetition: what logits of tokens that are there already
    are divided by (multiplied, where they are below 0)."""

    name: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


NAMED = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "guarded": {"temperature": 1.0, "min_p": 0.05, "repetition": 1.1},  # what pruned models are published with
}
RANGES = {  # lowest and highest
    "temperature": (0.0, 10.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0.0, 1e6),
    "min_p": (0.0, 1.0),
    "repetition": (0.1, 10.0),
}


def decoding_of(text: str) -> Decoding:
    """ "greedy", "sampled", "guarded", or settings such as "temperature=0.7,top_p=0.9", which may follow a name.

    Raises InputError, naming the flag.
    """
    settings: dict[str, float] = {}
    for word in text.split(","):
        key, equals, number = word.strip().partition("=")
        if not equals and key in NAMED:
            settings |= NAMED[key]
            continue
        if not equals or key not in RANGES:
            known = (*NAMED, *RANGES)
            raise InputError(
                f"--decode {text}: {key or 'nothing'} is neither a name ({', '.join(NAMED)}) nor a setting "
                f"({', '.join(f'{each}=...' for each in RANGES)}){nearest_name(key, known)}"
            )
        low, high = RANGES[key]
        try:
            value = float(number)
        except ValueError:
            value = low - 1
        if not low <= value <= high or (key == "top_k" and value != int(value)):
            raise InputError(f"--decode {text}: {key}: expected a number from {low:g} to {high:g}, got {number!r:.40}")
        settings[key] = value
    top_k = int(settings.pop("top_k", 0))
    return Decoding(text, top_k=top_k, **settings)
