"""Bytes of a file replaced where they lie, so that whatever happens the file is the old one, the new one, or unreadable.

Only for a caller who asked for the file itself to be changed; everything else makes a copy (files.replace_file).

    1. the old bytes of every place go into FILE.bnport-undo, flushed to disk with its folder. The file is the old one
    2. the places by which readers know the file (signatures, the zip end record) are overwritten: first the one that they
       cannot do without, flushed, then the others. From the first on nothing opens the file, neither Keras nor torch nor
       bnport, which names the remedy
    3. the new bytes are written and flushed
    4. the signatures are put back, in the opposite order. With the last one the file is the new one, wholly, and opens
    5. `check` reads it, as any program now could; then the undo file is removed

An error at any step puts the old bytes back at once, in steps 2 to 4. After a kill or a power cut `restore` does (bnport
restore FILE).

What the file holds already is not written. A target as its framework made it is ones and zeros, so the old bytes are stored
deflated where that at least halves them: then hardly more is written than the parameters, otherwise twice as much.

The undo file: MAGIC, sha256 of all that follows (32 bytes), the length of the header (8 bytes, little-endian), the header
(JSON: the file's size, what step 2 writes where, [offset, length] of every piece, whether they are deflated), the old bytes
one after another.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from typing import TYPE_CHECKING, NamedTuple

from bnport.containers import HDF5_SIGNATURE
from bnport.containers.files import ReadFile, flush, is_file
from bnport.containers.patch import Patch, joined, write_at
from bnport.errors import FormatError, NotFound, OutputError, first_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

UNDO = ".bnport-undo"
SEAL = (
    b"\xff\xffbnport: stopped"  # no format begins like this; as a protobuf field, a length or an opcode it is an error
)
MAGIC = b"bnport undo 2\n"
_LARGEST_UNDO = 256 << 20  # BatchNorm parameters are a few MB
_STEP = 128  # bytes that are written together or not at all
_SAMPLE = 1 << 16  # bytes of the old ones by which is seen whether deflating pays; trying costs 1.5 ms
_TAIL = 22 + 0xFFFF  # the zip end record and the longest comment


def is_sealed(head: bytes) -> bool:
    """Whether a file that begins like this was left by an interrupted change in place."""
    return head.startswith(SEAL)


def check_changeable(path: str, inputs: Iterable[str] = ()) -> None:
    """Refuse a file that must not be changed in place: a link, one with other names, one of `inputs`, one left half-done."""
    shown = printable(path)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise NotFound(f"{shown}: no such file") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{shown}: {first_line(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise OutputError(f"{shown}: is not a regular file (a link?); name the file itself")
    if status.st_nlink > 1:
        raise OutputError(
            f"{shown}: has {status.st_nlink - 1} other names (hard links), whose contents would change too; make a new"
            " file (-o)"
        )
    if not os.access(path, os.W_OK):
        raise OutputError(f"{shown}: cannot be written to")
    for other in inputs:
        if is_file(other, status):
            raise OutputError(f"{shown}: is the source itself")
    if os.path.lexists(path + UNDO):
        raise OutputError(
            f"{printable(path + UNDO)}: is there, so an earlier change in place was interrupted; 'bnport restore {shown}'"
            " puts the old contents back"
        )


def change(path: str, patches: Iterable[Patch], check: Callable[[], None]) -> None:
    """Write the patches into the file at `path`; `check` re-reads it, and if it raises the old bytes are put back.

    Raises OutputError for what check_changeable refuses and for I/O errors; what `check` raises passes through. The old
    bytes are back in the file then; if even that fails, the message says how to put them back later. Where only the
    undo file cannot be removed it says which bytes the file has.
    """
    check_changeable(path)
    file = ReadFile(path)
    places = joined(patches)
    _fits(places, file)
    differing = [pair for place in places for pair in _differing(place, _held(file, place))]
    if not differing:
        check()
        return
    places = [new for new, _ in differing]
    seals = _seals(file)
    undo = _Undo(file.size, seals, [*(_held(file, seal) for seal in seals), *(old for _, old in differing)])
    try:
        undo.save(path + UNDO)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path + UNDO)
        if isinstance(error, OSError):
            raise OutputError(f"{printable(path)}: {error.strerror or error}; nothing was changed") from error
        raise
    try:
        _write(path, file.size, seals, places)
        check()
    except BaseException as error:
        _put_back(path, undo)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{printable(path)}: {error.strerror or error}; its old contents are back") from error
        raise
    _end(path, "is changed and checked")


def restore(path: str) -> str:
    """Put back the contents that a file had before a change in place was interrupted; says what was done.

    Raises NotFound without an undo file, FormatError for one that is damaged or another file's; nothing is written then.
    OutputError where the file cannot be written, or the undo file not be removed; it says which.
    """
    shown = printable(path)
    try:
        undo = _Undo.load(path + UNDO)
    except FileNotFoundError:
        raise NotFound(
            f"{shown}: there is no {printable(os.path.basename(path) + UNDO)}, so nothing to put back"
        ) from None
    except OSError as error:
        raise FormatError(f"{printable(path + UNDO)}: {error.strerror}") from None
    file = ReadFile(path)
    if undo is None:  # stopped while it was written, which is before the file is touched
        if is_sealed(file.pread(0, min(len(SEAL), file.size))):
            raise FormatError(f"{printable(path + UNDO)}: damaged; the old contents cannot be put back")
        _end(path, "had not been changed yet")
        return f"{shown}: had not been changed yet"
    if undo.size != file.size:
        raise FormatError(f"{printable(path + UNDO)}: is of a file of {undo.size} bytes, {shown} has {file.size}")
    _put_back(path, undo)
    return f"{shown}: the old contents are back ({sum(len(p.data) for p in undo.pieces)} bytes)"


class _Undo(NamedTuple):
    """What a file of `size` bytes held: all pieces that change, and which of them make it unreadable."""

    size: int
    seals: list[Patch]  # the overwritten contents, not the old ones
    pieces: list[Patch]

    def save(self, path: str) -> None:
        import hashlib
        import json

        data = b"".join(piece.data for piece in self.pieces)
        deflated = len(zlib.compress(data[:_SAMPLE], 1)) <= len(data[:_SAMPLE]) // 2
        header = json.dumps(
            {
                "size": self.size,
                "seals": [[seal.offset, seal.data.hex()] for seal in self.seals],
                "pieces": [[piece.offset, len(piece.data)] for piece in self.pieces],
                "deflated": deflated,
            }
        ).encode()
        body = len(header).to_bytes(8, "little") + header + (zlib.compress(data, 1) if deflated else data)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            write_at(descriptor, 0, MAGIC + hashlib.sha256(body).digest() + body)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush(os.path.dirname(os.path.abspath(path)))

    @classmethod
    def load(cls, path: str) -> _Undo | None:
        """The undo file, or None if it is not complete. FileNotFoundError without one."""
        import hashlib
        import json

        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise FormatError(f"{printable(path)}: is not a regular file")
        data = _contents(path)
        body = data[len(MAGIC) + 32 :]
        kind = MAGIC.rpartition(b" ")[0]
        if data.startswith(kind) and len(data) > len(MAGIC) and not data.startswith(MAGIC):
            raise FormatError(f"{printable(path)}: is not an undo file of this version")
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != data[len(MAGIC) : len(MAGIC) + 32]:
            return None
        at = 8 + int.from_bytes(body[:8], "little")
        try:
            header = json.loads(body[8:at])
            size, pieces = int(header["size"]), []
            seals = [Patch(int(offset), bytes.fromhex(data)) for offset, data in header["seals"]]
            old, at = _inflated(body[at:]) if header["deflated"] else body[at:], 0
            for offset, count in header["pieces"]:
                pieces.append(Patch(int(offset), old[at : at + int(count)]))
                at += int(count)
        except (ValueError, KeyError, TypeError, RecursionError, zlib.error):
            raise FormatError(f"{printable(path)}: is not an undo file of this version") from None
        inside = all(0 <= p.offset <= size - len(p.data) for p in (*seals, *pieces))
        if at != len(old) or not inside:
            raise FormatError(f"{printable(path)}: is not an undo file of this version")
        return cls(size, seals, pieces)


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    found = stream.decompress(data, _LARGEST_UNDO)
    if not stream.eof or stream.unused_data:
        raise ValueError("not one deflated stream of a size that an undo file has")
    return found


def _contents(path: str) -> bytes:
    file = ReadFile(path)
    if file.size > _LARGEST_UNDO:
        raise FormatError(f"{printable(path)}: {file.size} bytes are too many for an undo file")
    return file.pread(0, file.size)


def _seals(file: ReadFile) -> list[Patch]:
    """What is written over the places by which the file is known: its beginning, HDF5's signature, the zip end record.

    The last one lies where a reader begins, which opens nothing without it.
    """
    if file.size < len(SEAL):
        raise FormatError(f"{printable(file.path)}: too short to be a model")
    seals = [Patch(0, SEAL)]
    at = 512  # HDF5 behind a user block
    while at + len(HDF5_SIGNATURE) <= file.size and at <= 1 << 40:
        if file.pread(at, len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
            seals.append(Patch(at, b"\xff" * len(HDF5_SIGNATURE)))
        at *= 2
    head = file.pread(0, len(HDF5_SIGNATURE))
    if head.startswith(b"PK\x03\x04"):
        start = max(len(SEAL), file.size - _TAIL)
        tail = file.pread(start, file.size - start)
        found = tail.find(b"PK\x05\x06")
        while found >= 0:
            seals.append(Patch(start + found, b"\xff" * 4))
            found = tail.find(b"PK\x05\x06", found + 4)
        return seals
    first = 1 if len(seals) > 1 and head != HDF5_SIGNATURE else 0
    return [*seals[:first], *seals[first + 1 :], seals[first]]


def _fits(places: list[Patch], file: ReadFile) -> None:
    end = 0
    for place in places:
        if place.offset < end or place.offset + len(place.data) > file.size:
            raise ValueError("patches overlap or reach beyond the file")
        end = place.offset + len(place.data)


def _held(file: ReadFile, place: Patch) -> Patch:
    """What the file holds where the patch lies."""
    return Patch(place.offset, file.pread(place.offset, len(place.data)))


def _differing(new: Patch, old: Patch) -> Iterator[tuple[Patch, Patch]]:
    """The parts of two patches of one place, in steps of _STEP bytes, that are not the same."""

    def parts(start: int, end: int) -> tuple[Patch, Patch]:
        return Patch(new.offset + start, new.data[start:end]), Patch(old.offset + start, old.data[start:end])

    start, size = 0, len(new.data)  # start: of what differs; all before it was yielded or is the same
    for at in range(0, size, _STEP):
        if new.data[at : at + _STEP] == old.data[at : at + _STEP]:
            if start < at:
                yield parts(start, at)
            start = at + _STEP
    if start < size:
        yield parts(start, size)


def _overlaid(patch: Patch, others: Iterable[Patch]) -> Patch:
    """The patch with the bytes of the others where they lie on it."""
    data, start = bytearray(patch.data), patch.offset
    for other in others:
        first, last = max(other.offset, start), min(other.offset + len(other.data), start + len(data))
        if first < last:
            data[first - start : last - start] = other.data[first - other.offset : last - other.offset]
    return Patch(start, bytes(data))


def _write(path: str, size: int, seals: list[Patch], places: list[Patch]) -> None:
    """Steps 2 to 4 of the module's list."""
    file = ReadFile(path)
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not os.path.samestat(os.fstat(descriptor), os.fstat(file.fileno())) or file.size != size:
            raise OutputError(f"{printable(path)}: somebody else changed it meanwhile")
        ends = [_overlaid(Patch(s.offset, file.pread(s.offset, len(s.data))), places) for s in seals]
        inside = [_overlaid(place, seals) for place in places]
        for step in (seals[-1:], seals[:-1], inside, ends[:-1], ends[-1:]):
            for patch in step:
                write_at(descriptor, patch.offset, patch.data)
            if step:
                os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(path: str, undo: _Undo) -> None:
    try:
        _write(path, undo.size, undo.seals, undo.pieces)
    except OSError as error:
        raise OutputError(
            f"{printable(path)}: its old contents cannot be put back ({error.strerror or error}); they are in"
            f" {printable(path + UNDO)}: 'bnport restore {printable(path)}' tries again"
        ) from error
    _end(path, "its old contents are back")


def _end(path: str, done: str) -> None:
    """Remove the undo file; OutputError that says what is `done` where that fails."""
    undo = path + UNDO
    try:
        os.unlink(undo)
    except OSError as error:
        raise OutputError(
            f"{printable(path)}: {done}, but {printable(undo)} cannot be removed ({error.strerror or error}); remove it"
            " yourself"
        ) from error
    try:
        flush(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        raise OutputError(
            f"{printable(path)}: {done}, but its folder cannot be flushed to disk ({error.strerror or error}); if"
            f" {printable(undo)} is back after a power cut, remove it"
        ) from error
