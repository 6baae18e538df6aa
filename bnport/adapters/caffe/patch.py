"""Writing into a copy of a caffemodel: the numbers of BatchNorm, Scale and Bias blobs, each in the place and encoding it has.

No blob changes its size, so nothing moves. mean and variance are written as they are and the factor becomes 1: the
stored numbers are then bit for bit what was asked for, where multiplying by a factor that Caffe divides by again would
round twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.adapters.caffe.norm import held_layers
from bnport.containers.files import ReadFile
from bnport.containers.patch import Patch, copy_patched
from bnport.containers.tensor import ITEM_SIZE
from bnport.errors import NotFound, Unrepresentable, listed, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.caffe.blob import Blob
    from bnport.adapters.caffe.net import Net
    from bnport.adapters.caffe.values import Choices, Held
    from bnport.layer import Change, Layer
    from bnport.record import Array

_WRITABLE = frozenset(("gamma", "beta", "mean", "variance"))


def patched(net: Net, choices: Choices, changes: Mapping[str, Change], out: str) -> None:
    """Fill the empty file `out` with the net's file, the changes made. Everything is checked before a byte is written."""
    copy_patched(ReadFile(net.path), out, file_patches(net, choices, changes))


def file_patches(net: Net, choices: Choices, changes: Mapping[str, Change]) -> list[Patch]:
    """The changes as bytes at offsets of the net's file."""
    layers = {held.name: (held, layer) for held, layer in held_layers(net, choices)[0]}
    unknown = [name for name in changes if name not in layers]
    if unknown:
        raise NotFound(f"{printable(net.path)}: no BatchNorm layer {listed(unknown)}; it has {listed(layers)}")
    writes: dict[int, bytes] = {}
    planned = set()
    for name, change in changes.items():
        for blob, array, what in _planned(net, *layers[name], change):
            _place(net, name, what, blob, array, writes)
            planned.add((name, what))
    for name, (held, _) in layers.items():  # records of one BatchNorm with several readers share its blobs
        for what, blob in held.fields.items():
            if (name, what) not in planned and blob.places and blob.places[0][0] in writes:
                raise Unrepresentable(
                    f"{printable(net.path)}: {printable(name, 80)}: its {what} is shared with a record that is changed;"
                    " change them together"
                )
    return [Patch(offset, data) for offset, data in sorted(writes.items())]


def _planned(net: Net, held: Held, layer: Layer, change: Change) -> list[tuple[Blob, Array, str]]:
    """(blob, what it shall hold, the field) for one change."""
    where = f"{printable(net.path)}: {printable(held.name, 80)}"
    record, fields = change.record, change.fields
    if record.channels != held.channels:
        raise Unrepresentable(f"{where}: {held.channels} channels expected, the change has {record.channels}")
    others = fields - _WRITABLE
    if others:
        raise Unrepresentable(
            f"{where}: a caffemodel cannot be given {listed(sorted(others))}; what runs the net is its prototxt"
        )
    if held.form in ("inverse-std", "affine", "learning") and fields & {"mean", "variance"}:
        what = "1/std in place of the variance" if held.form == "inverse-std" else "a folded affine and no statistics"
        raise Unrepresentable(f"{where}: holds {what}; a mean and a variance cannot be written there bit for bit")
    if "variance" in fields and record.epsilon != layer.epsilon and "epsilon" not in layer.assumed:
        raise Unrepresentable(f"{where}: the record's epsilon is {record.epsilon!r}, the net's is {layer.epsilon!r}")
    statistics = {"mean", "variance"} & fields
    plan: list[tuple[Blob, Array, str]] = []
    for field in sorted(fields):
        array = getattr(record, field)
        if field not in held.fields:
            neutral = 1.0 if field == "gamma" else 0.0
            if (array != neutral).any():
                raise Unrepresentable(f"{where}: has no {field} (no Scale or Bias layer holds one)")
            continue
        plan.append((held.fields[field], array, field))
    if statistics and held.form == "scaled":
        factor = held.fields["factor"]
        divisor = float(factor.tensor.array()[0])
        if divisor != 1:
            for field in {"mean", "variance"} - statistics:  # it was meant divided by the old factor
                kept = layer.arrays()[field]
                blob = held.fields[field]
                if (kept.astype(blob.tensor.dtype).astype(np.float64) != kept).any():
                    raise Unrepresentable(
                        f"{where}: {field} and {listed(statistics)} are stored times one factor ({divisor!r}), so one of"
                        " them cannot be written without rounding the other; write both"
                    )
                plan.append((blob, kept, field))
            plan.append((factor, np.ones(1), "factor"))
    return plan


def _place(net: Net, name: str, field: str, blob: Blob, array: Array, writes: dict[int, bytes]) -> None:
    where = f"{printable(net.path)}: {printable(name, 80)}: {field}"
    if blob.places is None:
        raise Unrepresentable(f"{where} is stored chunked or compressed; rewrite the file without (h5repack -l CONTI)")
    if blob.count == 1 and array.size > 1:
        if (array != array[0]).any():
            raise Unrepresentable(f"{where} is one number for all channels (num_axes: 0), the channels differ")
        array = array[:1]
    with np.errstate(over="ignore"):
        stored = array.astype(np.dtype(blob.tensor.dtype).newbyteorder("<"))
    if (stored.astype(np.float64) != array.astype(np.float64)).any():
        raise Unrepresentable(
            f"{where} is not a {blob.tensor.dtype} value; round the record to {blob.tensor.dtype} first"
        )
    data, done = stored.tobytes(), 0
    for offset, length in blob.places:
        piece = data[done : done + length]
        if writes.setdefault(offset, piece) != piece:
            raise Unrepresentable(f"{where} is shared with another record, and the two changes differ")
        done += length
    assert done == len(data) == blob.count * ITEM_SIZE[blob.tensor.dtype]
