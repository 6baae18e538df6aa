"""A live Keras model as calibration sees it: its BatchNorm layers, their statistics, and what runs when one is called.

Works for Keras 3 on TensorFlow, torch and JAX, and for Keras 2 (tf_keras, or keras 2 itself). Nothing here is imported
before a live model is handed in, so its framework is there already.

    ours                  Keras 3                        Keras 2
    mean                  layer.moving_mean              layer.moving_mean
    variance              layer.moving_variance          layer.moving_variance
    channel axis          layer.axis, an integer         layer.axis, a list of one integer after build
    renorm                moving_stddev, renorm_mean,    moving_stddev, renorm_mean, renorm_stddev
                          renorm_stddev
    mask of a tensor      keras.src.backend              tensor._keras_mask
                          get_keras_mask(tensor)
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.keras.live import find
from bnport.calibrate.inputs import Inputs
from bnport.calibrate.moments import Moments, moments
from bnport.calibrate.norm import Norm as Norm
from bnport.calibrate.states import States
from bnport.errors import InvalidValue, MissingDependency, NotFound, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.record import Array

# 3.0 has no keras.tree; 3.0 and 3.1 round a BatchNorm's parameters to 16 bits where the layer's dtype policy is mixed; 3.2
# loads a model in which several layers lead into a shared one without all of these but one, and says nothing
TOO_OLD = ("3.0.", "3.1.", "3.2.")


class Stop(BaseException):
    """Leaves a forward pass from inside a layer; Keras rewrites an Exception on its way out, not a BaseException."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class LiveModel:
    """A Keras model, which Keras it belongs to, and every BatchNorm layer inside it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keras = _keras_of(model)
        self.version = 3 if self.keras.__version__.startswith("3") else 2
        self.backend: str = self.keras.backend.backend() if self.version == 3 else "tensorflow"
        if self.keras.__version__.startswith(TOO_OLD):
            raise MissingDependency(f"calibrate needs Keras 3.3 or newer, or Keras 2: this is {self.keras.__version__}")
        self.tree: Any = self.keras.tree if self.version == 3 else sys.modules["tensorflow"].nest
        self.norms = self._find_norms()
        self.states: States | None = None  # while it is running
        self._stack = contextlib.ExitStack()

    def _find_norms(self) -> list[Norm]:
        found = find(self.model)  # the names that `bnport show` and the written file use
        if not found:
            raise NotFound(f"{self.what}: has no BatchNormalization layer")
        unbuilt = [name for name, layer in found.items() if not layer.built or layer.moving_mean is None]
        if unbuilt:
            raise InvalidValue(
                f"{self.what}: not built yet, so {listed(unbuilt, 3)} has no weights; call the model once, or build it"
            )
        return [Norm(layer, name) for name, layer in found.items()]

    @property
    def what(self) -> str:
        """The model for a message."""
        return f"model {printable(getattr(self.model, 'name', type(self.model).__name__))!r}"

    def inputs(self) -> Inputs | None:
        """The model's inputs; None where it has no symbolic ones.

        They are called by the keys of a dict that the model was built with, else by the names of their layers.
        """
        tensors = getattr(self.model, "inputs", None)
        if not tensors:
            return None
        graph = getattr(self.model, "_functional", None) or self.model  # a Sequential of Keras 3 holds its graph
        struct = getattr(graph, "_inputs_struct" if self.version == 3 else "_nested_inputs", None)
        shapes = [tuple(x.shape) for x in tensors]
        if isinstance(struct, dict) and not any(isinstance(value, dict | list | tuple) for value in struct.values()):
            names = sorted(struct)  # the order of model.inputs
            return Inputs(dict(zip(names, shapes, strict=True)), form={name: name for name in struct})
        names = [x._keras_history[0].name for x in tensors]
        form = None if struct is None else self.tree.map_structure(lambda x: x._keras_history[0].name, struct)
        return Inputs(dict(zip(names, shapes, strict=True)), [x.name for x in tensors], form)

    # ---- running

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Eager inference without gradients; everything but BatchNorm statistics is as before when it ends: states.py."""
        with contextlib.ExitStack() as self._stack, States(self) as self.states:
            if self.backend == "torch":
                self._stack.enter_context(sys.modules["torch"].no_grad())
            if any(_has_functions(layer) for layer in self.layers()):
                self.open_functions()
            try:
                yield
            finally:
                self.states = None
                clear = getattr(self.model, "_clear_losses", None)
                if clear is not None:
                    clear()

    def open_functions(self) -> bool:
        """Run what is inside a tf.function eagerly until `running` ends: a compiled call cannot be looked into.

        Only where it is needed: Keras compiles some operations because they have no eager kernel. Returns whether that
        changed anything.
        """
        if self.backend != "tensorflow":
            return False
        config = sys.modules["tensorflow"].config
        if config.functions_run_eagerly():
            return False
        config.run_functions_eagerly(True)
        self._stack.callback(config.run_functions_eagerly, False)
        return True

    def untouched(self) -> contextlib.AbstractContextManager[None]:
        """What runs while this is open leaves nothing behind for the next batch."""
        return contextlib.nullcontext() if self.states is None else self.states.untouched()

    def layers(self) -> list[Any]:
        """The model and every layer inside it, each once."""
        return below(self.model)

    def call(self, inputs: Any) -> Any:
        """The model at inference on one batch, eagerly."""
        return self.model(inputs, training=False)

    def numpy(self, tensor: Any) -> Array:
        """An eager tensor as a NumPy array, without a copy where it lies in this process's memory."""
        if self.backend == "torch" and hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":
                tensor = tensor.float()
            array: Array = tensor.numpy()
            return array
        return np.asarray(tensor)

    def tensor(self, array: Array) -> Any:
        """A NumPy array as a tensor of the backend, same dtype."""
        if self.backend == "tensorflow":
            return sys.modules["tensorflow"].convert_to_tensor(array)
        return self.keras.ops.convert_to_tensor(array)

    def output_dtype(self, norm: Norm, x: Any) -> str:
        """What a layer makes of the tensor `x`: its compute dtype in Keras 3, the input's in Keras 2."""
        name: str = norm.layer.compute_dtype if self.version == 3 else x.dtype.name
        return name

    def cast(self, tensor: Any, dtype: str) -> Any:
        """A tensor in another dtype."""
        if self.version == 3:
            return self.keras.ops.cast(tensor, dtype)
        return sys.modules["tensorflow"].cast(tensor, dtype)

    def copied(self, x: Any) -> Any:
        """A tensor or array that can be written to without changing `x`, with its mask; anything else as it is."""
        if hasattr(x, "detach"):
            mask = self.mask_of(x)
            copy = x.detach().clone()
            return copy if mask is None else self.set_mask(copy, mask)
        return np.array(x) if isinstance(x, np.ndarray) else x

    def mask_of(self, tensor: Any) -> Any:
        """The Keras mask that travels with a tensor, or None."""
        get = getattr(self.keras.src.backend, "get_keras_mask", None)  # not in Keras 2 and the first of Keras 3
        return getattr(tensor, "_keras_mask", None) if get is None else get(tensor)

    def set_mask(self, tensor: Any, mask: Any) -> Any:
        """`tensor` with the mask attached."""
        put = getattr(self.keras.src.backend, "set_keras_mask", None)
        if put is None:
            tensor._keras_mask = mask
        else:
            put(tensor, mask)
        return tensor

    def as_it_is(self, layer: Any, x: Any) -> bool:
        """Whether a layer called on the tensor `x` gets just that: no mask, and no cast to its compute dtype."""
        dtype = getattr(x, "dtype", None)
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
        return bool(name == layer.compute_dtype and self.mask_of(x) is None)

    def values(self, norm: Norm, x: Any) -> Array:
        """A layer's input as an array, channels on `norm.axis`.

        Raises Stop with an error for a tensor without values (a compiled function) or of the wrong shape.
        """
        try:
            array = self.numpy(x)
            plain = array.dtype != object
        except Exception:
            plain = False
        if not plain:
            raise Stop(
                InvalidValue(
                    f"{printable(norm.name)}: is called inside a compiled function, where its input has no values;"
                    " calibrate a model that runs eagerly"
                )
            )
        if not -array.ndim <= norm.axis < array.ndim or array.shape[norm.axis] != norm.channels:
            raise Stop(
                InvalidValue(
                    f"{printable(norm.name)}: expected {norm.channels} channels on axis {norm.axis}, got {array.shape}"
                )
            )
        return array

    def moments(self, norm: Norm, x: Any, mask: Any = None) -> Moments:
        """Moments of a layer's input; with a mask (the shape of x without its last axis) of the unmasked part.

        Raises Stop as `values` does, and InvalidValue naming the layer where the input is not finite.
        """
        array, axis = self.values(norm, x), norm.axis
        if mask is not None:
            masked = np.broadcast_to(self.numpy(mask).astype(bool), array.shape[:-1])
            array, axis = _unmasked(norm, array, masked), -1
        return self.moments_of(norm, array, axis)

    @staticmethod
    def moments_of(norm: Norm, array: Array, axis: int | None = None) -> Moments:
        """Moments along the layer's axis (or another), InvalidValue that names the layer."""
        try:
            return moments(array, norm.axis if axis is None else axis)
        except InvalidValue as error:
            raise InvalidValue(f"{printable(norm.name)}: its input is not finite: {error}") from None


def _unmasked(norm: Norm, array: Array, mask: Array) -> Array:
    """The unmasked positions as rows (n, C). A mask has no last axis: Keras spreads it along that."""
    axis = norm.axis % array.ndim
    if axis == array.ndim - 1:
        rows: Array = array[mask]
        return rows
    spread = np.broadcast_to(mask[..., None], array.shape)
    moved, chosen = np.moveaxis(array, axis, -1), np.moveaxis(spread, axis, -1)
    counts = chosen.reshape(-1, chosen.shape[-1]).sum(axis=0)
    if (counts != counts[0]).any():
        raise Stop(
            InvalidValue(
                f"{printable(norm.name)}: its channels are on axis {norm.axis}, and a mask leaves some of them with fewer"
                " positions than others; only equal counts are supported. Leave it out with layers="
            )
        )
    flat = moved.reshape(-1, moved.shape[-1])
    keep = chosen.reshape(-1, chosen.shape[-1])
    return np.stack([flat[keep[:, c], c] for c in range(flat.shape[1])], axis=1)


def _keras_of(model: Any) -> Any:
    """The Keras module that a live model belongs to. Raises InvalidValue for anything else."""
    packages = [base.__module__.split(".")[0] for base in type(model).__mro__]
    for package in ("keras", "tf_keras"):
        if package in packages and callable(model):
            return sys.modules[package]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise InvalidValue(
        f"expected a live Keras model, got a {printable(kind)}; for a file: the command bnport calibrate, or"
        " 'from bnport.calibrate.file import calibrate_file'"
    )


def _has_functions(layer: Any) -> bool:
    """Whether a layer's own code has a tf.function; those that Keras makes for fit and predict do not count."""
    spaces = [vars(base) for base in type(layer).__mro__ if base.__module__.split(".")[0] not in ("keras", "tf_keras")]
    own = {name: value for space in (*spaces, vars(layer)) for name, value in space.items()}
    return any(hasattr(value, "get_concrete_function") for name, value in own.items() if not name.endswith("_function"))


def below(layer: Any) -> list[Any]:
    """A layer and every layer inside it, each once."""
    if not hasattr(layer, "_flatten_layers"):  # an operation without weights
        return [layer]
    return list(layer._flatten_layers(include_self=True, recursive=True))
