"""Files of old Keras versions in fixtures/keras, and what the tests of Keras files share."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np

from bnport import adapters
from bnport.containers.files import replace_file

FIXTURES = os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "keras")
KERAS = adapters.load("keras")
THEIRS = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
PATHS = ["bn1", "inner/ibn", "fn/fbn", "fn/fbn2", "fn/dseq/deep", "td/tbn", "shared"]


def expected_of(tag):
    return np.load(os.path.join(FIXTURES, f"{tag}.npz"))


def bits(array):
    return np.asarray(array, np.float64).tobytes()


def assert_is(layer, expected, path):
    for field, theirs in THEIRS.items():
        key = f"{path}/{theirs}"
        assert (field in layer.stores) == (key in expected), (path, field)
        if key in expected:
            assert bits(getattr(layer.record, field)) == bits(expected[key]), (path, field)


def rewritten(source, out, changes, **options):
    replace_file(str(out), lambda new: KERAS.write(str(source), changes, new, **options), inputs=[str(source)])
