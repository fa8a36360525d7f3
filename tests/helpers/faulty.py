"""Pruners in processes of their own, to be killed, stopped and given bad luck at chosen system calls (see faults.c).

A server process has moekern imported and the library of faults preloaded, and forks a child for every command: many
kills cost as many forks, and one start of Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from tests.helpers import ROOT, synthetic

HERE = Path(__file__).parent
CHANGES = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "truncate", "fallocate", "copy", "clone")


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, or minus the signal's number; stopped: it is stopped, not over."""

    code: int
    said: str
    stopped: bool = False

    @property
    def line(self) -> str:
        """What it said in its last line, which must be its only one about an error."""
        lines = [line for line in self.said.splitlines() if line.startswith("moekern: ")]
        assert len(lines) == 1, self.said
        assert "Traceback" not in self.said, self.said
        return lines[0]


@dataclass(frozen=True)
class Running:
    server: Server
    pid: int
    output: Path

    def wait(self) -> Ended:
        """Until it ends or stops."""
        status = int(self.server.ask({"wait": self.pid})["status"])
        said = self.output.read_text(errors="replace")
        if os.WIFSTOPPED(status):
            return Ended(-os.WSTOPSIG(status), said, stopped=True)
        return Ended(os.waitstatus_to_exitcode(status), said)

    def send(self, number: int) -> None:
        """A signal. Its number is its own until wait() has returned the end."""
        os.kill(self.pid, number)


class Server:
    """`start` and `run` take the arguments of the command line. rules, log: see faults.c; under: what calls count."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.folder = folder
        self.outputs = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.faulty"],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def start(
        self,
        *arguments: str | Path,
        under: Sequence[Path] = (),
        rules: str = "",
        log: Path | None = None,
        umask: int = 0o022,
        uid: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Running:
        self.outputs += 1
        output = self.folder / f"output-{self.outputs}"
        output.touch()
        answer = self.ask(
            {
                "arguments": [str(argument) for argument in arguments],
                "faults": [":".join(map(str, under)), rules, str(log or "")],
                "umask": umask,
                "uid": uid,
                "environment": dict(environment or {}),
                "output": str(output),
            }
        )
        return Running(self, int(answer["pid"]), output)

    def run(self, *arguments: str | Path, **options: Any) -> Ended:
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class Bench:
    """A checkpoint, a plan, and a folder for what is made of them. Only calls below these two folders count."""

    server: Server
    source: Path
    plan: Path
    folder: Path

    def start(self, out: Path, *options: str, **how: Any) -> Running:
        out.parent.mkdir(exist_ok=True)
        under = [self.source, out.parent]
        return self.server.start("prune", self.source, self.plan, "--out", out, *options, under=under, **how)

    def prune(self, out: Path, *options: str, **how: Any) -> Ended:
        return self.start(out, *options, **how).wait()

    def fresh(self) -> Path:
        """A target alone in a new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"

    def want(self, *options: str) -> Snapshot:
        """What an undisturbed run makes."""
        out = self.fresh()
        ended = self.prune(out, *options)
        assert ended.code == 0, ended.said
        return finished(out)

    def changes(self, *options: str, rules: str = "", out: Path | None = None) -> list[tuple[str, str]]:
        """The calls of an undisturbed run that change files below the folder of `out`, in their order."""
        out = out or self.fresh()
        log = self.server.folder / f"log-{self.server.outputs}"
        ended = self.prune(out, *options, rules=rules, log=log)
        assert ended.code == 0, ended.said
        return [(call, path) for call, path in read_log(log) if call in CHANGES]


@contextmanager
def benches(folder: Path, **sizes: Any) -> Iterator[Bench]:
    """A bench in `folder`. On leaving, the source must be as it was; skips the test where there is no C compiler."""
    library = build_library(folder)
    if library is None:
        pytest.skip("needs a C compiler")
    source, plan = checkpoint(folder / "model", **sizes), write_plan(folder / "plan.json")
    (folder / "runs").mkdir()
    (folder / "outputs").mkdir()
    before = snapshot(source), times(source)
    server = Server(library, folder / "outputs")
    try:
        yield Bench(server, source, plan, folder / "runs")
    finally:
        server.close()
    assert (snapshot(source), times(source)) == before


@contextmanager
def benches_in_memory(tmp_path_factory: pytest.TempPathFactory, **sizes: Any) -> Iterator[Bench]:
    """In memory where there is such a folder: what a kill or a fault leaves is the same there, and a flush costs
    nothing."""
    memory = Path("/dev/shm")
    root = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("bench")
    with (
        tempfile.TemporaryDirectory(prefix="moekern-bench-", dir=root) as folder,
        benches(Path(folder), **sizes) as made,
    ):
        yield made


def nothing_or_all(out: Path, want: Snapshot) -> bool:
    """Whether the target is there; then it is complete, and else nothing but the work folder is beside it."""
    if os.path.lexists(out):
        assert snapshot(out) == want
        return True
    assert set(os.listdir(out.parent)) <= {work_of(out).name}
    return False


def finished(out: Path) -> Snapshot:
    """The result of a run that left nothing but it; it is removed."""
    assert os.listdir(out.parent) == [out.name]
    found = snapshot(out)
    shutil.rmtree(out.parent)
    return found


def work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.moekern")


def refused(ended: Ended, out: Path, code: int = 2) -> str:
    """The one line of a run that failed with nothing at the target's name."""
    assert ended.code == code, ended
    assert not os.path.lexists(out)
    assert str(out) in ended.line
    return ended.line


def resumed(bench: Bench, out: Path, *options: str) -> None:
    ended = bench.prune(out, *options)
    assert ended.code == 0, ended.said
    assert finished(out) == bench.want(*options)


def build_library(folder: Path) -> Path | None:
    """Compile faults.c; None without a C compiler."""
    for compiler in ("cc", "gcc", "clang"):
        library = folder / "faults.so"
        command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "faults.c")]
        try:
            subprocess.run([*command, "-lpthread"], check=True)
        except FileNotFoundError:
            continue
        return library
    return None


def checkpoint(
    folder: Path,
    shards: int = 8,
    layers: int = 3,
    rows: int = 1029,
    companions: str = "bf16",
    embedding: int = 4000,
    computed: bool = False,
) -> Path:
    """A qwen3_moe checkpoint of random bytes in several shards, with side files; with `computed` a deepseek_v4 one,
    whose pruning computes tensors.

    Every tensor of an expert has `rows` rows: of 8 bytes with companions "bf16", of 5 with "odd", so that few of them
    begin at a multiple of a block. The embedding has `embedding` rows of 8 bytes.
    """
    config, tensors = synthetic.deepseek_v4(layers) if computed else synthetic.qwen3(companions, layers=layers)
    rng = np.random.default_rng(7)
    for name, (dtype, shape, _) in tensors.items():
        if ".experts." in name:
            tensors[name] = synthetic.data(rng, dtype, [rows, *shape[1:]])
    tensors["model.embed_tokens.weight"] = synthetic.data(rng, "BF16", [embedding, 4])
    synthetic.write(folder, config, tensors, shards=shards)
    for path in folder.glob("*.safetensors"):  # a header of a multiple of 8 bytes, as the safetensors library writes it
        raw = path.read_bytes()
        stop = 8 + int.from_bytes(raw[:8], "little")
        text = raw[8:stop] + b" " * (-stop % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[stop:])
    (folder / "tokenizer.json").write_bytes(rng.bytes(5000))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ messages }}\n")
    return folder


def write_plan(path: Path, layers: int = 3, keep: Sequence[int] = (0, 2, 3, 7)) -> Path:
    content = {"format": "moekern.plan/1", "layers": {str(layer): {"keep": list(keep)} for layer in range(layers)}}
    path.write_text(json.dumps(content))
    return path


Snapshot = dict[str, tuple[int, bytes | str | None]]


def snapshot(folder: Path) -> Snapshot:
    """Every entry of a folder, itself as ".": mode, and the bytes of a file or the target of a link."""
    found: Snapshot = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = (path.lstat().st_mode, content)
    return found


def times(folder: Path) -> dict[str, int]:
    """When each entry was changed last, in ns."""
    return {path.as_posix(): path.lstat().st_mtime_ns for path in [folder, *sorted(folder.rglob("*"))]}


def read_log(log: Path) -> list[tuple[str, str]]:
    """The calls that counted, as (call, path), in their order."""
    if not log.exists():
        return []
    lines = log.read_text().splitlines()
    return [(call, path) for call, _, path in (line.partition(" ") for line in lines)]


def serve() -> None:
    """A request a line: to fork a command, or to wait for one. Imports and tables are made before the first fork."""
    typer.main.get_command = functools.cache(typer.main.get_command)  # else a child makes the table of commands first
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        source, plan = checkpoint(Path(folder) / "model"), write_plan(Path(folder) / "plan.json")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            code = moekern_main("prune", str(source), str(plan), "--out", f"{folder}/out")
        assert code == 0
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps({"status": os.waitpid(request["wait"], os.WUNTRACED)[1]}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _command(request)
        print(json.dumps({"pid": pid}), flush=True)


def moekern_main(*arguments: str) -> int:
    """The command line, in this process; its exit code."""
    from moekern.__main__ import main

    sys.argv = ["moekern", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _command(request: dict[str, Any]) -> None:
    """Run one command line in this process and end it."""
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(request["environment"])
        os.umask(request["umask"])
        if request["uid"] is not None:
            os.setgroups([])
            os.setgid(request["uid"])
            os.setuid(request["uid"])
        faults = ctypes.CDLL(None).moekern_faults
        faults(*(text.encode() for text in request["faults"]))
        code = moekern_main(*request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
