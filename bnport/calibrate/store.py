"""Activations between two rounds: in memory up to a stated budget, beyond it in files of a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import InvalidValue, OutputError, printable

if TYPE_CHECKING:
    from bnport.calibrate.models import LiveModel
    from bnport.record import Array

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def memory_bytes(memory: str | float | None) -> int:
    """'8GB' (10**9), '512MiB' (2**20), a number of bytes; None is half of the memory that is free now."""
    if memory is None:
        return _free_memory() // 2
    if not isinstance(memory, str):
        try:
            size = float(memory)
        except (TypeError, ValueError, OverflowError):
            size = -1.0
    else:
        text = memory.strip().lower()
        number = text.rstrip("kmgtib ")
        unit = text[len(number) :].strip()
        binary = unit.endswith("ib")
        letter = unit.removesuffix("ib" if binary else "b")
        try:
            size = float(number) * (2 ** (10 * "kmgt".index(letter) + 10) if binary else _UNITS[letter])
        except (ValueError, KeyError):
            raise InvalidValue(
                f"memory: expected a size such as '8GB' or '512MiB', got {printable(memory)!r}"
            ) from None
    if not 0 <= size < 2**63:
        raise InvalidValue(f"memory: expected a size such as '8GB', got {printable(memory, 60)!r}")
    return int(size)


def _free_memory() -> int:
    """Bytes free on this machine, or in the container that this process runs in, if that is less."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 8 * 10**9
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int(_line(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free


def _line(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.readline()


class Workspace:
    """A folder of a run's own in `parent` (default the system's temporary folder); `close` removes it.

    A run that is killed leaves its folder behind. Each is named after its process, for people, and holds a file that this
    process has locked (flock): the system gives the lock up when the process ends, whatever ended it. Making a Workspace
    removes the folders that lie beside it unlocked. One without the file is left alone: its file system may have no locks.
    """

    PREFIX = "bnport-run-"
    LOCK = "in-use"

    def __init__(self, parent: str | None = None) -> None:
        clear(parent)
        self._descriptor = -1
        self.path = tempfile.mkdtemp(prefix=f"{self.PREFIX}{os.getpid()}-", dir=parent)
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            unnamed = os.path.join(self.path, "locking")
            self._descriptor = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(unnamed, os.path.join(self.path, self.LOCK))  # never there without being locked

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clear(parent: str | None = None) -> None:
    """Remove what dead processes have left in `parent`: this user's Workspaces whose lock is free."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        with os.scandir(parent or tempfile.gettempdir()) as entries:
            found = [entry for entry in entries if entry.name.startswith(Workspace.PREFIX)]
        for entry in found:
            with contextlib.suppress(OSError):  # somebody else's, or gone already; BlockingIOError: its process lives
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                    continue
                descriptor = os.open(os.path.join(entry.path, Workspace.LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(descriptor)


class _Spilled:
    """Where one tensor lies on disk, and how it becomes a tensor again."""

    __slots__ = ("brain", "dtype", "mask", "nbytes", "path", "shape")

    def __init__(self, path: str, array: Array, brain: bool, mask: Any) -> None:
        self.path, self.dtype, self.shape, self.nbytes = path, array.dtype, array.shape, array.nbytes
        self.brain, self.mask = brain, mask


class Store:
    """Values by (key, batch). Tensors stay what they are in memory, so that nothing is converted or copied there.

    The newest value goes to disk when the budget is full: batches come round in turn, so the oldest is wanted first.
    Counted are the stored tensors; the model itself and the work on one batch come on top.
    """

    def __init__(self, live: LiveModel, budget: int, folder: str | None = None) -> None:
        self.live, self.budget = live, budget
        self.resident = self.peak = self.on_disk = self.disk_peak = self.spilled = 0
        self._values: dict[tuple[int, int], Any] = {}
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._parent, self._count = folder, 0
        self._folder: Workspace | None = None
        clear(folder)  # now: a run that spills nothing clears up too

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self._values.clear()
        self._sizes.clear()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._values

    def put(self, key: int, batch: int, value: Any) -> None:
        """Keep `value`, a tensor or a structure of tensors and arrays."""
        size = sum(_nbytes(leaf) for leaf in self.live.tree.flatten(value))
        on_disk = 0
        if self.resident + size > self.budget and size:
            value = self.live.tree.map_structure(self._spill, value)
            on_disk, size = size, 0
        self._values[key, batch] = value
        self._sizes[key, batch] = size, on_disk
        self.resident += size
        self.on_disk += on_disk
        self.spilled += on_disk
        self.peak, self.disk_peak = max(self.peak, self.resident), max(self.disk_peak, self.on_disk)

    def get(self, key: int, batch: int) -> Any:
        """The value, read back if it is on disk."""
        value = self._values[key, batch]
        return self.live.tree.map_structure(self._load, value) if self._sizes[key, batch][1] else value

    def drop(self, key: int, batch: int) -> None:
        """Forget one value, and its file."""
        value = self._values.pop((key, batch), None)
        size, on_disk = self._sizes.pop((key, batch), (0, 0))
        self.resident -= size
        self.on_disk -= on_disk
        if on_disk:
            for leaf in self.live.tree.flatten(value):
                if isinstance(leaf, _Spilled):
                    with contextlib.suppress(OSError):
                        os.unlink(leaf.path)

    def _spill(self, leaf: Any) -> Any:
        if not _nbytes(leaf):
            return leaf
        mask = self.live.mask_of(leaf)  # small beside the activation: it stays in memory
        brain = str(getattr(leaf, "dtype", "")) == "torch.bfloat16"
        if brain:  # NumPy has no such dtype; its bits travel as 16-bit integers
            leaf = leaf.view(sys.modules["torch"].int16)
        array = np.ascontiguousarray(self.live.numpy(leaf))
        try:
            if self._folder is None:
                self._folder = Workspace(self._parent)
            self._count += 1
            path = os.path.join(self._folder.path, f"{self._count}")
            with open(path, "xb") as file:
                file.write(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            where = printable(self._parent or tempfile.gettempdir())
            raise OutputError(
                f"activations beyond the memory budget do not fit into {where}: {error.strerror};"
                " name a larger folder (spill), allow more memory, or use fewer samples"
            ) from error
        return _Spilled(path, array, brain, mask)

    def _load(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Spilled):
            return leaf
        array = np.fromfile(leaf.path, np.uint8).view(leaf.dtype).reshape(leaf.shape)
        if array.nbytes != leaf.nbytes:
            raise OutputError(f"{printable(leaf.path)}: {leaf.nbytes} bytes were stored, {array.nbytes} are there")
        tensor = self.live.tensor(array)
        if leaf.brain:
            tensor = tensor.view(sys.modules["torch"].bfloat16)
        return tensor if leaf.mask is None else self.live.set_mask(tensor, leaf.mask)


def _nbytes(leaf: Any) -> int:
    """Bytes of a dense tensor or array; 0 for anything else, which then never goes to disk."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None or getattr(dtype, "kind", "f") == "O":
        return 0
    try:
        size = int(getattr(dtype, "itemsize", None) or dtype.size)
        for length in shape:
            size *= int(length)
    except (TypeError, AttributeError):
        return 0
    return size
