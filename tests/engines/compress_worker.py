"""llm-compressor's REAPPruningModifier: a JSON request {"source", "out", "sparsity", "report", "ids"} as the argument,
where ids are rows of token ids of one length."""

import json
import os
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.dup2(2, 1)  # what llm-compressor prints
    model = AutoModelForCausalLM.from_pretrained(asked["source"], dtype=torch.bfloat16)
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
