"""Set any of gamma, beta, mean, variance of one live BatchNorm layer, and leave the rest as it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import InvalidValue, NotFound, Question, Unrepresentable, listed, printable
from bnport.layer import Change
from bnport.record import BatchNorm, refuse_masked

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from bnport.layer import Layer
    from bnport.record import Array

_IMAGE_CHANNELS = (1, 3)  # a layer on raw pixels, whose mean and std people take from a data set


def set_weights(
    target: Any,
    layer: str | None = None,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    std: ArrayLike | None = None,
    epsilon: float | None = None,
    sure: bool = False,
) -> BatchNorm:
    """Set any subset of a live layer's numbers; what is not given stays as it is. Returns what the layer then holds.

    target:   a live BatchNorm layer (Keras' BatchNormalization, torch's BatchNorm2d, ...), or a live model and the
              name of the `layer` in it.
    gamma, beta, mean, variance: shape (C,). At inference y = gamma * (x - mean) / sqrt(variance + epsilon) + beta.
    std:      instead of `variance`: the standard deviation; its square is stored, because that is what layers keep.
    epsilon:  set on the layer too; Keras' compiled predict, fit and evaluate are dropped, so that they use it.
    sure:     the numbers are meant, although they look swapped or squared.

    All four are not needed: gamma and beta alone change the scale and shift of the normalised input. But mean and
    variance belong together and to the data that the layer sees; setting one of them alone changes the function.

    Raises InvalidValue for wrong shapes, NaN or infinity, masked values, variance + epsilon <= 0, a layer that is not built
    yet or does not have what is to be set; Unrepresentable for values that its dtype cannot hold; Question for mean and
    variance that look swapped and a std that looks like a variance (or the reverse), and if the model has several layers
    and none is named; NotFound for an unknown name. On any error nothing is changed.
    """
    from bnport import adapters

    if isinstance(target, str | os.PathLike):
        raise InvalidValue("set_weights changes a live layer or model; for a file use bnport.convert, or load it first")
    if variance is not None and std is not None:
        raise InvalidValue("both variance and std are given; they are the same thing twice (variance = std ** 2)")
    adapter = adapters.find(target)
    found = _the_layer(adapter.read(target), layer)
    old = found.arrays()
    given = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance, "std": std}
    new = {name: _vector(found, name, value) for name, value in given.items() if value is not None}
    if not new and epsilon is None:
        raise InvalidValue("nothing to set: give at least one of gamma, beta, mean, variance or std, epsilon")
    for field in (set(new) | ({"epsilon"} if epsilon is not None else set())) - {"std"} - found.stores:
        flag = {"gamma": " (scale=False, affine=False)", "beta": " (center=False, affine=False)"}.get(field, "")
        raise InvalidValue(f"{_named(found)} has no {field}{flag}; build it with one, or leave {field} out")
    if not sure:
        _ask(found, new, old)
    if "std" in new:
        deviation = new.pop("std").astype(np.float64)
        if (deviation < 0).any():
            raise InvalidValue(f"{_named(found)}: std has negative values; a standard deviation is never negative")
        new["variance"] = deviation**2
    try:
        record = BatchNorm(**{**old, **new}, epsilon=found.epsilon if epsilon is None else epsilon)
        record = record.rounded(found.dtype)
    except (InvalidValue, Unrepresentable) as error:
        raise type(error)(f"{_named(found)}: {error}{_lesson(new)}") from None
    fields = frozenset(new) | ({"epsilon"} if epsilon is not None else frozenset())
    adapter.apply(target, {found.name: Change(record, fields)})
    return record


def _the_layer(layers: Any, name: str | None) -> Layer:
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))  # type: ignore[no-any-return]
    if not layers:
        raise NotFound(f"{layers.source} has no BatchNorm layer")
    if name is None:
        raise Question(f"{layers.source} has {len(layers)} BatchNorm layers ({listed(layers, 5)}): name the one to set")
    if name not in layers:
        raise NotFound(f"no BatchNorm layer {printable(name)!r} in {layers.source}; there are {listed(layers, 5)}")
    return layers[name]  # type: ignore[no-any-return]


def _named(layer: Layer) -> str:
    return f"layer {printable(layer.name)!r}"


def _vector(layer: Layer, name: str, value: Any) -> Array:
    """`value` as an array of shape (C,), or InvalidValue that says what was expected."""
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a device or part of a graph
        value = value.detach().cpu()
    try:
        array: Array = np.asarray(value)
        refuse_masked(name, value)
    except InvalidValue as error:
        raise InvalidValue(f"{_named(layer)}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"{_named(layer)}: {name} is no array of numbers ({printable(error, 80)})") from None
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise InvalidValue(f"{_named(layer)}: {name}: expected numbers, got dtype {array.dtype}")
    if array.shape != (layer.channels,):
        hint = ""
        if array.size == layer.channels:
            hint = "; flatten it: .reshape(-1)"
        elif array.ndim == 0:
            hint = f"; one number for each channel, as in numpy.full({layer.channels}, {array})"
        raise InvalidValue(f"{_named(layer)}: {name}: expected shape ({layer.channels},), got {array.shape}{hint}")
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all():
        at = int(np.argmin(np.isfinite(wide)))
        raise InvalidValue(f"{_named(layer)}: {name}: channel {at} is {wide[at]}; every value must be finite")
    return wide if array.dtype.kind in "iu" or array.dtype.name not in ("float32", "float64") else array


def _lesson(new: dict[str, Array]) -> str:
    if "variance" in new and (new["variance"].astype(np.float64) < 0).any():
        return ". A variance is a mean of squares and never negative: are the arrays in order?"
    return ""


def _ask(layer: Layer, new: dict[str, Array], old: dict[str, Array]) -> None:
    """Question if the statistics look swapped or squared."""
    arrays = {name: array.astype(np.float64) for name, array in new.items()}
    reference = {name: np.asarray(old[name]).astype(np.float64) for name in ("mean", "variance")}
    trained = not (np.all(reference["mean"] == 0) and np.all(reference["variance"] == 1))
    mean, variance, std = (arrays.get(name) for name in ("mean", "variance", "std"))
    again = "if they are meant, say sure=True"
    if mean is not None and variance is not None and _look_swapped(mean, variance, reference if trained else None):
        raise Question(
            f"{_named(layer)}: mean and variance look swapped ({_evidence(mean, variance)}). Frameworks order them"
            f" gamma, beta, mean, variance; {again}"
        )
    pixels = layer.channels in _IMAGE_CHANNELS and mean is not None
    if variance is not None and (
        (trained and _nearer(variance**2, variance, reference["variance"]))
        or (pixels and _std_of_pixels(mean, variance))
    ):
        raise Question(
            f"{_named(layer)}: variance looks like a standard deviation ({_few(variance)}). The layer keeps the variance,"
            f" whatever older documentation says: give it as std=..., or square it; {again}"
        )
    if std is not None and (
        (trained and (std >= 0).all() and _nearer(std, std**2, reference["variance"]))
        or (pixels and _variance_of_pixels(mean, std))
    ):
        raise Question(f"{_named(layer)}: std looks like a variance ({_few(std)}): give it as variance=...; {again}")


def _look_swapped(mean: Array, variance: Array, reference: dict[str, Array] | None) -> bool:
    if (variance < 0).any() and (mean >= 0).all():
        return True
    if reference is None:
        return False
    straight = _distance(mean, reference["mean"]) + _distance(variance, reference["variance"])
    swapped = _distance(mean, reference["variance"]) + _distance(variance, reference["mean"])
    return bool(4 * swapped < straight)


def _distance(a: Array, b: Array) -> float:
    """How far apart, relative to their size: median over channels."""
    return float(np.median(np.abs(a - b) / (np.abs(a) + np.abs(b) + 1e-30)))


def _nearer(alternative: Array, given: Array, reference: Array) -> bool:
    """Whether `alternative` is close to what the layer held and `given` is not, in most channels (in the logarithm)."""
    if not ((alternative > 0).all() and (given > 0).all() and (reference > 0).all()):
        return False
    apart = float(np.median(np.abs(np.log(given / reference))))
    other = float(np.median(np.abs(np.log(alternative / reference))))
    return apart > 0.5 and 4 * other < apart


def _top(mean: Array) -> float | None:
    """The largest value of pixels with such means: 1 or 255; None where they cannot be pixels."""
    if ((mean > 0) & (mean < 1)).all():
        return 1.0
    return 255.0 if ((mean > 20) & (mean < 255)).all() else None


def _std_of_pixels(mean: Array | None, variance: Array) -> bool:
    """Values in [0, top] have a variance of at most mean * (top - mean), and images about a fifth of that."""
    if mean is None or (top := _top(mean)) is None:
        return False
    share = variance / (mean * (top - mean))
    return bool((share > 0.5).all() if top == 1 else (share < 0.02).all())


def _variance_of_pixels(mean: Array | None, std: Array) -> bool:
    if mean is None or (top := _top(mean)) is None:
        return False
    share = std / np.sqrt(mean * (top - mean))
    return bool((share < 0.15).all() if top == 1 else (share > 1).all())


def _few(array: Array) -> str:
    return ", ".join(f"{v:.4g}" for v in array[:3]) + (", ..." if array.size > 3 else "")


def _evidence(mean: Array, variance: Array) -> str:
    return f"mean {_few(mean)}; variance {_few(variance)}"
