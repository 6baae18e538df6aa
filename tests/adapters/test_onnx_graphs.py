"""Layers in branches, loops and functions; which layers reach which; names; the kernels that feed them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper

from bnport.adapters import onnx as adapter
from bnport.errors import InvalidValue
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters import onnx_files
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record
from tests.adapters.onnx_files import FLOAT, graph_model, info, norm, tensors


def test_a_layer_in_a_branch_is_read_written_and_named_after_it(tmp_path):
    record, other = telling_record(), telling_record(seed=1)
    branches = []
    for k, each in enumerate((record, other)):
        node = norm(("g", "beta", "mean", "variance"), y=f"y{k}", epsilon=each.epsilon)
        end = helper.make_tensor_value_info(f"y{k}", FLOAT, ["N", 7])
        inner = helper.make_graph([node], "branch", [], [end], tensors(each, ("unused", *FIELDS[1:])))
        branches.append(inner)
    cond = onnx_files.raw(np.array(True), "cond")
    node = helper.make_node("If", ["cond"], ["y"], name="choose", then_branch=branches[0], else_branch=branches[1])
    made = graph_model([node], [cond, onnx_files.raw(record.gamma, "g")])  # gamma from the graph around
    layers = adapter.read(made)
    assert set(layers) == {"choose/then_branch/bn", "choose/else_branch/bn"}
    assert_same_bits(layers["choose/then_branch/bn"].record, record)
    assert_same_bits(layers["choose/else_branch/bn"].record, other.replace(gamma=record.gamma))
    x = record.probes().astype(np.float32)
    assert_within_bound(onnx_files.run(made, x), record, x)
    path, out = str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")
    onnx.save(made, path)
    new = telling_record(seed=8)
    adapter.write(path, {"choose/then_branch/bn": Change(new, frozenset({*FIELDS, "epsilon"}))}, out)
    assert_within_bound(onnx_files.run(out, x), new, x)
    assert_same_bits(adapter.read(out)["choose/else_branch/bn"].record, other.replace(gamma=record.gamma))


def test_a_node_that_takes_one_value_twice_does_not_double_the_work():
    record, count = telling_record(), 60
    one = onnx_files.raw(np.array([1], np.int64), "e0")
    nodes = [helper.make_node("Expand", [f"e{k}", f"e{k}"], [f"e{k + 1}"]) for k in range(count)]
    nodes.append(helper.make_node("Expand", ["gamma", f"e{count}"], ["expanded"]))
    made = graph_model([*nodes, norm(("expanded", *FIELDS[1:]), epsilon=record.epsilon)], [one, *tensors(record)])
    assert_same_bits(adapter.read(made)["bn"].record, record)  # once 2 ** 60 steps
    x = record.probes().astype(np.float32)
    assert_within_bound(onnx_files.run(made, x), record, x)


def test_a_name_that_nested_graphs_define_is_no_parameter_and_no_tensor_to_change(tmp_path):
    """onnx's reference takes the outer one here, and what onnxruntime takes depends on the rest of the model."""
    record, other, new = telling_record(), telling_record(seed=1), telling_record(seed=8)
    branches = []
    for k, own in enumerate(([], [onnx_files.raw(other.gamma, "gamma")])):
        node = norm(y=f"y{k}", epsilon=record.epsilon)
        branches.append(helper.make_graph([node], "branch", [], [info(f"y{k}", FLOAT, "N", 7)], own))
    node = helper.make_node("If", ["cond"], ["y"], name="choose", then_branch=branches[0], else_branch=branches[1])
    made = graph_model([node], tensors(record), inputs=[info("cond", TensorProto.BOOL)])
    onnx.checker.check_model(made, full_check=True)  # does not see it
    path, out = str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")
    onnx.save(made, path)
    layers = adapter.read(path)
    assert_same_bits(layers["choose/then_branch/bn"].record, record)
    with pytest.raises(InvalidValue, match="gamma is 'gamma', a name that a graph and one within it define"):
        layers["choose/else_branch/bn"].record  # noqa: B018
    for branch in ("then", "else"):
        with pytest.raises(InvalidValue, match="gamma is 'gamma', a name that a graph and one within it define"):
            adapter.write(path, {f"choose/{branch}_branch/bn": Change(new, frozenset({"gamma"}))}, out)
    adapter.write(path, {"choose/then_branch/bn": Change(new, frozenset(FIELDS[1:]))}, out)
    x = record.probes().astype(np.float32)
    for run in (onnx_files.session, onnx.reference.ReferenceEvaluator):
        (then, before), (changed, after) = (
            [run(file).run(None, {"x": x, "cond": np.array(cond)})[0] for cond in (True, False)] for file in (path, out)
        )
        assert_within_bound(then, record, x)
        assert_within_bound(changed, new.replace(gamma=record.gamma, epsilon=record.epsilon), x)
        assert after.tobytes() == before.tobytes()


def test_a_layer_in_a_loop_is_read_and_an_input_of_the_loop_is_not_a_constant():
    record = telling_record()
    for shared, names in ((True, FIELDS), (False, ("carried", *FIELDS[1:]))):
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["go_on"]), norm(names, x="value", y="next")],
            "body",
            [
                info("k", TensorProto.INT64),
                info("go", TensorProto.BOOL),
                info("value", FLOAT, "N", 7),
                info("carried", FLOAT, 7),
            ],
            [info("go_on", TensorProto.BOOL), info("next", FLOAT, "N", 7), info("carried", FLOAT, 7)],
        )
        loop = helper.make_node("Loop", ["times", "", "x", "gamma"], ["y", "unused"], name="loop", body=body)
        made = graph_model([loop], [*tensors(record), onnx_files.raw(np.array(1, np.int64), "times")])
        (layer,) = adapter.read(made).values()
        assert layer.name == "loop/body/bn"
        if shared:
            assert_same_bits(layer.record, record)
            x = record.probes().astype(np.float32)
            assert_within_bound(onnx_files.run(made, x), record, x)
        else:
            with pytest.raises(InvalidValue, match="input of a subgraph 'carried'"):
                layer.record  # noqa: B018


def test_a_function_is_one_layer_for_each_call_with_the_arguments_of_that_call():
    record, other = telling_record(), telling_record(seed=1, epsilon=1e-4)
    node = helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["r"], name="bn")
    node.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    function = helper.make_function("own", "Norm", ["a", "g", "b", "m", "v"], ["r"], [node],
                                    [helper.make_opsetid("", 15)], ["eps"])  # fmt: skip
    second = [f"2{f}" for f in FIELDS]
    calls = [
        helper.make_node("Norm", ["x", *FIELDS], ["h"], domain="own", name="first", eps=record.epsilon),
        helper.make_node("Norm", ["h", *second], ["y"], domain="own", name="second", eps=other.epsilon),
    ]
    made = graph_model(calls, [*tensors(record), *tensors(other, second)], functions=[function], domains=["own"])
    onnx.checker.check_model(made)
    layers = adapter.read(made)
    assert list(layers) == ["first/bn", "second/bn"]
    assert_same_bits(layers["first/bn"].record, record)
    assert_same_bits(layers["second/bn"].record, other)
    assert layers["second/bn"].inputs == ("first/bn",)
    x = record.probes().astype(np.float32)
    inner = record(x)
    tolerance = other.error_bound(inner) + np.abs(other.affine()[0]) * record.error_bound(x)
    assert (np.abs(onnx_files.run(made, x) - other(inner)) <= 2 * tolerance).all()
    new = telling_record(seed=9, epsilon=other.epsilon)
    adapter.apply(made, {"second/bn": Change(new, frozenset(FIELDS))})
    assert_same_bits(adapter.read(made)["second/bn"].record, new)
    assert_same_bits(adapter.read(made)["first/bn"].record, record)
    with pytest.raises(InvalidValue, match="function"):
        adapter.apply(made, {"second/bn": Change(new.replace(epsilon=0.5), frozenset({"epsilon"}))})


def test_the_layers_that_reach_a_layer_are_those_with_none_between():
    """x -> a -> (b, c) -> Add -> d, and a shortcut from a into d's sum."""
    record = telling_record()
    nodes = [
        norm(name="a", y="a"), norm(name="b", x="a", y="b"), norm(name="c", x="a", y="c"),
        helper.make_node("Relu", ["c"], ["r"]), helper.make_node("Add", ["b", "r"], ["s"]),
        helper.make_node("Add", ["s", "a"], ["t"]), norm(name="d", x="t"),
    ]  # fmt: skip
    layers = adapter.read(graph_model(nodes, tensors(record)))
    assert {k: v.inputs for k, v in layers.items()} == {"a": (), "b": ("a",), "c": ("a",), "d": ("a", "b", "c")}


def test_layers_without_names_or_with_one_name_are_told_apart():
    record = telling_record()
    nodes = [norm(name="", y="h1"), norm(name="same", x="h1", y="h2"), norm(name="same", x="h2")]
    assert list(adapter.read(graph_model(nodes, tensors(record)))) == ["h1", "h2", "y"]


def test_other_normalizations_are_not_taken_for_batchnorm():
    scale = [onnx_files.raw(np.ones(7, np.float32), n) for n in ("gamma", "beta")]
    for op in ("InstanceNormalization", "LayerNormalization"):
        node = helper.make_node(op, ["x", "gamma", "beta"], ["y"])
        assert len(adapter.read(graph_model([node], scale, opset=17))) == 0


def test_kernels_come_in_one_layout_whatever_the_operator():
    """A convolution of each kind applied by onnxruntime, against one built from the neutral layout by einsum."""
    random = np.random.default_rng(0)
    record = telling_record(6)
    cases = {
        "grouped": ("Conv", (6, 2, 1), {"group": 2}, (6, 2, 1)),
        "transposed": ("ConvTranspose", (4, 3, 1), {"group": 2}, (6, 2, 1)),
        "dense": ("Gemm", (6, 4), {"transB": 1}, (6, 4)),
    }
    for kind, (op, shape, attributes, neutral) in cases.items():
        weight = random.normal(size=shape).astype(np.float32)
        node = helper.make_node(op, ["x", "w"], ["c"], **attributes)
        rank3 = op != "Gemm"
        nodes = [node, norm(x="c")]
        ends = [helper.make_tensor_value_info("x", FLOAT, [1, 4, 1] if rank3 else [1, 4]),
                helper.make_tensor_value_info("y", FLOAT, [1, 6, 1] if rank3 else [1, 6])]  # fmt: skip
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [*tensors(record), onnx_files.raw(weight, "w")])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        kernel = adapter.read(made)["bn"].kernel
        assert (kernel.kind, kernel.shape, kernel.name) == (kind, neutral, "w")
        values = kernel.values().reshape(6, -1)
        x = random.normal(size=4).astype(np.float32)
        groups = attributes.get("group", 1)
        y = np.concatenate([v @ p for v, p in zip(np.split(values, groups), np.split(x, groups), strict=True)])
        got = onnx_files.run(made, x.reshape([1, 4, 1] if rank3 else [1, 4])).ravel()
        a, b = record.affine()
        np.testing.assert_allclose(got, a * y + b, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_something_else_uses_too_is_not_changed_for_it():
    """Another node, a function without BatchNorm, and the output of the graph see the old gamma."""
    record, new = telling_record(), telling_record(seed=3)
    function = helper.make_function(
        "own", "Plus", ["a", "g"], ["r"], [helper.make_node("Add", ["a", "g"], ["r"])], [helper.make_opsetid("", 15)]
    )
    users = {
        "node": [norm(y="h"), helper.make_node("Add", ["h", "gamma"], ["y"])],
        "function": [norm(y="h"), helper.make_node("Plus", ["h", "gamma"], ["y"], domain="own")],
    }
    x = record.probes().astype(np.float32)
    for nodes in users.values():
        made = graph_model(nodes, tensors(record), functions=[function], domains=["own"])
        adapter.apply(made, {"bn": Change(new, frozenset({"gamma"}))})
        expected = record.replace(gamma=new.gamma)
        assert_same_bits(adapter.read(made)["bn"].record, expected)
        got, y = onnx_files.run(made, x), expected(x) + record.gamma
        assert (np.abs(got - y) <= expected.error_bound(x) + 2.0**-23 * np.abs(y)).all()
    made = graph_model([norm()], tensors(record))
    made.graph.output.append(info("gamma", FLOAT, 7))
    adapter.apply(made, {"bn": Change(new, frozenset({"gamma"}))})
    y, gamma = onnx_files.session(made).run(None, {"x": x})
    assert gamma.tobytes() == record.gamma.tobytes()
    assert_within_bound(y, record.replace(gamma=new.gamma), x)
