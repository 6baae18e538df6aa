"""One blob of a Caffe layer: what BlobProto and an HDF5 dataset say of it, and where its numbers lie.

Field numbers: BVLC/caffe src/caffe/proto/caffe.proto, message BlobProto; 10 to 13 are NVIDIA/caffe's. Which shape and
which data win where several are given: src/caffe/blob.cpp, Blob::FromProto.
"""

from __future__ import annotations

import math

from bnport._lazy import TYPE_CHECKING
from bnport.containers.protobuf import LENGTH, VARINT, Numbers, fields, signed, varints
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from bnport.containers.hdf5 import H5Tensor
    from bnport.containers.protobuf import Buffer, Span

_LEGACY = {1: 0, 2: 1, 3: 2, 4: 3}  # num, channels, height, width
_DATA, _SHAPE, _DOUBLE_DATA, _RAW_TYPE, _RAW_DATA = 5, 7, 8, 10, 12
_RAW_TYPES = {0: "float64", 1: "float32", 2: "float16"}  # NVIDIA/caffe enum Type; 3 to 5 are integers and bool
MOST_FIELDS = 1 << 20  # walked per file: a second; an unpacked number is a field each
_MOST_AXES = 32  # kMaxBlobAxes


class Blob:
    """shape; `tensor`: its numbers, flat; `places`: where they lie in the file, or None where they cannot be replaced."""

    __slots__ = ("places", "shape", "tensor")

    def __init__(self, shape: tuple[int, ...], tensor: Tensor, places: list[Span] | None) -> None:
        self.shape, self.tensor, self.places = shape, tensor, places

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return self.tensor.size

    @property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than 1; Caffe before 2014 stored a vector as 1x1x1xC or 1xCx1x1."""
        return sum(length != 1 for length in self.shape) <= 1


class Budget:
    """How many fields may still be walked in one file."""

    __slots__ = ("left", "most")

    def __init__(self, most: int = MOST_FIELDS) -> None:
        self.most = self.left = most

    def take(self, buffer: Buffer, where: int) -> None:
        """One more; FormatError past the limit."""
        self.left -= 1
        if self.left < 0:
            raise buffer.error(where, f"more than {self.most} fields; no model has so many")


def from_message(buffer: Buffer, span: Span, what: str, budget: Budget) -> Blob:
    """The blob of one BlobProto; its shape is held against the numbers that are there, and nothing is allocated."""
    data, double_data = Numbers(buffer, 4), Numbers(buffer, 8)
    raw_type: int | None = None
    raw: Span | None = None
    legacy: dict[int, int] = {}
    shape: list[int] = []
    for number, wire, value in fields(buffer, span[0], span[0] + span[1], 2):
        budget.take(buffer, span[0])
        if number == _DATA:
            data.add(wire, value)
        elif number == _DOUBLE_DATA:
            double_data.add(wire, value)
        elif number in _LEGACY:
            legacy[_LEGACY[number]] = signed(_integer(buffer, span, what, number, wire, value), 32)
        elif number == _SHAPE:
            if wire != LENGTH or isinstance(value, int):
                raise buffer.error(span[0], f"{what}: its shape is no message")
            for inner, inner_wire, dims in fields(buffer, value[0], value[0] + value[1], 3):
                budget.take(buffer, span[0])
                if inner == 1:
                    shape += varints(buffer, inner_wire, dims, _MOST_AXES)
        elif number == _RAW_TYPE:
            raw_type = _integer(buffer, span, what, number, wire, value)
        elif number == _RAW_DATA:
            if wire != LENGTH or isinstance(value, int):
                raise buffer.error(span[0], f"{what}: its raw_data is no bytes")
            raw = value
    if legacy:  # any of the four makes all four count, whatever `shape` says
        shape = [legacy.get(axis, 0) for axis in range(4)]
    dims_ = _checked(buffer, span, what, shape)
    count = math.prod(dims_)
    if double_data.nbytes or data.nbytes or raw is None or not raw[1]:
        numbers, dtype = (double_data, "float64") if double_data.nbytes else (data, "float32")
        held, read, places = numbers.count, numbers.read, numbers.places
    else:
        dtype = _raw_dtype(buffer, raw, what, raw_type, count)
        held, whole = raw[1] // ITEM_SIZE[dtype], raw

        def read() -> bytes:
            return buffer.read(whole, what)

        def places():  # type: ignore[no-untyped-def]
            return iter([whole])

    if held != count:
        raise buffer.error(span[0], f"{what}: shape {dims_} needs {count} numbers, {held} are there")
    return Blob(dims_, Tensor(what, dtype, (count,), read), list(places()))


def kernel_shape(buffer: Buffer, span: Span, what: str) -> tuple[int, ...] | None:
    """The shape of a large blob, or None where its numbers are unpacked: walking those costs more than it is worth."""
    small = Budget(1000)
    try:
        blob = from_message(buffer, span, what, small)
    except FormatError:
        if small.left < 0:
            return None
        raise
    return blob.shape


def from_hdf5(path: str, tensor: H5Tensor) -> Blob:
    """The blob of a dataset /data/<layer>/<index>."""
    flat = Tensor(tensor.name, tensor.dtype, (tensor.size,), tensor.read)
    if tensor.dtype not in ("float64", "float32", "float16"):
        raise FormatError(
            f"{printable(path)}: {printable(tensor.name)}: holds {tensor.dtype}, floating-point numbers were expected"
        )
    places = None if tensor.offset is None else [(tensor.offset, tensor.nbytes)]
    return Blob(tensor.shape, flat, places)


def _integer(buffer: Buffer, span: Span, what: str, number: int, wire: int, value: object) -> int:
    if wire != VARINT or not isinstance(value, int):
        raise buffer.error(span[0], f"{what}: field {number} should be an integer, it has wire type {wire}")
    return value


def _checked(buffer: Buffer, span: Span, what: str, shape: list[int]) -> tuple[int, ...]:
    if len(shape) > _MOST_AXES or any(length < 0 for length in shape) or math.prod(shape) > 1 << 40:
        raise buffer.error(span[0], f"{what}: shape {tuple(shape[:_MOST_AXES])}")
    return tuple(shape)


def _raw_dtype(buffer: Buffer, raw: Span, what: str, kind: int | None, count: int) -> str:
    if kind is not None and kind not in _RAW_TYPES:
        raise buffer.error(raw[0], f"{what}: raw_data of type {kind}, expected 0, 1 or 2 (double, float, half)")
    fitting = [d for d in _RAW_TYPES.values() if count * ITEM_SIZE[d] == raw[1]]
    stated = None if kind is None else _RAW_TYPES[kind]
    if (stated and stated not in fitting) or not fitting:
        raise buffer.error(raw[0], f"{what}: {raw[1]} bytes of raw_data do not hold {count} {stated or 'number'}s")
    return stated or fitting[0]
