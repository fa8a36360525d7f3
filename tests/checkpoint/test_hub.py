"""What is downloaded of a repository."""

import pytest
from huggingface_hub.utils import filter_repo_objects

from moekern.checkpoint.hub import UNWANTED

WANTED = [
    "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "overlay.safetensors",
    "mtp.safetensors", "tokenizer.json", "README.md", "LICENSE", "tekken.json", "vocab.bpe", "modeling_x.py",
    "encoding/encode.py", "additional_chat_templates/tool.jinja", "inference/configs/a.json",
]  # fmt: skip
SECOND = [
    "original/model-00001-of-00002.safetensors", "original/dtypes.json", "metal/model.bin", "fp8/model.safetensors",
    "fp8/model.safetensors.index.json", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
    "consolidated.safetensors.index.json", "pytorch_model-00001.bin", "pytorch_model.bin.index.json", "a/b/x.gguf",
    "adapter_model.safetensors", "adapter_config.json", "lora/adapter_config.json", "params.json", "onnx/m.onnx",
]  # fmt: skip


@pytest.mark.parametrize(("names", "taken"), [(WANTED, WANTED), (SECOND, [])], ids=["wanted", "second copies"])
def test_second_copies_are_not_downloaded(names: list[str], taken: list[str]) -> None:
    assert list(filter_repo_objects(names, ignore_patterns=UNWANTED)) == taken
