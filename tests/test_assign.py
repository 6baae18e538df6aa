"""bnport.set_weights against what Keras and torch then hold and compute."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import pytest
import torch

import bnport
from bnport.errors import InvalidValue, NotFound, Question

C = 5
GAMMA, BETA = np.float32([1, -2, 3, 0.5, 1]), np.float32([0, 1, -1, 2, 3])
MEAN, VARIANCE = np.float32([0.5, -1, 2, 0, 7]), np.float32([1e-6, 1, 4, 9, 0.25])


def keras_layer(**config):
    layer = keras.layers.BatchNormalization(**config)
    layer.build((None, C))
    return layer


def test_gamma_and_beta_alone_change_nothing_else():
    layer = keras_layer()
    layer.set_weights([GAMMA * 0 + 2, BETA, MEAN, VARIANCE])
    record = bnport.set_weights(layer, gamma=GAMMA, beta=BETA)
    for got, expected in zip(layer.get_weights(), (GAMMA, BETA, MEAN, VARIANCE), strict=True):
        assert got.tobytes() == expected.tobytes()
    assert record.gamma.tobytes() == GAMMA.tobytes()
    assert layer.epsilon == 1e-3


@pytest.mark.parametrize("field", ["gamma", "beta", "mean", "variance"])
def test_each_field_reaches_its_own_variable(field):
    layer = keras_layer()
    before = dict(zip(("gamma", "beta", "mean", "variance"), layer.get_weights(), strict=True))
    value = np.float32([0.5, 0.25, 2, 3, 4])
    bnport.set_weights(layer, **{field: value})
    after = dict(zip(("gamma", "beta", "mean", "variance"), layer.get_weights(), strict=True))
    for name, array in after.items():
        assert array.tobytes() == (value if name == field else before[name]).tobytes()


def test_a_std_is_stored_as_its_square():
    layer = keras_layer()
    bnport.set_weights(layer, mean=MEAN, std=[0.5, 1, 2, 3, 4])
    assert layer.get_weights()[3].tolist() == [0.25, 1, 4, 9, 16]


def test_the_output_is_the_formula_also_in_predict_and_with_a_new_epsilon():
    layer = keras_layer()
    model = keras.Sequential([keras.Input((C,)), layer])
    x = np.random.default_rng(0).normal(size=(6, C)).astype(np.float32)
    model.predict(x, verbose=0)
    record = bnport.set_weights(model, gamma=GAMMA, beta=BETA, mean=MEAN, variance=VARIANCE, epsilon=0.125)
    assert layer.epsilon == 0.125
    for y in (model.predict(x, verbose=0), np.asarray(model(x)), model.predict(x[:2], verbose=0)):
        assert (np.abs(y - record(x[: len(y)])) <= record.error_bound(x[: len(y)])).all()


def test_a_torch_layer_is_set_in_the_same_words():
    layer = torch.nn.BatchNorm2d(C)
    bnport.set_weights(layer, gamma=GAMMA, mean=torch.from_numpy(MEAN), std=np.sqrt(VARIANCE.astype(np.float64)))
    assert layer.weight.detach().numpy().tobytes() == GAMMA.tobytes()
    assert layer.running_mean.numpy().tobytes() == MEAN.tobytes()
    assert layer.running_var.numpy().tobytes() == VARIANCE.tobytes()
    assert layer.bias.detach().numpy().tolist() == [0] * C


def test_a_layer_of_a_model_is_named_and_an_unnamed_one_is_asked_for():
    model = keras.Sequential(
        [keras.Input((C,)), keras.layers.BatchNormalization(name="a"), keras.layers.BatchNormalization(name="b")]
    )
    bnport.set_weights(model, "b", beta=BETA)
    assert model.get_layer("b").get_weights()[1].tobytes() == BETA.tobytes()
    assert not model.get_layer("a").get_weights()[1].any()
    with pytest.raises(Question, match="2 BatchNorm layers"):
        bnport.set_weights(model, beta=BETA)
    with pytest.raises(NotFound, match="'c'"):
        bnport.set_weights(model, "c", beta=BETA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": [1, 2, 3]}, r"expected shape \(5,\), got \(3,\)"),
        ({"gamma": np.ones((1, C))}, "flatten"),
        ({"gamma": 1.0}, "one number for each channel"),
        ({"beta": [0, np.nan, 0, 0, 0]}, "channel 1 is nan"),
        ({"mean": [0, 0, np.inf, 0, 0]}, "channel 2 is inf"),
        ({"variance": [1, 1, 1, 1, -0.5], "mean": MEAN}, "variance .* must be positive.*never negative"),
        ({"variance": [1] * C, "std": [1] * C}, "both variance and std"),
        ({"std": [1, 1, 1, 1, -1]}, "never negative"),
        ({"epsilon": -1}, "epsilon"),
        ({"gamma": ["a"] * C}, "expected numbers"),
        ({"gamma": np.ones(C, complex)}, "expected numbers"),
        ({"gamma": np.ma.masked_array(np.ones(C), [0, 1, 0, 0, 1])}, "layer '.*': gamma: channels 1, 4 masked"),
        ({"std": np.ma.masked_less(np.arange(C) + 1.0, 2)}, "std: channel 0 masked"),
        ({}, "nothing to set"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(arguments, message):
    layer = keras_layer()
    before = [w.tobytes() for w in layer.get_weights()]
    with pytest.raises(InvalidValue, match=message):
        bnport.set_weights(layer, **arguments)
    assert [w.tobytes() for w in layer.get_weights()] == before
    assert layer.epsilon == 1e-3


def test_a_masked_array_without_a_masked_value_is_an_array():
    layer = keras_layer()
    bnport.set_weights(layer, gamma=np.ma.masked_array(GAMMA, mask=False), beta=np.ma.masked_array(BETA))
    assert layer.get_weights()[0].tolist() == np.float32(GAMMA).tolist()
    assert layer.get_weights()[1].tolist() == np.float32(BETA).tolist()


def test_an_unbuilt_layer_is_refused_with_what_to_do():
    with pytest.raises(InvalidValue, match=r"not built yet.*build"):
        bnport.set_weights(keras.layers.BatchNormalization(), gamma=GAMMA)


def test_a_gamma_for_a_layer_without_one_is_refused():
    with pytest.raises(InvalidValue, match=r"no gamma.*scale=False"):
        bnport.set_weights(keras_layer(scale=False), gamma=GAMMA)


@pytest.mark.parametrize(
    ("gamma", "why"),
    [
        (70000, "does not fit float16.*float32 holds it"),
        (1e39, "does not fit float16.*float64 holds it"),
        (1e-9, "underflow in float16.*float32 holds them"),
    ],
)
def test_a_value_beyond_the_layers_dtype_is_refused_with_the_layers_name_and_what_would_hold_it(gamma, why):
    layer = keras_layer(dtype="float16")
    with pytest.raises(ValueError, match=f"layer '{layer.name}': .*{why}"):
        bnport.set_weights(layer, gamma=[gamma] * C)


def test_a_file_is_not_changed_in_place():
    with pytest.raises(InvalidValue, match="convert"):
        bnport.set_weights("model.keras", gamma=GAMMA)


def test_swapped_mean_and_variance_are_asked_about():
    layer = keras_layer(epsilon=2.0)
    variance = [0.1, -1, 0.5, 0.2, 1]
    with pytest.raises(Question, match="swapped"):
        bnport.set_weights(layer, mean=np.abs(VARIANCE), variance=variance)
    bnport.set_weights(layer, mean=np.abs(VARIANCE), variance=variance, sure=True)
    assert layer.get_weights()[3].tolist() == np.float32(variance).tolist()


def test_statistics_swapped_against_what_the_layer_held_are_asked_about():
    layer = keras_layer()
    layer.set_weights([GAMMA, BETA, np.float32([10, 20, 30, 40, 50]), np.float32([0.1, 0.2, 0.3, 0.4, 0.5])])
    with pytest.raises(Question, match="swapped"):
        bnport.set_weights(layer, mean=[0.11, 0.19, 0.31, 0.4, 0.5], variance=[11, 19, 31, 41, 49])


@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # the std that everybody uses for ImageNet
        ([123.68, 116.78, 103.94], [58.4, 57.12, 57.38]),
    ],
)
def test_the_std_of_images_given_as_a_variance_is_asked_about(mean, variance):
    layer = keras.layers.BatchNormalization()
    layer.build((None, 3))
    with pytest.raises(Question, match="standard deviation"):
        bnport.set_weights(layer, mean=mean, variance=variance)
    bnport.set_weights(layer, mean=mean, std=variance)
    assert np.allclose(layer.get_weights()[3], np.square(variance))
    fresh = keras.layers.BatchNormalization()
    fresh.build((None, 3))
    with pytest.raises(Question, match="looks like a variance"):
        bnport.set_weights(fresh, mean=mean, std=np.square(variance))
    bnport.set_weights(fresh, mean=mean, variance=np.square(variance))


def test_a_std_of_trained_statistics_given_as_a_variance_is_asked_about():
    layer = keras_layer()
    old = np.float32([100, 400, 0.01, 25, 9])
    layer.set_weights([GAMMA, BETA, MEAN, old])
    with pytest.raises(Question, match="standard deviation"):
        bnport.set_weights(layer, variance=np.sqrt(old) * 1.05)
    with pytest.raises(Question, match="looks like a variance"):
        bnport.set_weights(layer, std=old * 0.95)
    bnport.set_weights(layer, variance=old * 1.3)
    bnport.set_weights(layer, std=np.sqrt(old))
