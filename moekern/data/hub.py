"""Data sets of the Hugging Face hub, streamed row by row through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moekern.data.mixes import Domain
from moekern.data.readers import Item, needed
from moekern.errors import InputError, first_line

SHUFFLED = 1000  # rows that one is drawn from, where not all are read


def hub_rows(domain: Domain, seed: int | None) -> Iterator[Item]:
    """Rows of a data set in their order; with a seed: shards in a random order, and rows out of SHUFFLED at a time.

    Raises InputError where it is not to be had.
    """
    datasets: Any = needed("datasets", f"{domain.shown}: no such file or folder, and a data set of the hub")
    try:
        rows = datasets.load_dataset(domain.path, domain.subset, split=domain.split or "train", streaming=True)
        rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        for number, row in enumerate(rows, start=1):
            yield Item(f"row {number}", row)
    except Exception as error:  # of a network, of files of any kind, of their decoders
        raise InputError(
            f"--data {domain.shown}: no such file or folder, and not to be had from the hub: {first_line(error)}"
        ) from error
