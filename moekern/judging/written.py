"""Prompts continued by a model and its variants, all in memory, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moekern.architectures import find_layout
from moekern.checkpoint.folder import CONFIG, Checkpoint, open_checkpoint
from moekern.checkpoint.strict_json import read_json
from moekern.data.batches import TokenData
from moekern.data.text import check_data, config_number
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError, check_type, first_line, is_out_of_memory, out_of_memory, raised_here
from moekern.evaluation.evaluate import with_constants
from moekern.evaluation.losses import ORIGINAL
from moekern.evaluation.under_plans import all_pruned, check_plans
from moekern.judging.decoding import Decoding
from moekern.judging.drafts import Drafts
from moekern.judging.figures import Continuation, Written
from moekern.judging.live import check_steering, constants_applied, steering_applied
from moekern.model.compute import Compute
from moekern.model.journal import Resume, opened
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.state_folder import removed
from moekern.plan.constants import Live
from moekern.plan.document import Plan
from moekern.plan.guards import Experts
from moekern.recovery.loaded import all_staying
from moekern.version import versions

GENERATION = "generation_config.json"
STATE, WRITING = "moekern-continue-", "writing"  # the folder of a run that is not done, with a digest; its stage
Applied = Callable[[], AbstractContextManager[Any]]  # of a variant


@dataclass(frozen=True)
class Steering:
    """Experts whose router logits get `strength`, or that are never chosen where it is minus infinity."""

    experts: Experts
    strength: float


def continuations(
    source: str | Path | Checkpoint,
    prompts: TokenData,
    variants: Mapping[str, Plan | Steering],
    decodings: Sequence[Decoding],
    compute: Compute = Compute(),
    *,
    new_tokens: int = 256,
    seed: int = 0,
    statistics: str | Path | None = None,
    resume: Resume | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> dict[str, Written]:
    """Decoding -> "original" or variant -> what it writes behind each prompt, in the order of the batches.

    Prompts of one length are continued together, and nothing is padded before them. Tokens are drawn with the same
    seed for all variants, a seed of its own for each batch. Logits differ by rounding with the batches and the number
    of threads, and what is written may. With `resume` the same call goes on at the batch where it was stopped. All
    layers must fit into memory, and one process does it. Raises InputError where they do not, for a variant that does
    not fit the model, and for numbers that are not finite.
    """
    check_type("prompts", prompts, TokenData)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    plans = {name: variant for name, variant in variants.items() if isinstance(variant, Plan)}
    checkpoint, constants, made_of = with_constants(checkpoint, plans, statistics)
    if ORIGINAL in constants and variants:
        raise InputError(f"{checkpoint.folder}: its dropped experts are constants: it is continued alone, not steered")
    check_data(prompts, checkpoint)
    layout = find_layout(checkpoint)
    check_variants(checkpoint, variants)
    prompts = fitting(checkpoint, prompts, new_tokens, tell)
    compute = settled(compute, checkpoint, layout)
    what = "continuations are written token by token"
    if compute.team.size > 1:
        raise InputError(f"--continue: {what}, which one process does: start it without torchrun")
    ends = end_tokens(checkpoint, compute.trust_remote_code)
    if not ends:
        tell(f"{checkpoint.folder}: names no end token (eos_token_id): no continuation ends before {new_tokens} tokens")
    key = made_of | {
        "model": checkpoint.fingerprint,
        "config.json": checkpoint.config_sha256,
        "prompts": text_key(prompts),
        "models": [(name, _told(variant)) for name, variant in variants.items()],
        "--decode": [asdict(decoding) for decoding in decodings],
        "--new-tokens": new_tokens,
        "--seed": seed,
        "end tokens": ends,
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    resume = None if resume is None else resume.keyed(STATE, key)
    with opened(resume, key, (WRITING,)) as journal, open_layerwise(checkpoint, layout, compute) as opened_model:
        layerwise = all_staying(opened_model, what)
        for _ in layerwise.visit(range(len(layerwise.layers))):
            pass
        stage = None if journal is None else journal.stage(WRITING)
        drafts = Drafts(stage, len(prompts.batches) * (1 + len(variants)) * len(decodings), progress)
        for decoding in decodings:
            for name, applied in _applied(layerwise, variants, constants):
                writer, rows = Writer(layerwise, decoding, ends, new_tokens, name), drafts.of(decoding.name, name)
                with applied():
                    for number, batch in list(enumerate(prompts.batches))[len(rows) :]:
                        written = writer.written(batch.input_ids, seed + number)
                        theirs = written if name == ORIGINAL else drafts.of(decoding.name, ORIGINAL)[number]
                        drafts.add(rows, writer.held_against(batch.input_ids, written, theirs))
    if journal is not None:
        removed(journal.folder)
    return drafts.whole()


def _told(variant: Plan | Steering) -> Any:
    """What decides a variant, as JSON."""
    return variant.digest if isinstance(variant, Plan) else [variant.experts, str(variant.strength)]


def check_variants(checkpoint: Checkpoint, variants: Mapping[str, Plan | Steering]) -> None:
    """Raise InputError for one that does not fit the model."""
    layout = find_layout(checkpoint)
    check_plans({n: each for n, each in variants.items() if isinstance(each, Plan)}, layout, checkpoint, replaced=True)
    for name, variant in variants.items():
        if isinstance(variant, Steering):
            check_steering(layout, variant.experts, variant.strength, name)


def fitting(
    checkpoint: Checkpoint, prompts: TokenData, new_tokens: int, tell: Callable[[str], None] = lambda line: None
) -> TokenData:
    """The prompts that are no longer, with what follows them, than the model was made for; how many are left out is
    told. Raises InputError where none is left."""
    most = config_number(checkpoint, "max_position_embeddings")
    if most is None:
        return prompts
    kept = tuple(batch for batch in prompts.batches if batch.input_ids.shape[1] + new_tokens <= most)
    lost = sum(len(batch.input_ids) for batch in prompts.batches) - sum(len(batch.input_ids) for batch in kept)
    why = f"with {new_tokens} new tokens longer than the {most} positions that the model was made for"
    if not kept:
        raise InputError(f"--new-tokens {new_tokens}: all prompts are {why}; give fewer, or shorter prompts")
    if lost:
        tell(f"left out: {lost} prompts, {why} (max_position_embeddings)")
    return replace(prompts, batches=kept)


def end_tokens(checkpoint: Checkpoint, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The ids with which text ends: those of generation_config.json, else of config.json, and the tokenizer's."""
    path, found = checkpoint.folder / GENERATION, dict[str, Any]()
    if path.is_file():
        found = read_json(path)
    given = found.get("eos_token_id")
    if given is None:
        nested = checkpoint.config.get("text_config")
        given = checkpoint.config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
    ids = list(given) if isinstance(given, list) else [given]
    tokenizer = Tokenizer(checkpoint.folder, trust_remote_code)
    with closing(tokenizer), suppress(InputError):  # prompts may be ids, of a model without one
        ids.append(tokenizer.get().eos_token_id)
    size = config_number(checkpoint, "vocab_size")
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and i >= 0 and (size is None or i < size)))


def _applied(
    layerwise: LayerwiseModel, variants: Mapping[str, Plan | Steering], constants: Mapping[str, Live]
) -> Iterator[tuple[str, Applied]]:
    """The original first. constants: of it, or of a plan, by name: what experts return that are constants."""
    for name, variant in {ORIGINAL: None, **variants}.items():
        if name in constants:
            yield name, partial(constants_applied, layerwise.loader, layerwise.layout, constants[name])
        elif variant is None:
            yield name, nullcontext
        elif isinstance(variant, Plan):
            yield name, partial(all_pruned, layerwise, variant)
        else:
            args = layerwise.loader, layerwise.layout, variant.experts, variant.strength
            yield name, partial(steering_applied, *args)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Stops at logits that are NaN or infinite."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores.amax(-1) < torch.inf).all()):  # NaN is not, either
            raise InputError(
                f"{self.where}: logits are not finite; `moekern evaluate --data` says in which layer first"
            )
        return scores


@dataclass(frozen=True)
class Writer:
    """Continues prompts with a model in memory, as it is at the moment."""

    layerwise: LayerwiseModel
    decoding: Decoding
    ends: tuple[int, ...]
    new_tokens: int
    name: str  # of the variant

    def written(self, ids: Tensor, seed: int) -> list[Continuation]:
        """Behind each of the prompts [B, S]."""
        decoding, model = self.decoding, self.layerwise.model  # type: Decoding, Any
        if not model.can_generate():
            raise InputError(f"{self.layerwise.checkpoint.folder / CONFIG}: {type(model).__name__} continues no text")
        own: dict[str, Any] = {"do_sample": not decoding.greedy}
        if not decoding.greedy:  # top_k has another default than none
            own |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
            own |= {"min_p": decoding.min_p or None}
        settings = GenerationConfig(
            **own,
            repetition_penalty=decoding.repetition,
            max_new_tokens=self.new_tokens,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.ends[0] if self.ends else 0,
            use_cache=True,
        )
        place = self.layerwise.device
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[place] if place.type == "cuda" else []))
            torch.manual_seed(seed)
            out = self._run(
                model.generate,
                ids,
                attention_mask=torch.ones_like(ids, device=place),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Finite(self.name)]),
            )
        return [self._cut(row) for row in out[:, ids.shape[1] :].tolist()]

    def _cut(self, row: Sequence[int]) -> Continuation:
        end = next((n for n, token in enumerate(row) if token in self.ends), None)
        return Continuation(tuple(row[:end]), end is not None)

    def held_against(
        self, ids: Tensor, written: Sequence[Continuation], original: Sequence[Continuation]
    ) -> list[Continuation]:
        """The same with what is told by the original's continuations of the same prompts."""
        found = []
        for prompt, mine, theirs in zip(ids, written, original, strict=True):
            if theirs.ended:
                mine = replace(mine, end_probability=self._end_probability([*prompt.tolist(), *theirs.ids]))
            if self.decoding.greedy and mine is not theirs and self.name != ORIGINAL:
                mine = replace(mine, agreed=_agreed(mine, theirs), identical=_marked(mine) == _marked(theirs))
            found.append(mine)
        return found

    def _end_probability(self, ids: Sequence[int]) -> float:
        with torch.no_grad():
            logits = self._run(self.layerwise.model, torch.tensor([ids]), use_cache=False).logits[0, -1]
        return float(logits.float().softmax(-1)[list(self.ends)].sum())

    def _run(self, function: Callable[..., Any], ids: Tensor, **more: Any) -> Any:
        """Raises InputError for what the model's own code raises."""
        B, S = ids.shape
        try:
            return function(input_ids=ids.to(self.layerwise.device), **more)
        except Exception as error:
            if is_out_of_memory(error):
                what = f"continuing {B} prompts of {S} tokens by {self.new_tokens}"
                raise out_of_memory(what, error, "fewer at a time take less (--batch-size)") from error
            if raised_here(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            where = self.layerwise.checkpoint.folder / CONFIG
            raise InputError(f"{where}: its model cannot continue text: {reason}") from error


def _marked(row: Continuation) -> tuple[int, ...]:
    """With a number in the place of the end."""
    return (*row.ids, -1) if row.ended else row.ids


def _agreed(mine: Continuation, theirs: Continuation) -> int:
    pairs = zip(_marked(mine), _marked(theirs), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(_marked(mine)), len(_marked(theirs))))
