"""Read the pruned checkpoint by another road than the one that wrote it, and compare it with its source.

Tensors come through the safetensors library and are compared as torch bytes; what is expected follows from layout and
plan alone. Nothing of pruning is used here. What a refit has computed, or training has changed, stands in no
source: see `computed`.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moekern.architectures import ExpertTensor, Layout, MoeLayer, find_layout
from moekern.checkpoint.folder import CONFIG, INDEX, PLAN_FILE, Checkpoint, open_checkpoint
from moekern.errors import InputError, printable
from moekern.plan.document import MTP_MODES, Mtp, Plan, planned_mtp
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import check_plain, is_merged
from moekern.plan.refit import refit_of
from moekern.verification.computed import Claim, Recompute, claims_of, computed_tensors, layers_refitted
from moekern.verification.config import config_problems
from moekern.verification.constants import Vectors, constant_problems, is_known, replaced_in
from moekern.verification.expert_lists import lists_cut
from moekern.verification.files import file_problems
from moekern.verification.merged import merged_again, routers_again
from moekern.verification.narrow import Channels, kept_channels, narrow_problems, narrow_shape, wide_problems, widened
from moekern.verification.opened import Folder, blocks
from moekern.verification.record import lines_told, record_problems, recorded, recorded_mtp, without_folder
from moekern.verification.recovered import trained_claims, trained_settings
from moekern.verification.settings import modules_of, renumbered

MAX_PROBLEMS, PROBLEM_CAP = 100, 1000  # lines, and characters of one

Progress = Callable[[int, int], None]  # bytes compared, bytes to compare


@dataclass(frozen=True)
class VerifyReport:
    """`problems` is empty when the pruned checkpoint is what the plan says; at most 100 are listed."""

    problems: tuple[str, ...]
    tensors_compared: int
    bytes_compared: int
    left_out: Mapping[str, str] = field(default_factory=dict)  # files of the source that belong to no pruned one -> why
    computed: int = 0  # tensors that a refit has computed; the counts above are of others
    unchecked: int = 0  # of them, those for which the manifest has no checksum that could be taken
    recomputed: int = 0  # of them, those that were computed again to the same bytes
    trained: int = 0  # tensors that training has changed; no other count has them
    constants: int = 0  # tensors that stand for dropped experts; no other count has them
    constants_known: bool = False  # these were compared with what the plan makes them, zeros or of statistics


@dataclass(frozen=True)
class Expected:
    """One tensor of the pruned checkpoint: key of the source, and what was to happen to its experts."""

    source: str
    cut: ExpertTensor | None = None
    keep: tuple[int, ...] = ()
    num_experts: int = 0
    narrow: Channels | None = None  # which channels of its experts were to stay
    wide: tuple[int, int] | None = None  # axis and size: zeros were to follow its own


def verify(
    source: Checkpoint | str | Path,
    plan: Plan,
    pruned: str | Path,
    *,
    mtp: Mtp | None = None,
    recompute: Recompute | None = None,
    full: bool = False,
    vectors: Vectors | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare every byte of `pruned` with `source` under `plan`. Files are mapped, nothing is held.

    Checked: each kept expert's tensors, router rows, biases and tables; untouched tensors; names, shapes and dtypes;
    header metadata; index and its sizes; config.json; side files; that nothing else is there. Files of `pruned` are
    opened once their kind and size are known: a pipe or a device is a problem like others. mtp: as given to prune; None
    takes it from the moekern_plan.json in `pruned`, else from the plan, else "prune". Tensors that the manifest says
    were refitted, and the plan that their layers were, are held against the manifest's checksum instead of the source,
    and must be finite; so are those that moekern_recovery.json says were trained, against its checksum. recompute:
    gives the tensors of a refitted layer once more, name -> bytes (None: those of merged experts are computed here); of
    the first one and another that the plan's digest draws they are compared, with `full` of all, which is refused of a
    plan whose recipe is no merge's where nothing else computes it. vectors: the constants
    of a plan that replaces dropped experts, which are then compared; without, they must be finite, and have the
    manifest's checksum. Raises InputError when `source` or `plan` is at fault, never for what is in `pruned`.
    """
    if mtp not in (None, *MTP_MODES):
        raise InputError(f"--mtp {mtp}: expected one of {', '.join(MTP_MODES)}")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    check_plan(plan, layout, checkpoint, replaced=True)
    folder = Path(pruned)
    if not os.path.isdir(folder):
        return VerifyReport((f"{folder}: no such folder",), 0, 0)
    problems: list[str] = []
    record = recorded(folder, plan, problems)
    mode = mtp or recorded_mtp(record) or planned_mtp(plan)
    step = progress or (lambda done, total: None)
    with ExitStack() as stack:
        old = Folder(checkpoint.folder, stack, [shard.name for shard in checkpoint.shards])
        replaced = replaced_in(checkpoint, layout, plan, record, folder)
        kept = dict(replaced.kept) or kept_experts(old, layout, plan, mode)
        channels = kept_channels(old, layout, plan, kept)
        expected = expected_tensors(old.shards, layout, kept, mode, channels)
        expected = {name: each for name, each in expected.items() if name not in replaced.gone}
        try:
            new = Folder(folder, stack)
        except (OSError, ValueError) as error:
            unread = f"{folder}: not readable: {without_folder(folder, error)}"
            return VerifyReport(_listed([*problems, unread]), 0, 0)
        problems += _other_names(expected.keys() | replaced.constants.keys(), new.shards.keys())
        claims = _claims(folder, plan, layout, expected, problems)
        recompute = _recomputing(recompute, checkpoint, old, layout, plan, full=full)
        copied = [name for name in new.shards if name in expected and name not in claims]
        found, compared = _compare_all(copied, expected, old, new, step)
        problems += found
        there = {name: (claims[name], _described(expected[name], old)) for name in new.shards if name in claims}
        computed = computed_tensors(there, new, plan, recompute, full=full)
        problems += computed.problems
        if there:
            step(compared + computed.nbytes, new.data_bytes)
        problems += constant_problems(replaced.constants, plan, vectors, lines_told(folder), new)
        sources = {name: Expected(constant.source) for name, constant in replaced.constants.items()}
        problems += _metadata_problems(expected | sources, old, new)
        problems += _index_problems(checkpoint, new)
        mtp_keep = {key: kept[key] for key in layout.mtp if key in kept}
        held = {name: list(opened.keys()) for name, opened in new.opened.items()}
        problems += record_problems(record, folder, checkpoint, plan, mode, mtp_keep, held, replaced.record)
    cut = partial(lists_cut, config=checkpoint.config, layout=layout, kept=kept)
    modules = modules_of(layout, iter(old.shards), kept, drop_mtp=mode == "drop")
    told = plan.digest if os.path.lexists(folder / PLAN_FILE) else None
    problems += file_problems(checkpoint, folder, set(new.files), modules, cut, told)
    settings, config = trained_settings(folder, layout, problems), replaced.config(checkpoint.config, layout)
    problems += config_problems(
        config, folder / CONFIG, layout, kept, modules, drop_mtp=mode == "drop", width=plan.width, trained=settings
    )
    trained = sum(claim.layer is None for claim, _ in there.values())
    counts = len(there) - trained, computed.unchecked, computed.recomputed, trained
    stand = len(replaced.constants), is_known(plan, vectors)
    return VerifyReport(_listed(problems), len(copied), compared, checkpoint.contents.left_out, *counts, *stand)


def _recomputing(
    recompute: Recompute | None, checkpoint: Checkpoint, old: Folder, layout: Layout, plan: Plan, *, full: bool
) -> Recompute | None:
    """What gives the tensors of refitted layers once more; merged experts are computed here. Raises InputError where
    `full` asks for what nothing gives."""
    if recompute is not None:
        return recompute
    if is_merged(plan, checkpoint.fingerprint):
        check_plain(checkpoint, layout, plan)
        return partial(_merged, old, layout, plan)
    if full and refit_of(plan) is not None:
        what = "the recipe of provenance.refit is none of what its groups make of this model"
        does = "nothing can be computed again; `refit --verify --full` does that of a refit"
        raise InputError(f"verify: --full: plan: {what}; {does}")
    return None


def _compare_all(
    names: Sequence[str], expected: Mapping[str, Expected], old: Folder, new: Folder, step: Progress
) -> tuple[list[str], int]:
    """Problems of copied tensors, and their bytes."""
    problems: list[str] = []
    compared = 0
    for name in names:
        found, nbytes = _compare(name, expected[name], old, new)
        problems += found
        compared += nbytes
        step(compared, new.data_bytes)
    return problems, compared


def _merged(old: Folder, layout: Layout, plan: Plan, key: str) -> Mapping[str, bytes]:
    """A layer's merged tensors once more, and its routers' rows where they were fitted."""
    return {**merged_again(old, layout.layers[key], plan), **routers_again(old, layout, key, plan)}


def _other_names(wanted: Set[str], there: Set[str]) -> list[str]:
    missing = [f"{name}: missing" for name in sorted(wanted - there)]
    return missing + [f"{name}: should not be there" for name in sorted(there - wanted)]


def _claims(
    folder: Path, plan: Plan, layout: Layout, expected: Mapping[str, Expected], problems: list[str]
) -> dict[str, Claim]:
    """What the folder says of tensors that stand in no source: refitted ones, and trained ones."""
    lines = lines_told(folder)
    layers = layers_refitted(plan, layout, {name: each.source for name, each in expected.items()})
    trained = trained_claims(folder, lines, expected.keys(), layers.keys(), problems)
    return claims_of(lines, plan, layers, trained.keys(), problems) | trained


def _listed(problems: Sequence[str]) -> tuple[str, ...]:
    """The first of them, each a line that can be printed: the folder's names and values are in them."""
    return tuple(printable(problem[:PROBLEM_CAP]) for problem in problems[:MAX_PROBLEMS])


def expected_tensors(
    names: Mapping[str, str],
    layout: Layout,
    kept: Mapping[str, tuple[int, ...]],
    mtp: str,
    channels: Mapping[str, Channels] | None = None,
) -> dict[str, Expected]:
    """New key -> where it comes from, for every key the pruned checkpoint must have."""
    by_name: dict[str, tuple[str, MoeLayer, tuple[int, ...], ExpertTensor]] = {}
    wide: dict[str, tuple[int, int]] = {}
    for key, layer in [*layout.layers.items(), *layout.mtp.items()]:
        for tensor in layer.tensors if key in kept else ():
            by_name[tensor.name] = key, layer, kept[key], tensor
        wide |= widened(layout, layer, channels[key]) if channels and key in channels else {}
    expected = {}
    for name in names:
        if mtp == "drop" and any(name.startswith(prefix) for prefix in layout.mtp_prefixes):
            continue
        if name not in by_name:
            expected[name] = Expected(name, wide=wide.get(name))
            continue
        key, layer, keep, tensor = by_name[name]
        own = (channels or {}).get(key) if tensor.channel_axis is not None else None
        if tensor.action != "drop":
            expected[name] = Expected(name, tensor, keep, layer.num_experts, own)
        else:
            new = renumbered(tensor, keep, layer.num_experts)
            if new is not None:
                cut = None if own is None else tensor
                expected[tensor.template.replace("{}", str(new))] = Expected(name, cut, keep, layer.num_experts, own)
    return expected


def kept_experts(old: Folder, layout: Layout, plan: Plan, mtp: str) -> dict[str, tuple[int, ...]]:
    """Layer key -> original ids. MTP layers without a plan keep the largest router rows by exact sum of squares."""
    kept = {key: tuple(sorted(layer.keep)) for key, layer in plan.layers.items() if key in layout.layers}
    for key, layer in layout.mtp.items() if mtp == "prune" else ():
        if key in plan.layers:
            kept[key] = tuple(sorted(plan.layers[key].keep))
            continue
        quota = max(len(plan.layers[k].keep) for k in layout.layers) // layout.n_group
        energy = [0.0] * layer.num_experts
        for router in (t for t in layer.tensors if t.role == "router" and t.action == "slice"):
            weight = old.tensor(router.name).double().movedim(router.axis, 0)
            for expert, rows in enumerate(weight.split(router.rows)[: layer.num_experts]):
                energy[expert] += math.fsum(float(w) ** 2 for w in rows.flatten().tolist())
        ranked = sorted(range(layer.num_experts), key=lambda e: -energy[e])  # stable: the lowest number wins a tie
        size = layer.num_experts // layout.n_group
        groups = [[e for e in ranked if e // size == g][:quota] for g in range(layout.n_group)]
        kept[key] = tuple(sorted(e for group in groups for e in group))
    return kept


def _described(expected: Expected, old: Folder) -> tuple[str, list[int]]:
    """dtype and shape that a tensor must have."""
    (dtype, shape), cut = old.described(expected.source), expected.cut
    if cut is not None and cut.action == "slice":
        shape[cut.axis] = len(expected.keep) * cut.rows + cut.trailing
    if cut is not None and expected.narrow is not None:
        shape = narrow_shape(shape, cut, expected.narrow)
    if expected.wide is not None:
        shape[expected.wide[0]] = expected.wide[1]
    return dtype, shape


def _compare(name: str, expected: Expected, old: Folder, new: Folder) -> tuple[list[str], int]:
    """Problems of one tensor, and the bytes of it that were compared."""
    (dtype, shape), (new_dtype, new_shape), cut = _described(expected, old), new.described(name), expected.cut
    if new_dtype != dtype:
        return [f"{name}: dtype {new_dtype}, expected {dtype}"], 0
    if new_shape != shape:
        return [f"{name}: shape {new_shape}, expected {shape}"], 0
    if 0 in shape:
        return [], 0
    if cut is not None and expected.narrow is not None and expected.narrow.coded:
        return [f"{name}: experts of a quantised model lost channels, and the manifest does not say it was computed"], 0
    if cut is not None and expected.narrow is not None:
        return narrow_problems(name, expected.source, cut, expected.keep, expected.narrow, old, new)
    if expected.wide is not None:
        return wide_problems(name, expected.source, expected.wide[0], old, new)
    if cut is not None and cut.action != "slice":
        got = new.tensor(name)
        same = torch.equal(remapped(old.tensor(expected.source), expected.keep, expected.num_experts), got)
        return [] if same else [f"{name}: expert numbers differ from those the plan gives"], got.nbytes
    axis = cut.axis if cut else 0
    nbytes = 0
    for what, old_start, new_start, count in _kept_blocks(expected) if cut else blocks(dtype, shape):
        want = old.bytes(expected.source, axis, old_start, old_start + count, cut=cut is not None)
        got = new.bytes(name, axis, new_start, new_start + count, cut=cut is not None)
        nbytes += got.numel()
        if not torch.equal(want, got):
            return [f"{name}: differs from the source's {expected.source}{what}"], nbytes
    return [], nbytes


def _kept_blocks(expected: Expected) -> Iterator[tuple[str, int, int, int]]:
    """(what, first row in the source, first row in the result, rows) of each kept expert, then of trailing rows."""
    cut = expected.cut
    assert cut is not None
    for new, old in enumerate(expected.keep):
        yield f", expert {old}", old * cut.rows, new * cut.rows, cut.rows
    if cut.trailing:
        yield ", last rows", expected.num_experts * cut.rows, len(expected.keep) * cut.rows, cut.trailing


def remapped(table: Tensor, keep: tuple[int, ...], num_experts: int) -> Tensor:
    """Expert ids numbered anew, row by row; a dropped id d becomes rank d * kept // E, or the next that is free."""
    rank = torch.full((num_experts,), -1, dtype=torch.int64)
    rank[list(keep)] = torch.arange(len(keep))
    old = table.long().reshape(-1, table.shape[-1])
    new = rank[old]
    for row in (new < 0).any(1).nonzero().flatten().tolist():
        ids = new[row].tolist()
        for slot, before in enumerate(old[row].tolist()):
            if ids[slot] < 0:
                choice = before * len(keep) // num_experts
                while choice in ids:
                    choice = (choice + 1) % len(keep)
                ids[slot] = choice
        new[row] = torch.tensor(ids)
    return new.reshape(table.shape).to(table.dtype)


def _metadata_problems(expected: Mapping[str, Expected], old: Folder, new: Folder) -> Iterator[str]:
    """Each file's header metadata must be that of the files its tensors came from."""
    for file, opened in new.opened.items():
        sources = {old.shards[expected[key].source] for key in opened.keys() if key in expected}  # noqa: SIM118
        want: dict[str, str] = {}
        for source in sorted(sources):
            want |= old.opened[source].metadata() or {}
        if sources and (opened.metadata() or {}) != want:
            yield f"{file}: header metadata differ from the source's"


def _index_problems(checkpoint: Checkpoint, new: Folder) -> Iterator[str]:
    wanted = checkpoint.index is not None or len(new.files) > 1
    if (new.index is not None) != wanted:
        yield f"{INDEX}: {'missing' if wanted else 'should not be there'}"
    if new.index is None:
        return
    weight_map = new.index["weight_map"]
    for key in sorted(weight_map.keys() | new.shards.keys()):
        if weight_map.get(key) != new.shards.get(key):
            yield f"{INDEX}: {key} in {weight_map.get(key)}, but the files have it in {new.shards.get(key)}"
    metadata, before = (dict((index or {}).get("metadata") or {}) for index in (new.index, checkpoint.index))
    total = metadata.pop("total_size", None)
    if total != new.data_bytes:
        yield f"{INDEX}: total_size {total}, but the files hold {new.data_bytes}"
    before.pop("total_size", None)
    if "total_parameters" in before:
        elements = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
        if before.pop("total_parameters") == elements:
            before["total_parameters"] = sum(math.prod(new.described(key)[1]) for key in new.shards)
    others = ({k: v for k, v in (index or {}).items() if k != "weight_map"} for index in (checkpoint.index, new.index))
    want, got = ({**other, "metadata": held} for other, held in zip(others, (before, metadata), strict=True))
    for key in sorted(want.keys() | got.keys()):
        if json.dumps(want.get(key), sort_keys=True) != json.dumps(got.get(key), sort_keys=True):
            yield f"{INDEX}: {key} differs from what the source and the files give"
