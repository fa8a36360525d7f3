"""Calibrate, evaluate and iterate with a hard limit on the process's memory: python -m tests.helpers.limited FOLDER MB.

The limit is set when everything is imported. Prints a JSON line: in how many groups experts ran, and the losses.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from moekern.architectures import find_layout
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.evaluation import evaluate
from moekern.iteration import Method, iterate
from moekern.model.budget import _statm
from moekern.model.compute import Compute
from moekern.model.layerwise import open_layerwise
from moekern.plan.document import LayerPlan, Plan

BFLOAT16 = Compute(dtype="bfloat16")
LENGTH = 64


def text(sequences: int) -> TokenData:
    ids = torch.randint(256, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    return TokenData((Batch("text", ids),), {"seed": 0}, 2)


def main(folder: Path, megabytes: int, sequences: int = 8) -> None:
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    with torch.no_grad():  # the libraries take their own share, once
        torch.nn.functional.linear(torch.ones(512, 512).bfloat16(), torch.ones(512, 512).bfloat16())
    if megabytes:
        limit = _statm(5) + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with open_layerwise(checkpoint, layout, BFLOAT16) as model:
        groups = max(map(len, model.groups.cuts.values()), default=1)
        print(model.takes.described, file=sys.stderr)
    data = text(sequences)
    measured = calibrate(checkpoint, data, BFLOAT16, tiers=("dimensions",))
    half = Plan({key: LayerPlan(tuple(range(0, layer.num_experts, 2))) for key, layer in layout.layers.items()})
    losses = evaluate(checkpoint, data, {"half": half}, BFLOAT16)
    plan = iterate(checkpoint, data, Method("reap", 0.5), BFLOAT16)
    print(
        json.dumps(
            {
                "groups": groups,
                "norms": {key: measured.layer(key).norm_sum.tolist() for key in measured.layers},
                "losses": {name: row["text"].nll for name, row in losses.items()},
                "plan": plan.to_json(),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
