"""HDF5 files of Keras and lists of shards: told apart, and those of Keras >= 2.12 (`.weights.h5`) read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bnport.adapters.keras import config
from bnport.adapters.keras.entry import Contents, Entry
from bnport.adapters.keras.weights import Store, scan, shards
from bnport.containers.files import ReadFile
from bnport.containers.hdf5 import H5
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from bnport.adapters.keras.weights import Found


def read(file: ReadFile, absent: str | None, stat: str | None) -> Contents:
    """The contents of an HDF5 file or a list of shards."""
    shown = printable(file.path)
    if file.path.lower().endswith(".json"):
        return _sharded(file, absent)
    h5 = H5(file)
    from bnport.adapters.keras import legacy

    if legacy.is_legacy(h5):
        return legacy.read(h5, stat)
    store = Store(lambda: h5)
    found, notes = scan(store, shown, absent)
    return Contents(
        file.path, "weights", [_entry(each, shown) for each in found], holds_epsilon=False, notes=tuple(notes)
    )


def _entry(found: Found, shown: str) -> Entry:
    tensors = found.tensors
    return Entry(found.name, f"{shown}: {printable(found.name)}", lambda: tensors, epsilon=None, notes=found.notes)


def _sharded(file: ReadFile, absent: str | None) -> Contents:
    shown = printable(file.path)
    if file.size > config.CONFIG_LIMIT:
        raise FormatError(f"{shown}: {file.size} bytes are too many for a list of shards")
    names = shards(config.parse(file.pread(0, file.size), shown), shown)
    folder = os.path.dirname(file.path)
    entries, notes = [], []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            raise FormatError(f"{shown}: the shard {printable(name)} is a symbolic link; bnport does not follow it")
        h5 = H5(ReadFile(path))
        found, remarks = scan(Store(lambda h5=h5: h5), shown, absent)  # type: ignore[misc]
        entries += [_entry(each, shown) for each in found]
        notes += remarks
    return Contents(file.path, "shards", entries, holds_epsilon=False, notes=tuple(notes))
