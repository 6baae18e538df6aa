"""A Caffe net in a folder, and layers and bounds that several test modules share."""

from __future__ import annotations

import os

import numpy as np

from bnport import adapters
from tests.adapters.caffe_files import cv2_outputs, layer, prototxt, save
from tests.adapters.contract import telling_record

FACTOR = np.float32(999.98236)  # what moving_average_fraction 0.999 tends to
caffe = adapters.load("caffe")


class Files:
    """A caffemodel and its prototxt in a folder."""

    def __init__(self, folder):
        self.model, self.text = os.path.join(folder, "net.caffemodel"), os.path.join(folder, "net.prototxt")

    def save(self, message, channels=7, text=None, rows=10):
        save(self.model, message)
        with open(self.text, "w", encoding="utf-8") as file:
            file.write(prototxt(message, input_shape=(rows, channels, 1, 1)) if text is None else text)

    def cv2(self, x, *outputs):
        ys = cv2_outputs(self.text, self.model, x.reshape(*x.shape, 1, 1), outputs)
        return [y.reshape(x.shape) for y in ys]

    def read(self, **options):
        return caffe.read(self.model, **options)


def one(seed=0, epsilon=2.5e-3):
    return telling_record(7, seed=seed, epsilon=epsilon)


def probes(record):
    return record.probes().astype(np.float32)


def assert_divided_within_bound(y, record, x):
    """As assert_within_bound, where the engine itself divided mean and variance by the factor: two roundings each."""
    bound = record.error_bound(x) + 2 * record.storage_bound(x)
    assert (np.abs(y - record(x)) <= bound).all()


def five(record, factor=1.0, order="mean-first", epsilon=2.5e-3, **parameters):
    factor = np.float32([factor])
    sums = [record.mean * factor, record.variance * factor]
    blobs = [*sums, factor, record.gamma, record.beta]
    if order == "scale-first":
        blobs = [record.gamma, record.beta, *sums, factor]
    return layer("bn", "BatchNorm", "data", "bn", blobs, batch_norm_param={"eps": epsilon, **parameters})


def bn_layer(record, parameter="bn_param", statistic=None, **more):
    blobs = [v.reshape(1, -1, 1, 1) for v in (record.gamma, record.beta, record.mean, record.variance)]
    if statistic is not None:
        blobs[3] = statistic.reshape(1, -1, 1, 1)
    return layer("bn", "BN", "data", "bn", blobs, **{parameter: {"eps": record.epsilon, **more}})
