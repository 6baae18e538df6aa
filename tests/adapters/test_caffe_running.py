"""What feeds a Caffe layer, and the layers run by OpenCV."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.errors import InvalidValue, MissingDependency, NotFound
from tests.adapters.caffe_files import (
    batch_norm,
    blob,
    layer,
    net,
    save_hdf5,
    scale,
)
from tests.adapters.caffe_nets import FACTOR, bn_layer, caffe, five, one, probes
from tests.adapters.contract import assert_within_bound, telling_record

# ---- evidence for pairing


@pytest.mark.parametrize(("group", "kind"), [(1, "conv"), (2, "grouped"), (4, "depthwise")])
def test_the_convolution_that_feeds_a_layer_is_its_kernel(files, group, kind):
    record = telling_record(4, epsilon=2.5e-3)
    weights = np.random.default_rng(0).normal(size=(4, 4 // group, 3, 3)).astype(np.float32)
    conv = layer("conv", "Convolution", "data", "conv", [weights], convolution_param={"group": group})
    files.save(net(conv, layer("sp", "Split", "conv", "c0 c1"), batch_norm("bn", record, "c1", "out")))
    kernel = files.read()["bn"].kernel
    assert (kernel.kind, kernel.shape, kernel.name) == (kind, weights.shape, "conv")
    np.testing.assert_array_equal(kernel.values(), weights)


@pytest.mark.parametrize("group", [1, 2])
def test_a_deconvolution_is_turned_to_output_channels_first(files, group):
    """deconv_layer.cpp swaps the roles of input and output of Convolution: its blob is (in, out/group, kh, kw)."""
    record = telling_record(6, epsilon=2.5e-3)
    weights = np.arange(4 * 6 // group * 4, dtype=np.float32).reshape(4, 6 // group, 2, 2)
    conv = layer("up", "Deconvolution", "data", "up", [weights], convolution_param={"group": group})
    files.save(net(conv, batch_norm("bn", record, "up", "out")))
    kernel = files.read()["bn"].kernel
    assert (kernel.kind, kernel.shape) == ("transposed", (6, 4 // group, 2, 2))
    values = kernel.values()
    for i in range(4):
        for o in range(6 // group):
            whole = i // (4 // group) * (6 // group) + o
            np.testing.assert_array_equal(values[whole, i % (4 // group)], weights[i, o])


def test_an_inner_product_is_a_dense_kernel_whichever_way_it_is_stored(files):
    record = telling_record(4, epsilon=2.5e-3)
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    for stored, shape, transpose in ((weights, None, False), (weights.T, None, True), (weights, (1, 1, 4, 3), False)):
        stored = np.ascontiguousarray(stored)
        dense = layer("fc", "InnerProduct", "data", "fc", [blob(stored, shape=shape, form="legacy" if shape else "packed")],
                      inner_product_param={"transpose": transpose})  # fmt: skip
        files.save(net(dense, batch_norm("bn", record, "fc")))
        kernel = files.read()["bn"].kernel
        assert (kernel.kind, kernel.shape) == ("dense", (4, 3))
        np.testing.assert_array_equal(kernel.values(), weights)


def test_inputs_are_the_batch_norms_that_reach_a_layer_with_none_between(files):
    r = one()
    files.save(
        net(
            batch_norm("a", r, "data", "a"), scale("as", r, "a", "a"), layer("ra", "ReLU", "a", "a"),
            batch_norm("b", r, "a", "b"), layer("sum", "Eltwise", "a b", "sum"),
            batch_norm("c", r, "sum", "c"), batch_norm("d", r, "data", "d"),
        )
    )  # fmt: skip
    layers = files.read()
    assert {name: layer_.inputs for name, layer_ in layers.items()} == {"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}


# ---- running


def test_run_is_opencvs_own_output(files):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn", factor=FACTOR), scale("scale", record, "bn", "out")))
    x = probes(record)
    (y,) = files.cv2(x)
    np.testing.assert_array_equal(caffe.run(files.model, "bn", x)["cv2.dnn"], y)
    np.testing.assert_array_equal(caffe.run(files.model, "bn", x, prototxt=files.text)["cv2.dnn"], y)


def test_run_uses_the_layers_own_bytes_from_hdf5_and_nvidia_files_too(files, tmp_path):
    record = one()
    x = probes(record)
    files.save(net(five(record, scale_bias=True)))
    assert_within_bound(caffe.run(files.model, "bn", x)["cv2.dnn"], record, x)
    path = str(tmp_path / "net.caffemodel.h5")
    save_hdf5(path, net(five(record)))
    assert_within_bound(caffe.run(path, "bn", x)["cv2.dnn"], record.replace(epsilon=1e-5), x)


def test_many_layers_run_in_one_process_and_each_gets_its_own_input_and_epsilon(files):
    a, b = one(), one(seed=1, epsilon=7e-3)
    first, second = batch_norm("a", a, "data", "x"), batch_norm("b", b, "x", "y")
    second.ClearField("batch_norm_param")
    files.save(net(first, scale("as", a, "x", "x"), second, scale("bs", b, "y", "p"), scale("bt", a, "y", "q")))
    inputs = {"a": probes(a), "b+bs": probes(b)}
    outputs = caffe.run_all(files.model, inputs, epsilon=7e-3)
    assert_within_bound(outputs["a"]["cv2.dnn"], a, inputs["a"])
    assert_within_bound(outputs["b+bs"]["cv2.dnn"], b, inputs["b+bs"])


def test_run_says_what_no_engine_can_run_and_refuses_wrong_input(files):
    record = one()
    files.save(net(bn_layer(record)))
    with pytest.raises(NotFound, match="type BN"):
        caffe.run(files.model, "bn", probes(record))
    files.save(net(batch_norm("bn", record, "data", "bn")))
    with pytest.raises(InvalidValue, match=r"\(N, 7\)"):
        caffe.run(files.model, "bn", np.ones((2, 6), np.float32))
    with pytest.raises(NotFound, match="no BatchNorm layer 'nb'"):
        caffe.run(files.model, "nb", probes(record))


def test_run_without_opencv_4_says_what_to_install(files, monkeypatch, tmp_path):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "cv2.py").write_text("raise ImportError('no cv2 here')")
    with pytest.raises(MissingDependency, match=r"opencv-python-headless>=4\.5,<5"):
        caffe.run(files.model, "bn", probes(record))
    (tmp_path / "cv2.py").write_text("__version__ = '5.0.0'\nclass dnn: pass")
    with pytest.raises(MissingDependency, match=r"this is 5\.0\.0"):
        caffe.run(files.model, "bn", probes(record))


def test_a_crash_of_the_engine_is_an_error_of_ours(files, monkeypatch, tmp_path):
    from bnport.errors import BnportError

    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "cv2.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BnportError, match=r"bn: cv2\.dnn crashed \(signal 11\)"):
        caffe.run(files.model, "bn", probes(record))
