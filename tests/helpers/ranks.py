"""Processes as torchrun starts them, quickly: forked from one process in which the libraries are imported already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers.commands import Done

PRELOADED = [
    "transformers", "torch.distributed", "moekern.cli.pipeline", "moekern.cli.whole_run", "moekern.checkpoint.remote",
    "moekern.kernels.native", "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.masking_utils",
    "transformers.tokenization_utils_tokenizers", "tokenizers.implementations", "pydantic.type_adapter",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, __name__])

Before = Callable[[int], None]  # (rank), in the process, before the command begins


def started(
    folder: Path, size: int, arguments: Sequence[object], before: Before | None = None, nodes: int = 1
) -> list[BaseProcess]:
    """One process for each rank, as if they were on so many nodes; their words go to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    found, place, words = list[BaseProcess](), Path.cwd(), [str(word) for word in arguments]
    for rank in range(size):
        process = _context.Process(target=_rank, args=(place, folder, (rank, size, nodes), port, words, before))
        process.start()
        found.append(process)
    return found


def ended(folder: Path, processes: Sequence[BaseProcess], seconds: float = 240) -> list[Done]:
    """How each has ended. Those that do not end in time are killed, which the code tells."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [
        Done(process.exitcode or 0, (folder / f"{rank}.out").read_text(), (folder / f"{rank}.err").read_text())
        for rank, process in enumerate(processes)
    ]


def torchrun(folder: Path, size: int, *arguments: object, before: Before | None = None, nodes: int = 1) -> list[Done]:
    """Run the command line in `size` processes."""
    return ended(folder, started(folder, size, arguments, before, nodes))


def _rank(
    cwd: Path, folder: Path, ranks: tuple[int, int, int], port: int, arguments: list[str], before: Before | None
) -> None:
    rank, size, nodes = ranks
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(cwd)
    if size > 1:
        node, local = divmod(rank, size // nodes)
        names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size // nodes}
        place = {"GROUP_RANK": node, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {name: str(value) for name, value in (names | place).items()}
    import torch

    from moekern.cli.app import main

    torch.set_num_threads(1)
    code = 1
    try:
        if before is not None:
            before(rank)
        sys.argv = ["moekern", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
