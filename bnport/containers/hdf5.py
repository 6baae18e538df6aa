"""HDF5 opened so that no other file can be reached through it, and so that a declared size costs nothing.

h5py reads the metadata through a window of a ReadFile, so the H5 inside a stored zip member is read where it lies.
Names are resolved one by one over hard links only: a soft, external or user-defined link is refused before the
library could follow it, and so are datasets that keep their numbers in other files (external storage, virtual
datasets). Numbers are read by position with bounds checked, not by the library (hdf5_data.py).
"""

from __future__ import annotations

import io
import math
import re

from bnport._lazy import TYPE_CHECKING, np
from bnport.containers.hdf5_data import DAMAGE, H5Tensor, reason, tensor_of
from bnport.errors import BnportError, FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

    from bnport.containers.files import ReadFile

__all__ = ["H5", "Group", "H5Tensor", "Window", "natural"]

METADATA_CACHE = 1 << 16  # bytes at first, and it grows: most objects are looked at once, for which 2 MiB are too much
DEPTH_LIMIT = 256  # nested models use four levels each
ATTRIBUTE_LIMIT = 64 << 20  # bytes of one attribute; a model_config of 1000 layers has 2 MB


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
        self._at = offset + (0, self._at, self._size)[whence] if whence else offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the window; short only at its end."""
        at = self._at
        count = len(buffer)
        if at + count > self._size:
            count = max(0, self._size - at)
        if count:
            buffer[:count] = self._file.pread(self._start + at, count, "HDF5 metadata")
            self._at = at + count
        return count


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
            cache = access.get_mdc_config()
            cache.initial_size = cache.min_size = METADATA_CACHE
            access.set_mdc_config(cache)
            access.set_fileobj_driver(h5py.h5fd.fileobj_driver, self.window)
            self._id = h5py.h5f.open(b"bnport window", h5py.h5f.ACC_RDONLY, access)
            self._base = self.start + self._id.get_create_plist().get_userblock()
            self.heaps: dict[int, dict[int, tuple[int, int]]] = {}
            self.root = Group(self, h5py.h5g.open(self._id, b"/"), "")
        except BnportError:
            raise
        except DAMAGE as error:
            raise FormatError(
                f"{printable(file.path)}: not a readable HDF5 file, truncated or damaged ({reason(error)})"
            ) from None

    def at(self, address: int, length: int) -> bytes:
        """`length` bytes at an address of the file (addresses count from behind a user block)."""
        if length > ATTRIBUTE_LIMIT:
            raise LookupError(length)
        return self.file.pread(self._base + address, length)

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
            waiting.extend(reversed(group.groups()))


class Group:
    """A group: its names, its children (Group or H5Tensor), its attributes."""

    __slots__ = ("_h5", "_id", "_names", "_walked", "path")

    def __init__(self, h5: H5, identifier: Any, path: str) -> None:
        self._h5, self._id, self.path = h5, identifier, path
        self._names: list[str] | None = None
        self._walked: list[tuple[str, Group]] = []  # the way to what `group` found last, name by name

    def names(self) -> list[str]:
        """The names in the group, digits compared as numbers (`_10` after `_9`)."""
        if self._names is None:
            try:
                raw: list[bytes] = []
                self._id.links.iterate(raw.append)  # half the time of list(self._id)
            except DAMAGE as error:
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
        except DAMAGE as error:
            self._h5.refuse(self.path, f"damaged ({reason(error)})")

    def child(self, name: str) -> Group | H5Tensor | None:
        """What `name` is; None for a committed datatype. Links other than hard ones are refused unopened."""
        import h5py

        path = f"{self.path}/{name}" if self.path else name
        raw = name.encode("utf-8", "surrogateescape")
        try:
            self._refuse_soft(self._id.links.get_info(raw).type, path)
            found = h5py.h5o.open(self._id, raw)
        except BnportError:
            raise
        except DAMAGE as error:
            self._h5.refuse(path, f"cannot be opened ({reason(error)})")
        if isinstance(found, h5py.h5d.DatasetID):
            return tensor_of(self._h5, found, path)
        return Group(self._h5, found, path) if isinstance(found, h5py.h5g.GroupID) else None

    def _refuse_soft(self, kind: int, path: str) -> None:
        """Refuse any link but a hard one, which the library would follow."""
        import h5py

        if kind != h5py.h5l.TYPE_HARD:
            what = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}
            self._h5.refuse(path, f"is {what.get(kind, 'a user-defined link')}; bnport does not follow those")

    def groups(self) -> list[Group]:
        """The groups directly in this group, in natural order of their names; its datasets are not opened."""
        import h5py

        found = []
        for name in self.names():
            raw, path = name.encode("utf-8", "surrogateescape"), f"{self.path}/{name}" if self.path else name
            try:
                self._refuse_soft(self._id.links.get_info(raw).type, path)
                if h5py.h5o.get_info(self._id, raw).type == h5py.h5o.TYPE_GROUP:
                    found.append(Group(self._h5, h5py.h5g.open(self._id, raw), path))
            except BnportError:
                raise
            except DAMAGE as error:
                self._h5.refuse(path, f"cannot be opened ({reason(error)})")
        return found

    def group(self, path: str) -> Group | None:
        """The group at `path` below this one, name by name, or None if there is none.

        The part of the way that it shares with the last one is not walked again: layers lie side by side.
        """
        names = path.split("/")
        here, walked = self, self._walked
        for depth, name in enumerate(names):
            if depth == len(walked) or walked[depth][0] != name:
                del walked[depth:]
                found = here.child(name) if here.has(name) else None
                if not isinstance(found, Group):
                    return None
                walked.append((name, found))
            here = walked[depth][1]
        return here

    def tensors(self) -> list[H5Tensor]:
        """The datasets directly in this group, in natural order of their names."""
        return [child for child in map(self.child, self.names()) if isinstance(child, H5Tensor)]

    def has(self, name: str) -> bool:
        """Whether a link of that name is in the group; the group is not listed for it."""
        try:
            self._id.links.get_info(name.encode("utf-8", "surrogateescape"))
        except DAMAGE:
            return False
        return True

    def has_attribute(self, name: str) -> bool:
        """Whether there is an attribute of that name, whatever it holds."""
        import h5py

        try:
            return bool(h5py.h5a.exists(self._id, name.encode()))
        except DAMAGE as error:
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
        except DAMAGE as error:
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
            total = count * (16 if variable else kind.get_size())
            if total > min(ATTRIBUTE_LIMIT, self._h5.size):
                self._h5.refuse(where, f"{count} texts of {total} bytes are more than the file has or is read")
            if variable:
                from bnport.containers.hdf5_text import texts

                found = texts(self._h5, where, self.address(), raw, count, ATTRIBUTE_LIMIT)
            else:
                values = np.empty(attribute.shape, attribute.dtype)
                attribute.read(values)
                found = values.reshape(-1).tolist()
        except BnportError:
            raise
        except DAMAGE as error:
            self._h5.refuse(where, f"cannot be read ({reason(error)})")
        decoded = [text.decode("utf-8", "surrogateescape") for text in found]
        return decoded if attribute.shape else decoded[0]


def natural(name: str) -> list[Any]:
    """A sort key that compares digits as numbers: conv2d_2 before conv2d_10."""
    if name.isdecimal() and len(name) < 19:
        return [(0, int(name), "")]  # what comes of the rest of this: most names are the numbers of arrays
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", name) if part]
