"""Layer keys, as plans and statistics use them: "3", "mtp.0", "encoder.1"."""


def natural(key: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key: numbers by value and before words, so "2" < "10" < "mtp.0"."""
    parts = key.split(".")
    return tuple((0, int(p), p) if p.isascii() and p.isdigit() and len(p) < 10 else (1, 0, p) for p in parts)
