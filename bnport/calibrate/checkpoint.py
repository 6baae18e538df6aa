"""A calibration's moments on disk, so that an interrupted run goes on where it stopped.

A checkpoint is an .npz of plain arrays (nothing is unpickled): "made_for", the parts of what the result depends on with a
sha256 each (identity.py), and the state. It is replaced whole (temporary file, fsync, rename), so that a kill leaves the
last good one. A file that is not a checkpoint is refused, never replaced.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.containers.files import check_output, replace_file
from bnport.errors import FormatError, InvalidValue, listed, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.record import Array


class Checkpoint:
    """The file at `path`, for the run with these parts. `state` is what an earlier run left, or None."""

    def __init__(self, path: str, made_for: Mapping[str, str]) -> None:
        check_output(path, force=True)  # now, not after the first round
        self.path, self.made_for = path, dict(made_for)
        self.state: dict[str, Array] | None = self._load() if os.path.exists(path) else None

    def _load(self) -> dict[str, Array]:
        shown = printable(self.path)
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                made_for = json.loads(str(stored["made_for"]))
                if not isinstance(made_for, dict) or set(made_for) != set(self.made_for):
                    raise ValueError("it names no run")
                state = {name: stored[name] for name in stored.files if name != "made_for"}
        except Exception as error:  # any file of the user's may be named by mistake
            raise FormatError(
                f"{shown}: exists and is not a checkpoint of a calibration ({printable(error, 80)}); name the checkpoint, or a"
                " file that does not exist yet"
            ) from None
        other = [part for part in made_for if made_for[part] != self.made_for[part]]
        if other:
            raise InvalidValue(
                f"{shown}: is the checkpoint of another run: it had other values for {listed(other)}; name another file, or"
                " delete it to start anew"
            )
        return state

    def save(self, state: dict[str, Array]) -> None:
        """Replace the file."""

        def build(path: str) -> None:
            with open(path, "wb") as file:
                np.savez(file, made_for=np.array(json.dumps(self.made_for)), **state)  # type: ignore[arg-type]

        replace_file(self.path, build, force=True)


def delete(path: str | os.PathLike[str] | None) -> None:
    """The result stands where it was wanted: the checkpoint, if there is one, has done its work."""
    if path is not None and os.path.exists(path):
        os.unlink(path)


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
