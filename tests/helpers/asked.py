"""Little task files for lm-evaluation-harness, about text that the model that ships has seen the like of."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

QUESTIONS = tuple((f"for i in range({n}):\n    print(", ("i", "zebra", "the of"), n % 3) for n in range(9))
KINDS = {
    "little_choice": {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"},
    "little_writing": {
        "output_type": "generate_until",
        "doc_to_target": "i",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "little_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def save_tasks(folder: Path, **more: object) -> Path:
    """A task of each kind; `more` of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
            "training_split": "train",
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **kind, **more}))
    return folder
