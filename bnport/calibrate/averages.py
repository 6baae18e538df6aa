"""Averages of batch statistics as values that merge, so that a run of batches can be taken together anywhere.

Each batch b, with n_b numbers per channel, mean m_b and variance v_b, acts on the statistics s = (mean, variance) before
it; a run of batches does the same, and is kept as four numbers::

    s  ->  keep * s + (mean, variance)                  n = sum of n_b

    method    keep       (mean, variance) of one batch            in the end, of all batches
    average   1          n_b * (m_b, v_b)                         (mean, variance) / n
    moving    momentum   (1 - momentum) * (m_b, v_b)              keep * the stored (mean, variance) + (mean, variance)

Two runs, a before b, merge by composing the maps::

    keep = a.keep * b.keep      mean = b.keep * a.mean + b.mean      variance = b.keep * a.variance + b.variance

This is associative but for rounding, and rounding does not depend on who computes it: the merges follow the fixed tree
over the batches' numbers (see tree.py). A batch in which a layer sees nothing has n = 0 and changes nothing.

Error, with u = 2**-53, B batches, D = ceil(log2(B)): to the exact value from the same m_b and v_b at most (D + 3) * u for
average, (B + 2 * D + 4) * u for moving, times the sum of the magnitudes of what is added up (first order in u). A product
of k keeps has been rounded k - 1 times, and at each level a term is multiplied once and added once.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.calibrate.tree import FixedTree
from bnport.errors import FormatError, InvalidValue

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import ArrayLike

    from bnport.record import Array

_MAGIC = b"bnpA1\r\n\x00"


class Updates:
    """A run of batches as the map s -> keep * s + (mean, variance); see the module. Immutable, picklable.

    mean, variance: shape (C,), float64. n = 0 is the map that changes nothing: keep 1, zeros.
    Raises InvalidValue on shapes that differ, a negative n, keep or variance, NaN or infinity.
    """

    __slots__ = ("keep", "mean", "n", "variance")

    n: int
    keep: float
    mean: Array
    variance: Array

    def __init__(self, n: int, keep: float, mean: ArrayLike, variance: ArrayLike) -> None:
        put = object.__setattr__
        put(self, "n", int(n))
        put(self, "keep", float(keep))
        for name, value in (("mean", mean), ("variance", variance)):
            array = np.array(value, np.float64, ndmin=1)
            array.flags.writeable = False
            put(self, name, array)
        if self.mean.ndim != 1 or self.mean.shape != self.variance.shape or not self.mean.size:
            raise InvalidValue(
                f"averages: mean {self.mean.shape} and variance {self.variance.shape} must both have shape (channels,)"
            )
        finite = np.isfinite(self.mean).all() and np.isfinite(self.variance).all() and np.isfinite(self.keep)
        if not finite or self.n < 0 or self.keep < 0 or (self.variance < 0).any():
            raise InvalidValue(f"averages of {self.n} numbers: not finite, or negative")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Updates is immutable; {name} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return Updates, (self.n, self.keep, self.mean, self.variance)

    @property
    def channels(self) -> int:
        """C."""
        return self.mean.size

    def merge(self, other: Updates) -> Updates:
        """This run of batches, then the other."""
        if self.channels != other.channels:
            raise InvalidValue(f"averages of {self.channels} and of {other.channels} channels do not merge")
        if not self.n or not other.n:
            return self if self.n else other
        mean, variance = (
            other.keep * before + after for before, after in ((self.mean, other.mean), (self.variance, other.variance))
        )
        return Updates(self.n + other.n, self.keep * other.keep, mean, variance)

    def to_bytes(self) -> bytes:
        """A little-endian image with a checksum: the same bits on every machine. For checkpoints and the wire."""
        data = struct.pack("<qqd", self.n, self.channels, self.keep)
        data += b"".join(array.astype("<f8").tobytes() for array in (self.mean, self.variance))
        return _MAGIC + data + struct.pack("<I", zlib.crc32(data))

    @classmethod
    def from_bytes(cls, data: bytes) -> Updates:
        """The value that `to_bytes` wrote. Raises FormatError for anything else."""
        head = len(_MAGIC) + 24
        if len(data) < head + 4 or data[: len(_MAGIC)] != _MAGIC:
            raise FormatError("not stored averages: the first bytes are not theirs")
        n, channels, keep = struct.unpack_from("<qqd", data, len(_MAGIC))
        if not 0 < channels <= len(data) or len(data) != head + 16 * channels + 4:
            raise FormatError(f"stored averages of {channels} channels cannot be {len(data)} bytes long")
        if zlib.crc32(data[len(_MAGIC) : -4]) != struct.unpack("<I", data[-4:])[0]:
            raise FormatError("stored averages are damaged: the checksum does not fit")
        mean, variance = np.frombuffer(data, "<f8", 2 * channels, head).reshape(2, channels)
        return cls(n, keep, mean, variance)

    def __repr__(self) -> str:
        return f"Updates(n={self.n}, keep={self.keep}, {self.channels} channels)"


class UpdatesTree(FixedTree[Updates]):
    """Runs of batches merged in the fixed tree over the batches' numbers."""

    __slots__ = ()
    kind = Updates
