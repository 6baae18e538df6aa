"""A TensorProto as it lies in a model: checked against the bytes that are there, read when asked.

Numbers lie in raw_data (little-endian), in float_data, double_data, int32_data or int64_data, or in another file of the
model's own folder; never in two of them.
"""

from __future__ import annotations

import math
import os
import stat

from bnport._lazy import TYPE_CHECKING
from bnport.containers.files import ReadFile
from bnport.containers.protobuf import LENGTH, Numbers, varints
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from bnport.adapters.onnx.model import Place
    from bnport.containers.protobuf import Span, Value

DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
          10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}  # fmt: skip
FLOATS = ("float32", "float64", "float16", "bfloat16")
EXTERNAL = 1  # data_location

# where numbers lie (a form, or the field number of integers) -> the data types that may
_ALLOWED: dict[str | int, set[str]] = {
    "floats": {"float32"}, "doubles": {"float64"},
    5: {"int32", "int16", "int8", "uint16", "uint8", "bool", "float16", "bfloat16"}, 7: {"int64"}, 11: {"uint32", "uint64"},
}  # fmt: skip
MOST_DIMENSIONS = 64
_NO_INTEGERS: dict[int, list[tuple[int, Value]]] = {}  # shared by the many tensors that have none
_NOT_OUTSIDE: dict[str, str] = {}
MOST_INTEGERS = 1 << 20  # numbers that lie one by one in int32_data or int64_data


class Stored:
    """A TensorProto: name, dtype, shape, and where its numbers lie."""

    __slots__ = ("doubles", "external", "floats", "ints", "kind", "label", "location", "name", "place", "raw", "shape")

    def __init__(self, place: Place, label: str = "") -> None:
        self.place, self.label = place, label
        self.name, self.kind, self.location = "", 0, 0
        self.raw: Span | None = None
        self.floats: Numbers | None = None
        self.doubles: Numbers | None = None
        self.ints: dict[int, list[tuple[int, Value]]] = _NO_INTEGERS
        self.external: dict[str, str] = _NOT_OUTSIDE
        dims: list[int] = []
        for number, wire, value in place.fields():
            if number == 1:
                dims += varints(place.buffer, wire, value, MOST_DIMENSIONS)
            elif number == 2:
                self.kind = place.integer(value, 32)
            elif number == 4:
                self.floats = self.floats or Numbers(place.buffer, 4)
                self.floats.add(wire, value)
            elif number in (5, 7, 11):
                self.ints = self.ints or {}
                self.ints.setdefault(number, []).append((wire, value))
            elif number == 10:
                self.doubles = self.doubles or Numbers(place.buffer, 8)
                self.doubles.add(wire, value)
            elif number == 9 and wire == LENGTH:
                self.raw = place.bytes_of(value)
            elif number == 8:
                self.name = place.text(value)
            elif number == 13:
                self.external = self.external or {}
                key, text = _entry(place.inner(value))
                if key in self.external:
                    raise self._bad(f"external data says {key!r} twice")
                self.external[key] = text
            elif number == 14:
                self.location = place.integer(value, 32)
            elif number == 3:
                raise self._bad("is stored in segments, which no released tool writes")
        if len(dims) > MOST_DIMENSIONS or any(d < 0 for d in dims):
            raise self._bad(f"impossible dimensions {dims[:8]}")
        self.shape = tuple(dims)

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return self.name or self.label

    def _bad(self, why: str) -> FormatError:
        return FormatError(f"{printable(self.place.buffer.name)}: tensor {printable(self.shown)!r} {why}")

    @property
    def dtype(self) -> str:
        """A key of ITEM_SIZE; FormatError for strings, complex, 8-bit floats and the like."""
        if self.kind not in DTYPES:
            raise self._bad(f"has data type {self.kind}, which is none that holds such numbers")
        return DTYPES[self.kind]

    @property
    def size(self) -> int:
        """How many numbers its dimensions declare."""
        return math.prod(self.shape)

    @property
    def form(self) -> str:
        """Where its numbers lie: "raw", "floats", "doubles", "ints" or "external"; FormatError if in several or none."""
        forms = [
            form
            for form, there in (
                ("external", self.location == EXTERNAL),
                ("raw", self.raw is not None and (self.raw[1] or not self.size)),
                ("floats", self.floats and self.floats.nbytes),
                ("doubles", self.doubles and self.doubles.nbytes),
                ("ints", any(self.ints.values())),
            )
            if there
        ]
        if len(forms) > 1:
            raise self._bad(f"holds its numbers twice ({' and '.join(forms)})")
        if not forms:
            if self.size:
                raise self._bad(f"holds no numbers, its dimensions {list(self.shape)} declare {self.size}")
            return "raw"
        return forms[0]

    def tensor(self, folder: str | None) -> Tensor:
        """The numbers, checked to be there in full (no number is read); `folder` is where external data may lie."""
        form, dtype = self.form, self.dtype
        nbytes = self.size * ITEM_SIZE[dtype]
        self._check_place(form)
        if form == "external":
            return self._outside(folder, nbytes)
        if form == "ints":
            return Tensor(self.shown, dtype, self.shape, self._integers)
        if form == "raw":
            span = self.raw or (self.place.span[0], 0)
            self._check(span[1], nbytes)
            return Tensor(self.shown, dtype, self.shape, lambda: self.place.buffer.read(span, self.shown))
        numbers = self.floats if form == "floats" else self.doubles
        assert numbers is not None
        self._check(numbers.nbytes, nbytes)
        return Tensor(self.shown, dtype, self.shape, numbers.read)

    def _check_place(self, place: str | int) -> None:
        allowed = _ALLOWED.get(place)
        if allowed is not None and self.dtype not in allowed:
            raise self._bad(f"of {self.dtype} holds its numbers in a field for {', '.join(sorted(allowed))}")

    def _check(self, found: int, expected: int) -> None:
        if found != expected:
            raise self._bad(f"of shape {list(self.shape)} should be {expected} bytes, {found} are there")

    def _integers(self) -> bytes:
        """int32_data and int64_data; 16-bit floats lie in int32_data as their bit patterns."""
        values: list[int] = []
        for number, occurrences in self.ints.items():
            self._check_place(number)
            for wire, value in occurrences:
                values += varints(self.place.buffer, wire, value, min(self.size, MOST_INTEGERS))
                if len(values) > MOST_INTEGERS:
                    raise self._bad(f"holds more than {MOST_INTEGERS} numbers as integers")
        if len(values) != self.size:
            raise self._bad(f"of shape {list(self.shape)} should hold {self.size} numbers, {len(values)} are there")
        dtype = "uint16" if self.dtype in ("float16", "bfloat16") else self.dtype
        width = ITEM_SIZE[dtype]
        mask = (1 << (8 * width)) - 1
        data = b"".join((value & mask).to_bytes(width, "little") for value in values)
        wrong = [v for v in values if not -(1 << (8 * width - 1)) <= v <= mask]
        if wrong:
            raise self._bad(f"of {self.dtype} holds the integer {wrong[0]}")
        return data

    # ---- external data

    def _outside(self, folder: str | None, nbytes: int) -> Tensor:
        location = self.external.get("location", "")
        if folder is None:
            raise self._bad(
                f"lies in the file {printable(location)!r}; say where with folder=, or load the model with its data"
            )
        path = self._inside(folder, location)
        offset, length = (self._number(key) for key in ("offset", "length"))
        file = self._opened(path, folder)
        start = offset or 0
        held = file.size - start if length is None else length
        if start + held > file.size or held < 0:
            raise self._bad(
                f"should be {held} bytes at {start} of {printable(location)!r}, which has {file.size} bytes"
            )
        self._check(held, nbytes)
        return Tensor(self.shown, self.dtype, self.shape, lambda: file.pread(start, nbytes, self.shown))

    def file(self, folder: str) -> str | None:
        """The file of external data in `folder`; None if there is none, or none that is read."""
        try:
            path = self._inside(folder, self.external.get("location", ""))
        except FormatError:
            return None
        return path if os.path.isfile(path) else None

    def _number(self, key: str) -> int | None:
        text = self.external.get(key)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._bad(f"external data with {key} {printable(text)!r}, which is no number of bytes")
        return int(text)

    def _inside(self, folder: str, location: str) -> str:
        """The file at `location`, if that is a plain way down from `folder`; links of any kind are refused."""
        parts = location.replace("\\", "/").split("/")
        if not location or location.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts or "\0" in location:
            raise self._bad(f"lies outside the model's folder, at {printable(location)!r}; it is not read")
        path = folder
        for part in (p for p in location.split("/") if p not in ("", ".")):
            path = os.path.join(path, part)
            try:
                status = os.lstat(path)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or "not a file name"
                raise self._bad(f"lies in {printable(location)!r}, which cannot be read: {why}") from None
            if stat.S_ISLNK(status.st_mode):
                raise self._bad(f"lies in {printable(location)!r}, which is a link; put the file itself there")
        return path

    def _opened(self, path: str, folder: str) -> ReadFile:
        before = os.lstat(path)
        if not stat.S_ISREG(before.st_mode):
            raise self._bad(f"lies in {printable(os.path.relpath(path, folder))!r}, which is no regular file")
        if before.st_nlink > 1:
            raise self._bad(
                f"lies in {printable(os.path.relpath(path, folder))!r}, which has {before.st_nlink} names (hard links);"
                " make a copy of its own"
            )
        file = ReadFile(path)
        if not os.path.samestat(before, os.fstat(file.fileno())):
            raise self._bad(f"lies in {printable(os.path.relpath(path, folder))!r}, which changed while it was opened")
        return file


def _entry(place: Place) -> tuple[str, str]:
    pair = {1: "", 2: ""}
    for number, _, value in place.fields():
        if number in pair:
            pair[number] = place.text(value)
    return pair[1], pair[2]
