"""The assertions for users' own suites, and the pytest plugin that records in one environment and compares in another."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bnport.errors import MatchError, NotFound
from bnport.testing import assert_equivalent, assert_same_outputs
from tests.twins import Net, batchnorm_weights, images, keras_twin

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def net():
    return Net()


def test_equivalent_models_pass_live_and_from_files(net, tmp_path):
    twin = keras_twin(net)
    twin.save(tmp_path / "twin.keras")
    torch.save(net, tmp_path / "net.pt")
    assert_equivalent(net, twin)
    assert_equivalent(tmp_path / "net.pt", str(tmp_path / "twin.keras"))
    assert_equivalent(net.state_dict(), twin, epsilon=1e-5)


def test_a_failure_names_layer_channel_expected_got_and_the_likely_mistake(net):
    twin = keras_twin(net)
    weights = batchnorm_weights(net.bn2)
    twin.get_layer("bn2").set_weights([*weights[:3], np.sqrt(weights[3])])
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(net, twin)
    message = str(caught.value)
    assert "1 of 3 BatchNorm layers differ" in message
    assert "  bn2 (of bn2), channel " in message
    channel = int(message.split("channel ")[1].split(":")[0])
    variance = np.float64(weights[3][channel])
    slopes = [weights[0][channel] / np.sqrt(v + 1e-5) for v in (variance, np.float64(np.sqrt(weights[3])[channel]))]
    intercepts = [weights[1][channel] - weights[2][channel] * slope for slope in slopes]
    expected, got = slopes if "slope gamma / sqrt" in message else intercepts
    assert f"expected {expected:.8g}, got {got:.8g}" in message
    assert "likely mistake: the standard deviation was written where the variance belongs (bn2)" in message
    assert "bnport.convert(source, model)" in message


def test_an_unexplained_difference_says_which_arrays_are_right(net):
    twin = keras_twin(net)
    weights = batchnorm_weights(net.bn1)
    rng = np.random.default_rng(0)
    twin.get_layer("bn1").set_weights([*weights[:2], rng.normal(size=8), rng.uniform(1, 2, 8)])
    with pytest.raises(AssertionError, match="gamma, beta are the source's, mean and variance are not"):
        assert_equivalent(net, twin)


def test_a_port_that_cannot_be_compared_is_an_error_of_its_own(net):
    with pytest.raises(MatchError):
        assert_equivalent(net, torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    with pytest.raises(NotFound):
        assert_equivalent(net, torch.nn.Linear(2, 2))


def test_same_outputs_pass_and_a_wrong_padding_is_named(net):
    assert_same_outputs(net, keras_twin(net), images())
    with pytest.raises(AssertionError, match="before bn1: its input already differs"):
        assert_same_outputs(net, keras_twin(net, padding="same"), images())


def test_a_wrong_layer_is_named_by_its_outputs(net):
    twin = keras_twin(net)
    weights = batchnorm_weights(net.bn3)
    twin.get_layer("bn3").set_weights([weights[0], weights[1], weights[3], np.abs(weights[2])])
    with pytest.raises(AssertionError) as caught:
        assert_same_outputs(net, twin, images())
    assert "bn3 is another function than bn3: channel" in str(caught.value)
    assert "expected" in str(caught.value)


# ---- the plugin. Each inner run is a suite of a user's, in a process that may not import the other framework.

BLOCK = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {absent}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Absent())
"""
TORCH_SIDE = """
    import torch

    def model(eps=1e-3):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.BatchNorm1d(6, eps=eps))
        with torch.no_grad():
            module[0].running_mean.uniform_(0.1, 1)
            module[0].running_var.uniform_(1e-3, 1)
            module[0].weight.normal_()
        return module.eval()

    def test_record(bnport_golden):
        bnport_golden.record(model(), "small")
"""
KERAS_SIDE = """
    import os
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    from safetensors.numpy import load_file

    def model(order):
        held = load_file(os.path.join(os.path.dirname(__file__), "bnport_golden", "small.safetensors"))
        arrays = {name.rsplit(".", 1)[1]: array for name, array in held.items()}
        model = keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization()])
        model.layers[0].set_weights([arrays[name] for name in order])
        return model

    def test_port(bnport_golden):
        bnport_golden.compare(model(["gamma", "beta", "mean", "variance"]), "small")

    def test_wrong_port(bnport_golden):
        bnport_golden.compare(model(["gamma", "beta", "variance", "mean"]), "small")
"""


def test_a_record_made_where_torch_is_is_compared_where_only_keras_is(pytester):
    pytester.makepyfile(test_torch_side=BLOCK.format(absent={"keras", "tensorflow"}) + TORCH_SIDE)
    done = pytester.runpytest_subprocess("--bnport-update", "-q")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["bnport: wrote bnport_golden/small.safetensors"])
    (pytester.path / "test_torch_side.py").unlink()
    pytester.makepyfile(test_keras_side=BLOCK.format(absent={"torch"}) + KERAS_SIDE)
    done = pytester.runpytest_subprocess("-q", "--tb=short")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        [
            "*test_wrong_port*",
            "*channel * expected *, got *",
            "*mean holds the source's variance; variance holds the source's mean*",
        ]
    )


def test_without_the_option_record_compares_and_writes_nothing(pytester):
    pytester.makepyfile(test_torch_side=TORCH_SIDE)
    done = pytester.runpytest_inprocess("-q")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*no golden record bnport_golden/small.safetensors: run pytest --bnport-update*"])
    assert not os.path.exists(pytester.path / "bnport_golden")
    pytester.runpytest_inprocess("--bnport-update", "-q").assert_outcomes(passed=1)
    before = (pytester.path / "bnport_golden" / "small.safetensors").read_bytes()
    pytester.runpytest_inprocess("-q").assert_outcomes(passed=1)
    pytester.makepyfile(test_torch_side=TORCH_SIDE.replace("eps=1e-3", "eps=1e-5"))
    done = pytester.runpytest_inprocess("-q")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*epsilon is 1e-05*the source's is 0.001*"])
    assert (pytester.path / "bnport_golden" / "small.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden"])
def test_a_record_stays_in_its_folder(tmp_path, name):
    from bnport.pytest_plugin import Golden

    with pytest.raises(ValueError, match="plain file name"):
        Golden(str(tmp_path), update=True, written=[]).path(name)


def test_the_plugin_costs_other_projects_next_to_nothing():
    """pytest loads it everywhere bnport is installed."""
    code = (
        "import pytest, sys\nbefore = set(sys.modules)\nimport bnport.pytest_plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bnport", "bnport.pytest_plugin"]
