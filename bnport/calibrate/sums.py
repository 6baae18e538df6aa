"""Sums and sums of squares per channel, fast and without cancellation: the inner loops under moments.py.

How: an array of shape (..., C) is taken in pieces that stay in the processor's cache. Each piece is widened into one
preallocated buffer, a shift near the mean is subtracted, and whole rows are added up. Narrow channels are as fast as
wide ones because t = WIDTH // C rows are treated as one row of t*C columns ("tiles"), folded at the very end. Where numba
is installed, much data get the same bits from compiled.py.

Why numpy's add.reduce over the first axis and not a BLAS product with ones (10 % faster): it is one IEEE addition per
element in a fixed order, so the bits do not depend on the number of threads, the BLAS library or the processor.

Why one buffer per thread, kept: temporaries above 128 kB run four times slower where glibc's mmap threshold is frozen
(Dask sets MALLOC_TRIM_THRESHOLD_ in its workers), because each one is mapped and faulted in anew.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.calibrate import compiled
from bnport.calibrate.executors import cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import ThreadPoolExecutor
    from typing import Any, TypeVar

    from bnport.record import Array

    Result = TypeVar("Result")

WIDTH = 768  # columns of a tiled float64 row: 6 kB, so that the running sums stay in the first-level cache
LONG = 6144  # elements of the tiled shift: subtracting it in such long rows takes half the time of rows of WIDTH
PIECE = 65536  # float64 elements of a piece: 512 kB, within a second-level cache
CHUNK = 8192  # elements of a row added up in one go: of more, numpy's order depends on its version
INTEGER_WIDTH = 3072  # columns of a tiled float32 row: 12 kB; with half as many, everything takes a tenth longer
FLUSH = 128  # pieces, or parts, added up before they join the total: the error grows with FLUSH + n / FLUSH
SPLIT = 1 << 21  # elements of a part that one thread takes; fixed, so that the number of threads changes no bit
PLANE = 32  # at least so many contiguous elements per channel make summing along planes worth it

_kept = threading.local()


def scratch(elements: int, dtype: Any) -> Array:
    """A flat buffer of this thread with at least `elements` of `dtype`; its contents are whatever was there."""
    buffers: dict[Any, Array] = _kept.__dict__.setdefault("buffers", {})
    kind = np.dtype(dtype)  # with its byte order
    buffer = buffers.get(kind)
    if buffer is None or buffer.size < elements:
        buffer = buffers[kind] = np.empty(elements, kind)
    return buffer[:elements]


def pieces(array: Array, limit: int) -> Iterator[Array]:
    """Views of `array`, shape (..., C), that cover it in order, each of at most max(limit, C) elements. Copies nothing."""
    if array.size <= limit or array.ndim == 1:
        if array.size:
            yield array
        return
    if array.flags.c_contiguous and array.ndim > 2:
        array = array.reshape(-1, array.shape[-1])
    each = array[0].size
    if each <= limit:
        step = limit // each
        for start in range(0, len(array), step):
            yield array[start : start + step]
    else:
        for item in array:
            yield from pieces(item, limit)


def _tiles(channels: int, width: int) -> int:
    return max(1, width // channels)


def shifted_sums(array: Array, shift: Array) -> tuple[Array, Array]:
    """Sum of d and of d*d per channel for d = array - shift, in float64; array (..., C) of any float dtype, shift (C,)."""
    channels = array.shape[-1]
    tiles = _tiles(channels, WIDTH)
    columns = tiles * channels
    wide = np.tile(shift, tiles * max(1, LONG // columns))
    rows = max(1, PIECE // wide.size) * wide.size // columns
    far, near, row = np.zeros((3, 2, columns))
    if (taken := compiled.taken(array, compiled.FLOATS)) is not None:
        loops, x = taken
        loops.shifted_rows(x, wide[:columns], rows * columns, FLUSH, far, near, row)
    else:
        _add_rows(array, wide, rows, far, near, row[0])
    total, squares = far.reshape(2, tiles, channels).sum(axis=1)
    return total, squares


def _add_rows(array: Array, wide: Array, rows: int, far: Array, near: Array, row: Array) -> None:
    """Add the sums of d = array - wide to far[0] and of d*d to far[1]; wide is the shift of whole rows of row.size."""
    columns = row.size
    buffer = scratch(min(rows * columns, _filled(array.size, wide.size)), np.float64)
    for index, piece in enumerate(pieces(array, rows * columns), 1):
        flat = buffer[: _filled(piece.size, wide.size)]
        np.copyto(flat[: piece.size].reshape(piece.shape), piece, casting="unsafe")
        long = flat.reshape(-1, wide.size)
        long -= wide
        flat[piece.size :] = 0  # what fills up the last row adds nothing
        block = flat.reshape(-1, columns)
        near[0] += np.add.reduce(block, axis=0, out=row)
        np.multiply(flat, flat, out=flat)
        near[1] += np.add.reduce(block, axis=0, out=row)
        if index % FLUSH == 0:
            far += near
            near[:] = 0
    far += near


def _filled(size: int, row: int) -> int:
    """`size`, rounded up to whole rows."""
    return -(-size // row) * row


def shifted_plane_sums(array: Array, shift: Array) -> tuple[Array, Array]:
    """The same for an array of shape (N, C, inner) whose `inner` is contiguous: channels-first activations."""
    _, channels, inner = array.shape
    step = min(inner, PIECE)
    group = max(1, min(channels, PIECE // step))
    buffer = scratch(group * step, np.float64)
    near, far = np.zeros((2, 2, channels))
    for index, item in enumerate(array, 1):
        for first in range(0, channels, group):
            for start in range(0, inner, step):
                part = item[first : first + group, start : start + step]
                block = buffer[: part.size].reshape(part.shape)
                np.copyto(block, part, casting="unsafe")
                block -= shift[first : first + group, None]
                near[0, first : first + group] += _row_sums(block)
                np.multiply(block, block, out=block)
                near[1, first : first + group] += _row_sums(block)
        if index % FLUSH == 0:
            far += near
            near[:] = 0
    far += near
    return far[0], far[1]


def _row_sums(block: Array) -> Array:
    """The sum of each row of a contiguous (rows, width), CHUNK elements at a time."""
    rows, width = block.shape
    if width <= CHUNK:
        return np.add.reduce(block, axis=1)  # type: ignore[no-any-return]
    whole = width - width % CHUNK
    total: Array = np.add.reduce(np.add.reduce(block[:, :whole].reshape(rows, -1, CHUNK), axis=2), axis=1)
    if whole < width:
        total += np.add.reduce(block[:, whole:], axis=1)
    return total


def in_parts(
    function: Callable[[Array, Array], tuple[Array, Array]], array: Array, shift: Array
) -> tuple[Array, Array]:
    """function(array, shift) by parts of about SPLIT elements along the first axis, in threads, added up in order."""

    def part(array: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore", invalid="ignore"):  # a thread has its own; the result is checked
            return function(array, shift)

    near, far = np.zeros((2, 2, shift.size))
    for index, (total, squares) in enumerate(_in_threads(part, array, rows=function is shifted_sums), 1):
        near += total, squares
        if index % FLUSH == 0:
            far += near
            near[:] = 0
    far += near
    return far[0], far[1]


def _in_threads(function: Callable[[Array], Result], array: Array, rows: bool) -> Iterator[Result]:
    """function(part) for parts of about SPLIT elements, in order; `rows`: all axes but the last may become one."""
    if array.flags.c_contiguous and rows:
        array = array.reshape(-1, array.shape[-1])
    array = array[None] if array.ndim == 1 else array
    step = max(1, SPLIT // max(1, array[0].size))
    parts = [array[start : start + step] for start in range(0, len(array), step)]
    count = min(threads(), len(parts))
    return map(function, parts) if count < 2 else _pool(threads()).map(function, parts)


def threads() -> int:
    """The processors that this process may use, or OMP_NUM_THREADS where that is set (Dask and Ray set it to 1)."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said)
    return cores()


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)  # a forked child has none of its parent's threads
    if key not in _pools:
        from concurrent.futures import ThreadPoolExecutor

        _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="bnport-moments")
    return _pools[key]


def integer_sums(array: Array, bound: int) -> tuple[list[int], list[int]]:
    """Exact sum and sum of squares per channel of integers of magnitude <= bound <= 2**21; array (..., C); in threads.

    Every partial sum is an integer that the buffer's float type holds exactly (below 2**24 in float32 for bytes, below
    2**53 in float64 for the rest), so no addition rounds, in whatever order; totals are int64, then Python integers.
    """
    channels = array.shape[-1]
    total, squares = [0] * channels, [0] * channels
    for t, q in _in_threads(lambda part: _integer_sums(part, bound), array, rows=True):
        total = [a + b for a, b in zip(total, t, strict=True)]
        squares = [a + b for a, b in zip(squares, q, strict=True)]
    return total, squares


def _integer_sums(array: Array, bound: int) -> tuple[list[int], list[int]]:
    channels = array.shape[-1]
    taken = compiled.taken(array, compiled.INTEGERS)
    if taken is not None and array.size * bound * bound < 1 << 63:
        loops, x = taken
        sums = np.zeros((2, _tiles(channels, WIDTH) * channels), np.int64)
        loops.integer_rows(x, *sums, np.int64(0))
        total, squares = sums.reshape(2, -1, channels).sum(axis=1).tolist()
        return total, squares
    small = bound <= 255
    dtype, exact = (np.float32, 1 << 24) if small else (np.float64, 1 << 53)
    tiles = _tiles(channels, INTEGER_WIDTH if small else WIDTH)
    high = 256 if small else max(1, PIECE // (tiles * channels))
    if high * bound * bound >= exact:
        raise ValueError(f"{high} rows of magnitude {bound} do not fit")
    # flush * high * tiles * bound**2 < 2**63: 2**9 * 2**19.6 * 2**16, and 2**3 * 2**16 * 2**42
    flush = 512 if small else 8
    columns = tiles * channels
    buffer = scratch(high * columns, dtype)
    row = np.empty(columns, dtype)
    sums = np.zeros((2, columns), np.int64)
    totals = np.zeros((2, channels), object)
    for index, piece in enumerate(pieces(array, high * columns), 1):
        flat = buffer[: _filled(piece.size, columns)]
        flat[piece.size :] = 0  # the last row is filled up: as one column, its rows could be too many for exact sums
        np.copyto(flat[: piece.size].reshape(piece.shape), piece, casting="unsafe")
        block = flat.reshape(-1, columns)
        sums[0] += np.add.reduce(block, axis=0, out=row).astype(np.int64)
        np.multiply(block, block, out=block)
        sums[1] += np.add.reduce(block, axis=0, out=row).astype(np.int64)
        if index % flush == 0:
            totals += sums.reshape(2, tiles, channels).sum(axis=1)
            sums[:] = 0
    totals += sums.reshape(2, tiles, channels).sum(axis=1)
    return [int(v) for v in totals[0]], [int(v) for v in totals[1]]
