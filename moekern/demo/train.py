"""Trains the small model that ships with moekern: ``python -m moekern.demo.train --out DIR``.

It is a Qwen3-MoE of 2.8 million parameters that learns six kinds of text on one CPU core in 30 to 40 minutes.
Written to DIR are ``model/`` (bf16 safetensors in shards, tokenizer, ``training.json``) and ``text/`` (the held-out
text of each domain). The outcome depends on the seed, the number of steps and the versions of the packages alone.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekern.demo import corpus
from moekern.errors import InputError

DEFAULT_STEPS = 3600
VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARS = 400_000
ROWS_PER_DOMAIN = 2
CONTEXT = 256
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 1e-4
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
BALANCE_COEFFICIENT = 0.003
REPORT_EVERY = 50
SHARD_SIZE = "1900KB"


def model_config() -> Qwen3MoeConfig:
    """The architecture: four layers of sixteen experts, two of them active for a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_tokenizer(domains: dict[str, corpus.Domain], generator: torch.Generator) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from an equal number of characters of each domain."""
    samples = []
    for domain in domains.values():
        room = TOKENIZER_CHARS
        for index in torch.randperm(len(domain.train), generator=generator).tolist():
            samples.append(domain.train[index][:room])
            room -= len(samples[-1])
            if room <= 0:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one run of token ids, each one started by the end-of-text token."""
    stream: list[int] = []
    for ids in tokenizer(documents, verbose=False)["input_ids"]:
        stream.append(tokenizer.bos_token_id)
        stream.extend(ids)
    return torch.tensor(stream)


def batch(streams: list[Tensor], generator: torch.Generator) -> Tensor:
    """Windows of `CONTEXT` + 1 tokens from random places, the same number from each domain."""
    rows: list[Tensor] = []
    for stream in streams:
        starts = torch.randint(len(stream) - CONTEXT, (ROWS_PER_DOMAIN,), generator=generator)
        rows.extend(stream[start : start + CONTEXT + 1] for start in starts.tolist())
    return torch.stack(rows)


def balance_loss(router_logits: tuple[Tensor, ...], experts_per_token: int) -> Tensor:
    """The Switch Transformer's load-balancing loss, a mean over layers; 1 where every expert is used alike.

    Transformers' own version pools the layers before it counts, so that an expert may die in one layer if its namesakes
    in other layers are busy. Here each layer is balanced for itself.
    """
    losses = []
    for logits in router_logits:
        gates = logits.softmax(dim=-1)
        chosen = gates.topk(experts_per_token, dim=-1).indices
        load = functional.one_hot(chosen, gates.shape[-1]).float().mean(dim=(0, 1))
        losses.append(gates.shape[-1] * (load * gates.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the final rate."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of `logits` for all tokens of `rows` but the first."""
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def make_optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the gains of the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [tensor for tensor in parameters if tensor.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [tensor for tensor in parameters if tensor.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def train_model(streams: list[Tensor], steps: int, generator: torch.Generator) -> Qwen3MoeForCausalLM:
    """Train from scratch in fp32 and print a line of progress now and then."""
    model = AutoModelForCausalLM.from_config(model_config(), dtype=torch.float32, experts_implementation="grouped_mm")
    optimizer = make_optimizer(model)
    active = model.config.num_experts_per_tok
    print(f"training {sum(tensor.numel() for tensor in model.parameters()):,} parameters for {steps} steps", flush=True)
    model.train()
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        rows = batch(streams, generator)
        output = model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
        loss = next_token_loss(output.logits, rows)
        balance = balance_loss(output.router_logits, active)
        (loss + BALANCE_COEFFICIENT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            speed = (step + 1) * rows[:, 1:].numel() / (time.monotonic() - started)
            mean = running / REPORT_EVERY
            print(f"step {step + 1:5d}  loss {mean:.3f}  balance {balance:.3f}  {speed:,.0f} tokens/s", flush=True)
            running = 0.0
    return model


@torch.inference_mode()
def held_out_loss(model: Qwen3MoeForCausalLM, stream: Tensor) -> float:
    """Nats per token over consecutive windows of `CONTEXT` tokens; the last, shorter piece is left out."""
    rows = stream.unfold(0, CONTEXT + 1, CONTEXT)
    losses = [next_token_loss(model(input_ids=chunk[:, :-1], use_cache=False).logits, chunk) for chunk in rows.split(8)]
    weights = torch.tensor([float(len(chunk)) for chunk in rows.split(8)])
    return float((torch.stack(losses) * weights).sum() / weights.sum())


def save_text(domains: dict[str, corpus.Domain], out: Path) -> None:
    """Write the held-out text of each domain to `out/<domain>/calibration.txt` and `evaluation.txt`."""
    for name, domain in domains.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, documents in (("calibration", domain.calibration), ("evaluation", domain.evaluation)):
            (folder / f"{split}.txt").write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model, rounded to bf16, and its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(out)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m moekern.demo.train", description="Train moekern's own model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model/ and text/ to")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    return parser.parse_args()


def run(out: Path, steps: int, seed: int) -> None:
    """Fetch the text, train, save, and measure what was saved on text that was held out."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory(prefix="moekern-text-") as folder:
        print(f"fetching {len(corpus.PACKAGES)} Debian packages", flush=True)
        versions = corpus.fetch(Path(folder))
        domains = corpus.load(Path(folder))
    save_text(domains, out / "text")
    tokenizer = train_tokenizer(domains, generator)
    streams = []
    for name, domain in domains.items():
        streams.append(token_stream(tokenizer, domain.train))
        print(f"{name}: {len(streams[-1]):,} tokens of {len(domain.train)} documents to train on", flush=True)

    started = time.monotonic()
    model = train_model(streams, steps, generator)
    minutes = (time.monotonic() - started) / 60
    save_model(model, tokenizer, out / "model")

    saved = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    losses = {}
    for name, domain in domains.items():
        losses[name] = round(held_out_loss(saved, token_stream(tokenizer, domain.evaluation)), 4)
        print(f"{name}: held-out loss {losses[name]:.3f} nats per token", flush=True)
    record = {
        "steps": steps,
        "seed": seed,
        "training_tokens": steps * len(streams) * ROWS_PER_DOMAIN * CONTEXT,
        "training_minutes": round(minutes, 1),
        "packages": versions,
        "held_out_loss": losses,
    }
    (out / "model" / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Command-line entry point."""
    options = arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        run(options.out, options.steps, options.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
