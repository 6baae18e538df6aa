"""Rows of `.npy` and `.npz` files, read by position and a few at a time, however large the file is.

The header is parsed here and held against the bytes that are there before anything is allocated; object arrays (which
would need pickle) are refused by their dtype. `.npz` members that are stored are read in place; deflated ones are
inflated as a stream, so memory stays that of one batch whatever a member declares. Rows in Fortran order lie scattered
over the whole file, which is mapped therefore; a deflated member in Fortran order is first inflated into a temporary file
that has no name, so that nothing of it is left whatever ends this process.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from bnport._lazy import np
from bnport.containers.files import ReadFile
from bnport.containers.zip import DEFLATED, STORED, Archive
from bnport.errors import FormatError, OutputError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from bnport.record import Array

_HEADER_LIMIT = 10_000  # bytes; numpy's own limit (numpy.lib.format.read_array_header max_header_size)
_BLOCK = 1 << 20


class Rows(Protocol):
    """An array of shape (N, ...) that is read in slices along its first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        ...

    @property
    def dtype(self) -> Any:
        """A numpy dtype."""
        ...

    def __getitem__(self, where: slice) -> Array:
        """Rows start:stop, in the machine's byte order."""
        ...


class _FileRows:
    """Rows in C order that lie in a file as they are."""

    def __init__(self, read: Callable[[int, int], bytes], head: _Header, name: str) -> None:
        self._read, self._head, self.name = read, head, name
        self.shape, self.dtype = head.shape, head.dtype.newbyteorder("=")

    def __getitem__(self, where: slice) -> Array:
        start, stop, _ = where.indices(self.shape[0])
        count = max(0, stop - start)
        data = self._read(self._head.start + start * self._head.row, count * self._head.row)
        array = np.frombuffer(data, self._head.dtype).reshape(count, *self.shape[1:])
        return array.astype(self.dtype, copy=False)


class _Stream:
    """The plain bytes of a deflated member, front to back; going back starts again. The CRC is checked at the end."""

    def __init__(self, archive: Archive, name: str) -> None:
        self.archive, self.member = archive, archive.member(name)
        self._restart()

    def _restart(self) -> None:
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._at = self._taken = self._crc = 0  # plain bytes out, compressed bytes in, CRC-32 of what came out
        self._held = b""

    def __call__(self, offset: int, length: int) -> bytes:
        if offset < self._at:
            self._restart()
        while self._at < offset:
            self._next(min(_BLOCK, offset - self._at))
        parts = []
        while length:
            part = self._next(length)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _next(self, most: int) -> bytes:
        while True:
            if not self._held and self._taken < self.member.compressed:
                count = min(_BLOCK, self.member.compressed - self._taken)
                start = self.member.data_offset + self._taken
                self._held = self.archive.file.pread(start, count, f"member {self.member.name!r}")
                self._taken += count
            try:
                plain = self._inflater.decompress(self._held, most)
            except zlib.error as error:
                raise self._damaged(f"cannot be inflated ({error})") from None
            self._held = self._inflater.unconsumed_tail
            if plain:
                break
            if self._inflater.eof or (not self._held and self._taken >= self.member.compressed):
                raise self._damaged(f"ends after {self._at} bytes, it declares {self.member.size}")
        self._at += len(plain)
        self._crc = zlib.crc32(plain, self._crc)
        if self._at == self.member.size and self._crc != self.member.crc:
            raise self._damaged(f"CRC-32 is {self._crc:08x}, {self.member.crc:08x} expected")
        return plain

    def _damaged(self, why: str) -> FormatError:
        return FormatError(f"{printable(self.archive.file.path)}: member {printable(self.member.name)!r}: {why}")


class _Header:
    """What an .npy header says: dtype, shape, whether Fortran order, where the data start, bytes of one row."""

    __slots__ = ("dtype", "fortran", "row", "shape", "start")

    def __init__(self, read: Callable[[int, int], bytes], size: int, name: str) -> None:
        import ast

        head = read(0, min(size, 12))
        if head[:6] == b"\x93NUMPY" and len(head) < 10:
            raise FormatError(f"{name}: an .npy array that is cut off: it has {size} bytes")
        if head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
            raise FormatError(f"{name}: not an .npy array (its first bytes are {head[:8]!r})")
        wide = head[6] > 1
        length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
        self.start = (12 if wide else 10) + length
        if length > _HEADER_LIMIT or self.start > size:
            raise FormatError(f"{name}: an .npy header of {length} bytes in {size} is not read")
        text = read(12 if wide else 10, length)
        try:
            said = ast.literal_eval(text.decode("utf-8" if head[6] == 3 else "latin-1").strip())
            descr, self.fortran, shape = said["descr"], said["fortran_order"], said["shape"]
        except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
            raise FormatError(f"{name}: its .npy header cannot be read: {printable(text[:80])}") from None
        if not isinstance(shape, tuple) or not all(type(k) is int and k >= 0 for k in shape) or len(said) != 3:
            raise FormatError(f"{name}: its .npy header has the shape {printable(shape, 80)}")
        if not isinstance(self.fortran, bool):
            raise FormatError(f"{name}: its .npy header has the order {printable(self.fortran, 80)}")
        self.dtype = _plain_dtype(descr, name)
        self.shape: tuple[int, ...] = shape
        if not shape:
            raise FormatError(f"{name}: holds a single number, not rows of data")
        self.row: int = self.dtype.itemsize
        for k in shape[1:]:
            self.row *= k
        if self.row * shape[0] != size - self.start:
            raise FormatError(
                f"{name}: shape {printable(shape, 80)} of {self.dtype} takes {self.row * shape[0]} bytes,"
                f" {size - self.start} are there"
            )


def _plain_dtype(descr: object, name: str) -> Any:
    try:
        dtype = np.dtype(descr) if isinstance(descr, str) and len(descr) < 8 else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype.kind not in "fiub" or dtype.itemsize > 8:
        why = "; object arrays would need pickle and are never read" if descr in ("|O", "O") else ""
        raise FormatError(f"{name}: has the dtype {printable(descr, 60)}, expected plain numbers{why}")
    return dtype


def _opened(read: Callable[[int, int], bytes], size: int, name: str, place: tuple[str, int] | None) -> Rows:
    head = _Header(read, size, name)
    if head.fortran and len(head.shape) > 1:
        if isinstance(read, _Window):  # what is mapped is not checked as it is read
            read.whole()
        file, offset = (_inflated(read, size, name), 0) if place is None else place
        mapped: Rows = np.memmap(file, head.dtype, "r", offset + head.start, head.shape, order="F")
        return mapped
    return _FileRows(read, head, name)


def _inflated(read: Callable[[int, int], bytes], size: int, name: str) -> Any:
    """All `size` bytes in a temporary file without a name. OutputError where they do not fit."""
    import shutil
    import tempfile

    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    try:
        if size > free:
            raise OSError(f"{free} bytes are free")
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (it lives as long as what is mapped from it)
        for start in range(0, size, _BLOCK):
            file.write(read(start, min(_BLOCK, size - start)))
        file.flush()
    except OSError as error:
        raise OutputError(
            f"{name}: is compressed and in Fortran order, and its {size} bytes do not fit into {printable(folder)}"
            f" ({printable(error, 120)}); save numpy.ascontiguousarray(x) instead"
        ) from None
    return file


def npy(path: str) -> Rows:
    """The rows of an `.npy` file. Raises FormatError for what is not one, NotFound where there is none."""
    file = ReadFile(path)
    return _opened(file.pread, file.size, printable(path), (path, 0))


def npz(path: str) -> Mapping[str, Rows]:
    """The arrays of an `.npz` file by name; one is opened when it is asked for, none is read yet."""
    archive = Archive(ReadFile(path))
    for name in archive.members:
        if not name.endswith(".npy"):
            raise FormatError(f"{printable(path)}: member {printable(name)!r} is not an .npy array")
    if not archive.members:
        raise FormatError(f"{printable(path)}: an .npz without arrays")
    return _Members(archive, path)


class _Members(Mapping[str, Rows]):
    """name -> Rows; FormatError, at the look-up, for a member that is not rows of plain numbers."""

    def __init__(self, archive: Archive, path: str) -> None:
        self.archive, self.path = archive, path

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".npy") for name in self.archive.members)

    def __len__(self) -> int:
        return len(self.archive.members)

    def __contains__(self, name: object) -> bool:
        return f"{name}.npy" in self.archive.members

    def __getitem__(self, name: str) -> Rows:
        member = self.archive.members[f"{name}.npy"]
        shown = f"{printable(self.path)}: {printable(name)!r}"
        if member.method == STORED:
            place = (self.path, member.data_offset)
            return _opened(_Window(self.archive, member.name), member.size, shown, place)
        if member.method == DEFLATED:
            return _opened(_Stream(self.archive, member.name), member.size, shown, None)
        raise FormatError(f"{shown}: compression method {member.method} is not understood")


class _Window:
    """A stored member read by position; read once from front to back, its CRC is checked at the end."""

    def __init__(self, archive: Archive, name: str) -> None:
        self.archive, self.name = archive, name
        self._crc = self._at = 0

    def whole(self) -> None:
        """Read all of it once, so that its CRC is checked."""
        size = self.archive.member(self.name).size
        for start in range(0, size, _BLOCK):
            self(start, min(_BLOCK, size - start))

    def __call__(self, offset: int, length: int) -> bytes:
        data = self.archive.pread(self.name, offset, length)
        self._crc, self._at = (self._crc, self._at) if offset else (0, 0)
        if offset <= self._at < offset + length:
            self._crc, self._at = zlib.crc32(data[self._at - offset :], self._crc), offset + length
            member = self.archive.member(self.name)
            if self._at == member.size and self._crc != member.crc:
                raise FormatError(
                    f"{printable(self.archive.file.path)}: member {printable(self.name)!r}: CRC-32 is {self._crc:08x},"
                    f" {member.crc:08x} expected; the file is damaged"
                )
        return data


def fingerprint(path: str) -> str:
    """path, size and time of change: enough to notice that a file is not the one that a checkpoint was made from."""
    status = os.stat(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
