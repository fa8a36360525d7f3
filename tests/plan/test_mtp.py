"""What engines make of MTP layers."""

import pytest

from moekern.architectures import FAMILIES
from moekern.plan.engines import listed, names_of
from moekern.plan.mtp import CONVERTER, MLX_LEAVES_OUT, Mtp, mtp_finding
from tests.helpers.findings import check_finding

NUMBERED, NAMED, GONE = ("model.layers.4.",), ("mtp.",), Mtp((), ())
CASES = {  # engine, family, MTP layers beside others of 64 experts -> whether it stops, and words; None: nothing
    "llama.cpp leaves DeepSeek-V3's out": ("llama.cpp", "deepseek_v3", Mtp((256,), NUMBERED), None),
    "and may leave out GLM's": ("llama.cpp", "glm4_moe", Mtp((128,), NUMBERED), (False, "convert with --no-mtp")),
    "pruned alike": ("llama.cpp", "glm4_moe", Mtp((64,), NUMBERED), None),
    "dropped": ("llama.cpp", "glm4_moe", GONE, None),
    "it waits for Qwen3-Next's": ("llama.cpp", "qwen3_next", GONE, (False, "there are none; convert with --no-mtp")),
    "which are there": ("llama.cpp", "qwen3_next", Mtp((64,), NAMED), None),
    "but larger": (
        "llama.cpp",
        "qwen3_next",
        Mtp((512,), NAMED),
        (False, "MTP layers have 512 experts, the others 64"),
    ),
    "Qwen3.5": ("llama.cpp", "qwen3_5_moe", GONE, (False, "--no-mtp")),
    "MiMo's, which have no experts": ("llama.cpp", "mimo_v2_flash", GONE, (False, "--no-mtp")),
    "Ling has no option": ("llama.cpp", "bailing_moe_v2", Mtp((128,), NUMBERED), (True, "--mtp prune or drop")),
    "EXAONE's have no experts": ("llama.cpp", "exaone_moe", Mtp((), NAMED), None),
    "and must not": ("llama.cpp", "exaone_moe", Mtp((64,), NAMED), (True, "takes no experts in MTP layers")),
    "Mellum no place": ("llama.cpp", "mellum", Mtp((64,), NAMED), (True, "--mtp drop")),
    "Mellum without": ("llama.cpp", "mellum", GONE, None),
    "a family nobody read": ("llama.cpp", "qwen3_moe", Mtp((64,), NAMED), (None, "is not known")),
    "the same files": ("ik_llama.cpp", "glm4_moe", Mtp((128,), NUMBERED), (False, "convert with --no-mtp")),
    "mlx-lm knows layer 61": ("mlx-lm", "deepseek_v3", Mtp((64,), ("model.layers.61.",)), None),
    "no other": ("mlx-lm", "deepseek_v3", Mtp((64,), NUMBERED), (True, "no place for MTP layers (model.layers.4.*)")),
    "and none of Mellum": ("mlx-lm", "mellum", Mtp((64,), NAMED), (True, "no place for MTP layers (mtp.*)")),
    "of others it leaves them out": ("mlx-lm", "qwen3_next", Mtp((512,), NAMED), None),
    "vLLM without speculation": ("vllm", "deepseek_v3", Mtp((256,), NUMBERED), (False, "without speculative decoding")),
    "SGLang too": ("sglang", "glm4_moe", Mtp((128,), NUMBERED), (False, "without speculative decoding")),
    "vLLM with it": ("vllm", "deepseek_v3", Mtp((64,), NUMBERED), None),
    "transformers": ("transformers", "deepseek_v3", Mtp((256,), NUMBERED), None),
    "mistral.rs": ("mistral.rs", "deepseek_v3", Mtp((256,), NUMBERED), None),
}


@pytest.mark.parametrize("case", CASES)
def test_mtp_modes_by_family(case: str) -> None:
    engine, family, mtp, expected = CASES[case]
    said = mtp_finding(engine, family, mtp, 64)
    check_finding(said, expected)


def test_the_converter_is_known_for_every_family_with_mtp_layers() -> None:
    """Those that it knows at all."""
    for family in FAMILIES:
        if family.mtp and listed("llama.cpp", names_of(family.name)) is None:
            assert family.name in CONVERTER, family.name
    assert {*CONVERTER, *MLX_LEAVES_OUT} <= {family.name for family in FAMILIES}
