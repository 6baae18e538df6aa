"""Changes written into a copy of a Keras file: arrays overwritten where they lie, epsilon put into the config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.keras.entry import Contents
    from bnport.layer import Change


def write(contents: Contents, changes: Mapping[str, Change], out: str) -> None:
    """Fill the new empty file `out` with a copy of the contents' file and the changes."""
    raise NotImplementedError
