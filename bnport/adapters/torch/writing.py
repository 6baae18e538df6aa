"""Numbers written into a copy of a torch file: the tensors' bytes are replaced where they lie, all else stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.adapters.torch.layers import FIELD_OF
from bnport.adapters.torch.parameters import Product
from bnport.adapters.torch.tensors import PlacedTensor
from bnport.containers.files import ReadFile
from bnport.containers.patch import Patch, copy_patched, crc_patches
from bnport.containers.tensor import Tensor
from bnport.containers.zip import Archive
from bnport.errors import InvalidValue, NotFound, listed, printable
from bnport.rounding import round_to, stored

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnport.layer import Change, Layers
    from bnport.record import Array


def write_file(target: str, layers: Layers, changes: Mapping[str, Change], out: str) -> None:
    """Fill the empty file `out` with `target` and the changes; `layers` are those read from `target`."""
    copy_patched(ReadFile(target), out, file_patches(target, layers, changes))


def file_patches(target: str, layers: Layers, changes: Mapping[str, Change]) -> list[Patch]:
    """The changes as bytes at offsets of the file `target`; `layers` are those read from it."""
    from bnport.containers.safetensors import is_safetensors, tensor_patches

    new = list(_encoded(layers, changes))
    file = ReadFile(target)
    if is_safetensors(file.pread(0, min(16, file.size))):
        return tensor_patches(target, {tensor.name: data for _, tensor, data in new})
    patches: dict[str, dict[int, Patch]] = {}  # by archive member ("" in a file without members), then by offset
    for shown, tensor, data in new:
        if not isinstance(tensor, PlacedTensor):
            raise InvalidValue(
                f"{shown}: is a strided view, or lies in a compressed or big-endian file, so it is not written"
            )
        member, offset = tensor.place()
        placed = patches.setdefault(member, {}).setdefault(offset, Patch(offset, data))
        if placed.data != data:
            raise InvalidValue(f"{shown}: shares its memory with another layer that is to get other numbers")
    _refuse_shared(layers, changes, patches)
    everything = [patch for inside in patches.values() for patch in inside.values()]
    if set(patches) - {""}:
        archive = Archive(file, without_checksums=True)
        if archive.checksums:
            for name, inside in patches.items():
                everything += crc_patches(archive, archive.member(name), inside.values())
    return everything


def _encoded(layers: Layers, changes: Mapping[str, Change]) -> Iterator[tuple[str, Tensor, bytes]]:
    """(for messages, tensor, its new bytes) of everything that changes."""
    for name, change in changes.items():
        if name not in layers:
            raise NotFound(f"{layers.source}: no BatchNorm layer {printable(name)!r}; there are {listed(layers, 5)}")
        layer = layers[name]
        for field in sorted(change.fields):
            shown = f"{layers.source}: {printable(name)}: {field}"
            tensor = (layer.tensors or {}).get(field)
            if not isinstance(tensor, Tensor):
                held = field in FIELD_OF.values() and field in layer.stores  # InPlaceABN's gamma is not its weight
                why = (
                    "it is InPlaceABN's, write it into the live module"
                    if held
                    else "the file holds none for this layer"
                )
                raise InvalidValue(f"{shown} cannot be written: {why}")
            if isinstance(tensor, Product):
                raise InvalidValue(
                    f"{shown} cannot be written: the layer is pruned, it is {' * '.join(_last(p) for p in tensor.parts)};"
                    " call torch.nn.utils.prune.remove on the live layer and save it first"
                )
            array = getattr(change.record, field)
            if array.shape != tensor.shape:
                raise InvalidValue(f"{shown}: {tensor.size} channels in the layer, {array.size} given")
            yield shown, tensor, _bytes_of(array, tensor.dtype, shown)


def _last(part: Tensor) -> str:
    return printable(part.name.rpartition(".")[2])


def _bytes_of(array: Array, dtype: str, shown: str) -> bytes:
    """Little-endian bytes of numbers that `dtype` holds exactly."""
    wide = np.asarray(array, np.float64)
    rounded = round_to(wide, dtype)
    if not np.array_equal(rounded.astype(np.float64), wide):
        raise InvalidValue(f"{shown}: not rounded to the file's {dtype}")
    return stored(rounded, dtype)


def _refuse_shared(layers: Layers, changes: Mapping[str, Change], patches: Mapping[str, Mapping[int, Patch]]) -> None:
    """No number of another BatchNorm layer may change along, as it would where two tensors share memory."""
    for name, layer in layers.items():
        for field, whole in (layer.tensors or {}).items():
            if name in changes and field in changes[name].fields:
                continue
            for tensor in whole.parts if isinstance(whole, Product) else (whole,):
                if not isinstance(tensor, PlacedTensor):
                    continue
                member, start = tensor.place()
                for offset, patch in patches.get(member, {}).items():
                    if offset < start + tensor.nbytes and start < offset + len(patch.data):
                        raise InvalidValue(
                            f"{layers.source}: {printable(name)}: {field} shares its memory with numbers that are to change"
                        )
