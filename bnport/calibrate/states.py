"""What a live model holds beside the statistics of its BatchNorm layers, and how it is put back as it was.

    kind        what                                                     held on TensorFlow, JAX   held on torch
    state       weights made with trainable=False, states of recurrent   the value itself, which   a copy
                layers, buffers of torch modules, a layer's tf.Variable  nothing can write to
    random      seed generators of layers, and Keras' own (Keras 3);     same                      a copy
                torch's own, which dropout there draws from
    metric      metrics of the model and of its layers                   same                      a copy
    trainable   all other weights, frozen ones too                       same                      its version counter

`state` and `random` carry something from one batch to the next: a pass over the data has to begin with what the first
batch would see.
"""

from __future__ import annotations

import contextlib
import random
import sys
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import InvalidValue, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.calibrate.models import LiveModel

CARRIED = ("state", "random")


class Held:
    """One variable, and the value that it had when this object was made.

    owners: ids of the layers that it belongs to; none for Keras' own and torch's, which any layer may draw from.
    """

    __slots__ = ("backend", "before", "kind", "name", "owners", "variable")

    def __init__(self, variable: Any, kind: str, name: str, backend: str) -> None:
        self.variable, self.kind, self.name, self.backend = variable, kind, name, backend
        self.owners: set[int] = set()
        self.before = self.now()

    def _inner(self) -> Any:
        """The framework's own variable."""
        return getattr(self.variable, "_value", self.variable)

    def now(self) -> Any:
        """The present value, such that later assignments do not change it; on torch the version of a trainable weight."""
        inner = self._inner()
        if self.backend == "torch":
            return inner._version if self.kind == "trainable" else inner.detach().clone()
        return inner.read_value() if hasattr(inner, "read_value") else inner

    def same(self) -> bool:
        """Whether the variable holds its first value, bit for bit."""
        if self.backend == "torch":
            inner = self._inner()
            if self.kind == "trainable":
                return bool(inner._version == self.before)
            return _bytes(inner.detach().cpu()) == _bytes(self.before.cpu())
        now = self.now()
        if now is self.before:
            return True
        new, old = np.asarray(now), np.asarray(self.before)
        # the old value is still held, so that no new one can lie where it lies
        return bool(new.ctypes.data == old.ctypes.data or new.tobytes() == old.tobytes())

    def put(self, value: Any) -> None:
        """Give the variable a value that `now` returned."""
        if hasattr(self.variable, "assign"):
            self.variable.assign(value)
        else:  # a buffer of torch
            with sys.modules["torch"].no_grad():
                self.variable.copy_(value)

    def restore(self) -> None:
        """Give the variable its first value."""
        if not self.same():
            self.put(self.before)


class _Generator:
    """A generator of torch as a variable that holds its state."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    @property
    def _value(self) -> Any:
        return self.generator.get_state()

    def assign(self, state: Any) -> None:
        self.generator.set_state(state)


class States:
    """All variables of a model but the statistics of its BatchNorm layers (those are models.Norm's), as they are now.

    Use it as a context: when it ends, with an error or without, all of them hold again what they held.
    """

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self._held: dict[int, Held] = {}
        statistics = {id(variable) for norm in live.norms for variable in norm._variables()}
        for variable, kind, layer in _variables(live):
            if id(variable) in statistics:
                continue
            if id(variable) not in self._held:
                name = str(getattr(layer, "name", type(layer).__name__))
                self._held[id(variable)] = Held(variable, kind, name, live.backend)
            self._held[id(variable)].owners.add(id(layer))

    def __enter__(self) -> States:
        self._stack = contextlib.ExitStack()
        generator = self._stack.enter_context(_global_generator(self.live))
        if generator is not None and id(generator.state) not in self._held:
            self._held[id(generator.state)] = Held(generator.state, "random", "keras.random", self.live.backend)
        if self.live.backend == "torch":
            torch = sys.modules["torch"]
            devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
            for own in (torch.default_generator, *devices):
                self._held[id(own)] = Held(_Generator(own), "random", "torch.random", "torch")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        lost = []
        with self._stack:
            for held in self._held.values():
                if held.kind == "trainable" and self.live.backend == "torch":
                    lost += [] if held.same() else [held.name]
                else:
                    held.restore()
        if lost and kind is None:
            raise InvalidValue(
                f"{listed(dict.fromkeys(lost), 3)}: writes to its own trainable weights at inference, so that the model is"
                " not what it was; load it again, and make these weights trainable=False if that is meant"
            )

    def carried(self) -> list[Held]:
        """What one batch may leave behind for the next."""
        return [held for held in self._held.values() if held.kind in CARRIED]

    def moved(self) -> list[Held]:
        """Those of `carried` that hold something else by now."""
        return [held for held in self.carried() if not held.same()]

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What runs while this is open leaves nothing behind."""
        before = [(held, held.now()) for held in self._held.values() if held.kind != "trainable"]
        try:
            yield
        finally:
            for held, value in before:
                held.put(value)


def _variables(live: LiveModel) -> Iterator[tuple[Any, str, Any]]:
    """(variable, kind, layer that has it), some more than once; the first kind counts."""
    for layer in live.layers():
        metric = isinstance(layer, live.keras.metrics.Metric)  # in Keras 2 it is a layer
        for inner in (*getattr(layer, "_metrics", ()), *([layer] if metric else [])):
            yield from ((variable, "metric", layer) for variable in inner.variables)
        for generator in getattr(layer, "_seed_generators", ()):
            yield generator.state, "random", layer
        drawing: Any = getattr(getattr(layer, "_random_generator", None), "_generator", None)  # Keras 2
        if hasattr(drawing, "state"):
            yield drawing.state, "random", layer
        if getattr(layer, "stateful", False):  # what a recurrent layer carries from batch to batch
            for state in live.tree.flatten(getattr(layer, "states", None)):
                if hasattr(state, "assign"):
                    yield state, "state", layer
        # as they were made: freezing a layer moves none of them
        for kind, names in (
            ("state", ("_non_trainable_variables", "_non_trainable_weights")),
            ("trainable", ("_trainable_variables", "_trainable_weights")),
        ):
            for name in names:
                yield from ((variable, kind, layer) for variable in getattr(layer, name, ()))
        yield from ((value, "state", layer) for value in vars(layer).values() if _is_tf_variable(live, value))
        if live.backend == "torch" and hasattr(layer, "buffers"):
            yield from ((buffer, "state", layer) for buffer in layer.buffers())
    for metric in getattr(live.model, "metrics", None) or ():
        yield from ((variable, "metric", live.model) for variable in metric.variables)


def _is_tf_variable(live: LiveModel, value: Any) -> bool:
    return live.backend == "tensorflow" and isinstance(value, sys.modules["tensorflow"].Variable)


@contextlib.contextmanager
def _global_generator(live: LiveModel) -> Iterator[Any]:
    """Keras 3's own seed generator, which unseeded layers draw from; one that is made for this is forgotten again."""
    try:
        known = live.keras.src.backend.common.global_state
        module = live.keras.src.random.seed_generator
        # before Keras 3.9 or so there is no constant for it
        name = getattr(module, "GLOBAL_SEED_GENERATOR", "global_seed_generator")
        before = known.get_global_attribute(name)
    except AttributeError:  # Keras 2, or another version
        yield None
        return
    drawn = random.getstate()
    generator = module.global_seed_generator()
    random.setstate(drawn)  # a new one takes its seed from there
    try:
        yield generator
    finally:
        if before is None:
            known.set_global_attribute(name, None)


def _bytes(tensor: Any) -> bytes:
    data: bytes = tensor.contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy().tobytes()
    return data
