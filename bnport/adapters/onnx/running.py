"""One layer through onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.onnx import layers, walk
from bnport.adapters.onnx.scope import Known
from bnport.adapters.onnx.tensors import DTYPES
from bnport.errors import InvalidValue, MissingDependency, NotFound, first_line, listed, printable
from bnport.rounding import stored

if TYPE_CHECKING:
    from bnport.adapters.onnx.model import Model
    from bnport.adapters.onnx.walk import Found
    from bnport.record import Array

FIRST_RUN = 7  # onnxruntime has no kernel for older opsets
CONVERTED_TO = 15
LATEST_CHANGE = 15  # of BatchNormalization; newer opsets are run as this one
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def run_layer(opened: Model, layer: str, x: Array) -> dict[str, Array]:
    """x (N, C) through a model of this one node; the outputs by engine, in x's shape.

    Raises NotFound, InvalidValue for a layer without stored numbers or a type that onnxruntime's CPU engine lacks, and
    MissingDependency.
    """
    onnx, onnxruntime = libraries()
    named = layers.named(walk.Walk(opened).found)
    if layer not in named:
        raise NotFound(f"{printable(opened.source)}: no layer {printable(layer)!r}; {listed(named)}")
    make = _affine_model if named[layer].affine else _model
    made = make(onnx, named[layer], opened, len(x))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": np.asarray(x).astype(_input_dtype(session))})
    except Exception as error:
        raise InvalidValue(
            f"{printable(opened.source)}: {printable(layer)}: onnxruntime: {printable(first_line(error))}"
        ) from None
    return {f"onnxruntime {onnxruntime.__version__}": y}


def libraries() -> tuple[Any, Any]:
    """onnx and onnxruntime, or MissingDependency."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            f"onnx and onnxruntime are needed to run a model: pip install 'bnport[onnx]' ({error})"
        ) from None
    return onnx, onnxruntime


def _input_dtype(session: Any) -> Any:
    kind = session.get_inputs()[0].type
    names = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    if kind not in names:
        raise InvalidValue(f"its CPU engine takes no {kind}")
    return names[kind]


def _model(onnx: Any, found: Found, opened: Model, rows: int) -> Any:
    held = layers.parameters(found, opened.source)
    if held.unknown:
        raise InvalidValue(f"{layers.place_of(found, opened.source)}: has no stored statistics to run it with")
    opset = found.scope.opset
    helper = onnx.helper
    tensors = []
    for field, value in held.values.items():
        assert isinstance(value, Known)
        array = value.array()
        array = np.repeat(array, held.channels) if value.shape is None else array
        tensors.append(
            helper.make_tensor(field, _KINDS[value.dtype], [held.channels], stored(array, value.dtype), raw=True)
        )
    attributes: dict[str, Any] = {}
    for name in ("epsilon", "momentum"):
        attribute = found.scope.attribute(found.node, name)
        if attribute is not None and attribute.f is not None:
            attributes[name] = attribute.f
    if opset < FIRST_RUN:
        attributes["is_test"] = 1
        if opset == 1:
            attributes["consumed_inputs"] = [0, 0, 0, 1, 1]
    node = helper.make_node("BatchNormalization", ["x", *layers.POSITIONS], ["y"], **attributes)
    kind = _KINDS[held.values["gamma"].dtype if opset < 15 else held.dtype]  # type: ignore[union-attr]
    ends = [helper.make_tensor_value_info(name, kind, [rows, held.channels]) for name in ("x", "y")]
    inputs = [ends[0]]
    if opset < 9:  # of an IR version in which initializers are inputs too
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, [held.channels]) for t in tensors]
    graph = helper.make_graph([node], "layer", inputs, [ends[1]], tensors)
    version = min(opset, LATEST_CHANGE)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    made.ir_version = 3 if opset < 9 else 8
    if opset < FIRST_RUN:
        made = onnx.version_converter.convert_version(made, CONVERTED_TO)
    return made


def _affine_model(onnx: Any, found: Found, opened: Model, rows: int) -> Any:
    helper, tensors = onnx.helper, []
    values = layers.affine_of(found, opened.source)
    kind = _KINDS[values[0].dtype]
    channels = max(value.size or 1 for value in values)
    for name, value in zip(("slope", "intercept"), values, strict=True):
        array = value.array().reshape(-1)
        tensors.append(helper.make_tensor(name, kind, [array.size], stored(array, values[0].dtype), raw=True))
    nodes = [helper.make_node("Mul", ["x", "slope"], ["m"]), helper.make_node("Add", ["m", "intercept"], ["y"])]
    ends = [helper.make_tensor_value_info(name, kind, [rows, channels]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layer", [ends[0]], [ends[1]], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", LATEST_CHANGE)])
    made.ir_version = 8
    return made
