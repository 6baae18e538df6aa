"""Run in a child process by test_keras_backends.py, once for each backend: asserts, then prints what it did."""

# ruff: noqa: E402  (the backend is chosen before Keras is imported)

from __future__ import annotations

import gc
import os
import sys

kind = sys.argv[1]
os.environ.update(
    KERAS_BACKEND="tensorflow" if kind == "tf_keras" else kind, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES=""
)
if kind == "tf_keras":
    import tf_keras as keras
else:
    import keras

import numpy as np

import bnport
from bnport import adapters
from bnport.adapters.keras import compiled
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits, telling_record

L = keras.layers
X = np.random.default_rng(0).normal(size=(7, 4, 4, 3)).astype("float32")


def numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor) if hasattr(keras, "ops") else tensor)


def build():
    inner = keras.Sequential([keras.Input((4, 4, 3)), L.BatchNormalization(name="ibn"), L.ReLU()], name="inner")
    inputs = keras.Input((4, 4, 3))
    x = L.BatchNormalization(name="bn", scale=False)(inputs)
    shared = L.BatchNormalization(name="shared", epsilon=1e-5)
    x = L.TimeDistributed(L.BatchNormalization(name="tbn"), name="td")(shared(inner(shared(x))))
    model = keras.Model(inputs, x, name="model")
    outer_input = keras.Input((4, 4, 3))
    outer = keras.Model(outer_input, L.Flatten()(model(outer_input)), name="outer")
    return inner, model, outer


def direct(layers, x):
    """The function by bnport's float64 formula, layer after layer."""
    record = {name: layer.record for name, layer in layers.items()}
    y = np.maximum(record["inner/ibn"](record["shared"](record["bn"](x))), 0)
    return record["td/tbn"](record["shared"](y))


def close(a, b):
    assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max(), np.abs(a - b).max()


class Listing(keras.Model):
    """Holds its layer in a list only."""

    def __init__(self, layer):
        super().__init__()
        self.held = [layer]

    def call(self, x):
        return self.held[0](x)


class HalfBuilt(keras.Model):
    """Cannot say which layers it has, and says that it has a compiled function."""

    def __init__(self):
        super().__init__()
        self.predict_function = len
        self.__dict__["half"] = True

    def _flatten_layers(self, *args, **kwargs):
        if "half" in self.__dict__:
            raise AttributeError("_layers")
        return super()._flatten_layers(*args, **kwargs)


def counted(function, seen):
    def call():
        seen.append(1)
        return function()

    return call


def never_stale_wherever_the_layer_is_held():
    """A compiled function is found in whatever model has it; and only looked for where there can be one."""
    layer = L.BatchNormalization()
    layer.build((None, 3))
    x = X.reshape(-1, 3)[:5]
    half_built, searches, search = HalfBuilt(), [], compiled._models
    compiled._models = counted(search, searches)
    bnport.set_weights(layer, epsilon=2.0)
    numpy(layer(x))
    bnport.set_weights(layer, epsilon=3.0)
    assert bool(searches) is (kind == "jax"), "no graph has the layer's variables yet"
    listing = Listing(layer)
    holders = [listing, keras.Sequential([keras.Input((3,)), L.ReLU(), listing])]
    for each in holders:
        each.compile(loss="mse", optimizer="sgd")
    layer.trainable = False  # so that training steps do not move it
    for epsilon in (4.0, 5.0):
        for each in holders:
            each.predict(x, verbose=0)
            each.fit(x, x, verbose=0)
        gc.collect()
        gc.freeze()  # hides what is there from who looks for it
        bnport.set_weights(layer, epsilon=epsilon)
        assert gc.get_freeze_count()
        gc.unfreeze()
        expected = bnport.read(layer)[layer.name].record
        close(listing.predict(x, verbose=0), expected(x))
        close(holders[1].predict(x, verbose=0), expected(np.maximum(x, 0)))
        close(np.float64(listing.evaluate(x, np.zeros_like(x), verbose=0)), np.mean(expected(x) ** 2))
    assert bool(searches) is (kind != "torch")
    compiled._models = search
    assert half_built.predict_function is len


def torch_compiles_anew_for_another_epsilon():
    """Why models on torch are not looked for: torch.compile, which Keras uses when told to, guards the attribute."""
    import functools

    import torch

    torch.compile = functools.partial(torch.compile, backend="eager")
    layer = L.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(loss="mse", jit_compile=True)
    x = X.reshape(-1, 3)
    before = model.predict(x, verbose=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    bnport.set_weights(layer, epsilon=4.0)
    expected = bnport.read(layer)[layer.name].record(x)
    close(model.predict(x, verbose=0), expected)
    assert np.abs(before - expected).max() > 0.1


def kernels_that_are_computed_are_evidence_as_others_are():
    """With LoRA, or quantized to 4 bits, `kernel` is no variable but a tensor that is computed each time."""

    def made(change):
        inputs = keras.Input((8,))
        dense = L.Dense(8, name="dense")
        model = keras.Model(
            inputs, L.BatchNormalization(name="second")(L.ReLU()(L.BatchNormalization(name="first")(dense(inputs))))
        )
        change(model, dense)
        return model

    changes = [lambda _, dense: dense.enable_lora(2)]
    if tuple(int(n) for n in keras.__version__.split(".")[:2]) >= (3, 11):
        changes.append(lambda model, _: model.quantize("int4"))
    for change in changes:
        source, target = made(change), made(change)
        values = bnport.read(source)["first"].kernel.values()
        np.testing.assert_array_equal(values, numpy(source.get_layer("dense").kernel).T)
        bnport.set_weights(source, "first", epsilon=0.5, beta=np.arange(8.0))
        assert bnport.convert(source, target).ok
        assert bnport.verify(source, target).ok
        assert target.get_layer("first").epsilon == 0.5


def between_batches_on_jax_it_is_said_that_the_numbers_are_not_there():
    """Keras' JAX trainer takes them out of the variables, and puts them back before on_epoch_end."""

    def made():
        model = keras.Sequential([keras.Input((3,)), L.Dense(3), L.BatchNormalization(name="bn")])
        model.compile("sgd", "mse")
        return model

    model, other, refused = made(), made(), []
    uses = [
        lambda: bnport.set_weights(model, "bn", beta=np.full(3, 7.0)),
        lambda: bnport.set_weights(model, "bn", epsilon=0.5),
        lambda: bnport.read(model)["bn"].record,
        lambda: bnport.convert(other, model),
        lambda: bnport.convert(model, other),
        lambda: bnport.verify(model, other),
    ]

    class Callback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch != 1:
                return
            for use in uses:
                try:
                    use()
                except bnport.errors.NotFound as error:
                    assert "on_epoch_end" in str(error)
                    refused.append(use)

        def on_epoch_end(self, epoch, logs=None):
            bnport.set_weights(model, "bn", beta=np.full(3, 7.0), epsilon=0.25)
            assert bnport.convert(model, other).ok

    x = X.reshape(-1, 3)[:32]
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[Callback()])
    assert refused == uses
    record = bnport.read(model)["bn"].record
    assert (record.epsilon, list(record.beta)) == (0.25, [7.0] * 3)
    close(model.predict(x, verbose=0), record(numpy(model.layers[0](x))))


def main():
    never_stale_wherever_the_layer_is_held()
    if kind == "torch":
        torch_compiles_anew_for_another_epsilon()
    if kind == "jax":
        between_batches_on_jax_it_is_said_that_the_numbers_are_not_there()
    if kind != "tf_keras":
        kernels_that_are_computed_are_evidence_as_others_are()
    inner, model, outer = build()
    for each in (inner, model, outer):
        each.compile(loss="mse")
        each.predict(X, verbose=0)
    target = np.zeros((7, 48), "float32")
    outer.evaluate(X, target, verbose=0)
    before = outer.predict(X, verbose=0)
    layers = bnport.read(model)
    assert list(layers) == ["bn", "shared", "inner/ibn", "td/tbn"], list(layers)
    assert layers["shared"].epsilon == 1e-5
    assert "gamma" not in layers["bn"].stores
    records = {}
    for number, name in enumerate(layers):
        record = telling_record(3, seed=number, epsilon=0.5 + number)
        records[name] = record.replace(gamma=np.ones(3, "float32")) if name == "bn" else record
    changes = {n: Change(r, (layers[n].stores & {*FIELDS, "epsilon"})) for n, r in records.items()}

    # one layer cannot be written: none is, and nothing was forgotten
    wrong = {**changes, "td/tbn": Change(telling_record(4), frozenset(FIELDS))}
    try:
        adapters.find(model).apply(model, wrong)
    except bnport.errors.BnportError:
        pass
    else:
        raise AssertionError("a wrong width was written")
    assert np.array_equal(outer.predict(X, verbose=0), before)

    adapters.find(model).apply(model, changes)
    layers = bnport.read(model)
    for name, layer in layers.items():
        assert_same_bits(layer.record, records[name])
    expected = direct(layers, X)
    for rows in (7, 3, 1):  # a batch size seen before, and new ones that are traced anew
        x, y = X[:rows], expected[:rows]
        close(model.predict(x, verbose=0), y)
        close(outer.predict(x, verbose=0), y.reshape(rows, -1))
        close(numpy(model(x)), y)
        close(numpy(outer(x)), y.reshape(rows, -1))
    close(np.float64(outer.evaluate(X, target, verbose=0)), np.mean(expected**2))
    x = X[:4]
    close(inner.predict(x, verbose=0), np.maximum(records["inner/ibn"](x), 0))

    # a single layer of it, through the one obvious call: the models around it follow
    bnport.set_weights(model, "inner/ibn", epsilon=9.0, beta=[1, 2, 3])
    close(outer.predict(X, verbose=0), direct(bnport.read(model), X).reshape(7, -1))
    layer = inner.layers[0] if inner.layers[0].name == "ibn" else inner.layers[1]
    bnport.set_weights(layer, epsilon=4.0)  # given the layer alone, its models are still found
    close(outer.predict(X, verbose=0), direct(bnport.read(model), X).reshape(7, -1))
    close(inner.predict(x, verbose=0), np.maximum(bnport.read(layer)["ibn"].record(x), 0))

    weights = [w.copy() for w in outer.get_weights()]
    adapter = adapters.find(model)
    for name, layer in bnport.read(model).items():
        probes = layer.record.probes().astype("float32")
        for how, y in adapter.run(model, name, probes).items():
            assert (np.abs(y - layer.record(probes)) <= layer.record.error_bound(probes)).all(), (name, how)
    assert all(np.array_equal(a, b) for a, b in zip(weights, outer.get_weights(), strict=True))
    close(outer.predict(X, verbose=0), direct(bnport.read(model), X).reshape(7, -1))
    if kind != "tf_keras":
        assert keras.backend.backend() == kind
        half = L.BatchNormalization(dtype="bfloat16")
        half.build((None, 3))
        record = telling_record(3, dtype="bfloat16", epsilon=half.epsilon)
        adapters.find(half).apply(half, {half.name: Change(record, frozenset(FIELDS))})
        assert bnport.read(half)[half.name].dtype == "bfloat16"
        assert_same_bits(bnport.read(half)[half.name].record, record)
    print("done", kind)


main()
