"""A copy of a file with some bytes of it replaced, and the zip checksums and directory brought up to date.

CRC-32 is linear: the checksum of a member of which a few bytes change follows from the old checksum and those bytes
alone, so a 4 GB member is patched without being read. A checksum that was wrong before is wrong afterwards too.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, NamedTuple

from bnport.containers.files import ReadFile, append, copy_contents, copy_range, tell
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnport.containers.zip import Archive, Member

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zip, bits reversed
_DESCRIPTOR = 1 << 3  # sizes and CRC follow the data
_MAX32 = 0xFFFFFFFF
_ZEROS = bytes(1 << 14)
_PART = 16 << 20  # bytes compressed in one go


class _Header(NamedTuple):
    """Where the parts of a member's header are (APPNOTE 4.3.7, 4.3.12); the local one has no `offset`."""

    flags: int
    crc: int
    compressed: int
    size: int
    name_length: int
    offset: int
    length: int  # then come the name and the extra fields


_LOCAL = _Header(flags=6, crc=14, compressed=18, size=22, name_length=26, offset=-1, length=30)
_CENTRAL = _Header(flags=8, crc=16, compressed=20, size=24, name_length=28, offset=42, length=46)


class Patch(NamedTuple):
    """`data` replaces as many bytes at `offset` of the file."""

    offset: int
    data: bytes


def _multiplied(a: int, b: int) -> int:
    """a * b modulo the CRC-32 polynomial, both with bits reversed (x^0 is the highest bit)."""
    product = 0
    while b:
        if b & 0x80000000:
            product ^= a
        a = (a >> 1) ^ (_POLYNOMIAL if a & 1 else 0)
        b = (b << 1) & _MAX32
    return product


_POWERS: list[int] = []  # x^(8 * 2^k), filled at the first use


def _zeros_after(crc: int, count: int) -> int:
    """What a difference `crc` of two checksums becomes once `count` equal bytes follow."""
    if not crc:
        return 0
    if not _POWERS:
        power = 0x00800000  # x^8
        for _ in range(64):
            _POWERS.append(power)
            power = _multiplied(power, power)
    few = count % len(_ZEROS)
    crc = zlib.crc32(_ZEROS[:few], crc ^ _MAX32) ^ _MAX32  # for so many the loop below takes longer
    count, bit = count // len(_ZEROS), len(_ZEROS).bit_length() - 1
    while count:
        if count & 1:
            crc = _multiplied(crc, _POWERS[bit])
        count, bit = count >> 1, bit + 1
    return crc


def updated_crc(crc: int, changes: Iterable[tuple[int, bytes, bytes]], length: int) -> int:
    """The CRC-32 of a text of `length` bytes with the old CRC-32 `crc`, once the changes are made.

    changes: (offset, old bytes, new bytes as long), sorted and apart from each other.
    """
    difference = end = 0
    for offset, old, new in changes:
        if len(old) != len(new) or offset < end:
            raise ValueError("only bytes of the same length are patched, each once")
        after = offset + len(new)
        difference = _zeros_after(difference, after - end) ^ zlib.crc32(old) ^ zlib.crc32(new)
        end = after
    return crc ^ _zeros_after(difference, length - end)


def joined(patches: Iterable[Patch]) -> list[Patch]:
    """The patches sorted, those that touch each other made one."""
    result: list[Patch] = []
    for patch in sorted(patches):
        if result and result[-1].offset + len(result[-1].data) == patch.offset:
            result[-1] = Patch(result[-1].offset, result[-1].data + patch.data)
        else:
            result.append(patch)
    return result


def copy_patched(source: ReadFile, out: str, patches: Iterable[Patch]) -> None:
    """Fill the empty file `out` with the bytes of `source` and write the patches over them."""
    descriptor = os.open(out, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0))
    try:
        copy_contents(source.path, descriptor)
        if os.fstat(descriptor).st_size != source.size:
            raise FormatError(f"{printable(source.path)}: changed while it was copied")
        for patch in patches:
            write_at(descriptor, patch.offset, patch.data)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, offset: int, data: bytes) -> None:
    """All of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:] if done else data, offset + done)


def crc_patches(archive: Archive, member: Member, patches: Iterable[Patch]) -> list[Patch]:
    """The two places that hold the CRC-32 of a stored member, as they have to be after the patches inside it.

    The patches must not overlap. A member whose CRC follows its data (a data descriptor) keeps it there too.
    """
    start, size = archive.window(member.name)
    end = start + size
    ordered = joined(patches)
    if ordered and (ordered[0].offset < start or ordered[-1].offset + len(ordered[-1].data) > end):
        raise ValueError("a patch lies outside the member")
    crc = updated_crc(
        member.crc, ((p.offset - start, archive.file.pread(p.offset, len(p.data)), p.data) for p in ordered), size
    )
    value = crc.to_bytes(4, "little")
    places = [Patch(member.header_offset + _LOCAL.crc, value), Patch(member.central_offset + _CENTRAL.crc, value)]
    if member.flags & _DESCRIPTOR:
        _, marked = _descriptor(archive, member)
        places = [Patch(end + 4 * marked, value), places[1]]
        if archive.file.pread(member.header_offset + _LOCAL.crc, 4) == member.crc.to_bytes(4, "little"):
            places.append(Patch(member.header_offset + _LOCAL.crc, value))
    return places


def _descriptor(archive: Archive, member: Member) -> tuple[int, bool]:
    """(length, whether it begins with a signature) of the data descriptor behind a member, known by what it says."""
    end = member.data_offset + member.compressed
    there = archive.file.pread(end, min(24, member.limit - end), "data descriptor")
    crc = member.crc.to_bytes(4, "little")
    for width in (8, 4):  # 64-bit sizes or not: only the values tell (APPNOTE 4.3.9)
        if max(member.compressed, member.size) >= 1 << 8 * width:
            continue
        sizes = member.compressed.to_bytes(width, "little") + member.size.to_bytes(width, "little")
        for signature in (b"PK\x07\x08", b""):
            expected = signature + crc + sizes
            if there.startswith(expected):
                return len(expected), bool(signature)
    raise FormatError(
        f"{printable(archive.file.path)}: member {printable(member.name)!r}: no data descriptor behind it that agrees with"
        " the directory"
    )


def replace_members(archive: Archive, out: str, contents: dict[str, bytes], patches: Iterable[Patch] = ()) -> None:
    """Fill the empty file `out` with the archive, some members having new contents; every other byte is copied.

    `patches` are in offsets of the old archive, outside the replaced members. A replaced member is stored or deflated
    as it was; sizes and checksum that followed it (a data descriptor) stand in its header now. What follows it moves,
    and so do the entries of the central directory.
    """
    file = archive.file
    directory = min((m.central_offset for m in archive.members.values()), default=file.size)
    edits: list[tuple[int, int, bytes]] = []  # start, end in the old file, new bytes
    renewed = {}
    for name, plain in contents.items():
        member = archive.member(name)
        data = plain
        if member.method == 8:
            data = _deflated(plain)
        new = renewed[name] = _Sums(zlib.crc32(plain), len(data), len(plain))
        start, end = member.data_offset, member.data_offset + member.compressed
        header = bytearray(file.pread(member.header_offset, start - member.header_offset, "local header"))
        _renew(header, 0, _LOCAL, new, member)
        if member.flags & _DESCRIPTOR:
            end += _descriptor(archive, member)[0]
        edits += [(member.header_offset, start, bytes(header)), (start, end, data)]
    edits.sort()
    tail = _directory(archive, directory, edits, renewed)
    moved = [Patch(_moved(p.offset, edits), p.data) for p in patches if p.offset < directory]
    tail = _patched(tail, directory, [p for p in patches if p.offset >= directory])
    descriptor = os.open(out, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0))
    try:
        at = 0
        for start, end, data in edits:
            copy_range(file, descriptor, at, start)
            append(descriptor, data)
            at = end
        copy_range(file, descriptor, at, directory)
        append(descriptor, tail)
        for patch in moved:
            write_at(descriptor, patch.offset, patch.data)
    finally:
        os.close(descriptor)


def _deflated(plain: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = []
    for start in range(0, len(plain), _PART):
        tell(start, len(plain), "compressed")
        parts.append(packer.compress(memoryview(plain)[start : start + _PART]))
    tell(len(plain), len(plain), "compressed")
    return b"".join([*parts, packer.flush()])


def _moved(offset: int, edits: list[tuple[int, int, bytes]]) -> int:
    """Where a byte of the old file lies in the new one."""
    return offset + sum(len(data) - (end - start) for start, end, data in edits if end <= offset)


def _patched(tail: bytes, start: int, patches: list[Patch]) -> bytes:
    changed = bytearray(tail)
    for patch in patches:
        changed[patch.offset - start : patch.offset - start + len(patch.data)] = patch.data
    return bytes(changed)


class _Sums(NamedTuple):
    """What a header says of a member's bytes."""

    crc: int
    compressed: int
    size: int


def _renew(header: bytearray, at: int, form: _Header, new: _Sums, member: Member) -> None:
    """Checksum and sizes into the header at `at`, which says from now on that they stand there."""
    header[at + form.crc : at + form.crc + 4] = new.crc.to_bytes(4, "little")
    _put(header, at, form, form.size, new.size, member)
    _put(header, at, form, form.compressed, new.compressed, member)
    header[at + form.flags] &= ~_DESCRIPTOR


def _put(header: bytearray, at: int, form: _Header, field: int, value: int, member: Member) -> None:
    """A size or an offset, in 32 bits, or in the 64 of the zip64 extra field if that is where it stands."""

    def number(place: int, length: int) -> int:
        return int.from_bytes(header[place : place + length], "little")

    wide = [f for f in (form.size, form.compressed, form.offset) if f >= 0 and number(at + f, 4) == _MAX32]
    place, width = at + field, 4
    if field in wide:
        extra = at + form.length + number(at + form.name_length, 2)
        while number(extra, 2) != 1:  # it is there: the reader has taken the number from it
            extra += 4 + number(extra + 2, 2)
            if extra >= len(header):
                raise FormatError(f"{printable(member._file.path)}: was changed meanwhile")
        place, width = extra + 4 + 8 * wide.index(field), 8
    elif value >= _MAX32:
        raise FormatError(
            f"{printable(member._file.path)}: member {printable(member.name)!r} grows beyond what its zip header can say"
        )
    header[place : place + width] = value.to_bytes(width, "little")


def _directory(archive: Archive, start: int, edits: list[tuple[int, int, bytes]], renewed: dict[str, _Sums]) -> bytes:
    """The central directory and all after it, with offsets, sizes and checksums as they have to be."""
    from bnport.containers.zip import end_records

    file = archive.file
    tail = bytearray(file.pread(start, file.size - start, "central directory"))

    def put(at: int, length: int, value: int) -> None:
        if value >= 1 << 8 * length:
            raise FormatError(f"{printable(file.path)}: grows beyond what its zip directory can say")
        tail[at : at + length] = value.to_bytes(length, "little")

    def number(at: int, length: int) -> int:
        return int.from_bytes(tail[at : at + length], "little")

    for member in archive.members.values():
        at = member.central_offset - start
        if member.name in renewed:
            _renew(tail, at, _CENTRAL, renewed[member.name], member)
        where = _moved(member.header_offset, edits)
        if where != member.header_offset:
            _put(tail, at, _CENTRAL, _CENTRAL.offset, where, member)
    ends = end_records(tail)
    if not ends:
        raise FormatError(f"{printable(file.path)}: was changed meanwhile")
    end = ends[0]
    new_start = _moved(start, edits)
    if number(end + 16, 4) != _MAX32:
        put(end + 16, 4, new_start)
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        end64 = number(end - 12, 8) - start
        if tail[end64 : end64 + 4] != b"PK\x06\x06":
            raise FormatError(f"{printable(file.path)}: no zip64 end record where it should be")
        put(end64 + 48, 8, new_start)
        put(end - 12, 8, end64 + new_start)
    return bytes(tail)
