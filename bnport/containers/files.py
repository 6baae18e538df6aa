"""Positioned reads that check bounds, and a file replaced whole or not at all."""

from __future__ import annotations

import os
import stat

from bnport._lazy import TYPE_CHECKING
from bnport.errors import FormatError, NotFound, OutputError, printable

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

TEMPORARY = ".bnport-tmp"  # in the name of every temporary file, so that one left by a kill is recognisable


class ReadFile:
    """A regular file opened for reading by position. It is closed when nothing refers to it any more.

    pread, not mmap: a mapped file pulls read-around windows (2.5 GB read from disk for 2.9 MB wanted), and a file
    truncated under a mapping kills the process.
    """

    __slots__ = ("_descriptor", "path", "size")

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
            status = os.fstat(self._descriptor)
        except (FileNotFoundError, ValueError):  # no file has half a surrogate pair or a zero byte in its name
            raise NotFound(f"{printable(path)}: no such file") from None
        except OSError as error:
            raise FormatError(f"{printable(path)}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{printable(path)}: not a regular file")
        self.size = status.st_size

    def pread(self, offset: int, length: int, what: str = "data") -> bytes:
        """`length` bytes at `offset`; FormatError naming `what` if the file does not hold them all."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{printable(self.path)}: {printable(what)} should be {length} bytes at {offset}, the file has {self.size}"
            )
        data = os.pread(self._descriptor, length, offset)
        if len(data) == length:
            return data
        parts, done = [data], len(data)
        while done < length:  # a system may give less at once, 2 GiB for example
            part = os.pread(self._descriptor, length - done, offset + done)
            if not part:
                raise FormatError(f"{printable(self.path)}: shrank while {printable(what)} was read")
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def fileno(self) -> int:
        """The descriptor, for os.copy_file_range and the like; it belongs to this object."""
        return self._descriptor

    def close(self) -> None:
        """Close now; reading afterwards fails."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        try:  # noqa: SIM105  (at the interpreter's end contextlib may be gone already)
            self.close()
        except (OSError, AttributeError, TypeError):
            pass


LARGE = 256 << 20  # bytes of a file from which on somebody may want to know how far copying or hashing it is
COPIED = 32 << 20  # bytes that are copied in one go; what has more is flushed while it is copied
_watcher: Callable[[int, int, str], None] | None = None


def watch(show: Callable[[int, int, str], None] | None) -> None:
    """From now on call show(done, total, what) while large files are copied, hashed and flushed; None: nobody looks."""
    global _watcher
    _watcher = show


def tell(done: int, size: int, what: str) -> None:
    """Say that so many bytes of `size` are done, if anybody watches and it is worth it."""
    if _watcher is not None and size >= LARGE:
        _watcher(done >> 20, size >> 20, f"MB {what}")


def sha256(path: str) -> str:
    """The hex digest of a file's bytes, read in blocks."""

    what = _hashing(path)

    def go_on(done: int, size: int) -> bool:
        tell(done, size, what)
        return True

    return _hashed(path, go_on)


def _hashing(path: str) -> str:
    return f"of {printable(os.path.basename(path), 40)} hashed"


def _hashed(path: str, go_on: Callable[[int, int], object]) -> str:
    import hashlib

    digest, block = hashlib.sha256(), bytearray(1 << 21)  # large: between blocks the thread waits for its turn
    done = 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while go_on(done, size) and (count := file.readinto(block)):
            digest.update(memoryview(block)[:count])
            done += count
    return digest.hexdigest()


class Digest:
    """The sha256 of a file, computed on a thread while other work goes on (hashing releases the interpreter's lock).

    The thread ends early once nobody refers to the Digest any more: a conversion that was refused leaves no work behind. So
    it does when the program ends, which waits for that: a thread that goes on while the interpreter ends can bring it down.
    Where the system gives no thread it is computed when it is asked for.
    """

    def __init__(self, path: str) -> None:
        import hashlib  # noqa: F401  (here, not by the thread: an import while the interpreter ends brings it down)
        import threading
        import weakref

        self.path = path
        self.at = 0, 0  # bytes done, and of how many
        self._outcome: list[str | Exception] = []
        running = threading.main_thread().is_alive
        self._thread = threading.Thread(target=_compute, args=(path, weakref.ref(self), running, self._outcome))
        self._started = _started(self._thread)

    def result(self) -> str:
        """The hex digest; waits for it. Raises what reading the file raised."""
        if not self._started:
            return sha256(self.path)
        while self._thread.is_alive() and _watcher is not None:
            tell(*self.at, _hashing(self.path))
            self._thread.join(0.1)
        self._thread.join()
        outcome = self._outcome[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _started(thread: threading.Thread) -> bool:
    """Start it; whether there is a thread for it (a limit on processes may leave none)."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _compute(
    path: str, owner: Callable[[], Digest | None], running: Callable[[], bool], outcome: list[str | Exception]
) -> None:
    def go_on(done: int, size: int) -> bool:
        digest = owner()
        if digest is not None:
            digest.at = done, size
        return digest is not None and running()

    try:
        outcome.append(_hashed(path, go_on))
    except Exception as error:  # raised where somebody waits for the result
        outcome.append(error)


def copy_contents(source: str, out_descriptor: int) -> None:
    """Append all of `source` to an open file."""
    file = ReadFile(source)
    copy_range(file, out_descriptor, 0, file.size)


def copy_range(source: ReadFile, out_descriptor: int, start: int, end: int) -> None:
    """Append the bytes [start, end) of a file to an open one, in the kernel (copy_file_range) where that works."""
    flusher = _Flusher(out_descriptor) if end - start > COPIED else None
    try:
        while start < end:
            try:
                count = os.copy_file_range(source.fileno(), out_descriptor, min(end - start, COPIED), start)
            except (AttributeError, OSError):  # not on this system, or across file systems
                count = os.write(out_descriptor, source.pread(start, min(1 << 20, end - start)))
            if not count:
                raise FormatError(f"{printable(source.path)}: shrank while it was copied")
            start += count
            if flusher is not None:
                flusher.go_on()
            tell(start, source.size, "copied")
    finally:
        if flusher is not None:
            flusher.end()


class _Flusher:
    """Has an open file's contents written to disk on a thread while more are appended: the last flush has little left.

    Where the system gives no thread the last flush has all of it.
    `end` raises what the system said: it says of an error once, and a later flush would not hear of it.
    """

    def __init__(self, descriptor: int) -> None:
        import threading

        self._descriptor, self._ended = descriptor, False
        self._more = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._flush)
        self._started = _started(self._thread)

    def go_on(self) -> None:
        """There is more to flush; returns at once."""
        self._more.set()

    def end(self) -> None:
        """Wait for what is being flushed."""
        self._ended = True
        self._more.set()
        if self._started:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        while self._more.wait() and not self._ended and self._error is None:
            self._more.clear()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._error = error


def append(out_descriptor: int, data: bytes | memoryview) -> None:
    """Append all of `data` to an open file; a system may take less at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(out_descriptor, view) :]


def check_output(out: str, *, force: bool = False, inputs: Iterable[str] = ()) -> None:
    """Refuse an output that must not be written, before any work is done.

    Refused: an empty name; a directory, device, FIFO or symbolic link; one of the `inputs`, also by hard link; an existing
    file without `force`; a missing or unwritable folder.
    """
    if not out:
        raise OutputError("the output's name is empty; name the file to make")
    shown = printable(out)
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise OutputError(f"{shown}: the folder {printable(folder)} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{shown}: the folder {printable(folder)} cannot be written to")
    try:
        status = os.lstat(out)
    except FileNotFoundError:
        return
    except ValueError:
        raise OutputError(f"{shown}: no file can have this name") from None
    except OSError as error:
        raise OutputError(f"{shown}: {error.strerror}") from None
    if stat.S_ISLNK(status.st_mode):
        raise OutputError(f"{shown}: is a symbolic link; name the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise OutputError(f"{shown}: is not a regular file")
    for path in inputs:
        if is_file(path, status):
            raise OutputError(f"{shown}: is the input {printable(path)} itself; choose another output")
    if not force:
        raise OutputError(f"{shown}: exists already; --force replaces it")


def is_file(path: str, status: os.stat_result) -> bool:
    """Whether there is a file at `path`, and it is the one of `status`."""
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def replace_file(
    out: str,
    build: Callable[[str], None],
    check: Callable[[str], None] | None = None,
    *,
    force: bool = False,
    inputs: Iterable[str] = (),
) -> None:
    """Make the file `out`, whole or not at all.

    `build(path)` fills a new empty file beside `out` (created with O_EXCL and O_NOFOLLOW); it is flushed to disk,
    `check(path)` re-reads it, and only then does it take the name `out` (os.replace), and the folder is flushed. On any
    error the new file is removed and whatever was at `out` is untouched. Raises OutputError for what check_output
    refuses and for a full disk or an I/O error; errors of `build` and `check` pass through.
    """
    import contextlib

    check_output(out, force=force, inputs=inputs)
    folder, name = os.path.split(os.path.abspath(out))
    mode = 0o666
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(out).st_mode)  # an output that is replaced keeps its permissions
    temporary = _create_beside(folder, name, mode)
    try:
        build(temporary)
        size = os.stat(temporary).st_size
        tell(0, size, "written to disk")
        flush(temporary)
        tell(size, size, "written to disk")
        if check is not None:
            check(temporary)
        check_output(out, force=force, inputs=inputs)  # nobody may have put something there meanwhile
        os.replace(temporary, out)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{printable(out)}: {error.strerror or error}; nothing was written") from error
        raise
    try:
        flush(folder)
    except OSError as error:
        raise OutputError(
            f"{printable(out)}: is written, but its folder cannot be flushed to disk ({error.strerror or error}); after a"
            " power cut the old one may be back"
        ) from error


def _create_beside(folder: str, name: str, mode: int) -> str:
    import secrets

    # the suffix stays last: readers and savers go by it
    temporary = os.path.join(folder, f".{secrets.token_hex(6)}{TEMPORARY}-{name[-100:]}")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        os.close(os.open(temporary, flags, mode))
    except OSError as error:
        raise OutputError(f"{printable(os.path.join(folder, name))}: {error.strerror}") from None
    return temporary


def flush(path: str) -> None:
    """Have the system write a file's, or a folder's, contents to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
