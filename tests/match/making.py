"""Layers made of nothing but evidence."""

from __future__ import annotations

import itertools

import numpy as np

from bnport.layer import Kernel, Layer, Layers

_numbers = itertools.count()


def layer(name, channels=8, kernel=None, inputs=None, *, mean=None, values=None, before=None):
    """A layer whose mean is like no other's, unless `mean` is given; `kernel` is a shape."""
    mean = float(next(_numbers)) if mean is None else mean
    fed = None
    if kernel is not None:
        fed = Kernel("conv", tuple(kernel), f"{name}.kernel", values, before)
    return Layer(
        name,
        channels=channels,
        epsilon=1e-5,
        load=lambda: {"mean": np.full(channels, mean), "variance": np.ones(channels)},
        kernel=fed,
        inputs=None if inputs is None else tuple(inputs),
    )


def layers(*found, source="model"):
    return Layers(found, source=source, format="made")


def chain(names, channels=8, kernel=None):
    """Layers each of which feeds the next."""
    return layers(*(layer(n, channels, kernel, names[i - 1 : i] if i else ()) for i, n in enumerate(names)))
