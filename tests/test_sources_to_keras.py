"""Every source into every kind of Keras target, over one network, judged by the real engines alone.

The network runs in the source's own engine (PyTorch, Keras, OpenCV for Caffe, onnxruntime). What enters each of its
BatchNorm layers there is given to the real Keras layer that was ported, and the two outputs may differ by the sum of the
bounds of two correct float32 engines; where the port had to round, by one rounding of the parameters more.
"""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from keras import layers
from torch import nn

import bnport
from tests.adapters import caffe_files, onnx_files
from tests.adapters.contract import telling_record

WIDTHS = (6, 6, 4)  # two alike, so that a swapped pair is possible
NAMES = ("bn1", "bn2", "bn3")
RECORDS = {
    name: telling_record(width, seed=k, epsilon=epsilon)
    for k, (name, width, epsilon) in enumerate(zip(NAMES, WIDTHS, (1e-5, 2e-4, 1e-5), strict=True))
}
FACTORS = (999.98236, 1.0, 731.5)  # Caffe's third blob
KERNELS = [
    np.random.default_rng(20 + k).normal(0, 0.4, (out, into, 3, 3)).astype(np.float32)
    for k, (into, out) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False))
]
IMAGES = np.random.default_rng(9).normal(0, 1, (2, 3, 8, 8)).astype(np.float32)
BY_PYTORCH = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}


# ---- the network in each framework: how it is made, and what enters and leaves each BatchNorm there


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for k, (kernel, name) in enumerate(zip(KERNELS, NAMES, strict=True), start=1):
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, bias=False)
            bn = nn.BatchNorm2d(kernel.shape[0], eps=RECORDS[name].epsilon)
            with torch.no_grad():
                conv.weight.copy_(torch.from_numpy(kernel))
                for ours, theirs in BY_PYTORCH.items():
                    getattr(bn, theirs).copy_(torch.from_numpy(np.array(getattr(RECORDS[name], ours))))
            self.add_module(f"conv{k}", conv)
            self.add_module(name, bn)
        self.eval()

    def forward(self, x):
        for k in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(x)))
        return x


def in_pytorch():
    net, seen = Net(), {}
    for name in NAMES:
        getattr(net, name).register_forward_hook(
            lambda _, given, made, name=name: seen.update({name: (given[0].numpy(), made.numpy())})
        )
    with torch.no_grad():
        net(torch.from_numpy(IMAGES))
    return seen


def keras_net(records=None):
    """With Keras' own defaults (epsilon 1e-3, fresh statistics), or a record in each BatchNorm."""
    x = image = keras.Input((8, 8, 3))
    for k, (name, kernel) in enumerate(zip(NAMES, KERNELS, strict=True), start=1):
        conv = layers.Conv2D(kernel.shape[0], 3, padding="same", use_bias=False, name=f"conv{k}")
        bn = layers.BatchNormalization(name=name, **({"epsilon": records[name].epsilon} if records else {}))
        x = layers.ReLU()(bn(conv(x)))
        conv.set_weights([kernel.transpose(2, 3, 1, 0)])
        if records:
            bn.gamma.assign(records[name].gamma)
            bn.beta.assign(records[name].beta)
            bn.moving_mean.assign(records[name].mean)
            bn.moving_variance.assign(records[name].variance)
    return keras.Model(image, x)


def in_keras():
    net = keras_net(RECORDS)
    ends = [end for name in NAMES for end in (net.get_layer(name).input, net.get_layer(name).output)]
    made = [
        np.moveaxis(keras.ops.convert_to_numpy(y), -1, 1)
        for y in keras.Model(net.input, ends)(IMAGES.transpose(0, 2, 3, 1))
    ]
    return {name: (made[2 * k], made[2 * k + 1]) for k, name in enumerate(NAMES)}


def caffe_net():
    made, bottom = [], "data"
    for k, (name, kernel, factor) in enumerate(zip(NAMES, KERNELS, FACTORS, strict=True), start=1):
        settings = {"num_output": kernel.shape[0], "kernel_size": [3], "pad": [1], "bias_term": False}
        record = RECORDS[name]
        made += [
            caffe_files.layer(f"conv{k}", "Convolution", bottom, f"conv{k}", [kernel], convolution_param=settings),
            caffe_files.batch_norm(name, record, f"conv{k}", name, factor=factor),
            caffe_files.scale(f"scale{k}", record, name, f"scale{k}"),
            caffe_files.layer(f"relu{k}", "ReLU", f"scale{k}", f"relu{k}"),
        ]
        bottom = f"relu{k}"
    return caffe_files.net(*made)


def in_caffe(folder):
    path, text = caffe_source(folder)
    wanted = [f"{kind}{k}" for k in (1, 2, 3) for kind in ("conv", "scale")]
    made = caffe_files.cv2_outputs(text, path, IMAGES, wanted)
    return {name: (made[2 * k], made[2 * k + 1]) for k, name in enumerate(NAMES)}


def onnx_source(folder):
    path = str(folder / "net.onnx")
    if not os.path.exists(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Net(), (torch.from_numpy(IMAGES),), path, dynamo=False, verbose=False, do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
            )  # fmt: skip
    return path


def in_onnx(folder):
    model = onnx.load(onnx_source(folder))
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    ends = [end for node in nodes for end in (node.input[0], node.output[0])]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(e, onnx.TensorProto.FLOAT, None) for e in ends)
    session = onnx_files.session(model)
    made = session.run(ends, {session.get_inputs()[0].name: IMAGES})
    return {name: (made[2 * k], made[2 * k + 1]) for k, name in enumerate(NAMES)}


# ---- sources as people have them: (what to convert, its options)


def state_dict(folder):
    torch.save(Net().state_dict(), folder / "net.pth")
    return str(folder / "net.pth")


def whole_module(folder):
    torch.save(Net(), folder / "module.pt")
    return str(folder / "module.pt")


def safe_tensors(folder):
    safetensors.torch.save_file(Net().state_dict(), folder / "net.safetensors")
    return str(folder / "net.safetensors")


def keras_file(suffix):
    def make(folder):
        path = str(folder / f"source{suffix}")
        net = keras_net(RECORDS)
        if suffix == ".weights.h5":
            net.save_weights(path)
        else:
            net.save(path)
        return path

    return make


def caffe_source(folder):
    path, text = str(folder / "net.caffemodel"), str(folder / "net.prototxt")
    caffe_files.save(path, caffe_net())
    with open(text, "w", encoding="utf-8") as file:
        file.write(caffe_files.prototxt(caffe_net(), input_shape=IMAGES.shape))
    return path, text


# name -> (engine, what to make, whether it holds epsilon)
SOURCES = {
    "torch state dict": ("torch", state_dict, False),
    "torch module file": ("torch", whole_module, True),
    "torch live": ("torch", lambda folder: Net(), True),
    "safetensors": ("torch", safe_tensors, False),
    "keras file": ("keras", keras_file(".keras"), True),
    "keras weights": ("keras", keras_file(".weights.h5"), False),
    "keras 2 file": ("keras", keras_file(".h5"), True),
    "keras live": ("keras", lambda folder: keras_net(RECORDS), True),
    "caffe": ("caffe", lambda folder: caffe_source(folder)[0], True),
    "onnx file": ("onnx", onnx_source, True),
    "onnx live": ("onnx", lambda folder: onnx.load(onnx_source(folder)), True),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """engine -> layer -> (what enters, what leaves), channels last, by the engine itself."""
    folder = tmp_path_factory.mktemp("engines")
    found = {"torch": in_pytorch(), "keras": in_keras(), "caffe": in_caffe(folder), "onnx": in_onnx(folder)}
    return {
        engine: {name: tuple(np.moveaxis(a, 1, -1) for a in pair) for name, pair in ends.items()}
        for engine, ends in found.items()
    }


def ported(kind, source, folder, **options):
    """The Keras model that a port into that kind of target ends in, loaded by Keras; and the report."""
    net = keras_net()
    if kind == "live":
        return net, bnport.convert(source, net, **options)
    path, out = str(folder / f"target{kind}"), str(folder / f"out{kind}")
    if kind == ".weights.h5":
        net.save_weights(path)
        report = bnport.convert(source, path, out, **options)
        net.load_weights(out)
        return net, report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.save(path)
    report = bnport.convert(source, path, out, **options)
    return keras.saving.load_model(out), report


@pytest.mark.parametrize("target", [".keras", ".weights.h5", ".h5", "live"])
@pytest.mark.parametrize("source", SOURCES)
def test_keras_computes_what_the_sources_own_engine_computes(source, target, seen, tmp_path):
    engine, make, holds_epsilon = SOURCES[source]
    made = make(tmp_path)
    # a source without epsilon is told one for all its layers: it is ported once for each that the network has
    nets = {None: NAMES} if holds_epsilon else {1e-5: ("bn1", "bn3"), 2e-4: ("bn2",)}
    for epsilon, names in nets.items():
        folder = tmp_path / f"epsilon-{epsilon}"
        folder.mkdir()
        net, report = ported(target, made, folder, epsilon=epsilon)
        assert report.ok
        for name in names:
            record = RECORDS[name]
            x, expected = seen[engine][name]
            y = keras.ops.convert_to_numpy(net.get_layer(name)(x, training=False))
            bound = 2 * record.error_bound(x)
            if (
                target == ".weights.h5" or engine == "caffe"
            ):  # another epsilon, or sums divided: parameters were rounded
                bound = bound + record.storage_bound(x)
            error = np.abs(y.astype(np.float64) - expected)
            assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"
            wrong = np.abs(record.replace(epsilon=1e-3)(x) - expected) > bound
            assert wrong.any(), "these inputs could not have told a wrong epsilon"
        others = net.get_layer("conv2").get_weights()[0]
        np.testing.assert_array_equal(others, KERNELS[1].transpose(2, 3, 1, 0))


def test_the_engines_agree_with_one_another_on_this_network(seen):
    """The premise: four frameworks hold the same function, each layer within the sum of two bounds."""
    for engine, ends in seen.items():
        for name, (x, y) in ends.items():
            record = RECORDS[name]
            bound = record.error_bound(x) + (record.storage_bound(x) if engine == "caffe" else 0)
            assert (np.abs(y - record(x)) <= bound).all(), (engine, name)
