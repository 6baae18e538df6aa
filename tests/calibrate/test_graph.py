"""Steps of a model: the bits of Keras' own call, also where a step is the layer's call() without what surrounds it."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate import graph
from bnport.calibrate.models import LiveModel
from tests.calibrate.nets import L, keras

IMAGE, ROWS, VOLUME = (8, 8, 4), (8, 4), (6, 6, 6, 2)

SAMPLES = {  # layer of graph.PLAIN -> (arguments, input shape, number of inputs)
    "Activation": (("relu",), IMAGE, 1),
    "AveragePooling1D": ((3, 2, "same"), ROWS, 1),
    "AveragePooling2D": ((3, 2, "same"), IMAGE, 1),
    "AveragePooling3D": ((2,), VOLUME, 1),
    "BatchNormalization": ((), IMAGE, 1),
    "Conv1D": ((3, 3), ROWS, 1),
    "Conv2D": ((5, 3, 2, "same"), IMAGE, 1),
    "Conv3D": ((3, 2), VOLUME, 1),
    "Cropping2D": ((), IMAGE, 1),
    "Dense": ((7, "gelu"), ROWS, 1),
    "DepthwiseConv1D": ((3,), ROWS, 1),
    "DepthwiseConv2D": ((3,), IMAGE, 1),
    "Dropout": ((0.5,), IMAGE, 1),
    "ELU": ((), IMAGE, 1),
    "Flatten": ((), IMAGE, 1),
    "GlobalAveragePooling2D": ((), IMAGE, 1),
    "GlobalMaxPooling2D": ((), IMAGE, 1),
    "LeakyReLU": ((), IMAGE, 1),
    "MaxPooling1D": ((), ROWS, 1),
    "MaxPooling2D": ((3, 2), IMAGE, 1),
    "MaxPooling3D": ((), VOLUME, 1),
    "ReLU": ((6.0,), IMAGE, 1),
    "Reshape": (((4, 64),), IMAGE, 1),
    "SeparableConv2D": ((5, 3), IMAGE, 1),
    "UpSampling2D": ((), IMAGE, 1),
    "ZeroPadding1D": ((), ROWS, 1),
    "ZeroPadding2D": ((((1, 2), (0, 3)),), IMAGE, 1),
    "ZeroPadding3D": ((), VOLUME, 1),
    **dict.fromkeys(("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"), ((), IMAGE, 2)),
}


def test_every_plain_layer_has_a_sample_here():
    assert sorted(graph.PLAIN.split()) == sorted(SAMPLES)


def around(layer, shape, count=1):
    """A model: inputs, `layer`, a BatchNorm; and data for it."""
    inputs = [keras.Input(shape) for _ in range(count)]
    out = layer(inputs if count > 1 else inputs[0])
    rng = np.random.default_rng(2)
    x = [rng.normal(1, 2, (5, *shape)).astype("float32") for _ in inputs]
    return keras.Model(inputs, L.BatchNormalization(name="last")(out)), x


def walked(model, batch):
    """The output of the model's steps, and how many of them went through a layer's __call__."""
    steps, apart = graph.steps_of(LiveModel(model))
    assert apart
    original, calls, values = L.Layer.__call__, [], {graph.DATA: batch}

    def spy(self, *args, **kwargs):
        calls.append(self.name)
        return original(self, *args, **kwargs)

    L.Layer.__call__ = spy
    try:
        for step in steps:
            values.update(zip(step.outputs, step.run([values[key] for key in step.inputs]), strict=True))
    finally:
        L.Layer.__call__ = original
    return keras.ops.convert_to_numpy(values[steps[-1].outputs[0]]), calls


@pytest.mark.parametrize("name", SAMPLES)
def test_a_plain_layer_gives_the_bits_of_the_whole_model_without_the_rest_of_keras_call(name):
    arguments, shape, count = SAMPLES[name]
    model, x = around(getattr(L, name)(*arguments), shape, count)
    for variable in model.weights:
        fresh = np.random.default_rng(3).uniform(0.5, 1.5, tuple(variable.shape))
        variable.assign(fresh.astype("float32"))
    ours, calls = walked(model, x)
    assert calls == []
    assert ours.tobytes() == keras.ops.convert_to_numpy(model(x, training=False)).tobytes()


class Doubled(L.ReLU):
    def __call__(self, x, **kwargs):
        return 2 * super().__call__(x, **kwargs)


Namesake = type("ReLU", (Doubled,), {})


def patched():
    layer = L.ReLU()
    layer.call = lambda x: -x
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(),
        lambda: Namesake(),
        lambda: L.ReLU(dtype="mixed_float16"),
        lambda: L.ReLU(dtype="float16"),
        lambda: L.ReLU(activity_regularizer="l2"),
        patched,
        lambda: L.Softmax(),
    ],
    ids=["subclass", "namesake", "mixed", "cast", "regularizer", "patched", "not in the list"],
)
def test_any_other_layer_is_called_as_keras_calls_it(make):
    layer = make()
    model, x = around(layer, IMAGE)
    ours, calls = walked(model, x)
    assert layer.name in calls
    assert ours.tobytes() == keras.ops.convert_to_numpy(model(x, training=False)).tobytes()


def test_a_layer_of_two_dtypes_is_called_as_keras_calls_it_also_on_its_compute_dtype():
    inputs = keras.Input((8,), dtype="bfloat16")
    layer = L.Dense(6, dtype="mixed_bfloat16")
    model = keras.Model(inputs, L.BatchNormalization(dtype="float32")(layer(inputs)))
    x = keras.ops.cast(np.random.default_rng(5).normal(size=(5, 8)), "bfloat16")
    ours, calls = walked(model, x)
    assert layer.name in calls
    assert ours.tobytes() == keras.ops.convert_to_numpy(model(x, training=False)).tobytes()


def test_a_quantized_layer_is_called_as_keras_calls_it():
    layer = L.Dense(6)
    model, x = around(layer, (8,))
    layer.quantize("int8")
    ours, calls = walked(model, x)
    assert calls[:1] == [layer.name]
    assert ours.tobytes() == keras.ops.convert_to_numpy(model(x, training=False)).tobytes()


def test_a_mask_that_travels_with_a_tensor_is_kept():
    inputs = keras.Input((6, 3))
    masked = L.Masking()(inputs)
    model = keras.Model(inputs, L.BatchNormalization()(L.Dropout(0.5, name="drop")(masked)))
    x = np.random.default_rng(4).normal(size=(4, 6, 3)).astype("float32")
    x[:, 4:] = 0
    steps, _ = graph.steps_of(live := LiveModel(model))
    values = {graph.DATA: x}
    for step in steps:
        values.update(zip(step.outputs, step.run([values[key] for key in step.inputs]), strict=True))
    (dropped,) = (values[step.outputs[0]] for step in steps if step.name == "drop")
    mask = live.mask_of(dropped)
    assert np.asarray(mask).tolist() == [[True] * 4 + [False] * 2] * 4
