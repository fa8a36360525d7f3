"""What one pass measures is measured of a model in memory too, tier by tier, and padding counts in none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moekern
from moekern.calibration.calibrate import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.measurement.tiers import BY_BATCH
from moekern.model.compute import Compute
from tests.helpers import families
from tests.helpers.measured import close, differences

MakeCheckpoint = Callable[[str], Path]


def test_observing_measures_what_one_pass_can(family_checkpoint: MakeCheckpoint) -> None:
    folder, token_ids = family_checkpoint("qwen3_moe"), families.input_ids("qwen3_moe", 2, 12, 1)
    model, tiers = families.load(folder), BY_BATCH
    with moekern.observe(model, tiers=tiers) as seen:
        families.forward(model, token_ids)
    streamed = calibrate(
        folder, TokenData((Batch("text", token_ids),), {}, 2), Compute(dtype=torch.float32), tiers=tiers
    )
    for key in streamed.layers:
        assert differences(seen.layer(key), streamed.layer(key)) == []
    with (
        pytest.raises(InputError, match="--tier replay: observe does not measure it"),
        moekern.observe(model, tiers=["replay"]),
    ):
        pass
    embeddings = model.get_input_embeddings()(token_ids)
    with pytest.raises(InputError, match="not given input_ids"), moekern.observe(model, tiers=["vocabulary"]):
        model(inputs_embeds=embeddings)


def test_padding_counts_in_no_tier(family_checkpoint: MakeCheckpoint) -> None:
    model = families.load(family_checkpoint("deepseek_v3"))
    ids = families.input_ids("deepseek_v3", 1, 9, 3)
    tiers = BY_BATCH
    padded = torch.cat([ids, torch.full((1, 3), 17)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    with moekern.observe(model, tiers=tiers) as plain, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with moekern.observe(model, tiers=tiers) as whole_, torch.no_grad():
        model(input_ids=padded, attention_mask=mask, use_cache=False)
    for key in plain.layers:
        a, b = plain.layer(key), whole_.layer(key)
        for name in ("vocabulary", "token_count", "coalitions", "compat_count", "residual_tokens"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        for name in ("renormalised_norm_sum", "compat_gated_norm_sum", "residual_sum", "unit_sum", "mixture_norm_sum",
                     "left_out_square_sum", "share_sum", "contribution_gram"):  # fmt: skip
            close(getattr(b, name), getattr(a, name))
