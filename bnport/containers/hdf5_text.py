"""Variable-length texts of an HDF5 attribute, read without the library.

Given a damaged heap the library (1.14.6) can loop for ever, and given many entries for one long text it unpacks each.
Here an attribute message gives (length, heap address, index) for each text, and a heap collection is walked once, always
forwards, with the texts' total length bounded before one is read. (HDF5 file format specification 3.0, III.E and IV.A.)
"""

from __future__ import annotations

import struct

from bnport._lazy import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.containers.hdf5 import H5

_HEADERS_LIMIT = 16 << 20  # bytes of one object's header, all blocks together
_BLOCK = 1 << 20  # a collection up to this size is read whole: the usual one has 4 KiB
_CONTINUATION, _ATTRIBUTE = 0x10, 0x0C


def texts(h5: H5, where: str, address: int, name: bytes, count: int, limit: int) -> list[bytes]:
    """The `count` texts of the attribute `name` of the object whose header is at `address`.

    Raises FormatError, naming the file and `where`, if they are together longer than `limit`, or the file does not hold
    them.
    """
    try:
        data = _values(h5, address, name, 16 * count)
        listed = [struct.unpack_from("<IQI", data, 16 * i) for i in range(count)]
        total = sum(length for length, _, _ in listed)
        if total > limit:
            h5.refuse(where, f"{count} texts of together {total} bytes are more than is read")
        heaps = h5.heaps  # many attributes share a collection
        found = []
        for length, heap, index in listed:
            if not length:
                found.append(b"")
                continue
            if heap not in heaps:
                heaps[heap] = _objects(h5, heap)
            start, size = heaps[heap][index]
            if length > size:
                raise LookupError
            found.append(h5.at(start, length))
    except (LookupError, struct.error):
        h5.refuse(where, f"its {count} texts are not where the file says, or in a form that is not read")
    return found


def _values(h5: H5, address: int, name: bytes, length: int) -> bytes:
    """The raw values of an attribute of the object at `address`."""
    for kind, body in _messages(h5, address):
        if kind != _ATTRIBUTE or len(body) < 8 or body[0] not in (1, 2, 3):
            continue
        sizes = struct.unpack_from("<HHH", body, 2)
        first = 9 if body[0] == 3 else 8
        if body[first : first + sizes[0]].rstrip(b"\0") == name:
            first += sum(n + -n % 8 for n in sizes) if body[0] == 1 else sum(sizes)
            if first + length > len(body):
                raise LookupError
            return body[first : first + length]
    raise LookupError


def _messages(h5: H5, address: int) -> Iterator[tuple[int, bytes]]:
    """(type, body) of every message in an object header of version 1 or 2."""
    start = h5.at(address, 6)
    if start[:4] == b"OHDR":
        flags = start[5]
        at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        blocks = [(at + width, int.from_bytes(h5.at(at, width), "little"))]
        head, skip = 4, 6 if flags & 0x04 else 4
    else:
        if start[0] != 1:
            raise LookupError
        size = struct.unpack("<I", h5.at(address + 8, 4))[0]
        blocks, head, skip = [(address + 16, size)], 0, 8
    total = 0
    while blocks:
        where, size = blocks.pop(0)
        total += size + 16
        if total > _HEADERS_LIMIT:
            raise LookupError
        block, at = h5.at(where, size), 0
        while at + skip <= size:
            if head:
                kind, length = block[at], int.from_bytes(block[at + 1 : at + 3], "little")
            else:
                kind, length = struct.unpack_from("<HH", block, at)
            body = block[at + skip : at + skip + length]
            at += skip + length
            if kind == _CONTINUATION and len(body) >= 16:
                where, more = struct.unpack("<QQ", body[:16])
                blocks.append((where + head, more - 2 * head))  # version 2 puts a signature and a checksum around it
                if more < 2 * head:
                    raise LookupError
            else:
                yield kind, body


def _objects(h5: H5, address: int) -> dict[int, tuple[int, int]]:
    """index -> (address, size) of every object in a global heap collection."""
    signature, size = struct.unpack("<4s4xQ", h5.at(address, 16))
    if signature != b"GCOL" or size > h5.size:
        raise LookupError
    block = h5.at(address, size) if size <= _BLOCK else None
    found: dict[int, tuple[int, int]] = {}
    at = 16
    while at + 16 <= size:
        head = block[at : at + 16] if block is not None else h5.at(address + at, 16)
        index, length = struct.unpack("<H6xQ", head)
        if not index:
            break  # the free space at the end
        found[index] = (address + at + 16, length)
        at += 16 + length + -length % 8
    return found
