"""How a checkpoint is served by the engines that run it, and which counts they run slower."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from moekern.plan.engines import Finding
from moekern.plan.served import Report, verdict
from moekern.plan.targets import PARALLEL, Served, Target, findings

CONVERTED = "python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf && llama-server -m {folder}.gguf"
COMMANDS: Mapping[str, str] = {
    "transformers": "python -c 'from transformers import AutoModelForCausalLM as M; "
    'M.from_pretrained("{plain}", dtype="auto", device_map="auto")\'',
    "vllm": "vllm serve {folder}",
    "sglang": "python -m sglang.launch_server --model-path {folder}",
    "llama.cpp": CONVERTED,
    "ik_llama.cpp": CONVERTED,
    "mlx-lm": "mlx_lm.server --model {folder}",
}


def serve_commands(folder: Path, found: Report, targets: Sequence[Target] = ()) -> dict[str, str]:
    """Target -> the command line that serves `folder`, of those whose rules the checkpoint is known to pass.

    `found` is what `check_folder` says of the checkpoint for the same targets (none: every engine).
    """
    return commands_of(folder, found.found, targets, own_code=found.own_code)


def commands_of(
    folder: Path, found: Mapping[str, tuple[Finding, ...]], targets: Sequence[Target] = (), *, own_code: bool = False
) -> dict[str, str]:
    """The same of the rules that each target's name comes with. own_code: the checkpoint brings its model's code."""
    asked = {str(target): target for target in targets}
    good = {name: asked.get(name, Target(name.partition(":")[0])) for name, row in found.items() if verdict(row)}
    return {name: _command(target, folder, own_code) for name, target in good.items() if target.engine in COMMANDS}


def _command(target: Target, folder: Path, own_code: bool) -> str:
    quoted = shlex.quote(str(folder))
    plain = str(folder).replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\"'\"'")
    command = COMMANDS[target.engine]
    if own_code and target.engine in (*PARALLEL, "mlx-lm"):
        command += " --trust-remote-code"
    if own_code and target.engine == "transformers":
        command = command.replace(", dtype=", ", trust_remote_code=True, dtype=")
    command = command.replace("{folder}", quoted).replace("{plain}", plain)
    if target.engine == "vllm":
        command += f" --tensor-parallel-size {target.tp}" if target.tp > 1 else ""
        command += " --enable-expert-parallel" if target.ep > 1 else ""
    if target.engine == "sglang":
        command += f" --tp-size {target.tp}" if target.tp > 1 else ""
        command += f" --ep-size {target.ep}" if target.ep > 1 else ""
    return command


def slower(counts: Mapping[str, int], served: Served, targets: Sequence[Target]) -> list[str]:
    """A line for each rule that makes a target slower, or less able, with these counts, and the nearest counts that
    break none."""
    lines = []
    for target in targets:
        lesser = [finding.text for finding in findings(target, counts, served) if finding.stops is False]
        near = "" if len(set(counts.values())) > 1 else _nearest_whole(max(counts.values()), served, target)
        lines += [f"{target}: {text}{near}" for text in lesser]
    return lines


def _nearest_whole(count: int, served: Served, target: Target) -> str:
    every = range(1, served.router.num_experts + 1)
    whole = [n for n in every if all(found.stops is None for found in findings(target, {"": n}, served))]
    around = [*[n for n in whole if n < count][-1:], *[n for n in whole if n > count][:1]]
    return f"; nearest count without this: {' or '.join(map(str, around))}" if around else ""
