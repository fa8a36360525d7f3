"""The extension's XXH3-128, against xxHash's own vectors."""

import hashlib
import re

import pytest

from moekern import _C
from tests.helpers import ROOT
from tests.helpers.digest import xxh3

VENDORED = ROOT / "csrc" / "vendored"
# Length -> low and high half, seed 0: from the sanity check of xxHash (xxhsum 0.8), over the bytes of `sanity`.
PUBLISHED = {
    0: (0x6001C324468D497F, 0x99AA06D3014798D8),
    1: (0xC44BDFF4074EECDB, 0xA6CD5E9392000F6A),
    6: (0x3E7039BDDA43CFC6, 0x082AFE0B8162D12A),
    12: (0x061A192713F69AD9, 0x6E3EFD8FC7802B18),
    24: (0x1E7044D28B1B901D, 0x0CE966E4678D3761),
    48: (0xF942219AED80F67B, 0xA002AC4E5478227E),
    81: (0x5E8BAFB9F95FB803, 0x4952F58181AB0042),
    222: (0xF1AEBD597CEC6B3A, 0x337E09641B948717),
    403: (0xCDEB804D65C6DEA4, 0x1B6DE21E332DD73D),
    512: (0x617E49599013CB6B, 0x18D2D110DCC9BCA1),
    2048: (0xDD59E2C3A5F038E0, 0xF736557FD47073A5),
    2240: (0x6E73A90539CF2948, 0xCCB134FBFA7CE49D),
    2367: (0xCB37AEB9E5D361ED, 0xE89C0F6FF369B427),
}


def sanity(length: int) -> bytes:
    out, state = bytearray(), 2654435761
    for _ in range(length):
        out.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    return bytes(out)


@pytest.mark.parametrize("length", PUBLISHED)
def test_published_vectors(length: int) -> None:
    low, high = PUBLISHED[length]
    assert xxh3(sanity(length)) == high.to_bytes(8, "big") + low.to_bytes(8, "big")


@pytest.mark.parametrize("step", [1, 255, 4096])
def test_bytes_may_come_in_any_portions(step: int) -> None:
    data, hash = sanity(9000), _C.Xxh3()
    for start in range(0, len(data), step):
        hash.update(memoryview(data)[start : start + step])
        hash.digest()  # may be asked for on the way
    assert hash.digest() == xxh3(data) == xxh3(bytearray(data))  # type: ignore[arg-type]


def test_only_bytes_are_taken() -> None:
    for wrong in ("text", memoryview(b"abcd")[::2]):
        with pytest.raises((TypeError, BufferError)):
            _C.Xxh3().update(wrong)  # type: ignore[arg-type]


def test_the_vendored_header_is_what_its_note_says() -> None:
    note, header = (VENDORED / "README.md").read_text(), (VENDORED / "xxhash.h").read_bytes()
    version = re.findall(rb"#define XXH_VERSION_(?:MAJOR|MINOR|RELEASE) +(\d+)", header)
    assert hashlib.sha256(header).hexdigest() in note
    assert f" {b'.'.join(version).decode()}, " in note
