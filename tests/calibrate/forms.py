"""Models of three inputs in every structure, and their data in every container: each input must reach its own layer.

The inputs have no names of their own and one shape, so that only order and names tell them apart; their layers are called
9, 10 and 11, which sort otherwise. Every input goes into a BatchNorm layer, whose mean is numpy's of that input alone.
As a program: most of it, for the Keras of LIBRARY and KERAS_BACKEND.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings

import numpy as np

from bnport.calibrate.file import calibrate_file
from bnport.calibrate.run import calibrate
from tests.calibrate.nets import L, keras

METHODS = ("population", "precise", "average", "moving")
COUNT, SIZE = 96, 32
RNG = np.random.default_rng(0)
X = [(RNG.integers(-50, 50, (COUNT, 6)) + 100 * k).astype("float32") for k in range(3)]
FORMS = {  # how a model of three inputs is built
    "list": lambda i, j, k: [i, j, k],
    "tuple": lambda i, j, k: (i, j, k),
    "dict": lambda i, j, k: {"a": i, "b": j, "c": k},
    "unsorted dict": lambda i, j, k: {"z": i, "b": j, "c": k},
    "list in a list": lambda i, j, k: [i, [j, k]],
    "list in a dict": lambda i, j, k: {"p": i, "q": [j, k]},
    "dict in a dict": lambda i, j, k: {"p": [j, k], "a": {"n": i}},
    "dict in a list": lambda i, j, k: [i, {"b": j, "a": k}],
}
BY_KEY = ("dict", "unsorted dict")  # names are the keys of the dict, not those of layers


def built(kind):
    """The model, and for each way to call its inputs their names in the order of X."""
    keras.backend.clear_session()
    for _ in range(8 if keras.__version__.startswith("2") else 9):
        keras.Input((1,))  # takes a name
    inputs = [keras.Input((6,)) for _ in X]
    y = L.Concatenate()([L.BatchNormalization(name=f"bn{k}")(x) for k, x in enumerate(inputs)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a key that is not its tensor's name
        model = keras.Model(FORMS[kind](*inputs), L.BatchNormalization(name="last")(L.Dense(4)(y)))
    layers = [x._keras_history[0].name for x in inputs]
    assert layers != sorted(layers), layers
    keys = list(FORMS[kind](*"zbc" if kind == "unsorted dict" else "abc"))
    return model, [keys] if kind in BY_KEY else [layers, [x.name for x in inputs]]


def by_name(names, folder):
    """Containers of the three arrays by name."""
    arrays = dict(zip(names, X, strict=True))
    yield "dict", arrays
    np.savez(os.path.join(folder, "x.npz"), **arrays, more=np.zeros(COUNT))
    yield "npz", os.path.join(folder, "x.npz")
    yield "generator", lambda: ({n: x[s : s + SIZE] for n, x in arrays.items()} for s in range(0, COUNT, SIZE))


def by_name_in_batches(names):
    """Frameworks' own containers of the three arrays by name."""
    import tensorflow as tf
    from torch.utils.data import DataLoader, Dataset

    arrays = dict(zip(names, X, strict=True))
    yield "tf.data", tf.data.Dataset.from_tensor_slices((arrays, np.zeros(COUNT))).batch(SIZE)

    class Rows(Dataset):
        def __len__(self):
            return COUNT

        def __getitem__(self, k):
            return {name: x[k] for name, x in arrays.items()}

    yield "DataLoader", DataLoader(Rows(), SIZE)

    class Batches(getattr(keras.utils, "PyDataset", None) or keras.utils.Sequence):
        def __len__(self):
            return COUNT // SIZE

        def __getitem__(self, k):
            return {name: x[k * SIZE : (k + 1) * SIZE] for name, x in arrays.items()}, np.zeros(SIZE)

    yield "PyDataset", Batches()


def as_built(kind):
    """The three arrays in the structure of the model."""
    form = FORMS[kind]
    whole = form(*X)
    yield "arrays", list(whole) if kind == "tuple" else whole
    yield "generator", lambda: ((form(*(x[s : s + SIZE] for x in X)), np.zeros(SIZE)) for s in range(0, COUNT, SIZE))
    if kind in ("list", "tuple", "dict", "list in a list"):  # nothing in it is a dict with names out of order
        yield "flat list", list(X)


def check(model, method):
    """Whether every layer has the mean of its own input."""
    for k, x in enumerate(X):
        mean = np.asarray(model.get_layer(f"bn{k}").moving_mean)
        truth = x.mean(axis=0, dtype=np.float64)
        if method == "moving":  # three of these steps, from zero; batches differ a little
            assert np.abs(mean - truth * (1 - 0.99**3)).max() < 0.5, (k, mean, truth)
        else:
            np.testing.assert_allclose(mean, truth, rtol=1e-6, atol=1e-5)


@contextlib.contextmanager
def no_warnings():
    """Keras warns of a structure that is not the model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def live(kind, carriers, methods=METHODS):
    """Calibrate the live model with everything from `carriers(names)`, which yields (what it is, data)."""
    model, called = built(kind)
    before = model.get_weights()
    for names in called:
        for what, data in carriers(names):
            for method in methods:
                model.set_weights(before)
                try:
                    with no_warnings():
                        calibrate(model, data, method=method)
                    check(model, method)
                except Exception as error:
                    raise AssertionError(f"{kind}, {what} of {names}, {method}") from error


def from_file(kind, folder):
    """The same names, and the same data, for the model in a file."""
    model, called = built(kind)
    path, out = os.path.join(folder, "m.keras"), os.path.join(folder, "out.keras")
    model.save(path)
    for what, data in (*by_name(called[0], folder), *as_built(kind)):
        for method in ("population", "precise"):
            try:
                calibrate_file(path, data, out, method=method, force=True)
                check(keras.models.load_model(out, compile=False), method)
            except Exception as error:
                raise AssertionError(f"{kind}, {what}, {method}, from a file") from error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("tuple", "unsorted dict", "dict in a list"):
            live(kind, lambda names: by_name(names, folder), methods=("population", "precise"))
            live(kind, lambda names, kind=kind: as_built(kind), methods=("population", "precise"))
        from_file("list in a dict", folder)
    print("all held")
