"""A small residual network in PyTorch, its twin in Keras and its ONNX export, all computing the same function."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions, a residual branch and a linear head; BatchNorm with telling statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)
        rng = np.random.default_rng(seed)
        for bn in (self.bn1, self.bn2, self.bn3):
            count = bn.num_features
            with torch.no_grad():
                bn.weight.copy_(torch.from_numpy(rng.normal(1, 0.3, count) * rng.choice([-1, 1], count)))
                bn.bias.copy_(torch.from_numpy(rng.normal(0.1, 0.4, count)))
                bn.running_mean.copy_(torch.from_numpy(rng.normal(0, 0.3, count)))
                bn.running_var.copy_(torch.from_numpy(10 ** rng.uniform(-3, 0, count)))
        self.eval()

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.down(x)))
        return self.fc(x.mean((2, 3)))


def keras_twin(net: Net, padding: str = "torch") -> keras.Model:
    """The same network: kernels transposed, BatchNorm by set_weights in Keras' order. `padding="same"` pads wrongly."""
    layers = keras.layers
    inputs = keras.Input((16, 16, 3))
    if padding == "torch":
        x = layers.ZeroPadding2D(1)(inputs)
        x = layers.Conv2D(8, 3, strides=2, padding="valid", use_bias=False, name="conv1")(x)
    else:  # TensorFlow pads an even image at the bottom and right only
        x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv1")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="bn1")(x))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv2")(x)
    y = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="bn2")(y))
    x = layers.Add()([x, y])
    x = layers.Conv2D(12, 1, use_bias=False, name="down")(x)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="bn3")(x))
    x = layers.Dense(5, name="fc")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x, name="twin")
    for name in ("conv1", "conv2", "down"):
        kernel = getattr(net, name).weight.detach().numpy()
        model.get_layer(name).set_weights([kernel.transpose(2, 3, 1, 0)])
    for name in ("bn1", "bn2", "bn3"):
        model.get_layer(name).set_weights(batchnorm_weights(getattr(net, name)))
    model.get_layer("fc").set_weights([net.fc.weight.detach().numpy().T, net.fc.bias.detach().numpy()])
    return model


def batchnorm_weights(bn: nn.Module) -> list[np.ndarray]:
    return [t.detach().numpy() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]


def export(net: Net, path: str) -> str:
    """The ONNX file of the network, BatchNorm kept."""
    torch.onnx.export(
        net, (torch.zeros(1, 3, 16, 16),), path, input_names=["x"], dynamo=False, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE, dynamic_axes={"x": {0: "n"}},
    )  # fmt: skip
    return path


def images(count: int = 4, seed: int = 0) -> np.ndarray:
    """NCHW float32."""
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)
