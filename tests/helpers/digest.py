"""XXH3-128 of bytes that a test holds."""

import moekern._C as _C


def xxh3(data: bytes) -> bytes:
    hash = _C.Xxh3()
    hash.update(data)
    return hash.digest()
