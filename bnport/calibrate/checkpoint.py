"""A calibration's moments on disk, so that an interrupted run goes on where it stopped.

A checkpoint is an .npz of plain arrays (nothing is unpickled): "made_for", the sha256 of everything that the result
depends on, and the state. It is replaced whole (temporary file, fsync, rename), so that a kill leaves the last good one.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.containers.files import check_output, replace_file
from bnport.errors import FormatError, InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnport.calibrate.models import LiveModel
    from bnport.record import Array


def fingerprint(live: LiveModel, first_batch: Any, settings: Iterable[object]) -> str:
    """sha256 over the settings, every weight of the model, the layers' names and the first batch."""
    digest = hashlib.sha256()
    for setting in settings:
        digest.update(repr(setting).encode() + b"\0")
    for norm in live.norms:
        digest.update(norm.name.encode() + b"\0")
    for variable in live.model.weights:
        _feed(digest, np.asarray(variable.numpy()))
    for leaf in live.tree.flatten(first_batch):
        _feed(digest, live.numpy(leaf))
    return digest.hexdigest()


def _feed(digest: Any, array: Array) -> None:
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class Checkpoint:
    """The file at `path`, for runs with this fingerprint. `state` is what an earlier run left, or None."""

    def __init__(self, path: str, made_for: str) -> None:
        check_output(path, force=True)  # now, not after the first round
        self.path, self.made_for = path, made_for
        self.state: dict[str, Array] | None = self._load() if os.path.exists(path) else None

    def _load(self) -> dict[str, Array]:
        shown = printable(self.path)
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                state = {name: stored[name] for name in stored.files}
            made_for = str(state.pop("made_for"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
            raise FormatError(
                f"{shown}: not a checkpoint of a calibration ({printable(error, 80)}); delete it to start anew"
            ) from None
        if made_for != self.made_for:
            raise InvalidValue(
                f"{shown}: is the checkpoint of another run: the model's weights, the method, the layers or the data"
                " differ; name another file, or delete it to start anew"
            )
        return state

    def save(self, state: dict[str, Array]) -> None:
        """Replace the file."""

        def build(path: str) -> None:
            with open(path, "wb") as file:
                np.savez(file, made_for=np.array(self.made_for), **state)  # type: ignore[arg-type]

        replace_file(self.path, build, force=True)

    def delete(self) -> None:
        """The run is complete: the file has done its work."""
        if os.path.exists(self.path):
            os.unlink(self.path)


def packed(parts: dict[str, dict[str, Array]]) -> dict[str, Array]:
    """One flat dict for an .npz out of one dict of arrays per layer."""
    names = np.array(list(parts), dtype=np.str_)
    flat = {f"{k}.{key}": value for k, part in enumerate(parts.values()) for key, value in part.items()}
    return {"names": names, **flat}


def unpacked(state: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """The inverse of `packed`."""
    parts: dict[str, dict[str, Array]] = {str(name): {} for name in state.get("names", ())}
    order = list(parts)
    for key, value in state.items():
        number, dot, rest = key.partition(".")
        if dot and number.isdigit() and int(number) < len(order):
            parts[order[int(number)]][rest] = value
    return parts
