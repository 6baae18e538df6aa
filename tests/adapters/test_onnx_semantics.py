"""Every opset, every way for a value to reach the node, graphs within graphs: the record against onnxruntime's output."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case import node as node_cases

from bnport.adapters import onnx as adapter
from bnport.errors import FormatError, InvalidValue
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters import onnx_files
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record
from tests.adapters.onnx_files import graph_model, norm, tensors

LATEST = onnx.defs.onnx_opset_version()
RECORDED = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
FLOAT = TensorProto.FLOAT


def old(opset):
    """What a model of that opset must have."""
    given = {"opset": opset, "ir_version": 3 if opset < 9 else 8}
    if opset < 7:
        given["is_test"] = 1
    if opset == 1:
        given["consumed_inputs"] = [0, 0, 0, 1, 1]
    return given


def assert_reads_what_onnxruntime_computes(made, record=None, *inputs):
    (layer,) = adapter.read(made).values()
    if record is not None:
        assert_same_bits(layer.record, record)
    x = layer.record.probes().astype(np.float32)
    assert_within_bound(onnx_files.run(made, x, *inputs), layer.record, x)
    return layer


# ---- opsets


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, LATEST])
def test_the_record_is_what_onnxruntime_computes_at_every_opset_that_it_runs(opset):
    record = telling_record()
    made = onnx_files.model([record], **old(opset))
    layer = assert_reads_what_onnxruntime_computes(made, record)
    assert layer.momentum == 0.75
    assert not layer.assumed
    assert not layer.notes


@pytest.mark.parametrize("opset", [1, 5, 6])
def test_the_record_is_what_the_version_converter_and_onnxruntime_make_of_older_opsets(opset):
    record = telling_record()
    made = onnx_files.model([record], **old(opset))
    (layer,) = adapter.read(made).values()
    assert_same_bits(layer.record, record)
    assert not layer.notes
    x = record.probes().astype(np.float32)
    if opset != 5:  # the converter starts at versions where an operator changed
        converted = onnx.version_converter.convert_version(made, 15)
        del converted.graph.input[1:]
        y = np.concatenate([onnx_files.run(converted, row[None]) for row in x])
        assert_within_bound(y, record, x)
    for y in adapter.run(made, layer.name, x).values():
        assert_within_bound(y, record, x)


@pytest.mark.parametrize("folder", sorted(p.name for p in RECORDED.glob("test_BatchNorm*_eval")))
def test_the_record_gives_the_outputs_that_onnx_ships_as_recorded(folder):
    """Made by PyTorch in 2017, opset 6; the arrays come with the onnx package."""
    (layer,) = adapter.read(str(RECORDED / folder / "model.onnx")).values()
    x, y = (
        numpy_helper.to_array(onnx.TensorProto.FromString((RECORDED / folder / "test_data_set_0" / name).read_bytes()))
        for name in ("input_0.pb", "output_0.pb")
    )
    x, y = (np.moveaxis(a, 1, -1) for a in (x, y))
    assert_within_bound(y, layer.record, x)
    assert layer.channels == x.shape[-1]


def test_there_are_recorded_outputs():
    assert len(list(RECORDED.glob("test_BatchNorm*_eval"))) >= 5


def standard_cases():
    """onnx's own test cases of the operator, with their expected outputs; importing the module collects them."""
    importlib.import_module("onnx.backend.test.case.node.batch_normalization")
    return [case for case in node_cases._NodeTestCases if "batchnorm" in case.name]


def test_the_record_gives_the_outputs_of_onnxs_own_test_cases():
    checked = 0
    for case in standard_cases():
        inputs, outputs = case.data_sets[0]
        made = onnx.ModelProto()
        made.CopyFrom(case.model)
        for value, array in list(zip(made.graph.input, inputs, strict=True))[1:]:
            made.graph.initializer.append(numpy_helper.from_array(array, value.name))
        training = "training" in case.name
        assert ("training mode" in next(iter(adapter.read(made).values())).without) is training
        (layer,) = adapter.read(made, stat="stored").values()
        for name, array in zip(FIELDS, inputs[1:], strict=True):
            assert getattr(layer.record, name).tobytes() == array.tobytes()
        assert any("training mode" in note for note in layer.notes) is training
        if not training:
            x, y = (np.moveaxis(a, 1, -1) for a in (inputs[0], outputs[0]))
            assert_within_bound(y, layer.record, x)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "training"),
    [
        (6, {"is_test": 0}, 5, True),
        (6, {"is_test": 1}, 5, False),
        (6, {"is_test": 0}, 1, False),
        (7, {}, 5, True),
        (9, {}, 1, False),
        (9, {}, 5, True),
        (14, {"training_mode": 1}, 3, True),
        (15, {"training_mode": 1}, 1, True),
        (15, {"training_mode": 0}, 1, False),
        (15, {}, 1, False),
    ],
)
def test_training_mode_is_said_by_the_rule_of_the_opset(opset, attributes, outputs, training):
    record = telling_record()
    given = {**old(opset), **attributes}
    made = onnx_files.model([record], **given)
    made.graph.node[0].output.extend(f"extra{k}" for k in range(outputs - 1))
    (layer,) = adapter.read(made).values()
    assert ("training mode" in layer.without) is training
    (layer,) = adapter.read(made, stat="stored").values()
    assert any("training mode" in note for note in layer.notes) is training
    assert_same_bits(layer.record, record)


def test_epsilon_from_the_onnx_attribute_is_not_marked_assumed():
    for epsilon, read in ((1e-5, 1e-5), (1e-3, 1e-3), (2e-5, 2e-5), (None, 1e-5)):  # the operator's default is no guess
        record = telling_record()
        made = onnx_files.model([record], epsilon=epsilon)
        (layer,) = adapter.read(made).values()
        assert layer.epsilon == read
        assert "epsilon" not in layer.assumed
        x = layer.record.probes().astype(np.float32)
        assert_within_bound(onnx_files.run(made, x), layer.record, x)


def test_an_absent_momentum_is_the_operators_default_and_1_and_0_are_not_carried_over():
    (layer,) = adapter.read(onnx_files.model([telling_record()], momentum=None)).values()
    assert layer.momentum == 0.9
    for momentum in (1.0, 0.0):
        (layer,) = adapter.read(onnx_files.model([telling_record()], momentum=momentum)).values()
        assert layer.momentum is None
        assert f"momentum {momentum}" in layer.notes[0]


def test_spatial_0_is_taken_where_it_has_one_value_per_channel_and_refused_where_it_has_more():
    record = telling_record(6)
    made = onnx_files.model([record], **old(8), spatial=0)
    (layer,) = adapter.read(made).values()
    assert_same_bits(layer.record, record)
    assert "spatial=0" in layer.notes[0]
    for tensor in made.graph.initializer:
        tensor.dims[:] = [3, 2]
    with pytest.raises(FormatError, match="spatial=0"):
        adapter.read(made)


# ---- how a value reaches the node


def constant(name, output, array):
    return helper.make_node("Constant", [], [output], name=name, value=onnx_files.raw(array, ""))


def ways():
    """way -> (nodes, initializers, the record): gamma or more reach the node through something."""
    record = telling_record()
    plain = tensors(record)
    ones = record.replace(gamma=np.ones(7, np.float32), beta=np.zeros(7, np.float32))
    made = {}
    made["Constant"] = ([constant("c", "gamma", record.gamma)], plain[1:], record)
    made["Constant of value_floats"] = (
        [helper.make_node("Constant", [], ["beta"], value_floats=record.beta.tolist())],
        [plain[0], *plain[2:]],
        record,
    )
    made["a chain of Identity"] = (
        [helper.make_node("Identity", ["g"], ["g2"]), helper.make_node("Identity", ["g2"], ["gamma"])],
        [onnx_files.raw(record.gamma, "g"), *plain[1:]],
        record,
    )
    half = record.rounded("float16")
    made["Cast from float16"] = (
        [helper.make_node("Cast", ["v"], ["variance"], to=FLOAT)],
        [*plain[:3], onnx_files.raw(half.variance.astype(np.float16), "v")],
        record.replace(variance=half.variance),
    )
    made["Cast to float16 and back"] = (
        [
            helper.make_node("Cast", ["v"], ["w"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["w"], ["variance"], to=FLOAT),
        ],
        [*plain[:3], onnx_files.raw(record.variance, "v")],
        record.replace(variance=half.variance),
    )
    made["ConstantOfShape"] = (
        [
            constant("s", "shape", np.array([7], np.int64)),
            helper.make_node("ConstantOfShape", ["shape"], ["beta"]),
            helper.make_node("ConstantOfShape", ["shape"], ["gamma"], value=onnx_files.raw(np.ones(1, np.float32), "")),
        ],
        plain[2:],
        ones,
    )
    made["Expand to a constant shape"] = (
        [
            constant("s", "shape", np.array([7], np.int64)),
            constant("o", "one", np.ones(1, np.float32)),
            constant("z", "zero", np.array(0, np.float32)),
            helper.make_node("Expand", ["one", "shape"], ["gamma"]),
            helper.make_node("Expand", ["zero", "shape"], ["beta"]),
        ],
        plain[2:],
        ones,
    )
    made["Expand to the channels of x, as PyTorch writes affine=False"] = (
        [
            helper.make_node("Constant", [], ["o"], value_floats=[1.0]),
            helper.make_node("CastLike", ["o", "x"], ["one"]),
            helper.make_node("Shape", ["x"], ["shape"], start=1, end=2),
            helper.make_node("Expand", ["one", "shape"], ["gamma"]),
        ],
        plain[1:],
        record.replace(gamma=np.ones(7, np.float32)),
    )
    made["Reshape, Unsqueeze and Squeeze"] = (
        [
            constant("s", "shape", np.array([-1], np.int64)),
            constant("a", "axis", np.array([0], np.int64)),
            helper.make_node("Reshape", ["g", "shape"], ["gamma"]),
            helper.make_node("Unsqueeze", ["b", "axis"], ["b2"]),
            helper.make_node("Squeeze", ["b2", "axis"], ["beta"]),
        ],
        [onnx_files.raw(record.gamma[:, None], "g"), onnx_files.raw(record.beta, "b"), *plain[2:]],
        record,
    )
    made["one tensor in two roles"] = (
        [],
        plain[1:],
        record.replace(gamma=record.variance),
    )
    return made


WAYS = ways()


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_is_found_through(way):
    nodes, initializers, record = WAYS[way]
    names = FIELDS if way != "one tensor in two roles" else ("variance", "beta", "mean", "variance")
    made = graph_model([*nodes, norm(names)], initializers)
    assert_reads_what_onnxruntime_computes(made, record)


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_written_whose_parameters_come_through(way, tmp_path):
    nodes, initializers, record = WAYS[way]
    names = FIELDS if way != "one tensor in two roles" else ("variance", "beta", "mean", "variance")
    made = graph_model([*nodes, norm(names)], initializers)
    path, out = str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")
    onnx.save(made, path)
    (layer,) = adapter.read(path).values()
    new = telling_record(seed=4).replace(epsilon=7.5e-3)
    adapter.write(path, {layer.name: Change(new, frozenset({*FIELDS, "epsilon"}))}, out)
    onnx.checker.check_model(out, full_check=True)
    assert_reads_what_onnxruntime_computes(onnx.load(out), new)
    adapter.write(path, {layer.name: Change(new, frozenset({"beta", "mean"}))}, out)
    (again,) = adapter.read(out).values()
    assert_same_bits(again.record, record.replace(beta=new.beta, mean=new.mean))


def halved(like, before=(), initializers=(), record=None):
    """A float16 model whose float32 parameters are cast to the type of the value `like`."""
    record = telling_record() if record is None else record
    casts = [helper.make_node("CastLike", [field, like], [f"{field}16"]) for field in FIELDS]
    nodes = [*before, *casts, norm([f"{field}16" for field in FIELDS], epsilon=record.epsilon)]
    made = graph_model(nodes, [*tensors(record), *initializers])
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return made


def stated():
    """way -> a model that states the type which CastLike casts to."""
    same = helper.make_node("Identity", ["x"], ["h"])
    made = {
        "a graph input": halved("x"),
        "an initializer": halved("one", (), [onnx_files.raw(np.ones(1, "f2"), "one")]),
    }
    declared = made["another value"] = halved("h", [same])
    declared.graph.value_info.append(onnx_files.info("h", TensorProto.FLOAT16, "N", 7))
    body = halved("x").graph.node
    function = helper.make_function("own", "Norm", ["x", *FIELDS], ["y"], body, [helper.make_opsetid("", 15)])
    called = made["an argument of a function"] = halved("x")
    del called.graph.node[:]
    called.graph.node.extend([same, helper.make_node("Norm", ["h", *FIELDS], ["y"], domain="own")])
    called.graph.value_info.extend(declared.graph.value_info)
    called.functions.append(function)
    called.opset_import.append(helper.make_opsetid("own", 1))
    return made


STATED = stated()


@pytest.mark.parametrize("way", STATED)
def test_castlike_rounds_to_the_type_of(way, tmp_path):
    """As onnxruntime does where a model gives the cast values out, and as onnx's reference does in the whole network."""
    made, record = STATED[way], telling_record()
    onnx.checker.check_model(made, full_check=True)
    x = record.probes().astype(np.float16)
    casts = halved("x")
    del casts.graph.node[-1], casts.graph.output[:]
    casts.graph.output.extend(onnx_files.info(f"{field}16", TensorProto.FLOAT16, 7) for field in FIELDS)
    values = dict(zip(FIELDS, onnx_files.session(casts).run(None, {"x": x}), strict=True))
    onnx.save(made, tmp_path / "m.onnx")
    for source in (made, str(tmp_path / "m.onnx")):
        (layer,) = adapter.read(source).values()
        assert layer.dtype == "float16"
        for field, value in values.items():
            assert getattr(layer.record, field).tobytes() == value.astype(np.float32).tobytes()
    plain = halved("x")
    del plain.graph.node[:-1], plain.graph.initializer[:]
    plain.graph.initializer.extend(onnx_files.raw(value, f"{field}16") for field, value in values.items())
    y, expected = (onnx.reference.ReferenceEvaluator(each).run(None, {"x": x})[0] for each in (made, plain))
    assert y.tobytes() == expected.tobytes()


def test_castlike_to_a_type_that_the_file_does_not_state_is_refused_but_for_values_that_every_type_holds():
    same = helper.make_node("Identity", ["x"], ["h"])
    made = halved("h", [same])
    (layer,) = adapter.read(made).values()
    with pytest.raises(
        InvalidValue, match=r"is cast to the type of 'h' .*not state \(onnx.shape_inference.infer_shapes"
    ):
        layer.record  # noqa: B018
    (layer,) = adapter.read(onnx.shape_inference.infer_shapes(made)).values()
    assert layer.record.mean.tobytes() == telling_record().mean.astype(np.float16).astype(np.float32).tobytes()
    plain = telling_record().replace(gamma=np.ones(7), beta=np.zeros(7), mean=np.full(7, 0.5), variance=np.full(7, 2))
    (layer,) = adapter.read(halved("h", [same], record=plain)).values()
    assert_same_bits(layer.record, plain)


def test_only_the_position_of_an_input_says_what_it_is():
    """Names of the wrong roles, as exporters that share equal tensors write them."""
    record = telling_record()
    names = ["0.running_var", "0.running_mean", "0.bias", "0.weight"]
    made = graph_model([norm(names)], tensors(record, names))
    layer = assert_reads_what_onnxruntime_computes(made, record)
    assert layer.name == "bn"


def test_the_default_of_a_graph_input_is_its_initializer():
    record = telling_record()
    made = onnx_files.model([record], opset=9, ir_version=3)
    assert {i.name for i in made.graph.input} > {t.name for t in made.graph.initializer}
    assert_same_bits(next(iter(adapter.read(made).values())).record, record)


def test_a_parameter_that_is_fed_at_run_time_is_refused_with_the_reason_and_the_layer_still_listed():
    record = telling_record()
    fed = [helper.make_tensor_value_info("mean", FLOAT, [7])]
    made = graph_model([norm()], [t for t in tensors(record) if t.name != "mean"], inputs=fed)
    (layer,) = adapter.read(made).values()
    assert layer.channels == 7
    assert "mean is fed at run time (graph input 'mean')" in layer.without
    with pytest.raises(InvalidValue, match=r"bn: .*fed at run time"):
        layer.record  # noqa: B018
    for refused in (lambda: adapter.run(made, "bn", np.zeros((1, 7), np.float32)),
                    lambda: adapter.apply(made, {"bn": Change(record, frozenset({"gamma"}))})):  # fmt: skip
        with pytest.raises(InvalidValue):
            refused()


def test_statistics_of_the_batch_are_refused_with_their_reason():
    record = telling_record()
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0),
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("Mul", ["c", "c"], ["c2"]),
        helper.make_node("ReduceMean", ["c2"], ["variance"], axes=[0], keepdims=0),
        norm(),
    ]
    (layer,) = adapter.read(graph_model(nodes, tensors(record)[:2])).values()
    with pytest.raises(
        InvalidValue, match=r"mean and variance are computed from each batch \(track_running_stats=False"
    ):
        layer.record  # noqa: B018


def test_a_value_that_a_node_computes_is_refused_by_the_name_of_the_node():
    record = telling_record()
    made = graph_model([helper.make_node("Sqrt", ["v"], ["variance"], name="root"), norm()],
                       [*tensors(record)[:3], onnx_files.raw(record.variance**2, "v")])  # fmt: skip
    (layer,) = adapter.read(made).values()
    with pytest.raises(InvalidValue, match=r"computed at run time by Sqrt \(node 'root'\)"):
        layer.record  # noqa: B018


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT16])
@pytest.mark.parametrize("form", ["raw", "int32_data"])
def test_16_bit_numbers_are_what_onnx_says_they_are(kind, form):
    record = telling_record(6, dtype="bfloat16" if kind == TensorProto.BFLOAT16 else "float16")
    made = onnx_files.model([record])
    for tensor in made.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, [6], values.tobytes() if form == "raw" else values.tolist(),
                                           raw=form == "raw"))  # fmt: skip
    (layer,) = adapter.read(made).values()
    assert layer.dtype == ("bfloat16" if kind == TensorProto.BFLOAT16 else "float16")
    for field, tensor in zip(FIELDS, made.graph.initializer, strict=True):
        np.testing.assert_array_equal(getattr(layer.record, field), numpy_helper.to_array(tensor).astype(np.float32))
    new = telling_record(6, seed=2, dtype=layer.dtype)
    adapter.apply(made, {layer.name: Change(new, frozenset(FIELDS))})
    for field, tensor in zip(FIELDS, made.graph.initializer, strict=True):
        np.testing.assert_array_equal(getattr(new, field), numpy_helper.to_array(tensor).astype(np.float32))
