"""What a training keeps in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.files import sized
from tests.helpers import large

SCRIPT = """
import json, resource, sys
import torch
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.model.compute import Compute
from moekern.recovery import loaded
from moekern.recovery.course import Sample
from moekern.recovery.settings import Training
from tests.helpers.recovering import steps

if sys.argv[2] == "streamed":
    loaded.SHARE = 1 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
torch.nn.functional.linear(torch.ones(512, 512).bfloat16(), torch.ones(512, 512).bfloat16())
ids = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(0))
before = peak()
training = Training(train=("router",), kl=0.0, next=1.0)
with steps(sys.argv[1], training, compute=Compute("cpu", "bfloat16")) as own:
    told = [own.step([Sample(0, Batch("a", ids))], 1e-3, lambda share: None)["nll"] for _ in range(2)]
    stays = own.layerwise.stays
print(json.dumps({"peak": peak() - before, "stays": stays, "told": told}))
"""


@pytest.mark.whole
def test_one_layer_and_what_trains_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 layers of 64 MB; where there is room for all of them, they are read once."""
    monkeypatch.setattr(large, "LAYERS", 12)
    folder = large.save(tmp_path / "model", experts=8)
    checkpoint = open_checkpoint(folder)
    assert len(find_layout(checkpoint).layers) == 12
    layer = sum(e.stop - e.start for n, e in checkpoint.tensors.items() if n.startswith("model.layers.3."))

    def run(how: str) -> dict[str, object]:
        done = subprocess.run([sys.executable, "-c", SCRIPT, folder, how], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    streamed, whole = run("streamed"), run("whole")
    assert (streamed["stays"], whole["stays"]) == (False, True)
    assert streamed["told"] == whole["told"]
    assert int(str(streamed["peak"])) < 5 * layer, sized(int(str(streamed["peak"])))
    assert int(str(whole["peak"])) > 11 * layer, sized(int(str(whole["peak"])))
