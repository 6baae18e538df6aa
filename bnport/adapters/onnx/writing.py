"""Changed layers spliced into a copy of a model: a tensor in place where only its layer uses it, else a new one beside it."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.onnx import layers, model, walk
from bnport.adapters.onnx.scope import Known, defined_twice
from bnport.adapters.onnx.tensors import DTYPES, EXTERNAL
from bnport.containers.patch import Patch
from bnport.containers.protobuf import Buffer, Edit, encoded, extents, field_start, splice, spliced
from bnport.containers.tensor import Tensor
from bnport.errors import InvalidValue, NotFound, OutputError, listed, printable
from bnport.rounding import stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.onnx.model import Model, Place
    from bnport.adapters.onnx.tensors import Stored
    from bnport.adapters.onnx.walk import Found
    from bnport.layer import Change
    from bnport.record import Array

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_DATA_FIELDS = {4, 5, 7, 9, 10, 11, 13, 14}  # of TensorProto: numbers, and where external ones lie
_LARGEST_LIVE = 2**31 - 1  # protobuf serialises no more


def write_file(target: str, changes: Mapping[str, Change], out: str) -> None:
    """Make the file `out`: `target` with the changes."""
    opened = model.of_file(target)
    edits = _Plan(opened).edits(changes)
    _external_data_comes_along(opened, target, out)
    splice(opened.buffer, edits, out)


def file_patches(target: str, changes: Mapping[str, Change]) -> list[Patch]:
    """The changes as bytes at offsets of the model file; InvalidValue where it would have to become longer."""
    edits = _Plan(model.of_file(target)).edits(changes)
    if any(len(edit.data) != edit.end - edit.start for edit in edits):
        raise InvalidValue(
            f"{printable(target)}: cannot be changed in place (tensors that are shared or external, or an attribute that is"
            " not there yet, make it longer); make a new file (-o)"
        )
    return [Patch(edit.start, edit.data) for edit in edits]


def write_live(proto: Any, changes: Mapping[str, Change], folder: str | None) -> None:
    """Change a live ModelProto: everything is worked out on a serialised copy before it is touched."""
    if proto.ByteSize() > _LARGEST_LIVE:
        raise InvalidValue(f"a live ONNX model of {proto.ByteSize()} bytes: write into its file instead")
    held = model.whole(Buffer(proto.SerializeToString(), "a live ONNX model"))
    opened = model.Model(held, "a live ONNX model", folder)
    changed = type(proto)()
    changed.ParseFromString(spliced(opened.buffer, _Plan(opened).edits(changes)))
    proto.CopyFrom(changed)


def _external_data_comes_along(opened: Model, target: str, out: str) -> None:
    """The new model names the same data files: they must lie beside it too. They are never written to."""
    here = os.path.dirname(os.path.abspath(out))
    if os.path.realpath(here) == os.path.realpath(os.path.dirname(os.path.abspath(target))):
        return
    locations = set()
    for name in opened.graph.names:
        stored = opened.graph.initializer(name)
        if stored is not None and stored.location == EXTERNAL:
            locations.add(stored.external.get("location", ""))
    missing = sorted(name for name in locations if not os.path.exists(os.path.join(here, name)))
    if missing:
        raise OutputError(
            f"{printable(here)}: {printable(target)} keeps its other weights in {listed(missing)}; put the output beside"
            " that file, or a copy of that file beside the output"
        )


class _Plan:
    """What a change to a layer means in bytes."""

    def __init__(self, opened: Model) -> None:
        self.model = opened
        self.walk = walk.Walk(opened)
        self.found = layers.named(self.walk.found)
        self.twice: set[tuple[int, str]] = set()  # (id of a graph, name) that a graph within defines too
        self.uses = self._uses()
        self.taken = {name for scope in self.walk.scopes for name in (*scope.graph.names, *scope.producers)}
        self.taken.update(name for scope in self.walk.scopes for name in scope.graph.inputs)
        self._edits: list[Edit] = []

    def _uses(self) -> dict[tuple[int, str], int]:
        """How often each initializer is used: (id of its graph, name) -> count. Of a call that was followed, its body."""
        uses: dict[tuple[int, str], int] = {}
        for scope in self.walk.scopes:
            names = [
                name
                for node in scope.graph.nodes
                if (node.domain, node.op, node.overload) not in self.walk.entered
                for name in node.inputs
                if name
            ]
            for name in (*names, *scope.graph.outputs):
                at, origin = scope.origin(name)
                key = (id(at.graph), origin)
                uses[key] = uses.get(key, 0) + 1
                around = at.around(origin)
                while around is not None:
                    self.twice.add((id(around.graph), origin))
                    around = around.around(origin)
        return uses

    def edits(self, changes: Mapping[str, Change]) -> list[Edit]:
        """All of them, or an error before anything is written."""
        for name, change in changes.items():
            if name not in self.found:
                raise NotFound(f"{printable(self.model.source)}: no layer {printable(name)!r}; {listed(self.found)}")
            self._layer(name, self.found[name], change)
        return self._edits

    def _layer(self, name: str, found: Found, change: Change) -> None:
        where = f"{printable(self.model.source)}: layer {printable(name)!r}"
        if found.affine:
            raise InvalidValue(
                f"{where} was taken apart into Mul and Add; write into a model that kept BatchNormalization"
            )
        held = layers.parameters(found, self.model.source)
        if held.unknown:
            raise InvalidValue(f"{where}: {next(iter(held.unknown))} {next(iter(held.unknown.values())).why}")
        if change.record.channels != held.channels:
            raise InvalidValue(f"{where}: {held.channels} channels, {change.record.channels} to be written")
        for field, position in layers.POSITIONS.items():
            value = held.values[field]
            if field in change.fields and isinstance(value, Known):
                self._tensor(found, field, position, value, getattr(change.record, field), where)
        if "epsilon" in change.fields:
            self._float(found, "epsilon", change.record.epsilon, where)
        if "momentum" in change.fields and change.momentum is not None:
            self._float(found, "momentum", change.momentum, where)

    # ---- tensors

    def _tensor(self, found: Found, field: str, position: int, value: Known, array: Array, where: str) -> None:
        data = stored(array, value.dtype)
        back = Tensor(field, value.dtype, array.shape, lambda: data).array()
        if not np.array_equal(back.astype(np.float64), array.astype(np.float64)):
            raise InvalidValue(f"{where}: {field} cannot be held as {value.dtype}; round it first")
        at, origin = found.scope.origin(found.node.inputs[position])
        if (id(at.graph), origin) in self.twice:
            raise InvalidValue(f"{where}: its {field} {defined_twice(origin)}; rename one of the two first")
        if value.stored is not None and not value.through and self.uses.get((id(at.graph), origin)) == 1:
            self._in_place(value.stored, value.dtype, data)
        elif found.scope.function:
            raise InvalidValue(
                f"{where}: its {field} is shared inside a function of the model; inline the functions first"
            )
        else:
            self._beside(
                found,
                position,
                self._new_name(found.node.inputs[position] + layers.OURS),
                value.dtype,
                array.shape,
                data,
            )

    def _in_place(self, stored: Stored, dtype: str, data: bytes) -> None:
        """New numbers in the field that holds the old ones, if they lie in one piece there; else as raw_data."""
        place = stored.place
        start, end = place.span[0], place.span[0] + place.span[1]
        numbers = [(first, last) for number, first, last in extents(place.buffer, start, end) if number in _DATA_FIELDS]
        tensor = stored.form in ("raw", "floats", "doubles") and dtype in ("float32", "float64", "float16", "bfloat16")
        if tensor and len(numbers) == 1 and stored.location != EXTERNAL:
            last = numbers[0][1]
            self._edits.append(Edit(last - len(data), last, data, place.path))
            return
        self._edits += [Edit(first, last, b"", place.path) for first, last in numbers]
        self._edits.append(Edit(end, end, encoded(9, data), place.path))

    def _beside(self, found: Found, position: int, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """A new initializer in the main graph, and the node's input pointed at it."""
        dims = b"".join(encoded(1, length) for length in shape)
        tensor = dims + encoded(2, _KINDS[dtype]) + encoded(8, name) + encoded(9, data)
        graph = self.model.graph.place
        end = graph.span[0] + graph.span[1]
        self._edits.append(Edit(end, end, encoded(5, tensor), graph.path))
        if self.model.ir_version < 4:  # there every initializer is listed among the inputs too
            extent = b"".join(encoded(1, encoded(1, length)) for length in shape)
            kind = encoded(1, encoded(1, _KINDS[dtype]) + encoded(2, extent))
            self._edits.append(Edit(end, end, encoded(11, encoded(1, name) + encoded(2, kind)), graph.path))
        place = found.node.place
        inputs = [place.bytes_of(value) for number, _, value in place.fields() if number == 1]
        start = field_start(place.buffer, inputs[position], 1)
        self._edits.append(Edit(start, sum(inputs[position]), encoded(1, name), place.path))

    def _new_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}_{number}"
        self.taken.add(name)
        return name

    # ---- attributes

    def _float(self, found: Found, name: str, value: float, where: str) -> None:
        attribute = found.node.attributes.get(name)
        shared = sum(other.node is found.node for other in self.walk.found) > 1
        if shared or (attribute is not None and attribute.reference):
            current = found.scope.attribute(found.node, name)
            if current is not None and current.f == struct.unpack("<f", struct.pack("<f", value))[0]:
                return
            raise InvalidValue(
                f"{where}: its {name} is that of a function which other layers share; inline the functions first"
            )
        if attribute is None:
            made = encoded(1, name) + encoded(2, float(value)) + encoded(20, 1)
            self._append(found.node.place, encoded(5, made))
        elif attribute.f_span is None:
            self._append(attribute.place, encoded(2, float(value)))
        else:
            start, length = attribute.f_span
            self._edits.append(Edit(start, start + length, struct.pack("<f", value), attribute.place.path))

    def _append(self, place: Place, data: bytes) -> None:
        end = place.span[0] + place.span[1]
        self._edits.append(Edit(end, end, data, place.path))
