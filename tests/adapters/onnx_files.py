"""ONNX models for tests, made by onnx's own helpers and run by onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bnport.record import FIELDS

KINDS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16,
         "bfloat16": TensorProto.BFLOAT16}  # fmt: skip


def raw(array, name):
    """A TensorProto with raw_data."""
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def typed(array, name):
    """A TensorProto with its numbers in float_data, double_data or int32_data."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())


def parameters(record, prefix, dtype="float32"):
    return {f: getattr(record, f).astype(dtype) for f in FIELDS}, [f"{prefix}.{f}" for f in FIELDS]


def model(records, *, opset=15, dtype="float32", tensor=raw, ir_version=8, names=None, **attributes):
    """Dense layers between BatchNormalization nodes; initializers called bn0.gamma, dense1.weight, ..."""
    random = np.random.default_rng(3)
    nodes, initializers, value = [], [], "x"
    for k, record in enumerate(records):
        if k:
            weight = random.normal(size=(records[k - 1].channels, record.channels)).astype(dtype)
            initializers.append(tensor(weight, f"dense{k}.weight"))
            nodes.append(helper.make_node("MatMul", [value, f"dense{k}.weight"], [f"dense{k}"], name=f"dense{k}"))
            value = f"dense{k}"
        arrays, inputs = parameters(record, f"bn{k}", dtype)
        initializers += [tensor(a, n) for a, n in zip(arrays.values(), inputs, strict=True)]
        given = {"epsilon": record.epsilon, "momentum": 0.75, **attributes}
        given = {key: v for key, v in given.items() if v is not None}
        name = names[k] if names else f"bn{k}"
        nodes.append(helper.make_node("BatchNormalization", [value, *inputs], [f"y{k}"], name=name, **given))
        value = f"y{k}"
    kind = KINDS[dtype]
    rows = "N" if opset >= 7 else 1
    inputs = [helper.make_tensor_value_info("x", kind, [rows, records[0].channels])]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in initializers]
    outputs = [helper.make_tensor_value_info(value, kind, [rows, records[-1].channels])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="tests")
    made.ir_version = ir_version
    return made


def session(source):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = source if isinstance(source, str) else source.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(source, *inputs):
    """The first output of a model file or ModelProto, by onnxruntime with its optimiser off."""
    made = session(source)  # (its inputs are those that no initializer feeds)
    return made.run(None, {i.name: x for i, x in zip(made.get_inputs(), inputs, strict=True)})[0]


def others(path):
    """Everything but BN tensors and the attributes of BN nodes, as onnx reads it."""
    loaded = onnx.load(path)
    found = {}
    for tensor in loaded.graph.initializer:
        if not tensor.name.startswith("bn"):
            found[tensor.name] = numpy_helper.to_array(tensor).tobytes()
    for node in loaded.graph.node:
        if node.op_type != "BatchNormalization":
            found[f"node {node.name}"] = node.SerializeToString()
    found["graph"] = b"".join(v.SerializeToString() for v in (*loaded.graph.input, *loaded.graph.output))
    found["model"] = loaded.producer_name.encode() + b"".join(o.SerializeToString() for o in loaded.opset_import)
    return found


FLOAT = TensorProto.FLOAT


def info(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def graph_model(nodes, initializers=(), *, channels=7, inputs=(), opset=15, functions=(), domains=()):
    """A model around nodes that make 'y' out of 'x' (N, channels)."""
    ends = [helper.make_tensor_value_info(n, FLOAT, ["N", channels]) for n in ("x", "y")]
    graph = helper.make_graph(list(nodes), "graph", [ends[0], *inputs], [ends[1]], list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)


def tensors(record, names=FIELDS):
    return [raw(getattr(record, f), n) for f, n in zip(FIELDS, names, strict=True)]


def norm(names=FIELDS, *, x="x", y="y", name="bn", **attributes):
    attributes.setdefault("epsilon", 2.5e-3)
    return helper.make_node("BatchNormalization", [x, *names], [y], name=name, **attributes)
