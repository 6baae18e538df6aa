"""More of custom.py's checks: layers that inference calls in two ways, and dtypes that a backend does not have."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate.run import METHODS, calibrate
from bnport.errors import InvalidValue, Unrepresentable
from tests.calibrate import nets
from tests.calibrate.nets import L, keras, numpy

KERAS_2 = keras.__name__ == "tf_keras"
BACKEND = "tensorflow" if KERAS_2 else keras.backend.backend()


class Both(L.Layer):
    """One BatchNorm layer, called in training on one thing and at inference on another."""

    def __init__(self, first, **options):
        super().__init__(**options)
        self.bn, self.first = L.BatchNormalization(name="both"), first

    def build(self, shape):
        self.bn.build(shape)
        self.built = True

    def call(self, x):
        trained = self.bn(5 * x, training=True) if self.first else 0
        plain = self.bn(x, training=False)  # said: Keras 3 hands training=True on to the calls that follow
        return plain + (trained if self.first else self.bn(5 * x, training=True))


def a_layer_that_inference_calls_in_training_and_without_is_refused():
    i, x = keras.Input((4,)), nets.data(70, (4,))
    shared = L.BatchNormalization(name="both")
    models = [keras.Model(i, Both(first)(i)) for first in (True, False)]
    if KERAS_2:  # Keras 3 overrides what a graph says about training
        models.append(keras.Model(i, [shared(5 * i, training=True), shared(i)]))
    for model in models:
        before = nets.held(model)
        with pytest.raises(
            Unrepresentable, match=r"both: inference calls it with training=True and without.*frozen=True"
        ):
            calibrate(model, x)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))
    for model in models:  # frozen, it normalises by what is stored at every call
        for layer in (shared, *[layer.bn for layer in model.layers if isinstance(layer, Both)]):
            layer.trainable = False
        (layer,) = calibrate(model, x, frozen=True).layers
        mean, variance = nets.two_pass([x, 5 * x])
        assert layer.n == 140
        np.testing.assert_allclose(layer.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(layer.variance, variance, rtol=1e-6)


def statistics_of_64_bits_and_what_a_backend_makes_of_them():
    """JAX stores float32 in a layer of float64 unless it is told otherwise: rounded to what is there, and no refusal."""
    i = keras.Input((4,), dtype="float64")
    for method in METHODS:
        layer = L.BatchNormalization(dtype="float64", momentum=0.0, name="wide")
        model = keras.Model(i, layer(i))
        x = nets.data(70, (4,)).astype("f8") / 3
        (found,) = calibrate(model, x, batch_size=70, method=method).layers
        given = x.astype(numpy(layer.moving_variance.numpy()).dtype).astype("f8")
        mean, variance = nets.two_pass([given])
        unit = 3 * np.finfo(numpy(layer.moving_variance.numpy()).dtype).eps
        np.testing.assert_allclose(found.mean, mean, rtol=unit)
        np.testing.assert_allclose(found.variance, variance, rtol=unit)


def layers_of_more_than_one_number_per_channel_are_refused():
    if not KERAS_2:
        return
    i = keras.Input((8, 8, 4))
    for options, message in (({"virtual_batch_size": 8}, "virtual_batch_size"), ({"axis": [1, 3]}, "over 2 axes")):
        with pytest.raises(InvalidValue, match=rf"bn: .*{message}"):
            calibrate(keras.Model(i, L.BatchNormalization(name="bn", **options)(i)), nets.data(64, (8, 8, 4)))


def a_mask_that_a_wrapper_hands_on_to_the_layer_inside():
    """Keras 2's TimeDistributed looks at the arguments that call() names; what it does is seen in a spy with the same."""
    seen = []

    class Spy(L.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            if BACKEND != "tensorflow" or hasattr(inputs, "numpy"):  # not while the graph is made
                rows = numpy(inputs).reshape(-1, 3)
                seen.append(rows if mask is None else rows[numpy(mask).astype(bool).reshape(-1)])
            return super().call(inputs, training=training, mask=mask)

    x = nets.data(40, (5, 3))
    x[np.random.default_rng(0).random((40, 5)) < 0.3] = 0
    i = keras.Input((5, 3))
    masked = L.Masking()(i)
    counts = {}
    for kind in (Spy, L.BatchNormalization):
        model = keras.Model(i, L.TimeDistributed(kind(name="inner"), name="outer")(masked))
        for k in range(0, 40, 16):
            if kind is Spy:
                model(x[k : k + 16], training=False)
        rows = np.concatenate(seen)
        for method in ("population", "precise"):
            (layer,) = calibrate(model, x, batch_size=16, method=method).layers
            counts[kind, method] = layer.n
            mean, variance = nets.two_pass([rows])
            assert layer.n == len(rows), (layer.n, len(rows))
            np.testing.assert_allclose(layer.mean, mean, rtol=1e-5)
            np.testing.assert_allclose(layer.variance, variance, rtol=1e-5)
            seen[:] = [rows]
    assert len(rows) < 200 or not KERAS_2  # Keras 2 does hand it on


def random_numbers_that_the_framework_itself_draws():
    """Dropout in training inside a model without a graph: every round sees what one pass sees, and no state moves."""

    class Noisy(keras.Model):
        def __init__(self):
            super().__init__()
            self.drop = L.Dropout(0.5) if not KERAS_2 else L.Dropout(0.5, rng_type="stateful")
            self.first, self.second = L.BatchNormalization(name="first"), L.BatchNormalization(name="second")

        def call(self, x, training=False):
            x = self.first(self.drop(x, training=True), training=training)
            return self.second(x * x, training=training)

    x, model = nets.data(64, (4,)), Noisy()
    model(x[:2])
    calibrate(model, x, batch_size=16)
    if BACKEND == "torch":
        import torch

        before = torch.get_rng_state().numpy().tobytes()
        for method in METHODS:
            calibrate(model, torch.utils.data.DataLoader(x, batch_size=16), method=method)
            assert torch.get_rng_state().numpy().tobytes() == before, method
        calibrate(model, x, batch_size=16)
    nets.close_to_two_pass(model, x)


CHECKS = [
    a_mask_that_a_wrapper_hands_on_to_the_layer_inside,
    random_numbers_that_the_framework_itself_draws,
    a_layer_that_inference_calls_in_training_and_without_is_refused,
    statistics_of_64_bits_and_what_a_backend_makes_of_them,
    layers_of_more_than_one_number_per_channel_are_refused,
]
