"""torch's storages and tensors as containers.Tensor, from the stand-ins of a pickle: nothing is rebuilt, only located."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, np
from bnport.containers.pickle import Global, Node
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# torch.<name>Storage, and torch.<name> as a dtype
DTYPE_OF_STORAGE = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
DTYPE_OF_NAME = {
    "float64": "float64", "double": "float64", "float32": "float32", "float": "float32", "float16": "float16",
    "half": "float16", "bfloat16": "bfloat16", "int64": "int64", "long": "int64", "int32": "int32", "int16": "int16",
    "int8": "int8", "uint8": "uint8", "bool": "bool", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip
FLOATS = ("float64", "float32", "float16", "bfloat16")

ELEMENT_LIMIT = 1 << 24  # of a tensor that repeats elements (stride 0), which may be larger than what is stored

_REBUILD_TENSOR = {f"torch._utils._rebuild_tensor{v}" for v in ("", "_v2", "_v3")}
_REBUILD_PARAMETER = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
                      "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}  # fmt: skip


class Storage:
    """A flat run of elements in a file.

    dtype: torch's name if unknown here. count: of elements. read: (start byte, byte count) -> bytes, little-endian.
    place: start byte -> (archive member or "", offset in the file); None where the bytes cannot be written in place.
    """

    __slots__ = ("_place", "count", "dtype", "read")

    def __init__(
        self,
        dtype: str,
        count: int,
        read: Callable[[int, int], bytes],
        place: Callable[[int], tuple[str, int]] | None = None,
    ) -> None:
        self.dtype, self.count, self.read, self._place = dtype, count, read, place

    @property
    def place(self) -> Callable[[int], tuple[str, int]] | None:
        """Where the bytes lie, as above."""
        return self._place


class PlacedTensor(Tensor):
    """A tensor whose bytes lie in one run of a storage that has a place in the file."""

    __slots__ = ("_begin", "_storage")

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], storage: Storage, begin: int) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._storage, self._begin = storage, begin

    def read(self) -> bytes:
        """Its bytes, little-endian, C order."""
        return self._storage.read(self._begin, self.nbytes) if self.size else b""

    def place(self) -> tuple[str, int]:
        """The archive member ("" for none) that it lies in, and where in the file it begins."""
        place = self._storage.place
        assert place is not None  # or it would be a plain Tensor
        return place(self._begin)


def storage_dtype(kind: object) -> str:
    """The dtype that a storage class stands for; torch's own name where it is unknown here."""
    if not isinstance(kind, Global):
        return "unknown"
    return DTYPE_OF_STORAGE.get(kind.name, kind.path)


def rebuilt(value: Any, name: str, where: str) -> Tensor | None:
    """The tensor that a stand-in describes, or None if it describes none.

    Parameters and tensor subclasses give the tensor they wrap. A tensor of a dtype unknown here is given, with
    torch's name for the dtype; whoever needs its bytes refuses it. Raises FormatError for a tensor that reaches beyond
    its storage, has negative sizes, or repeats elements more than ELEMENT_LIMIT times.
    """
    for _ in range(4):
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, Node):
            return None
        path, args = value.path, value.args
        if path in _REBUILD_TENSOR and len(args) >= 4:
            return _located(args, path, name, where)
        if path == "torch._tensor._rebuild_from_type_v2" and len(args) >= 3 and isinstance(args[2], tuple):
            value = Node(args[0], args[2]) if isinstance(args[0], Global) else None
        elif path in _REBUILD_PARAMETER and args:
            value = args[0]
        else:
            return None
    return None


def _located(args: tuple[Any, ...], path: str, name: str, where: str) -> Tensor | None:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage):
        return None
    dtype = storage.dtype
    if path.endswith("_v3") and len(args) > 6:
        dtype = DTYPE_OF_NAME.get(args[6].name, args[6].path) if isinstance(args[6], Global) else "unknown"
    flags = args[7:] if path.endswith("_v3") else args[6:]
    if any(flag for flag in flags if isinstance(flag, dict)):
        raise FormatError(
            f"{where}: tensor {printable(name)!r} is a lazily negated or conjugated view; save a plain copy"
        )
    return located(storage, offset, shape, strides, name, where, dtype)


def located(
    storage: Storage, offset: Any, shape: Any, strides: Any, name: str, where: str, dtype: str | None = None
) -> Tensor:
    """A tensor as a strided view of a storage, everything counted in elements; `dtype` if not the storage's own.

    Raises FormatError for a view that reaches beyond its storage, has negative sizes, or repeats too much.
    """
    dtype = storage.dtype if dtype is None else dtype
    numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(shape) != len(strides) or len(shape) > 64:
        raise FormatError(f"{where}: tensor {printable(name)!r} has a malformed shape, stride or offset")
    size, reach = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        size *= length
        reach += (length - 1) * stride
    item = ITEM_SIZE.get(dtype, 1)
    held = storage.count * ITEM_SIZE.get(storage.dtype, 1) // item
    if size and reach >= held:
        raise FormatError(
            f"{where}: tensor {printable(name)!r} of shape {shape} reaches to element {reach}, its storage holds {held}"
        )
    if size > max(held, ELEMENT_LIMIT):
        raise FormatError(f"{where}: tensor {printable(name)!r} of shape {shape} repeats the {held} elements it has")

    if storage.place is not None and _contiguous(shape, strides):
        return PlacedTensor(name, dtype, shape, storage, offset * item)

    def read() -> bytes:
        if not size:
            return b""
        data = storage.read(offset * item, (reach - offset + 1) * item)
        return data if _contiguous(shape, strides) else _gathered(data, shape, strides, item)

    return Tensor(name, dtype, shape, read)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def _gathered(data: bytes, shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> bytes:
    flat = np.frombuffer(data, f"V{item}")
    view = np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in strides], writeable=False)
    return view.tobytes()
