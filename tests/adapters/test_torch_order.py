"""The order of modules: of definition in files that are sorted by name, as torch's own state dict shows it, and of calls."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from bnport.adapters import read
from bnport.adapters.torch.order import as_defined, is_sorted
from bnport.containers.safetensors import open_safetensors
from bnport.errors import MatchError
from bnport.layer import Layers
from bnport.match import match
from tests.zoo import torchvision


def modules(names):
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def test_the_order_of_a_resnet_is_that_of_its_definition(tmp_path):
    state = torchvision.models.resnet50(weights=None).state_dict()
    path = str(tmp_path / "resnet50.safetensors")
    safetensors.torch.save_file(state, path)
    tensors, _ = open_safetensors(path)
    assert is_sorted(tensors)
    assert modules(tensors) != modules(state)
    assert modules(as_defined(tensors)[0]) == modules(state)
    torch.save(state, tmp_path / "resnet50.pth")
    kernels = [{n: layer.kernel and layer.kernel.name for n, layer in read(str(p)).items()} for p in tmp_path.iterdir()]
    assert kernels[0] == kernels[1]
    assert len(kernels[0]) == 53
    assert None not in kernels[0].values()


def test_tensors_in_another_order_than_that_of_names_stay_in_it():
    class Any:
        dtype, shape = "float32", (3,)

    names = ["b.weight", "a.weight", "c.running_mean"]
    tensors, ordered = as_defined(dict.fromkeys(names, Any()))
    assert (list(tensors), ordered) == (names, True)
    tensors, ordered = as_defined(dict.fromkeys(sorted(names), Any()))
    assert (list(tensors), ordered) == (["c.running_mean", "a.weight", "b.weight"], False)


def test_children_go_by_number_then_kernel_before_norm_and_10_comes_after_9(tmp_path):
    net = torch.nn.Module()
    for i in range(8, 12):
        net.add_module(f"conv{i}", torch.nn.Conv2d(4, 4, 3))
        net.add_module(f"bn{i}", torch.nn.BatchNorm2d(4))
    net.add_module("fc", torch.nn.Linear(4, 4))
    path = str(tmp_path / "net.safetensors")
    safetensors.torch.save_file(net.state_dict(), path)
    assert modules(as_defined(open_safetensors(path)[0])[0]) == modules(net.state_dict())


def test_a_layer_that_forward_never_calls_is_named_and_not_the_one_that_lacks_an_equal_name():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for n in (1, 2, 3, 4):
                setattr(self, f"bn{n}", torch.nn.BatchNorm2d(4))

        def forward(self, x):
            return self.bn4(self.bn2(self.bn1(x)))

    net = Net().eval()
    layers = read(net)
    (note,) = layers.notes
    assert note == "forward() never calls bn3; a target without them pairs with --skip bn3"
    twin = Layers([layers[old].but(name=new, inputs=()) for new, old in (("bn1", "bn1"), ("bn2", "bn2"), ("bn3", "bn4"))],
                  source="twin", format="made")  # fmt: skip
    with pytest.raises(MatchError, match=r"never calls bn3.*so it need not be bn4"):
        match(layers, twin).raise_if_bad()
