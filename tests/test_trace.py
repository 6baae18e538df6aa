"""trace finds the first place where two real networks part, and says whether it is BatchNorm or what lies before it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction

import keras
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bnport
from bnport.cli import main
from bnport.errors import InvalidValue, Question
from bnport.testing import assert_same_outputs
from bnport.trace import trace
from tests.twins import Net, batchnorm_weights, export, images, keras_twin


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture
def twin(net):
    return keras_twin(net)


@pytest.fixture(scope="module")
def onnx_path(net, tmp_path_factory):
    return export(net, str(tmp_path_factory.mktemp("onnx") / "net.onnx"))


def test_two_equal_networks_agree_in_every_layer_and_in_the_end(net, twin):
    x = images()
    found = trace(net, twin, x)
    assert found.ok
    assert [(s.a, s.b) for s in found.steps] == [("bn1", "bn1"), ("bn2", "bn2"), ("bn3", "bn3")]
    assert all(0 < s.own.ratio <= 1 for s in found.steps)
    assert found.output_difference < 1e-5
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(twin(x.transpose(0, 2, 3, 1)).numpy(), expected, atol=1e-4)  # the twin is one
    assert "The networks agree" in str(found)


@pytest.mark.parametrize("pair", ["torch onnx", "onnx keras", "keras torch", "keras keras", "onnx torch"])
def test_every_combination_of_frameworks_can_be_traced(pair, net, twin, onnx_path):
    models = {"torch": net, "keras": twin, "onnx": onnx_path}
    a, b = (models[word] for word in pair.split())
    found = trace(a, b, images())
    assert found.ok, str(found)
    assert len(found.steps) == 3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_each_network_gets_the_layout_that_it_needs(net, twin, layout):
    x = images() if layout == "NCHW" else images().transpose(0, 2, 3, 1)
    assert trace(net, twin, x).ok
    assert trace(net, twin, x, layout=layout).ok


def test_a_layout_that_nothing_tells_is_asked_for():
    one = torch.nn.Sequential(torch.nn.BatchNorm2d(8)).eval()
    x = np.ones((2, 8, 8, 8), np.float32)
    with pytest.raises(Question, match=r"--layout"):
        trace(one, one, x)
    assert trace(one, one, x, layout="NCHW").ok
    with pytest.raises(InvalidValue, match="does not fit an input of shape"):
        trace(one, one, x, layout="CHWN")


def test_a_wrong_batchnorm_is_named_with_channel_and_mistake(net, twin):
    gamma, beta, mean, variance = batchnorm_weights(net.bn2)
    twin.get_layer("bn2").set_weights([gamma, beta, mean, np.sqrt(variance)])
    found = trace(net, twin, images())
    assert not found.ok
    assert found.first.b == "bn2"
    assert found.first.layer_differs
    assert not found.first.input_differs
    assert len(found.faults) == 1, "what follows from bn2 is no fault of its own"
    assert found.faults[0].startswith("bn2 is another function than bn2: channel ")
    assert "likely mistake: the standard deviation was written where the variance belongs" in str(found)


def test_expected_and_got_are_the_numbers_of_that_channel(net, twin):
    weights = batchnorm_weights(net.bn1)
    weights[1] = weights[1].copy()
    weights[1][5] += 0.25
    twin.get_layer("bn1").set_weights(weights)
    own = trace(net, twin, images()).first.own
    assert own.channel == 5
    assert own.got - own.expected == pytest.approx(0.25, abs=1e-5)


def test_wrong_padding_is_told_from_a_wrong_batchnorm(net):
    found = trace(net, keras_twin(net, padding="same"), images())
    assert found.first.b == "bn1"
    assert found.first.input_differs
    assert not found.first.layer_differs
    assert len(found.faults) == 1
    assert "before bn1: its input already differs" in found.faults[0]
    assert "between the network's input and it" in found.faults[0]
    assert found.explanation is None


def test_a_wrong_kernel_between_two_layers_is_placed_between_them(net, twin):
    kernel = twin.get_layer("down").get_weights()[0]
    twin.get_layer("down").set_weights([kernel * np.float32(1 + 1e-4)])
    found = trace(net, twin, images())
    assert found.first.b == "bn3"
    (fault,) = found.faults
    assert fault.startswith("before bn3: its input already differs by 0.0001")
    assert "between bn1, bn2 and it" in fault


def test_a_network_that_magnifies_rounding_is_not_blamed_for_it(net, twin):
    """The same numbers, but every layer magnifies what the one before rounded: no fixed threshold is right for both."""

    class Loud(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(16) for _ in range(8))

        def forward(self, x):
            for norm in self.norms:
                x = torch.sin(norm(x) * 12)
            return x

    torch.manual_seed(0)
    one = Loud().eval()
    inputs = x = keras.Input((16,))
    for i in range(8):
        x = keras.ops.sin(keras.layers.BatchNormalization(epsilon=1e-5, name=f"bn{i}")(x) * 12)
    model = keras.Model(inputs, x)
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    pairs = {f"bn{i}": f"norms.{i}" for i in range(8)}
    found = trace(one, model, x, map=pairs)
    assert found.ok, str(found)
    assert found.output_difference > 1e-3, "rounding alone does that here"
    assert "any output at all would agree: only the BatchNorm layers were compared" in str(found)
    assert "The networks agree" not in str(found)
    with pytest.raises(InvalidValue, match="nothing is known of the outputs"):
        assert_same_outputs(one, model, x, map=pairs)
    assert_same_outputs(one, model, x, map=pairs, tolerance=2)  # whoever gives one knows
    with torch.no_grad():
        one.norms[1].bias += 1e-4
    model.get_layer("bn1").set_weights(batchnorm_weights(one.norms[1]))
    assert trace(one, model, x, map=pairs).ok
    model.get_layer("bn1").set_weights(batchnorm_weights(one.norms[0]))
    found = trace(one, model, x, map=pairs)
    assert [s.b for s in found.steps if s.layer_differs] == ["bn1"]


def test_a_tolerance_that_is_given_is_used(net, twin):
    kernel = twin.get_layer("down").get_weights()[0]
    twin.get_layer("down").set_weights([kernel * np.float32(1.01)])
    assert not trace(net, twin, images(), tolerance=5e-3).ok
    assert trace(net, twin, images(), tolerance=5e-2).ok


@pytest.mark.parametrize(
    "bad", [-1, -1e-9, float("nan"), np.float32("inf"), 10**400, "0.1", b"1", True, [0.1], np.ones(1)]
)
def test_a_tolerance_that_is_no_finite_number_from_0_on_is_refused(bad):
    for compare in (trace, assert_same_outputs):
        with pytest.raises(InvalidValue, match=r"^tolerance: expected a finite number >= 0, got "):
            compare(Tail(lambda y: y).eval(), Tail(other).eval(), images(), tolerance=bad)


def test_a_tolerance_of_any_kind_of_number_is_taken():
    for good in (0, 0.0, 1, np.float32(0.5), np.int64(2), Fraction(1, 2)):
        found = trace(Tail(lambda y: y).eval(), Tail(lambda y: y).eval(), images(), tolerance=good)
        assert found.ok
        assert found.tolerance == good
        json.dumps(found.to_dict())


def test_a_wrong_padding_and_a_wrong_layer_after_it_are_both_reported(net):
    model = keras_twin(net, padding="same")
    weights = batchnorm_weights(net.bn3)
    model.get_layer("bn3").set_weights([weights[0], weights[1], weights[3], weights[2] ** 2])
    found = trace(net, model, images())
    assert [fault.split(":")[0] for fault in found.faults] == ["before bn1", "bn3 is another function than bn3"]


def test_a_wrong_head_is_placed_after_the_last_batchnorm(net, twin):
    kernel, bias = twin.get_layer("fc").get_weights()
    twin.get_layer("fc").set_weights([kernel, bias + 0.1])
    found = trace(net, twin, images())
    assert not found.ok
    assert "after the last BatchNorm layer, bn3" in found.faults[0]


def test_an_epsilon_too_small_for_any_threshold_is_found_by_the_bound(net, twin):
    twin.get_layer("bn1").epsilon = 1.1e-5
    found = trace(net, twin, images())
    assert found.output_difference < 1e-4, "no threshold that people use would see it"
    assert [s.b for s in found.steps if s.layer_differs] == ["bn1"]
    assert "epsilon is 1.1e-05" in str(found)


def test_a_predict_that_was_compiled_with_another_epsilon_is_found(net, twin):
    """Keras builds the epsilon into the compiled function: a later change reaches model(x), and not predict."""
    x = images().transpose(0, 2, 3, 1)
    for name in ("bn1", "bn2", "bn3"):
        twin.get_layer(name).epsilon = 0.5
    stale = twin.predict(x, verbose=0)
    for name in ("bn1", "bn2", "bn3"):
        twin.get_layer(name).epsilon = 1e-5
    assert np.array_equal(twin.predict(x, verbose=0), stale)
    found = trace(net, twin, x)
    assert len(found.faults) == 1
    assert "predict gives other outputs than calling the model" in found.faults[0]
    twin.predict_function = None
    assert trace(net, twin, x).ok


def test_inputs_of_other_shapes_are_said(net):
    other = Net()
    other.conv1.stride = (1, 1)
    found = trace(net, other, images())
    assert "its input has shape (4, 16, 16, 8), in the original (4, 8, 8, 8)" in found.faults[0]


def test_the_models_are_left_as_they_were(net, twin):
    net.bn2.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    held = [np.array(w) for w in twin.get_weights()]
    try:
        assert trace(net, twin, images()).ok, "a network in training mode is still traced at inference"
        assert net.bn2.training
        assert not net.bn1.training
    finally:
        net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(np.array_equal(w, h) for w, h in zip(twin.get_weights(), held, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert "call" not in vars(twin.get_layer("bn1"))


def test_an_error_inside_a_network_leaves_no_hooks(net, twin):
    with pytest.raises(
        InvalidValue, match=r"live Net: cannot run on an input of shape \(1, 4, 16, 16\): RuntimeError: "
    ):
        trace(net, twin, np.zeros((1, 4, 16, 16), np.float32), layout="NCHW")
    with pytest.raises(
        InvalidValue, match=r"the live Functional 'twin': cannot run on an input of shape \(1, 8, 8, 3\)"
    ):
        trace(net, twin, np.zeros((1, 3, 8, 8), np.float32))
    assert "call" not in vars(twin.get_layer("bn1"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_an_input_that_is_not_finite_is_refused_and_one_that_is_zero_is_not(net, twin):
    with pytest.raises(InvalidValue, match="NaN or infinity"):
        trace(net, twin, np.full((1, 3, 16, 16), np.nan, np.float32))
    assert trace(net, twin, np.zeros((1, 3, 16, 16), np.float32)).ok


@pytest.mark.parametrize(
    ("shape", "what"),
    [((0, 3, 8, 8), "no samples at all"), ((2, 3, 0, 8), "samples without values"), ((0,), "no samples at all")],
)
def test_an_input_without_samples_or_values_is_refused(shape, what):
    x = np.zeros(shape, np.float32)
    for compare in (trace, assert_same_outputs):
        with pytest.raises(InvalidValue, match=rf"the input has shape {re.escape(str(shape))}: {what}"):
            compare(Tail(lambda y: y).eval(), Tail(other).eval(), x)


@pytest.mark.parametrize("tail", [lambda y: y[:0], lambda y: (y[:0], y[:, :0]), lambda y: ()])
def test_outputs_without_values_are_refused(tail):
    with pytest.raises(InvalidValue, match="live Tail, the original, gives no values that could differ"):
        trace(Tail(tail).eval(), Tail(tail).eval(), images())


def test_a_network_that_makes_nan_is_not_said_to_hold_a_wrong_batchnorm(net):
    broken = Net()
    with torch.no_grad():
        broken.conv2.weight[0] = float("nan")
    found = trace(net, broken, images())
    assert not [step for step in found.steps if step.layer_differs]
    assert found.faults[0].startswith("before bn2: its input already differs by inf")


class Tail(torch.nn.Module):
    """A BatchNorm layer, and a function after it."""

    def __init__(self, tail):
        super().__init__()
        self.tail, self.bn = tail, torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.tail(self.bn(x))


def one(value, tail=lambda y: y):
    """`tail`, and then `value` in one place."""

    def put(y):
        y = tail(y).clone()
        y[0, 0, 0, 0] = value
        return y

    return put


def other(y):
    return y * 3 + 1


@pytest.mark.parametrize("port", [other, one(float("nan"), other), one(float("inf"), other)])
@pytest.mark.parametrize(
    "original", [one(float("nan")), one(float("inf")), lambda y: y * float("nan"), lambda y: y / 0]
)
def test_an_original_that_gives_nan_or_infinity_is_refused_whatever_the_port_gives(original, port):
    for options in ({}, {"tolerance": 0.1}):
        with pytest.raises(
            InvalidValue, match=r"live Tail, the original, makes NaN or infinity, .*: in its output, not"
        ):
            trace(Tail(original).eval(), Tail(port).eval(), images(), **options)
    with pytest.raises(InvalidValue, match="makes NaN or infinity"):
        assert_same_outputs(Tail(original).eval(), Tail(port).eval(), images())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_port_that_gives_nan_or_infinity_is_another_function(value):
    found = trace(Tail(lambda y: y).eval(), Tail(one(value)).eval(), images())
    assert not found.ok
    assert "after the last BatchNorm layer, bn: their outputs differ by inf" in found.faults[0]


def test_a_difference_to_outputs_whose_squares_overflow_is_seen():
    original, port = (Tail(lambda y, value=value: y.double() * 0 + value).eval() for value in (2e154, 2.001e154))
    assert not trace(original, port, images()).ok


@pytest.mark.parametrize("kind", ["torch", "keras"])
def test_where_nan_begins_in_the_original_is_said(kind):
    broken = Net()
    with torch.no_grad():
        broken.conv2.weight[0] = float("nan")
    original = broken if kind == "torch" else keras_twin(broken)
    with pytest.raises(InvalidValue, match=r"no comparison survives: first in what goes into bn2$"):
        trace(original, broken, images())


def test_where_a_layer_of_the_original_overflows_is_said():
    loud = Tail(lambda y: y.clamp(-1, 1)).eval()
    with torch.no_grad():
        loud.bn.weight.fill_(3e38)
    with pytest.raises(InvalidValue, match=r"no comparison survives: first in what comes out of bn$"):
        trace(loud, loud, images() * 10)


def test_a_layer_that_passes_infinity_on_and_a_predict_of_nan_are_not_to_blame(net):
    broken = keras_twin(net)
    kernel = broken.get_layer("conv2").get_weights()[0]
    kernel[..., 0] = float("inf")
    broken.get_layer("conv2").set_weights([kernel])
    broken.predict(images().transpose(0, 2, 3, 1), verbose=0)
    found = trace(net, broken, images())
    assert found.faults
    assert all(fault.startswith("before bn2: its input already differs by inf") for fault in found.faults), found.faults


@pytest.mark.parametrize(
    "tail",
    [lambda y: (y.amin() - y.amax()).sqrt() + y, lambda y: y - y.amax(), lambda y: y[y >= y.amax()]],
    ids=["nan", "from zeros only", "another shape"],
)
def test_no_tolerance_is_measured_where_a_rounding_changes_the_original_beyond_measure(tail):
    """With ones as its input; the tolerance was infinite, and every port passed."""
    x = np.ones((2, 3, 4, 5), np.float32)
    original, port = Tail(tail).eval(), Tail(lambda y: other(tail(y))).eval()
    with pytest.raises(InvalidValue, match=r"rounded once more changes its output beyond measure .* give one"):
        trace(original, port, x)
    assert not trace(original, port, x, tolerance=0.1).ok
    inner = torch.nn.BatchNorm2d(3).eval()
    with pytest.raises(InvalidValue, match=r"rounded once more changes what goes into inner beyond measure"):
        trace(*(Branch(inner, shift) for shift in (0, 1)), x)


class Branch(torch.nn.Module):
    """A BatchNorm layer whose input is `shift` for a constant image, and moves with its rounding."""

    def __init__(self, inner, shift):
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, x):
        return x + self.inner(x - x.amax() + self.shift)


def test_a_shared_layer_is_compared_at_each_of_its_calls():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(self.bn(x) + 1)

    inputs = keras.Input((4,))
    layer = keras.layers.BatchNormalization(epsilon=1e-5, name="bn")
    model = keras.Model(inputs, layer(layer(inputs) + 1))
    one = Shared().eval()
    layer.set_weights(batchnorm_weights(one.bn))
    found = trace(one, model, np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    assert found.ok, str(found)
    assert [s.call for s in found.steps] == [0, 1]


def test_outputs_whose_shape_is_the_same_in_both_layouts_are_compared_channel_by_channel(net):
    one = torch.nn.Sequential(torch.nn.BatchNorm2d(8)).eval()
    one[0].load_state_dict(net.bn1.state_dict())
    model = keras.Sequential([keras.Input((8, 8, 8)), keras.layers.BatchNormalization(epsilon=1e-5, name="bn")])
    model.layers[0].set_weights(batchnorm_weights(net.bn1))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 8)).astype(np.float32)
    found = trace(one, model, x, layout="NCHW", map={"bn": "0"})
    assert found.ok, str(found)


BACKEND = """
import os, sys
os.environ["KERAS_BACKEND"] = sys.argv[1]
import keras
from tests.twins import Net, keras_twin, images
from bnport.trace import trace
import bnport
assert keras.backend.backend() == sys.argv[1]
net = Net()
twin = keras_twin(net)
assert trace(net, twin, images()).ok
assert "before bn1" in trace(net, keras_twin(net, "same"), images()).faults[0]
report = bnport.verify(net, twin)
assert report.ok and not report.not_run, str(report)
assert any("against" in check.name for layer in report.layers for check in layer.checks)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_on_its_other_backends_is_traced_and_run(backend):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", BACKEND, backend], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mobilenet_v2_of_torchvision_and_of_keras_part_exactly_where_their_padding_does():
    """With 65 pixels both pad alike and all 52 layers agree; with 64, Keras pads the first convolution on one side only."""
    from tests import architectures

    size = architectures.ARCHITECTURES["MobileNetV2"].size
    source, wide = architectures.build("MobileNetV2")
    pairs = dict(zip(bnport.read(wide), bnport.read(source), strict=True))
    architectures.port(source, wide, pairs, (architectures.fed_torch(source, size), architectures.fed_keras(wide)))
    source = source.float()
    for pixels, agree in ((size, True), (64, False)):
        model = architectures.ARCHITECTURES["MobileNetV2"].keras(pixels)
        model.set_weights(wide.get_weights())
        for target, bn in pairs.items():
            model.get_layer(target).epsilon = dict(source.named_modules())[bn].eps
        x = np.random.default_rng(0).normal(size=(1, 3, pixels, pixels)).astype(np.float32)
        found = trace(source, model, x, map=pairs)
        assert len(found.steps) == 52
        assert not [step for step in found.steps if step.layer_differs]
        assert found.ok is agree, str(found)
        if agree:
            ratios = [32 * step.input_difference / step.tolerance for step in found.steps]
            assert max(ratios) < 8, "rounding moves what it was measured to move, with room to spare"
        else:
            assert found.faults[0].startswith("before Conv1_bn") or found.faults[0].startswith("before bn_Conv1")


def test_nested_and_subclassed_keras_models_are_traced(net):
    inner = keras.Sequential([keras.layers.BatchNormalization(epsilon=1e-5, name="n")], name="inner")

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def call(self, x, training=False):
            return self.inner(x, training=training)

    model = Outer()
    model(np.zeros((1, 8), np.float32))
    inner.layers[0].set_weights(batchnorm_weights(net.bn1))
    one = torch.nn.BatchNorm1d(8).eval()
    one.load_state_dict(net.bn1.state_dict())
    found = trace(one, model, np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32))
    assert found.ok, str(found)
    assert len(found.steps) == 1


def test_a_16_bit_network_is_held_to_its_own_bound(net):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras_twin(net)
    finally:
        keras.config.set_dtype_policy(policy)
    found = trace(net, model, images())
    assert not [s for s in found.steps if s.layer_differs], str(found)
    assert 8 * 2**-7 <= found.tolerance < 0.5
    weights = batchnorm_weights(net.bn2)
    model.get_layer("bn2").set_weights([*weights[:3], weights[3] * 1.1])
    assert [s.b for s in trace(net, model, images()).steps if s.layer_differs] == ["bn2"]


def test_progress_runs_over_both_networks_and_arrives(net, twin):
    seen = []
    trace(net, twin, images(), progress=lambda done, total, what: seen.append((done, total, what)))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5, 6, 6]
    assert {total for _, total, _ in seen} == {6}


@pytest.mark.parametrize("name", ["state.pth", "module.pt", "twin.keras", "net.safetensors"])
def test_of_other_files_than_onnx_the_live_model_is_asked(name, net, twin, tmp_path):
    path = str(tmp_path / name)
    if name == "twin.keras":
        twin.save(path)
    elif name == "net.safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net if name == "module.pt" else net.state_dict(), path)
    with pytest.raises(InvalidValue, match=r"give the live model .*; no network is run from a file of this kind"):
        trace(net, path, images())


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 3, 16, 16))])
def test_torchscript_is_not_said_to_hold_weights_only(make, net, tmp_path):
    path = tmp_path / "net.pt"
    make(net).save(path)
    for given in (path, str(path)):
        with pytest.raises(
            InvalidValue, match=r"net\.pt: give the live model .*; this file is TorchScript, .* no hooks"
        ):
            trace(net, given, images())


def test_the_json_form_is_plain_json(net):
    found = trace(net, keras_twin(net, padding="same"), images())
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["ok"] is False
    assert value["steps"][0]["b"] == "bn1"
    assert bnport.trace is not None


@pytest.mark.parametrize("wrong", [lambda x: x * float("nan"), lambda x: x[:, :, 1:], lambda x: x / 0])
def test_the_json_form_of_a_layer_that_gives_nan_infinity_or_another_shape_is_plain_json(wrong):
    port = Tail(lambda y: y).eval()
    port.bn.forward = wrong
    value = json.loads(json.dumps(trace(Tail(lambda y: y).eval(), port, images()).to_dict(), allow_nan=False))
    assert value["steps"][0]["own"]["ratio"] is None
    assert value["steps"][0]["own"]["got"] is None


MODELS = """
import sys
sys.path.insert(0, {root!r})
from tests.twins import Net, keras_twin

def original():
    return Net()

def ported():
    from tests.twins import Net, keras_twin
    return keras_twin(Net(), padding="same")

def broken():
    raise RuntimeError("no weights here")
"""


def run(*arguments):
    command = [sys.executable, "-m", "bnport", "trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_runs_the_users_own_functions_and_files(net, twin, onnx_path, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    (tmp_path / "nets.py").write_text(MODELS.format(root=root))
    np.save(tmp_path / "x.npy", images())
    twin.save(tmp_path / "twin.keras")
    done = run(onnx_path, tmp_path / "twin.keras", "--input", tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
    assert "The networks agree" in done.stdout
    arguments = (f"{tmp_path}/nets.py:original", f"{tmp_path}/nets.py:ported")
    done = run(*arguments, "--input", tmp_path / "x.npy", "--json")
    assert done.returncode == 1, done.stderr
    assert "before bn1" in json.loads(done.stdout)["faults"][0]
    done = run(onnx_path, f"{tmp_path}/nets.py:broken", "--input", tmp_path / "x.npy")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("nets.py:broken: RuntimeError: no weights here")


LOUD = """
import os, sys
import torch

print("imported")

class Loud(torch.nn.Module):
    def __init__(self, code=None):
        super().__init__()
        self.bn, self.code = torch.nn.BatchNorm2d(3), code

    def forward(self, x):
        print("running")
        print("straight", file=sys.__stdout__)
        os.system("echo another program")
        if self.code is not None:
            sys.exit(self.code)
        return self.bn(x)

def quiet():
    print("called")
    return Loud().eval()

def leaving():
    sys.exit(3)

def left():
    return Loud("no weights").eval()
"""


@pytest.fixture
def loud(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    np.save(tmp_path / "x.npy", images())
    return lambda *names: run(
        *(f"{tmp_path}/loud.py:{name}" for name in names), "--input", tmp_path / "x.npy", "--json"
    )


def test_what_the_users_code_prints_is_not_in_the_report(loud):
    done = loud("quiet", "quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    assert {"imported", "called", "running", "straight", "another program"} <= set(done.stderr.split("\n"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaving", "loud.py:leaving: SystemExit: 3"),
        ("left", "loud.py:left ends the program when it runs: SystemExit: no weights"),
    ],
)
def test_a_users_code_that_ends_the_program_is_one_line_and_exit_2(loud, name, said):
    done = loud("quiet", name)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(said)
    assert json.loads(done.stdout)["error"]["message"].endswith(said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5", "no format reads a builtins.int object; there are "),
        ("None", "no format reads a builtins.NoneType object; there are "),
        ("'absent.onnx'", "absent.onnx: no such file"),
    ],
)
def test_a_function_that_returns_no_model_is_named(value, said, onnx_path, tmp_path, capsys):
    (tmp_path / "mods.py").write_text(f"def five(): return {value}")
    np.save(tmp_path / "x.npy", images())
    assert main(["trace", f"{tmp_path}/mods.py:five", onnx_path, "--input", f"{tmp_path}/x.npy"]) == 2
    assert f"mods.py:five returns: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "not a regular file"), (lambda path: None, "no such file")],
)
def test_an_input_that_is_no_regular_file_is_refused(make, said, onnx_path, tmp_path):
    make(tmp_path / "x.npy")
    command = [sys.executable, "-m", "bnport", "trace", onnx_path, onnx_path, "--input", str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"bnport: {tmp_path}/x.npy: {said}\n"


@pytest.mark.parametrize("bad", [b"", b"nonsense", "pickle", "vector"])
def test_a_bad_input_file_is_one_line_and_exit_2(bad, onnx_path, tmp_path):
    path = tmp_path / "x.npy"
    if bad == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif bad == "vector":
        np.save(path, np.zeros(3))
    else:
        path.write_bytes(bad)
    done = run(onnx_path, onnx_path, "--input", path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "x.npy" in done.stderr.splitlines()[-1]
