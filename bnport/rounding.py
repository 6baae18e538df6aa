"""Rounding to the float formats that weights are stored in, and the decimal meant by a float32 epsilon."""

from __future__ import annotations

import struct

from bnport._lazy import TYPE_CHECKING, np
from bnport.errors import InvalidValue

if TYPE_CHECKING:
    from bnport.record import Array

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# half the spacing of subnormal numbers: what rounding may cost where the unit roundoff of a tiny value would be less
UNDERFLOW = {"float64": 2.0**-1074, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
LARGEST = {"float64": 1.7976931348623157e308, "float32": 3.4028234663852886e38, "float16": 65504.0,
            "bfloat16": 3.3895313892515355e38}  # fmt: skip


def meant_epsilon(epsilon: float) -> float:
    """The decimal that was meant by an epsilon that went through float32.

    ONNX, Caffe and CoreML store epsilon as float32, so 1e-5 reads back as 9.999999747378752e-06. If `epsilon` is
    exactly a float32 value, the shortest decimal that rounds to that float32 is returned; otherwise `epsilon` itself.
    Every engine rounds epsilon to float32 again, so the change is never observable there.
    """
    try:
        single = struct.pack("<f", epsilon)
    except OverflowError:
        return epsilon
    if struct.unpack("<f", single)[0] != epsilon:
        return epsilon
    for digits in range(1, 10):
        decimal = float(f"{epsilon:.{digits}g}")
        if struct.pack("<f", decimal) == single:
            return decimal
    return epsilon


def round_to(array: Array, dtype: str) -> Array:
    """`array` rounded to nearest in `dtype`, overflow to infinity; 16-bit results come back widened to float32."""
    if dtype not in UNIT_ROUNDOFF:
        raise InvalidValue(f"dtype: expected one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r:.60}")
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return _round_to_bfloat16(array)
        rounded = np.asarray(array).astype(dtype)
        return rounded.astype(np.float32) if dtype == "float16" else rounded


def stored(array: Array, dtype: str) -> bytes:
    """Little-endian bytes of numbers that `dtype` holds exactly, as round_to gives them."""
    if dtype == "bfloat16":
        little: Array = (np.ascontiguousarray(array, "<f4").view("<u4") >> np.uint32(16)).astype("<u2")
    else:
        little = np.asarray(array).astype(np.dtype(dtype).newbyteorder("<"))
    return little.tobytes()


def _round_to_bfloat16(array: Array) -> Array:
    """Round to nearest, ties to even, 8 significant bits, in one step from float64 (subnormals included)."""
    wide = np.asarray(array, np.float64)
    _, exponent = np.frexp(wide)
    exponent = np.maximum(exponent, -125)  # below 2**-126 the spacing stays 2**-133
    step = np.ldexp(1.0, exponent - 8)
    rounded = np.where(np.isfinite(wide), np.rint(wide / step) * step, wide)
    rounded = np.where(np.abs(rounded) > LARGEST["bfloat16"], np.copysign(np.inf, wide), rounded)
    return np.copysign(rounded, wide).astype(np.float32)
