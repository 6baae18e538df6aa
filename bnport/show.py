"""What a source's BatchNorm layers hold, at a glance, and what looks unhealthy about them.

Ranges of tensors that are a field as they lie in the file are taken without numpy (array.array's min and max), which
keeps a listing near the interpreter's own start-up.
"""

from __future__ import annotations

import sys

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.errors import BnportError
from bnport.record import FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnport.layer import Layer

_TYPE_CODES = {"float32": "f", "float64": "d"}


class Range(NamedTuple):
    """The smallest and largest finite value of a field, and how many values there are of each troubling kind."""

    low: float
    high: float
    not_finite: int = 0
    zero: int = 0
    one: int = 0
    negative: int = 0  # counted for a variance only
    size: int = 0


class Summary(NamedTuple):
    """One layer for a listing. `ranges` is empty where no values were read; `warnings` say what looks unhealthy."""

    layer: Layer
    ranges: dict[str, Range]
    warnings: tuple[str, ...]


def summarise(layer: Layer, *, values: bool = True) -> Summary:
    """The ranges and health warnings of one layer; with `values=False` no tensor is read.

    A layer whose numbers cannot be read becomes a warning, so that the rest of the listing still comes.
    """
    notes = (*layer.notes, *((layer.question,) if layer.question else ()))
    if not values:
        return Summary(layer, {}, notes)
    try:
        ranges = _ranges(layer)
    except BnportError as error:
        return Summary(layer, {}, (*notes, str(error)))
    without = (layer.without,) if layer.without else ()
    return Summary(layer, ranges, (*notes, *without, *_health(layer, ranges)))


def _ranges(layer: Layer) -> dict[str, Range]:
    tensors = layer.tensors
    if tensors is not None and sys.byteorder == "little" and all(t.dtype in _TYPE_CODES for t in tensors.values()):
        from array import array

        found = {}
        for field, tensor in tensors.items():
            numbers = array(_TYPE_CODES[tensor.dtype])
            numbers.frombytes(tensor.read())
            found[field] = _range_of(field, numbers)
        return found
    return {
        field: _range_of(field, array.ravel().tolist()) for field, array in layer.arrays().items() if field in FIELDS
    }


def _range_of(field: str, numbers: Sequence[float]) -> Range:
    total = sum(numbers) if numbers else 0.0
    finite: Sequence[float] = numbers
    if total - total != 0:  # NaN or infinity somewhere, or a sum that overflows
        finite = [n for n in numbers if n - n == 0]
    low, high = (min(finite), max(finite)) if finite else (float("nan"), float("nan"))
    return Range(
        low,
        high,
        not_finite=len(numbers) - len(finite),
        zero=numbers.count(0.0) if low <= 0 <= high else 0,
        one=numbers.count(1.0) if low <= 1 <= high else 0,
        negative=sum(n < 0 for n in finite) if field == "variance" and low < 0 else 0,
        size=len(numbers),
    )


def _health(layer: Layer, ranges: dict[str, Range]) -> list[str]:
    warnings = []
    for field, found in ranges.items():
        if found.not_finite:
            warnings.append(f"{field}: {found.not_finite} of {found.size} values are NaN or infinite")
    mean, variance, gamma = (ranges.get(field) for field in ("mean", "variance", "gamma"))
    if variance and mean:
        if mean.zero == mean.size and variance.one == variance.size and not layer.untrained:
            warnings.append("untrained: mean is 0 and variance is 1 in every channel")
        if layer.question:
            pass  # what follows depends on epsilon
        elif variance.low + layer.epsilon <= 0:
            warnings.append(f"variance {variance.low:.3g} + epsilon {layer.epsilon!r} is not positive")
        elif variance.negative:
            warnings.append(f"{variance.negative} negative variances (legal: variance + epsilon is positive)")
        elif variance.high < layer.epsilon / 10 and variance.size:
            warnings.append(
                f"every variance is far below epsilon {layer.epsilon!r}: epsilon decides this layer's scale"
            )
    if gamma and gamma.zero:
        warnings.append(f"{gamma.zero} of {gamma.size} channels are dead (gamma is 0)")
    return warnings
