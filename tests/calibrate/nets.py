"""Small Keras models with telling parameters, their data, and oracles that know nothing of bnport's own passes.

`LIBRARY=tf_keras` in the environment builds them with Keras 2; KERAS_BACKEND chooses the backend of Keras 3.
"""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np

keras = importlib.import_module(os.environ.get("LIBRARY", "keras"))
L = keras.layers
SEED = np.random.default_rng(7)


def data(n=70, shape=(8, 8, 3), mean=3.0, std=2.0, seed=0):
    """n samples, the last ones different, so that a wrong weight for a short last batch shows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(mean, std, (n, *shape))
    x[-6:] += 5 * std
    return x.astype("float32")


def norms(model):
    """All BatchNormalization layers inside, in the order of Keras' own walk."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [layer for layer in layers if isinstance(layer, L.BatchNormalization)]


def stir(model, seed=1):
    """Telling values: gamma of both signs, beta, small and large variances, biases."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False, recursive=True):
        if isinstance(layer, L.BatchNormalization):
            c = layer.moving_mean.shape[0]
            if layer.scale:
                layer.gamma.assign((rng.uniform(0.4, 2, c) * rng.choice([-1, 1], c)).astype("float32"))
            if layer.center:
                layer.beta.assign(rng.normal(0.5, 1, c).astype("float32"))
            layer.moving_mean.assign(rng.normal(0, 3, c).astype("float32"))
            layer.moving_variance.assign((10.0 ** rng.uniform(-4, 1, c)).astype("float32"))
        elif isinstance(layer, L.Conv2D | L.Dense) and layer.use_bias and not isinstance(layer, L.DepthwiseConv2D):
            layer.bias.assign(rng.normal(0, 1, layer.bias.shape).astype("float32"))
    return model


def branches():
    """Two branches that join, and a Dense end: five layers, four rounds."""
    i = keras.Input((8, 8, 3))
    x = L.ReLU()(L.BatchNormalization(name="stem", epsilon=1e-5)(L.Conv2D(4, 3, name="conv")(i)))
    a = L.BatchNormalization(name="left", scale=False)(L.Conv2D(5, 3, padding="same")(x))
    b = L.BatchNormalization(name="right", center=False)(L.Conv2D(5, 1)(x))
    x = L.Dropout(0.5)(L.ReLU()(L.Add()([a, b])))
    x = L.BatchNormalization(name="joined")(L.Conv2D(6, 3, strides=2)(x))
    x = L.Dense(7)(L.GlobalAveragePooling2D()(x))
    return stir(keras.Model(i, L.Dense(3)(L.BatchNormalization(name="fine")(x))))


def nested():
    """A Sequential inside a functional model, with layers of one name, and a Sequential around everything."""
    inner = keras.Sequential(
        [keras.Input((6, 6, 4)), L.Conv2D(6, 3), L.BatchNormalization(name="bn"), L.ReLU()], name="inner"
    )
    i = keras.Input((8, 8, 3))
    x = inner(L.BatchNormalization(name="bn")(L.Conv2D(4, 3)(i)))
    body = keras.Model(i, L.GlobalAveragePooling2D()(x), name="body")
    return stir(keras.Sequential([keras.Input((8, 8, 3)), body, L.Dense(5), L.BatchNormalization(name="bn")]))


def siamese():
    """Two inputs by name through one shared model: its layers see both."""
    i = keras.Input((6,))
    tower = keras.Model(
        i, L.BatchNormalization(name="deep")(L.Dense(4)(L.BatchNormalization(name="first")(i))), name="tower"
    )
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    out = L.BatchNormalization(name="end")(L.Dense(5)(L.Concatenate()([tower(a), tower(b)])))
    return stir(keras.Model({"a": a, "b": b}, out))


class Subclassed(keras.Model):
    """`branches` without a graph, on the same layers."""

    def __init__(self, model):
        super().__init__()
        self.inner_layers = [layer for layer in model.layers if not isinstance(layer, L.InputLayer)]

    def call(self, inputs, training=None):
        """In the order in which the functional model was written."""
        by = self.inner_layers
        conv, stem, relu = by[0], by[1], by[2]
        x = relu(stem(conv(inputs), training=training))
        named = {layer.name: layer for layer in by}
        rest = [layer for layer in by if layer not in (conv, stem, relu)]
        convs = [layer for layer in rest if isinstance(layer, L.Conv2D)]
        relu2 = next(layer for layer in rest if isinstance(layer, L.ReLU))
        drop = next(layer for layer in rest if isinstance(layer, L.Dropout))
        dense = [layer for layer in rest if isinstance(layer, L.Dense)]
        pool = next(layer for layer in rest if isinstance(layer, L.GlobalAveragePooling2D))
        wide = next(c for c in convs if c.kernel_size == (3, 3) and c.filters == 5)
        thin = next(c for c in convs if c.kernel_size == (1, 1))
        down = next(c for c in convs if c.filters == 6)
        a, b = named["left"](wide(x), training=training), named["right"](thin(x), training=training)
        x = drop(relu2(a + b), training=training)
        x = named["joined"](down(x), training=training)
        return dense[1](named["fine"](dense[0](pool(x)), training=training))


def numpy(x):
    """A tensor of any backend as an array."""
    return np.asarray(x.detach().cpu().numpy() if hasattr(x, "detach") else x)


def batches_of(x, size):
    """Slices of an array or of a dict of arrays."""
    n = len(next(iter(x.values())) if isinstance(x, dict) else x)
    for k in range(0, n, size):
        yield {name: v[k : k + size] for name, v in x.items()} if isinstance(x, dict) else x[k : k + size]


def tapped(model, x, size=16):
    """What reaches each BatchNormalization at inference: name -> list of arrays, in the order of the calls.

    By a class-level wrapper of BatchNormalization.call, so it works for any model that runs eagerly.
    """
    seen = {}
    original = L.BatchNormalization.call

    def call(self, inputs, *args, **kwargs):
        seen.setdefault(id(self), []).append(numpy(inputs))
        return original(self, inputs, *args, **kwargs)

    L.BatchNormalization.call = call
    try:
        for batch in batches_of(x, size):
            model(batch, training=False)
    finally:
        L.BatchNormalization.call = original
    return seen


def two_pass(arrays, axis=-1):
    """Mean and variance over everything but `axis` in extended precision: the mean first, then the deviations."""
    rows = np.concatenate([np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in arrays]).astype(np.longdouble)
    mean = rows.mean(axis=0)
    return mean.astype(float), ((rows - mean) ** 2).mean(axis=0).astype(float)


def close_to_two_pass(model, x, size=16, tolerance=1e-6):
    """Whether every layer holds, to float32, the statistics of what reaches it now. Returns the worst relative error."""
    worst = 0.0
    seen = tapped(model, x, size)
    for layer in norms(model):
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        mean, variance = two_pass(seen[id(layer)], axis)
        # the stored values are rounded to float32: half a unit in the last place is not an error of the method
        held_mean, held_variance = (numpy(v.numpy()).astype(float) for v in (layer.moving_mean, layer.moving_variance))
        worst = max(
            worst,
            float(
                np.max(
                    np.maximum(np.abs(held_mean - mean) - np.spacing(np.abs(held_mean).astype("f4")), 0)
                    / np.sqrt(variance)
                )
            ),
            float(np.max(np.abs(held_variance - variance) / variance)),
        )
    assert worst < tolerance, worst
    return worst


def prefix_passes(model, x, size=16):
    """The plain way for a flat functional model: for each layer in turn one pass of the model up to it. Bits by name."""
    from bnport.calibrate.moments import merge_all, moments

    result = {}
    for layer in model.layers:
        if not isinstance(layer, L.BatchNormalization):
            continue
        prefix = keras.Model(model.inputs, layer.input)
        merged = merge_all(moments(numpy(prefix([b], training=False))) for b in batches_of(x, size))
        layer.moving_mean.assign(merged.mean.astype("float32"))
        layer.moving_variance.assign(merged.variance().astype("float32"))
        result[layer.name] = (numpy(layer.moving_mean.numpy()).copy(), numpy(layer.moving_variance.numpy()).copy())
    return result


def held(model):
    """Every array of the model by position: names are not unique."""
    return [np.array(w.numpy()) for w in model.weights]
