"""Small safetensors files of this program's own: a header and the tensors behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from moekern.checkpoint.header import DTYPE_BITS
from moekern.checkpoint.strict_json import HEADER_CAP
from moekern.files import replacing

Buffer: TypeAlias = bytes | bytearray | memoryview | Any  # whatever memoryview takes: numpy arrays do
Described = tuple[str, Sequence[int]]  # dtype as safetensors names it, shape


def header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The length and the JSON of a file whose tensors follow one another in this order, and the bytes of all of them.

    Raises ValueError for more than a header can hold.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        numbers = DTYPE_BITS[dtype]
        for size in shape:
            numbers *= size
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [stop, stop := stop + numbers // 8]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_CAP:
        raise ValueError(f"[header] tensors: a header of {len(text)} bytes, more than the limit of {HEADER_CAP}")
    return len(text).to_bytes(8, "little") + text, stop


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int], Buffer]], metadata: Mapping[str, str]
) -> None:
    """Write tensors, name -> dtype, shape, bytes, in their order. The file appears whole or not at all, in the place of
    an earlier one. Raises InputError where the system refuses, ValueError for bytes that are not of the shape."""
    views = {name: _bytes(data) for name, (_, _, data) in tensors.items()}
    for name, (dtype, shape, _) in tensors.items():
        numbers = DTYPE_BITS[dtype]
        for size in shape:
            numbers *= size
        if numbers != 8 * views[name].nbytes:
            raise ValueError(f"[write_tensors] {name}: {views[name].nbytes} bytes are not {dtype} {list(shape)}")
    start, _ = header({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(start)
        for view in views.values():
            file.write(view)


def _bytes(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")
