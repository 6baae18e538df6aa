"""Keras files and live models against Keras 3 (TensorFlow backend) and tf_keras, under the shared contract."""

from __future__ import annotations

import os
from typing import ClassVar

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import tf_keras

from tests.adapters.contract import FileContract, LiveContract

ARGUMENTS = {"gamma": "scale", "beta": "center"}


def batchnorm(package, record, absent=(), **config):
    """A Keras layer with these numbers, through Keras' own set_weights once it is built."""
    flags = {flag: field not in absent for field, flag in ARGUMENTS.items()}
    return package.layers.BatchNormalization(epsilon=record.epsilon, **flags, **config)


def fill(layer, record, absent=()):
    extra = []
    if getattr(layer, "renorm", False):
        std = np.sqrt(record.variance + record.epsilon)
        extra = [std, record.mean, std]
    fields = [f for f in ("gamma", "beta", "mean", "variance") if f not in absent]
    layer.set_weights([getattr(record, f) for f in fields] + extra)


def model_of(package, records, absent=(), **config):
    """One record: the layer alone. Several: convolutions between them."""
    if len(records) == 1:
        layer = batchnorm(package, records[0], absent, **config)
        model = package.Sequential([package.Input((records[0].channels,)), layer])
        fill(layer, records[0], absent)
        return model
    x = inputs = package.Input((4, 4, 3))
    made = []
    for number, record in enumerate(records):
        x = package.layers.Conv2D(record.channels, 3, padding="same", name=f"conv{number}")(x)
        made.append(batchnorm(package, record, absent, name=f"bn_{'zxy'[number % 3]}{number}", **config))
        x = package.layers.ReLU()(made[-1](x))
    model = package.Model(inputs, package.layers.Dense(2)(package.layers.Flatten()(x)))
    for layer, record in zip(made, records, strict=True):
        fill(layer, record, absent)
    return model


def layers_of(model, kind):
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


class _Keras3File(FileContract):
    adapter = "keras"
    mutants = 100
    config: ClassVar[dict] = {}

    def save(self, model, path):
        model.save(path)

    def load(self, path):
        return keras.models.load_model(path, compile=False)

    def build(self, records, path, absent=()):
        self.save(model_of(keras, records, absent, **self.config), path)

    def run(self, path, x):
        return self.load(path).predict(x, verbose=0)

    def others(self, path):
        model = self.load(path)
        return {w.path: np.asarray(w.value).tobytes() for w in model.weights if not w.path.startswith("bn_")}


class TestKerasFile(_Keras3File):
    suffix = ".keras"
    optional = (("gamma",), ("beta",), ("gamma", "beta"))


class TestRenormKerasFile(_Keras3File):
    suffix = ".keras"
    optional = (("gamma",),)
    config: ClassVar[dict] = {"renorm": True}


class TestHalfPrecisionKerasFile(_Keras3File):
    suffix = ".keras"
    dtype = "float16"
    output_dtype = "float16"
    config: ClassVar[dict] = {"dtype": "float16"}

    def run(self, path, x):
        return super().run(path, x).astype(np.float32)

    def one(self, seed=0):
        record = super().one(seed)
        return record.replace(variance=np.maximum(record.variance, np.float32(2.0**-10)))


class TestLegacyFile(_Keras3File):
    suffix = ".h5"
    optional = (("gamma",), ("beta",), ("gamma", "beta"))


class TestWeightsFile(_Keras3File):
    """The weights alone: the architecture is built anew to run them, with the epsilon that is assumed."""

    suffix = ".weights.h5"
    holds_epsilon = False
    default_epsilon = 1e-3
    optional = (("gamma",),)
    options: ClassVar[dict] = {"absent": "gamma"}
    write_options: ClassVar[dict] = {"absent": "gamma"}

    def build(self, records, path, absent=()):
        self.made = model_of(keras, records, absent)
        self.made.save_weights(path)

    def load(self, path):
        self.made.load_weights(path)
        return self.made


class _TfKerasFile(_Keras3File):
    def load(self, path):
        return tf_keras.models.load_model(path, compile=False)

    def build(self, records, path, absent=()):
        self.save(model_of(tf_keras, records, absent), path)

    def others(self, path):
        return {w.name: w.numpy().tobytes() for w in self.load(path).weights if not w.name.startswith("bn_")}


class TestTfKerasFile(_TfKerasFile):
    suffix = ".keras"
    optional = (("gamma", "beta"),)


class TestTfKerasLegacyFile(_TfKerasFile):
    suffix = ".h5"
    optional = (("gamma",), ("beta",), ("gamma", "beta"))


class TestTfKerasWeightsFile(_TfKerasFile):
    """`save_weights("x.h5")` of Keras 2: by weight name, with neither config nor epsilon."""

    suffix = ".h5"
    holds_epsilon = False
    default_epsilon = 1e-3
    optional = (("gamma",), ("beta",), ("gamma", "beta"))

    def build(self, records, path, absent=()):
        self.made = model_of(tf_keras, records, absent)
        self.made.save_weights(path)

    def load(self, path):
        self.made.load_weights(path)
        return self.made


class TestLiveKeras3(LiveContract):
    adapter = "keras"
    optional = (("gamma",), ("beta",), ("gamma", "beta"))

    def build(self, records, absent=()):
        return model_of(keras, records, absent)

    def run(self, model, x):
        return model.predict(x, verbose=0)

    def weights(self, model):
        return {f"{i} {w.name}": w.numpy().tobytes() for i, w in enumerate(model.weights)}


class TestLiveTfKeras(TestLiveKeras3):
    def build(self, records, absent=()):
        return model_of(tf_keras, records, absent)


class TestLiveLayer(TestLiveKeras3):
    """A single layer in place of a model."""

    def build(self, records, absent=()):
        if len(records) > 1:
            return model_of(keras, records, absent)
        layer = batchnorm(keras, records[0], absent)
        layer.build((None, records[0].channels))
        fill(layer, records[0], absent)
        return layer

    def run(self, model, x):
        return np.asarray(model(x, training=False)) if not hasattr(model, "predict") else model.predict(x, verbose=0)
