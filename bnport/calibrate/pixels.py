"""Arrays of pixels, summed exactly, and what number their pixels are multiplied by.

    dtype           scale       why
    uint8           1/255       0 ... 255, as in image files
    uint16          1/65535     0 ... 65535, as in 16-bit image files
    bool            1           0 and 1 already
    other integers  asked       an int32 may hold bytes, 16-bit pixels or labels: nothing in it says which
    floats          refused     their sums round; moments.moments takes them, as they are

Byte order is no part of it: a big-endian uint16 is a uint16.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.calibrate.moments import ExactMoments, exact_moments
from bnport.calibrate.sources import to_numpy
from bnport.errors import BnportError, InvalidValue, Question, printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from bnport.calibrate.executors import Progress
    from bnport.record import Array

SCALES = {"bool": Fraction(1), "uint8": Fraction(1, 255), "uint16": Fraction(1, 65535)}
AT_ONCE = 64 << 20  # bytes of rows that are read from a file and summed together


class Pixels(NamedTuple):
    """The exact sums of some images, and what is known about their pixels."""

    images: int
    exact: ExactMoments
    dtype: str
    scale: Fraction


def of_rows(
    source: Any, axis: int | None, scale: Fraction | None, name: str, progress: Progress | None = None
) -> Pixels:
    """Sums of one array (N, H, W, C), or of any shape with `axis`: numpy's, a tensor, or rows that are read as needed."""
    rows = _rows(source, name)
    shape, dtype = tuple(rows.shape), np.dtype(rows.dtype)
    if dtype.kind not in "iub":
        raise InvalidValue(
            f"{name}: expected pixels as integers (uint8), got {dtype}; for floats:"
            " 'from bnport.calibrate.moments import moments'"
        )
    if axis is None:
        if len(shape) != 4 or not 1 <= shape[-1] <= 4:
            raise Question(
                f"{name}: shape {shape}: which axis are the channels? Give axis, or reshape to (images, height, width,"
                " channels): x[..., None] for grey images, x[None] for a single one"
            )
        axis = 3
    if not -len(shape) <= axis < len(shape):
        raise InvalidValue(f"{name}: shape {shape} has no axis {axis}")
    if 0 in shape:
        raise InvalidValue(f"{name}: shape {shape} holds no pixels")
    axis %= len(shape)
    factor = _scale(dtype, scale, name)
    step = max(1, AT_ONCE // max(1, dtype.itemsize * int(np.prod(shape[1:], dtype=object)))) if axis else shape[0]
    total = ExactMoments(0, [0] * shape[axis], [0] * shape[axis])
    for start in range(0, shape[0], step):
        total = total.merge(exact_moments(np.asarray(rows[start : start + step]), axis))
        if progress:
            progress(min(start + step, shape[0]), shape[0], "images")
    return Pixels(shape[0] if axis else 1, total, dtype.name, factor)


def of_arrays(
    arrays: Iterable[Any], axis: int | None, scale: Fraction | None, progress: Progress | None = None
) -> Pixels:
    """Sums of images (H, W, C), one array or tensor each, or with the channels on another `axis` of the three.

    Without a `scale` all must be of dtypes that share one.
    """
    if axis is not None and not -3 <= axis < 3:
        raise InvalidValue(f"axis {axis}: an image has three axes, (height, width, channels)")
    found: Pixels | None = None
    for number, image in enumerate(arrays):
        name = f"image {number}"
        array = _converted(image, name)
        if array.ndim != 3 or array.dtype.kind not in "iub":
            raise InvalidValue(f"{name}: expected integers (height, width, channels), got {array.dtype} {array.shape}")
        if axis is None and not 1 <= array.shape[-1] <= 4:
            raise Question(
                f"{name}: shape {array.shape}: which axis are the channels? Give axis: 0 for channels first, -1 for last"
            )
        dtype, factor = array.dtype.name, _scale(array.dtype, scale, name)
        if not array.size:
            raise InvalidValue(f"{name}: shape {array.shape} holds no pixels")
        exact = exact_moments(array, -1 if axis is None else axis)
        if progress:
            progress(number + 1, 0, "images")
        if found is None:
            found = Pixels(1, exact, dtype, factor)
            continue
        if found.exact.channels != exact.channels:
            raise InvalidValue(f"{name}: {exact.channels} channels, those before it have {found.exact.channels}")
        if factor != found.scale:
            raise InvalidValue(
                f"{name}: {dtype} pixels, scaled by {factor}; those before it are {found.dtype}, scaled by"
                f" {found.scale}. Bring them to one dtype, or give the scale of all"
            )
        dtypes = found.dtype if dtype in found.dtype.split(", ") else f"{found.dtype}, {dtype}"
        found = Pixels(number + 1, found.exact.merge(exact), dtypes, factor)
    if found is None:
        raise InvalidValue("no images: there is nothing to take a mean of")
    return found


def _rows(source: Any, name: str) -> Any:
    """What can be sliced and has a numpy dtype: `source` itself, so that a file is read as needed; or all of a tensor."""
    if not isinstance(source, np.ndarray):
        try:
            np.dtype(source.dtype)
        except TypeError:
            return _converted(source, name)
        return source
    return _converted(source, name)


def _converted(value: Any, name: str) -> Array:
    if type(value) is np.ndarray:  # as it is: to ask whether it is masked would import numpy.ma, 7 ms of a first call
        return value
    try:
        return to_numpy(value)
    except BnportError as error:
        raise type(error)(f"{name}: {error}") from None
    except Exception as error:  # each framework has its own for tensors without numbers (symbolic, sparse, ragged)
        kind = type(value).__name__
        raise InvalidValue(f"{name}: a {printable(kind)} is not an array: {printable(error, 120)}") from None


def _scale(dtype: Any, scale: Fraction | None, name: str) -> Fraction:
    if scale is not None:
        return scale
    if dtype.name not in SCALES:
        raise Question(
            f"{name}: {dtype.name} pixels: what are they scaled by? Give scale (--scale): 1/255 for 0 ... 255, 1/65535"
            " for 0 ... 65535, 1 for as they are"
        )
    return SCALES[dtype.name]
