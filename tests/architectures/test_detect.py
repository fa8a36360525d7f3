"""Every family of the table: as transformers writes it, and as it is found on the hub."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from moekern.architectures import FAMILIES, Family, Layout, family_named
from moekern.architectures.patterns import SCHEMES
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError
from tests.helpers import families
from tests.helpers.hub_names import HUB_FILES, experts_of, forms
from tests.helpers.layouts import layout_of, moe_keys, write_checkpoint

MORE_EXPERTS = 12


def test_every_name_stands_for_one_family() -> None:
    names = Counter(name for family in FAMILIES for name in (family.name, *family.also))
    assert not [name for name, count in names.items() if count > 1]
    assert all(family_named(family.name) is family for family in FAMILIES)
    assert family_named("deepseek_v3_text") is family_named("kimi_k2")
    assert family_named("bert") is None
    assert {family.experts for family in FAMILIES} <= set(SCHEMES)


def with_more_experts(name: str, folder: Path, layout: Layout, target: Path) -> Checkpoint:
    """The same family and sizes with MORE_EXPERTS experts."""
    text = json.loads((folder / "config.json").read_text())
    for *holders, key in layout.count_paths:
        section = text
        for holder in holders:
            section = section[holder]
        section[key] = MORE_EXPERTS
    target.mkdir()
    (target / "config.json").write_text(json.dumps(text))
    families.model_class(name)(AutoConfig.from_pretrained(target)).save_pretrained(target)
    return open_checkpoint(target)


def moe_layers(name: str) -> list[str]:
    """Numbers of the decoder layers that have a module of experts, as transformers builds them."""
    with torch.device("meta"):
        model = families.model_class(name)(families.FAMILIES[name]())
    found = {
        int(match[1])
        for path, module in model.named_modules()
        if re.search("Experts$|ExpertGLU$", type(module).__name__) and "vision" not in path
        if (match := re.search(r"\.(?:layers|blocks)\.(\d+)\.", path))
    }
    return [str(i) for i in sorted(found)]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family_that_transformers_builds(name: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    family = family_named(name.split("-")[0])
    assert family is not None
    if family.refused:
        with pytest.raises(InputError, match=re.escape(family.refused)):
            layout_of(family_checkpoint(name))
        return
    checkpoint, layout = layout_of(family_checkpoint(name))
    config = checkpoint.config
    assert layout.family.name == family.name
    assert layout.family.transformers
    assert list(layout.layers) == moe_layers(name)
    assert layout.num_experts == families.EXPERTS
    assert all(layer.num_experts == families.EXPERTS for layer in layout.layers.values())
    assert layout.router.top_k == (1 if name == "zaya" else families.TOP_K)
    grouped = family.group_top and (family.group_if is None or json.dumps(family.group_if[1]) in json.dumps(config))
    assert (layout.router.n_group, layout.router.topk_group) == ((2, 1) if grouped else (1, 1))
    assert not layout.mtp
    assert not layout.mtp_prefixes
    assert layout.count_paths
    assert all(layer.prefix.endswith(f".{key}") for key, layer in layout.layers.items())

    tensors = [tensor for layer in layout.layers.values() for tensor in layer.tensors]
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert all(tensor.renamed(tensor.expert or 0) == tensor.name for tensor in tensors)
    for layer in layout.layers.values():
        roles = Counter(tensor.role for tensor in layer.tensors)
        assert roles["router"] == (2 if name == "jetmoe" else 1)
        assert roles["expert"] >= 2
        hashed = name == "deepseek_v4" and layer.key == "0"
        assert roles["table"] == hashed
        assert roles["bias"] == (bool(layout.family.bias) and not hashed)

    more = with_more_experts(name, family_checkpoint(name), layout, tmp_path / "more")
    dropped = {tensor.template: [] for tensor in tensors if tensor.action == "drop"}
    for tensor in tensors:
        if tensor.action == "drop":
            dropped[tensor.template].append(tensor.expert)
    added = {
        template.replace("{}", str(len(experts) + i))
        for template, experts in dropped.items()
        for i in range(MORE_EXPERTS - families.EXPERTS)
    }
    assert set(more.tensors) - set(checkpoint.tensors) == added
    resized = {name for name, entry in checkpoint.tensors.items() if more.tensors[name].shape != entry.shape}
    sliced = [tensor for tensor in tensors if tensor.action == "slice"]
    assert resized == {tensor.name for tensor in sliced}
    for tensor in sliced:
        for found, experts in ((checkpoint, families.EXPERTS), (more, MORE_EXPERTS)):
            assert found.tensors[tensor.name].shape[tensor.axis] == experts * tensor.rows + tensor.trailing
    assert layout_of(more.folder)[1].num_experts == MORE_EXPERTS


@pytest.mark.parametrize(
    ("row", "suffixes"),
    [
        pytest.param(row, suffixes, id=f"{row[0]}-{quantised}")
        for row in HUB_FILES
        for quantised, suffixes in forms(row[6]).items()
    ],
)
def test_family_known_from_its_hub_files(row: list[str], suffixes: tuple[str, ...], tmp_path: Path) -> None:
    name, model_type, section, count, top_k, prefix, experts, router, bias = row
    keys = {"lm_head.weight": ("BF16", [96, 32])}
    for layer in ("1", "3"):
        start = prefix.replace("#", layer, 1)
        keys |= moe_keys(start, experts, router, bias, suffixes=suffixes)
        keys[f"{start.split(layer)[0]}{layer}.mlp.shared_experts.gate_proj.weight"] = ("BF16", [16, 32])
    config: dict[str, Any] = {count: 8, top_k: 2}
    for holder in reversed(section.split(".") if section else ()):
        config = {holder: config}
    config["model_type"] = name if model_type == "=" else model_type
    checkpoint, layout = layout_of(write_checkpoint(tmp_path, config, keys, shards=3))

    assert layout.family.name == name
    stack = f"{layout.family.stacks['encoder' not in prefix]}." if layout.family.stacks else ""
    assert list(layout.layers) == [f"{stack}1", f"{stack}3"]
    assert layout.count_paths == ((*section.split("."), count) if section else (count,),)
    assert layout.num_experts == 8
    assert layout.router.top_k == (1 if name == "switch_transformers" else 2)
    found = Counter((t.role, t.action) for layer in layout.layers.values() for t in layer.tensors)
    number = 2 * (experts.count("|") + 1) * len(suffixes)
    expected = {("expert", "drop"): number * 8} if "#" in experts else {("expert", "slice"): number}
    assert found == expected | {("router", "slice"): 2} | ({("bias", "slice"): 2} if bias else {})
    assert sum(
        checkpoint.tensors[t.name].nbytes
        for layer in [*layout.layers.values(), *layout.mtp.values()]
        for t in layer.of_role("expert")
    ) == number * 8 * (16 * 32 * 2)


@pytest.mark.parametrize("row", [row for row in FAMILIES if not row.refused], ids=lambda row: row.name)
def test_quantised_experts_of_every_family(row: Family, tmp_path: Path) -> None:
    """With the row's own names, which other tests hold against models: each companion is found with its expert."""
    experts = experts_of(row)
    start = f"model.{'decoder.' if row.stacks else ''}layers.1.{row.block.split('|')[-1]}.".replace("..", ".")
    first = {field: getattr(row, field).split("|")[0] for field in ("router", "bias", "count", "top_k")}
    bias = "" if first["bias"].startswith("/") else first["bias"]
    for form, suffixes in forms(experts).items():
        keys = moe_keys(start, experts, first["router"], bias, suffixes=suffixes)
        config: dict[str, Any] = {"model_type": row.name, "num_hidden_layers": 2, first["count"]: 8, first["top_k"]: 2}
        if isinstance(row.trailing, int) and row.trailing:
            keys[start + first["router"]] = ("BF16", [8 + row.trailing, 32])
        _, layout = layout_of(write_checkpoint(tmp_path / form, config, keys))
        found = [t for t in layout.layers["decoder.1" if row.stacks else "1"].tensors if t.role == "expert"]
        assert layout.family.name == row.name
        assert {t.name for t in found} == {key for key in keys if key not in (start + first["router"], start + bias)}


def test_families_of_remote_code_are_all_here() -> None:
    refused = {family.name for family in FAMILIES if family.refused}
    assert {family.name for family in FAMILIES if not family.transformers} <= {row[0] for row in HUB_FILES} | refused
