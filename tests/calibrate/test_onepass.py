"""The one-pass methods against torch's update_bn, Keras' own training calls, and float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate import onepass
from bnport.calibrate.models import LiveModel
from bnport.calibrate.run import calibrate
from bnport.errors import InvalidValue
from tests.calibrate import nets
from tests.calibrate.nets import L, keras


def chain():
    i = keras.Input((6,))
    x = L.BatchNormalization(name="one", momentum=0.9)(L.Dense(5)(i))
    x = L.BatchNormalization(name="two", momentum=0.8)(L.Dense(4)(L.ReLU()(x)))
    return nets.stir(keras.Model(i, L.Dense(3)(x)))


def as_torch(model):
    """The same network in torch, with the same weights."""
    import torch

    modules = []
    for layer in model.layers:
        if isinstance(layer, L.Dense):
            module = torch.nn.Linear(*layer.kernel.shape)
            module.weight.data = torch.tensor(np.asarray(layer.kernel).T.copy())
            module.bias.data = torch.tensor(np.asarray(layer.bias))
        elif isinstance(layer, L.BatchNormalization):
            module = torch.nn.BatchNorm1d(layer.gamma.shape[0], eps=layer.epsilon, momentum=1 - layer.momentum)
            module.weight.data, module.bias.data = (torch.tensor(np.asarray(v)) for v in (layer.gamma, layer.beta))
            module.running_mean.copy_(torch.tensor(np.asarray(layer.moving_mean)))
            module.running_var.copy_(torch.tensor(np.asarray(layer.moving_variance)))
        elif isinstance(layer, L.ReLU):
            module = torch.nn.ReLU()
        else:
            continue
        modules.append(module)
    return torch.nn.Sequential(*modules)


def batches_seen(model, x, size):
    """What each layer sees when the ones before it normalise by their batch: training calls of a copy. name -> [array]."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    seen = {}
    for batch in nets.batches_of(x, size):
        y = batch.astype("f8")
        for layer in copy.layers[1:]:
            if isinstance(layer, L.BatchNormalization):
                seen.setdefault(layer.name, []).append(y)
                gamma, beta = np.asarray(layer.gamma, "f8"), np.asarray(layer.beta, "f8")
                y = (y - y.mean(0)) / np.sqrt(y.var(0) + layer.epsilon) * gamma + beta
            elif isinstance(layer, L.Dense):
                y = y @ np.asarray(layer.kernel, "f8") + np.asarray(layer.bias, "f8")
            else:
                y = np.maximum(y, 0)
    return seen


def test_average_is_torchs_update_bn_where_all_batches_have_one_size():
    import torch

    model, x = chain(), nets.data(64, (6,))
    peer = as_torch(model)
    torch.optim.swa_utils.update_bn([torch.tensor(b) for b in nets.batches_of(x, 16)], peer)
    result = calibrate(model, x, batch_size=16, method="average", unbiased=True)
    ours = [result["one"], result["two"]]
    for layer, module in zip(ours, [m for m in peer if isinstance(m, torch.nn.BatchNorm1d)], strict=True):
        np.testing.assert_allclose(layer.mean, module.running_mean.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.variance, module.running_var.numpy(), rtol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_average_weights_a_short_last_batch_by_its_size(unbiased):
    model, x = chain(), nets.data(70, (6,))
    result = calibrate(model, x, batch_size=16, method="average", unbiased=unbiased)
    for name, batches in batches_seen(model, x, 16).items():
        weights = np.array([len(b) for b in batches]) / 70
        np.testing.assert_allclose(result[name].mean, weights @ [b.mean(0) for b in batches], rtol=1e-5, atol=1e-6)
        variances = [b.var(0, ddof=int(unbiased)) for b in batches]
        np.testing.assert_allclose(result[name].variance, weights @ variances, rtol=1e-5)
    assert (
        np.max(np.abs(result["one"].mean - np.mean([b.mean(0) for b in batches_seen(model, x, 16)["one"]], axis=0)))
        > 0.1
    )


def test_precise_pools_the_moments_of_all_batches():
    model, x = chain(), nets.data(70, (6,))
    result = calibrate(model, x, batch_size=16, method="precise")
    for name, batches in batches_seen(model, x, 16).items():
        every = np.concatenate(batches)
        np.testing.assert_allclose(result[name].mean, every.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result[name].variance, every.var(0), rtol=2e-6)


def test_moving_is_what_training_calls_leave_behind():
    model, x = chain(), nets.data(70, (6,))
    result = calibrate(model, x, batch_size=16, method="moving")
    ours = {layer.name: layer for layer in result.layers}
    result.undo()
    for batch in nets.batches_of(x, 16):
        model(batch, training=True)
    for name, layer in ours.items():
        np.testing.assert_allclose(layer.mean, model.get_layer(name).moving_mean.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.variance, model.get_layer(name).moving_variance.numpy(), rtol=1e-5)


def masked():
    """Behind the first layer the mask ends, and the second sees what the first makes of positions that are masked."""
    i = keras.Input((5, 3))
    x = L.BatchNormalization(name="first")(L.Masking()(i))
    return nets.stir(keras.Model(i, L.BatchNormalization(name="second")(L.Dense(4)(L.Flatten()(x)))))


def parts():
    """Layers that are selected, frozen, and not asked for, on a path."""
    model = nets.branches()
    model.get_layer("left").trainable = False
    return model


@pytest.mark.parametrize(
    ("build", "layers", "shape"), [(masked, None, (5, 3)), (parts, ["left", "right", "fine"], (8, 8, 3))]
)
@pytest.mark.parametrize("method", ["precise", "average", "moving"])
def test_what_a_batch_gives_does_not_depend_on_the_batches_before_it(build, layers, shape, method, monkeypatch):
    model = build()
    batches = [nets.data(16, shape, seed=k) * (k + 1) for k in range(4)]
    batches[2][:] = 0  # the mask leaves nothing of it
    values = {}
    add = onepass.Kept.add

    def spy(kept, call):
        values[kept.norm.name].append(call.to_bytes())
        add(kept, call)

    monkeypatch.setattr(onepass.Kept, "add", spy)

    def seen(order):
        values.clear()
        values.update({norm.name: [] for norm in LiveModel(model).norms})
        calibrate(model, iter([batches[k] for k in order]), method=method, layers=layers).undo()
        return {name: {k: calls[at] for at, k in enumerate(order)} for name, calls in values.items() if calls}

    expected = seen([0, 1, 2, 3])
    assert set(expected) == ({"first", "second"} if layers is None else {"right", "fine"})
    for order in ([3, 2, 1, 0], [1, 2, 0, 3], [2, 0, 3, 1]):
        assert seen(order) == expected


def test_with_one_batch_of_everything_all_methods_agree_with_a_training_call():
    model, x = nets.branches(), nets.data()
    found = {}
    for method in ("population", "precise", "average"):
        result = calibrate(model, x, batch_size=len(x), method=method)
        found[method] = {layer.name: layer for layer in result.layers}
        result.undo()
    for layer in nets.norms(model):
        layer.momentum = 0.0
    dropouts = [layer for layer in model.layers if isinstance(layer, L.Dropout)]
    for layer in dropouts:
        layer.rate = 0.0
    model(x, training=True)
    for layer in nets.norms(model):
        for method, layers in found.items():
            ours = layers[layer.name]
            np.testing.assert_allclose(ours.mean, layer.moving_mean.numpy(), rtol=1e-4, atol=1e-4, err_msg=method)
            np.testing.assert_allclose(ours.variance, layer.moving_variance.numpy(), rtol=1e-4, err_msg=method)


@pytest.mark.parametrize("method", ["precise", "average", "moving"])
def test_layers_that_are_not_asked_for_normalise_by_what_they_hold(method):
    model, x = chain(), nets.data(64, (6,))
    result = calibrate(model, x, batch_size=64, method=method, layers="two")
    (seen,) = nets.tapped(model, x, 64)[id(model.get_layer("two"))]
    keep = 0.8 if method == "moving" else 0.0
    want = result["two"].old_mean * keep + (1 - keep) * seen.astype(float).mean(0)
    np.testing.assert_allclose(result["two"].mean, want, rtol=1e-5, atol=1e-6)
    assert result.left["not asked for"] == ["one"]


def test_a_subclassed_model_gives_the_same_bits_as_the_functional_one():
    functional, x = nets.branches(), nets.data()
    model = nets.Subclassed(functional)
    model(x[:2])
    for method in ("precise", "average", "moving"):
        result = calibrate(functional, x, batch_size=16, method=method)
        expected = nets.held(functional)
        result.undo()
        result = calibrate(model, x, batch_size=16, method=method)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(functional), strict=True))
        result.undo()


def test_a_batch_of_one_has_no_unbiased_variance_and_nothing_changes():
    model, x = chain(), nets.data(65, (6,))
    before = nets.held(model)
    with pytest.raises(InvalidValue, match="one: a batch with one number per channel"):
        calibrate(model, x, batch_size=32, method="average", unbiased=True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))
    assert calibrate(model, x, batch_size=32, method="precise", unbiased=True)["one"].n == 65


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("method", ["population", "precise"])
def test_a_layer_inside_a_tf_function_is_reached(hidden, method):
    import tensorflow as tf

    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = L.BatchNormalization(name="bn")

        @tf.function
        def call(self, x, training=None):
            return self.bn(x, training=training)

    outside = {}

    class Hidden(Compiled):
        def call(self, x, training=None):
            if "function" not in outside:  # known to no layer, and traced before anything is looked into
                outside["function"] = tf.function(lambda x: self.bn(x, training=False))
            return outside["function"](x)

    model, x = (Hidden if hidden else Compiled)(), nets.data(40, (4,))
    model.bn.build((None, 4))
    model(x)
    result = calibrate(model, x, method=method)
    np.testing.assert_allclose(result["bn"].variance, x.astype(float).var(0), rtol=1e-6)
    assert not tf.config.functions_run_eagerly()


def test_operations_that_keras_compiles_stay_compiled():
    """TensorFlow has no eager kernel for 3-D convolutions with the channels first on a CPU."""
    import tensorflow as tf

    i = keras.Input((2, 5, 5, 5))
    x = L.BatchNormalization(axis=1, name="bn")(L.Conv3D(3, 2, data_format="channels_first")(i))
    model, x = nets.stir(keras.Model(i, x)), nets.data(40, (2, 5, 5, 5))
    seen = {}
    original = tf.config.run_functions_eagerly
    tf.config.run_functions_eagerly = lambda flag: seen.setdefault("flag", flag)
    try:
        for method in ("population", "precise"):
            calibrate(model, x, method=method)
    finally:
        tf.config.run_functions_eagerly = original
    assert not seen
