"""What benches draw: no sequence of it is judged."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bench.draws import draw_of, text_of
from moekern.checkpoint.folder import open_checkpoint
from moekern.demo import MODEL, TEXT


def test_headers_of_licences_are_in_both_texts_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = Namespace(data=[f"c={TEXT}/c/calibration.txt"], tokens=None, sequence_length=128)
    checkpoint = open_checkpoint(MODEL)
    judged = text_of(options, [f"c={TEXT}/c/evaluation.txt"], None).read(checkpoint)
    data, both = draw_of(options, checkpoint, judged, 0)
    assert both > 0
    assert f"seed 0: {both} sequences that are judged too are left out" in capsys.readouterr().err
    rows = [{tuple(row.tolist()) for batch in each.batches for row in batch.input_ids} for each in (data, judged)]
    assert not rows[0] & rows[1]
