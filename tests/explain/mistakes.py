"""Known mistakes, made with the frameworks' own calls: a PyTorch layer is the source, a Keras layer holds the wrong numbers.

`CASES` maps a name to (the mistake that explain must name, or "" for none; how the case is made). Used by the tests, one
case each, and by tests/benchmarks/bench_explain.py, thousands of each.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import torch

from bnport.layer import Layer
from bnport.record import FIELDS

WIDTHS = (8, 16, 24, 32, 64, 128, 256)


def realistic(rng, channels=None, epsilon=None):
    """A torch BatchNorm with statistics like those of trained networks.

    Variances spread log-normally over a few decades around a level that differs from layer to layer (with dead channels
    now and then), gamma around 1 or half-normal and small, beta mostly negative.
    """
    channels = channels or int(rng.choice(WIDTHS))
    module = torch.nn.BatchNorm2d(channels, eps=epsilon or float(rng.choice([1e-5, 1e-3, 1.001e-5]))).eval()
    gamma = rng.normal(1, 0.25, channels) if rng.random() < 0.6 else np.abs(rng.normal(0, 0.3, channels)) + 0.01
    if rng.random() < 0.3:
        gamma[rng.random(channels) < 0.3] *= -1
    if rng.random() < 0.2:
        gamma[rng.integers(channels)] = 0
    variance = np.exp(rng.normal(rng.uniform(-6, 2), rng.uniform(0.4, 1.5), channels))
    if rng.random() < 0.2:
        variance[rng.integers(channels)] = 10 ** rng.uniform(-12, -7)
    values = {
        "weight": gamma, "bias": rng.normal(-0.15, 0.4, channels), "running_var": variance,
        "running_mean": rng.normal(rng.normal(0, 0.3), 10 ** rng.uniform(-1, 0.3), channels),
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.from_numpy(value))
    return module


def source_layer(module, name="bn", **changes):
    arrays = {
        "gamma": module.weight, "beta": module.bias, "mean": module.running_mean, "variance": module.running_var
    }  # fmt: skip
    arrays = {field: array.detach().numpy().copy() for field, array in arrays.items()}
    settings = {
        "channels": module.num_features,
        "epsilon": module.eps,
        "momentum": 1 - module.momentum,
        "load": lambda: arrays,
    }
    return Layer(name, **{**settings, "stores": {*FIELDS, "epsilon", "momentum"}, **changes})


def keras_layer(channels, **settings):
    layer = keras.layers.BatchNormalization(**settings)
    layer.build((None, channels))
    return layer


def ported_layer(layer, name="batch_normalization"):
    names = [field for field, held in zip(FIELDS, (layer.scale, layer.center, True, True), strict=True) if held]
    arrays = dict(zip(names, layer.get_weights(), strict=True))
    return Layer(
        name, channels=arrays["mean"].size, epsilon=layer.epsilon, momentum=layer.momentum, load=lambda: arrays,
        stores={*names, "epsilon", "momentum"},
    )  # fmt: skip


def tensors(module):
    return [t.detach() for t in (module.weight, module.bias, module.running_mean, module.running_var)]


def written(module, weights, **settings):
    """One source layer and the Keras layer that set_weights(weights) was called on."""
    layer = keras_layer(module.num_features, **{"epsilon": module.eps, "momentum": 1 - module.momentum, **settings})
    layer.set_weights([np.asarray(w) for w in weights])
    return {"bn": source_layer(module)}, {"batch_normalization": ported_layer(layer)}, {"batch_normalization": "bn"}


def with_variance(formula):
    def make(rng):
        module = realistic(rng)
        gamma, beta, mean, variance = tensors(module)
        return written(module, [gamma, beta, mean, formula(variance, module.eps)])

    return make


def order(rng):
    module = realistic(rng)
    while (permutation := rng.permutation(4)).tolist() == [0, 1, 2, 3]:
        pass
    weights = tensors(module)
    return written(module, [weights[i] for i in permutation])


def mean_and_variance_swapped(rng):
    module = realistic(rng)
    gamma, beta, mean, variance = tensors(module)
    return written(module, [gamma, beta, variance, mean])


def variance_twice(rng):
    module = realistic(rng)
    gamma, beta, _, variance = tensors(module)
    return written(module, [gamma, beta, variance, variance])


def default_epsilon(rng):
    module = realistic(rng, epsilon=1e-5)
    return written(module, tensors(module), epsilon=keras.layers.BatchNormalization().epsilon)


def epsilon_absorbed_from_a_wrong_guess(rng):
    """Someone took a TensorFlow model's 1e-3 for PyTorch's 1e-5 and moved it into the variance of a Keras layer."""
    module = realistic(rng, epsilon=1e-3)
    gamma, beta, mean, variance = tensors(module)
    return written(module, [gamma, beta, mean, torch.clamp(variance + 1e-5, min=0)], epsilon=0.0)


def caffe(power):
    def make(rng):
        module = realistic(rng)
        factor = torch.tensor(float(rng.choice([999.98236, 1000.0, 993.2, 37.5])))
        mean_sum, variance_sum = module.running_mean * factor, module.running_var * factor
        module.running_mean.copy_(mean_sum / factor)
        module.running_var.copy_(variance_sum / factor)
        found = (mean_sum, variance_sum) if power > 0 else (module.running_mean / factor, module.running_var / factor)
        return written(module, [*tensors(module)[:2], *found])

    return make


def gamma_ignored(rng):
    module = realistic(rng)
    layer = keras_layer(module.num_features, epsilon=module.eps)
    layer.beta.assign(module.bias.detach().numpy())
    layer.moving_mean.assign(module.running_mean.numpy())
    layer.moving_variance.assign(module.running_var.numpy())
    return pair_of(module, layer)


def scale_false(rng):
    module = realistic(rng)
    return written(module, tensors(module)[1:], scale=False)


def gamma_kept(rng):
    """MXNet's fix_gamma: the stored gamma is not used there, and the port uses it."""
    module = realistic(rng)
    stored = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.fill_(1)
    return written(module, [stored, *tensors(module)[1:]])


def bessel(rng):
    module = realistic(rng)
    n = int(rng.choice([32, 128, 1000, 32 * 49, 32 * 56 * 56]))
    gamma, beta, mean, variance = tensors(module)
    ratio = n / (n - 1) if rng.random() < 0.5 else (n - 1) / n
    return written(module, [gamma, beta, mean, variance * ratio])


def inplace_abn(rng):
    """The source is InPlaceABN: its effective gamma is |weight| + eps, and the port took the weight."""
    module = realistic(rng)
    weight = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.copy_(weight.abs() + module.eps)
    return written(module, [weight, *tensors(module)[1:]])


def absolute(rng):
    module = realistic(rng)
    with torch.no_grad():
        module.weight[0] = -0.4
    return written(module, [module.weight.detach().abs() + module.eps, *tensors(module)[1:]])


def pair_of(module, layer):
    return {"bn": source_layer(module)}, {"batch_normalization": ported_layer(layer)}, {"batch_normalization": "bn"}


def gamma_and_beta_only(rng):
    module = realistic(rng)
    layer = keras_layer(module.num_features, epsilon=module.eps)
    layer.gamma.assign(module.weight.detach().numpy())
    layer.beta.assign(module.bias.detach().numpy())
    return pair_of(module, layer)


def statistics_only(rng):
    module = realistic(rng)
    layer = keras_layer(module.num_features, epsilon=module.eps)
    layer.moving_mean.assign(module.running_mean.numpy())
    layer.moving_variance.assign(module.running_var.numpy())
    return pair_of(module, layer)


def untouched(rng):
    module = realistic(rng)
    return pair_of(module, keras_layer(module.num_features, epsilon=module.eps))


def steps(rng):
    """Both layers saw the same batches; one with PyTorch's 0.1 (fraction of the new), one with 0.1 of the old kept."""
    channels = int(rng.choice(WIDTHS))
    x = torch.from_numpy(
        rng.normal(size=(64, channels)) * rng.uniform(0.2, 3, channels) + rng.normal(size=channels)
    ).float()
    right, wrong = (torch.nn.BatchNorm1d(channels, momentum=m) for m in (0.1, 0.9))
    with torch.no_grad():
        for module in (right, wrong):
            module.weight.copy_(torch.linspace(0.5, 1.5, channels))
            for _ in range(int(rng.integers(1, 4))):
                module.train()(x)
    return written(right.eval(), tensors(wrong))


def momentum(rng):
    module = realistic(rng)
    return written(module, tensors(module), momentum=module.momentum)


def channels_permuted(rng):
    module = realistic(rng)
    count = module.num_features
    kind = rng.integers(4)
    index = torch.from_numpy(rng.permutation(count))
    if kind == 0:
        index = torch.arange(count).flip(0)
    elif kind == 1 and count > 1:
        index = torch.roll(torch.arange(count), int(rng.integers(1, count)))
    elif kind == 2 and count % 2 == 0:
        index = torch.nn.ChannelShuffle(2)(torch.arange(count).float().reshape(1, count, 1, 1)).flatten().long()
    return written(module, [t[index] for t in tensors(module)])


def half(dtype):
    def make(rng):
        module = realistic(rng)
        return written(module, [t.to(dtype).float() for t in tensors(module)])

    return make


def folded(rng):
    """The affine map of an eval-mode layer, read off at 0 and 1, written into a layer that keeps its statistics."""
    module = realistic(rng)
    gamma, beta, mean, variance = tensors(module)
    a = gamma * torch.rsqrt(variance + module.eps)
    return written(module, [a, beta - mean * a, mean, variance])


def network(rng, count=4, epsilon=1e-5):
    channels = int(rng.choice(WIDTHS))
    return [realistic(rng, channels, epsilon) for _ in range(count)]


def as_models(modules, layers):
    sources = {f"bn{i}": source_layer(module, f"bn{i}") for i, module in enumerate(modules)}
    ported = {
        f"batch_normalization_{i}": ported_layer(layer, f"batch_normalization_{i}") for i, layer in enumerate(layers)
    }
    return sources, ported, dict(zip(ported, sources, strict=True))


def swapped(rng):
    modules = network(rng)
    layers = [keras_layer(m.num_features, epsilon=m.eps) for m in modules]
    one, other = rng.choice(4, 2, replace=False)
    order_ = list(range(4))
    order_[one], order_[other] = other, one
    for layer, i in zip(layers, order_, strict=True):
        layer.set_weights([t.numpy() for t in tensors(modules[i])])
    return as_models(modules, layers)


def swapped_with_keras_epsilon(rng):
    modules = network(rng)
    layers = [keras_layer(m.num_features) for m in modules]
    for layer, i in zip(layers, (1, 0, 2, 3), strict=True):
        layer.set_weights([t.numpy() for t in tensors(modules[i])])
    return as_models(modules, layers)


def flat_list(rng):
    """model.set_weights given all trainable weights first, then all statistics; Keras goes layer by layer."""
    modules = network(rng)
    inputs = keras.Input((modules[0].num_features,))
    layers = [keras.layers.BatchNormalization(epsilon=m.eps) for m in modules]
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs)
    trainable = [t.numpy() for m in modules for t in tensors(m)[:2]]
    rest = [t.numpy() for m in modules for t in tensors(m)[2:]]
    keras.Model(inputs, outputs).set_weights(trainable + rest)
    return as_models(modules, layers)


# ---- nothing to say


def healthy(rng):
    module = realistic(rng)
    return written(module, tensors(module), momentum=0.99)


def healthy_rounded(rng):
    module = realistic(rng).double()
    with torch.no_grad():
        module.running_var.mul_(1 + 1e-9)
    return written(module, tensors(module))


def healthy_absorbed(rng):
    module = realistic(rng, epsilon=1e-3)
    gamma, beta, mean, variance = (t.double() for t in tensors(module))
    return written(module, [gamma, beta, mean, variance + (1e-3 - 1e-5)], epsilon=1e-5)


def healthy_folded(rng):
    module = realistic(rng)
    gamma, beta, mean, variance = (t.double() for t in tensors(module))
    a = gamma / torch.sqrt(variance + module.eps)
    return written(module, [a, beta - mean * a, torch.zeros_like(a), torch.ones_like(a)], epsilon=0.0)


def unrelated(rng):
    module = realistic(rng)
    return written(module, tensors(realistic(rng, module.num_features)))


def unrelated_network(rng):
    modules = network(rng)
    layers = [keras_layer(m.num_features, epsilon=m.eps) for m in modules]
    for layer, module in zip(layers, modules, strict=True):
        layer.set_weights([t.numpy() for t in tensors(realistic(rng, module.num_features))])
    return as_models(modules, layers)


def unrelated_without_affine(rng):
    module, other = realistic(rng), realistic(rng)
    other = realistic(rng, module.num_features)
    with torch.no_grad():
        for each in (module, other):
            each.weight.fill_(1)
            each.bias.fill_(0)
    return written(module, tensors(other))


def trained_further(rng):
    """The same network some steps later: every number moved a little."""
    module = realistic(rng)
    weights = [t * (1 + 1e-3 * torch.from_numpy(rng.normal(size=t.shape)).float()) for t in tensors(module)]
    return written(module, weights)


def other_statistics(rng):
    """gamma and beta of this checkpoint, statistics of another (an EMA, a re-calibration)."""
    module = realistic(rng)
    return written(module, [*tensors(module)[:2], *tensors(realistic(rng, module.num_features))[2:]])


CASES = {
    "arrays in a random order": ("order", order),
    "mean and variance swapped": ("order", mean_and_variance_swapped),
    "variance assigned twice": ("order", variance_twice),
    "std as variance": ("std", with_variance(lambda v, e: torch.sqrt(v))),
    "std with epsilon as variance": ("std", with_variance(lambda v, e: torch.sqrt(v + e))),
    "inverse std as variance": ("inverse-std", with_variance(lambda v, e: torch.rsqrt(v + e))),
    "variance squared": ("squared", with_variance(lambda v, e: torch.square(v))),
    "root taken twice": ("root-twice", with_variance(lambda v, e: torch.sqrt(torch.sqrt(v)))),
    "epsilon outside the root": ("outside", with_variance(lambda v, e: (torch.sqrt(v) + e) ** 2)),
    "Keras' default epsilon": ("epsilon", default_epsilon),
    "a wrong epsilon absorbed": ("epsilon", epsilon_absorbed_from_a_wrong_guess),
    "Caffe factor not applied": ("factor", caffe(1)),
    "Caffe factor applied twice": ("factor", caffe(-1)),
    "gamma not written": ("ignored", gamma_ignored),
    "target without gamma": ("ignored", scale_false),
    "fix_gamma's stored gamma used": ("kept", gamma_kept),
    "n / (n - 1)": ("bessel", bessel),
    "InPlaceABN's weight taken as gamma": ("absolute", inplace_abn),
    "|gamma| + epsilon": ("absolute", absolute),
    "gamma and beta only": ("partial", gamma_and_beta_only),
    "mean and variance only": ("partial", statistics_only),
    "nothing written": ("untouched", untouched),
    "statistics by another momentum": ("steps", steps),
    "PyTorch's momentum in Keras": ("momentum", momentum),
    "channels permuted": ("channels", channels_permuted),
    "through float16": ("half", half(torch.float16)),
    "through bfloat16": ("half", half(torch.bfloat16)),
    "folded and kept": ("folded", folded),
    "two layers swapped": ("swapped", swapped),
    "two layers swapped, and Keras' epsilon": ("swapped epsilon", swapped_with_keras_epsilon),
    "flat list in another order": ("scattered", flat_list),
    "healthy": ("", healthy),
    "healthy, from float64": ("", healthy_rounded),
    "healthy, epsilon absorbed": ("", healthy_absorbed),
    "healthy, stored as an affine": ("", healthy_folded),
    "unrelated layers": ("", unrelated),
    "unrelated networks": ("", unrelated_network),
    "unrelated, both without affine": ("", unrelated_without_affine),
    "trained further": ("", trained_further),
    "other statistics": ("", other_statistics),
}
