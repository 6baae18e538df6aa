"""The numbers of one BatchNorm record of a Caffe net: what its blobs mean, read when they are asked for."""

from __future__ import annotations

import math
import struct

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.containers.tensor import Tensor
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    from bnport.adapters.caffe.blob import Blob
    from bnport.adapters.caffe.net import Node
    from bnport.record import Array

_CODES = {"float32": "f", "float64": "d"}  # struct's


class Choices(NamedTuple):
    """What the user decided where files do not: the options of `read`, checked."""

    stat: str | None = None
    blob_order: str | None = None
    allow_untrained: bool = False


class Held(NamedTuple):
    """One record of a net: its name, the nodes that it is made of, and the blob of each field.

    fields: of gamma, beta, mean, variance, factor: the blob.
    form:   "scaled" (mean and variance multiplied by factor), "plain", "inverse-std", "affine" (folded: no
            statistics needed) or "learning" (no statistics stored).
    """

    name: str
    node: Node
    tail: tuple[Node, ...]
    fields: dict[str, Blob]
    form: str
    channels: int


def listed_tensors(path: str, held: Held, choices: Choices) -> dict[str, Tensor] | None:
    """The four fields as tensors that need no numpy to be read, for a listing; None where one is not that simple."""
    simple = held.form in ("plain", "scaled") and all(
        blob.tensor.dtype in _CODES and blob.count == (1 if field == "factor" else held.channels)
        for field, blob in held.fields.items()
    )
    if not simple:
        return None
    tensors = {field: blob.tensor for field, blob in held.fields.items() if field != "factor"}
    if held.form == "scaled":
        for field in ("mean", "variance"):
            tensors[field] = _quotient(path, held, field, choices)
    return tensors


def _quotient(path: str, held: Held, field: str, choices: Choices) -> Tensor:
    """mean or variance as float64: the stored sum divided by the factor."""
    stored = held.fields[field].tensor

    def read() -> bytes:
        factor = _factor(path, held, choices)
        numbers = struct.unpack(f"<{stored.size}{_CODES[stored.dtype]}", stored.read())
        return struct.pack(f"<{stored.size}d", *(n / factor if factor else 0.0 for n in numbers))

    return Tensor(f"{stored.name} / factor", "float64", stored.shape, read)


def _factor(path: str, held: Held, choices: Choices) -> float:
    """The scale factor, if there are statistics to divide by it."""
    tensor = held.fields["factor"].tensor
    (factor,) = struct.unpack(f"<{_CODES.get(tensor.dtype, 'e')}", tensor.read())
    if next(iter(held.fields)) == "gamma" and factor != 1:
        raise InvalidValue(f"fifth blob {factor!r} in {printable(path)}; legacy DIGITS files hold 1 there")
    if not math.isfinite(factor) or factor < 0:
        raise InvalidValue(f"scale factor {factor!r} in {printable(path)}; a finite number above 0 was expected")
    if factor == 0 and not choices.allow_untrained:
        raise InvalidValue(
            f"scale factor 0 in {printable(path)}: the layer never saw data and holds no statistics."
            " --allow-untrained (of a target: --target-option allow-untrained) reads it as Caffe does, mean and variance 0"
        )
    return float(factor)


def narrowest(held: Held) -> str:
    """The dtype that every blob can hold: what a change must be rounded to before it is written."""
    order = ("float16", "float32", "float64")
    return min((blob.tensor.dtype for field, blob in held.fields.items() if field != "factor"), key=order.index)


def load(path: str, held: Held, choices: Choices) -> dict[str, Array]:
    """The fields as Caffe means them, shape (C,): float64 where a division took part, else as stored.

    Raises InvalidValue for a factor or a 1/std that is none.
    """
    arrays: dict[str, Array] = {}
    for field in ("gamma", "beta", "mean", "variance"):
        if field in held.fields:
            array = held.fields[field].tensor.array()
            arrays[field] = array if array.size == held.channels else np.repeat(array, held.channels)
    if held.form == "affine":
        dtype = arrays["gamma"].dtype
        arrays.update(mean=np.zeros(held.channels, dtype), variance=np.ones(held.channels, dtype))
    elif held.form == "inverse-std":
        arrays["variance"] = _from_inverse_std(path, arrays["variance"])
    elif held.form == "scaled":
        factor = _factor(path, held, choices)
        for field in ("mean", "variance"):
            if factor == 0:
                arrays[field] = np.zeros_like(arrays[field])
            elif factor != 1:
                arrays[field] = arrays[field].astype(np.float64) / factor
    return arrays


def _from_inverse_std(path: str, stored: Array) -> Array:
    bad = ~(np.isfinite(stored) & (stored > 0))
    if bad.any():
        at = int(np.argmax(bad))
        raise InvalidValue(
            f"1/std of channel {at} in {printable(path)} is {stored[at]!r}; a positive number was expected"
        )
    squared: Array = stored.astype(np.float64) ** -2.0
    return squared
