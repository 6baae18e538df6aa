"""What was asked of calibrate(): options that would mean nothing are refused, and the layers are chosen."""

from __future__ import annotations

import fnmatch
import inspect
import os
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.calibrate.folder import ImageFolder
from bnport.errors import InvalidValue, NotFound, OutputError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bnport.calibrate.models import LiveModel, Norm


def check_options(
    data: Any,
    images: Mapping[str, Any] | None,
    engine: str | None,
    workers: int | None,
    address: Any,
    spill: str | None,
    **flags: object,
) -> None:
    """Refuse options that would mean nothing, and `flags` that are neither True nor False ("no" would be true)."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise InvalidValue(f"{name}: expected True or False, got {printable(repr(flag), 60)}")
    path = data if isinstance(data, str | os.PathLike) else None
    if path is not None and not os.path.exists(path):
        raise NotFound(f"{printable(path)}: no such file or folder")
    if images and not (path is not None and os.path.isdir(path)):
        raise InvalidValue(f"{listed(images)}: options for a folder of images, which the data are not")
    known = [name for name, p in inspect.signature(ImageFolder).parameters.items() if p.kind is p.KEYWORD_ONLY]
    known.remove("batch_size")  # an argument of its own
    unknown = [str(name) for name in images or () if name not in known]
    if unknown:
        raise InvalidValue(f"images: no option is called {listed(unknown)}; there are {listed(known, 12)}")
    given = [name for name, value in (("workers", workers), ("address", address)) if value is not None]
    if given and engine is None:
        raise InvalidValue(f"{listed(given)}: of an engine, and none is named; engine 'local' runs many processes here")
    if spill is not None and not os.path.isdir(spill):
        raise OutputError(f"{printable(spill)}: no such folder; activations beyond the memory budget cannot go there")


def select(
    live: LiveModel, layers: str | Iterable[str] | None, frozen: bool
) -> tuple[list[Norm], dict[str, list[str]]]:
    """The layers to calibrate; and reason -> names of those that are left alone. NotFound if there are none."""
    names = [norm.name for norm in live.norms]
    one = isinstance(layers, str) or not hasattr(layers, "__iter__")
    patterns: list[str] | None = None if layers is None else [layers] if one else list(layers)  # type: ignore[list-item]
    if not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise InvalidValue(f"layers: expected names or patterns, got {printable(repr(layers), 60)}")
    if patterns == []:
        raise InvalidValue(f"layers: names no layer; leave it out for all, or name some of {listed(names)}")
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern) and pattern not in names:
            raise NotFound(
                f"{live.what}: no BatchNorm layer is called {printable(pattern)!r}; there are {listed(names)}"
            )
    asked = [
        norm
        for norm in live.norms
        if patterns is None or any(norm.name == p or fnmatch.fnmatchcase(norm.name, p) for p in patterns)
    ]
    left = {
        "not asked for": [norm.name for norm in live.norms if norm not in asked],
        "frozen (trainable=False; frozen=True includes them)": [n.name for n in asked if n.frozen and not frozen],
    }
    selected = [norm for norm in asked if frozen or not norm.frozen]
    if not selected:
        raise NotFound(
            f"{live.what}: all of its {len(asked)} BatchNorm layers are frozen (trainable=False);"
            " frozen=True (--frozen) includes them"
        )
    return selected, left
