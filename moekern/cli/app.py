"""The command line: one command a stage. Each parses its options, calls the stage and shows the result."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moekern.cli import console, ranks
from moekern.cli.bench import bench
from moekern.cli.calibrate import calibrate
from moekern.cli.card import card
from moekern.cli.check import check
from moekern.cli.compare import compare
from moekern.cli.contrast import contrast
from moekern.cli.convert import convert
from moekern.cli.criteria import criteria
from moekern.cli.demo import demo
from moekern.cli.estimate import estimate
from moekern.cli.evaluate import evaluate
from moekern.cli.inspect import inspect
from moekern.cli.iterate import iterate
from moekern.cli.lottery import lottery
from moekern.cli.merge import merge
from moekern.cli.merge_experts import merge_experts
from moekern.cli.optimise import optimise
from moekern.cli.plan import plan
from moekern.cli.prune import prune
from moekern.cli.push import push
from moekern.cli.recover import recover
from moekern.cli.refit import refit
from moekern.cli.report import report
from moekern.cli.run import run
from moekern.cli.schema import schema
from moekern.cli.score import score
from moekern.cli.verify import verify
from moekern.errors import InputError, first_line, is_out_of_memory, nearest_name, notes, speaking_flags
from moekern.files import reason
from moekern.team import Member, current
from moekern.version import __version__

UsageError: Any = typer.BadParameter.__base__  # click's, which typer may bring its own copy of


spoken = typer.Typer(add_completion=False)


@spoken.command()
def _spoken(
    quiet: Annotated[
        bool,
        typer.Option(
            "-q", "--quiet", help="Say nothing but results and errors.", callback=console.set_quiet, expose_value=False
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Show where an error comes from, and more of what is measured.",
            callback=console.set_verbose,
            expose_value=False,
            is_eager=True,
        ),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            help="Append what is said, with the time, to this file.", callback=console.set_log, expose_value=False
        ),
    ] = None,
) -> None:
    """What every command takes and none looks at: what of its words is shown."""  # fmt: skip


SPOKEN = tuple(typer.main.get_command(spoken).params)  # read once, since every command has them


class Command(TyperCommand):
    """A command, with the options of `_spoken` behind its own."""

    def __init__(self, *arguments: Any, params: list[Any], **options: Any) -> None:
        super().__init__(*arguments, params=[*params, *SPOKEN], **options)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole of what a command is for: the list of commands wraps it, and cuts nothing."""
        return (self.help or "").split("\n\n")[0].replace("\n", " ")


class Commands(TyperGroup):
    """A usage error is told by `main`, as every other error is."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if error.__class__.__name__ == "NoArgsIsHelpError":
            raise
        where = error.ctx.command_path.removeprefix("moekern").strip() if error.ctx is not None else ""
        said = _said(error)
        text = f"{where}: {said[:1].lower()}{said[1:]}" if where else f"{said[:1].lower()}{said[1:]}"
        raise InputError(f"{text}; see moekern {f'{where} ' if where else ''}--help", kind="option") from error


def _said(error: Any) -> str:
    """click's words; of options that are like an unknown one, the nearest, which --help is not."""
    if error.__class__.__name__ == "NoSuchOption":
        known = [name for name in error.possibilities or () if name != "--help"]
        return f"no such option: {error.option_name}{nearest_name(error.option_name, known)}"
    return str(error.format_message().rstrip(".").replace("\n", " "))


app = typer.Typer(
    name="moekern",
    cls=Commands,
    help="Prune experts from Mixture-of-Experts language models of any size on one machine.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # whose boxes cut names short in a terminal of 80 columns, and take [...] for markup
    epilog="moekern COMMAND -h shows what a command takes, and an example.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"moekern {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Those of the whole command line."""


# In the order of the work: the function, and an example of its use.
COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (inspect, "moekern inspect Qwen/Qwen3-30B-A3B"),
    (estimate, "moekern estimate Qwen/Qwen3-30B-A3B --tokens 2M --keep 0.5"),
    (run, "moekern run MODEL --data prose=book.txt --keep 0.5 --out MODEL-pruned"),
    (calibrate, "moekern calibrate MODEL --data code=src/ --data prose=a.txt --tokens 500000 --out s.safetensors"),
    (merge, "moekern merge part1.safetensors part2.safetensors --out all.safetensors"),
    (criteria, "moekern criteria routed"),
    (score, "moekern score s.safetensors --criterion hope"),
    (contrast, "moekern contrast s.safetensors --of refused --against answered --out map.json"),
    (plan, "moekern plan s.safetensors --keep 0.5 --target vllm:tp=2 --out plan.json"),
    (iterate, "moekern iterate MODEL --data prose=book.txt --keep 0.5 --rounds 4 --out plan.json"),
    (optimise, "moekern optimise MODEL plan.json --data prose=book.txt --out optimised.json"),
    (compare, "moekern compare gated_norm.json reap.json --statistics s.safetensors"),
    (evaluate, "moekern evaluate MODEL --data prose=held-out.txt plan-a.json plan-b.json"),
    (
        report,
        "moekern report s.safetensors plans/*.json --evaluation losses.json --checkpoint MODEL --out report.html",
    ),
    (check, "moekern check MODEL-pruned --target vllm:tp=4,ep=4"),
    (prune, "moekern prune MODEL plan.json --out MODEL-pruned"),
    (
        merge_experts,
        "moekern merge-experts MODEL --statistics s.safetensors --keep 0.5 --method m-smoe --out OUT",
    ),
    (refit, "moekern refit MODEL plan.json --data prose=book.txt --out MODEL-pruned"),
    (recover, "moekern recover MODEL-pruned --original MODEL --data prose=book.txt --out MODEL-recovered"),
    (lottery, "moekern lottery MODEL --data prose=book.txt --keep 0.5 --rounds 4 --out MODEL-pruned"),
    (verify, "moekern verify MODEL plan.json MODEL-pruned --forward"),
    (card, "moekern card MODEL-pruned --evaluation evaluation.json --base-model OWNER/MODEL"),
    (push, "moekern push MODEL-pruned OWNER/MODEL-pruned --dry-run"),
    (convert, "moekern convert plan.json --to llm-compressor --model MODEL --out report.json"),
    (schema, "moekern schema plan"),
    (bench, "moekern bench --case qwen3-30b-a3b --threads 1 --out bench.jsonl"),
    (demo, "moekern demo"),
)
for function, example in COMMANDS:
    app.command(cls=Command, epilog=example)(function)

STOPPED: dict[Any, str] = {130: "Ctrl-C", 129: "SIGHUP", 143: "SIGTERM"}
ENDING = (signal.SIGHUP, signal.SIGTERM)  # that would end the process before temporary files are gone


def main() -> None:
    """Run the command line; what the user can mend ends in one line and exit code 2, a signal in 128 + its number."""
    _open_standard_streams()
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        if before[number] is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    asked = "--json" in sys.argv[1:]  # before the flags are parsed, for what is wrong with them
    if asked:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars are no JSON
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # nor are its warnings
    try:
        helping = _helping(asked)
        if helping is None or ranks.is_needed():
            with console.output(asked, silent=helping is not None), speaking_flags(), _stdout(helping):
                _run(helping)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_standard_streams() -> None:
    """What was closed by whoever started the program leads nowhere: no file of ours must get its number."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  open to the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _helping(asked: bool) -> Member | None:
    try:
        return ranks.helping()
    except InputError as error:
        with console.output(asked):
            console.fail(str(error), error.kind)
        sys.exit(2)


@contextmanager
def _stdout(helping: Member | None) -> Iterator[None]:
    """Results are those of rank 0: what a process that helps it prints leads nowhere."""
    if helping is None:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _run(helping: Member | None) -> None:
    """The command. Other ranks learn how it has ended; of an error that they share, one speaks."""

    def fail(text: str, kind: str, **more: str) -> None:
        met = current().size > 1  # where the ranks have not met, the first of a node speaks
        if helping is None or (current().speaks if met else helping.local_rank == 0):
            console.fail(text, kind, **more)
        current().end(text)

    try:
        app(prog_name="moekern")
    except (InputError, OSError) as error:
        text, kind = (str(error), error.kind) if isinstance(error, InputError) else (reason(error), "system")
        if console.verbose():
            console.say("".join(traceback.format_exception(error)))
        _fail_lost(fail, error)
        fail(" ".join(text.split()), kind)
        sys.exit(2)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which typer answers with 1
            current().end("nobody reads what it says")
            sys.exit(128 + signal.SIGPIPE)
        if end.code in STOPPED:
            _fail_lost(fail, end, wait=1.0)
            fail("; ".join([f"stopped by {STOPPED[end.code]}", *notes(end)]), "interrupted")
        current().end(None if end.code in (None, 0, 1) else "")
        raise
    except Exception as error:
        if is_out_of_memory(error):
            if console.verbose():
                console.say("".join(traceback.format_exception(error)))
            fail(f"not enough memory ({first_line(error)}); --chunk, --batch-size and --memory make it less", "memory")
            sys.exit(2)
        if not console.as_json():
            current().end(f"{type(error).__name__}: {first_line(error)}")
            raise
        told = "".join(traceback.format_exception(error))
        fail(f"{type(error).__name__}: {first_line(error)}", "internal", traceback=told)
        sys.exit(1)


def _fail_lost(fail: Callable[[str, str], None], error: BaseException, wait: float = 0) -> None:
    """Where another rank has died or failed, this is why the command ends, and not the error that came of it."""
    lost = current().lost(wait)
    if lost is not None:
        fail("; ".join([lost, *dict.fromkeys(notes(error))]), "system")
        sys.exit(2)
