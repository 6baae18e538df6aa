"""What goes into and comes out of every BatchNorm layer of a model while onnxruntime runs the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.onnx import layers, walk
from bnport.adapters.onnx.running import libraries
from bnport.errors import InvalidValue, NotFound, first_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.adapters.onnx.model import Model
    from bnport.adapters.onnx.walk import Found
    from bnport.record import Array

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def tap(opened: Model, source: Any, x: Array, each: Callable[[str, Array, Array, str], None]) -> list[Array]:
    """Run the model on x with the layers' tensors as further outputs; each(layer, input, output, dtype); its own outputs.

    Inputs and outputs come channel-last, shape (..., C). Optimisations are off, so nothing is folded away. Layers inside
    functions and subgraphs have no outputs of their own and are not reported.
    """
    onnx, onnxruntime = libraries()
    found = walk.Walk(opened)
    named = layers.named(found.found)
    places = {name: _ends(each_) for name, each_ in named.items() if each_.scope is found.main}
    if not places:
        raise NotFound(f"{printable(opened.source)}: no BatchNorm layer in its main graph to trace")
    proto = onnx.load(source) if isinstance(source, str) else type(source).FromString(source.SerializeToString())
    declared = {value.name for value in proto.graph.output}
    originals = [value.name for value in proto.graph.output]
    inputs = {value.name for value in proto.graph.input}
    for name in dict.fromkeys(end for ends in places.values() for end in ends):
        if name not in declared and name not in inputs:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        initializers = {tensor.name for tensor in proto.graph.initializer}
        free = [value for value in session.get_inputs() if value.name not in initializers]
        if len(free) != 1:
            raise InvalidValue(f"{printable(opened.source)}: {len(free)} inputs; only a model with one can be traced")
        feed = x.astype(_DTYPES.get(free[0].type, x.dtype))
        names = [value.name for value in session.get_outputs()]
        values = dict(zip(names, session.run(names, {free[0].name: feed}), strict=True))
    except InvalidValue:
        raise
    except Exception as error:
        raise InvalidValue(f"{printable(opened.source)}: onnxruntime: {printable(first_line(error))}") from None
    values[free[0].name] = feed
    for name, (start, end) in places.items():
        each(name, _last(values[start]), _last(values[end]), values[end].dtype.name)
    return [values[name] for name in originals]


def _ends(found: Found) -> tuple[str, str]:
    """The names of a layer's input and output."""
    start = found.node.inputs[0] if found.affine is None else found.affine.x
    return start, found.node.outputs[0]


def _last(array: Array) -> Array:
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def input_shape(source: Any) -> tuple[int | None, ...] | None:
    """The shape the model declares for its one input; None where it declares none or several."""
    onnx, _ = libraries()
    proto = onnx.load(source, load_external_data=False) if isinstance(source, str) else source
    initializers = {tensor.name for tensor in proto.graph.initializer}
    free = [value for value in proto.graph.input if value.name not in initializers]
    if len(free) != 1 or not free[0].type.tensor_type.HasField("shape"):
        return None
    sides = free[0].type.tensor_type.shape.dim
    return tuple(side.dim_value if side.HasField("dim_value") else None for side in sides)
