"""What goes into and comes out of every BatchNormalization layer of a live model while the whole network runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.keras import live
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.record import Array


def tap(model: Any, x: Array, each: Callable[[str, Array, Array, str], None]) -> list[Array]:
    """Run model(x, training=False) eagerly; call each(layer, input, output, dtype) per layer call; the final outputs.

    Inputs and outputs come channel-last, shape (..., C), 16-bit ones widened and dtype naming theirs. Each layer has a
    `call` of its own while this runs, and is left as it was: classes, other models and compiled functions are untouched.
    """
    given: list[dict[str, Any]] = []
    try:
        for name, layer in live.find(model).items():
            space = layer.__dict__
            if "call" in space:
                raise InvalidValue(f"{printable(name)}: its call has been replaced already")
            space["call"] = _tapped(layer, name, each)
            given.append(space)
        return _flat(model(np.asarray(x), training=False))
    finally:
        for space in given:
            space.pop("call", None)


def _tapped(layer: Any, name: str, each: Callable[[str, Array, Array, str], None]) -> Callable[..., Any]:
    original, axis = layer.call, live.one_axis(layer, name)

    def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(inputs, *args, **kwargs)
        x, y = _numpy(inputs), _numpy(output)
        dtype = getattr(output.dtype, "name", None) or str(output.dtype)
        each(name, np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1), dtype.removeprefix("torch."))
        return output

    return call


def _numpy(tensor: Any) -> Array:
    keras = sys.modules.get("keras")
    own = keras is not None and hasattr(keras, "ops") and keras.ops.is_tensor(tensor)
    array: Array = np.asarray(keras.ops.convert_to_numpy(tensor) if own and keras else tensor)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array


def _flat(value: Any) -> list[Array]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [_numpy(value)]
    return [array for item in value for array in _flat(item)]


def input_shape(model: Any) -> tuple[int | None, ...] | None:
    """The shape the model declares for its one input, batch included; None where it declares none or several."""
    shape = getattr(model, "input_shape", None)
    if isinstance(shape, list | tuple) and shape and not isinstance(shape[0], list | tuple | dict):
        return tuple(None if side is None else int(side) for side in shape)
    return None


def channels_first(model: Any) -> bool:
    """Whether the model's data runs (N, C, ...): its layers with a spatial input normalise axis 1."""
    for name, layer in live.find(model).items():
        spec = layer.input_spec[0] if isinstance(layer.input_spec, list | tuple) else layer.input_spec
        rank = getattr(spec, "ndim", None)
        if rank is not None and rank > 2:
            return live.one_axis(layer, name) == 1
    return False


def compiled_outputs(model: Any, x: Array) -> list[Array] | None:
    """What the predict function that the model has already compiled gives for x; None where there is none.

    On TensorFlow and JAX it has the epsilons of that time built in, whatever the layers hold now.
    """
    if getattr(model, "predict_function", None) is None:
        return None
    return _flat(model.predict(np.asarray(x), batch_size=len(x), verbose=0))
