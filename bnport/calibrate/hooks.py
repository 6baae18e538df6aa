"""Standing in for the calls of BatchNorm layers while a model runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

from bnport.calibrate.models import Stop
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bnport.calibrate.models import Norm

    Hook = Callable[[Norm, Callable[..., Any], Any, Any, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def hooked(norms: Iterable[Norm], hook: Hook) -> Iterator[None]:
    """While open, a call of one of these layers is hook(norm, the layer's own call, inputs, mask, args, kwargs).

    The instance is given a `call` of its own for that time; its class, and every other instance, is untouched. A layer
    whose class has a call() of its own is met where that calls Keras' own: there Keras' class is given another call(),
    which tells the instances apart. Stop, with an error, where it does not come there.
    """
    with contextlib.ExitStack() as stack:
        below: dict[type, dict[int, Norm]] = {}
        reached: set[int] = set()
        for norm in {id(norm): norm for norm in norms}.values():
            if norm.plain:
                call = _interceptor(norm, norm.layer.call, hook)
            else:
                below.setdefault(norm.base, {})[id(norm.layer)] = norm
                call = _watched(norm, norm.layer.call, reached)
            stack.enter_context(_given(norm.layer.__dict__, call))
        for base, known in below.items():
            original = vars(base)["call"]
            stack.callback(setattr, base, "call", original)
            base.call = _told_apart(original, known, hook, reached)  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _given(space: dict[str, Any], call: Any) -> Iterator[None]:
    old = space.get("call")
    space["call"] = call
    try:
        yield
    finally:
        if old is None:
            space.pop("call", None)
        else:
            space["call"] = old


def in_training(norm: Norm, original: Callable[..., Any], x: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call normalises by its batch and moves the stored statistics: training, and not frozen."""
    return bool(norm.layer.trainable and _argument("training", original, x, args, kwargs))


def _argument(name: str, original: Callable[..., Any], x: Any, args: Any, kwargs: Any) -> Any:
    """What a call of call(inputs, training, mask) gives for one of the two, by name or by position."""
    return inspect.signature(original).bind(x, *args, **kwargs).arguments.get(name) if args else kwargs.get(name)


def _interceptor(norm: Norm, original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(norm, original, inputs, _argument("mask", original, inputs, args, kwargs), args, kwargs)

    return _looking_like(original, call)


def _looking_like(original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the signature of `original`: TimeDistributed of Keras 2 hands a mask on only to a layer that names it."""
    with contextlib.suppress(TypeError, ValueError):  # compiled code may not have any
        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return call


def _told_apart(original: Callable[..., Any], known: dict[int, Norm], hook: Hook, reached: set[int]) -> Any:
    """The call() of Keras' class: `hook` for the layers in `known`."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = known.get(id(self))
        if norm is None:
            return original(self, *args, **kwargs)
        reached.add(id(self))
        return _interceptor(norm, functools.partial(original, self), hook)(*args, **kwargs)

    return _looking_like(original, call)


def _watched(norm: Norm, original: Callable[..., Any], reached: set[int]) -> Callable[..., Any]:
    """The call() of a subclass, which has to come to that of Keras."""

    def call(*args: Any, **kwargs: Any) -> Any:
        reached.discard(id(norm.layer))
        out = original(*args, **kwargs)
        if id(norm.layer) not in reached:
            raise Stop(
                InvalidValue(
                    f"{printable(norm.name)}: its class {printable(type(norm.layer).__name__)} normalises without"
                    " BatchNormalization.call(), so what its statistics are of is not known; leave it out with layers="
                )
            )
        return out

    return _looking_like(original, call)
