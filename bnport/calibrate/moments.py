"""Count, mean and sum of squared deviations per channel: the numbers that calibration is made of, and how they merge.

One value, `Moments`, for every batch, block, worker and machine::

    n        how many numbers each channel has seen
    mean     sum(x) / n                         float64, (C,)
    m2       sum((x - mean)**2)                 float64, (C,); variance = m2 / n, or m2 / (n - 1) if unbiased
    mean_low the part of the mean below float64's last bit, so that differences of means stay exact to their own size

Two of them merge (Chan, Golub, LeVeque 1979), with d = b.mean - a.mean and n = a.n + b.n::

    mean = a.mean + d * b.n / n                 m2 = a.m2 + b.m2 + d * d * a.n * b.n / n

All terms of m2 are positive, so nothing cancels, whatever mean / std is. `Tree` and `merge_all` merge in one fixed
binary tree over the block numbers: the same bits with one worker, with many, and after one was lost.

Error of the variance: `moments` subtracts a shift near the mean before it squares, and starts again with the true mean
where the shift turns out to be more than one standard deviation off. With u = 2**-53 and N elements in the array, no
variance is further from exact than 3 * (1100 + N / 8e6) * u, relative (each of the three sums that it is made of has at
most so many additions in a row): below 1e-12 up to N = 1e10. In practice it is 1e-14; a merge adds a few u per level.
(Deviations below 1e-154 have squares that underflow.) Integers of magnitude up to 2**21 are summed exactly and rounded
once; `ExactMoments` stays exact through any merges.
"""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.calibrate import sums
from bnport.calibrate.tree import FixedTree
from bnport.errors import FormatError, InvalidValue
from bnport.record import first_channels

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from numpy.typing import ArrayLike

    from bnport.record import Array

_MAGIC = b"bnpM1\r\n\x00"
_FAR = 1.0  # squared distance of the shift from the mean, in variances, beyond which the sums are taken again
_LARGEST_EXACT = 1 << 21


class Moments:
    """n, mean and m2 (the sum of squared deviations) of each channel; see the module. Immutable, picklable.

    mean, m2 and mean_low have shape (C,), float64. With n = 0 they are zeros: the neutral element of `merge`.
    Raises InvalidValue on shapes that differ, a negative n or m2, NaN or infinity.
    """

    __slots__ = ("m2", "mean", "mean_low", "n")

    n: int
    mean: Array
    m2: Array
    mean_low: Array

    def __init__(self, n: int, mean: ArrayLike, m2: ArrayLike, mean_low: ArrayLike | None = None) -> None:
        put = object.__setattr__
        put(self, "n", int(n))
        for name, value in (("mean", mean), ("m2", m2), ("mean_low", mean_low)):
            array = np.zeros(self.mean.shape) if value is None else np.array(value, np.float64, ndmin=1)
            array.flags.writeable = False
            put(self, name, array)
        if self.mean.ndim != 1 or not self.mean.shape == self.m2.shape == self.mean_low.shape or not self.mean.size:
            raise InvalidValue(
                f"moments: mean {self.mean.shape} and m2 {self.m2.shape} must both have shape (channels,)"
            )
        bad = ~(np.isfinite(self.mean) & np.isfinite(self.m2) & (self.m2 >= 0))
        if self.n < 0 or bad.any():
            what = first_channels(bad) if bad.any() else "all channels"
            raise InvalidValue(f"moments of {self.n} numbers: not finite, or negative, in {what}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments is immutable; {name} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.n, self.mean, self.m2, self.mean_low)

    @property
    def channels(self) -> int:
        """C."""
        return self.mean.size

    def variance(self, unbiased: bool = False) -> Array:
        """m2 / n, or m2 / (n - 1) if `unbiased`; shape (C,), float64. InvalidValue with fewer than 1 (2) numbers."""
        if self.n < 1 + unbiased:
            kind = "an unbiased variance needs two" if unbiased else "a variance needs one"
            raise InvalidValue(f"{self.n} numbers per channel: {kind} or more")
        variance: Array = self.m2 / (self.n - unbiased)
        return variance

    def std(self, unbiased: bool = False) -> Array:
        """The square root of `variance`."""
        root: Array = np.sqrt(self.variance(unbiased))
        return root

    def merge(self, other: Moments) -> Moments:
        """Both together: the function `merge`."""
        return merge(self, other)

    def same_bits(self, other: Moments) -> bool:
        """Whether both are the same to the last bit."""
        return self.to_bytes() == other.to_bytes()

    def to_bytes(self) -> bytes:
        """A little-endian image with a checksum: the same bits on every machine. For checkpoints and the wire."""
        data = struct.pack("<qq", self.n, self.channels)
        data += b"".join(a.astype("<f8").tobytes() for a in (self.mean, self.m2, self.mean_low))
        return _MAGIC + data + struct.pack("<I", zlib.crc32(data))

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """The value that `to_bytes` wrote. Raises FormatError for anything else."""
        head = len(_MAGIC) + 16
        if len(data) < head + 4 or data[: len(_MAGIC)] != _MAGIC:
            raise FormatError("not stored moments: the first bytes are not theirs")
        n, channels = struct.unpack_from("<qq", data, len(_MAGIC))
        if not 0 < channels <= len(data) or len(data) != head + 24 * channels + 4:
            raise FormatError(f"stored moments of {channels} channels cannot be {len(data)} bytes long")
        if zlib.crc32(data[len(_MAGIC) : -4]) != struct.unpack("<I", data[-4:])[0]:
            raise FormatError("stored moments are damaged: the checksum does not fit")
        mean, m2, low = np.frombuffer(data, "<f8", 3 * channels, head).reshape(3, channels)
        return cls(n, mean, m2, low)

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, {self.channels} channels)"


class ExactMoments:
    """n, sum and sum of squares of integers, as Python integers: exact, and exact through every merge, in any order."""

    __slots__ = ("n", "squares", "total")

    def __init__(self, n: int, total: Iterable[int], squares: Iterable[int]) -> None:
        self.n = int(n)
        self.total = tuple(int(v) for v in total)
        self.squares = tuple(int(v) for v in squares)
        if not self.total or len(self.total) != len(self.squares) or self.n < 0:
            raise InvalidValue(f"exact moments: {len(self.total)} sums and {len(self.squares)} sums of squares of {n}")

    @property
    def channels(self) -> int:
        """C."""
        return len(self.total)

    def merge(self, other: ExactMoments) -> ExactMoments:
        """Both together."""
        _same_channels(self, other)
        total, squares = ([a + b for a, b in zip(x, y, strict=True)]
                          for x, y in ((self.total, other.total), (self.squares, other.squares)))  # fmt: skip
        return ExactMoments(self.n + other.n, total, squares)

    def moments(self, scale: Fraction | float = 1) -> Moments:
        """The moments of scale * x, each number correctly rounded from its exact value."""
        scale = Fraction(scale)
        if not self.n:
            return Moments(0, [0.0] * self.channels, [0.0] * self.channels)
        exact = [scale * Fraction(s, self.n) for s in self.total]
        mean = [float(m) for m in exact]
        low = [float(m - Fraction(rounded)) for m, rounded in zip(exact, mean, strict=True)]
        m2 = [
            float(scale * scale * Fraction(self.n * q - s * s, self.n))
            for s, q in zip(self.total, self.squares, strict=True)
        ]
        return Moments(self.n, mean, m2, low)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactMoments):
            return NotImplemented
        return (self.n, self.total, self.squares) == (other.n, other.total, other.squares)

    def __hash__(self) -> int:
        return hash((self.n, self.total, self.squares))

    def __repr__(self) -> str:
        return f"ExactMoments(n={self.n}, {self.channels} channels)"


def moments(rows: ArrayLike, axis: int = -1) -> Moments:
    """Moments of every channel of an array: all axes but `axis` are summed over.

    rows: any float, integer or boolean dtype (bfloat16 too), any strides; a memory map is read once, in order, in
    pieces. Floats are summed by all cores (OMP_NUM_THREADS limits them), with half a megabyte of buffers for each, kept
    for the next call. The result depends on the values, their order and whether the array is contiguous (another layout is
    taken in other pieces: the last bits may differ), never on threads, BLAS, processor or versions.

    Raises InvalidValue on NaN or infinity (naming channel and position), on other dtypes, on an axis that is not there
    and on zero channels. No rows at all are no error: n is then 0.
    """
    array = np.asanyarray(rows)
    kind = "f" if array.dtype.name == "bfloat16" else array.dtype.kind
    if kind not in "fiub" or array.dtype.itemsize > 8:
        raise InvalidValue(f"moments: expected numbers, got dtype {array.dtype}")
    if not array.ndim or not -array.ndim <= axis < array.ndim:
        raise InvalidValue(f"moments: shape {array.shape} has no axis {axis}")
    axis %= array.ndim
    channels = array.shape[axis]
    if not channels:
        raise InvalidValue(f"moments: shape {array.shape} has no channels along axis {axis}")
    if not array.size:
        return Moments(0, np.zeros(channels), np.zeros(channels))
    if kind in "iub":
        bound = _bound(array)
        if bound <= _LARGEST_EXACT:
            return _exact(array, axis, bound).moments()
    return _float_moments(array, axis)


def exact_moments(rows: ArrayLike, axis: int = -1) -> ExactMoments:
    """Exact sums of an integer or boolean array of any values; InvalidValue for other dtypes."""
    array = np.asanyarray(rows)
    if array.dtype.kind not in "iub":
        raise InvalidValue(f"exact moments: expected integers, got dtype {array.dtype}")
    if not array.ndim or not -array.ndim <= axis < array.ndim or not array.shape[axis]:
        raise InvalidValue(f"moments: shape {array.shape} has no channels along axis {axis}")
    bound = _bound(array)
    if bound > _LARGEST_EXACT:
        return _exact_in_halves(array, axis, bound)
    return _exact(array, axis % array.ndim, bound)


def _exact_in_halves(array: Array, axis: int, bound: int) -> ExactMoments:
    """x = high * 2**k + low, so x**2 = 4**k high**2 + 2**k ((high + low)**2 - high**2 - low**2) + low**2."""
    k = (bound.bit_length() + 1) // 2
    wide = array.astype(np.uint64 if array.dtype.kind == "u" else np.int64)
    high, low = wide >> wide.dtype.type(k), wide & wide.dtype.type((1 << k) - 1)
    h, lo, both = (exact_moments(part, axis) for part in (high, low, high + low))
    total = [(a << k) + b for a, b in zip(h.total, lo.total, strict=True)]
    squares = [
        (a << 2 * k) + ((c - a - b) << k) + b for a, b, c in zip(h.squares, lo.squares, both.squares, strict=True)
    ]
    return ExactMoments(h.n, total, squares)


def _bound(array: Array) -> int:
    kind = array.dtype
    if kind.itemsize == 1:
        return 255  # an int8 reaches 128
    if kind.itemsize == 2:
        return 65535
    return max(abs(int(array.min())), abs(int(array.max()))) if array.size else 0


def _exact(array: Array, axis: int, bound: int) -> ExactMoments:
    n = array.size // array.shape[axis]
    if _inner(array, axis) >= sums.PLANE:  # channels-first: one channel at a time is faster than a transposed copy
        planes = (array[(slice(None),) * axis + (c,)] for c in range(array.shape[axis]))
        parts = [sums.integer_sums(plane[..., None], bound) for plane in planes]
        return ExactMoments(n, [t[0] for t, _ in parts], [q[0] for _, q in parts])
    return ExactMoments(n, *sums.integer_sums(np.moveaxis(array, axis, -1), bound))


def _inner(array: Array, axis: int) -> int:
    inner = 1
    for length in array.shape[axis + 1 :]:
        inner *= length
    return inner


def _float_moments(array: Array, axis: int) -> Moments:
    last = np.moveaxis(array, axis, -1)
    n = array.size // last.shape[-1]
    inner = _inner(array, axis)
    planes = inner >= sums.PLANE and array.flags.c_contiguous
    summed = sums.shifted_plane_sums if planes else sums.shifted_sums
    view = array.reshape(-1, array.shape[axis], inner) if planes else last

    shift = _sampled_mean(last)
    with np.errstate(over="ignore", invalid="ignore"):
        total, squares = sums.in_parts(summed, view, shift)
        if not np.isfinite(squares).all():
            raise InvalidValue(_not_finite(array, axis))
        around = total * (total / n)  # the part of `squares` that is due to the distance of the shift from the mean
        if (around > _FAR * np.maximum(squares - around, 0)).any():
            shift = (shift + total / n).astype(np.float64)
            total, squares = sums.in_parts(summed, view, shift)
            around = total * (total / n)
    mean, low = _two_sum(shift, total / n)
    return Moments(n, mean, np.maximum(squares - around, 0), low)


def _sampled_mean(last: Array) -> Array:
    """The mean of up to 64 rows spread evenly over `last` (..., C), rounded so that float32 data minus it is exact."""
    rows = last.size // last.shape[-1]
    where = np.unique(np.linspace(0, rows - 1, min(rows, 64)).astype(np.int64))
    if last.ndim == 1:
        sample = last[None]
    elif last.flags.c_contiguous and where.size * last.shape[-1] <= sums.PIECE:
        kept = sums.scratch(where.size * last.shape[-1], last.dtype).reshape(where.size, -1)  # as sums.py says
        sample = np.take(last.reshape(rows, -1), where, axis=0, out=kept, mode="clip")
    else:
        sample = last[np.unravel_index(where, last.shape[:-1])]
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sample.mean(axis=0, dtype=np.float64)
        if last.dtype.kind == "f" and last.dtype.itemsize < 8:
            mean = mean.astype(np.float32).astype(np.float64)
    shift: Array = np.where(np.isfinite(mean), mean, 0.0)
    return shift


def _not_finite(array: Array, axis: int) -> str:
    last = np.moveaxis(array, axis, -1)
    last = last[None] if last.ndim == 1 else last
    step = max(1, sums.PIECE // max(1, last[0].size))
    for start in range(0, len(last), step):
        part = np.asarray(last[start : start + step], np.float64)
        bad = ~np.isfinite(part)
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            where = ", ".join(str(int(i) + (start if k == 0 else 0)) for k, i in enumerate(at[:-1]))
            count = int(np.count_nonzero(bad))
            more = f" (and {count - 1} more near it)" if count > 1 else ""
            return f"the data hold {part[at]} in channel {int(at[-1])}, at position ({where}){more}"
    return "the data are so large that their squares are not finite in float64"


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The float64 sum of a and b, and what it lost by rounding (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _same_channels(a: Moments | ExactMoments, b: Moments | ExactMoments) -> None:
    if a.channels != b.channels:
        raise InvalidValue(f"moments of {a.channels} and of {b.channels} channels do not merge")


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both together. Exact up to rounding; order and grouping change the last bits only (see Tree)."""
    _same_channels(a, b)
    if not a.n or not b.n:
        return a if a.n else b
    n = a.n + b.n
    apart = (b.mean - a.mean) + (b.mean_low - a.mean_low)
    mean, low = _two_sum(a.mean, apart * (b.n / n) + a.mean_low)
    return Moments(n, mean, a.m2 + b.m2 + apart * apart * (a.n * b.n / n), low)


class Tree(FixedTree[Moments]):
    """Moments merged in the fixed tree over the blocks that they are of."""

    __slots__ = ()
    kind = Moments


def merge_all(blocks: Iterable[Moments]) -> Moments:
    """All blocks merged in one fixed binary tree over their order (see Tree). InvalidValue if there are none."""
    tree = Tree()
    for block in blocks:
        tree.add(block)
    return tree.result()
