"""Caffe files: the adapter contract for each kind of file, oracle cv2.dnn, which has Caffe's own message types built in."""

from __future__ import annotations

import os
import tempfile
from typing import ClassVar

import h5py
import numpy as np

from tests.adapters.caffe_files import (
    T,
    batch_norm,
    cv2_outputs,
    layer,
    net,
    prototxt,
    save,
    save_hdf5,
    scale,
    unpacked,
)
from tests.adapters.contract import FileContract


def convolution(name, bottom, top, channels_in, channels_out, seed=0):
    weights = np.random.default_rng(seed).normal(0, 0.2, (channels_out, channels_in, 3, 3)).astype(np.float32)
    return layer(
        name, "Convolution", bottom, top, [weights], convolution_param={
            "num_output": channels_out, "kernel_size": [3], "pad": [1], "bias_term": False}
    )  # fmt: skip


def chain(records, absent=(), named_epsilon=True):
    """One record: the BN layers alone. Several: convolution, BatchNorm, Scale, ReLU, as people write them, in place."""
    layers, channels = [], 3
    for i, record in enumerate(records):
        bottom = "data"
        if len(records) > 1:
            layers.append(
                convolution(f"conv{i}", "data" if i == 0 else f"conv{i - 1}", f"conv{i}", channels, record.channels)
            )
            bottom, channels = f"conv{i}", record.channels
        normal = batch_norm(f"bn{i}", record, bottom, bottom if len(records) > 1 else f"bn{i}")
        if not named_epsilon:
            normal.ClearField("batch_norm_param")
        layers.append(normal)
        if "gamma" not in absent:
            top = normal.top[0]
            layers.append(scale(f"scale{i}", record, top, top, bias="beta" not in absent))
        if len(records) > 1:
            layers.append(layer(f"relu{i}", "ReLU", bottom))
    return net(*layers)


def run_by_cv2(message, path, x):
    """x (N, C) through a net of one BatchNorm, its prototxt written beside for the occasion."""
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "net.prototxt")
        with open(text, "w", encoding="utf-8") as file:
            file.write(prototxt(message, input_shape=(*x.shape, 1, 1)))
        return cv2_outputs(text, path, x.reshape(*x.shape, 1, 1))[0].reshape(x.shape)


class TestBinary(FileContract):
    adapter = "caffe"
    suffix = ".caffemodel"
    optional: ClassVar = (("gamma", "beta"), ("beta",))

    def build(self, records, path, absent=()):
        save(path, chain(records, absent))

    def run(self, path, x):
        with open(path, "rb") as file:
            return run_by_cv2(T["NetParameter"].FromString(file.read()), path, x)

    def others(self, path):
        with open(path, "rb") as file:
            message = T["NetParameter"].FromString(file.read())
        for one in message.layer:
            if one.type in ("BatchNorm", "Scale"):
                one.ClearField("blobs")
        return {"all but the blobs of BatchNorm and Scale": message.SerializeToString()}


class TestBinaryThatNamesNoEpsilon(TestBinary):
    holds_epsilon = False

    def build(self, records, path, absent=()):
        save(path, chain(records, absent, named_epsilon=False))


class TestUnpackedFloats(TestBinary):
    mutants = 20

    def build(self, records, path, absent=()):
        save(path, unpacked(chain(records, absent)))


class TestHdf5(FileContract):
    """On its own, so with the blobs that speak for themselves: mean, variance, factor, scale, bias."""

    adapter = "caffe"
    suffix = ".caffemodel.h5"
    holds_epsilon = False
    optional: ClassVar = (("gamma", "beta"),)
    mutants = 40

    def five(self, records, absent=()):
        layers = []
        for i, record in enumerate(records):
            if len(records) > 1:
                layers.append(convolution(f"conv{i}", "data", f"conv{i}", 3, record.channels))
            blobs = [record.mean, record.variance, np.ones(1, np.float32), record.gamma, record.beta]
            layers.append(layer(f"bn{i}", "BatchNorm", "data", f"bn{i}", blobs[: 3 if absent else 5]))
        return net(*layers)

    def build(self, records, path, absent=()):
        save_hdf5(path, self.five(records, absent))

    def run(self, path, x):
        with h5py.File(path) as file:
            blobs = [file[f"data/bn0/{i}"][()] for i in range(len(file["data/bn0"]))]
        whole = {"scale_bias": True} if len(blobs) == 5 else {}
        message = net(layer("bn0", "BatchNorm", "data", "bn0", blobs, batch_norm_param={"eps": 1e-5, **whole}))
        with tempfile.TemporaryDirectory() as folder:
            binary = os.path.join(folder, "net.caffemodel")
            save(binary, message)
            return run_by_cv2(message, binary, x)

    def others(self, path):
        with h5py.File(path) as file:
            return {
                f"{name}/0": file[f"data/{name}/0"][()].tobytes() for name in file["data"] if name.startswith("conv")
            }
