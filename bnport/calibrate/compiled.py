"""The inner loops of sums.py compiled by numba, where that is installed (the extra `numba`): faster, and the same bits.

`shifted_rows` adds what `sums.shifted_sums` adds, in the same order, one IEEE operation each: no sums are regrouped and no
product is fused with an addition (numba does neither unless it is told to). So whether numba is there, and from which
array on it is used, changes no bit of any result; tests/calibrate/test_compiled.py holds both ways against each other.
`integer_rows` gives exact integers, which have no order.

Why it is faster: numpy makes a pass through the cache for each of widening, subtracting, adding up, squaring and adding up
again. Here a number is loaded once, and four rows are added while the running sums are in registers.

numba is loaded once this process has summed AFTER bytes: importing and compiling take about as long (1.3 s) as summing
these did, so what is small never waits for it, and no run takes twice as long as the better way. Nothing is cached on disk.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

from bnport._lazy import NamedTuple, np

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.record import Array

AFTER = 4 << 30


class Kernels(NamedTuple):
    """`shifted_rows` and `integer_rows`, compiled; they let other threads run."""

    shifted_rows: Callable[..., None]
    integer_rows: Callable[..., None]


def shifted_rows(x: Array, shift: Array, piece: int, flush: int, far: Array, near: Array, row: Array) -> None:
    """Add the sums of d = x - shift to far[0] and those of d*d to far[1], per column; x is flat, rows of shift.size.

    x: float32 or float64; shift: (columns,), float64; far, near, row: (2, columns), float64, zeros at first.
    `piece` elements, whole rows, are added up before they join `near`, and `flush` pieces before those join `far`.
    """
    columns = shift.size
    total, squares = row[0], row[1]
    start, index = 0, 0
    while start < x.size:
        stop = min(x.size, start + piece)
        row[:] = 0.0
        while start + 4 * columns <= stop:
            one, two = x[start : start + columns], x[start + columns : start + 2 * columns]
            three, four = x[start + 2 * columns : start + 3 * columns], x[start + 3 * columns : start + 4 * columns]
            for j in range(columns):
                a, b, c, d = one[j] - shift[j], two[j] - shift[j], three[j] - shift[j], four[j] - shift[j]
                total[j] = (((total[j] + a) + b) + c) + d
                squares[j] = (((squares[j] + a * a) + b * b) + c * c) + d * d
            start += 4 * columns
        while start < stop:
            rest = x[start : min(stop, start + columns)]
            for j in range(rest.size):
                a = rest[j] - shift[j]
                total[j] += a
                squares[j] += a * a
            start += rest.size
        near += row
        index += 1
        if index % flush == 0:
            far += near
            near[:] = 0.0
    far += near


def integer_rows(x: Array, total: Array, squares: Array, zero: int) -> None:
    """Add the sums of x to `total` and those of x*x to `squares`, per column; x is flat, rows of total.size.

    total, squares: (columns,), int64, which the sums must not leave. zero: an int64 0; added to, a number is widened.
    """
    columns = total.size
    start = 0
    while start + 4 * columns <= x.size:
        one, two = x[start : start + columns], x[start + columns : start + 2 * columns]
        three, four = x[start + 2 * columns : start + 3 * columns], x[start + 3 * columns : start + 4 * columns]
        for j in range(columns):
            a, b, c, d = one[j] + zero, two[j] + zero, three[j] + zero, four[j] + zero
            total[j] += a + b + c + d
            squares[j] += a * a + b * b + c * c + d * d
        start += 4 * columns
    rest = x[start:]
    for j in range(rest.size):
        a = rest[j] + zero
        total[j % columns] += a
        squares[j % columns] += a * a


FLOATS, INTEGERS = "fd", "bBhHiIl"  # numpy's letters for float32 and 64, and for integers that an int64 holds


def flat(array: Array, kinds: str) -> Array | None:
    """`array` as a flat read-only view that the kernels take, if it is contiguous, native and of one of the kinds."""
    flags, dtype = array.flags, array.dtype
    if not (flags.c_contiguous and flags.aligned and dtype.isnative and dtype.char in kinds):
        return None
    # a memory map would be another type to numba, and an array that may be written to, each to be compiled for anew
    view: Array = array.reshape(-1).view(np.ndarray)
    view.flags.writeable = False
    return view


_loading = threading.Lock()
_loaded: list[Kernels | None] = []  # empty until it was tried
_summed = 0


def kernels(size: int) -> Kernels | None:
    """The compiled loops, or None: numba is not installed, or not worth loading yet. `size` bytes are about to be summed."""
    global _summed
    if _loaded:
        return _loaded[0]
    _summed += size  # where two threads count at once, one may be forgotten
    if _summed >= AFTER and _loading.acquire(blocking=False):  # the others go on without
        try:
            use(True)
        finally:
            _loading.release()
    return _loaded[0] if _loaded else None


def taken(array: Array, kinds: str) -> tuple[Kernels, Array] | None:
    """The compiled loops and the `array` about to be summed as they take it; None where either is not to be had."""
    loops = kernels(array.nbytes)
    x = None if loops is None else flat(array, kinds)
    return None if loops is None or x is None else (loops, x)


def use(wanted: bool) -> bool:
    """Load the compiled loops now, or do without them from now on, however much is summed; whether they are there."""
    _loaded[:] = [_compiled() if wanted else None]
    return _loaded[0] is not None


@functools.cache
def _compiled() -> Kernels | None:
    try:
        from numba import config, njit
    except (ImportError, OSError):  # not installed, or not for this numpy
        return None
    if config.DISABLE_JIT:  # NUMBA_DISABLE_JIT=1: the loops would run as Python
        return None
    made = Kernels(njit(nogil=True)(shifted_rows), njit(nogil=True)(integer_rows))
    made.shifted_rows(flat(np.zeros(1, np.float32), FLOATS), np.zeros(1), 1, 1, *np.zeros((3, 2, 1)))
    made.integer_rows(flat(np.zeros(1, np.uint8), INTEGERS), *np.zeros((2, 1), np.int64), np.int64(0))
    return made
