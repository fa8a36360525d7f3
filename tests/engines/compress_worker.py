"""llm-compressor in its environment, without calibration data but what a request holds: a JSON request as the argument.

quantise: {"source", "out", "scheme"} -> compressed by round to nearest. prune: {"source", "out", "sparsity", "report",
"ids"} -> experts dropped by REAPPruningModifier on these token ids.
"""

import json
import os
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.dup2(2, 1)  # what llm-compressor prints
    model = AutoModelForCausalLM.from_pretrained(asked["source"], dtype=torch.bfloat16)
    if "scheme" in asked:
        ignored = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=asked["scheme"], ignore=ignored))
    else:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in asked["ids"]]
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=REAPPruningModifier(sparsity=asked["sparsity"], report_path=asked["report"]),
            pipeline="sequential",
            moe_calibrate_all_experts=False,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]["input_ids"]),
        )
    model.save_pretrained(asked["out"])
