"""Stages with a hard limit on memory: python -m tests.helpers.limited STAGE FOLDER MB; 0: none.

The limit is set when everything is imported. Prints a JSON line: in how many groups experts ran, what came of it, and
the most bytes that were resident.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from moekern.architectures import find_layout
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.evaluation.evaluate import evaluate
from moekern.iteration import Method, iterate
from moekern.model.budget import _statm
from moekern.model.compute import Compute
from moekern.model.expert_groups import KERNELS
from moekern.model.layerwise import open_layerwise
from moekern.model.memory import bound_code
from moekern.plan.document import LayerPlan, Plan

BFLOAT16 = Compute(dtype="bfloat16")


def text() -> TokenData:
    ids = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))
    return TokenData((Batch("text", ids),), {"seed": 0}, 2)


def main(stage: str, folder: Path, megabytes: int) -> None:
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    if megabytes:
        bound_code(KERNELS // 4)  # as it is done for so little memory, before anything is multiplied
    with torch.no_grad():  # the libraries take their own share, once
        torch.nn.functional.linear(torch.ones(512, 512).bfloat16(), torch.ones(512, 512).bfloat16())
    if megabytes:
        limit = _statm(5) + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with open_layerwise(checkpoint, layout, BFLOAT16) as model:
        groups = max(map(len, model.groups.cuts.values()), default=1)
    data = text()
    if stage == "calibrate":
        measured = calibrate(checkpoint, data, BFLOAT16, tiers=("dimensions",))
        found: Any = {key: measured.layer(key).norm_sum.tolist() for key in measured.layers}
    elif stage == "gradient":
        measured = calibrate(checkpoint, data, BFLOAT16, tiers=("gradient",))
        found = {key: measured.layer(key).gradient_norm_sum.tolist() for key in measured.layers}
    elif stage == "evaluate":
        half = Plan({key: LayerPlan(tuple(range(0, layer.num_experts, 2))) for key, layer in layout.layers.items()})
        losses = evaluate(checkpoint, data, {"half": half}, BFLOAT16)
        found = {name: row["text"].nll for name, row in losses.items()}
    else:
        found = iterate(checkpoint, data, Method("reap", 0.5), BFLOAT16).to_json()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"groups": groups, "found": found, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
