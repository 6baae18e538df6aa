"""A BatchNormalization node as a Layer: which inputs are which, what the opset's attributes mean, and what to refuse."""

from __future__ import annotations

import re
from collections import Counter

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.adapters.onnx.evidence import kernel_of
from bnport.adapters.onnx.scope import Known, Unknown
from bnport.adapters.onnx.tensors import FLOATS
from bnport.errors import FormatError, InvalidValue, printable
from bnport.layer import Layer
from bnport.record import FIELDS, BatchNorm
from bnport.rounding import meant_epsilon

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.onnx.walk import Found
    from bnport.record import Array

POSITIONS = {"gamma": 1, "beta": 2, "mean": 3, "variance": 4}  # inputs of the node, the same in every opset
EPSILON, MOMENTUM = 1e-5, 0.9  # the operator's defaults in every opset
NARROWEST = ("float16", "bfloat16", "float32", "float64")
_TORCH_ENDINGS = {"gamma": ".weight", "beta": ".bias", "mean": ".running_mean", "variance": ".running_var"}
OURS = ".bnport"  # ends the name of a tensor that writing made beside a shared one; layers keep their names by it
_MADE_HERE = re.compile(r"\.bnport(_\d+)?$")
_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
RECONSTRUCTED = (
    "reconstructed from a folded affine (Mul and Add): gamma and beta are its slope and intercept, with mean 0, variance 1"
    " and epsilon 0 assumed; the same function, but the true statistics are not in the file"
)


class Parameters(NamedTuple):
    """What a layer's four inputs stand for."""

    values: dict[str, Known | Unknown]
    channels: int

    @property
    def unknown(self) -> dict[str, Unknown]:
        """Those that are no constants."""
        return {field: value for field, value in self.values.items() if isinstance(value, Unknown)}

    @property
    def dtype(self) -> str:
        """The narrowest type among them."""
        held = {value.dtype for value in self.values.values() if isinstance(value, Known)}
        return next((dtype for dtype in NARROWEST if dtype in held), "float32")


def place_of(found: Found, source: str) -> str:
    """The start of a message about a node."""
    return f"{printable(source)}: layer {printable(found.scope.label + found.node.shown)!r}"


def parameters(found: Found, source: str) -> Parameters:
    """The layer's inputs by position. FormatError for missing inputs, other shapes than (C,), and lengths that differ."""
    node, scope = found.node, found.scope
    where = place_of(found, source)
    if len(node.inputs) != 5 or not all(node.inputs):
        raise FormatError(f"{where}: BatchNormalization has 5 inputs, {sum(map(bool, node.inputs))} are there")
    values = {field: scope.constant(node.inputs[position]) for field, position in POSITIONS.items()}
    spatial = _integer(found, "spatial", 1, where) if scope.opset < 9 else 1
    sizes: dict[str, int] = {}
    for field, value in values.items():
        if isinstance(value, Unknown):
            continue
        if value.dtype not in FLOATS:
            raise FormatError(f"{where}: {field} is {value.dtype}, not floating-point numbers")
        if value.shape is None:
            continue
        if len(value.shape) != 1:
            if not spatial:
                raise FormatError(
                    f"{where}: spatial=0 with {field} of shape {list(value.shape)}: one value per position, not per"
                    " channel; no BatchNorm layer of another framework holds that"
                )
            raise FormatError(f"{where}: {field} should have shape (channels,), it has {list(value.shape)}")
        sizes[field] = value.shape[0]
    if len(set(sizes.values())) > 1:
        raise FormatError(f"{where}: lengths differ: {', '.join(f'{k} {v}' for k, v in sizes.items())}")
    channels = next(iter(sizes.values()), 0)
    if sizes and not channels:
        raise FormatError(f"{where}: has no channels")
    return Parameters(values, channels)


def layer_of(found: Found, name: str, source: str, inputs: tuple[str, ...] | None, *, stored: bool = False) -> Layer:
    """The Layer. Where a parameter is no constant the layer is listed, but asking for its numbers raises InvalidValue.

    A node in training mode computes its statistics from each batch; `stored`: the running ones beside it are meant.
    """
    if found.affine:
        return _affine_layer(found, name, source, inputs)
    where = place_of(found, source)
    held = parameters(found, source)
    notes = _mode(found, where)
    training = _training(found, where) and not held.unknown
    if training and stored:
        notes.append(
            f"exported in training mode; the running statistics in the file are taken, as asked{_moved(found)}"
        )
    epsilon = _number(found, "epsilon", EPSILON, where)
    momentum: float | None = meant_epsilon(_number(found, "momentum", MOMENTUM, where))
    if momentum in (0, 1):
        notes.append(
            f"momentum {momentum}, which PyTorch's exporters write for momentum=None (a cumulative average): not carried over,"
            f" as statistics that keep {'all' if momentum else 'nothing'} of the old"
            f" {'never change' if momentum else 'are those of the last batch'}"
        )
        momentum = None
    unknown = held.unknown
    if not unknown and not held.channels:
        raise FormatError(f"{where}: how many channels there are is known at run time only")
    only_statistics = bool(unknown) and set(unknown) <= {"mean", "variance"}
    if unknown and not only_statistics:
        notes.append(_refusal(unknown))
    tensors = {
        field: value.tensor
        for field, value in held.values.items()
        if isinstance(value, Known) and value.tensor is not None
    }
    try:
        return Layer(
            name,
            channels=held.channels,
            epsilon=epsilon,
            load=lambda: _numbers(held, where),
            momentum=momentum,
            stores={*FIELDS, "epsilon", "momentum"} - (set(unknown) if only_statistics else set()),
            dtype=held.dtype,
            tensors=tensors if len(tensors) == len(FIELDS) else None,
            kernel=kernel_of(found.scope, found.node.inputs[0]),
            inputs=inputs,
            notes=notes,
            without=_refusal(unknown) if only_statistics else _in_training(found) if training and not stored else "",
        )
    except InvalidValue as error:
        raise FormatError(f"{printable(source)}: {error}") from None


def _numbers(held: Parameters, where: str) -> Mapping[str, Array]:
    if not set(held.unknown) <= {"mean", "variance"}:
        raise InvalidValue(f"{where}: {_refusal(held.unknown)}")
    arrays = {}
    for field, value in held.values.items():
        if isinstance(value, Known):
            array = value.array()
            arrays[field] = np.repeat(array, held.channels) if value.shape is None else array
    return arrays


def _refusal(unknown: Mapping[str, Unknown]) -> str:
    fields = " and ".join(unknown)
    first = next(iter(unknown.values()))
    if any(value.batch for value in unknown.values()):
        return (
            f"cannot be converted: {fields} are computed from each batch (track_running_stats=False, or statistics of the"
            " instance), so there are no stored statistics; bnport convert --calibrate DATA (or bnport calibrate) makes"
            " some from data, or skip the layer"
        )
    return f"cannot be converted: {fields} {first.why}; store it in the file as an initializer of its own, or skip the layer"


def _training(found: Found, where: str) -> bool:
    """Whether the node normalises by each batch, by the rule of its opset."""
    opset, outputs = found.scope.opset, [name for name in found.node.outputs if name]
    if opset >= 14:
        return _integer(found, "training_mode", 0, where) != 0
    return len(outputs) > 1 and (opset >= 7 or not _integer(found, "is_test", 0, where))


def _moved(found: Found) -> str:
    torch = "torch" in found.scope.model.producer
    return (
        " (PyTorch's exporter ran the model once in that mode, which moved them: they are not the checkpoint's)"
        if torch
        else ""
    )


def _in_training(found: Found) -> str:
    return (
        "exported in training mode: it normalises by each batch, and what is stored beside are running statistics"
        f"{_moved(found)}. Export in evaluation mode, or bnport convert --calibrate DATA (or bnport calibrate) makes some from"
        " data; --stat stored takes the stored ones"
    )


def _mode(found: Found, where: str) -> list[str]:
    """What there is to say about spatial, by opset."""
    opset, notes = found.scope.opset, []
    if opset < 9 and not _integer(found, "spatial", 1, where):
        notes.append("spatial=0 with one value per channel, as MXNet's exporter wrote; taken as spatial=1")
    return notes


def _number(found: Found, name: str, default: float, where: str) -> float:
    attribute = found.scope.attribute(found.node, name)
    if attribute is None:
        return default
    if attribute.f is None:
        raise FormatError(f"{where}: {name} is no float")
    if not abs(attribute.f) < float("inf"):
        raise FormatError(f"{where}: {name} is {attribute.f}")
    return attribute.f


def _integer(found: Found, name: str, default: int, where: str) -> int:
    attribute = found.scope.attribute(found.node, name)
    if attribute is None:
        return default
    if attribute.i is None:
        raise FormatError(f"{where}: {name} is no integer")
    return attribute.i


# ---- a BatchNorm that was taken apart


def _affine_layer(found: Found, name: str, source: str, inputs: tuple[str, ...] | None) -> Layer:
    assert found.affine is not None
    where = place_of(found, source)
    slope, intercept = affine_of(found, source)
    sizes = {"slope": slope.size or 1, "intercept": intercept.size or 1}
    channels = max(sizes.values())
    for what, value in (("slope", slope), ("intercept", intercept)):
        if value.dtype not in FLOATS or sum(n != 1 for n in value.shape or ()) > 1:
            raise FormatError(
                f"{where}: {what} of {value.dtype} and shape {list(value.shape or ())} is none per channel"
            )
        if sizes[what] not in (1, channels):
            raise FormatError(f"{where}: lengths differ: slope {sizes['slope']}, intercept {sizes['intercept']}")

    def load() -> dict[str, Array]:
        a, b = (np.broadcast_to(value.array().reshape(-1), (channels,)) for value in (slope, intercept))
        try:
            record = BatchNorm.from_affine(slope=a, intercept=b)
        except InvalidValue as error:
            raise InvalidValue(f"{where}: {error}") from None
        return {field: getattr(record, field) for field in FIELDS}

    return Layer(
        name,
        channels=channels,
        epsilon=0.0,
        load=load,
        assumed=("mean", "variance"),
        dtype=slope.dtype,
        kernel=kernel_of(found.scope, found.affine.x),
        inputs=inputs,
        notes=(RECONSTRUCTED,),
    )


def affine_of(found: Found, source: str) -> tuple[Known, Known]:
    """(slope, intercept) of a layer that was taken apart; zeros where it has no intercept."""
    assert found.affine is not None
    slope = found.scope.constant(found.affine.slope)
    zeros = Known("float32", None, lambda: np.zeros(1, np.float32))
    intercept = zeros if found.affine.intercept is None else found.scope.constant(found.affine.intercept)
    if isinstance(slope, Unknown) or isinstance(intercept, Unknown):
        raise FormatError(f"{place_of(found, source)}: its slope and intercept are no constants")
    return slope, intercept


# ---- names


def named(all_found: list[Found]) -> dict[str, Found]:
    """The layers by name."""
    return dict(zip(names(all_found), all_found, strict=True))


def names(all_found: list[Found]) -> list[str]:
    """A name for each layer, unique: PyTorch's module path where the file says it; else the node's name, else its output.

    A module path is believed if the exporter noted it on the node, or if two inputs or more carry one prefix with the
    ending of their own role and none the ending of another; never if two layers claim it.
    """
    paths = [_module_path(found) for found in all_found]
    claims = Counter(paths)
    chosen = [
        path if path and claims[path] == 1 else _plain_name(found) for path, found in zip(paths, all_found, strict=True)
    ]
    count = Counter(chosen)
    for k, found in enumerate(all_found):
        if count[chosen[k]] > 1:
            chosen[k] = found.scope.label + next((o for o in found.node.outputs if o), "")
    taken: set[str] = set()
    for k, name in enumerate(chosen):
        number = 1
        while chosen[k] in taken:
            number += 1
            chosen[k] = f"{name}#{number}"
        taken.add(chosen[k])
    return chosen


def _plain_name(found: Found) -> str:
    name = found.node.shown
    if found.affine:
        name = name.split("/batchnorm/")[0] or name
    return found.scope.label + name


def _module_path(found: Found) -> str | None:
    if found.affine:
        return None
    noted = scope_path(found.node.metadata.get(_TORCH_SCOPES, ""))
    if noted and not found.scope.label:
        return noted
    prefixes: list[str] = []
    for field, ending in _TORCH_ENDINGS.items():
        position = POSITIONS[field]
        name = found.node.inputs[position] if position < len(found.node.inputs) else ""
        scope, name = found.scope.origin(name)  # out of functions, to what the call was given
        if scope.label:
            return None
        name = _MADE_HERE.sub("", name)
        if name.endswith(ending):
            prefixes.append(name[: -len(ending)])
        elif name.endswith(tuple(_TORCH_ENDINGS.values())):
            return None
    return prefixes[0] if len(prefixes) > 1 and len(set(prefixes)) == 1 else None


def scope_path(noted: str) -> str | None:
    """'layer1.0.bn1' from the list that PyTorch's exporter notes: "['', 'layer1', 'layer1.0', 'layer1.0.bn1', 'op']"."""
    parts = [part.strip().strip("'\"") for part in noted.strip().strip("[]").split(",")]
    return parts[-2] if len(parts) >= 3 and parts[0] == "" and parts[-2] else None
