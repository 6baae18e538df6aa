"""The files in fixtures/caffe against what OpenCV 4 computed when they were made: no engine is needed to run these."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from bnport import adapters
from tests.adapters.caffe_nets import assert_divided_within_bound

FOLDER = os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "caffe")
caffe = adapters.load("caffe")

# file -> for each BatchNorm the recorded arrays that go into it and come out of what belongs to it
NETS = {
    "bvlc": {"bn_conv1": ("conv1", "scale_conv1"), "bn2": ("conv2", "scale2"), "bn3": ("conv2", "scale3")},
    "nvidia": {"bn1": ("conv1", "bn1"), "bn2": ("conv2", "bn2")},
    "legacy": {"bn1": ("conv1", "scale1"), "bn2": ("relu", "scale2")},
}


def at(name):
    return os.path.join(FOLDER, name)


@pytest.fixture(scope="module")
def outputs():
    with np.load(at("outputs.npz")) as file:
        return {name: file[name] for name in file.files}


def by_channel(array):
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("described", [False, True])
def test_the_records_of_a_fixture_compute_what_opencv_recorded(outputs, name, described):
    options = {"prototxt": at(f"{name}.prototxt")} if described else {}
    layers = caffe.read(at(f"{name}.caffemodel"), **options)
    assert list(layers) == list(NETS[name])
    for layer, (before, after) in NETS[name].items():
        x, y = (by_channel(outputs[f"{name}/{which}"]) for which in (before, after))
        assert_divided_within_bound(y, layers[layer].record, x)


def test_the_hdf5_snapshot_of_a_net_reads_as_its_binary_one():
    text = at("bvlc.prototxt")
    hdf5, binary = (caffe.read(at(f"bvlc.caffemodel{suffix}"), prototxt=text) for suffix in (".h5", ""))
    assert list(hdf5) == list(binary)
    for name, layer in binary.items():
        assert hdf5[name].record == layer.record
        assert (hdf5[name].kernel.kind, hdf5[name].kernel.shape) == (layer.kernel.kind, layer.kernel.shape)
        assert hdf5[name].inputs == layer.inputs


@pytest.mark.parametrize("name", ["bvlc", "legacy"])
def test_the_tensors_of_a_listing_hold_the_very_numbers_of_the_record(name):
    for layer in caffe.read(at(f"{name}.caffemodel")).values():
        assert set(layer.tensors) == layer.stores
        for field, tensor in layer.tensors.items():
            np.testing.assert_array_equal(tensor.array(), layer.arrays()[field])


def test_listing_a_caffemodel_imports_neither_numpy_nor_h5py():
    import subprocess

    script = (
        "import sys; from bnport import adapters\n"
        f"layers = adapters.read({at('bvlc.caffemodel')!r}, prototxt={at('bvlc.prototxt')!r})\n"
        "data = [tensor.read() for layer in layers.values() for tensor in layer.tensors.values()]\n"
        "print([m for m in ('numpy', 'h5py', 'cv2', 'google.protobuf') if m in sys.modules], len(data))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] 11"
