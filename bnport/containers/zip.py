"""The central directory of a zip archive, and its members read by position.

Written for archives of strangers: the directory is read once, strictly, and everything in it is held against the
bytes that are there. Refused with FormatError: no (or more than one possible) end record, bytes before the archive or
between directory and end record, several disks, encryption, members that share bytes, two members of one name, names
that climb out of the archive, a local header that contradicts the directory, sizes that DEFLATE cannot reach, a wrong
CRC-32. Understood: stored and deflated members, zip64, data descriptors, an archive comment. (APPNOTE.TXT 6.3.10)
"""

from __future__ import annotations

import zlib
from struct import Struct

from bnport._lazy import TYPE_CHECKING
from bnport.errors import FormatError, NotFound, listed, printable

if TYPE_CHECKING:
    from typing import NoReturn

    from bnport.containers.files import ReadFile

STORED, DEFLATED = 0, 8
READ_LIMIT = 128 << 20  # bytes of one member that read() returns unless told otherwise
MEMBERS_LIMIT = 250_000  # of one archive; 60 000 take 0.2 s and 40 MiB
DIRECTORY_LIMIT = 64 << 20

_END = Struct("<4s4H2LH")
_END64_LOCATOR = Struct("<4sLQL")
_END64 = Struct("<4sQ2H2L4Q")
_CENTRAL = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_U64 = Struct("<Q")

_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_DESCRIPTOR = 1 << 3  # sizes and CRC follow the data; in the local header they may be 0
_UTF8 = 1 << 11
_MAX32 = 0xFFFFFFFF
_DEFLATE_RATIO = 1032  # one bit pair for 258 bytes: no DEFLATE stream expands further


class Member:
    """One entry of the central directory.

    name; method (0 stored, 8 deflated); crc (CRC-32 of the plain bytes); flags (general purpose bits); compressed
    (bytes in the archive); size (plain bytes); header_offset (of the local header); central_offset (of the entry in
    the central directory); limit (where the next member or the directory begins); data_offset (below).
    """

    __slots__ = (
        "_data_offset", "_file", "central_offset", "compressed", "crc", "flags", "header_offset", "limit", "method",
        "name", "size",
    )  # fmt: skip

    name: str
    method: int
    crc: int
    flags: int
    compressed: int
    size: int
    header_offset: int
    central_offset: int
    limit: int
    _file: ReadFile
    _data_offset: int

    @property
    def data_offset(self) -> int:
        """Where the (compressed) bytes begin. The local header is held against the directory at the first call."""
        if self._data_offset < 0:
            self._data_offset = self._verified_data_offset()
        return self._data_offset

    @property
    def _raw_name(self) -> bytes:
        """The name's own bytes: each of the encodings gives back what it was decoded from."""
        return self.name.encode("ascii" if self.name.isascii() else "utf-8" if self.flags & _UTF8 else "cp437")

    def _verified_data_offset(self) -> int:
        name_at, what = self.header_offset + _LOCAL.size, f"local header of {self.name!r}"
        raw_name = self._raw_name
        head = self._file.pread(self.header_offset, _LOCAL.size + len(raw_name), what)
        signature, _, flags, method, _, _, crc, compressed, size, name_length, extra_length = _LOCAL.unpack_from(head)
        if signature != b"PK\x03\x04":
            self._refuse(f"no local header at {self.header_offset}")
        if name_length != len(raw_name) or head[_LOCAL.size :] != raw_name:
            name = self._file.pread(name_at, name_length, what)
            self._refuse(f"its local header is named {name.decode('utf-8', 'replace')!r}")
        if size == _MAX32 or compressed == _MAX32:
            extra = self._file.pread(name_at + name_length, extra_length, what)
            wide = _zip64_values(extra, (size == _MAX32) + (compressed == _MAX32))
            if wide is None:
                self._refuse("its local header announces 64-bit sizes and has none")
            size = wide.pop(0) if size == _MAX32 else size
            compressed = wide.pop(0) if compressed == _MAX32 else compressed
        there, here = (crc, compressed, size), (self.crc, self.compressed, self.size)
        deferred = flags & _DESCRIPTOR and all(a in (0, b) for a, b in zip(there, here, strict=True))
        if method != self.method or flags & _ENCRYPTED or (there != here and not deferred):
            self._refuse("local header and central directory disagree")
        start: int = name_at + name_length + extra_length
        if start + self.compressed > self.limit:
            self._refuse("its bytes overlap what follows")
        return start

    def _refuse(self, why: str) -> NoReturn:
        raise FormatError(f"{printable(self._file.path)}: member {printable(self.name)!r}: {printable(why)}")

    def __repr__(self) -> str:
        return f"Member({self.name!r}, {self.size} bytes)"


class Archive:
    """The members of a zip archive by name, in the directory's order. Nothing but the directory is read to open it.

    `checksums` is False for an archive in which every CRC-32 is 0, as torch writes it after
    torch.serialization.set_crc32_options(False). Its CRCs are not checked if `without_checksums` allows that;
    otherwise reading a member of it is refused like any wrong CRC.
    """

    __slots__ = ("_check", "checksums", "file", "members")

    def __init__(self, file: ReadFile, *, without_checksums: bool = False) -> None:
        self.file = file
        offset, size, count = _find_directory(file)
        self.members = _read_directory(file, offset, size, count)
        self.checksums = any(m.crc for m in self.members.values()) or not any(m.size for m in self.members.values())
        self._check = self.checksums or not without_checksums

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def member(self, name: str) -> Member:
        """The member called `name`; NotFound lists what there is."""
        try:
            return self.members[name]
        except KeyError:
            raise NotFound(
                f"{printable(self.file.path)}: no member {printable(name)!r} in the archive; it holds"
                f" {listed(self.members, 4) or 'nothing'}"
            ) from None

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes:
        """All plain bytes of a member, CRC-32 checked. FormatError if it holds more than `limit`."""
        member = self.member(name)
        if member.size > limit:
            member._refuse(f"declares {member.size} bytes, at most {limit} are read")
        data = self.file.pread(member.data_offset, member.compressed, f"member {name!r}")
        if member.method == DEFLATED:
            data = _inflated(member, data)
        elif member.method != STORED:
            member._refuse(f"compression method {member.method} is not understood (stored and deflated are)")
        if self._check and zlib.crc32(data) != member.crc:
            member._refuse(f"CRC-32 is {zlib.crc32(data):08x}, {member.crc:08x} expected; the file is damaged")
        return data

    def window(self, name: str) -> tuple[int, int]:
        """(offset, size) of a stored member's bytes in the file; FormatError if it is compressed."""
        member = self.member(name)
        if member.method != STORED:
            member._refuse("is compressed; it can only be read whole")
        return member.data_offset, member.size

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of a stored member; the CRC-32 is not checked (see check_crc)."""
        start, size = self.window(name)
        if offset < 0 or length < 0 or offset + length > size:
            self.member(name)._refuse(f"{length} bytes at {offset} are asked for, it has {size}")
        return self.file.pread(start + offset, length, f"member {name!r}")

    def check_crc(self, name: str) -> None:
        """Read a stored member in blocks and compare its CRC-32; FormatError if it differs."""
        start, size = self.window(name)
        member, crc, done = self.member(name), 0, 0 if self._check else size
        while done < size:
            block = self.file.pread(start + done, min(1 << 20, size - done), f"member {name!r}")
            crc, done = zlib.crc32(block, crc), done + len(block)
        if self._check and crc != member.crc:
            member._refuse(f"CRC-32 is {crc:08x}, {member.crc:08x} expected; the file is damaged")


def _inflated(member: Member, data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(data, member.size + 1)  # one more than declared, to notice a longer stream
    except zlib.error as error:
        member._refuse(f"cannot be inflated ({error})")
    if len(plain) != member.size or not inflater.eof or inflater.unused_data:
        member._refuse(f"does not inflate to the {member.size} bytes it declares")
    return plain


def end_records(tail: bytes | bytearray) -> list[int]:
    """Where in the last bytes of a file an end record lies whose comment reaches just to the end; the last one first."""
    ends, at = [], tail.rfind(b"PK\x05\x06")
    while at >= 0:
        comment = at + _END.size
        if comment <= len(tail) and comment + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            ends.append(at)
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return ends


def _find_directory(file: ReadFile) -> tuple[int, int, int]:
    """(offset, size, number of entries) of the central directory."""
    shown = printable(file.path)
    tail_start = max(0, file.size - _END.size - 0xFFFF)
    tail = file.pread(tail_start, file.size - tail_start, "end of the archive")
    ends = end_records(tail)
    if not ends:
        raise FormatError(f"{shown}: no end of a zip archive found; the file is truncated or not a zip archive")
    if len(ends) > 1:
        raise FormatError(f"{shown}: {len(ends)} possible ends of the zip archive; which one counts is ambiguous")
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack_from(tail, ends[0])
    end = tail_start + ends[0]
    narrow = (disk, first_disk, here, count, size, offset)
    if end >= _END64_LOCATOR.size:
        locator = file.pread(end - _END64_LOCATOR.size, _END64_LOCATOR.size)
        if locator[:4] == b"PK\x06\x07":
            _, _, end64, disks = _END64_LOCATOR.unpack(locator)
            if disks > 1 or end64 + _END64.size + _END64_LOCATOR.size > end:
                raise FormatError(f"{shown}: the zip64 end record at {end64} cannot be there")
            record = _END64.unpack(file.pread(end64, _END64.size, "zip64 end record"))
            if record[0] != b"PK\x06\x06" or end64 + 12 + record[1] != end - _END64_LOCATOR.size:
                raise FormatError(f"{shown}: no zip64 end record at {end64}")
            wide = record[4:]
            limits = (0xFFFF,) * 4 + (_MAX32,) * 2
            if any(a not in (b, most) for a, b, most in zip(narrow, wide, limits, strict=True)):
                raise FormatError(f"{shown}: the zip end record and its zip64 form disagree")
            disk, first_disk, here, count, size, offset = wide
            end = end64
    if disk or first_disk or here != count:
        raise FormatError(f"{shown}: an archive in several parts is not read")
    if offset + size != end:
        raise FormatError(
            f"{shown}: the central directory should end at {offset + size}, its end record is at {end}; the file is"
            " damaged or has foreign bytes before the archive"
        )
    if size > DIRECTORY_LIMIT or count > MEMBERS_LIMIT or count * _CENTRAL.size > size:
        raise FormatError(f"{shown}: a central directory of {count} members in {size} bytes is not read")
    return offset, size, count


def _read_directory(file: ReadFile, offset: int, size: int, count: int) -> dict[str, Member]:
    data = file.pread(offset, size, "central directory")
    shown = printable(file.path)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            raise FormatError(f"{shown}: the central directory ends within entry {len(members)} of {count}")
        (
            signature, _, _, flags, method, _, _, crc, compressed, plain, name_length, extra_length, comment_length, disk, _,
            _, header,
        ) = _CENTRAL.unpack_from(data, at)  # fmt: skip
        after_name = at + _CENTRAL.size + name_length
        after = after_name + extra_length + comment_length
        if signature != b"PK\x01\x02" or after > size:
            raise FormatError(f"{shown}: the central directory is damaged at entry {len(members)} of {count}")
        member = Member()
        member._file, member._data_offset = file, -1
        member.name = _decoded(data[at + _CENTRAL.size : after_name], flags, shown)
        wide = (plain, compressed, header)
        if _MAX32 in wide:
            values = _zip64_values(data[after_name : after_name + extra_length], wide.count(_MAX32))
            if values is None:
                member._refuse("announces 64-bit sizes and has none")
            plain, compressed, header = (values.pop(0) if w == _MAX32 else w for w in wide)
        member.method, member.flags, member.crc = method, flags, crc
        member.compressed, member.header_offset = compressed, header
        # one object where they are equal: there may be thousands
        member.size = compressed if compressed == plain else plain
        member.central_offset = offset + at
        if flags & _ENCRYPTED:
            member._refuse("is encrypted")
        if disk not in (0, 0xFFFF):
            member._refuse("lies in another part of the archive")
        if method == STORED and compressed != plain:
            member._refuse(f"is stored, but {plain} bytes are said to take {compressed}")
        if plain > compressed * _DEFLATE_RATIO:
            member._refuse(f"{compressed} bytes cannot unpack to the {plain} it declares")
        if member.name in members:
            member._refuse("occurs twice in the archive")
        members[member.name] = member
        at = after
    if at != size:
        raise FormatError(f"{shown}: {size - at} bytes too many in the central directory")
    _refuse_overlap(members, offset)
    return members


def _refuse_overlap(members: dict[str, Member], directory: int) -> None:
    """Set every member's limit; no member may reach into the next one or into the directory."""
    limit = directory
    for member in sorted(members.values(), key=lambda m: m.header_offset, reverse=True):
        # the local header's extra field is unknown until it is read; data_offset checks again with it
        if member.header_offset + _LOCAL.size + len(member._raw_name) + member.compressed > limit:
            member._refuse("its bytes overlap what follows" if limit <= directory else "lies past the end")
        member.limit = limit
        limit = member.header_offset


def _zip64_values(extra: bytes, wanted: int) -> list[int] | None:
    """The first `wanted` 64-bit values of the zip64 extra field, or None."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            if len(field) != length or length < 8 * wanted:
                return None
            return [_U64.unpack_from(field, 8 * i)[0] for i in range(wanted)]
        at += 4 + length
    return None


def _decoded(raw: bytes, flags: int, shown: str) -> str:
    """A member's name; refused if it is empty, absolute, holds a NUL, or climbs out of the archive."""
    try:
        name = raw.decode("ascii") if raw.isascii() else raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise FormatError(f"{shown}: a member's name is not UTF-8: {raw[:60]!r}") from None
    parts = name.replace("\\", "/").split("/") if ("\\" in name or "/" in name or "." in name) else [name]
    if not name or "\0" in name or parts[0] == "" or parts[0][1:2] == ":" or ".." in parts:
        raise FormatError(f"{shown}: {printable(name)!r} is not a name that an archive may hold")
    return name
