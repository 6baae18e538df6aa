"""The files that torch.save writes, opened without torch: the zip of 1.6 and later, the legacy stream, the old tar."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.torch.tensors import Storage, rebuilt, storage_dtype
from bnport.containers.pickle import SIZE_LIMIT, Global, Node, Persistent, Truncated, load
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.containers.zip import READ_LIMIT, STORED, Archive
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from bnport.containers.files import ReadFile

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number 0x1950a86a20f9469cfc6c, then the end of its pickle
_TAR_PARTS = ("storages", "tensors", "pickle")
_SMALL = 1 << 16  # a storage up to this size is read whole


class Checkpoint:
    """What a file holds.

    value:   the object that was saved, in plain data and stand-ins, Storages in the place of storages.
    where:   the path, for messages.
    archive: the zip archive, or None; root: the folder in it.
    notes:   what a user should know about the file.
    work:    spent on walking through its modules, as search.named_modules counts it.
    """

    __slots__ = ("archive", "notes", "root", "value", "where", "work")

    def __init__(self, where: str, value: Any, archive: Archive | None = None, root: str = "") -> None:
        self.where, self.value, self.archive, self.root = where, value, archive, root
        self.notes: list[str] = []
        self.work = 0
        if archive is not None and not archive.checksums:
            self.notes.append("the file was written without checksums; damage to it cannot be noticed")

    @property
    def is_script(self) -> bool:
        """Whether it is a TorchScript archive."""
        return isinstance(self.value, Node) and self.value.path.startswith("__torch__.") and self.archive is not None

    def items(self, value: Any) -> dict[Any, Any] | None:
        """The items of a dict, or of a stand-in for a kind of dict; None for anything else."""
        if isinstance(value, dict):
            return value
        if isinstance(value, Node) and (value.items or value.path == "collections.OrderedDict"):
            return value.items
        return None

    def tensor(self, value: Any, name: str) -> Tensor | None:
        """The tensor that a value stands for, or None."""
        return rebuilt(value, name, self.where)

    def is_lazy(self, value: Any) -> bool:
        """Whether a value stands for a parameter or buffer of a lazy layer that has seen no batch."""
        from bnport.adapters.torch.search import is_lazy

        return is_lazy(value)

    def versions(self, value: Any) -> dict[str, int]:
        """module prefix -> version, from the `_metadata` of a state dict; {} where there is none."""
        state = value.state if isinstance(value, Node) else None
        metadata = self.items(state.get("_metadata")) if isinstance(state, dict) else None
        found = {}
        for prefix, entry in (metadata or {}).items():
            version = entry.get("version") if isinstance(entry, dict) else None
            if isinstance(prefix, str) and type(version) is int:
                found[prefix] = version
        return found


def zip_root(archive: Archive, member: str = "data.pkl") -> str | None:
    """The one top folder of the archive that holds `member`, with its slash; None without one, or with several."""
    depth = member.count("/") + 1
    found = [name for name in archive.members if name.endswith("/" + member) and name.count("/") == depth]
    return found[0][: -len(member)] if len(found) == 1 else None


def open_zip(file: ReadFile, archive: Archive, root: str) -> Checkpoint:
    """The checkpoint in a zip archive; storages are members data/<key>."""
    where = printable(file.path)
    order = archive.read(root + "byteorder", 16) if root + "byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise FormatError(f"{where}: byte order {printable(order)} is neither little nor big")

    def persistent(id: Any) -> Any:
        if not (isinstance(id, tuple) and len(id) >= 5 and id[0] in ("storage", b"storage")):
            return Persistent(id)
        dtype, key, count = storage_dtype(id[1]), id[2], id[4]
        return MemberStorage(archive, f"{root}data/{key}", dtype, _count(count, where), order)

    value, _ = load(archive.read(root + "data.pkl", SIZE_LIMIT), where, persistent=persistent)
    return Checkpoint(where, value, archive, root)


def _count(count: Any, where: str) -> int:
    if type(count) is not int or not 0 <= count < 1 << 60:
        raise FormatError(f"{where}: a storage of {printable(count)} elements cannot be")
    return count


class MemberStorage(Storage):
    """A storage that is an archive member; its checksum is checked when it is read."""

    __slots__ = ("_archive", "_checked", "_name", "_order")

    def __init__(self, archive: Archive, name: str, dtype: str, count: int, order: bytes = b"little") -> None:
        self.dtype, self.count = dtype, count
        self._archive, self._order, self._checked = archive, order, False
        self._name = archive.member(name).name if name in archive else name  # the archive's own text, kept once

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, little-endian."""
        archive, name, item = self._archive, self._name, ITEM_SIZE.get(self.dtype, 1)
        if name not in archive:
            raise FormatError(f"{printable(archive.file.path)}: storage {printable(name)!r} is missing")
        member = archive.member(name)
        if member.size < self.count * item:
            raise FormatError(
                f"{printable(archive.file.path)}: storage {printable(name)!r} should hold {self.count * item} bytes,"
                f" it has {member.size}"
            )
        if member.method != STORED or member.size <= max(4 * length, _SMALL):
            data = archive.read(name, max(4 * length, READ_LIMIT))[start : start + length]
        else:  # a small part of a large storage: its checksum is over all of it
            if not self._checked:
                archive.check_crc(name)
                self._checked = True
            data = archive.pread(name, start, length)
        return data if self._order == b"little" else _swapped(data, item)

    @property
    def place(self) -> Callable[[int], tuple[str, int]] | None:
        """Where the bytes lie; None if they are compressed or big-endian."""
        archive, name = self._archive, self._name
        if self._order != b"little" or name not in archive or archive.member(name).method != STORED:
            return None
        return lambda start: (name, archive.window(name)[0] + start)


def _swapped(data: bytes, item: int) -> bytes:
    return b"".join(data[at : at + item][::-1] for at in range(0, len(data), item)) if item > 1 else data


def is_legacy(head: bytes) -> bool:
    """Whether the first bytes are those of a legacy stream; a pickle of protocol 4 or 5 has a frame before the number."""
    return head[:1] == b"\x80" and head[:40].find(_LEGACY_MAGIC) in (2, 11)


def open_legacy(file: ReadFile) -> Checkpoint:
    """The checkpoint in a legacy stream: magic, protocol, system, object and storage keys as pickles, then storages."""
    where = printable(file.path)
    storages: dict[str, _Position] = {}

    def persistent(id: Any) -> Any:
        if isinstance(id, tuple) and len(id) >= 2 and id[0] in ("module", b"module"):
            return id[1]  # the class itself; then its source file and source, which nobody needs
        if not (isinstance(id, tuple) and len(id) == 6 and id[0] in ("storage", b"storage")):
            return Persistent(id)
        _, kind, key, _, count, view = id
        position = storages.setdefault(str(key), _Position(storage_dtype(kind), _count(count, where)))
        if view is None:
            return position.storage(file, str(key), 0, position.count)
        if not (isinstance(view, tuple) and len(view) == 3):
            raise FormatError(f"{where}: storage {printable(key)!r} is a malformed view")
        offset, length = _count(view[1], where), _count(view[2], where)
        if offset + length > position.count:
            raise FormatError(f"{where}: a view of storage {printable(key)!r} reaches beyond it")
        return position.storage(file, str(key), offset, length)

    pickles = _Pickles(file, 0, where)
    magic, protocol, system = pickles.next(), pickles.next(), pickles.next()
    if magic != 0x1950A86A20F9469CFC6C or protocol != 1001:
        raise FormatError(f"{where}: a legacy checkpoint of protocol {printable(protocol)}; 1001 is read")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise FormatError(f"{where}: was written on a big-endian machine; save it again in the zip form")
    value = pickles.next(persistent)
    keys = pickles.next()
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys):
        raise FormatError(f"{where}: its list of storages is malformed")
    at = pickles.position
    for key in map(str, keys):
        position = storages.get(key)
        if position is None:
            raise FormatError(f"{where}: storage {printable(key)!r} belongs to no tensor")
        at = position.place(file, at, key)
    checkpoint = Checkpoint(where, value)
    if at < file.size:
        checkpoint.notes.append(f"{file.size - at} bytes after the last storage were not read")
    return checkpoint


class _Position:
    """A legacy storage: where its bytes begin is known only after the pickles before them were read."""

    __slots__ = ("count", "dtype", "start")

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype, self.count, self.start = dtype, count, -1

    def place(self, file: ReadFile, at: int, key: str) -> int:
        """Note that the storage lies at `at`; the offset after it."""
        where = printable(file.path)
        held = int.from_bytes(file.pread(at, 8, f"storage {key!r}"), "little", signed=True)
        if held != self.count:
            raise FormatError(f"{where}: storage {printable(key)!r} should hold {self.count} elements, it has {held}")
        end = at + 8 + held * ITEM_SIZE.get(self.dtype, 1)
        if self.dtype not in ITEM_SIZE:
            raise FormatError(f"{where}: storage {printable(key)!r} is of unknown kind {printable(self.dtype)}")
        if end > file.size:
            raise FormatError(f"{where}: storage {printable(key)!r} should end at byte {end}, the file has {file.size}")
        self.start = at + 8
        return end

    def storage(self, file: ReadFile, key: str, offset: int, count: int) -> Storage:
        """A Storage of `count` elements from `offset` on."""
        item = ITEM_SIZE.get(self.dtype, 1)

        def read(start: int, length: int) -> bytes:
            if self.start < 0:
                raise FormatError(f"{printable(file.path)}: storage {printable(key)!r} is missing")
            return file.pread(self.start + offset * item + start, length, f"storage {key!r}")

        return Storage(self.dtype, count, read, lambda start: ("", self.start + offset * item + start))


class _Pickles:
    """Pickles that follow one another in a file; only as much of it is read as they take."""

    def __init__(self, file: ReadFile, position: int, where: str, end: int | None = None) -> None:
        self._file, self.position, self._where = file, position, where
        self._end = file.size if end is None else end
        self._start, self._data = position, b""  # what was read, and where it lies

    def next(self, persistent: Callable[[Any], Any] = Persistent) -> Any:
        """The value of the next pickle."""
        window = _SMALL
        while True:
            offset = self.position - self._start
            try:
                value, used = load(self._data, self._where, offset, persistent)
            except Truncated:
                have = len(self._data) - offset
                if self.position + max(have, 0) >= self._end or have > SIZE_LIMIT:
                    raise
                while window <= have:
                    window *= 8
                self._start = self.position
                self._data = self._file.pread(self._start, min(window, self._end - self._start))
            else:
                self.position = self._start + used
                return value


def is_tar(head: bytes) -> bool:
    """Whether the first bytes are those of a tar made by torch before 0.1.10."""
    return head[:100].rstrip(b"\0").removeprefix(b"./") in (b"sys_info", b"pickle", b"tensors", b"storages")


def open_tar(file: ReadFile) -> Checkpoint:
    """The checkpoint in an old tar: members storages, tensors and pickle."""
    where = printable(file.path)
    parts = _tar_parts(file, where)
    storages: dict[Any, Storage] = {}
    at, end = parts["storages"]
    pickles = _Pickles(file, at, where, end)
    for _ in range(_count(pickles.next(), where)):
        key, _, kind = _fields(pickles.next(), 3, where)
        position = _Position(
            storage_dtype(kind), int.from_bytes(file.pread(pickles.position, 8), "little", signed=True)
        )
        _count(position.count, where)
        pickles.position = position.place(file, pickles.position, str(key))
        storages[str(key)] = position.storage(file, str(key), 0, position.count)
    for view in pickles.next():
        key, base, offset, count = _fields(view, 4, where)
        root = storages.get(str(base))
        if root is None or _count(offset, where) + _count(count, where) > root.count:
            raise FormatError(f"{where}: a view of storage {printable(base)!r} reaches beyond it")
        storages[str(key)] = _shifted(root, offset, count)

    tensors: dict[str, Tensor] = {}
    at, end = parts["tensors"]
    pickles = _Pickles(file, at, where, end)
    for _ in range(_count(pickles.next(), where)):
        key, storage_key, _ = _fields(pickles.next(), 3, where)
        rank = int.from_bytes(file.pread(pickles.position, 4), "little", signed=True)
        if not 0 <= rank <= 64:
            raise FormatError(f"{where}: a tensor of {rank} dimensions cannot be")
        data = file.pread(pickles.position + 8, 8 * (2 * rank + 1))
        numbers = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
        pickles.position += 8 + len(data)
        storage = storages.get(str(storage_key))
        if storage is None:
            raise FormatError(f"{where}: storage {printable(storage_key)!r} is missing")
        args = (storage, numbers[-1], tuple(numbers[:rank]), tuple(numbers[rank : 2 * rank]))
        tensor = rebuilt(Node(Global("torch._utils", "_rebuild_tensor"), args), str(key), where)
        if tensor is not None:
            tensors[str(key)] = tensor

    def persistent(id: Any) -> Any:
        if isinstance(id, tuple):
            return id[0] if id else Persistent(id)
        return tensors.get(str(id)) or storages.get(str(id)) or Persistent(id)

    at, end = parts["pickle"]
    return Checkpoint(where, _Pickles(file, at, where, end).next(persistent))


def _shifted(root: Storage, offset: int, count: int) -> Storage:
    item = ITEM_SIZE.get(root.dtype, 1)
    return Storage(root.dtype, count, lambda start, length: root.read(offset * item + start, length))


def _fields(value: Any, count: int, where: str) -> Any:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise FormatError(f"{where}: its index is malformed")
    return value


def _tar_parts(file: ReadFile, where: str) -> dict[str, tuple[int, int]]:
    """member -> (begin, end), for the three that matter."""
    parts: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(64):
        if at + 512 > file.size or len(parts) == len(_TAR_PARTS):
            break
        header = file.pread(at, 512)
        name = header[:100].rstrip(b"\0").removeprefix(b"./").decode("latin-1")
        digits = header[124:136].strip(b" \0")
        if not digits.isdigit() or len(digits) > 11:
            break
        size = int(digits, 8) if not digits.strip(b"01234567") else -1
        if size < 0 or at + 512 + size > file.size:
            raise FormatError(f"{where}: tar member {printable(name)!r} reaches beyond the file")
        if name in parts:
            raise FormatError(f"{where}: tar member {printable(name)!r} occurs twice")
        if name in _TAR_PARTS:
            parts[name] = (at + 512, at + 512 + size)
        at += 512 + -(-size // 512) * 512
    missing = [name for name in _TAR_PARTS if name not in parts]
    if missing:
        raise FormatError(f"{where}: looks like an old torch tar, but has no member {', '.join(missing)}")
    return parts
