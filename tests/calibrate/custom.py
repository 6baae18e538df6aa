"""Layers that people write, and what calibration makes of them: checks that every backend runs, see test_custom_layers.

Each function raises if a promise is broken. Expected values are of float64 NumPy, of Keras' own training mode, or of one
inference pass whose BatchNorm inputs are copied.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from bnport.calibrate.run import METHODS, calibrate
from bnport.errors import InvalidValue, Unrepresentable
from tests.calibrate import custom_calls, nets
from tests.calibrate.nets import L, keras, numpy

KERAS_2 = keras.__name__ == "tf_keras"
BACKEND = "tensorflow" if KERAS_2 else keras.backend.backend()


def agree(layer, rows, tolerance=1e-6):
    """Whether a layer holds the mean and the variance of rows (n, C)."""
    mean, variance = nets.two_pass([rows])
    held, spread = (numpy(v.numpy()).astype(float) for v in (layer.moving_mean, layer.moving_variance))
    rounding = np.spacing(np.abs(mean).astype("f4"))
    assert (np.abs(held - mean) <= tolerance * np.sqrt(variance) + rounding).all(), (held, mean)
    np.testing.assert_allclose(spread, variance, rtol=tolerance)


def tapped(model, x, size):
    """Copies of what reaches every BatchNormalization in one inference pass: id -> rows."""
    seen = {}
    original = L.BatchNormalization.call

    def call(self, inputs, *args, **kwargs):
        seen.setdefault(id(self), []).append(numpy(inputs).reshape(-1, inputs.shape[-1]).copy())
        return original(self, inputs, *args, **kwargs)

    L.BatchNormalization.call = call
    try:
        for k in range(0, len(x), size):
            model(x[k : k + size], training=False)
    finally:
        L.BatchNormalization.call = original
    return {key: np.concatenate(rows) for key, rows in seen.items()}


def a_layer_that_is_always_in_training():
    class Block(L.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.bn = L.BatchNormalization(name="inner")

        def build(self, shape):
            self.bn.build(shape)

        def call(self, x):
            return self.bn(x, training=True)

    i = keras.Input((4,))
    model = keras.Model(i, L.BatchNormalization(name="outer")(Block()(i)))
    x = nets.data(96, (4,))
    for method in ("population", "precise"):
        result = calibrate(model, x, batch_size=32, method=method)
        agree(model.layers[1].bn, x)
        batches = [x[k : k + 32].astype(float) for k in (0, 32, 64)]
        if method == "population":
            agree(model.layers[2], np.concatenate([(b - b.mean(0)) / np.sqrt(b.var(0) + 1e-3) for b in batches]))
        result.undo()


class Recurrent(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = (L.LSTM(4, stateful=True, return_sequences=True) for _ in range(2))
        self.first, self.second = L.BatchNormalization(name="first"), L.BatchNormalization(name="second")

    def call(self, x, training=False):
        x = self.first(self.one(x), training=training)
        return self.second(self.two(x), training=training)

    def reset(self):
        for layer in (self.one, self.two):
            getattr(layer, "reset_state", None)() if hasattr(layer, "reset_state") else layer.reset_states()


def states_of_recurrent_layers_inside_a_model_without_a_graph():
    x, model = nets.data(64, (5, 4), 1, 2), Recurrent()
    for method in METHODS:
        model(x[:16])
        model.reset()
        calibrate(model, x, batch_size=16, method=method)
        assert all(not numpy(v).any() for v in (*model.one.states, *model.two.states))
        seen = tapped(model, x, 16)
        if method in ("population", "precise"):
            agree(model.first, seen[id(model.first)])
        if method == "population":
            agree(model.second, seen[id(model.second)])


def a_recurrent_layer_at_two_places_is_refused():
    i = keras.Input(batch_shape=(16, 5, 4))
    shared = L.LSTM(4, stateful=True, return_sequences=True, name="memory")
    x = L.BatchNormalization()(shared(i))
    model = keras.Model(i, L.BatchNormalization()(shared(x)))
    before = nets.held(model)
    with pytest.raises(InvalidValue, match=r"memory: keeps a state.*several places.*method='precise'"):
        calibrate(model, nets.data(64, (5, 4)), batch_size=16)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))
    calibrate(model, nets.data(64, (5, 4)), batch_size=16, method="precise")


def a_mask_that_a_model_makes_itself():
    class Masking(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = L.BatchNormalization(name="bn")

        def call(self, x, training=False):
            mask = x[..., 0] < 4  # Keras 3 takes no training by position
            return self.bn(x, training, mask) if KERAS_2 else self.bn(x, training=training, mask=mask)

    x, model = nets.data(64, (10, 4)), Masking()
    model(x[:2])
    chosen = x[x[..., 0] < 4]
    for method in ("population", "precise"):
        result = calibrate(model, x, method=method)
        assert result["bn"].n == len(chosen)
        agree(model.bn, chosen)


class Doubling(L.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs * 2 + 1, training=training) - 5


class Alone(L.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return (inputs - self.moving_mean) / (self.moving_variance + self.epsilon) ** 0.5


def a_subclass_that_changes_its_input():
    x, i = nets.data(70, (6,)), keras.Input((6,))
    model = keras.Model(i, L.BatchNormalization(name="after", momentum=0.0)(Doubling(name="own", momentum=0.0)(i)))
    call = L.BatchNormalization.call
    found = {}
    for method in METHODS:
        result = calibrate(model, x, batch_size=70, method=method)
        found[method] = {layer.name: layer for layer in result.layers}
        agree(model.get_layer("own"), 2.0 * x + 1)
        result.undo()
    assert L.BatchNormalization.call is call
    model(x, training=True)
    for layers in found.values():
        for name, layer in layers.items():
            np.testing.assert_allclose(layer.mean, numpy(model.get_layer(name).moving_mean.numpy()), rtol=1e-5)
            np.testing.assert_allclose(layer.variance, numpy(model.get_layer(name).moving_variance.numpy()), rtol=1e-4)
    for method in METHODS:
        with pytest.raises(InvalidValue, match=r"lonely: its class Alone normalises without.*layers="):
            calibrate(keras.Model(i, Alone(name="lonely")(i)), x, method=method)
    assert L.BatchNormalization.call is call


def one_pass_layers_behind_a_mean_of_ten_thousand_deviations():
    """BatchNorm on axis 1, Dense, masked BatchNorm: the batch statistics of all of them, in float64."""
    i = keras.Input((3, 8))
    y = L.BatchNormalization(axis=1, name="one", momentum=0.7)(i)
    y = L.BatchNormalization(name="two", scale=False, momentum=0.8)(L.Dense(5, name="dense")(y))
    y = L.BatchNormalization(name="three", center=False, momentum=0.9)(L.ReLU()(y))
    model = nets.stir(keras.Model(i, y))
    x = nets.data(70, (3, 8), 1e4, 1.0)
    layers = {name: model.get_layer(name) for name in ("one", "two", "three")}
    weights = {n: (numpy(b.gamma) if b.scale else 1, numpy(b.beta) if b.center else 0) for n, b in layers.items()}
    dense = [numpy(w).astype(float) for w in model.get_layer("dense").weights]
    seen = {name: [] for name in layers}

    def normalised(name, rows):
        mean, variance = rows.mean(0), ((rows - rows.mean(0)) ** 2).mean(0)
        seen[name].append((len(rows), mean, variance))
        gamma, beta = weights[name]
        return (rows - mean) / np.sqrt(variance + layers[name].epsilon) * gamma + beta

    for batch in nets.batches_of(x.astype(float), 16):
        y = np.moveaxis(normalised("one", np.moveaxis(batch, 1, -1).reshape(-1, 3)).reshape(-1, 8, 3), -1, 1)
        y = normalised("two", (y @ dense[0] + dense[1]).reshape(-1, 5))
        normalised("three", np.maximum(y, 0))
    for method in ("precise", "average", "moving"):
        result = calibrate(model, x, batch_size=16, method=method)
        for name, batches in seen.items():
            total = sum(n for n, _, _ in batches)
            mean, variance = (sum(b[0] / total * b[k] for b in batches) for k in (1, 2))
            if method == "precise":
                variance = sum(n / total * (v + (m - mean) ** 2) for n, m, v in batches)
            if method == "moving":
                mean, variance, keep = result[name].old_mean, result[name].old_variance, layers[name].momentum
                for _, m, v in batches:
                    mean, variance = keep * mean + (1 - keep) * m, keep * variance + (1 - keep) * v
            off = np.abs(result[name].mean - mean) - np.spacing(np.abs(mean).astype("f4"))
            assert (off <= 5e-7 * np.sqrt(variance)).all(), (method, name, off)
            np.testing.assert_allclose(result[name].variance, variance, rtol=5e-7, err_msg=f"{method} {name}")
        result.undo()


def what_one_pass_layers_hand_on_is_keras_training_output():
    """Of every dtype policy, with and without gamma and beta, on both kinds of axis: dtype, mask and values."""
    from bnport.calibrate.models import LiveModel
    from bnport.calibrate.onepass import OnePass

    policies = ["float32", "mixed_float16", "mixed_bfloat16", *([] if BACKEND == "jax" else ["float64"])]
    for policy in policies:
        for options in ({}, {"scale": False, "axis": 1}, {"center": False}, {"scale": False, "center": False}):
            layer = L.BatchNormalization(
                dtype=policy if not KERAS_2 else keras.mixed_precision.Policy(policy), **options
            )
            i = keras.Input((3, 3), dtype="float64" if policy == "float64" else "float32")
            model = keras.Model(i, layer(i))
            rng = np.random.default_rng(0)
            for vector in (layer.gamma if layer.scale else None, layer.beta if layer.center else None):
                if vector is not None:
                    vector.assign(rng.normal(0, 1, 3).astype("f4"))
            live = LiveModel(model)
            given = []

            def call(inputs, given=given, own=layer.call, **options):
                given.append(inputs)
                return own(inputs, **options)

            layer.call = call
            expected = layer(
                live.tensor(nets.data(40, (3, 3), 1, 2).astype(i.dtype if not KERAS_2 else i.dtype.name)), training=True
            )
            del layer.call
            one = OnePass(live, live.norms, "precise")
            ours = one._normalised(live.norms[0], given[-1], live.moments(live.norms[0], given[-1]))
            assert str(ours.dtype) == str(expected.dtype), (policy, options)
            tolerance = {"mixed_float16": 2e-3, "mixed_bfloat16": 1.6e-2}.get(policy, 2e-6)
            a, b = (numpy(live.cast(t, "float32")) for t in (ours, expected))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"{policy} {options}")


def statistics_of_sixteen_bits():
    i = keras.Input((4,))
    for dtype, unit in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        model = keras.Model(i, L.BatchNormalization(dtype=dtype, name="half", epsilon=1e-3)(i))
        x = nets.data(70, (4,))
        result = calibrate(model, x)
        (note,) = [note for note in result.notes if dtype in note]
        assert note.startswith("half: ")
        said = float(note.split("up to ")[1].split()[0])
        rounded = keras.ops.cast(keras.ops.cast(x, dtype), "float32")  # what the layer is given
        exact = numpy(rounded).astype(float).var(0)
        assert said == pytest.approx((np.abs(result["half"].variance - exact) / (exact + 1e-3)).max(), rel=0.06)
        assert 0 < said < unit
    for epsilon, spread, fits in ((0.0, 1e-5, False), (1e-9, 1.7e-4, False), (1e-3, 1e-5, True)):
        model = keras.Model(i, L.BatchNormalization(dtype="float16", name="half", epsilon=epsilon)(i))
        before = nets.held(model)
        x = np.random.default_rng(0).normal(0, spread, (400, 4)).astype("f4")
        if fits:
            calibrate(model, x)
            continue
        with pytest.raises(Unrepresentable, match=r"half: a variance of .* float16 variables, and epsilon.*float32"):
            calibrate(model, x)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))
    wide = keras.Model(i, L.BatchNormalization(dtype="mixed_float16")(i))
    assert not any("rounded" in note for note in calibrate(wide, nets.data(70, (4,))).notes)


def nothing_else_changes():
    class Counting(L.Layer):
        def build(self, shape):
            self.n = self.add_weight(shape=(), initializer="zeros", trainable=False, name="n")
            self.metric = keras.metrics.Mean()
            if BACKEND == "tensorflow":
                import tensorflow as tf

                self.plain = tf.Variable(2.0)
            if BACKEND == "torch":
                import torch

                self.register_buffer("plain", torch.tensor(2.0))
            self.built = True

        def call(self, x):
            self.n.assign(self.n + 1)
            self.metric.update_state(x)
            if BACKEND == "tensorflow":
                self.plain.assign_add(1.0)
            if BACKEND == "torch":
                self.plain += 1.0
            if KERAS_2:
                self.add_metric(x[:, 0], name="added", aggregation="mean")
                return x
            return x + 0.01 * keras.random.normal((4,))

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    i = keras.Input((4,))
    counting = Counting()
    model = keras.Model(i, L.BatchNormalization()(counting(i)))
    model.compile("sgd", "mse")
    x = nets.data(70, (4,))
    if BACKEND != "jax":  # it compiles evaluate, and there draws nothing unseeded
        model.evaluate(x, x, verbose=0)

    def everything():
        variables = [counting.n, *counting.metric.variables, *[v for m in model.metrics for v in m.variables]]
        found = [numpy(v.numpy()).tobytes() for v in variables]
        if hasattr(counting, "plain"):
            found.append(float(counting.plain))
        if not KERAS_2:
            found.append(numpy(keras.src.random.seed_generator.global_seed_generator().state.numpy()).tobytes())
        return found

    before = everything()

    def stopping(done, total, what):
        raise KeyboardInterrupt

    for method in METHODS:
        result = calibrate(model, x, batch_size=16, method=method)
        assert everything() == before, method
        result.undo()
        assert everything() == before, method
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, x, batch_size=16, method=method, progress=stopping)
        assert everything() == before, method


def a_trainable_weight_that_a_layer_writes_to():
    class Writing(L.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(), initializer="ones", name="w")
            self.built = True

        def call(self, x):
            self.w.assign(self.w * 2)
            return x

    i = keras.Input((4,))
    layer = Writing(name="writing")
    model = keras.Model(i, L.BatchNormalization()(layer(i)))
    layer.w.assign(1.0)
    before = nets.held(model)[1:]
    if BACKEND == "torch":
        with pytest.raises(InvalidValue, match="writing: writes to its own trainable weights"):
            calibrate(model, nets.data(70, (4,)))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model)[1:], strict=True))
    else:
        calibrate(model, nets.data(70, (4,)))
        assert float(layer.w.numpy()) == 1.0


def layers_that_work_in_place():
    if BACKEND != "torch":
        return
    import torch

    class InPlace(L.Layer):
        def call(self, x):
            return torch.relu_(x)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    i = keras.Input((64,))
    x = nets.data(2000, (64,), 0, 2)
    given = x.copy()
    for twice in (False, True):
        y = L.Dense(64, name="dense")(i)
        a = L.BatchNormalization(name="a")(y)
        b = InPlace(name="relu")(L.Reshape((64,))(y))  # a view of the same memory
        if twice:  # then the first of them is deeper than `a`, and inference runs it before
            b = InPlace()(InPlace()(b))
        model = keras.Model(i, L.BatchNormalization(name="end")(L.Add()([a, b])))
        if twice:
            with pytest.raises(InvalidValue, match=r"relu: writes to the tensor that it is given, which a reads after"):
                calibrate(model, x, batch_size=250)
            continue
        calibrate(model, x, batch_size=250)
        seen = tapped(model, x, 250)
        for name in ("a", "end"):
            agree(model.get_layer(name), seen[id(model.get_layer(name))])

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = L.BatchNormalization(name="a"), L.BatchNormalization(name="b")

        def call(self, x, training=False):
            return self.b(self.a(torch.relu_(x), training=training) + x, training=training)

    net = Net()
    net(x[:2].copy())
    for method in ("population", "precise"):
        calibrate(net, x, method=method)
        assert x.tobytes() == given.tobytes()
        agree(net.a, np.maximum(x, 0))


CHECKS = [
    a_layer_that_is_always_in_training,
    states_of_recurrent_layers_inside_a_model_without_a_graph,
    a_recurrent_layer_at_two_places_is_refused,
    a_mask_that_a_model_makes_itself,
    a_subclass_that_changes_its_input,
    one_pass_layers_behind_a_mean_of_ten_thousand_deviations,
    what_one_pass_layers_hand_on_is_keras_training_output,
    *([] if KERAS_2 else [statistics_of_sixteen_bits]),
    nothing_else_changes,
    a_trainable_weight_that_a_layer_writes_to,
    layers_that_work_in_place,
    *custom_calls.CHECKS,
]

if __name__ == "__main__":
    import traceback

    failed = 0
    for check in CHECKS:
        try:
            check()
        except BaseException:
            failed += 1
            print("FAILED", check.__name__)
            traceback.print_exc()
    os._exit(1) if failed else print("all held")
