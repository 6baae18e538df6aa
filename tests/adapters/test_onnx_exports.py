"""Real exports: what PyTorch's two exporters, Keras and onnxruntime's optimiser make of BatchNorm, and what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bnport.adapters import onnx as adapter
from bnport.errors import InvalidValue
from bnport.record import FIELDS
from tests.adapters import onnx_files
from tests.adapters.contract import assert_within_bound

FIXTURES = Path(__file__).parents[2] / "fixtures" / "onnx"
EXPECTED = np.load(FIXTURES / "expected.npz")
KEPT = ("torch-kept.onnx", "torchscript-kept.onnx")
EXPORT_CALL = "dynamo=True, optimize=False"


def theirs(framework, layer):
    """gamma, beta, mean, variance as that framework's own layer holds them."""
    found = {f: EXPECTED[f"{framework}|{layer}|{f}"] for f in FIELDS if f"{framework}|{layer}|{f}" in EXPECTED}
    found.setdefault("gamma", np.ones_like(found["mean"]))
    found.setdefault("beta", np.zeros_like(found["mean"]))
    return found, float(EXPECTED[f"{framework}|{layer}|epsilon"])


@pytest.mark.parametrize("name", KEPT)
def test_every_layer_is_read_bit_for_bit_under_its_name_in_pytorch(name):
    layers = adapter.read(str(FIXTURES / name))
    assert list(layers) == ["bn1", "bn2", "bn3", "bn4"]
    assert layers.notes == ()
    for layer in layers.values():
        arrays, epsilon = theirs("torch", layer.name)
        assert layer.record.epsilon == epsilon
        assert "epsilon" not in layer.assumed
        for field, array in arrays.items():
            assert getattr(layer.record, field).tobytes() == array.tobytes(), (layer.name, field)


@pytest.mark.parametrize("name", KEPT)
def test_kernels_and_the_graph_of_layers_are_those_of_the_network(name):
    layers = adapter.read(str(FIXTURES / name))
    assert [layer.kernel.kind for layer in layers.values()] == ["conv", "depthwise", "transposed", "dense"]
    assert [layer.kernel.shape for layer in layers.values()] == [(6, 3, 3, 3), (6, 1, 3, 3), (4, 6, 2, 2), (5, 4)]
    assert [layer.inputs for layer in layers.values()] == [(), ("bn1",), ("bn2",), ("bn3",)]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(FIXTURES / name).graph.initializer}
    np.testing.assert_array_equal(layers["bn1"].kernel.values(), weights["conv1.weight"])
    np.testing.assert_array_equal(layers["bn3"].kernel.values(), weights["up.weight"].swapaxes(0, 1))
    np.testing.assert_array_equal(layers["bn4"].kernel.values(), weights["fc.weight"])


@pytest.mark.parametrize("name", KEPT)
def test_the_adapter_runs_each_layer_of_an_export_as_the_formula_says(name):
    for layer in adapter.read(str(FIXTURES / name)).values():
        x = layer.record.probes().astype(np.float32)
        for y in adapter.run(str(FIXTURES / name), layer.name, x).values():
            assert_within_bound(y, layer.record, x)


@pytest.mark.parametrize("name", KEPT)
def test_numbers_written_into_an_export_are_what_the_whole_network_then_computes_with(name, tmp_path):
    """Layers exchanged for others that are the same function, and the network's output must stay."""
    from bnport.layer import Change

    path, out = str(FIXTURES / name), str(tmp_path / "out.onnx")
    changes = {}
    for layer in adapter.read(path).values():
        other = layer.record.with_epsilon(4e-4).rounded("float32")
        assert other.variance.tobytes() != layer.record.variance.tobytes()
        changes[layer.name] = Change(other, frozenset({*FIELDS, "epsilon"}))
    adapter.write(path, changes, out)
    x, expected = EXPECTED[f"{name}|input"], EXPECTED[f"{name}|output"]
    y = onnx_files.run(out, x)
    assert np.abs(y - expected).max() < 1e-4 * np.abs(expected).max()
    assert y.tobytes() != expected.tobytes()
    onnx.checker.check_model(out, full_check=True)


def test_momentum_is_the_fraction_of_the_old_and_pytorchs_none_is_said():
    layers = adapter.read(str(FIXTURES / "torch-kept.onnx"))
    assert [layer.momentum for layer in layers.values()] == [0.9, 0.8, 0.9, None]
    assert "momentum=None" in layers["bn4"].notes[0]


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("torch-default.onnx", ["conv1 (was bn1)", "depthwise (was bn2)", "up (was bn3)", "fc (was bn4)"]),
        ("torchscript-default.onnx", ["/conv1/Conv", "/depthwise/Conv"]),
        ("ort-optimised.onnx", ["conv1", "depthwise", "up"]),
        ("keras.onnx", ["small_1/bn1"]),
        ("tf-keras.onnx", ["small/conv1/Conv2D (was small/bn1)", "small/dw/depthwise (was small/bn3)"]),
    ],
)
def test_what_was_folded_into_which_layer_is_said(name, lost):
    (note,) = adapter.read(str(FIXTURES / name)).notes
    assert note.startswith(f"BatchNorm was folded into {len(lost)} layer")
    for layer in lost:
        assert layer in note
    assert (EXPORT_CALL in note) is name.startswith("torch")


def test_nothing_is_said_to_be_folded_where_nothing_was():
    for name in (*KEPT, "torchscript-training.onnx", "torchscript-shared.onnx"):
        assert adapter.read(str(FIXTURES / name)).notes == ()


def test_a_convolution_whose_batchnorm_is_still_there_is_not_said_to_hold_one():
    """Though its output is named after the BatchNorm that follows."""
    from tests.adapters.contract import telling_record
    from tests.adapters.onnx_files import graph_model, norm, tensors

    weight = onnx_files.raw(np.ones((7, 7), np.float32), "w")
    dense = onnx.helper.make_node("Gemm", ["x", "w"], ["dense_bn_1"])
    weights = [*tensors(telling_record()), weight]
    assert adapter.read(graph_model([dense, norm(x="dense_bn_1")], weights)).notes == ()
    (note,) = adapter.read(graph_model([dense, onnx.helper.make_node("Relu", ["dense_bn_1"], ["y"])], weights)).notes
    assert "probably folded into 1 layer (dense_bn_1)" in note


@pytest.mark.parametrize("name", [*KEPT, "torchscript-training.onnx"])
def test_writing_what_is_there_already_gives_the_same_file_byte_for_byte(name, tmp_path):
    from bnport.layer import Change

    path, out = FIXTURES / name, tmp_path / "out.onnx"
    changes = {}
    for layer in adapter.read(str(path), stat="stored").values():
        fields = {"mean", "variance", "epsilon"} if layer.name == "bn3" else {*FIELDS, "epsilon"}  # bn3 is affine=False
        changes[layer.name] = Change(layer.record, frozenset(fields))
    adapter.write(str(path), changes, str(out))
    assert out.read_bytes() == path.read_bytes()


def test_a_network_without_any_trace_of_batchnorm_is_told_how_to_export_it():
    weight = onnx_files.raw(np.ones((2, 2), np.float32), "w")
    made = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [weight])
    )
    layers = adapter.read(made)
    assert len(layers) == 0
    assert EXPORT_CALL in layers.notes[0]


def test_the_command_line_says_that_everything_was_folded_and_exits_with_2(tmp_path):
    path, out = str(FIXTURES / "torch-default.onnx"), str(tmp_path / "out.keras")
    for command in (["show", path], ["convert", path, str(FIXTURES / "keras.keras"), "-o", out]):
        done = subprocess.run([sys.executable, "-m", "bnport", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "conv1 (was bn1)" in done.stdout + done.stderr
        assert EXPORT_CALL in done.stdout + done.stderr
    assert not os.path.exists(out)


def test_layers_that_are_missing_because_some_were_folded_are_explained(tmp_path):
    """torchscript-default.onnx has two of four layers left."""
    from bnport.errors import MatchError
    from bnport.match import match

    paired = match(adapter.read(str(FIXTURES / KEPT[0])), adapter.read(str(FIXTURES / KEPT[1])))
    paired.raise_if_bad()
    paired = match(adapter.read(str(FIXTURES / "torchscript-default.onnx")), adapter.read(str(FIXTURES / KEPT[0])))
    with pytest.raises(MatchError, match=r"bn1, bn2.*folded into 2 layers.*dynamo=True, optimize=False"):
        paired.raise_if_bad()


def test_an_export_in_training_mode_is_refused_unless_the_stored_statistics_are_asked_for():
    """The exporter ran the model in training mode: the statistics in the file are what onnx reads, not the module's."""
    path = FIXTURES / "torchscript-training.onnx"
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for layer in adapter.read(str(path)).values():
        with pytest.raises(InvalidValue, match=r"training mode.*not the checkpoint's.*--calibrate DATA.*--stat stored"):
            _ = layer.record
    for layer in adapter.read(str(path), stat="stored").values():
        assert "training mode" in layer.notes[0]
        assert layer.record.mean.tobytes() == tensors[f"{layer.name}.running_mean"].tobytes()
        assert layer.record.mean.tobytes() != EXPECTED[f"torch|{layer.name}|mean"].tobytes()
    with pytest.raises(InvalidValue, match="only 'stored' is known"):
        adapter.read(str(path), stat="variance")


def test_tensors_that_the_exporter_shared_between_roles_are_read_by_position():
    path = FIXTURES / "torchscript-shared.onnx"
    identities = [n for n in onnx.load(path).graph.node if n.op_type == "Identity"]
    assert identities, "this exporter no longer shares tensors; the fixture has lost its point"
    for layer in adapter.read(str(path)).values():
        for field, value in (("gamma", 1), ("beta", 0), ("mean", 0), ("variance", 1)):
            np.testing.assert_array_equal(getattr(layer.record, field), np.full(3, value, np.float32))


def test_a_function_that_pytorch_exported_is_a_layer_for_each_module_under_its_name(tmp_path):
    from bnport.layer import Change
    from tests.adapters.contract import assert_same_bits, telling_record

    path, out = str(FIXTURES / "torchscript-functions.onnx"), str(tmp_path / "out.onnx")
    layers = adapter.read(path)
    assert {name: layer.inputs for name, layer in layers.items()} == {"a.bn": (), "b.bn": ("a.bn",), "c.bn": ("b.bn",)}
    assert [layer.kernel.name for layer in layers.values()] == ["a.conv.weight", "b.conv.weight", "c.conv.weight"]
    for layer in layers.values():
        arrays, epsilon = theirs("torch", layer.name)
        assert layer.epsilon == epsilon
        for field, array in arrays.items():
            assert getattr(layer.record, field).tobytes() == array.tobytes()
        x = layer.record.probes().astype(np.float32)
        for y in adapter.run(path, layer.name, x).values():
            assert_within_bound(y, layer.record, x)
    new = telling_record(3, epsilon=1e-3)
    adapter.write(path, {"b.bn": Change(new, frozenset({*FIELDS, "epsilon"}))}, out)
    again = adapter.read(out)
    assert_same_bits(again["b.bn"].record, new)
    for name in ("a.bn", "c.bn"):
        assert_same_bits(again[name].record, layers[name].record)
    with pytest.raises(InvalidValue, match="function"):
        adapter.write(path, {"b.bn": Change(new.replace(epsilon=0.5), frozenset({"epsilon"}))}, out)


def test_writing_a_shared_tensor_leaves_the_other_layer_alone(tmp_path):
    from bnport.layer import Change
    from tests.adapters.contract import assert_same_bits, telling_record

    path, out = str(FIXTURES / "torchscript-shared.onnx"), str(tmp_path / "out.onnx")
    before, new = adapter.read(path), telling_record(3)
    adapter.write(path, {"bn1": Change(new, frozenset({*FIELDS, "epsilon"}))}, out)
    after = adapter.read(out)
    assert_same_bits(after["bn1"].record, new)
    assert_same_bits(after["bn2"].record, before["bn2"].record)
    onnx.checker.check_model(out, full_check=True)
    x = new.probes().astype(np.float32)
    assert_within_bound(next(iter(adapter.run(out, "bn1", x).values())), new, x)


@pytest.mark.parametrize(
    ("framework", "layer"),
    [("keras", "bn2"), ("keras", "bn3"), ("keras", "bn4"), ("keras", "bn5"), ("tf-keras", "bn4"), ("tf-keras", "bn5"),
     ("tf-keras-norms", "bn3")],
)  # fmt: skip
def test_a_layer_exported_as_mul_and_add_is_the_same_function_and_says_what_is_lost(framework, layer):
    """(a, b) against the formula on Keras' own float32 arrays, each operation of the exporter within one rounding."""
    read = adapter.read(str(FIXTURES / f"{framework}.onnx"))
    (found,) = [v for k, v in read.items() if f"/{layer}" in k]
    arrays, epsilon = theirs(framework, layer)
    wide = {field: array.astype(np.float64) for field, array in arrays.items()}
    a = wide["gamma"] / np.sqrt(wide["variance"] + epsilon)
    b = wide["beta"] - wide["mean"] * a
    got_a, got_b = found.record.affine()
    u = 2.0**-24
    assert (np.abs(got_a - a) <= 5 * u * np.abs(a)).all()
    assert (np.abs(got_b - b) <= u * (7 * np.abs(wide["mean"] * a) + np.abs(b))).all()
    assert found.record.epsilon == 0
    assert found.assumed == {"mean", "variance"}
    assert "statistics" in found.notes[0]


def unexplained(path, norm, channels):
    """The share of a normalization's output, by onnxruntime, that no slope and intercept per channel make of its input."""
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    product, total = nodes[f"{norm}/batchnorm/mul_1"], nodes.get(f"{norm}/batchnorm/add_1")
    ends = [product.input[0], (total or product).output[0]]
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=end) for end in ends if end not in present)
    session = onnx_files.session(model)
    random, shape = np.random.default_rng(0), (2, 8, 8, 3)
    batches = random.normal(size=shape), random.exponential(3, size=shape)
    runs = [session.run(ends, {"image": batch.astype(np.float32)}) for batch in batches]
    x, y = (np.concatenate([run[k].reshape(-1, channels) for run in runs]).astype(np.float64) for k in (0, 1))
    x, y = x - x.mean(0), y - y.mean(0)
    rest = y - x * ((x * y).sum(0) / (x * x).sum(0))
    return ((rest**2).sum(0) / (y**2).sum(0)).max()


@pytest.mark.parametrize(
    ("name", "kept", "left_out"),
    [
        ("keras-training.onnx", [], {"small_1/bn1_1": 6}),
        (
            "tf-keras-norms.onnx",
            ["norms/bn1/FusedBatchNormV3", "norms/bn3"],
            {"norms/ln1": 6, "norms/ln2": 6, "norms/gn": 6, "norms/bn2": 5},
        ),
    ],
)
def test_what_normalizes_by_the_batch_or_the_instance_is_no_layer(name, kept, left_out):
    """TensorFlow gives its operations the names of a BatchNorm, the product of its scale with a statistic among them."""
    layers = adapter.read(str(FIXTURES / name))
    assert list(layers) == kept
    assert f"the instance (LayerNormalization, GroupNormalization): {', '.join(left_out)}." in layers.notes[-1]
    for norm, channels in left_out.items():
        assert unexplained(FIXTURES / name, norm, channels) > 1e-3
    if "norms/bn3" in kept:
        assert unexplained(FIXTURES / name, "norms/bn3", 5) < 1e-10
        arrays, epsilon = theirs("tf-keras-norms", "bn1")
        assert layers["norms/bn1/FusedBatchNormV3"].epsilon == epsilon
        for field, array in arrays.items():
            assert getattr(layers["norms/bn1/FusedBatchNormV3"].record, field).tobytes() == array.tobytes()


def test_a_product_is_a_layer_only_where_nothing_else_is_left_of_its_batchnorm():
    """A PyTorch module called batchnorm that divides by the root of the mean square; and a shift that comes later."""
    from tests.adapters.contract import telling_record

    record = telling_record()
    gamma, beta = onnx_files.raw(record.gamma, "gamma"), onnx_files.raw(record.beta, "beta")

    def part(op, inputs, output, name, **attributes):
        return onnx.helper.make_node(op, inputs, [output], name=f"/batchnorm/{name}", **attributes)

    root = [
        part("Mul", ["x", "x"], "square", "Pow"),
        part("ReduceMean", ["square"], "mean", "ReduceMean", axes=[1]),
        part("Sqrt", ["mean"], "root", "Sqrt"),
        part("Div", ["x", "root"], "unit", "Div"),
        part("Mul", ["unit", "gamma"], "y", "Mul"),
    ]
    layers = adapter.read(onnx_files.graph_model(root, [gamma]))
    assert list(layers) == []
    assert "/batchnorm/Sqrt" in layers.notes[-1]
    x = record.probes().astype(np.float32)
    y = onnx_files.run(onnx_files.graph_model(root, [gamma]), x)
    np.testing.assert_allclose(onnx_files.run(onnx_files.graph_model(root, [gamma]), 3 * x), y, rtol=1e-6)
    later = [
        part("Mul", ["x", "gamma"], "product", "mul_1"),
        part("Identity", ["product"], "same", "mul_1__7"),
        part("Add", ["same", "beta"], "y", "add_1"),
    ]
    assert list(adapter.read(onnx_files.graph_model(later, [gamma, beta]))) == []
    (alone,) = adapter.read(onnx_files.graph_model([part("Mul", ["x", "gamma"], "y", "mul_1")], [gamma])).values()
    np.testing.assert_array_equal(alone.record.affine()[0], record.gamma)


def test_a_batchnorm_that_tf_keras_kept_is_read_as_it_is():
    layers = adapter.read(str(FIXTURES / "tf-keras.onnx"))
    layer = layers["small/bn2/FusedBatchNormV3"]
    arrays, epsilon = theirs("tf-keras", "bn2")
    assert layer.epsilon == epsilon
    for field, array in arrays.items():
        assert getattr(layer.record, field).tobytes() == array.tobytes()
    assert layers["small/bn4"].inputs == ("small/bn2/FusedBatchNormV3",)
    assert layers["small/bn5"].inputs == ("small/bn4",)


@pytest.mark.parametrize("name", ["keras.onnx", "tf-keras.onnx"])
def test_a_reconstructed_layer_runs_but_cannot_be_written(name, tmp_path):
    from bnport.layer import Change

    path = str(FIXTURES / name)
    for layer in adapter.read(path).values():
        if not layer.assumed:
            continue
        x = layer.record.probes().astype(np.float32)
        for y in adapter.run(path, layer.name, x).values():
            assert_within_bound(y, layer.record, x)
        with pytest.raises(InvalidValue, match="Mul and Add"):
            adapter.write(path, {layer.name: Change(layer.record, frozenset(FIELDS))}, str(tmp_path / "out.onnx"))


def test_the_layer_that_onnxruntime_left_is_read():
    layers = adapter.read(str(FIXTURES / "ort-optimised.onnx"))
    assert list(layers) == ["bn4"]
    arrays, _ = theirs("torch", "bn4")
    assert layers["bn4"].record.variance.tobytes() == arrays["variance"].tobytes()


@pytest.mark.slow
def test_the_advised_call_keeps_batchnorm_in_the_installed_pytorch(tmp_path):
    """The default export of today's exporters folds; the call that our note prints does not; and we read both."""
    import torch  # about 20 s, nearly all of it PyTorch's own import of its exporter

    from fixtures.onnx.make import small

    x = torch.zeros(2, 3, 8, 8)
    for options, kept in (({"dynamo": True}, 0), ({"dynamo": True, "optimize": False}, 4), ({"dynamo": False}, 2)):
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(small(), (x,), path, verbose=False, **options)
        layers = adapter.read(path)
        assert len(layers) == kept
        assert ("folded" in " ".join(layers.notes)) is (kept != 4)
        for layer in layers.values():
            assert layer.record.mean.tobytes() == EXPECTED[f"torch|{layer.name}|mean"].tobytes()


@pytest.mark.slow
def test_what_the_installed_keras_exports_is_read_as_the_fixture_is(tmp_path):
    from fixtures.onnx.make import keras_model

    model = keras_model()
    model(np.zeros((1, 8, 8, 3), np.float32))
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    got, expected = adapter.read(path), adapter.read(str(FIXTURES / "keras.onnx"))
    assert len(got) == len(expected) == 4
    assert "folded into 1 layer" in got.notes[0]
    for layer, known in zip(got.values(), expected.values(), strict=True):
        assert_within_bound(layer.record(known.record.probes()), known.record, known.record.probes())
