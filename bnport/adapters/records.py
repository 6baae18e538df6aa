"""Records: bnport's own file, BatchNorm layers of any source in neutral terms, checksummed (.safetensors).

theirs                         ours             note
<layer>.gamma, <layer>.beta    gamma, beta      missing where the source has none (1 and 0, exactly)
<layer>.mean                   mean             in the precision of the source, bit for bit
<layer>.variance               variance         the variance itself, epsilon not included
layers[].epsilon               epsilon          decimal, exact
layers[].momentum              momentum         the fraction of the old value kept; missing where unknown
layers[].assumed               assumed          what the source did not hold: epsilon read from here stays assumed
layers[].kernel, inputs        kernel, inputs   kind, shape and name of what feeds the layer, and the graph: for pairing
layers[].untrained             untrained        true where the source said that the layer never saw a batch
layers[].sha256                                 over the layer's arrays; checked whenever they are read
checksum                                        over the description of all layers; checked when the file is opened
ordered                        ordered          "no" where the source was sorted by name (Layers.ordered)
source, source_sha256                           the file that the records were taken from

The file is plain safetensors: every safetensors library reads the arrays. The lower part of the table is in its metadata
("format": "bnport"), `layers` as one JSON text. `bnport convert model.pth records.safetensors` makes one where PyTorch
files are, and `bnport convert records.safetensors model.keras -o ported.keras` uses it where Keras is.
"""

from __future__ import annotations

import os

from bnport._lazy import TYPE_CHECKING
from bnport.containers.safetensors import is_safetensors, open_safetensors, write_safetensors
from bnport.containers.tensor import Tensor
from bnport.errors import FormatError, InvalidValue, NotFound, listed, printable
from bnport.layer import Kernel, Layer, Layers
from bnport.record import FIELDS
from bnport.rounding import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from bnport.layer import Change
    from bnport.record import Array

SUFFIXES = (".safetensors",)
PACKAGES = ()

VERSION = "1"
_MARK = b'"format":"bnport"'  # first in the metadata, hence always among the first bytes of the file


def recognise(head: bytes, path: str) -> bool:  # noqa: ARG001
    """Whether this is a safetensors file whose metadata starts with bnport's mark."""
    return is_safetensors(head) and _MARK in head[8:200]


def read(source: str) -> Layers:
    """The layers of a record file. Their arrays are read, and checked against their checksum, when asked for.

    Raises FormatError, naming the file, for what `save` does not write: a wrong checksum, missing or extra arrays.
    """
    tensors, metadata = open_safetensors(source)
    shown = printable(source)
    if metadata.get("format") != "bnport":
        raise FormatError(f"{shown}: not a record file of bnport (no 'format': 'bnport' in its metadata)")
    if metadata.get("version") != VERSION:
        version = printable(metadata.get("version"), 20)
        raise FormatError(f"{shown}: record file of version {version}; this bnport reads version {VERSION}")
    if metadata.get("checksum") != _checksum(metadata):
        raise FormatError(f"{shown}: the checksum of its metadata is wrong; the file is damaged or was edited")
    layers = [_layer(shown, entry, tensors) for entry in _entries(shown, metadata.get("layers", ""))]
    if len({layer.name for layer in layers}) != len(layers):
        raise FormatError(f"{shown}: two layers have the same name")
    unclaimed = set(tensors) - {f"{layer.name}.{field}" for layer in layers for field in FIELDS}
    if unclaimed:
        raise FormatError(f"{shown}: array {printable(min(unclaimed))} belongs to no layer")
    origin = metadata.get("source", "")
    digest = metadata.get("source_sha256", "")
    notes = [f"records of {printable(origin)}" + (f" (sha256 {printable(digest, 80)})" if digest else "")]
    ordered = metadata.get("ordered") != "no"
    return Layers(layers, source=source, format="records", notes=notes if origin else (), ordered=ordered)


def save(layers: Layers, out: str, sha256: str = "") -> None:
    """Fill the file at `out` with these layers: every array bit for bit as `Layer.arrays()` gives it.

    `sha256`: of the file that they were read from, where it is known.
    Raises InvalidValue, naming the layer, for numbers that are no BatchNorm.
    """
    name = os.path.basename(layers.source) if os.path.isfile(layers.source) else layers.source
    name = name.encode("utf-8", "backslashreplace").decode()  # on Linux it may be any bytes
    _write(out, layers, {"source": name, "source_format": layers.format, "source_sha256": sha256})


def write(target: str, changes: Mapping[str, Change], out: str) -> None:
    """Fill `out` with the records of `target` in which the layers of `changes` have new values."""
    layers = read(target)
    unknown = sorted(set(changes) - set(layers))
    if unknown:
        raise NotFound(f"{printable(target)}: no layer {listed(unknown)}")
    _, metadata = open_safetensors(target)
    changed = [_changed(layer, changes[name]) if name in changes else layer for name, layer in layers.items()]
    origin: dict[str, str] = {
        key: metadata[key] for key in ("source", "source_format", "source_sha256") if key in metadata
    }
    _write(out, layers.but(changed), origin)


def _changed(layer: Layer, change: Change) -> Layer:
    arrays = layer.arrays()
    if change.record.channels != layer.channels:
        raise InvalidValue(
            f"{printable(layer.name)}: {layer.channels} channels expected, {change.record.channels} given"
        )
    for field in change.fields & set(FIELDS):
        arrays[field] = getattr(change.record, field).astype(arrays["mean"].dtype)
    settings: dict[str, Any] = {"load": lambda: arrays, "assumed": layer.assumed - change.fields}
    if "epsilon" in change.fields:
        settings["epsilon"] = change.record.epsilon
    if "momentum" in change.fields:
        settings["momentum"] = change.momentum
    return layer.but(**settings)


def _write(out: str, layers: Layers, origin: Mapping[str, str]) -> None:
    import json

    tensors: dict[str, Array] = {}
    entries = []
    for name, layer in layers.items():
        layer.record  # noqa: B018  # validates
        arrays = {field: array for field, array in layer.arrays().items() if field in FIELDS}
        tensors.update({f"{name}.{field}": array for field, array in arrays.items()})
        entries.append(_described(layer, {field: _bytes(array) for field, array in arrays.items()}))
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False)
    order = {} if layers.ordered else {"ordered": "no"}
    metadata = {"format": "bnport", "version": VERSION, **origin, **order, "layers": text}
    write_safetensors(out, tensors, {**metadata, "checksum": _checksum(metadata)})


def _bytes(array: Array) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _described(layer: Layer, held: Mapping[str, bytes]) -> dict[str, object]:
    entry: dict[str, object] = {"name": layer.name, "epsilon": layer.epsilon, "dtype": layer.dtype}
    if layer.momentum is not None:
        entry["momentum"] = layer.momentum
    if layer.assumed:
        entry["assumed"] = sorted(layer.assumed)
    if layer.kernel is not None:
        guess = ["refuted"] if layer.kernel.refuted else ["guessed"] if layer.kernel.guessed else []
        entry["kernel"] = [layer.kernel.kind, list(layer.kernel.shape), layer.kernel.name, *guess]
    if layer.inputs is not None:
        entry["inputs"] = list(layer.inputs)
    if layer.notes:
        entry["notes"] = list(layer.notes)
    if layer.untrained:
        entry["untrained"] = True
    return {**entry, "sha256": _digest(held)}


def _digest(held: Mapping[str, bytes]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for field in FIELDS:
        if field in held:
            digest.update(f"{field} {len(held[field])}\n".encode() + held[field])
    return digest.hexdigest()


def _checksum(metadata: Mapping[str, str]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        value = metadata[key].encode("utf-8", "surrogatepass")
        digest.update(f"{key} {len(value)}\n".encode("utf-8", "surrogatepass") + value)
    return digest.hexdigest()


def _entries(shown: str, text: str) -> list[dict[str, Any]]:
    from bnport.containers.json_text import loads

    entries = loads(text, f"{shown}: the layers in its metadata")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and all(type(e.get(key)) is str for key in ("name", "dtype", "sha256")) for e in entries
    ):
        raise FormatError(f"{shown}: the layers in its metadata should be a list, each with name, dtype and sha256")
    return entries


def _layer(shown: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
    name, dtype = entry["name"], entry["dtype"]
    where = f"{shown}: {printable(name)}"
    held = {field: tensors[f"{name}.{field}"] for field in FIELDS if f"{name}.{field}" in tensors}
    if "mean" not in held or "variance" not in held:
        raise FormatError(f"{where}: its mean or variance is missing")
    shapes = {tensor.shape for tensor in held.values()}
    if len(shapes) > 1 or len(held["mean"].shape) != 1:
        raise FormatError(f"{where}: arrays of one length (channels,) expected, found {sorted(shapes)}")
    held = _checked(where, held, entry["sha256"])
    if dtype not in UNIT_ROUNDOFF or any(tensor.dtype not in UNIT_ROUNDOFF for tensor in held.values()):
        raise FormatError(f"{where}: its arrays are not floating-point numbers")
    momentum = entry.get("momentum")
    if momentum is not None and type(momentum) not in (int, float):
        raise FormatError(f"{where}: momentum should be a number, it is {printable(momentum, 40)}")
    inputs, assumed, notes = (entry.get(key) for key in ("inputs", "assumed", "notes"))
    for key, names in (("inputs", inputs), ("assumed", assumed), ("notes", notes)):
        if names is not None and (not isinstance(names, list) or not all(isinstance(word, str) for word in names)):
            raise FormatError(f"{where}: {key} should be a list of names")
    try:
        return Layer(
            name,
            channels=held["mean"].shape[0],
            epsilon=entry.get("epsilon"),  # type: ignore[arg-type]  # Layer refuses what is no number
            load=lambda: {field: tensor.array() for field, tensor in held.items()},
            momentum=momentum,
            stores={*held, "epsilon", "momentum"},
            assumed=assumed or (),
            dtype=dtype,
            tensors=held,
            kernel=_kernel(where, entry.get("kernel")),
            inputs=None if inputs is None else tuple(inputs),
            notes=notes or (),
            untrained=entry.get("untrained") is True,
        )
    except InvalidValue as error:
        raise FormatError(f"{shown}: {error}") from None


def _kernel(where: str, entry: Any) -> Kernel | None:
    if entry is None:
        return None
    if isinstance(entry, list) and (len(entry) == 3 or (len(entry) == 4 and entry[3] in ("guessed", "refuted"))):
        kind, shape, name, *guess = entry
        plain = isinstance(kind, str) and isinstance(name, str) and isinstance(shape, list)
        if plain and all(type(side) is int for side in shape):
            return Kernel(kind, tuple(shape), name, guessed=bool(guess), refuted=guess == ["refuted"])
    raise FormatError(f"{where}: kernel should be a kind, a shape and a name")


def _checked(where: str, held: Mapping[str, Tensor], expected: str) -> dict[str, Tensor]:
    """The same tensors; reading any of them reads the layer's arrays and compares their checksum first."""

    def reader(field: str) -> Callable[[], bytes]:
        def read_checked() -> bytes:
            found = {name: tensor.read() for name, tensor in held.items()}
            if _digest(found) != expected:
                raise FormatError(f"{where}: the checksum of its arrays is wrong; the file is damaged or was edited")
            return found[field]

        return read_checked

    return {name: Tensor(tensor.name, tensor.dtype, tensor.shape, reader(name)) for name, tensor in held.items()}
