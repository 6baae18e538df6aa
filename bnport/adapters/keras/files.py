"""HDF5 files of Keras and lists of shards: told apart, and those of Keras >= 2.12 (`.weights.h5`) read."""

from __future__ import annotations

import os

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.keras import config
from bnport.adapters.keras.entry import Contents, Entry
from bnport.adapters.keras.weights import Store, scan, shards
from bnport.containers.files import ReadFile
from bnport.containers.hdf5 import H5, natural
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnport.adapters.keras.absent import Absent
    from bnport.adapters.keras.weights import Found
    from bnport.containers.hdf5 import Group, H5Tensor


def read(file: ReadFile, absent: Absent | None, stat: str | None, *, evidence: bool) -> Contents:
    """The contents of an HDF5 file or a list of shards."""
    shown = printable(file.path)
    if file.path.lower().endswith(".json"):
        return _sharded(file, absent)
    h5 = H5(file)
    from bnport.adapters.keras import legacy

    if legacy.is_legacy(h5):
        return legacy.read(h5, stat, evidence=evidence)
    store = Store(lambda: h5)
    found, notes = scan(store, shown, absent)
    return Contents(
        file.path, "weights", [_entry(each, shown) for each in found], holds_epsilon=False, notes=tuple(notes)
    )


def _entry(found: Found, shown: str) -> Entry:
    tensors = found.tensors
    return Entry(found.name, f"{shown}: {printable(found.name)}", lambda: tensors, epsilon=None, notes=found.notes)


def _sharded(file: ReadFile, absent: Absent | None) -> Contents:
    shown = printable(file.path)
    if file.size > config.CONFIG_LIMIT:
        raise FormatError(f"{shown}: {file.size} bytes are too many for a list of shards")
    names = shards(config.parse(file.pread(0, file.size), shown), shown)
    folder = os.path.dirname(file.path)
    opened = []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            raise FormatError(f"{shown}: the shard {printable(name)} is a symbolic link; bnport does not follow it")
        opened.append(H5(ReadFile(path)))
    found, notes = scan(_Shards(opened), shown, absent)
    contents = Contents(
        file.path, "shards", [_entry(each, shown) for each in found], holds_epsilon=False, notes=tuple(notes)
    )
    contents.files = tuple(os.path.join(folder, name) for name in names)
    contents.read_only = (
        f"{shown}: weights in shards are read, not written; save the target in one file (model.save_weights without"
        " max_shard_size, or model.save)"
    )
    return contents


class _Shards(Store):
    """Several weights files as one: a layer's arrays may be spread over them."""

    ordered = False

    def __init__(self, opened: list[H5]) -> None:
        super().__init__(lambda: opened[0])
        self._shards = opened

    def walk(self) -> Iterable[tuple[str, Group]]:
        """Every group of every shard, those of one path as one."""
        groups: dict[str, list[Group]] = {}
        for h5 in self._shards:
            for path, group in h5.walk():
                groups.setdefault(path.replace("\\", "/"), []).append(group)
        return ((path, _Spread(path, parts)) for path, parts in groups.items())  # type: ignore[misc]


class _Spread:
    """What weights.scan asks of a group, answered by several."""

    def __init__(self, path: str, parts: list[Group]) -> None:
        self.path, self._parts = path, parts

    def names(self) -> list[str]:
        """The names in all parts; an array that is in two of them is there twice, and then too many."""
        return [name for part in self._parts for name in part.names()]

    def tensors(self) -> list[H5Tensor]:
        """The datasets in all parts, in natural order of their names, as those of one group are."""
        return sorted((tensor for part in self._parts for tensor in part.tensors()), key=lambda t: natural(t.name))

    def attribute(self, name: str) -> str | list[str] | None:
        """The attribute of the first part that has it."""
        return next((value for part in self._parts if (value := part.attribute(name)) is not None), None)
