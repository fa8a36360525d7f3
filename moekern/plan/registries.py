"""Refresh `engines.json`, the lists of models that engines load, from their sources:

    python -m moekern.plan.registries ENGINE SOURCE [SOURCE ...] --version VERSION [--dated YYYY-MM-DD]

SOURCE is the root of a checkout, the folder of an unpacked wheel, or the files themselves that `ENGINE`'s reader names.
Sources are parsed, never imported. transformers is read once for each release, in any order: a model's first release is
the earliest that was read.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from moekern.architectures.table import BY_NAME
from moekern.errors import InputError
from moekern.plan.engines import DATA, release

Entry = dict[str, Any]
AUTO_MODELS = re.compile(r"MODEL_FOR_(CAUSAL_LM|IMAGE_TEXT_TO_TEXT|MULTIMODAL_LM|SEQ_TO_SEQ_CAUSAL_LM)_MAPPING_NAMES")
AUTO_OTHERS = re.compile("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES")  # for families that have no other model
MATCH_ARM = re.compile(r'((?:"\w+"\s*\|?\s*)+)=>\s*Ok\(Self::')
ARCH_NAME = re.compile(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"\s*\}')


def read_transformers(sources: Sequence[Path]) -> Entry:
    """The release's model types (`types`: model type -> class names) as far as the table of families has them, those
    whose attention can be replaced (`replaceable`), which is what other engines' transformers back ends need, and
    `methods`, the quantisation methods of quantizers/auto.py."""
    known = _assigned(_files(sources, "auto_mappings.py", "configuration_auto.py"), re.compile("CONFIG_MAPPING_NAMES"))
    rows = {name for name, row in BY_NAME.items() if row.transformers}
    classes: dict[str, list[str]] = {name: [] for table in known for name, _ in _pairs(table) if name in rows}
    for tables in (AUTO_MODELS, AUTO_OTHERS):
        without = {name for name, found in classes.items() if not found}
        for table in _assigned(_files(sources, "modeling_auto.py"), tables):
            for name, value in _pairs(table):
                names = ast.literal_eval(value) if name in without else ()
                classes.get(name, []).extend([names] if isinstance(names, str) else names)
    flag = re.compile(r"^\s+_supports_attention_backend = True$", re.MULTILINE)
    able = {p.parent.name for p in _files(sources, "modeling_*.py") if flag.search(p.read_text(encoding="utf-8"))}
    types = {name: sorted(set(found)) for name, found in sorted(classes.items())}
    quantizers = _assigned(_files(sources, "quantizers/auto.py"), re.compile("AUTO_QUANTIZATION_CONFIG_MAPPING"))
    methods = {name for table in quantizers for name, _ in _pairs(table)}
    return {"types": types, "replaceable": sorted(able & set(types)), "methods": sorted(methods)}


def read_vllm(sources: Sequence[Path]) -> Entry:
    """`names`: classes with code of vLLM's own; `generic`: those that it lists for its transformers back end;
    `removed`: class -> the last release that had it; `methods`: quantisation methods. From registry.py in
    vllm/model_executor/models, and layers/quantization/__init__.py."""
    wanted = re.compile(r"_(?!SPECULATIVE|TRANSFORMERS_BACKEND|VLLM|OOT)\w*_MODELS$")
    entry: Entry = {"names": [], "generic": [], "removed": {}}
    for name, table in _named(_files(sources, "registry.py"), wanted):
        keys = [key for key, _ in _pairs(table)]
        if name == "_PREVIOUSLY_SUPPORTED_MODELS":
            entry["removed"] = dict(sorted(ast.literal_eval(table).items()))
        else:
            entry["generic" if name == "_TRANSFORMERS_SUPPORTED_MODELS" else "names"] += keys
    listed = _assigned(_files(sources, "layers/quantization/__init__.py"), re.compile("QuantizationMethods$"))
    methods = {node.value for table in listed for node in ast.walk(table) if isinstance(node, ast.Constant)}
    unique = {name: sorted(set(found)) for name, found in (*entry.items(), ("methods", methods)) if name != "removed"}
    return {**entry, **unique}


def read_sglang(sources: Sequence[Path]) -> Entry:
    """`names`: the classes that modules of sglang/srt/models give as their EntryClass; `methods`: quantisation methods,
    whatever device they are for, in the tables of layers/quantization/__init__.py."""
    found = [_assigned([path], re.compile("EntryClass$")) for path in _files(sources, "srt/models/*.py")]
    nodes = [item for tables in found for table in tables for item in getattr(table, "elts", [table])]
    trees = [_tree(path) for path in _files(sources, "layers/quantization/__init__.py")]
    tables = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    methods = {name for table in tables for name, value in _pairs(table) if isinstance(value, ast.Name)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return {"names": sorted(names), "methods": sorted(methods)}


def read_llama_cpp(sources: Sequence[Path]) -> Entry:
    """`names`: class -> the architecture of its GGUF file. From the converter (conversion/, or the one file before it)
    and gguf-py/gguf/constants.py."""
    files = _files(sources, "convert_hf_to_gguf.py", "conversion/*.py")
    wanted = {key for table in _assigned(files, re.compile("TEXT_MODEL_MAP")) for key, _ in _pairs(table)}
    classes = {node.name: node for path in files for node in ast.walk(_tree(path)) if isinstance(node, ast.ClassDef)}
    tables = _assigned(_files(sources, "gguf/constants.py"), re.compile("MODEL_ARCH_NAMES"))
    gguf = {ast.unparse(key).rpartition(".")[2]: value for table in tables for key, value in _entries(table)}
    names: dict[str, str] = {}
    for node in classes.values():
        arch = next((a for n in _lineage(node, classes) if (a := _gguf_arch(n))), None)
        for name in _registered(node):
            if arch in gguf and arch != "MMPROJ" and (name in wanted or not wanted) and name not in names:
                names[name] = ast.literal_eval(gguf[arch])
    return {"names": dict(sorted(names.items()))}


def read_ik_llama_cpp(sources: Sequence[Path]) -> Entry:
    """`names`: the architectures of GGUF files in LLM_ARCH_NAMES of src/llama-arch.cpp."""
    text = "".join(path.read_text(encoding="utf-8") for path in _files(sources, "llama-arch.cpp"))
    return {"names": sorted({name for name in ARCH_NAME.findall(text) if not name.startswith("(")})}


def read_mlx_lm(sources: Sequence[Path]) -> Entry:
    """`names`: the model types that have a module in mlx_lm/models, or are renamed to one (MODEL_REMAPPING);
    `fp8`: those that dequantise FP8 with scales of blocks while they load; `needs`: of families' model types, the keys
    of config.json without which loading ends in a TypeError; `rope_theta`: what it takes where the root of config.json
    has none, of those that do not look into rope_parameters."""
    modules: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    theta: dict[str, float] = {}
    for path in _files(sources, "mlx_lm/models/*.py"):
        classes = {node.name: node for node in _tree(path).body if isinstance(node, ast.ClassDef)}
        if "Model" in classes:
            modules[path.stem] = path.read_text(encoding="utf-8")
            needs[path.stem] = _fields_without_default(classes.get("ModelArgs"))
            default = _defaults(classes.get("ModelArgs")).get("rope_theta")
            if isinstance(default, ast.Constant) and "rope_parameters" not in modules[path.stem]:
                theta[path.stem] = float(str(default.value))
    renamed = {
        key: ast.literal_eval(value)
        for table in _assigned(_files(sources, "mlx_lm/utils.py"), re.compile("MODEL_REMAPPING$"))
        for key, value in _pairs(table)
    }
    names = {**{name: name for name in modules}, **{old: new for old, new in renamed.items() if new in modules}}
    fp8 = {name for name, text in modules.items() if "weight_scale_inv" in text}
    heir = re.compile(rf"^from \.({'|'.join(fp8 or 'x')}) import (.*\b)?Model\b", re.MULTILINE)
    fp8 |= {name for name, text in modules.items() if heir.search(text)}
    return {
        "names": sorted(names),
        "fp8": sorted(name for name, module in names.items() if module in fp8),
        "needs": {name: needs[module] for name, module in sorted(names.items()) if name in BY_NAME and needs[module]},
        "rope_theta": {name: theta[of] for name, of in sorted(names.items()) if name in BY_NAME and of in theta},
    }


def read_mistral_rs(sources: Sequence[Path]) -> Entry:
    """`names`: the classes that `from_causal_lm_name` of the loaders (mistralrs-core/src/pipeline/loaders) knows."""
    found: set[str] = set()
    for path in _files(sources, "*loaders.rs", "mod.rs"):
        for body in re.findall(r"fn from_causal_lm_name\(.*?\n    }\n", path.read_text(encoding="utf-8"), re.DOTALL):
            found.update(name for arm in MATCH_ARM.findall(body) for name in re.findall(r"\w+", arm))
    return {"names": sorted(found)}


READERS: Mapping[str, Callable[[Sequence[Path]], Entry]] = {
    "transformers": read_transformers,
    "vllm": read_vllm,
    "sglang": read_sglang,
    "llama.cpp": read_llama_cpp,
    "ik_llama.cpp": read_ik_llama_cpp,
    "mlx-lm": read_mlx_lm,
    "mistral.rs": read_mistral_rs,
}


def refreshed(data: Entry, engine: str, sources: Sequence[Path], version: str, **given: str) -> Entry:
    """The contents of engines.json with `engine` read again; given: dated and note, where there are any.

    Raises InputError when its lists are not in `sources`.
    """
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: does not exist")
    entry = READERS[engine](sources)
    if not any(entry.values()):
        raise InputError(f"{', '.join(map(str, sources))}: no list of models in it that {engine}'s reader knows")
    if engine == "transformers":
        entry = _merged(data.get(engine), entry, version)
        version = max((version, entry.pop("newest")), key=release)
    stated = {name: text for name, text in given.items() if text}
    entry = {"version": version, "read": date.today().isoformat(), **stated, **entry}
    return {**data, engine: entry}


def _merged(old: Entry | None, new: Entry, version: str) -> Entry:
    """One release added to those that were read: the first that has a model, and the newest's classes."""
    old = old or {"version": version, "oldest": version, "since": {}, "types": {}, "replaceable": [], "methods": []}
    since = dict.fromkeys(new["types"], version)
    for name, first in old["since"].items():
        since[name] = min((first, since.get(name, first)), key=release)
    latest = new if release(version) >= release(old["version"]) else old
    return {
        "newest": old["version"],
        "oldest": min((old["oldest"], version), key=release),
        "since": dict(sorted(since.items())),
        **{name: latest[name] for name in ("types", "replaceable", "methods")},
    }


def _files(sources: Iterable[Path], *patterns: str) -> list[Path]:
    """Files in the folders, or named themselves, whose paths end in one of these patterns; in order, each once."""
    found: dict[Path, None] = {}
    for source in sources:
        for pattern in patterns:
            named = source.is_file() and source.match(pattern)
            found |= dict.fromkeys([source] if named else sorted(source.rglob(pattern)))
    return list(found)


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be parsed: {error}") from error


def _named(paths: Iterable[Path], name: re.Pattern[str]) -> Iterator[tuple[str, ast.expr]]:
    """Assignments of the modules whose target matches."""
    for path in paths:
        for node in _tree(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            if isinstance(targets[0], ast.Name) and name.match(targets[0].id) and isinstance(value, ast.expr):
                yield targets[0].id, value


def _assigned(paths: Iterable[Path], name: re.Pattern[str]) -> list[ast.expr]:
    return [value for _, value in _named(paths, name)]


def _entries(table: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Keys and values of a dictionary, or of OrderedDict([(key, value), ...])."""
    if isinstance(table, ast.Dict):
        return [(key, value) for key, value in zip(table.keys, table.values, strict=True) if key is not None]
    pairs = getattr(table.args[0], "elts", []) if isinstance(table, ast.Call) and table.args else []
    return [(pair.elts[0], pair.elts[1]) for pair in pairs if isinstance(pair, ast.Tuple) and len(pair.elts) == 2]


def _pairs(table: ast.expr) -> list[tuple[str, ast.expr]]:
    """The same where keys are strings."""
    return [(str(key.value), value) for key, value in _entries(table) if isinstance(key, ast.Constant)]


def _fields_without_default(node: ast.ClassDef | None) -> list[str]:
    """Of a dataclass that is filled with the config's keys as they are, as mlx-lm's BaseModelArgs does it."""
    if node is None or [ast.unparse(base) for base in node.bases] != ["BaseModelArgs"]:
        return []
    if any(isinstance(item, ast.FunctionDef) and item.name in ("from_dict", "__init__") for item in node.body):
        return []
    return sorted(name for name, default in _defaults(node).items() if default is None)


def _defaults(node: ast.ClassDef | None) -> dict[str, ast.expr | None]:
    """Fields of a dataclass, with what they are where nothing is given."""
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)] if node else []
    return {field.target.id: field.value for field in fields if isinstance(field.target, ast.Name)}


def _registered(node: ast.ClassDef) -> list[str]:
    """What the class is registered for: `@ModelBase.register("A", "B")`, `@Model.register("A")`."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func).endswith(".register")]
    constants = [argument for call in calls for argument in call.args]
    return [str(constant.value) for constant in constants if isinstance(constant, ast.Constant)]


def _lineage(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """The class and its bases, nearest first."""
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            yield from _lineage(classes[base.id], classes)


def _gguf_arch(node: ast.ClassDef) -> str | None:
    """LLAMA of a class with `model_arch = gguf.MODEL_ARCH.LLAMA`."""
    for item in node.body:
        value = getattr(item, "value", None)
        if isinstance(item, ast.Assign) and isinstance(value, ast.Attribute):
            found = {ast.unparse(target): value.attr for target in item.targets}
            if "model_arch" in found:
                return found["model_arch"]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(prog="python -m moekern.plan.registries", description=__doc__)
    parser.add_argument("engine", choices=READERS)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--version", required=True, help="The release or commit that the sources are of.")
    parser.add_argument("--dated", default="", help="The date of that release or commit, where it is known.")
    parser.add_argument("--note", default="", help="What the list lacks: then a missing name proves nothing.")
    parser.add_argument("--file", type=Path, default=DATA, help="The file to refresh.")
    options = parser.parse_args(arguments)
    try:
        data = json.loads(options.file.read_text(encoding="utf-8")) if options.file.exists() else {}
        given = {"dated": options.dated, "note": options.note}
        new = refreshed(data, options.engine, options.sources, options.version, **given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.file.write_text(json.dumps(dict(sorted(new.items())), indent=1) + "\n", encoding="utf-8")
    entry = new[options.engine]
    print(f"{options.engine} {entry['version']}: {len(entry.get('names', entry.get('types', ())))} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
