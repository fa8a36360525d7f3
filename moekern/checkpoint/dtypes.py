"""Values of the safetensors dtypes as numpy arrays."""

import numpy as np

NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
# exponent bits, mantissa bits and exponent bias
SMALL_FLOATS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}


def decode(data: bytes, dtype: str) -> np.ndarray:
    """A flat array of the safetensors dtype; BF16 and 8-bit floats become float32 without rounding."""
    if dtype in NUMPY_DTYPES:
        return np.frombuffer(data, NUMPY_DTYPES[dtype])
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        table = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
    else:
        table = small_float_table(dtype)
    return table.astype(np.float32)[np.frombuffer(data, np.uint8)]


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Numbers as F32, F16 or BF16, each rounded to the nearest, ties to even, by way of float32."""
    with np.errstate(over="ignore"):  # infinities are for the caller to see
        single = np.ascontiguousarray(values, "<f4")
        if dtype in ("F32", "F16"):
            return single.astype(NUMPY_DTYPES[dtype]).tobytes()
    if dtype != "BF16":
        raise ValueError(f"[encode] dtype: expected F32, F16 or BF16, got {dtype}")
    bits = single.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def small_float_table(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float, float64."""
    exponent_bits, mantissa_bits, bias = SMALL_FLOATS[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.ldexp(np.where(exponent == 0, mantissa, 1 + mantissa), np.maximum(exponent, 1) - bias)
    values = np.where(codes >= 128, -values, values)
    if dtype.endswith("FNUZ"):
        values[128] = np.nan
    elif dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values
