"""An array in a file that has not been read yet."""

from __future__ import annotations

import functools
import math

from bnport._lazy import TYPE_CHECKING, np
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from bnport.containers.files import ReadFile
    from bnport.record import Array

ITEM_SIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


@functools.cache
def _dtypes(name: str) -> tuple[Any, Any]:
    """numpy's dtype of that name, one of ITEM_SIZE: as it lies in a file (little-endian), and the machine's own."""
    little = np.dtype(name).newbyteorder("<")
    return little, little.newbyteorder("=")


def _numbers(data: bytes, dtype: str) -> Array:
    """The values in little-endian bytes, copied; bfloat16 as float32."""
    if dtype == "bfloat16":
        wide: Array = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    little, native = _dtypes(dtype)
    return np.frombuffer(data, little).astype(native, copy=True)


class Tensor:
    """name, dtype, shape, and `read()`: its bytes, little-endian, C order, read at each call.

    Creating one costs nothing and reads nothing. dtype is a key of ITEM_SIZE.
    """

    __slots__ = ("dtype", "name", "read", "shape")

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], read: Callable[[], bytes]) -> None:
        self.name, self.dtype, self.shape, self.read = name, dtype, shape, read

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """size * bytes per element. FormatError for a dtype that is not in ITEM_SIZE."""
        if self.dtype not in ITEM_SIZE:
            raise FormatError(f"{printable(self.name)} is {printable(self.dtype, 40)}, which is not read as numbers")
        return self.size * ITEM_SIZE[self.dtype]

    def array(self) -> Array:
        """The values as a new array of `shape`; bfloat16 widens exactly to float32, everything else keeps its dtype."""
        data = self.read()
        if len(data) != self.nbytes:
            raise FormatError(f"{printable(self.name)}: {self.nbytes} bytes expected, {len(data)} found")
        array = _numbers(data, self.dtype)
        return array if len(self.shape) == 1 else array.reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.dtype}, {self.shape})"


class FileTensor(Tensor):
    """A Tensor whose bytes lie in one piece of a file, from `begin` on."""

    __slots__ = ("begin", "file")

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], file: ReadFile, begin: int) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.file, self.begin = file, begin

    def read(self) -> bytes:
        """Its bytes, little-endian, C order."""
        return self.file.pread(self.begin, self.nbytes, self.name)


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """`array()` of each. Vectors of one dtype that lie side by side in one file are read in one go: a layer's four do, in
    files that are sorted by name, and on a network every read is a journey."""
    run = sorted((t for t in tensors.values() if isinstance(t, FileTensor)), key=_begin)
    if len(run) < len(tensors) or len(run) < 2 or not all(map(_beside, run, run[1:])):
        return {key: tensor.array() for key, tensor in tensors.items()}
    first, last, item = run[0], run[-1], ITEM_SIZE[run[0].dtype]
    values = _numbers(first.file.pread(first.begin, last.begin + last.nbytes - first.begin, first.name), first.dtype)
    starts = {key: (tensor.begin - first.begin) // item for key, tensor in tensors.items()}  # type: ignore[attr-defined]
    return {key: values[at : at + tensors[key].size] for key, at in starts.items()}


def _begin(tensor: FileTensor) -> int:
    return tensor.begin


def _beside(one: FileTensor, next_: FileTensor) -> bool:
    """Whether the second begins where the first, a vector of the same kind, ends."""
    return (
        one.file is next_.file
        and one.dtype == next_.dtype
        and len(one.shape) == len(next_.shape) == 1
        and one.begin + one.nbytes == next_.begin
    )
