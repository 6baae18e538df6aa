"""What one array of a ported layer was made from: the known mistakes, each as a formula over the source's numbers.

A formula explains an array only if it gives every channel to within the rounding of the port's dtype (a few units in
the last place), so a chance match needs a coincidence in every channel at once. Formulas with a free constant (a scale
factor, an epsilon) are asked for at least two different channels besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.record import FIELDS
from bnport.rounding import UNIT_ROUNDOFF, round_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.layer import Layer
    from bnport.record import Array

INITIAL = {"gamma": 1.0, "beta": 0.0, "mean": 0.0, "variance": 1.0}

# whose default it is; conventions differ by framework, and a port that forgets it takes one for the other
EPSILONS = {
    1e-3: "the default of Keras, TensorFlow and MXNet",
    1e-5: "the default of PyTorch, ONNX, Caffe and Flax",
    1e-4: "the default of MatConvNet and Lasagne",
    2e-5: "the default of Chainer and of MXNet's ResNets",
    1.001e-5: "of keras.applications' ResNet and DenseNet",
    1e-6: "the default of early Keras",
    1e-9: "of SegNet",
    0.0: "none at all",
}
_MORE_EPSILONS = (1e-2, 1e-7, 1e-8, 1e-10, 1e-12)
_ROUNDINGS = 8  # of the port's dtype: (sqrt(v) + e) ** 2 in that precision may be off by 5, and by 1 more as stored


class Numbers(NamedTuple):
    """The stored numbers of a layer, unvalidated (a port may hold a negative variance), widened to float64."""

    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    epsilon: float
    dtype: str
    held: frozenset[str]  # of gamma, beta, mean, variance: what the layer has


class Finding(NamedTuple):
    """One array explained: by which mistake, how it reads in words, and the constant that was fitted, if any."""

    mistake: str  # a key of MISTAKES, or "" for an array that is as it should be
    field: str
    words: str
    constant: float | None = None
    source_field: str = ""


def numbers(layer: Layer) -> Numbers | None:
    """The layer's numbers, or None where its arrays do not have one length."""
    arrays = {name: np.asarray(array, np.float64) for name, array in layer.arrays().items() if name in FIELDS}
    shape = (layer.channels,)
    values = [arrays.get(name, np.full(shape, INITIAL[name])) for name in FIELDS]
    if any(array.shape != shape for array in values):
        return None
    gamma, beta, mean, variance = values
    held = frozenset(arrays) & (layer.stores | {"mean", "variance"})
    return Numbers(gamma, beta, mean, variance, layer.epsilon, layer.dtype, held)


def close(found: Array, expected: Array, scale: Array | None = None, *, dtype: str, roundings: float) -> bool:
    """Whether every channel agrees to `roundings` units of `scale` (default: of `expected`) in `dtype`."""
    size = np.abs(expected) if scale is None else np.maximum(scale, np.abs(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = roundings * UNIT_ROUNDOFF[dtype] * size + (2.0**-24 if dtype == "float16" else 2.0**-126)
        return bool(np.isfinite(expected).all() and (np.abs(found - expected) <= allowed).all())


def telling(array: Array) -> bool:
    """Whether an array holds at least two different values, so that matching it means something."""
    return array.size > 1 and bool((array != array[0]).any())


def explain_field(field: str, source: Numbers, port: Numbers) -> Iterator[Finding]:
    """Everything known that gives this array of the port, the likeliest first; nothing at all for a stranger's numbers.

    The first Finding has mistake "" where the array is the source's own, rounded once.
    """
    found, own = getattr(port, field), getattr(source, field)
    dtype = port.dtype
    if close(found, own, dtype=dtype, roundings=1):
        yield Finding("", field, f"{field} is the source's", source_field=field)
        return
    if (found == INITIAL[field]).all():
        mistake = "ignored" if field == "gamma" else "partial"
        held = "" if field in port.held else ": the ported layer has none"
        yield Finding(mistake, field, f"{field} is {INITIAL[field]:g} everywhere{held}")
    for narrow in ("float16", "bfloat16"):
        if UNIT_ROUNDOFF[dtype] < UNIT_ROUNDOFF[narrow] and np.array_equal(found, round_to(own, narrow)):
            yield Finding("half", field, f"{field} is the source's rounded to {narrow}", source_field=field)
    for other in FIELDS:
        if other != field and close(found, getattr(source, other), dtype=dtype, roundings=1):
            yield Finding("order", field, f"{field} holds the source's {other}", source_field=other)
    yield from _SPECIAL[field](found, source, port)
    if field in ("mean", "variance"):
        yield from _ratio(field, found, own, dtype)


def _gamma(found: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    gamma, dtype = source.gamma, port.dtype
    for epsilon in dict.fromkeys((source.epsilon, port.epsilon)):
        for one, whose, other, raw in (
            (gamma, "the source's gamma", found, "the port's gamma"),
            (found, "gamma", gamma, "gamma"),
        ):
            plain = np.abs(other)
            if epsilon and close(one, plain + epsilon, dtype=dtype, roundings=_ROUNDINGS) and telling(plain):
                yield Finding("absolute", "gamma", f"{whose} is |{raw}| + {epsilon!r}", epsilon, "gamma")
    if (gamma < 0).any() and close(found, np.abs(gamma), dtype=dtype, roundings=1):
        yield Finding("absolute", "gamma", "gamma is |gamma|: its signs are lost", source_field="gamma")
    if (found < 0).any() and close(gamma, np.abs(found), dtype=dtype, roundings=1):
        yield Finding("absolute", "gamma", "the source's gamma is |the port's gamma|", source_field="gamma")
    slope = _slope(source)
    if slope is not None and close(found, slope, dtype=dtype, roundings=_ROUNDINGS) and telling(slope):
        yield Finding("folded", "gamma", "gamma holds the slope gamma / sqrt(variance + epsilon)", source_field="gamma")


def _beta(found: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    slope = _slope(source)
    if slope is None:
        return
    moved = source.mean * slope
    if close(found, source.beta - moved, np.abs(source.beta) + np.abs(moved), dtype=port.dtype, roundings=_ROUNDINGS):
        yield Finding("folded", "beta", "beta holds the intercept beta - mean * slope", source_field="beta")


def _slope(source: Numbers) -> Array | None:
    total = source.variance + source.epsilon
    return source.gamma / np.sqrt(total) if (total > 0).all() else None


def _mean(found: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    if close(found, -source.mean, dtype=port.dtype, roundings=1):
        yield Finding("sign", "mean", "mean is -mean", source_field="mean")


def _variance(found: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    variance, epsilon, dtype = source.variance, source.epsilon, port.dtype
    total = found + port.epsilon
    if close(total, variance + epsilon, dtype=dtype, roundings=_ROUNDINGS):
        yield Finding("", "variance", "variance absorbs the difference of the epsilons", source_field="variance")
    positive = np.maximum(variance, 0.0)
    std, std_with = np.sqrt(positive), np.sqrt(np.maximum(variance + epsilon, 0.0))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        forms = [
            ("std", "sqrt(variance)", std),
            ("std", "sqrt(variance + epsilon)", std_with),
            ("inverse-std", "1 / sqrt(variance + epsilon)", 1 / std_with),
            ("inverse-std", "1 / sqrt(variance)", 1 / std),
            ("inverse-std", "1 / (variance + epsilon)", 1 / std_with**2),
            ("inverse-std", "1 / variance", 1 / positive),
            ("squared", "variance ** 2", variance**2),
            ("squared", "(variance + epsilon) ** 2", (variance + epsilon) ** 2),
            ("squared", "1 / variance ** 2", 1 / variance**2),
            ("root-twice", "variance ** 0.25", np.sqrt(std)),
            ("root-twice", "(variance + epsilon) ** 0.25", np.sqrt(std_with)),
            ("outside", "(sqrt(variance) + epsilon) ** 2", (std + epsilon) ** 2),
        ]  # fmt: skip
        if port.epsilon != epsilon:
            forms.append(
                ("std", "sqrt(variance + the port's epsilon)", np.sqrt(np.maximum(variance + port.epsilon, 0)))
            )
    for mistake, formula, expected in forms:
        if not telling(expected) and expected.size > 1:
            continue
        if close(found, expected, dtype=dtype, roundings=_ROUNDINGS) or (
            # the same function with the port's epsilon taken out again
            port.epsilon and mistake == "outside" and close(total, expected, dtype=dtype, roundings=_ROUNDINGS)
        ):
            yield Finding(mistake, "variance", f"variance is the source's {formula}", source_field="variance")
    yield from _outside(found, std_with, total, source, port)
    yield from _other_epsilon(total, source, port)


def _outside(found: Array, std_with: Array, total: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    """Epsilon added to the root on one side and under it on the other, by either side's epsilon."""
    std = np.sqrt(np.maximum(source.variance, 0.0))
    for epsilon in dict.fromkeys((source.epsilon, port.epsilon, *EPSILONS, *_MORE_EPSILONS)):
        if not epsilon or not telling(std):
            continue
        scale = std_with**2
        if epsilon != source.epsilon and close(total, (std + epsilon) ** 2, dtype=port.dtype, roundings=_ROUNDINGS):
            words = f"variance + epsilon is (sqrt(source variance) + {epsilon!r}) ** 2"
            yield Finding("outside", "variance", words, epsilon, "variance")
        if close(found, (std_with - epsilon) ** 2, scale, dtype=port.dtype, roundings=_ROUNDINGS):
            words = f"variance is (sqrt(source variance + epsilon) - {epsilon!r}) ** 2"
            yield Finding("outside", "variance", words, epsilon, "variance")


def _other_epsilon(total: Array, source: Numbers, port: Numbers) -> Iterator[Finding]:
    """The port's variance + epsilon is the source's variance + another well-known epsilon."""
    if not telling(source.variance):
        return
    sums = (source.epsilon + port.epsilon, 2 * source.epsilon)
    for epsilon in dict.fromkeys((*EPSILONS, port.epsilon, *_MORE_EPSILONS, *sums)):
        if epsilon != source.epsilon and close(
            total, source.variance + epsilon, dtype=port.dtype, roundings=_ROUNDINGS
        ):
            words = f"variance + epsilon is the source's variance + {epsilon!r}"
            yield Finding("epsilon", "variance", words, epsilon, "variance")


def _ratio(field: str, found: Array, own: Array, dtype: str) -> Iterator[Finding]:
    """One constant times the source's array: Caffe's factor, or n / (n - 1)."""
    nonzero = own != 0
    if not telling(own[nonzero]):
        return
    ratio = float(np.median(found[nonzero] / own[nonzero]))
    if not (ratio > 0 and np.isfinite(ratio)) or not close(found, ratio * own, dtype=dtype, roundings=_ROUNDINGS):
        return
    if field == "variance" and 0.5 <= ratio <= 2:
        larger = max(ratio, 1 / ratio)
        n = larger / (larger - 1)
        exact = n * n * UNIT_ROUNDOFF[dtype] < 0.4  # otherwise rounding hides which integer it was
        if not exact or abs(n - round(n)) < 0.01 + n * n * UNIT_ROUNDOFF[dtype]:
            shown = f"{round(n)}" if exact else f"about {n:.3g}"
            which = "n / (n - 1)" if ratio > 1 else "(n - 1) / n"
            yield Finding("bessel", field, f"variance is the source's times {which}, n = {shown}", ratio, field)
    yield Finding("factor", field, f"{field} is the source's times {ratio:.7g}", ratio, field)


_SPECIAL = {"gamma": _gamma, "beta": _beta, "mean": _mean, "variance": _variance}
