"""A model in several files: model.safetensors.index.json or pytorch_model.bin.index.json, and the parts it lists.

The index is {"weight_map": {tensor: file}, ...}; the files lie beside it. A layer's tensors may lie in different parts, so
that a part alone is refused: a weight in another part would look like a layer without one.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from bnport.containers.files import ReadFile
from bnport.containers.json_text import loads
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.containers.tensor import Tensor
    from bnport.layer import Layers

INDEX = ".index.json"
MOST_BYTES = 64 << 20
MOST_PARTS = 10_000
_PART = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(\.\w+)")


def refuse_part(path: str) -> None:
    """Raise FormatError for a file whose name says that it is one of several parts of a model."""
    folder, name = os.path.split(path)
    found = _PART.fullmatch(name)
    if found and int(found[3]) > 1:
        index = found[1] + found[4] + INDEX
        there = "" if os.path.exists(os.path.join(folder, index)) else ", which is not there"
        raise FormatError(
            f"{printable(path)}: by its name one of {int(found[3])} parts of a model, and arrays of a layer may lie in another"
            f" part; give the index, {printable(os.path.join(folder, index))}{there} (a model of its own: rename it)"
        )


def tensors_of_index(
    path: str, opened: Callable[[ReadFile], Checkpoint | Layers]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """The tensors that an index lists, in the order of the parts, torch's module versions, and the paths of the parts.

    `opened` opens a part of torch.save. Raises FormatError for a part that is no plain name or not there, and for a tensor
    that is not in the part that should hold it.
    """
    places = _weight_map(path)
    tensors: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    parts = {part: os.path.join(os.path.dirname(path), part) for part in sorted(set(places.values()))}
    for part, where in parts.items():
        held, more = _part(where, opened)
        tensors.update((name, tensor) for name, tensor in held.items() if places.get(name) == part)
        versions.update(more)
    missing = next((name for name in places if name not in tensors), None)
    if missing is not None:
        raise FormatError(f"{printable(path)}: {printable(missing)!r} is not in {printable(places[missing])}")
    return tensors, versions, list(parts.values())


def _weight_map(path: str) -> dict[str, str]:
    shown = printable(path)
    file = ReadFile(path)
    if file.size > MOST_BYTES:
        raise FormatError(f"{shown}: larger than {MOST_BYTES >> 20} MiB; an index is a list of names")
    index = loads(file.pread(0, file.size), f"{shown}: not an index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise FormatError(f'{shown}: not an index: it has no "weight_map" of tensor and file names')
    parts = set(places.values())
    if len(parts) > MOST_PARTS:
        raise FormatError(f"{shown}: {len(parts)} parts; at most {MOST_PARTS} are read")
    for part in parts:
        if part != os.path.basename(part) or "\\" in part or "\0" in part or part in ("", ".", ".."):
            raise FormatError(f"{shown}: the part {printable(part)!r} does not lie beside it")
    return places


def _part(path: str, opened: Callable[[ReadFile], Checkpoint | Layers]) -> tuple[dict[str, Tensor], dict[str, int]]:
    if path.lower().endswith(".safetensors"):
        from bnport.containers.safetensors import open_safetensors

        return open_safetensors(path)[0], {}
    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.adapters.torch.search import tensors_of

    checkpoint: Any = opened(ReadFile(path))
    items = checkpoint.items(checkpoint.value) if isinstance(checkpoint, Checkpoint) else None
    if items is None:
        raise FormatError(f"{printable(path)}: a part of a model should hold a plain state dict")
    return tensors_of(items, checkpoint), checkpoint.versions(checkpoint.value)
