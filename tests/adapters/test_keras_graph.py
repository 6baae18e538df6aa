"""Kernels and inputs of BatchNormalization layers, against models whose graph is known and Keras' own kernels."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import pytest
import tf_keras

import bnport


def residual(package):
    """a -> (b -> c) + skip d -> e, with a nested model (two inputs, two outputs), a shared layer and a wrapper."""
    L = package.layers
    left, right = package.Input((4, 4, 4)), package.Input((4, 4, 4))
    inner = package.Model([left, right], [L.BatchNormalization(name="x")(left), L.ReLU()(right)], name="two")
    inputs = package.Input((4, 4, 3))
    a = L.BatchNormalization(name="a")(L.Conv2D(4, 3, padding="same", name="ca")(inputs))
    b = L.BatchNormalization(name="b")(L.DepthwiseConv2D(3, padding="same", name="cb")(L.ReLU()(a)))
    c = L.BatchNormalization(name="c")(L.Dropout(0.1)(L.SeparableConv2D(4, 3, padding="same", name="cc")(b)))
    d = L.BatchNormalization(name="d")(L.Conv2D(4, 1, groups=2, name="cd")(a))
    e = L.Add()([c, d])
    p, q = inner([e, a])
    shared = L.BatchNormalization(name="shared")
    f = L.Concatenate()([shared(p), shared(q)])
    seq = package.Sequential(
        [package.Input((4, 4, 8)), L.Conv2DTranspose(4, 3, padding="same", name="ct"), L.BatchNormalization(name="s1"),
         L.ReLU(), L.BatchNormalization(name="s2")], name="seq",
    )  # fmt: skip
    g = L.TimeDistributed(L.BatchNormalization(name="t"), name="td")(seq(f))
    h = L.BatchNormalization(name="h")(L.Dense(6, name="dense")(L.Flatten()(g)))
    return package.Model(inputs, h)


INPUTS = {
    "a": (), "b": ("a",), "c": ("b",), "d": ("a",), "two/x": ("c", "d"), "shared": ("a", "two/x"), "seq/s1": ("shared",),
    "seq/s2": ("seq/s1",), "td/t": ("seq/s2",), "h": ("td/t",),
}  # fmt: skip
KERNELS = {
    "a": ("conv", (4, 3, 3, 3)), "b": ("depthwise", (4, 1, 3, 3)), "c": ("separable", (4, 4, 1, 1)),
    "d": ("grouped", (4, 2, 1, 1)), "seq/s1": ("transposed", (4, 8, 3, 3)), "h": ("dense", (6, 64)),
}  # fmt: skip


def saved(package, how, tmp_path):
    model = residual(package)
    if how == "live":
        return model, model
    path = str(tmp_path / how)
    model.save(path)
    return model, path


@pytest.mark.parametrize("how", ["m.keras", "m.h5", "live"])
@pytest.mark.parametrize("package", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_inputs_and_kernels_are_those_of_the_graph(package, how, tmp_path):
    model, source = saved(package, how, tmp_path)
    layers = bnport.read(source)
    assert {name: set(layer.inputs) for name, layer in layers.items()} == {k: set(v) for k, v in INPUTS.items()}
    kernels = {name: layer.kernel for name, layer in layers.items() if layer.kernel}
    assert {name: (k.kind, k.shape) for name, k in kernels.items()} == KERNELS
    by_name = {layer.name: layer for layer in model._flatten_layers()}
    for name, layer, weight, axes in (
        ("a", "ca", 0, (3, 2, 0, 1)), ("b", "cb", 0, (2, 3, 0, 1)), ("c", "cc", 1, (3, 2, 0, 1)),
        ("d", "cd", 0, (3, 2, 0, 1)), ("seq/s1", "ct", 0, (2, 3, 0, 1)), ("h", "dense", 0, (1, 0)),
    ):  # fmt: skip
        theirs = by_name[layer].get_weights()[weight].transpose(axes)
        assert kernels[name].values().tobytes() == np.ascontiguousarray(theirs).reshape(kernels[name].shape).tobytes()


def test_the_graph_of_a_subclassed_model_is_not_guessed(tmp_path):
    class Block(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = (
                keras.layers.BatchNormalization(name="one"),
                keras.layers.BatchNormalization(name="two"),
            )

        def call(self, x):
            return self.one(self.two(x))

    model = Block()
    model(np.zeros((1, 3), "float32"))
    model.save(tmp_path / "m.keras")
    for source in (model, str(tmp_path / "m.keras")):
        layers = bnport.read(source)
        assert set(layers) == {"one", "two"}
        assert all(layer.inputs is None and layer.kernel is None for layer in layers.values())


def test_the_channels_of_a_depthwise_kernel_are_in_the_order_of_the_output():
    inputs = keras.Input((5, 5, 3))
    convolution = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="bn")(convolution(inputs)))
    kernel = bnport.read(model)["bn"].kernel
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 3)).astype(np.float32)
    y = np.asarray(convolution(x))[0, 0, 0]
    for channel in range(6):
        expected = (x[0, :3, :3, channel // 2].astype(np.float64) * kernel.values()[channel, 0]).sum()
        assert abs(y[channel] - expected) < 1e-5
