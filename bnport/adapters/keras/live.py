"""Live Keras models and layers (Keras 3 on any backend, tf_keras): read, and written all or none."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.keras import compiled
from bnport.adapters.keras.compiled import PACKAGES
from bnport.adapters.keras.entry import renorm_arrays
from bnport.errors import FormatError, InvalidValue, NotFound, listed, printable
from bnport.layer import Layer, Layers
from bnport.record import FIELDS
from bnport.rounding import UNIT_ROUNDOFF, round_to

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bnport.layer import Change
    from bnport.record import Array, BatchNorm

_ATTRIBUTE = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
_BATCHNORM = {"BatchNormalization", "BatchNormalizationBase", "BatchNormalizationV1", "BatchNormalizationV2"}


def is_batchnorm(layer: Any) -> bool:
    """Whether it is Keras' BatchNormalization or derived from it."""
    return any(b.__name__ in _BATCHNORM and b.__module__.split(".")[0] in PACKAGES for b in type(layer).__mro__)


def find(model: Any) -> dict[str, Any]:
    """The BatchNormalization layers of a model (or the layer itself) by name, outer/inner, each once.

    Raises FormatError if two of them cannot be told apart by name.
    """
    if is_batchnorm(model):
        return {model.name: model}
    if not hasattr(model, "_flatten_layers"):
        raise NotFound(f"a {printable(type(model).__name__)} is no Keras model or layer")
    found: dict[str, Any] = {}
    seen = {id(model)}
    waiting = [(model, "")]
    while waiting:
        holder, prefix = waiting.pop()
        if is_batchnorm(holder):
            name = prefix
            if name in found:
                name = _by_attribute(model, holder) or name
            if name in found:
                raise FormatError(f"two BatchNormalization layers are both named {printable(name)!r}; rename one")
            found[name] = holder
            continue
        children = [child for child in _children(holder) if id(child) not in seen]
        seen |= {id(child) for child in children}
        waiting += [(c, f"{prefix}/{c.name}" if prefix else str(c.name)) for c in reversed(children)]
    return found


def _children(holder: Any) -> list[Any]:
    return list(holder._flatten_layers(include_self=False, recursive=False))


def _by_attribute(model: Any, layer: Any) -> str | None:
    """The attribute path of a layer, for subclassed models that give two layers one name."""
    waiting, seen = [(model, "")], {id(model)}
    while waiting:
        holder, prefix = waiting.pop()
        for key, value in list(vars(holder).items()):
            if value is layer:
                return f"{prefix}{key}"
        for child in _children(holder):
            if id(child) not in seen:
                seen.add(id(child))
                key = next((k for k, v in list(vars(holder).items()) if v is child), child.name)
                waiting.append((child, f"{prefix}{key}/"))
    return None


def read(source: Any, *, evidence: bool = True) -> Layers:
    """The layers of a live model or of one live layer, with the numbers that they have when they are asked for.

    `evidence`: with kernels and graph, which pairing wants; most of the time goes there.
    """
    found = find(source)
    unbuilt = [name for name, layer in found.items() if getattr(layer, "moving_mean", None) is None]
    if unbuilt:
        raise InvalidValue(
            f"{listed(unbuilt, 4)}: not built yet, so there are no numbers: call the model once on data, or"
            " layer.build(input_shape), first"
        )
    layers = Layers(
        (_layer(name, layer) for name, layer in found.items()),
        source=f"the live {type(source).__name__} {printable(getattr(source, 'name', ''))!r}",
        format="keras",
    )
    if not evidence:
        return layers
    from bnport.adapters.keras import graph

    return graph.with_live_evidence(source, layers, found)


def one_axis(layer: Any, name: str) -> int:
    """The axis that the layer normalises; FormatError for several."""
    axis = layer.axis
    if isinstance(axis, int):
        return axis
    if len(axis) != 1:
        raise FormatError(
            f"{printable(name)}: normalises several axes ({list(axis)}); no single BatchNorm over channels does the same"
        )
    return int(axis[0])


def _layer(name: str, layer: Any) -> Layer:
    one_axis(layer, name)
    notes = []
    stores = {"mean", "variance", "epsilon", "momentum"}
    for field, flag in (("gamma", "scale"), ("beta", "center")):
        there = getattr(layer, _ATTRIBUTE[field], None) is not None
        if there and getattr(layer, flag):
            stores.add(field)
        elif there:
            notes.append(f"{flag} was set to False after the layer was built: its {field} is there and not used")
    variable = layer.moving_mean
    unknown = own_code(layer)

    def load() -> dict[str, Array]:
        return {field: numbers(getattr(layer, _ATTRIBUTE[field])) for field in FIELDS if field in stores}

    return Layer(
        name, channels=int(variable.shape[0]), epsilon=layer.epsilon, load=load, momentum=float(layer.momentum),
        stores=stores, dtype=dtype_of(variable), notes=[*notes, *unknown], own_code=bool(unknown),
    )  # fmt: skip


def own_code(layer: Any) -> list[str]:
    """What to say of a layer that computes by other code than Keras' own; nothing for one that does not."""
    notes = ["its call() was replaced; what it computes is not known"] if "call" in vars(layer) else []
    for base in type(layer).__mro__:
        if base.__module__.split(".")[0] in PACKAGES:
            break
        if "call" in vars(base):
            notes.append(f"{base.__name__} defines its own call(); what it computes is not known")
    return notes


def numbers(variable: Any) -> Array:
    """A variable's values as they are now, as a numpy array of its own dtype; also those of a tensor.

    Raises NotFound for a variable that has none now, as on JAX while fit goes through the batches.
    """
    if getattr(variable, "_value", variable) is None:  # no ValueError: a kernel that raises that is left out
        raise NotFound(
            f"the numbers of {printable(variable.path)} are not there: on JAX Keras takes them out of the model while fit or"
            " evaluate goes through the batches; do this in a callback's on_epoch_end, or afterwards"
        )
    if type(variable).__module__.split(".")[0] in ("torch", "jax", "jaxlib"):  # a tensor, perhaps part of a graph
        variable = sys.modules["keras"].ops.convert_to_numpy(variable)
    array: Array = variable if isinstance(variable, np.ndarray) else np.asarray(variable.numpy())
    return array


def dtype_of(variable: Any) -> str:
    """How the variable stores its numbers: a key of UNIT_ROUNDOFF."""
    name = getattr(variable.dtype, "name", None) or str(variable.dtype)
    name = name.rsplit(".", 1)[-1]
    if name not in UNIT_ROUNDOFF:
        raise FormatError(f"variables of dtype {printable(name)} are not understood")
    return name


def apply(model: Any, changes: Mapping[str, Change]) -> None:
    """Write the changes into the live layers: all, or on any error none."""
    found = find(model)
    steps: list[tuple[Any, Array]] = []
    settings: list[tuple[Any, str, float]] = []
    for name, change in changes.items():
        if name not in found:
            raise NotFound(
                f"no BatchNormalization layer {printable(name)!r} in the model; there are {listed(found, 5)}"
            )
        _plan(name, found[name], change, steps, settings)
    undo: list[Callable[[], object]] = []
    try:
        for variable, array in steps:
            undo.append(_assign(variable, array))
        for layer, attribute, value in settings:
            old_value = getattr(layer, attribute)
            undo.append(lambda layer=layer, a=attribute, v=old_value: setattr(layer, a, v))  # type: ignore[misc]
            setattr(layer, attribute, value)
        if settings:
            compiled.forget(model, [layer for layer, _, _ in settings])
    except BaseException:
        for step in reversed(undo):
            with contextlib.suppress(Exception):
                step()
        raise


def _plan(
    name: str, layer: Any, change: Change, steps: list[tuple[Any, Array]], settings: list[tuple[Any, str, float]]
) -> None:
    """Check one change and add what it means to `steps` and `settings`."""
    shown = printable(name)
    if getattr(layer, "moving_mean", None) is None:
        raise InvalidValue(f"{shown}: not built yet: call the model once on data, or layer.build(input_shape), first")
    one_axis(layer, name)
    record, epsilon = change.record, float(layer.epsilon)
    unknown = change.fields - {*FIELDS, "epsilon", "momentum"}
    if unknown:
        raise InvalidValue(f"{shown}: no field {listed(sorted(unknown))}")
    if "epsilon" in change.fields and record.epsilon != layer.epsilon:
        settings.append((layer, "epsilon", record.epsilon))
        epsilon = record.epsilon
    if "momentum" in change.fields and change.momentum is not None and change.momentum != layer.momentum:
        settings.append((layer, "momentum", change.momentum))
    for field in FIELDS:
        if field not in change.fields:
            continue
        variable = getattr(layer, _ATTRIBUTE[field], None)
        flag = {"gamma": "scale", "beta": "center"}.get(field)
        if variable is None or (flag and not getattr(layer, flag)):
            raise InvalidValue(f"{shown}: the layer has no {field} ({flag}=False)")
        array = getattr(record, field)
        if tuple(variable.shape) != array.shape:
            raise InvalidValue(f"{shown}: {field}: {tuple(variable.shape)} expected, got {array.shape}")
        steps.append((variable, _in_range(f"{shown}: {field}", array, dtype_of(variable))))
    if change.fields & {"mean", "variance", "epsilon"}:
        steps.extend(_renorm(layer, record, epsilon, change.fields))


def _in_range(where: str, array: Array, dtype: str) -> Array:
    """The array in the variable's dtype where numpy has it; InvalidValue for a value that overflows."""
    if array.dtype == dtype:
        return array
    stored = round_to(array, dtype)
    if not np.isfinite(stored).all():
        raise InvalidValue(f"{where}: a value does not fit {dtype}")
    return stored


def _renorm(layer: Any, record: BatchNorm, epsilon: float, fields: frozenset[str]) -> list[tuple[Any, Array]]:
    if not getattr(layer, "renorm", False):
        return []
    arrays = renorm_arrays(record, epsilon, fields)
    return [(v, _in_range(name, array, dtype_of(v))) for name, array in arrays.items() for v in [getattr(layer, name)]]


def _assign(variable: Any, array: Array) -> Callable[[], object]:
    """Assign by the public call of the variable; returns what undoes it.

    TensorFlow's variables are written without reading the result back, which takes half of the time.
    """
    held = variable.value
    if callable(held):  # a tf.Variable (tf_keras), whose value is a method
        held = variable
    if hasattr(held, "read_value") and array.dtype == held.dtype:
        old = held.read_value()
        held.assign(array, read_value=False)
        return lambda: held.assign(old)
    kept = _as_it_is(variable, held)
    variable.assign(array)
    return lambda: variable.assign(kept)


def _as_it_is(variable: Any, held: Any) -> Any:
    """What the variable can be assigned later to hold what it holds now."""
    package = type(held).__module__.split(".")[0]
    if package == "torch":
        return held.detach().clone()
    if package in ("jax", "jaxlib"):  # never changed in place
        return held
    return numbers(variable).copy()
