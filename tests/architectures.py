"""Published architectures in PyTorch and Keras, and the oracle for their pairing: port along it, and compare outputs.

Given pairs of BatchNorm layers, the kernels that feed them are paired too; everything else that has weights is paired
by shape and order of execution. If the two frameworks then compute the same function, the pairing is right; no table of
ours is asked. Kernels are found in the frameworks' own objects, not by bnport.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import torch
from keras.src.applications.nasnet import NASNet  # the public ones have one size each

from tests.zoo import timm, torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Architecture(NamedTuple):
    """One network in both frameworks.

    same: whether the two compute the same function once the parameters are ported (with an input of `size` pixels).
    by_file: whether a state dict, which has no graph, decides every pair too.
    """

    torch: Callable[[], torch.nn.Module]
    keras: Callable[[int], keras.Model]
    size: int
    same: bool = True
    by_file: bool = True


def _tv(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, **options)


def _timm(name: str) -> Callable[[], torch.nn.Module]:
    return lambda: timm.create_model(name, pretrained=False)


def _app(name: str, **options: Any) -> Callable[[int], keras.Model]:
    return lambda size: getattr(keras.applications, name)(
        weights=None, classifier_activation=None, input_shape=(size, size, 3), **options
    )


def _efficientnet(name: str) -> Callable[[int], keras.Model]:
    """Without the division of pixels by 255, which is not in timm's."""

    def build(size: int) -> keras.Model:
        model = _app(name)(size)
        model.get_layer("rescaling").scale = 1.0
        return model

    return build


def _resnet(name: str) -> Callable[[], torch.nn.Module]:
    """torchvision strides in the 3x3 convolution of a block, keras.applications in the first 1x1."""

    def build() -> torch.nn.Module:
        model = _tv(name)()
        for block in model.modules():
            if isinstance(block, torchvision.models.resnet.Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
        return model

    return build


def _inception() -> torch.nn.Module:
    """TensorFlow's average pooling leaves the padding out of the mean."""
    model = _tv("inception_v3", aux_logits=False, init_weights=False)()
    return _PaddingNotCounted(model)


class _PaddingNotCounted(torch.nn.Module):
    def __new__(cls, model: torch.nn.Module) -> torch.nn.Module:
        functional, plain = torch.nn.functional, model.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            pool = functional.avg_pool2d
            functional.avg_pool2d = lambda *a, **k: pool(*a, **{**k, "count_include_pad": False})
            try:
                return plain(x)
            finally:
                functional.avg_pool2d = pool

        model.counted = forward
        return model


def _resnetv2() -> torch.nn.Module:
    """timm strides in the first block of a stage, keras.applications in the last: neither strides here."""
    model = timm.create_model("resnetv2_50", pretrained=False)
    for stage in model.stages:
        for module in stage.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.stride = (1, 1)
    model.stem.pool = torch.nn.Sequential(torch.nn.ZeroPad2d(1), torch.nn.MaxPool2d(3, 2))  # Keras pads with zeros
    return model


def _resnetv2_keras(size: int) -> keras.Model:
    model = _app("ResNet50V2")(size)
    config = model.get_config()
    for layer in config["layers"]:
        inner = "_block" in layer["name"] or tuple(layer["config"].get("pool_size", ())) == (1, 1)
        if inner and "strides" in layer["config"]:
            layer["config"]["strides"] = [1, 1]
    return keras.Model.from_config(config)


class _ZeroPaddedMaxPool(torch.nn.MaxPool2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(timm.layers.padding.pad_same(x, (3, 3), (2, 2)))


def _nasnet(repeats: int = 6, *, skip: bool = True, **options: Any) -> Callable[[], torch.nn.Module]:
    """timm's NASNet with `repeats` normal cells to a stage, max pooling over zeros.

    Before it pools, keras.applications pads with zeros, and timm with minus infinity. What is pooled has no ReLU before
    it, so that a maximum of negative numbers at the border is 0 in one and negative in the other.
    skip: whether the cell after a reduction takes the input before last of that reduction, as in NASNetLarge, or the
    last, as in NASNetMobile.
    """

    def build() -> torch.nn.Module:
        model = timm.models.nasnet.NASNetALarge(**options)
        stages = [[f"cell_{first + i}" for i in range(repeats)] for first in (0, 6, 12)]
        for name, _ in list(model.named_children()):
            if name.startswith("cell_") and name[5:].isdigit() and not any(name in stage for stage in stages):
                delattr(model, name)
        for cell in model.children():
            for name, module in list(cell.named_children()):
                if isinstance(module, timm.layers.pool2d_same.MaxPool2dSame):
                    setattr(cell, name, _ZeroPaddedMaxPool(3, 2))

        def features(x: torch.Tensor) -> torch.Tensor:
            before = model.conv0(x)
            x = model.cell_stem_0(before)
            before, x = x, model.cell_stem_1(before, x)
            for i, stage in enumerate(stages):
                if i:
                    reduced = getattr(model, f"reduction_cell_{i - 1}")(x, before)
                    before, x = before if skip else x, reduced
                for name in stage:
                    before, x = x, getattr(model, name)(x, before)
            return model.act(x)

        if repeats < 6 or not skip:
            model.forward_features = features
        return model

    return build


def _small_nasnet(size: int) -> keras.Model:
    return NASNet(
        (size, size, 3),
        penultimate_filters=192,
        num_blocks=2,
        stem_block_filters=12,
        weights=None,
        classes=10,
        default_size=size,
        classifier_activation=None,
    )


ARCHITECTURES = {
    "ResNet50": Architecture(_resnet("resnet50"), _app("ResNet50"), 64),
    "ResNet101": Architecture(_resnet("resnet101"), _app("ResNet101"), 64),
    "ResNet152": Architecture(_resnet("resnet152"), _app("ResNet152"), 64),
    "ResNet50V2": Architecture(_resnetv2, _resnetv2_keras, 32),
    "DenseNet121": Architecture(_tv("densenet121"), _app("DenseNet121"), 64),
    "DenseNet169": Architecture(_tv("densenet169"), _app("DenseNet169"), 64),
    "MobileNetV2": Architecture(_tv("mobilenet_v2"), _app("MobileNetV2"), 65),
    "MobileNetV2 of timm": Architecture(_timm("mobilenetv2_100"), _app("MobileNetV2"), 65),
    "MobileNetV3Small": Architecture(
        _tv("mobilenet_v3_small"), _app("MobileNetV3Small", include_preprocessing=False), 65
    ),
    "MobileNetV3Small of timm": Architecture(
        _timm("tf_mobilenetv3_small_100"), _app("MobileNetV3Small", include_preprocessing=False), 64
    ),
    "MobileNetV3Large": Architecture(
        _tv("mobilenet_v3_large"), _app("MobileNetV3Large", include_preprocessing=False), 65
    ),
    "MobileNetV3Large of timm": Architecture(
        _timm("tf_mobilenetv3_large_100"), _app("MobileNetV3Large", include_preprocessing=False), 64
    ),
    "InceptionV3": Architecture(_inception, _app("InceptionV3"), 75),
    "EfficientNetB0": Architecture(_timm("tf_efficientnet_b0"), _efficientnet("EfficientNetB0"), 64),
    "EfficientNetB1": Architecture(_timm("tf_efficientnet_b1"), _efficientnet("EfficientNetB1"), 64),
    "EfficientNetB2": Architecture(_timm("tf_efficientnet_b2"), _efficientnet("EfficientNetB2"), 64),
    "EfficientNetB3": Architecture(_timm("tf_efficientnet_b3"), _efficientnet("EfficientNetB3"), 64),
    "Xception": Architecture(_timm("legacy_xception"), _app("Xception"), 71),
    "InceptionResNetV2": Architecture(_timm("inception_resnet_v2"), _app("InceptionResNetV2"), 75),
    "NASNetMobile": Architecture(
        _nasnet(4, skip=False, num_features=1056, stem_size=32), _app("NASNetMobile"), 66, by_file=False
    ),
    "NASNetLarge": Architecture(_nasnet(), _app("NASNetLarge"), 67, by_file=False),
    "NASNet with two cells to a stage": Architecture(
        _nasnet(2, num_features=192, stem_size=12, num_classes=10), _small_nasnet, 67, by_file=False
    ),
}


def build(name: str) -> tuple[torch.nn.Module, keras.Model]:
    """Both networks in float64, the torch one with telling parameters in eval mode."""
    keras.utils.clear_session()
    torch.manual_seed(0)
    source = telling(ARCHITECTURES[name].torch().double(), ARCHITECTURES[name].size)
    plain, policy = (
        keras.config.floatx(),
        keras.config.dtype_policy(),
    )  # the policy is made from floatx at its first use
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        target = ARCHITECTURES[name].keras(ARCHITECTURES[name].size)
    finally:
        keras.config.set_floatx(plain)
        keras.config.set_dtype_policy(policy)
    return source, target


def telling(model: torch.nn.Module, size: int) -> torch.nn.Module:
    """Distinct numbers in every BatchNorm: gamma of both signs, statistics of real activations, so that none explodes."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data *= torch.where(torch.rand_like(norm.weight) < 0.2, -1, 1)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = None
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    forward = getattr(model, "counted", model)
    model.train()
    with torch.no_grad():
        for _ in range(1):
            forward(torch.cat([x, x.flip(3)]))
    return model.eval()


class Fed(NamedTuple):
    """The weighted layers of a model: what feeds each BatchNorm, and the others in order of execution."""

    by_norm: dict[str, Any]
    rest: list[Any]
    before: dict[Any, Any]  # torch: a pointwise convolution -> the one whose output it takes directly


def fed_torch(model: torch.nn.Module, size: int) -> Fed:
    names = {m: n for n, m in model.named_modules()}
    made: dict[int, Any] = {}
    before: dict[Any, Any] = {}
    alive: list[Any] = []
    by_norm: dict[str, Any] = {}
    order: list[Any] = []

    def weighted(module: Any, args: Any, out: Any) -> None:
        if id(args[0]) in made:
            before[module] = made[id(args[0])]
        made[id(out)] = module
        alive.append(out)
        order.append(module)

    def norm(module: Any, args: Any) -> None:
        if id(args[0]) in made:
            by_norm[names[module]] = made[id(args[0])]

    hooks = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            hooks.append(module.register_forward_hook(weighted))
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(norm))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    feeding = set(by_norm.values())
    return Fed(by_norm, [m for m in order if m not in feeding], before)


def fed_keras(model: keras.Model) -> Fed:
    by_norm: dict[str, Any] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            operation = layer.input._keras_history.operation
            if operation.weights and not isinstance(operation, keras.layers.BatchNormalization):
                by_norm[layer.name] = operation
    feeding = {id(v) for v in by_norm.values()}
    rest = [
        layer
        for layer in model.layers
        if id(layer) not in feeding and any(w.path.endswith("kernel") for w in layer.weights)
    ]
    return Fed(by_norm, rest, {})


def kernel_of(layer: Any) -> tuple[Any, Any]:
    """The kernel of a Keras layer as (variable, bias variable or None)."""
    last = "pointwise_kernel" if isinstance(layer, keras.layers.SeparableConv2D) else "kernel"
    kernel = next(w for w in layer.weights if w.path.endswith(last))
    return kernel, next((w for w in layer.weights if w.path.endswith("bias")), None)


def transposed(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A torch weight in the layout of a Keras variable of `shape`."""
    if weight.ndim == len(shape) == 2:
        return weight.T
    if weight.ndim == 2:
        weight = weight[:, :, None, None]
    if len(shape) == 2:
        return weight[:, :, 0, 0].T
    if weight.shape[1] == 1 and shape[3] == 1 and shape[2] == weight.shape[0]:
        return weight.transpose(2, 3, 0, 1)  # depthwise
    return weight.transpose(2, 3, 1, 0)


def _shape_in_keras(module: Any, shape: tuple[int, ...]) -> bool:
    weight = tuple(module.weight.shape)
    try:
        return transposed(np.empty(weight, np.float32), shape).shape == shape
    except (ValueError, IndexError):
        return False


def port(
    source: torch.nn.Module, target: keras.Model, pairs: Mapping[str, str], fed: tuple[Fed, Fed], *, whole: bool = True
) -> None:
    """Write the parameters of the torch model into the Keras model along `pairs` (target name -> source name).

    `whole`: also those of layers that feed no BatchNorm.
    """
    modules = dict(source.named_modules())
    separate: set[Any] = set()
    for t, s in pairs.items():
        norm, layer = modules[s], target.get_layer(t)
        values = (
            [norm.weight] * bool(layer.scale) + [norm.bias] * bool(layer.center) + [norm.running_mean, norm.running_var]
        )
        layer.set_weights([v.detach().numpy() for v in values])
        layer.epsilon = norm.eps
        if not layer.scale:
            assert bool((norm.weight == 1).all())
        assert (t in fed[1].by_norm) == (s in fed[0].by_norm), (s, t)
        if t in fed[1].by_norm:
            module, layer = fed[0].by_norm[s], fed[1].by_norm[t]
            _port_kernel(module, *kernel_of(layer))
            if isinstance(layer, keras.layers.SeparableConv2D):
                first = fed[0].before[module]
                _port_kernel(first, layer.depthwise_kernel, None)
                separate.add(first)
    if not whole:
        return
    rest = [m for m in fed[0].rest if m not in separate]
    for layer in fed[1].rest:
        kernel, bias = kernel_of(layer)
        at = next(i for i, m in enumerate(rest) if _shape_in_keras(m, tuple(kernel.shape)))
        _port_kernel(rest.pop(at), kernel, bias)
    assert not rest, rest


def _port_kernel(module: Any, kernel: Any, bias: Any) -> None:
    kernel.assign(transposed(module.weight.detach().numpy(), tuple(kernel.shape)))
    if module.bias is not None:
        bias.assign(module.bias.detach().numpy())
    elif bias is not None:
        bias.assign(np.zeros(bias.shape))


def difference(name: str, source: torch.nn.Module, target: keras.Model) -> float:
    """The largest difference of the two networks' outputs on one random input, relative to the largest output."""
    size = ARCHITECTURES[name].size
    x = np.random.default_rng(1).normal(size=(1, 3, size, size))
    with torch.no_grad():
        expected = getattr(source, "counted", source)(torch.from_numpy(x)).numpy()
    feed = x.transpose(0, 2, 3, 1)
    got = np.asarray(target(feed, training=False))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def same_gamma(source: torch.nn.Module, target: keras.Model, pairs: Mapping[str, str]) -> None:
    """gamma 1 in the source where the target has none (keras.applications' Inception networks have scale=False)."""
    modules = dict(source.named_modules())
    with torch.no_grad(), contextlib.suppress(KeyError):
        for t, s in pairs.items():
            if not target.get_layer(t).scale:
                modules[s].weight.fill_(1)
