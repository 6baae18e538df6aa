"""A copy of a file with some bytes of it replaced, and the zip checksums and directory brought up to date.

CRC-32 is linear: the checksum of a member of which a few bytes change follows from the old checksum and those bytes
alone, so a 4 GB member is patched without being read. A checksum that was wrong before is wrong afterwards too.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, NamedTuple

from bnport.containers.files import ReadFile, copy_contents
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnport.containers.zip import Archive, Member

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zip, bits reversed
_CRC_AT, _CENTRAL_CRC_AT = 14, 16  # in the local header and in the central directory; sizes follow (APPNOTE 4.3)
_CENTRAL_OFFSET_AT = 42
_MAX32 = 0xFFFFFFFF


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
    bit = 0
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
    places = [Patch(member.header_offset + _CRC_AT, value), Patch(member.central_offset + _CENTRAL_CRC_AT, value)]
    if member.flags & 1 << 3:
        at = end
        if archive.file.pread(at, 4, "data descriptor") == b"PK\x07\x08":
            at += 4
        places = [Patch(at, value), places[1]]
        if archive.file.pread(member.header_offset + _CRC_AT, 4) == member.crc.to_bytes(4, "little"):
            places.append(Patch(member.header_offset + _CRC_AT, value))
    return places


def replace_members(archive: Archive, out: str, contents: dict[str, bytes], patches: Iterable[Patch] = ()) -> None:
    """Fill the empty file `out` with the archive, some members having new contents; every other byte is copied.

    `patches` are in offsets of the old archive, outside the replaced members. A replaced member is stored or deflated
    as it was. What follows it moves, and so do the entries of the central directory.
    """
    file = archive.file
    directory = min((m.central_offset for m in archive.members.values()), default=file.size)
    edits: list[tuple[int, int, bytes]] = []  # start, end in the old file, new bytes
    renewed = {}
    for name, plain in contents.items():
        member = archive.member(name)
        data = plain
        if member.method == 8:
            packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
            data = packer.compress(plain) + packer.flush()
        if max(len(plain), len(data)) >= _MAX32 or member.flags & 1 << 3 or member.size >= _MAX32:
            raise FormatError(f"{printable(file.path)}: member {printable(name)!r} cannot be replaced in place")
        sums = b"".join(v.to_bytes(4, "little") for v in (zlib.crc32(plain), len(data), len(plain)))
        header = member.header_offset + _CRC_AT
        edits += [(header, header + 12, sums), (member.data_offset, member.data_offset + member.compressed, data)]
        renewed[name] = sums
    edits.sort()
    tail = _directory(archive, directory, edits, renewed)
    moved = [Patch(_moved(p.offset, edits), p.data) for p in patches if p.offset < directory]
    tail = _patched(tail, directory, [p for p in patches if p.offset >= directory])
    descriptor = os.open(out, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0))
    try:
        at = 0
        for start, end, data in edits:
            _copy_range(file, descriptor, at, start)
            _append(descriptor, data)
            at = end
        _copy_range(file, descriptor, at, directory)
        _append(descriptor, tail)
        for patch in moved:
            write_at(descriptor, patch.offset, patch.data)
    finally:
        os.close(descriptor)


def _moved(offset: int, edits: list[tuple[int, int, bytes]]) -> int:
    """Where a byte of the old file lies in the new one."""
    return offset + sum(len(data) - (end - start) for start, end, data in edits if end <= offset)


def _patched(tail: bytes, start: int, patches: list[Patch]) -> bytes:
    changed = bytearray(tail)
    for patch in patches:
        changed[patch.offset - start : patch.offset - start + len(patch.data)] = patch.data
    return bytes(changed)


def _directory(archive: Archive, start: int, edits: list[tuple[int, int, bytes]], renewed: dict[str, bytes]) -> bytes:
    """The central directory and all after it, with offsets, sizes and checksums as they have to be."""
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
            tail[at + _CENTRAL_CRC_AT : at + _CENTRAL_CRC_AT + 12] = renewed[member.name]
        where = _moved(member.header_offset, edits)
        if number(at + _CENTRAL_OFFSET_AT, 4) != _MAX32:
            put(at + _CENTRAL_OFFSET_AT, 4, where)
        elif where != member.header_offset:
            raise FormatError(
                f"{printable(file.path)}: member {printable(member.name)!r} lies beyond 4 GiB and would move"
            )
    end = _end_record(tail)
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


def _end_record(tail: bytearray) -> int:
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise FormatError("no end of the zip archive found")
    return at


def _copy_range(source: ReadFile, descriptor: int, start: int, end: int) -> None:
    while start < end:
        try:
            count = os.copy_file_range(source.fileno(), descriptor, end - start, start)
        except (AttributeError, OSError):  # not on this system, or across file systems
            count = os.write(descriptor, source.pread(start, min(1 << 20, end - start)))
        if not count:
            raise FormatError(f"{printable(source.path)}: shrank while it was copied")
        start += count


def _append(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
