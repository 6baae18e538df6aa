"""Caffe, ONNX and torch copies of one network against each other: who belongs to whom is known by the numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bnport.adapters import read
from bnport.match import match
from tests.adapters import caffe_files as caffe
from tests.zoo import torchvision

FORMATS = ("caffe", "onnx", "torch", "live")
SIZE = 32


def small_resnet50():
    """torchvision's definition of ResNet-50 with narrow 3x3 convolutions, every BatchNorm with numbers of its own."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.resnet.ResNet(block, [3, 4, 6, 3], width_per_group=8, num_classes=2)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            torch.nn.init.normal_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


def as_caffe(model, path):
    """The same network as MSRA's prototxt names and orders it: the shortcut (branch1) first."""
    made = []

    def unit(conv, norm, name, bottom):
        source = read(norm)
        record = next(iter(source.values())).record
        weight = conv.weight.detach().numpy()
        parameters = {"num_output": weight.shape[0], "bias_term": False, "kernel_size": [weight.shape[2]]}
        made.append(
            caffe.layer(f"res{name}", "Convolution", bottom, f"res{name}", [weight], convolution_param=parameters)
        )
        made.append(caffe.batch_norm(f"bn{name}", record, f"res{name}"))
        made.append(caffe.scale(f"scale{name}", record, f"res{name}"))
        return f"res{name}"

    def relu(top):
        made.append(caffe.layer(f"{top}_relu", "ReLU", top))
        return top

    top = relu(unit(model.conv1, model.bn1, "_conv1", "data"))
    made.append(caffe.layer("pool1", "Pooling", top, "pool1"))
    top = "pool1"
    for stage, blocks in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        for letter, block in zip("abcdef", blocks, strict=False):
            name, short = f"{stage + 2}{letter}", top
            if block.downsample is not None:
                short = unit(block.downsample[0], block.downsample[1], f"{name}_branch1", top)
            inner = relu(unit(block.conv1, block.bn1, f"{name}_branch2a", top))
            inner = relu(unit(block.conv2, block.bn2, f"{name}_branch2b", inner))
            inner = unit(block.conv3, block.bn3, f"{name}_branch2c", inner)
            made.append(caffe.layer(f"res{name}", "Eltwise", f"{short} {inner}", f"res{name}"))
            top = relu(f"res{name}")
    caffe.save(path, caffe.net(*made))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    model = small_resnet50()
    as_caffe(model, str(folder / "net.caffemodel"))
    torch.save(model.state_dict(), folder / "net.pth")
    x = torch.zeros(1, 3, SIZE, SIZE)
    torch.onnx.export(model, (x,), str(folder / "net.onnx"), dynamo=True, optimize=False, verbose=False)
    files = {"caffe": "net.caffemodel", "onnx": "net.onnx", "torch": "net.pth"}
    found = {name: read(str(folder / file)) for name, file in files.items()}
    return {**found, "live": read(model)}


def without(layers, **changes):
    return {name: each.but(**{k: v(each) for k, v in changes.items()}) for name, each in layers.items()}


@pytest.mark.parametrize("contents", [True, False], ids=["kernels ported", "kernels not ported"])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FORMATS, 2)))
def test_copies_of_one_network_pair_by_their_numbers(copies, source, target, contents):
    sources, targets = copies[source], copies[target]
    if not contents:
        targets = without(targets, kernel=lambda each: each.kernel and each.kernel._replace(values=None))
    found = match(sources, targets)
    found.raise_if_bad()
    assert len(found.pairs) == 53
    wrong = [
        (t, s) for t, s in found.pairs.items() if not np.array_equal(sources[s].record.gamma, targets[t].record.gamma)
    ]
    assert wrong == []
    if contents and "caffe" in (source, target) and "torch" not in (source, target):
        assert found.evidence["bn2a_branch1" if target == "caffe" else next(iter(found.pairs))][0] == "equal kernels"
