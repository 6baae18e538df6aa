"""run: what the real Keras layer answers, for files and live models, and that the source stays as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import pytest

import bnport
from bnport import adapters
from bnport.adapters.keras import compiled
from bnport.errors import NotFound
from tests.adapters.contract import assert_same_bits, telling_record

KERAS = adapters.load("keras")
FIXTURES = os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "keras")


def assert_bounded(outputs, record, x):
    assert set(outputs) == {"model(x)", "predict"}
    for how, y in outputs.items():
        assert y.shape == x.shape
        assert (np.abs(y - record(x)) <= record.error_bound(x)).all(), how


def probes_of(source, **options):
    return {
        n: (layer.record, layer.record.probes().astype("f4")) for n, layer in bnport.read(source, **options).items()
    }


@pytest.mark.parametrize("name", ["tf213.keras", "tf213.h5", "k305.keras"])
def test_a_layer_built_by_keras_from_an_old_file_computes_what_was_read(name):
    source = os.path.join(FIXTURES, name)
    probes = probes_of(source)
    outputs = KERAS.run_all(source, {n: x for n, (_, x) in probes.items()})
    for n, (record, x) in probes.items():
        assert_bounded(outputs[n], record, x)


def test_one_layer_of_each_kind_of_file_is_run(tmp_path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization(name="bn", epsilon=1e-3, renorm=True)])
    record = telling_record(5, epsilon=1e-3)
    bnport.set_weights(model, **{f: getattr(record, f) for f in ("gamma", "beta", "mean", "variance")}, sure=True)
    x = record.probes().astype("f4")
    for suffix, save in ((".keras", model.save), (".h5", model.save), (".weights.h5", model.save_weights)):
        path = str(tmp_path / f"a{suffix}")
        save(path)
        assert_bounded(KERAS.run(path, "bn", x), record, x)
    with pytest.raises(NotFound, match="there are bn"):
        KERAS.run(path, "nn", x)
    with pytest.raises(NotFound, match="there are bn"):
        KERAS.run(model, "nn", x)


@pytest.mark.parametrize(
    ("shape", "axis"), [((5,), -1), ((4, 6, 5), -1), ((5, 4, 6), 1), ((4, 5), 2), ((2, 3, 4, 5), -1)]
)
def test_the_layer_is_called_with_the_rank_it_was_built_for(shape, axis):
    layer = keras.layers.BatchNormalization(axis=axis, name="bn")
    model = keras.Sequential([keras.Input(shape), layer])
    record = telling_record(5, epsilon=1e-3)
    layer.set_weights([record.gamma, record.beta, record.mean, record.variance])
    nodes = len(layer._inbound_nodes)
    x = record.probes().astype("f4")
    assert_bounded(KERAS.run(model, "bn", x), record, x)
    assert len(layer._inbound_nodes) == nodes
    assert model.predict(np.zeros((1, *shape), "f4"), verbose=0).shape == (1, *shape)


def test_a_run_leaves_no_graph_that_refers_to_the_layer():
    layer = keras.layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((5,)), layer])
    kinds = len(compiled._model_types())
    assert not compiled.may_be_traced(layer)
    assert set(KERAS.run(model, "bn", np.zeros((2, 5), "f4"))) == {"model(x)", "predict"}
    assert not compiled.may_be_traced(layer)
    assert len(compiled._model_types()) == kinds
    assert gc.isenabled()
    model.predict(np.zeros((2, 5), "f4"), verbose=0)
    assert compiled.may_be_traced(layer)


def test_what_is_read_back_has_the_numbers_and_no_evidence_for_pairing():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.BatchNormalization(name="a")(keras.layers.Conv2D(5, 3)(inputs))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="b", scale=False)(x))
    record = telling_record(5, epsilon=1e-3)
    model.get_layer("a").set_weights([record.gamma, record.beta, record.mean, record.variance])
    read, again = KERAS.read(model), KERAS.read_back(model)
    assert_same_bits(again["a"].record, record)
    for name, layer in read.items():
        assert_same_bits(layer.record, again[name].record)
        assert layer.stores == again[name].stores
        assert again[name].kernel is again[name].inputs is None
    assert read["a"].kernel is not None
    assert read["b"].inputs == ("a",)


def test_a_layer_left_stale_by_hand_shows_in_the_users_own_predict_and_not_after_a_port():
    """The trap itself, so that it is noticed if Keras changes: epsilon set by hand does not reach a traced predict."""
    layer = keras.layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((3,)), layer])
    x = np.ones((4, 3), "f4")
    before = model.predict(x, verbose=0)
    layer.epsilon = 3.0
    assert np.array_equal(model.predict(x, verbose=0), before)
    layer.epsilon = 1e-3
    bnport.set_weights(model, epsilon=3.0)
    assert np.allclose(model.predict(x, verbose=0), 0.5)


def test_without_keras_running_says_what_to_install_and_reading_works():
    script = (
        "import sys; sys.modules['keras'] = None\n"
        "import bnport, numpy as np\nfrom bnport import adapters\nfrom bnport.errors import MissingDependency\n"
        f"source = {os.path.join(FIXTURES, 'k305.keras')!r}\n"
        "assert len(bnport.read(source)) == 7\n"
        "try: adapters.load('keras').run(source, 'bn1', np.zeros((2, 3), 'f4'))\n"
        "except MissingDependency as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "bnport[tensorflow]" in done.stdout, done.stderr


class Doubled(keras.layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


class Same(keras.layers.BatchNormalization):
    pass


@pytest.mark.parametrize(("kind", "own"), [(Doubled, True), (Same, False)])
def test_a_layer_with_a_call_of_its_own_is_run_by_convert(kind, own):
    source = keras.Sequential([keras.Input((3,)), kind(name="bn")])
    target = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    assert bnport.read(source)["bn"].own_code is own
    report = bnport.convert(source, target)
    assert report.ok is not own
    checks = {check.name for layer in report.layers for check in layer.checks}
    assert any(name.startswith("source") for name in checks) is own
