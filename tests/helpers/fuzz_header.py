"""Feed mutated headers to the parser until one of them gets past it: python -m tests.helpers.fuzz_header -runs=1000000

Needs the `fuzz` extra (atheris). Options are libFuzzer's; a folder among them keeps the corpus. Every input must be
refused in one line or open as the safetensors library opens it; anything else ends the run and leaves a crash file.
"""

import random
import sys

import atheris

with atheris.instrument_imports(include=["moekern.checkpoint.header", "moekern.checkpoint.strict_json"]):
    from tests.helpers.bad_files import BAD, EXPECTED, judge, mutated, valid


def one_input(content: bytes) -> None:
    judge(content)


def mutator(content: bytes, max_size: int, seed: int) -> bytes:
    """Three in four inputs change in their JSON or their length, so that most of them get past the first checks."""
    rng = random.Random(seed)
    if len(content) < 10 or rng.randrange(16) == 0:
        content = valid(rng)
    if rng.randrange(4) == 0:
        return atheris.Mutate(content, max_size)
    for _ in range(rng.choice([1, 1, 2, 4])):
        content = mutated(content, rng)
    return content[:max_size]


def main() -> None:
    for name in EXPECTED:
        if name.startswith("headers/"):
            assert not judge((BAD / name).read_bytes()), name
    atheris.Setup([sys.argv[0], "-max_len=8192", *sys.argv[1:]], one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
