"""ONNX: BatchNormalization of every opset, in graphs, subgraphs and functions.

    theirs                          ours        note
    input 1  scale                  gamma       always there; exporters write ones where a layer has none
    input 2  B                      beta        always there; zeros likewise
    input 3  mean, input_mean       mean        the running mean
    input 4  var, input_var         variance    the running variance, biased since opset 14
    epsilon (float32)               epsilon     1e-5 where absent, which the operator defines; read as the decimal meant
    momentum (float32)              momentum    the same meaning: the fraction of the OLD value kept; 0.9 where absent
    input 0, output 0, channel axis 1
    training_mode (14+), several outputs (7-13), is_test=0 (1-6): training mode: refused, but for --stat stored
    spatial=0 (1-8)                             one value per channel: taken as spatial=1; per position: refused

Only the position of an input counts. Values are followed through initializers, Constant, Identity, Cast, CastLike,
ConstantOfShape, Expand, Reshape, Squeeze, Unsqueeze, Flatten and Transpose, out of functions and subgraphs. What is fed
at run time or computed from the batch has no stored numbers, nor has what is cast to a type that the file does not state,
or called by a name that nested graphs share: the layer is listed with the reason, and not converted.

Exporters fold BatchNorm into convolutions by default; the notes say into which, as far as that shows, and how to export
again. A Mul and an Add that TensorFlow's names mark as a BatchNorm (tf2onnx) are read as a layer with mean 0, variance 1
and epsilon 0: the same function; the statistics are lost, and such a layer cannot be written. Those names are also of
what computes its statistics (training=True, LayerNormalization, GroupNormalization): no layer, and a note says so.

External data is read from the model's own folder only, never through a link. A written model holds its changed tensors
inside itself; the data file is left alone and must lie beside the new model.

A live onnx.ModelProto is read and written too; folder= says where its external data lies.
https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
"""

from __future__ import annotations

import os

from bnport._lazy import TYPE_CHECKING
from bnport.errors import BnportError, InvalidValue, listed, printable
from bnport.layer import Layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from bnport.adapters.onnx.model import Model
    from bnport.containers.patch import Patch
    from bnport.layer import Change
    from bnport.record import Array

SUFFIXES = (".onnx",)
PACKAGES = ("onnx",)


def recognise(head: bytes, path: str) -> bool:
    """A ModelProto has no magic number: its top level must be fields of one, of the right kinds, with a graph."""
    if not head or head[0] not in (0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42):  # fields 1 to 8
        return False
    if head[0] == 0x08 and os.path.splitext(path)[1].lower() in SUFFIXES:
        return True  # also if damaged: then reading says what is wrong
    from bnport.adapters.onnx.model import looks_like_model
    from bnport.containers.files import ReadFile
    from bnport.containers.protobuf import Buffer

    try:
        return looks_like_model(Buffer(ReadFile(path)))
    except BnportError:
        return False


def read(source: Any, *, folder: str | None = None, stat: str | None = None) -> Layers:
    """The BatchNorm layers of a file or live ModelProto, in the order in which they run.

    folder: where the external data of a live ModelProto lies. stat: "stored" takes the running statistics of layers that
    were exported in training mode, which are refused otherwise. Raises FormatError for damage, for parameters that are
    not there in full, and for external data outside the model's folder.
    """
    from bnport.adapters.onnx import folded, layers, walk

    if stat not in (None, "stored"):
        raise InvalidValue(f"stat: of an ONNX model only 'stored' is known, got {printable(stat)!r}")
    opened = _open(source, folder)
    found = walk.Walk(opened)
    names = layers.names(found.found)
    made = []
    for name, each in zip(names, found.found, strict=True):
        inputs = tuple(names[k] for k in sorted(each.inputs)) if found.graph_known else None
        made.append(layers.layer_of(each, name, opened.source, inputs, stored=stat is not None))
    notes = folded.notes(found)
    if found.of_batch:
        notes.append(
            "Left out, as mean and variance are computed from the batch (BatchNormalization with training=True) or the"
            f" instance (LayerNormalization, GroupNormalization): {listed(found.of_batch)}."
        )
    if found.foreign:
        shown = found.foreign[0]
        notes.append(
            f"{len(found.foreign)} BatchNormalization nodes of the domain {printable(shown.domain)!r}, which is not"
            f" ONNX's own, were left out ({printable(shown.shown)}, ...)."
        )
    files = opened.graph.files(opened.folder) if opened.folder is not None else []
    return Layers(made, source=opened.source, format="onnx", notes=notes, files=files)


def _open(source: Any, folder: str | None = None) -> Model:
    from bnport.adapters.onnx import model

    return model.of_file(source) if isinstance(source, str) else model.of_live(source, folder)


def write(target: str, changes: Mapping[str, Change], out: str) -> None:
    """Make `out`, a copy of the model file `target` with the changes; all else, known or not, byte for byte the same.

    A tensor that other nodes use too is left alone and a new one made. Raises NotFound for an unknown layer,
    InvalidValue for a wrong width or a layer that cannot be written (reconstructed, or inside a function called twice).
    """
    from bnport.adapters.onnx.writing import write_file

    write_file(target, changes, out)


def patches(target: str, changes: Mapping[str, Change]) -> list[Patch]:
    """The changes as bytes at offsets of the model file, which keeps its length; InvalidValue where that cannot be."""
    from bnport.adapters.onnx.writing import file_patches

    return file_patches(target, changes)


def apply(model: Any, changes: Mapping[str, Change], *, folder: str | None = None) -> None:
    """Write the changes into a live ModelProto: all, or on any error none."""
    from bnport.adapters.onnx.writing import write_live

    write_live(model, changes, folder)


def run(source: Any, layer: str, x: Array, *, folder: str | None = None) -> dict[str, Array]:
    """x of shape (N, C) through onnxruntime, in a model that is this layer's node and tensors and nothing else.

    Below opset 7, which onnxruntime cannot run, onnx's version converter comes first.
    """
    from bnport.adapters.onnx.running import run_layer

    return run_layer(_open(source, folder), layer, x)


def tap(source: Any, x: Any, each: Callable[[str, Any, Any, str], None]) -> list[Any]:
    """Run a model on x by onnxruntime; each(layer, input, output, dtype) for every layer of its main graph."""
    from bnport.adapters.onnx.tapping import tap as tap_model

    return tap_model(_open(source), source, x, each)


def input_form(source: Any) -> tuple[bool, tuple[int | None, ...] | None]:
    """(channels come first by ONNX's convention, the shape that the model declares for its one input, if it does)."""
    from bnport.adapters.onnx.tapping import input_shape

    return True, input_shape(source)
