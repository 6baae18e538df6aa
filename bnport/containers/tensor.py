"""An array in a file that has not been read yet."""

from __future__ import annotations

import functools
import math

from bnport._lazy import TYPE_CHECKING, np
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

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
        if self.dtype == "bfloat16":
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
            array: Array = wide.view(np.float32).reshape(self.shape)
            return array
        little, native = _dtypes(self.dtype)
        array = np.frombuffer(data, little).astype(native, copy=True)
        return array if len(self.shape) == 1 else array.reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.dtype}, {self.shape})"
