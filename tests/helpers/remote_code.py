"""Tiny checkpoints whose model's code lies beside the weights, with blocks as such code has them: experts in a list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

EXPERTS, TOP_K, HIDDEN, VOCAB = 6, 2, 32, 96

# How a block calls its experts -> name of the block, of an expert's matrices, and the model_type of its config.
STYLES: Mapping[str, tuple[str, str, str]] = {
    "sorted": ("mlp", "gate_proj up_proj down_proj", "tiny_sorted"),
    "in_place": ("mlp", "gate_proj up_proj down_proj", "tiny_in_place"),
    "masks": ("block_sparse_moe", "w1 w3 w2", "tiny_masks"),
    "latent": ("block_sparse_moe", "w1 w3 w2", "kimi_k3"),
}

CONFIGURATION = """
from pathlib import Path

from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, hidden_size=32, num_hidden_layers=3, num_experts=6, num_experts_per_tok=2, **rest):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        super().__init__(**rest)


Path("{marker}").touch()
"""

MODELING = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyConfig

STYLE, BLOCK, GATE, UP, DOWN = "{style}", "{block}", "{gate}", "{up}", "{down}"


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * F.normalize(x.float(), dim=-1).to(x.dtype) * x.shape[-1] ** 0.5


class Expert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        setattr(self, GATE, nn.Linear(hidden, inner, bias=False))
        setattr(self, UP, nn.Linear(hidden, inner, bias=False))
        setattr(self, DOWN, nn.Linear(inner, hidden, bias=False))

    def forward(self, x):
        return getattr(self, DOWN)(F.silu(getattr(self, GATE)(x)) * getattr(self, UP)(x))


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if STYLE != "in_place":
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x):
        logits = F.linear(x.reshape(-1, x.shape[-1]).float(), self.weight.float(), None)
        if STYLE == "in_place":
            weights, ids = torch.topk(logits.softmax(-1), k=self.top_k, dim=-1, sorted=False)
            return ids, weights, None
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.e_score_correction_bias, k=self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        inside = hidden // 2 if STYLE == "latent" else hidden
        self.experts = nn.ModuleList([Expert(inside, 24) for _ in range(config.num_experts)])
        self.gate = nn.Linear(hidden, config.num_experts, bias=False) if STYLE == "masks" else Gate(config)
        self.scores = nn.Identity()
        if STYLE != "masks":
            self.shared_experts = Expert(hidden, 24)
        if STYLE == "latent":
            self.routed_expert_down_proj = nn.Linear(hidden, inside, bias=False)
            self.routed_expert_norm = Norm(inside)
            self.routed_expert_up_proj = nn.Linear(inside, hidden, bias=False)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        flat = hidden_states.view(-1, shape[-1])
        if STYLE == "masks":
            return self.masks(flat).view(shape), None
        if STYLE == "in_place":
            ids, weights, _ = self.gate(hidden_states)
            routed = self.in_place(flat, ids.view(-1), weights.view(-1, 1))
        else:
            ids, weights = self.gate(hidden_states)
            rows = self.routed_expert_down_proj(flat) if STYLE == "latent" else flat
            routed = self.sorted(rows, ids, weights)
        if STYLE == "latent":
            routed = self.routed_expert_up_proj(self.routed_expert_norm(routed))
        return routed.view(shape) + self.shared_experts(hidden_states)

    def sorted(self, x, ids, weights):
        counts = ids.new_zeros((len(ids), len(self.experts))).scatter_(1, ids, 1).sum(0).tolist()
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for expert, count in zip(self.experts, counts):
            if count:
                outputs.append(expert(rows[start : start + count]))
                start += count
        out = torch.cat(outputs)
        back = torch.empty_like(out)
        back[order] = out
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1).type(x.dtype)

    def in_place(self, x, ids, weights):
        total, order, start = torch.zeros_like(x), ids.argsort(), 0
        for expert, end in zip(self.experts, ids.bincount(minlength=len(self.experts)).cumsum(0).tolist()):
            if start == end:
                continue
            tokens = order[start:end] // self.top_k
            out = expert(x[tokens])
            out.mul_(weights[order[start:end]].to(out.dtype))
            total.scatter_reduce_(0, tokens.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
            start = end
        return total

    def masks(self, x):
        scores = self.scores(F.softmax(self.gate(x), dim=1, dtype=torch.float))
        weights, ids = torch.topk(scores, self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        total = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            rows = x[None, token].reshape(-1, x.shape[-1])
            total.index_add_(0, token, (expert(rows) * weights[token, slot, None]).to(x.dtype))
        return total


class Layer(nn.Module):
    def __init__(self, config, dense):
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden), Norm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.block = "mlp" if dense else BLOCK
        setattr(self, self.block, Expert(hidden, 24) if dense else Block(config))

    def forward(self, hidden_states, attention_mask=None, **rest):
        q, k, v = self.qkv(self.input_layernorm(hidden_states)).chunk(3, dim=-1)
        hidden_states = hidden_states + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        out = getattr(self, self.block)(self.post_attention_layernorm(hidden_states))
        return (hidden_states + (out[0] if isinstance(out, tuple) else out),)


class Model(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, dense=i == 0) for i in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return self.norm(hidden)


class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, use_cache=None, **rest):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))
"""


def write(folder: Path, style: str, *, change: tuple[str, str] = ("", ""), layers: int = 3) -> Path:
    """A checkpoint with code of its own and seeded random weights; `change` is made in its modeling file."""
    block, names, model_type = STYLES[style]
    gate, up, down = names.split()
    folder.mkdir(parents=True)
    words = {"style": style, "block": block, "gate": gate, "up": up, "down": down, "model_type": model_type}
    words["marker"] = str(marker(folder))
    for name, text in (("configuration_tiny.py", CONFIGURATION), ("modeling_tiny.py", MODELING)):
        for word, value in words.items():
            text = text.replace(f'"{{{word}}}"', f'"{value}"')
        assert name != "modeling_tiny.py" or change[0] in text
        (folder / name).write_text(text.replace(*change) if name == "modeling_tiny.py" and change[0] else text)
    config = {
        "model_type": model_type, "architectures": ["TinyForCausalLM"], "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": layers,
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(_config(folder), trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        value.copy_((1 if "norm" in name else 0) + 0.3 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=40_000)
    (folder / "config.json").write_text(json.dumps(config))
    marker(folder).unlink()
    return folder


def marker(folder: Path) -> Path:
    """A file that is there when code of the checkpoint has run."""
    return folder.with_name(f"{folder.name}.was_run")


def load(folder: Path) -> PreTrainedModel:
    """The whole model in memory, as transformers loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=True)
