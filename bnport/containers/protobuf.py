"""Protocol-buffer wire format, walked lazily: a message is a range of bytes, a blob is a position and a length.

Nothing is read but tags, lengths and what is asked for, by small positioned reads; a 4 GB message costs what its index
costs. No schema: callers know the field numbers. Wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes;
groups (3, 4) are refused.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import os
import struct

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.containers.files import append, copy_range
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    from bnport.containers.files import ReadFile

    Span: TypeAlias = tuple[int, int]  # (offset, length), absolute
    Value: TypeAlias = int | Span

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

MAX_DEPTH = 100  # protobuf's own limit for nested messages
_WIDTH = {FIXED64: 8, FIXED32: 4}
_SMALLEST_READ, _LARGEST_READ = 1024, 1 << 16
_LONGEST_HEADER = 20  # a tag and a length, ten bytes each


class Buffer:
    """Bytes by position, of a file or in memory; `name` is for messages. Small reads are served from a read-ahead.

    The read-ahead starts at 1 kB after a jump (a blob that was skipped) and grows while reading goes on in sequence.
    """

    __slots__ = ("_base", "_step", "_window", "name", "size", "source")

    def __init__(self, source: ReadFile | bytes, name: str = "") -> None:
        self.source = source
        if isinstance(source, bytes):
            self.size, self.name, self._window = len(source), name or "message", source
        else:
            self.size, self.name, self._window = source.size, name or source.path, b""
        self._base, self._step = 0, _SMALLEST_READ

    def window(self, position: int) -> tuple[bytes, int]:
        """(data, base): `data` starts at byte `base` and holds a whole tag and length at `position`, or the end."""
        ends = self._base + len(self._window)
        if self._base <= position and (position + _LONGEST_HEADER <= ends or ends == self.size):
            return self._window, self._base
        if isinstance(self.source, bytes):
            return self.source, 0
        in_sequence = self._base <= position <= ends
        self._step = min(self._step * 4, _LARGEST_READ) if in_sequence else _SMALLEST_READ
        self._window = self.source.pread(position, min(self._step, self.size - position))
        self._base = position
        return self._window, self._base

    def read(self, span: Span, what: str = "data") -> bytes:
        """The bytes of a span; FormatError naming `what` if the source does not hold them all."""
        offset, length = span
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.error(offset, f"{what} should be {length} bytes, the end is at {self.size}")
        at = offset - self._base
        if at >= 0 and at + length <= len(self._window):
            return self._window[at : at + length]
        if isinstance(self.source, bytes):
            return self.source[offset : offset + length]
        return self.source.pread(offset, length, what)

    def text(self, span: Span, what: str = "a name", limit: int = 1 << 16) -> str:
        """A string field. Bytes that are not UTF-8 become \\xNN; show it through printable()."""
        offset, length = span
        if length > limit:
            raise self.error(offset, f"{what} of {length} bytes; the limit is {limit}")
        at = offset - self._base
        if at >= 0 and at + length <= len(self._window):
            return self._window[at : at + length].decode("utf-8", "backslashreplace")
        return self.read(span, what).decode("utf-8", "backslashreplace")

    def float32(self, span: Span) -> float:
        """The value of a FIXED32 float field."""
        return float(struct.unpack("<f", self.read(span))[0])

    def float64(self, span: Span) -> float:
        """The value of a FIXED64 double field."""
        return float(struct.unpack("<d", self.read(span))[0])

    def error(self, position: int, why: str) -> FormatError:
        """A FormatError that names the source and the byte."""
        return FormatError(f"{printable(self.name)}: byte {position}: {printable(why)}")


def fields(buffer: Buffer, start: int = 0, end: int | None = None, depth: int = 0) -> Iterator[tuple[int, int, Value]]:
    """The fields of the message at [start, end): (number, wire type, value), in order.

    The value of a VARINT is an int in 0..2**64-1 (`signed` makes it an int64); of every other wire type its absolute
    (offset, length) in the buffer, not read. A nested message is walked by fields(buffer, offset, offset + length,
    depth + 1); past MAX_DEPTH that is refused. Raises FormatError for a bad varint, a group, field number 0, and
    whatever reaches past `end`.
    """
    end = buffer.size if end is None else end
    if depth > MAX_DEPTH:
        raise buffer.error(start, f"messages nested more than {MAX_DEPTH} deep")
    if not 0 <= start <= end <= buffer.size:
        raise buffer.error(start, f"a message should end at {end}, the end is at {buffer.size}")
    position, data, base, safe = start, b"", 0, -1
    while position < end:
        at = position
        if position > safe:  # a window stays valid for the message that took it, whoever moves the buffer on
            data, base = buffer.window(position)
            safe = base + len(data) - _LONGEST_HEADER
        try:
            tag = data[position - base]
            position += 1
            if tag >= 0x80:
                tag, position = _varint(buffer, data, base, position - 1)
            wire, number = tag & 7, tag >> 3
            if not 0 < number < 1 << 29:
                raise buffer.error(at, f"field number {number}")
            if wire == LENGTH:
                length = data[position - base]
                position += 1
                if length >= 0x80:
                    length, position = _varint(buffer, data, base, position - 1)
                if position + length > end:
                    raise buffer.error(
                        at, f"field {number} should be {length} bytes, its message has {end - position} left"
                    )
                yield number, wire, (position, length)
                position += length
            elif wire == VARINT:
                value, position = _varint(buffer, data, base, position)
                if position > end:
                    raise buffer.error(at, f"field {number} reaches past the end of its message")
                yield number, wire, value
            elif wire in _WIDTH:
                width = _WIDTH[wire]
                if position + width > end:
                    raise buffer.error(at, f"field {number} reaches past the end of its message")
                yield number, wire, (position, width)
                position += width
            else:
                kind = "a group, which is not used in model files" if wire in (3, 4) else "no wire type"
                raise buffer.error(at, f"field {number} has wire type {wire}, {kind}")
        except IndexError:
            raise buffer.error(at, "the data ends inside a field") from None


def extents(buffer: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte of its tag, end) of every field of the message at [start, end), for cutting it out."""
    position = start
    for number, _, value in fields(buffer, start, end):
        first = position
        if isinstance(value, int):
            data, base = buffer.window(first)
            _, position = _varint(buffer, data, base, first)
            _, position = _varint(buffer, data, base, position)
        else:
            position = value[0] + value[1]
        yield number, first, position


def _varint(buffer: Buffer, data: bytes, base: int, position: int) -> tuple[int, int]:
    value = shift = 0
    first = position
    while True:
        byte = data[position - base]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise buffer.error(first, "a varint of more than ten bytes")
    if value >= 1 << 64:
        raise buffer.error(first, "a varint of more than 64 bits")
    return value, position


def signed(value: Value, bits: int = 64) -> int:
    """A VARINT value as the two's complement integer that int64 (or int32, by `bits`) fields mean."""
    if not isinstance(value, int):
        raise FormatError("an integer was expected, the field holds bytes")
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def varints(buffer: Buffer, wire: int, value: Value, limit: int = 1 << 20) -> list[int]:
    """The values of one occurrence of a repeated integer field, packed or not, as int64; at most `limit` of them."""
    if isinstance(value, int):
        return [signed(value)]
    if wire != LENGTH:
        raise buffer.error(value[0], f"an integer was expected, the field has wire type {wire}")
    if value[1] > 10 * limit:
        raise buffer.error(value[0], f"{value[1]} bytes of integers; the limit is {limit} of them")
    data, position, found = buffer.read(value), 0, []
    while position < len(data):
        try:
            item, position = _varint(buffer, data, 0, position)
        except IndexError:
            raise buffer.error(value[0], "the data ends inside an integer") from None
        found.append(signed(item))
        if len(found) > limit:
            raise buffer.error(value[0], f"more than {limit} integers")
    return found


class Numbers:
    """A repeated float (width 4) or double (width 8) field, packed, unpacked or both: where it lies, and its bytes.

    `add` takes each occurrence as `fields` gave it. A run of unpacked values is kept as one regular stride.
    """

    __slots__ = ("_runs", "buffer", "nbytes", "width")

    def __init__(self, buffer: Buffer, width: int) -> None:
        self.buffer, self.width, self.nbytes = buffer, width, 0
        self._runs: list[list[int]] = []  # offset of the first item, its length, stride to the next, count

    def add(self, wire: int, value: Value) -> None:
        """One occurrence of the field. FormatError if it is an integer or no whole number of items."""
        if isinstance(value, int) or (wire != LENGTH and value[1] != self.width):
            raise self.buffer.error(
                0 if isinstance(value, int) else value[0],
                f"numbers of {self.width} bytes were expected, the field has wire type {wire}",
            )
        offset, length = value
        if length % self.width:
            raise self.buffer.error(offset, f"{length} bytes are no whole number of {self.width}-byte items")
        self.nbytes += length
        last = self._runs[-1] if self._runs else None
        if last and wire != LENGTH and last[1] == self.width:
            stride = offset - (last[0] + last[2] * (last[3] - 1))
            if last[3] == 1 or stride == last[2]:
                last[2], last[3] = stride, last[3] + 1
                return
        if length:
            self._runs.append([offset, length, length, 1])

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return self.nbytes // self.width

    def places(self) -> Iterator[Span]:
        """Where they lie, in order: a packed run is one span, an unpacked number one of its own."""
        for offset, length, stride, count in self._runs:
            yield from ((offset + k * stride, length) for k in range(count))

    def read(self) -> bytes:
        """All of them, little-endian, in order."""
        parts = []
        for offset, length, stride, count in self._runs:
            if stride - length > _LONGEST_HEADER:  # something large lies between them
                parts += [self.buffer.read((offset + k * stride, length), "numbers") for k in range(count)]
                continue
            data = self.buffer.read((offset, stride * (count - 1) + length), "numbers")
            if count > 1:
                padded = np.frombuffer(data + bytes(stride - length), np.uint8).reshape(count, stride)
                data = padded[:, :length].tobytes()
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


# ---- writing


def encoded_varint(value: int) -> bytes:
    """`value` (0..2**64-1, or a negative int64) as a varint of the fewest bytes."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encoded(number: int, value: int | float | bytes | str) -> bytes:
    """One field: int as VARINT, float as FIXED32, bytes and str (UTF-8) as LENGTH."""
    if isinstance(value, float):
        return encoded_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return encoded_varint(number << 3 | VARINT) + encoded_varint(value)
    data = value.encode() if isinstance(value, str) else value
    return encoded_varint(number << 3 | LENGTH) + encoded_varint(len(data)) + data


class Edit(NamedTuple):
    """Replace the bytes [start, end) by `data`; start == end inserts.

    within: the enclosing messages as (offset, length) spans, the outermost first; the top level is not one of them.
    An edit must cover whole fields of the innermost, or the payload of a fixed-width field of unchanged size.
    """

    start: int
    end: int
    data: bytes
    within: tuple[Span, ...] = ()


def field_start(buffer: Buffer, value: Span, number: int) -> int:
    """Where the LENGTH field whose payload is `value` begins: its tag. Only for spans that `fields` gave."""
    start = _length_start(buffer, value[0])
    tag = encoded_varint(number << 3 | LENGTH)
    if start < len(tag) or buffer.read((start - len(tag), len(tag))) != tag:
        raise buffer.error(start, f"field {number} is not written in the usual way, so it cannot be replaced")
    return start - len(tag)


def _length_start(buffer: Buffer, offset: int) -> int:
    """Where the length before the payload at `offset` begins: all bytes of a varint but its last have the high bit."""
    before = buffer.read((max(offset - 11, 0), min(offset, 11)))
    start = len(before) - 1
    while start > 0 and before[start - 1] >= 0x80:
        start -= 1
    return offset - (len(before) - start)


def splice(buffer: Buffer, edits: Sequence[Edit], out: str) -> None:
    """Fill the file `out` with the buffer, edits applied and the length of every enclosing message fixed.

    Everything else stays byte for byte, also what no schema knows. Edits must not overlap (ValueError); inserts at one
    place keep their order.
    """
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0))
    try:
        for piece in _pieces(buffer, edits):
            if isinstance(piece, bytes):
                append(descriptor, piece)
            else:
                _copy(buffer, *piece, descriptor)
    finally:
        os.close(descriptor)


def spliced(buffer: Buffer, edits: Sequence[Edit]) -> bytes:
    """As `splice`, in memory."""
    return b"".join(p if isinstance(p, bytes) else buffer.read((p[0], p[1] - p[0])) for p in _pieces(buffer, edits))


def _pieces(buffer: Buffer, edits: Sequence[Edit]) -> Iterator[bytes | tuple[int, int]]:
    """The result in order: new bytes, or (start, end) of what stays."""
    growth: dict[Span, int] = {}
    parents: dict[Span, Span | None] = {}
    for edit in edits:
        parents.update(zip(edit.within, (None, *edit.within), strict=False))
        if edit.within:
            growth[edit.within[-1]] = growth.get(edit.within[-1], 0) + len(edit.data) - (edit.end - edit.start)
    flat = [(e.start, e.end, -len(e.within), e.data) for e in edits]
    for message in sorted(parents, reverse=True):  # a message starts after the one that holds it
        grown = growth.get(message, 0)
        if not grown:
            continue
        start = _length_start(buffer, message[0])
        length = encoded_varint(message[1] + grown)
        flat.append((start, message[0], 0, length))
        outer = parents[message]
        if outer is not None:
            growth[outer] = growth.get(outer, 0) + grown + len(length) - (message[0] - start)
    flat.sort(key=lambda edit: edit[:3])  # where messages end together, the inner one's insert comes first
    done = 0
    for start, end, _, data in flat:
        if start < done:
            raise ValueError(f"edits overlap at byte {start}")
        yield done, start
        yield data
        done = end
    yield done, buffer.size


def _copy(buffer: Buffer, start: int, end: int, descriptor: int) -> None:
    """Append [start, end) to an open file."""
    if isinstance(buffer.source, bytes):
        append(descriptor, memoryview(buffer.source)[start:end])
    elif end - start <= 1 << 16:
        append(descriptor, buffer.read((start, end - start)))
    else:
        copy_range(buffer.source, descriptor, start, end)
