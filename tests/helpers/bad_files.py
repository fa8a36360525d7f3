"""Hostile checkpoints: those kept in tests/bad, those that git cannot hold, and what must become of any bytes."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from moekern.checkpoint.folder import INDEX, SINGLE
from moekern.checkpoint.header import DTYPE_BITS, Shard, header_length, parse_header
from moekern.checkpoint.strict_json import HEADER_CAP
from moekern.errors import InputError
from tests.helpers import ROOT
from tests.helpers.layouts import header_of

BAD = ROOT / "tests" / "bad"
EXPECTED: dict[str, str] = json.loads(
    (BAD / "expected.json").read_text()
)  # path under tests/bad -> part of the message


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file; header is JSON, or the bytes in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


GOOD = raw({"t": entry(0, 4)}, b"1234")


def single(folder: Path, content: bytes) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(content)
    return folder


def kept(name: str, folder: Path) -> Path:
    """The checkpoint of tests/bad with this name; a single header is put into `folder`."""
    return single(folder, (BAD / name).read_bytes()) if name.startswith("headers/") else BAD / name


def _sparse(folder: Path, start: bytes, size: int) -> None:
    os.truncate(single(folder, start) / SINGLE, size)


def _indexed(folder: Path, name: str = "a.safetensors") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    return folder / name


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _odd_name(folder: Path) -> None:
    single(folder, GOOD)
    (folder / SINGLE).rename(folder / "a\x1b[2J\n.safetensors")


# name -> (what makes the folder, part of the message): devices, links, and files that are large or sparse
MADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda f: os.mkfifo(_indexed(f)), "a.safetensors: not a regular file"),
    "folder as a shard": (lambda f: _indexed(f).mkdir(), "a.safetensors: not a regular file"),
    "device": (lambda f: _indexed(f).symlink_to("/dev/zero"), "a.safetensors: not a regular file"),
    "dangling link": (
        lambda f: _indexed(f).symlink_to("gone"),
        "missing shard a.safetensors: a link to nothing (1 of 1 are missing)",
    ),
    "link to itself": (lambda f: _indexed(f).symlink_to("a.safetensors"), "missing shard a.safetensors: a link"),
    "dangling single": (
        lambda f: _link(single(f, GOOD) / SINGLE, "gone"),
        f"missing shard {SINGLE}: a link to nothing",
    ),
    "dangling index": (lambda f: _link(single(f, GOOD) / INDEX, "gone"), f"{INDEX}: No such file or directory"),
    "index links to itself": (lambda f: _link(single(f, GOOD) / INDEX, INDEX), f"{INDEX}: Too many levels"),
    "config is a pipe": (lambda f: (f.mkdir(), os.mkfifo(f / "config.json")), "config.json: not a regular file"),
    "config is a folder": (lambda f: (f / "config.json").mkdir(parents=True), "config.json: not a regular file"),
    "huge config": (
        lambda f: os.truncate(single(f, GOOD) / "config.json", 1 << 40),
        f"config.json: {1 << 40} bytes, more than the limit of {HEADER_CAP}",
    ),
    "huge index": (
        lambda f: ((single(f, GOOD) / INDEX).touch(), os.truncate(f / INDEX, 1 << 40)),
        f"{INDEX}: {1 << 40} bytes, more than the limit of {HEADER_CAP}",
    ),
    "terabyte of zeros": (lambda f: _sparse(f, b"", 1 << 40), "header: not valid JSON: begins with b''"),
    "terabyte after the tensors": (lambda f: _sparse(f, GOOD, 1 << 40), "bytes follow the last tensor"),
    "header of zeros": (
        lambda f: _sparse(f, struct.pack("<Q", HEADER_CAP), 1 << 40),
        r"header: not valid JSON: begins with b'\x00\x00\x00\x00'",
    ),
    "header above the cap": (
        lambda f: _sparse(f, struct.pack("<Q", HEADER_CAP + 1), 1 << 40),
        f"header of {HEADER_CAP + 1} bytes, more than the limit",
    ),
    "file name of terminal codes": (_odd_name, r"'a\x1b[2J\n.safetensors' is there, but neither"),
    "name of 100 KB": (
        lambda f: single(f, raw({"x" * 100_000: entry(0, 0)})),
        "its name is not a printable one of at most 1024 characters",
    ),
    "shape of 100 000": (
        lambda f: single(f, raw({"t": entry(0, 1, shape=[2] * 100_000)}, b"x")),
        "a shape of 100000 axes",
    ),
    "shape of 33": (
        lambda f: single(f, raw({"t": entry(0, 1, shape=[1] * 33)}, b"x")),
        "a shape of 33 axes, more than",
    ),
    "100 000 fields": (
        lambda f: single(f, raw({"t": entry(0, 0) | dict.fromkeys(map(str, range(100_000)), 0)})),
        "fields that the format does not know: ['dtype', ",
    ),
    "nested 100 000 deep": (lambda f: single(f, raw(b'{"t":' + b"[" * 100_000)), "header: not valid JSON"),
    "number of 100 000 digits": (
        lambda f: single(f, raw(b'{"t":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,1]}}', b"x")),
        "header: not valid JSON: Exceeds the limit",
    ),
}


def opened(content: bytes) -> Shard:
    """What read_shard does with a file of these bytes."""
    path = Path("x.safetensors")
    length = header_length(content, path, len(content))
    return parse_header(content[8 : 8 + length], path, len(content))


def judge(content: bytes) -> bool:
    """True if the bytes open, as a shard of which everything holds that the rest of moekern trusts, and that the
    safetensors library reads in the same way; False if they are refused in one short line."""
    try:
        shard = opened(content)
    except InputError as error:
        line = str(error)
        assert line.startswith("x.safetensors: "), line
        assert line.isprintable(), line
        assert len(line) < 2100, line
        return False
    assert (shard.name, shard.size) == ("x.safetensors", len(content))
    position = shard.data_start
    for tensor in shard.tensors:
        bits = DTYPE_BITS[tensor.dtype]
        for n in tensor.shape:
            bits *= n
        assert tensor.start == position
        assert 8 * tensor.nbytes == bits
        assert tensor.name.isprintable()
        position = tensor.stop
    assert position == len(content)
    names = [tensor.name for tensor in shard.tensors]
    assert len(set(names)) == len(names)
    assert all(type(text) is str for pair in shard.metadata.items() for text in pair)
    try:
        library = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(content)}
    except SafetensorError as error:
        raise AssertionError(f"opened, but the safetensors library refuses it: {error}") from error
    assert library == {t.name: (t.dtype, t.shape, content[t.start : t.stop]) for t in shard.tensors}
    return True


def valid(rng: random.Random) -> bytes:
    """A file that opens: tensors of any dtype, some empty, metadata, padding."""
    tensors = {}
    for i in range(rng.randrange(5)):
        name = rng.choice(["", "a", "t", "model.layers.{}.mlp.experts.7.w1.weight", "é {}", "\\ud83d\\ude00", '"{}\\'])
        shape = [rng.choice([0, 1, 1, 2, 3, 8]) for _ in range(rng.randrange(4))]
        dtype = rng.choice(list(DTYPE_BITS))
        if DTYPE_BITS[dtype] < 8:
            shape.append(8)
        tensors[name.format(i)] = dtype, shape
    header, size = header_of(tensors, rng.choice([None, {}, {"format": "pt", "note": "line\nline"}]))
    return raw(header[8:] + b" " * rng.choice([0, 0, 7]), rng.randbytes(size))


HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.0, 1.5, 1e5, 1e999, -1e999,
    "", "U8", "F4", "F6_E2M3", "F99", "__metadata__", "\x1b[2J", "a\n", "\u202e", "\0", "x" * 2000,
    [], [0], [0, 0], [0, 1], [[0, 1]], [2**40] * 4, [0, 2**64], [[[[[[[[]]]]]]]],
    {}, {"a": "b"}, {"a": 1}, entry(0, 0), entry(0, 4), entry(4, 0),
)  # fmt: skip
SNIPPETS = (
    b"-0", b"NaN", b"1e5", b"1.0", b"\\ud800", b"\\u0000", b"\xff", b"\xed\xa0\x80", b"\x00", b" ", b"\t", b'"',
    b"\\", b"{", b"}", b"[", b"]", b",", b":", b'"t":', b'"__metadata__":{},', b'"dtype":"U8",', b'"shape":[],',
    b'"data_offsets":[0,0],', b'"x":0,', b"9" * 4500, b"[" * 1200,
)  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The file with one thing changed: a value of its JSON, a few bytes, its length field or its end."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(8)
    if kind < 4:
        return raw(_changed(text, rng), data)
    if kind == 4:
        at = rng.randrange(len(text) + 1)
        return raw(text[:at] + rng.choice(SNIPPETS) + text[at + rng.choice([0, 0, 1, 2]) :], data)
    if kind == 5:
        edited = bytearray(text or b"{}")
        edited[rng.randrange(len(edited))] = rng.randrange(256)
        return raw(bytes(edited), data)
    if kind == 6:
        return content[: rng.randrange(len(content) + 1)] + rng.choice([b"", b"", b"x", bytes(8)])
    length = rng.choice([0, length - 1, length + 1, len(content) - 8, HEADER_CAP, HEADER_CAP + 1, 2**63, 2**64 - 1])
    return struct.pack("<Q", length % 2**64) + content[8:]


def _changed(text: bytes, rng: random.Random) -> bytes:
    """JSON with one value, found by walking down at random, replaced, removed, or exchanged with its neighbour."""
    try:
        holder: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text + rng.choice(SNIPPETS)
    root = holder
    while isinstance(holder, (dict, list)) and holder:
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, other = rng.choice(keys), rng.choice(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            continue
        action = rng.randrange(5)
        if action == 0:
            holder[key], holder[other] = holder[other], holder[key]
        elif action == 1:
            del holder[key]
        elif action == 2 and type(holder[key]) is int:
            holder[key] += rng.choice([-1, 1, 2**32, 2**64])
        elif action == 3 and isinstance(holder, dict):
            holder[rng.choice(["x", "\x1b", "\ud800", "__metadata__", str(key)])] = holder.pop(key)
        else:
            holder[key] = rng.choice(HOSTILE)
        break
    return json.dumps(root).encode()
