"""Commands in processes that are killed: forked, with everything imported, so that many of them cost little."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.helpers.commands import Done, moekern

# Modules that write down how far a run is.
WRITERS = ("journal.py", "state_files.py", "files.py", "store.py", "disk.py")
_PRELOADED = [
    "tests.helpers.killed", "moekern.cli.pipeline", "moekern.cli.whole_run", "moekern.checkpoint.remote",
    "moekern.kernels.native", "torch._dynamo", "transformers.models.qwen3_moe.modeling_qwen3_moe",
]  # fmt: skip


def command(arguments: tuple[object, ...], told: Path, kill_at: int | None = None, every: bool = True) -> Done | None:
    """Run a command in a process of its own, which is killed before the `kill_at`-th call that one of WRITERS makes or
    gets; None then. `told` is a file to use. With `every`, how far the run is is written down after every layer."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    told.unlink(missing_ok=True)
    process = server.Process(target=_run, args=([str(each) for each in arguments], told, kill_at, every))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, process.exitcode
    return Done(*json.loads(told.read_text())["done"])


def calls(told: Path) -> int:
    """How many calls there were in the last command, which ended by itself."""
    return int(json.loads(told.read_text())["calls"])


def _run(arguments: list[str], told: Path, kill_at: int | None, every: bool) -> None:
    import torch

    from moekern.model import journal

    torch.set_num_threads(1)
    if every:
        journal.SHARE = 0
    counted, known = 0, dict[CodeType, bool]()  # whether code is one of the writers'

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        code = frame.f_code
        ours = known.get(code)
        if ours is None:
            ours = known[code] = os.path.basename(code.co_filename) in WRITERS
        if ours and event in ("call", "c_call"):
            counted += 1
            if counted == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    done = moekern(*arguments)
    sys.setprofile(None)
    told.write_text(json.dumps({"done": done, "calls": counted}))
