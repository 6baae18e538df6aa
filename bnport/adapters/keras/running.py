"""The real Keras layer, called: the product's numbers against the framework's own arithmetic."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.keras import live
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, first_line, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnport.adapters.keras.entry import Entry
    from bnport.record import Array


def run_all(
    source: Any,
    inputs: Mapping[str, Any],
    *,
    epsilon: float | None,
    absent: str | Mapping[str, str] | None,
    stat: str | None,
) -> dict[str, dict[str, Array]]:
    """name -> {"model(x)": y, "predict": y} for x of shape (N, C) of each named layer; all N must be equal.

    Raises InvalidValue where one of them has a call() that is not Keras' own and does not run so.
    """
    if isinstance(source, str | os.PathLike):
        layers = _from_file(os.fspath(source), list(inputs), epsilon, absent, stat)
        package = _keras()
    else:
        found = live.find(source)
        layers = {}
        for name in inputs:
            if name not in found:
                raise NotFound(
                    f"no BatchNormalization layer {printable(name)!r} in the model; there are {listed(found, 5)}"
                )
            layers[name] = found[name]
        package = _keras(next((_package_of(layer) for layer in layers.values()), "keras"))
    shaped = {name: _shaped(layers[name], np.asarray(x), name) for name, x in inputs.items()}
    own = [layer for layer in layers.values() if live.own_code(layer)]
    try:
        with _left_alone(own):
            return _outputs(package, layers, inputs, shaped)
    except Exception as error:
        if not own:
            raise
        raise InvalidValue(
            f"a call() that is not Keras' own does not run alone on x of shape (N, C): {type(error).__name__}:"
            f" {printable(error, 160)}"
        ) from error


@contextlib.contextmanager
def _left_alone(layers: list[Any]) -> Iterator[None]:
    """Afterwards the variables of the layers are what they were, whatever their call() writes into them."""
    before = [(variable, live.numbers(variable).copy()) for layer in layers for variable in layer.variables]
    try:
        yield
    finally:
        for variable, values in before:
            if live.numbers(variable).tobytes() != values.tobytes():
                variable.assign(values)


def _outputs(
    package: Any, layers: Mapping[str, Any], inputs: Mapping[str, Any], shaped: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    direct = [layers[name](x, training=False) for name, x in shaped.items()]
    with _forgetting():
        predicted = _predicted(package, list(layers.values()), list(shaped.values()))
    to_numpy = package.ops.convert_to_numpy if hasattr(package, "ops") else np.asarray
    return {
        name: {
            "model(x)": np.asarray(to_numpy(called)).reshape(np.shape(x)),
            "predict": np.asarray(y).reshape(np.shape(x)),
        }
        for (name, x), called, y in zip(inputs.items(), direct, predicted, strict=True)
    }


def _package_of(layer: Any) -> str:
    packages = {base.__module__.split(".")[0] for base in type(layer).__mro__}
    return "tf_keras" if "tf_keras" in packages else "keras"


def _keras(name: str = "keras") -> Any:
    import importlib

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"running a Keras layer needs Keras and a backend ({printable(error, 80)}): pip install 'bnport[tensorflow]'"
        ) from None


def _shaped(layer: Any, x: Array, name: str) -> Array:
    """(N, C) with axes of length 1 added, so that it has the rank the layer was built for and C on its axis."""
    axis = live.one_axis(layer, name)
    spec = layer.input_spec
    spec = spec[0] if isinstance(spec, list | tuple) else spec
    rank = getattr(spec, "ndim", None) or 2
    shape = [x.shape[0]] + [1] * (rank - 1)
    shape[axis] = x.shape[1]
    return x.reshape(shape)


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    """What is made inside and not kept is gone afterwards, cycles included, at the price of a look at it alone.

    The graphs of a model live in cycles, and would refer to the layers' variables until some later collection.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()  # nothing ages: all that is new stays in the youngest generation
    try:
        yield
    finally:
        gc.enable()
        gc.collect(0)


def _predicted(package: Any, layers: list[Any], inputs: list[Array]) -> list[Array]:
    """The layers inside one new model, through the predict function that Keras compiles for it.

    It is called as `predict_on_batch` does: the same compiled function as `predict`'s, without a data pipeline to feed it.
    """

    class Layers(package.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="bnport_run")
            self.held = layers
            self.built = True  # its layers are: no trace of them only to find their shapes

        def call(self, xs: Any) -> Any:
            xs = xs if isinstance(xs, list | tuple) else [xs]
            return [layer(x, training=False) for layer, x in zip(layers, xs, strict=True)]

    nodes = [len(layer._inbound_nodes) for layer in layers]
    try:
        outputs = Layers().predict_on_batch(inputs if len(inputs) > 1 else inputs[0])
    finally:
        for layer, count in zip(layers, nodes, strict=True):
            del layer._inbound_nodes[count:]
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _from_file(
    path: str, names: list[str], epsilon: float | None, absent: str | Mapping[str, str] | None, stat: str | None
) -> dict[str, Any]:
    """Layers that Keras builds from their config in the file, filled by their own load_own_variables."""
    from bnport.adapters import keras as adapter

    contents = adapter.contents(path, absent=absent, stat=stat)
    entries = {name: contents.entry(name) for name in names}
    package = _keras()
    return {name: _built(package, entry, epsilon) for name, entry in entries.items()}


def _built(package: Any, entry: Entry, epsilon: float | None) -> Any:
    tensors = entry.tensors()
    config: dict[str, Any] = {"scale": "gamma" in tensors, "center": "beta" in tensors, "dtype": entry.dtype}
    config["epsilon"] = epsilon if epsilon is not None and entry.epsilon is None else entry.applied_epsilon
    if "moving_stddev" in tensors:
        config["renorm"] = True  # unknown to Keras before 3.14
    layer = package.layers.BatchNormalization(**config)
    layer.build((None, entry.channels))
    arrays = {field: tensor.array() for field, tensor in tensors.items()}
    if entry.form != "variance":
        arrays |= entry.load()
        layer.epsilon = 0.0
    layer.load_own_variables({str(i): array for i, array in enumerate(arrays.values())})
    return layer


def loaded(path: str) -> Any:
    """The model in a file, by keras.saving.load_model(safe_mode=True)."""
    package = _keras()
    try:
        return package.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise FormatError(
            f"{printable(path)}: Keras cannot load the whole model: {printable(first_line(error))}"
        ) from None
