"""The flags of every command and their defaults, written out: what scripts rely on changes in a diff that shows it."""

from __future__ import annotations

from enum import Enum
from typing import Any

import typer

import moekern as package
from moekern import kernels
from moekern.cli.app import app
from moekern.cli.options import BACKENDS
from moekern.version import __version__
from tests.helpers.commands import moekern

FLAGS = """
moekern
  --version = False
  --install-completion = None
  --show-completion = None
inspect
  MODEL required
  --criterion = gated_norm
  --keep = 0.5
  --revision = None
  --json = False
estimate
  MODEL required
  --tokens = 1M
  --sequence-length = 2048
  --domains = 1
  --tier* = None
  --keep = 0.5
  --plans = 1
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --out = .
  --revision = None
  --json = False
run
  MODEL required
  --out required
  --data* = None
  --keep* = None
  --fit = None
  --bits = None
  --context = 0
  --sequences = 1
  --reserve = 15%
  --criterion = gated_norm
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --batch-size = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --domain* = None
  --tier* = None
  --until-stable = None
  --budget = uniform
  --normalise = none
  --allow-nonuniform = False
  --target* = None
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --protect-super = False
  --mtp = None
  --copy = auto
  --forward/--no-forward = True
  --quality/--no-quality = True
  --refit = False
  --refine = False
  --shape = None
  --reestimate = False
  --computed-dtype = source
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
calibrate
  MODEL required
  --out required
  --data* = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --batch-size = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --tier* = None
  --criterion* = None
  --replay-tokens = 512
  --keep = 0.5
  --until-stable = None
  --part = None
  --backend = None
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
merge
  PARTS* required
  --out required
  --json = False
criteria
  WORDS* = None
  --tier* = None
  --markdown = False
  --json = False
score
  STATISTICS required
  --criterion = gated_norm
  --domain* = None
  --seed = 0
  --json = False
plan
  STATISTICS required
  --out required
  --keep* = None
  --fit = None
  --model = None
  --bits = None
  --context = 0
  --sequences = 1
  --reserve = 15%
  --criterion* = ['gated_norm']
  --domain* = None
  --budget = uniform
  --floor = None
  --normalise = none
  --adaptive-by = usage
  --multiple-of = 1
  --allow-nonuniform = False
  --target* = None
  --mtp = None
  --protect-super = False
  --keep-always* = None
  --drop-first* = None
  --guard* = None
  --suppress* = None
  --domain-floor* = None
  --seed = 0
  --revision = None
  --json = False
iterate
  MODEL required
  --keep required
  --out required
  --data* = None
  --criterion = gated_norm
  --rounds = 1
  --reestimate/--no-reestimate = True
  --domain* = None
  --target* = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --batch-size = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --backend = None
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
optimise
  MODEL required
  PLAN required
  --out required
  --data* = None
  --steps = 100
  --step-tokens = 4096
  --masks = 4
  --rate = 0.1
  --budget = uniform
  --top = 64
  --every = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
compare
  PLANS* required
  --statistics = None
  --json = False
evaluate
  MODEL required
  PLANS* = None
  --data* = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --batch-size = 1
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
check
  MODEL required
  --target* = None
  --revision = None
  --json = False
prune
  MODEL required
  PLAN required
  --out required
  --mtp = None
  --copy = auto
  --checksum = xxh3
  --reread = False
  --max-shard-size = None
  --refitted = None
  --part = None
  --revision = None
  --json = False
refit
  MODEL required
  PLAN required
  --out = None
  --data* = None
  --refine = False
  --width = None
  --reestimate = False
  --computed-dtype = source
  --target* = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --batch-size = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --mtp = None
  --copy = auto
  --forward/--no-forward = True
  --verify = None
  --full = False
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
recover
  PRUNED required
  --out required
  --original = None
  --data* = None
  --train = all
  --kl = 1.0
  --next = 0.0
  --top = 64
  --rate = None
  --epochs = 1.0
  --step-tokens = None
  --warmup = 0.05
  --floor = 0.1
  --clip = 1.0
  --decay = 0.0
  --every = None
  --patience = 5
  --lora-rank = 16
  --lora-alpha = 32.0
  --lora-targets = attention
  --adapter = False
  --entropy = 0.0
  --top-k = None
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --copy = auto
  --predictions = None
  --estimate = False
  --restart = False
  --trust-remote-code = False
  --json = False
lottery
  MODEL required
  --keep required
  --out required
  --data* = None
  --criterion = gated_norm
  --rounds = 4
  --tokens-per-round = 200k
  --train = all
  --paper = None
  --kl = 1.0
  --next = 0.0
  --top = 64
  --rate = None
  --step-tokens = None
  --control/--no-control = True
  --keep-rounds = False
  --preset = None
  --tokens = 1M
  --sequence-length = 2048
  --pack/--no-pack = True
  --chunk = None
  --column* = None
  --thinking = row
  --strict = False
  --seed = 0
  --device = auto
  --dtype = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --restart = False
  --trust-remote-code = False
  --revision = None
  --json = False
verify
  MODEL required
  PLAN required
  PRUNED required
  --forward = False
  --device = auto
  --memory = None
  --gpu-memory = None
  --spill = None
  --trust-remote-code = False
  --revision = None
  --json = False
convert
  SOURCE required
  --to required
  --out required
  --model = None
  --allow-nonuniform = False
  --revision = None
  --json = False
bench
  --case* = None
  --op* = None
  --threads = None
  --repeats = 9
  --compiled/--no-compiled = True
  --out = None
  --show = None
  --json = False
demo
  --out = None
  --seeds = 5
  --json = False
"""
SPOKEN = ("--quiet", "--verbose", "--log-file")  # of every command, behind its own


def listed() -> str:
    """A line a command, and one for each of its parameters: names, * where it can be repeated, default."""
    lines = []
    command: Any = typer.main.get_command(app)
    for name, each in {"moekern": command, **command.commands}.items():
        lines.append(name)
        assert [p.opts[-1] for p in each.params if p.opts[-1] in SPOKEN] == list(SPOKEN if each is not command else ())
        for parameter in each.params:
            if parameter.opts[-1] in SPOKEN:
                continue
            many = "*" if parameter.multiple or parameter.nargs == -1 else ""
            if parameter.required:
                default = "required"
            else:
                value = parameter.default() if callable(parameter.default) else parameter.default
                default = f"= {value.value if isinstance(value, Enum) else value}"
            names = "/".join((*parameter.opts, *parameter.secondary_opts))
            shown = names if parameter.param_type_name == "option" else names.upper()
            lines.append(f"  {shown}{many} {default}")
    return "\n".join(lines) + "\n"


def test_the_version() -> None:
    done = moekern("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moekern {__version__}\n", "")
    assert package.__version__ == __version__


def test_the_help_of_backend_names_the_kernels_own() -> None:
    assert kernels.BACKENDS == BACKENDS
    for command in ("calibrate", "iterate"):
        shown = moekern(command, "--help").stdout
        assert all(name in shown for name in BACKENDS)


def test_the_flags_of_every_command() -> None:
    assert listed() == FLAGS.lstrip("\n")
