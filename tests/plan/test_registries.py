"""Engines' sources, in small, as their readers see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.plan import registries
from moekern.plan.registries import READERS, main, refreshed

SOURCES: dict[str, dict[str, str]] = {
    "vllm": {
        "vllm/model_executor/models/registry.py": """
import torch
_TEXT_GENERATION_MODELS = {"MixtralForCausalLM": ("mixtral", "MixtralForCausalLM"), "A": ("a", "A")}
_MULTIMODAL_MODELS = {"V": ("v", "V")}
_SPECULATIVE_DECODING_MODELS = {"Draft": ("d", "D")}
_TRANSFORMERS_SUPPORTED_MODELS = {"FlexOlmoForCausalLM": ("transformers", "T")}
_TRANSFORMERS_BACKEND_MODELS = {"T": ("transformers", "T")}
_VLLM_MODELS = {**_TEXT_GENERATION_MODELS}
_PREVIOUSLY_SUPPORTED_MODELS = {"ArcticForCausalLM": "0.28.0"}
""",
        "vllm/model_executor/layers/quantization/__init__.py": """
QuantizationMethods = Literal["fp8", "awq"]
DEPRECATED_QUANTIZATION_METHODS = ["awq"]
""",
        "vllm/other.py": "this is not Python, and is not read",
    },
    "sglang": {
        "sglang/srt/models/mixtral.py": "class M: pass\nEntryClass = MixtralForCausalLM\n",
        "sglang/srt/models/two.py": "EntryClass = [A, B]\n",
        "sglang/srt/models/none.py": "x = 1\n",
        "sglang/srt/other/three.py": "EntryClass = C\n",
        "sglang/srt/layers/quantization/__init__.py": """
BASE_QUANTIZATION_METHODS: Dict[str, Type[QuantizationConfig]] = {"fp8": Fp8Config}
if is_cuda():
    BASE_QUANTIZATION_METHODS.update({"mxfp4": Mxfp4Config})
""",
    },
    "llama.cpp": {
        "conversion/__init__.py": 'TEXT_MODEL_MAP: dict[str, str] = {"MixtralForCausalLM": "llama", "B": "llama"}\n',
        "conversion/a_vision.py": """
@ModelBase.register("B")
class Vision(MmprojModel):
    model_arch = gguf.MODEL_ARCH.MMPROJ
""",
        "conversion/llama.py": """
@ModelBase.register(
    "MixtralForCausalLM",
    "NotInTheMap",
)
@ModelBase.example("x/y")
class LlamaModel(TextModel):
    model_arch = gguf.MODEL_ARCH.LLAMA

@ModelBase.register("B")
class Heir(LlamaModel):
    pass
""",
        "gguf-py/gguf/constants.py": """
MODEL_ARCH_NAMES: dict[MODEL_ARCH, str] = {MODEL_ARCH.LLAMA: "llama", MODEL_ARCH.MMPROJ: "clip"}
""",
    },
    "ik_llama.cpp": {
        "src/llama-arch.cpp": """
static const std::map<llm_arch, const char *> LLM_ARCH_NAMES = {
    { LLM_ARCH_LLAMA,   "llama"     },
    { LLM_ARCH_GLM_DSA,"glm-dsa" }, // a comment
    { LLM_ARCH_UNKNOWN, "(unknown)" },
};
static const std::map<llm_kv, const char *> LLM_KV_NAMES = { { LLM_KV_GENERAL_TYPE, "general.type" } };
"""
    },
    "mlx-lm": {
        "mlx_lm/utils.py": 'MODEL_REMAPPING = {"kimi_k2": "deepseek_v3", "gone": "nowhere"}\n',
        "mlx_lm/models/deepseek_v3.py": 'class Model: pass\nname = "weight_scale_inv"\n',
        "mlx_lm/models/kimi_k25.py": "from .deepseek_v3 import Model as Base\nclass Model: pass\n",
        "mlx_lm/models/mixtral.py": """
from .deepseek_v3 import Other
class Model: pass
@dataclass
class ModelArgs(BaseModelArgs):
    num_experts: int
    hidden_size: int
    head_dim: Optional[int] = None
    rope_theta: float = 1e6
""",
        "mlx_lm/models/olmoe.py": """
class Model: pass
class ModelArgs(BaseModelArgs):
    num_experts: int
    @classmethod
    def from_dict(cls, params): pass
""",
        "mlx_lm/models/cache.py": "class Cache: pass\n",
    },
    "mistral.rs": {
        "mistralrs-core/src/pipeline/loaders/normal_loaders.rs": """
impl NormalLoaderType {
    pub fn from_causal_lm_name(name: &str) -> Result<Self> {
        match name {
            "MixtralForCausalLM" => Ok(Self::Mixtral),
            "A"
            | "B" => Ok(Self::A),
            other => anyhow::bail!("Unsupported `{other}`"),
        }
    }
}
impl FromStr for NormalLoaderType {
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "mixtral" => Ok(Self::Mixtral),
        }
    }
}
"""
    },
    "transformers": {
        "models/auto/auto_mappings.py": """
CONFIG_MAPPING_NAMES = OrderedDict([("mixtral", "MixtralConfig"), ("bert", "B"), ("openai_privacy_filter", "O")])
""",
        "models/auto/modeling_auto.py": """
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict([("mixtral", "MixtralForCausalLM"), ("bert", "BertLMHeadModel")])
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES = OrderedDict(
    [("mixtral", "MixtralForTokenClassification"), ("openai_privacy_filter", ("OForTokenClassification",))]
)
""",
        "quantizers/auto.py": 'AUTO_QUANTIZATION_CONFIG_MAPPING = {"fp8": F, "awq": A}\n',
        "models/mixtral/modeling_mixtral.py": "class P:\n    _supports_attention_backend = True\n",
        "models/openai_privacy_filter/modeling_openai_privacy_filter.py": "class P:\n    pass\n",
    },
}
READ: dict[str, dict[str, Any]] = {
    "vllm": {
        "names": ["A", "MixtralForCausalLM", "V"],
        "generic": ["FlexOlmoForCausalLM"],
        "removed": {"ArcticForCausalLM": "0.28.0"},
        "methods": ["awq", "fp8"],
    },
    "sglang": {"names": ["A", "B", "MixtralForCausalLM"], "methods": ["fp8", "mxfp4"]},
    "llama.cpp": {"names": {"B": "llama", "MixtralForCausalLM": "llama"}},
    "ik_llama.cpp": {"names": ["glm-dsa", "llama"]},
    "mlx-lm": {
        "names": ["deepseek_v3", "kimi_k2", "kimi_k25", "mixtral", "olmoe"],
        "fp8": ["deepseek_v3", "kimi_k2", "kimi_k25"],
        "needs": {"mixtral": ["hidden_size", "num_experts"]},
        "rope_theta": {"mixtral": 1000000.0},
    },
    "mistral.rs": {"names": ["A", "B", "MixtralForCausalLM"]},
    "transformers": {
        "types": {"mixtral": ["MixtralForCausalLM"], "openai_privacy_filter": ["OForTokenClassification"]},
        "replaceable": ["mixtral"],
        "methods": ["awq", "fp8"],
    },
}


def written(folder: Path, engine: str) -> Path:
    for name, text in SOURCES[engine].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("engine", READERS)
def test_a_source_is_read(engine: str, tmp_path: Path) -> None:
    assert READERS[engine]([written(tmp_path, engine)]) == READ[engine]


@pytest.mark.parametrize("engine", ["vllm", "ik_llama.cpp", "mistral.rs"])
def test_one_file_is_enough(engine: str, tmp_path: Path) -> None:
    first = next(iter(SOURCES[engine]))
    found = READERS[engine]([written(tmp_path, engine) / first])
    assert found | {"methods": READ[engine].get("methods")} == READ[engine] | {"methods": READ[engine].get("methods")}


def test_the_converter_of_one_file(tmp_path: Path) -> None:
    """As llama.cpp had it before its conversion folder."""
    written(tmp_path, "llama.cpp")
    text = "".join((tmp_path / f"conversion/{name}.py").read_text() for name in ("a_vision", "llama"))
    (tmp_path / "convert_hf_to_gguf.py").write_text(text)
    for path in (tmp_path / "conversion").iterdir():
        path.unlink()
    found = READERS["llama.cpp"]([tmp_path])["names"]
    assert found == {"B": "llama", "MixtralForCausalLM": "llama", "NotInTheMap": "llama"}


def test_nothing_is_imported(tmp_path: Path) -> None:
    for engine in READERS:
        for name in SOURCES[engine]:
            if name.endswith(".py") and not name.startswith("vllm/other"):
                path = written(tmp_path / engine, engine) / name
                path.write_text(path.read_text() + "\nraise SystemExit(1)\n")
        READERS[engine]([tmp_path / engine])


def test_the_first_release_that_was_read(tmp_path: Path) -> None:
    """In whatever order; classes are the newest's."""
    old, new = written(tmp_path / "old", "transformers"), written(tmp_path / "new", "transformers")
    auto = new / "models/auto/auto_mappings.py"
    auto.write_text(auto.read_text().replace('("bert"', '("flint", "F"), ("bert"'))
    data: dict[str, Any] = {}
    for folder, version in ((new, "5.10.0"), (old, "4.57.6"), (old, "5.9.1"), (new, "5.21.0")):
        data = refreshed(data, "transformers", [folder], version)
    entry = data["transformers"]
    assert entry["since"] == {"flint": "5.10.0", "mixtral": "4.57.6", "openai_privacy_filter": "4.57.6"}
    assert (entry["version"], entry["oldest"]) == ("5.21.0", "4.57.6")
    assert entry["types"]["flint"] == []


def test_the_file_is_refreshed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "engines.json"
    data.write_text(json.dumps({"vllm": {"version": "1"}, "sglang": {"version": "2"}}))
    source = written(tmp_path / "in", "vllm")
    given = ["--version", "0.33.0", "--dated", "2026-11-01", "--note", "parts", "--file", str(data)]
    assert main(["vllm", str(source), *given]) == 0
    assert "vllm 0.33.0: 3 models" in capsys.readouterr().out
    entry = json.loads(data.read_text())
    assert entry["sglang"] == {"version": "2"}
    assert {key: entry["vllm"][key] for key in ("version", "dated", "note")} == dict(
        zip(("version", "dated", "note"), ("0.33.0", "2026-11-01", "parts"), strict=True)
    )
    assert "read" in entry["vllm"]


@pytest.mark.parametrize("source", ["none", "empty", "broken"])
def test_a_source_without_lists_is_refused(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "engines.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "registry.py").write_text("_A_MODELS = {")
    assert main(["vllm", str(tmp_path / source), "--version", "1", "--file", str(data)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / source) in error
    assert len(error.splitlines()) == 1
    assert not data.exists()
    with pytest.raises(InputError):
        refreshed({}, "vllm", [tmp_path / source], "1")


def test_every_reader_is_described() -> None:
    assert all(reader.__doc__ for reader in READERS.values())
    assert registries.DATA.name in (registries.__doc__ or "")
