"""A Keras CNN trained on scikit-learn's digits: statistics destroyed and recovered; two trainings averaged."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate.run import calibrate
from tests.calibrate.nets import L, keras, norms


@pytest.fixture(scope="module")
def digits():
    """(training images, labels, test images, labels): 1200 and 597 of 8 x 8."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).reshape(-1, 8, 8, 1).astype("float32"), labels[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def network():
    i = keras.Input((8, 8, 1))
    x = i
    for channels, strides in ((16, 1), (32, 2), (32, 1)):
        x = L.Conv2D(channels, 3, strides=strides, padding="same", use_bias=False)(x)
        x = L.ReLU()(L.BatchNormalization(momentum=0.9)(x))
    return keras.Model(i, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def train(model, digits, epochs, seed):
    keras.utils.set_random_seed(seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    model.fit(digits[0], digits[1], epochs=epochs, batch_size=64, verbose=0)


def accuracy(model, digits):
    return float((model.predict(digits[2], verbose=0).argmax(1) == digits[3]).mean())


def destroy(model):
    for layer in norms(model):
        layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
        layer.moving_variance.assign(np.ones(layer.moving_mean.shape))


def test_a_trained_networks_statistics_are_recovered_by_every_method(digits, capsys):
    keras.utils.set_random_seed(0)
    model = network()
    train(model, digits, 5, 0)
    original = accuracy(model, digits)
    destroy(model)
    found = {"original": original, "destroyed": accuracy(model, digits)}
    for method in ("population", "precise", "average", "moving"):
        destroy(model)
        images = digits[0]
        if method == "moving":  # 0.9 of the old is kept in every batch: one pass of 19 would leave 13 % of the damage
            images = np.concatenate([images] * 10)
        calibrate(model, images, method=method, batch_size=64)
        found[method] = accuracy(model, digits)
    with capsys.disabled():
        print("\ndigits accuracy:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert original > 0.9
    assert found["destroyed"] < 0.6
    for method in ("population", "precise", "average", "moving"):
        assert found[method] > original - 0.02, method


def test_averaged_weights_need_statistics_of_their_own(digits, capsys):
    keras.utils.set_random_seed(0)
    model = network()
    start, members, scores = model.get_weights(), [], []
    for seed in (1, 2):
        model.set_weights(start)
        train(model, digits, 6, seed)
        members.append(model.get_weights())
        scores.append(accuracy(model, digits))
    model.set_weights([(a + b) / 2 for a, b in zip(*members, strict=True)])
    averaged = accuracy(model, digits)
    calibrate(model, digits[0], batch_size=64)
    calibrated = accuracy(model, digits)
    with capsys.disabled():
        print(f"\ndigits, two trainings {scores[0]:.3f} and {scores[1]:.3f}; their weights and statistics averaged"
              f" {averaged:.3f}; the same with population statistics {calibrated:.3f}")  # fmt: skip
    assert calibrated > averaged
