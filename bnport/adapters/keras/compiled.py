"""The functions that Keras has compiled, which keep the epsilon that they were traced with: found, and dropped.

TensorFlow and JAX trace epsilon as a constant, so that predict, evaluate and fit go on with the old one after
`layer.epsilon = e`, on the model and on every other model that holds the layer; numbers in variables are never stale. A
layer does not know its models. Where nothing shows that it was never traced, every object of the process is looked at,
at 0.15 us for each: 60 ms where TensorFlow is imported.
"""

from __future__ import annotations

import gc
import sys
from itertools import compress
from typing import Any

PACKAGES = {"keras", "tf_keras"}

# torch that compiles anew for another float attribute (pytorch#185886); early ones did not (#124717)
_GUARDING = (2, 7)
_FUNCTIONS = ("train_function", "test_function", "predict_function", "train_tf_function")


def forget(model: Any, layers: list[Any]) -> None:
    """Drop the compiled train, test and predict functions of every model that holds one of the layers.

    Holders are `model`, the models inside it, and every other live model that contains one of the layers, however it
    holds it. Nothing is looked for if none of the layers can be part of a compiled function.
    """
    if not any(may_be_traced(layer) for layer in layers):
        return
    wanted = {id(layer) for layer in layers}
    for holder in [*_models(), model]:
        if not any(getattr(holder, name, None) is not None for name in _FUNCTIONS):
            continue
        try:
            inside = holder._flatten_layers()
        except Exception:  # half-built: it cannot have run
            continue
        if any(id(layer) in wanted for layer in inside):
            for name in _FUNCTIONS:
                if getattr(holder, name, None) is not None:
                    setattr(holder, name, None)


def may_be_traced(layer: Any) -> bool:
    """Whether a live compiled function may have the layer's epsilon in it; True where nothing shows the contrary.

    TensorFlow: what traces the layer's own `call` captures its variance, and a graph keeps the resource handle of each
    variable that it captured. So a handle that only its variable refers to belongs to no graph.
    torch: Keras compiles only when told to (`jit_compile=True`), and torch.compile guards the attributes of modules:
    another epsilon compiles anew.
    """
    variable = getattr(layer, "moving_variance", None)
    if variable is None or type(layer).__module__.split(".")[0] not in PACKAGES:  # may have a `call` of its own
        return True
    held = variable.value
    if callable(held):  # a tf.Variable (tf_keras), whose value is a method
        held = variable
    kind = type(held)
    package = kind.__module__.split(".")[0]
    if package == "torch":
        return _version(sys.modules["torch"].__version__) < _GUARDING
    if package != "tensorflow" or kind.__name__ != "ResourceVariable":  # JAX; the variables of a strategy
        return True
    return type(held.handle).__name__ != "EagerTensor" or sys.getrefcount(held.handle) > _ALONE


def _version(text: str) -> tuple[int, ...]:
    """(major, minor); () where it cannot be read."""
    numbers = text.split(".")[:2]
    return tuple(int(number) for number in numbers) if all(number.isdigit() for number in numbers) else ()


class _Alone:
    """An object that keeps another to itself and shows it by a property, as a variable its handle."""

    def __init__(self) -> None:
        self._handle = object()

    @property
    def handle(self) -> object:
        return self._handle


_alone = _Alone()
_ALONE = sys.getrefcount(_alone.handle)


def _models() -> list[Any]:
    """Every live model of the Keras packages that are imported."""
    kinds = _model_types()
    frozen = gc.get_freeze_count() > 0
    if frozen:  # what gc.freeze() has put aside is not listed
        gc.unfreeze()
    try:
        found = gc.get_objects()  # get_referrers(*kinds) is faster, and crashed in an extension's objects
    finally:
        if frozen:
            gc.freeze()
    return list(compress(found, map(kinds.__contains__, map(type, found))))


def _model_types() -> set[type]:
    """Every class of models there is, of the Keras packages that are imported."""
    found: set[type] = set()
    for package in PACKAGES:
        base = getattr(sys.modules.get(package), "Model", None)
        waiting = [base] if isinstance(base, type) else []
        while waiting:
            kind = waiting.pop()
            if kind not in found:
                found.add(kind)
                waiting.extend(kind.__subclasses__())
    return found
