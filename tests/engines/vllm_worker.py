"""Greedy tokens of several checkpoints in vLLM, in one process of its environment: a JSON request as the argument, a
JSON line on standard output for each folder. Each is run in a fork, since what fails leaves vLLM's state half made."""

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from vllm import LLM, SamplingParams

# What vLLM imports when it first runs a model; once, for all forks.
LATER = """
v1.engine.llm_engine v1.engine.core v1.engine.core_client v1.worker.cpu_worker v1.worker.cpu_model_runner
v1.executor.uniproc_executor model_executor.models.registry model_executor.layers.fused_moe.layer
v1.attention.backends.cpu_attn model_executor.model_loader.default_loader
"""
LIMIT = 240  # seconds a checkpoint


def tokens(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        model = LLM(
            folder, dtype=request["dtype"], max_model_len=request["length"], max_num_seqs=4, skip_tokenizer_init=True,
            enforce_eager=True, **request["options"],
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=request["tokens"], detokenize=False, ignore_eos=True)
        out = model.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params, use_tqdm=False)
        return {"tokens": [list(each.outputs[0].token_ids) for each in out]}
    except BaseException as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def in_a_fork(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(LIMIT)
        os.write(write, json.dumps(tokens(folder, request)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    _, status = os.wait()
    return json.loads(told) if told else {"error": f"died of signal {status & 127}"}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints
    for name in LATER.split():
        importlib.import_module(f"vllm.{name}")
    asked = json.loads(sys.argv[1])
    for each in asked["folders"]:
        print(json.dumps({"folder": each, **in_a_fork(each, asked)}), file=answers, flush=True)
