"""HDF5 opened so that no other file can be reached through it, and so that a declared size costs nothing.

h5py reads the metadata through a window of a ReadFile, so the H5 inside a stored zip member is read where it lies.
Names are resolved one by one over hard links only: a soft, external or user-defined link is refused before the
library could follow it, and so are datasets that keep their numbers in other files (external storage, virtual
datasets). Numbers are read by this module with bounds checked, not by the library; deflate, shuffle and fletcher32 are
undone here with a limit on what comes out.
"""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.errors import BnportError, FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from bnport.containers.files import ReadFile

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DEPTH_LIMIT = 256  # nested models use four levels each
ATTRIBUTE_LIMIT = 64 << 20  # bytes of one attribute; a model_config of 1000 layers has 2 MB
CHUNKED_LIMIT = 256 << 20  # bytes of one chunked array once unpacked
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3

# what h5py and the library raise on a damaged file, depending on where it is damaged
_DAMAGE = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    UnicodeError,
    SystemError,
)


class Window(io.RawIOBase):
    """A file-like object over `size` bytes at `start` of a ReadFile. Every read is one pread; nothing is buffered."""

    def __init__(self, file: ReadFile, start: int = 0, size: int | None = None) -> None:
        self._file, self._start, self._at = file, start, 0
        self._size = file.size - start if size is None else size

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position within the window."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move within the window; whence as in io.IOBase."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the window; short only at its end."""
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            buffer[:count] = self._file.pread(self._start + self._at, count, "HDF5 metadata")
        self._at += count
        return count


class H5Tensor(Tensor):
    """A Tensor of an HDF5 file. `offset`: where its plain little-endian bytes begin in the file, or None if they do not
    lie there in one piece (chunked, compressed, big-endian, in the header)."""

    __slots__ = ("offset",)

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], read: Any, offset: int | None) -> None:
        super().__init__(name, dtype, shape, read)
        self.offset = offset


class H5:
    """An HDF5 file, or one inside another file at `start`. Nothing but metadata is read until a tensor is.

    Raises FormatError for what is damaged or reaches outside, naming the file and the object.
    """

    def __init__(self, file: ReadFile, start: int = 0, size: int | None = None) -> None:
        import h5py

        self.file, self.start = file, start
        self.size = file.size - start if size is None else size
        self.window = Window(file, start, self.size)
        try:
            access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
            access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
            access.set_fileobj_driver(h5py.h5fd.fileobj_driver, self.window)
            self._id = h5py.h5f.open(b"bnport window", h5py.h5f.ACC_RDONLY, access)
            self.root = Group(self, h5py.h5g.open(self._id, b"/"), "")
        except BnportError:
            raise
        except _DAMAGE as error:
            raise FormatError(
                f"{printable(file.path)}: not a readable HDF5 file, truncated or damaged ({reason(error)})"
            ) from None

    def refuse(self, path: str, why: str) -> NoReturn:
        """Raise FormatError naming the file and the object."""
        raise FormatError(f"{printable(self.file.path)}: {printable(path or '/')}: {why}")

    def walk(self) -> Iterator[tuple[str, Group]]:
        """Every group below and including the root with its path, parents first, names in natural order.

        A group reached twice (a second hard link, a cycle) is refused, and so is nesting beyond DEPTH_LIMIT.
        """
        seen: set[Any] = set()
        waiting = [self.root]
        while waiting:
            group = waiting.pop()
            address = group.address()
            if address in seen:
                self.refuse(group.path, "is linked twice or within itself; bnport does not follow that")
            seen.add(address)
            if group.path.count("/") > DEPTH_LIMIT:
                self.refuse(group.path, f"groups nested more than {DEPTH_LIMIT} deep")
            yield group.path, group
            waiting.extend(reversed([child for child in map(group.child, group.names()) if isinstance(child, Group)]))


class Group:
    """A group: its names, its children (Group or H5Tensor), its attributes."""

    __slots__ = ("_h5", "_id", "_names", "path")

    def __init__(self, h5: H5, identifier: Any, path: str) -> None:
        self._h5, self._id, self.path = h5, identifier, path
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """The names in the group, digits compared as numbers (`_10` after `_9`)."""
        if self._names is None:
            try:
                raw = list(self._id)
            except _DAMAGE as error:
                self._h5.refuse(self.path, f"cannot be listed ({reason(error)})")
            self._names = sorted((name.decode("utf-8", "surrogateescape") for name in raw), key=natural)
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def address(self) -> Any:
        """Where its header lies: the same for two names of one object."""
        import h5py

        try:
            return h5py.h5o.get_info(self._id).addr
        except _DAMAGE as error:
            self._h5.refuse(self.path, f"damaged ({reason(error)})")

    def child(self, name: str) -> Group | H5Tensor | None:
        """What `name` is; None for a committed datatype. Links other than hard ones are refused unopened."""
        import h5py

        path = f"{self.path}/{name}" if self.path else name
        raw = name.encode("utf-8", "surrogateescape")
        try:
            kind = self._id.links.get_info(raw).type
            if kind != h5py.h5l.TYPE_HARD:
                what = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}
                self._h5.refuse(path, f"is {what.get(kind, 'a user-defined link')}; bnport does not follow those")
            found = h5py.h5o.open(self._id, raw)
        except BnportError:
            raise
        except _DAMAGE as error:
            self._h5.refuse(path, f"cannot be opened ({reason(error)})")
        if isinstance(found, h5py.h5g.GroupID):
            return Group(self._h5, found, path)
        if isinstance(found, h5py.h5d.DatasetID):
            return _tensor(self._h5, found, path)
        return None

    def group(self, path: str) -> Group | None:
        """The group at `path` below this one, name by name, or None if there is none."""
        here: Group | H5Tensor | None = self
        for name in path.split("/"):
            if not isinstance(here, Group):
                return None
            if not here.has(name):
                return None
            here = here.child(name)
        return here if isinstance(here, Group) else None

    def tensors(self) -> list[H5Tensor]:
        """The datasets directly in this group, in natural order of their names."""
        return [child for child in map(self.child, self.names()) if isinstance(child, H5Tensor)]

    def has(self, name: str) -> bool:
        """Whether a link of that name is in the group; the group is not listed for it."""
        try:
            self._id.links.get_info(name.encode("utf-8", "surrogateescape"))
        except _DAMAGE:
            return False
        return True

    def has_attribute(self, name: str) -> bool:
        """Whether there is an attribute of that name, whatever it holds."""
        import h5py

        try:
            return bool(h5py.h5a.exists(self._id, name.encode()))
        except _DAMAGE as error:
            self._h5.refuse(f"attribute {name!r} of {self.path or '/'}", f"cannot be read ({reason(error)})")

    def attribute_number(self, name: str) -> int | None:
        """An integer attribute; None if it is missing or something else."""
        import h5py

        try:
            if not self.has_attribute(name):
                return None
            attribute = h5py.h5a.open(self._id, name.encode())
            if math.prod(attribute.shape) != 1 or attribute.get_type().get_class() != h5py.h5t.INTEGER:
                return None
            value = np.empty(attribute.shape, attribute.dtype)
            attribute.read(value)
            return int(value.reshape(-1)[0])
        except _DAMAGE as error:
            self._h5.refuse(f"attribute {name!r} of {self.path or '/'}", f"cannot be read ({reason(error)})")

    def attribute(self, name: str) -> str | list[str] | None:
        """A string attribute, or a list of strings; None if it is missing. Anything else is refused."""
        import h5py

        where = f"attribute {name!r} of {self.path or '/'}"
        raw = name.encode()
        try:
            if not h5py.h5a.exists(self._id, raw):
                return None
            attribute = h5py.h5a.open(self._id, raw)
            count, kind = math.prod(attribute.shape), attribute.get_type()
            if not count:
                return []  # an empty list of names is written as an empty float array
            if not isinstance(kind, h5py.h5t.TypeStringID):
                self._h5.refuse(where, "is not text")
            variable = kind.is_variable_str()
            # the texts of a variable-length attribute lie elsewhere and may all be one and the same long one
            most = self._longest_text(count) if variable else kind.get_size()
            if count * max(most, 16 if variable else 1) > max(ATTRIBUTE_LIMIT, 16):
                self._h5.refuse(where, f"{count} texts of up to {most} bytes are more than is read")
            values = np.empty(attribute.shape, dtype=object if variable else attribute.dtype)
            if variable:
                memory = h5py.h5t.py_create(h5py.string_dtype())
                attribute.read(values, mtype=memory)
            else:
                attribute.read(values)
        except BnportError:
            raise
        except _DAMAGE as error:
            self._h5.refuse(where, f"cannot be read ({reason(error)})")
        texts = [
            v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v)
            for v in values.reshape(-1).tolist()
        ]
        return texts if attribute.shape else texts[0]

    def _longest_text(self, count: int) -> int:
        return self._h5.size if count == 1 else min(self._h5.size, 64 << 10)


def _tensor(h5: H5, dataset: Any, path: str) -> H5Tensor:
    """A dataset as a tensor: its layout, type and size held against the file before anything is read."""
    import h5py

    try:
        plan = dataset.get_create_plist()
        layout = plan.get_layout()
        if plan.get_external_count():
            h5.refuse(path, "keeps its numbers in another file (external storage); bnport does not open it")
        if layout == h5py.h5d.VIRTUAL:
            h5.refuse(path, "keeps its numbers in other files (a virtual dataset); bnport does not open them")
        dtype, swapped = _dtype(h5, dataset, path)
        shape = tuple(int(length) for length in dataset.shape)
        nbytes = math.prod(shape) * ITEM_SIZE[dtype]
        stored = int(dataset.get_storage_size())
        offset = None
        if layout == h5py.h5d.CHUNKED:
            filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
            most = stored * 1032 if _DEFLATE in filters else stored
            if nbytes > most or nbytes > CHUNKED_LIMIT:
                h5.refuse(path, f"shape {shape} needs {nbytes} bytes, {stored} are stored")
        elif layout == h5py.h5d.CONTIGUOUS and nbytes:
            where = dataset.get_offset()
            if where is None or stored != nbytes or where + nbytes > h5.size:
                h5.refuse(path, f"shape {shape} needs {nbytes} bytes, which are not in the file")
            offset = h5.start + where
        elif nbytes > h5.size:
            h5.refuse(path, f"shape {shape} needs {nbytes} bytes, which are not in the file")
    except BnportError:
        raise
    except _DAMAGE as error:
        h5.refuse(path, f"damaged ({reason(error)})")

    if offset is not None and not swapped:
        at = offset

        def read() -> bytes:
            return h5.file.pread(at, nbytes, path)
    else:

        def read() -> bytes:
            return _unpacked(h5, dataset, path, layout, offset, shape, ITEM_SIZE[dtype], swapped)

    return H5Tensor(path, dtype, shape, read, None if swapped else offset)


def _dtype(h5: H5, dataset: Any, path: str) -> tuple[str, bool]:
    """(key of ITEM_SIZE, whether it is big-endian)."""
    from h5py import h5t

    kind = dataset.get_type()
    group, size = kind.get_class(), kind.get_size()
    if group == h5t.FLOAT:
        name = {2: "float16", 4: "float32", 8: "float64"}.get(size)
        for order in ("LE", "BE"):
            if name and kind.equal(getattr(h5t, f"IEEE_F{size * 8}{order}")):
                return name, order == "BE"
    elif group == h5t.INTEGER and size in (1, 2, 4, 8):
        sign = "" if kind.get_sign() == h5t.SGN_2 else "u"
        for order in ("LE", "BE"):
            if kind.equal(getattr(h5t, f"STD_{'U' if sign else 'I'}{size * 8}{order}")):
                return f"{sign}int{size * 8}", order == "BE"
    elif group == h5t.OPAQUE and size == 2:
        return "bfloat16", False  # as ml_dtypes' bfloat16 is written by h5py: |V2
    elif group == h5t.ENUM and size == 1:
        return "bool", False
    what = {h5t.STRING: "text", h5t.COMPOUND: "a compound (complex?) type", h5t.REFERENCE: "references"}
    return h5.refuse(path, f"holds {what.get(group, f'type {group} of {size} bytes')}, not plain real numbers")


def _unpacked(
    h5: H5, dataset: Any, path: str, layout: int, offset: int | None, shape: tuple[int, ...], item: int, swapped: bool
) -> bytes:
    """The bytes of a dataset that does not lie in the file as plain little-endian numbers in one piece."""
    import h5py

    try:
        raw = np.dtype(f"V{item}")
        if not math.prod(shape):
            return b""
        if offset is not None:
            values = np.frombuffer(h5.file.pread(offset, math.prod(shape) * item, path), raw)
        elif layout == h5py.h5d.CHUNKED:
            values = _chunks(h5, dataset, path, shape, raw)
        else:  # compact: at most 64 KiB, in the object's header
            native = np.empty(shape, dataset.dtype)
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, native)
            values = native.view(raw) if native.ndim else native.reshape(1).view(raw)
        if swapped:
            values = np.ascontiguousarray(values).view(f"u{item}").byteswap()
        return values.tobytes()
    except BnportError:
        raise
    except _DAMAGE as error:
        h5.refuse(path, f"cannot be read ({reason(error)})")


def _chunks(h5: H5, dataset: Any, path: str, shape: tuple[int, ...], raw: Any) -> Any:
    plan = dataset.get_create_plist()
    chunk = tuple(int(length) for length in plan.get_chunk())
    filters = [plan.get_filter(i) for i in range(plan.get_nfilters())]
    unknown = [code for code, *_ in filters if code not in (_DEFLATE, _SHUFFLE, _FLETCHER32)]
    size = math.prod(chunk) * raw.itemsize
    if unknown or size > CHUNKED_LIMIT:
        h5.refuse(
            path, f"is packed in a way that is not read (filter {unknown}); rewrite it without (h5repack -f NONE)"
        )
    values, expected = np.zeros(shape, raw), math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    if dataset.get_num_chunks() != expected:
        h5.refuse(path, f"{expected} chunks expected, {dataset.get_num_chunks()} are stored")
    for index in range(expected):
        info = dataset.get_chunk_info(index)
        data = h5.file.pread(h5.start + info.byte_offset, info.size, path)
        for position, (code, *_) in reversed(list(enumerate(filters))):
            if not info.filter_mask >> position & 1:
                data = _undone(h5, path, code, data, size, raw.itemsize)
        if len(data) != size:
            h5.refuse(path, f"chunk {index} holds {len(data)} bytes, {size} expected")
        piece = np.frombuffer(data, raw).reshape(chunk)
        where = tuple(slice(o, min(o + c, n)) for o, c, n in zip(info.chunk_offset, chunk, shape, strict=True))
        values[where] = piece[tuple(slice(0, s.stop - s.start) for s in where)]
    return values


def _undone(h5: H5, path: str, code: int, data: bytes, size: int, item: int) -> bytes:
    """One filter of a chunk undone; no more than `size` bytes (and a checksum) ever come out of it."""
    if code == _FLETCHER32:
        return data[:-4]  # h5py checks it when it reads; a wrong number is caught by our own checks of values
    if code == _SHUFFLE:
        return np.frombuffer(data, np.uint8).reshape(item, -1).T.tobytes() if len(data) % item == 0 else data
    import zlib

    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, size + 5)
    except zlib.error as error:
        h5.refuse(path, f"cannot be inflated ({error})")
    if len(plain) > size + 4:
        h5.refuse(path, f"inflates to more than the {size} bytes of a chunk")
    return plain


def natural(name: str) -> list[Any]:
    """A sort key that compares digits as numbers: conv2d_2 before conv2d_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", name) if part]


def reason(error: BaseException) -> str:
    """The library's words on one line, short."""
    return printable(error, 120) or type(error).__name__
