"""The neutral record: what a BatchNorm layer is, whichever framework it came from, and its algebra.

At inference BatchNorm is one affine map per channel::

    y = a * x + b        a = gamma / sqrt(variance + epsilon)        b = beta - mean * a

so two layers are the same function on every input iff (a, b) are equal. Everything here is computed in
float64 and rounded once, when a record is fitted to the layer that will hold it.
"""

from __future__ import annotations

import functools
import math
import sys

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.errors import InvalidValue
from bnport.rounding import UNDERFLOW, UNIT_ROUNDOFF, meant_epsilon, round_to

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from numpy.typing import ArrayLike, NDArray

    Array: TypeAlias = NDArray[Any]

FIELDS = ("gamma", "beta", "mean", "variance")

_FLOAT32_SMALLEST_NORMAL = 2.0**-126  # engines may flush anything smaller to zero


def checked_epsilon(epsilon: object) -> float:
    """`epsilon` as a finite float >= 0, or InvalidValue; strings, booleans and lists are refused."""
    if type(epsilon) is float:
        return _checked(epsilon)
    if isinstance(epsilon, bool | str | bytes) or not hasattr(epsilon, "__float__"):
        raise InvalidValue(f"epsilon: expected a number, got {epsilon!r:.60}")
    try:
        value = float(epsilon)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"epsilon: expected a number, got {epsilon!r:.60}") from error
    return _checked(value)


@functools.lru_cache(1024)  # a network has one or two epsilons and asks for each of its layers
def _checked(epsilon: float) -> float:
    if not math.isfinite(epsilon) or epsilon < 0:
        raise InvalidValue(f"epsilon: expected a finite number >= 0, got {epsilon!r}")
    return meant_epsilon(epsilon)


def _numbers(name: str, value: ArrayLike) -> Array:
    """A float32 or float64 array of shape (C,), not copied; 16-bit floats widen exactly, integers become float64."""
    array = np.asarray(value)
    if array is not value:
        refuse_masked(name, value)
    if array.dtype.char not in "fd":
        if array.dtype.kind in "iu":
            array = array.astype(np.float64)
        elif array.dtype.name in ("float16", "bfloat16"):
            array = array.astype(np.float32)
        else:
            raise InvalidValue(f"{name}: expected floating-point numbers, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise InvalidValue(f"{name}: expected shape (channels,) with at least one channel, got {array.shape}")
    return array


def refuse_masked(name: str, value: object) -> None:
    """Refuse a masked array with masked values: numpy would take the numbers that lie under the mask."""
    module = sys.modules.get("numpy.ma")  # without it there are none
    if module is not None and isinstance(value, module.MaskedArray):
        masked = module.getmaskarray(value)
        if masked.any():
            raise InvalidValue(f"{name}: {first_channels(masked.ravel())} masked; every value must be given")


def _refuse_not_finite(**arrays: Array) -> None:
    for name, array in arrays.items():
        finite = np.isfinite(array)
        if not finite.all():
            channel = int(np.argmin(finite))
            raise InvalidValue(f"{name}: channel {channel} is {array[channel]}; every value must be finite")


def _vector(name: str, value: ArrayLike) -> Array:
    """_numbers, all of them finite, as float64."""
    array = _numbers(name, value)
    _refuse_not_finite(**{name: array})
    return array.astype(np.float64)


def first_channels(bad: Array, limit: int = 5) -> str:
    """'channel 3', or 'channels 0, 3, 7 and 12 more', for a boolean mask of shape (C,)."""
    where = np.flatnonzero(bad)
    more = f" and {where.size - limit} more" if where.size > limit else ""
    return f"channel{'s' if where.size > 1 else ''} {', '.join(map(str, where[:limit]))}{more}"


class BatchNorm:
    """gamma, beta, mean, variance of shape (C,), and epsilon. Immutable, complete, validated once.

    Arguments are keyword-only, because four arrays of one shape cannot be told apart by position. An absent gamma is
    ones and an absent beta zeros, which is exact. Arrays are copied into `values`, read-only, of shape (4, C) in the order
    of FIELDS: float32, or float64 if one of them is (16-bit values widen exactly). A negative variance is legal iff
    variance + epsilon > 0, and is kept as it is (a published MobileNet has -1e-5). An epsilon that is a float32 value reads
    as the decimal that was meant.

    Raises InvalidValue on wrong shapes or dtypes, NaN or infinity, or variance + epsilon <= 0.
    """

    __slots__ = ("epsilon", "values")

    values: Array
    epsilon: float

    def __init__(
        self,
        *,
        mean: ArrayLike,
        variance: ArrayLike,
        epsilon: float,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "epsilon", checked_epsilon(epsilon))
        mean, variance = _numbers("mean", mean), _numbers("variance", variance)
        gamma = np.ones(mean.shape, mean.dtype) if gamma is None else _numbers("gamma", gamma)
        beta = np.zeros(mean.shape, mean.dtype) if beta is None else _numbers("beta", beta)
        if not gamma.size == beta.size == mean.size == variance.size:
            sizes = zip(FIELDS, (gamma, beta, mean, variance), strict=True)
            raise InvalidValue(f"arrays of different lengths: {', '.join(f'{name} {a.size}' for name, a in sizes)}")
        values = np.array((gamma, beta, mean, variance))
        finite = np.isfinite(values).ravel()
        if not finite[finite.argmin()]:
            _refuse_not_finite(mean=mean, variance=variance, gamma=gamma, beta=beta)
        values.setflags(write=False)
        put(self, "values", values)
        held = values[3]
        if not held.item(held.argmin()) + self.epsilon > 0:
            bad = held.astype(np.float64) + self.epsilon <= 0
            at = int(np.argmax(bad))
            raise InvalidValue(
                f"variance + epsilon must be positive; {first_channels(bad)}: variance {float(held[at])!r}"
                f" + epsilon {self.epsilon!r}"
            )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a BatchNorm is immutable; build a new one with replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a BatchNorm is immutable")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.gamma, self.beta, self.mean, self.variance, self.epsilon)

    def __repr__(self) -> str:
        return f"BatchNorm({self.channels} channels, epsilon={self.epsilon!r})"

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def __eq__(self, other: object) -> bool:
        """Same epsilon and the same four arrays bit for bit, once both are widened to float64."""
        if not isinstance(other, BatchNorm):
            return NotImplemented
        if self.epsilon != other.epsilon:
            return False
        one, two = self.values, other.values
        if one.dtype != two.dtype:
            one, two = one.astype(np.float64), two.astype(np.float64)
        return one.tobytes() == two.tobytes()

    @property
    def gamma(self) -> Array:
        """Scale, shape (C,): a view of `values`, as the other three are."""
        return self.values[0]  # type: ignore[no-any-return]

    @property
    def beta(self) -> Array:
        """Shift, shape (C,)."""
        return self.values[1]  # type: ignore[no-any-return]

    @property
    def mean(self) -> Array:
        """Running mean, shape (C,)."""
        return self.values[2]  # type: ignore[no-any-return]

    @property
    def variance(self) -> Array:
        """Running variance (not std), shape (C,)."""
        return self.values[3]  # type: ignore[no-any-return]

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        channels: int = self.values.shape[1]
        return channels

    @property
    def std(self) -> Array:
        """sqrt(variance + epsilon), float64, shape (C,): what x - mean is divided by."""
        return np.sqrt(self.variance.astype(np.float64) + self.epsilon)

    def replace(self, **changes: ArrayLike | float) -> BatchNorm:
        """A new record with some of gamma, beta, mean, variance, epsilon replaced, validated again."""
        values: dict[str, object] = {name: getattr(self, name) for name in (*FIELDS, "epsilon")}
        unknown = set(changes) - set(values)
        if unknown:
            raise TypeError(f"replace() takes {', '.join(values)}; got {', '.join(sorted(unknown))}")
        return BatchNorm(**{**values, **changes})  # type: ignore[arg-type]

    # ---- other ways in

    @classmethod
    def from_std(
        cls, *, mean: ArrayLike, std: ArrayLike, epsilon: float = 0.0,
        gamma: ArrayLike | None = None, beta: ArrayLike | None = None,
    ) -> BatchNorm:  # fmt: skip
        """From a standard deviation that is divided by as std + epsilon: variance = (std + epsilon)**2, epsilon = 0.

        That covers Keras 0.x, pjreddie's CPU Darknet (epsilon outside the root), and MatConvNet, whose sigma already
        holds its epsilon (leave `epsilon` at 0 there). Raises InvalidValue unless std + epsilon > 0.
        """
        divisor = _vector("std", std) + checked_epsilon(epsilon)
        if (divisor <= 0).any():
            raise InvalidValue(f"std + epsilon must be positive: {first_channels(divisor <= 0)}")
        return cls(gamma=gamma, beta=beta, mean=mean, variance=divisor**2, epsilon=0.0)

    @classmethod
    def from_inverse_std(
        cls, *, mean: ArrayLike, inverse_std: ArrayLike, epsilon: float = 0.0,
        gamma: ArrayLike | None = None, beta: ArrayLike | None = None,
    ) -> BatchNorm:  # fmt: skip
        """From 1/sqrt(variance + epsilon), as Lasagne, Torch7 and early yjxiong Caffe store it.

        variance = inverse_std**-2 - epsilon where that is >= 0 in every channel (then `epsilon` is kept, which suits
        fine-tuning), otherwise variance = inverse_std**-2 with epsilon 0. Both are the same function.
        """
        inverse = _vector("inverse_std", inverse_std)
        if (inverse <= 0).any():
            raise InvalidValue(f"inverse_std must be positive: {first_channels(inverse <= 0)}")
        total, epsilon = inverse**-2.0, checked_epsilon(epsilon)
        if (total - epsilon < 0).any():
            epsilon = 0.0
        return cls(gamma=gamma, beta=beta, mean=mean, variance=total - epsilon, epsilon=epsilon)

    @classmethod
    def from_scaled_sums(
        cls, *, mean_sum: ArrayLike, variance_sum: ArrayLike, factor: float, epsilon: float,
        gamma: ArrayLike | None = None, beta: ArrayLike | None = None, allow_zero_factor: bool = False,
    ) -> BatchNorm:  # fmt: skip
        """From Caffe's running sums: mean = mean_sum / factor, variance = variance_sum / factor.

        `factor` is the third blob of a BatchNorm layer, near 1000 after training. 0 means that the layer never saw
        data; Caffe then uses mean = variance = 0, which is refused unless `allow_zero_factor`.
        """
        factor = float(factor)
        if not math.isfinite(factor) or factor < 0:
            raise InvalidValue(f"scale factor: expected a finite number >= 0, got {factor!r}")
        if factor == 0 and not allow_zero_factor:
            raise InvalidValue("scale factor 0: this layer holds no statistics (it never saw data)")
        sums = _vector("mean", mean_sum), _vector("variance", variance_sum)
        mean, variance = (s / factor if factor else s * 0.0 for s in sums)
        return cls(gamma=gamma, beta=beta, mean=mean, variance=variance, epsilon=epsilon)

    @classmethod
    def from_affine(cls, *, slope: ArrayLike, intercept: ArrayLike, epsilon: float = 0.0) -> BatchNorm:
        """From a folded affine y = slope * x + intercept: gamma = slope, beta = intercept, mean 0, variance 1 - epsilon.

        With epsilon 0 (the default) this is bit-exact. The true statistics are not recoverable from an affine.
        """
        slope = _numbers("slope", slope)
        _refuse_not_finite(slope=slope)
        epsilon = checked_epsilon(epsilon)
        zeros = np.zeros(slope.shape, slope.dtype)
        if epsilon < 1:
            return cls(
                gamma=slope, beta=intercept, mean=zeros, variance=np.full(slope.shape, 1 - epsilon), epsilon=epsilon
            )
        gamma = slope.astype(np.float64) * math.sqrt(1 + epsilon)
        return cls(gamma=gamma, beta=intercept, mean=zeros, variance=zeros + 1, epsilon=epsilon)

    # ---- the function it is

    def affine(self) -> tuple[Array, Array]:
        """(a, b) in float64, shape (C,): a = gamma / sqrt(variance + epsilon), b = beta - mean * a."""
        a = self.gamma.astype(np.float64) / self.std
        return a, self.beta - self.mean * a

    def __call__(self, x: ArrayLike) -> Array:
        """The reference output for x of shape (..., C), in float64: gamma * (x - mean) / sqrt(variance + epsilon) + beta."""
        y: Array = self.gamma * (np.asarray(x, np.float64) - self.mean) / self.std + self.beta
        return y

    def error_bound(self, x: ArrayLike, *, output_dtype: str = "float32") -> Array:
        """Largest |engine(x) - self(x)| of a correct float32 engine holding these values; shape of x, float64.

        u (6 |a (x - mean)| + |a x| + 2 |a mean| + |beta| + |y|), u = 2**-24: at most 6u in the computed a (epsilon
        and sum to float32, reciprocal root, times gamma), common to a x and a mean; then one rounding each of a mean,
        beta - a mean, a x and the last sum. Held for nine implementations. To it come a term for engines that flush
        subnormals to zero and, for 16-bit outputs, one rounding of y to `output_dtype`. x must hold the values that
        the engine sees: already rounded to float32, or to the 16-bit dtype.
        """
        u = UNIT_ROUNDOFF["float32"]
        x = np.asarray(x, np.float64)
        a, _ = self.affine()
        y, centred = self(x), x - self.mean
        flushed = _FLOAT32_SMALLEST_NORMAL
        bound: Array = (6 * u + flushed / self.std**2) * np.abs(a * centred) + u * (
            np.abs(a * x) + 2 * np.abs(a * self.mean) + np.abs(self.beta) + np.abs(y)
        )
        bound = bound + flushed * (np.abs(centred) + 4)
        if output_dtype in ("float16", "bfloat16"):
            smallest = 2.0**-24 if output_dtype == "float16" else flushed
            bound = bound + UNIT_ROUNDOFF[output_dtype] * (np.abs(y) + bound) + smallest
        return bound

    def storage_bound(self, x: ArrayLike, *, dtype: str = "float32") -> Array:
        """Largest change of self(x) by rounding every parameter once to `dtype`: 2u|a (x - mean)| + u(|a mean| + |beta|).

        gamma contributes u, variance at most u/2 and epsilon nothing; mean and beta one rounding each, or half the
        spacing of subnormals (a tiny mean of a float16 layer becomes 0).
        """
        u = UNIT_ROUNDOFF[dtype]
        a, _ = self.affine()
        centred = np.asarray(x, np.float64) - self.mean
        bound: Array = u * (2 * np.abs(a * centred) + np.abs(a * self.mean) + np.abs(self.beta))
        return bound + UNDERFLOW[dtype] * (1 + np.abs(a))

    def probes(self, dtype: str = "float32") -> Array:
        """Inputs that tell mistakes apart, float64 values exactly representable in `dtype`; shape (10, C).

        mean + k * sqrt(variance + epsilon) for k in 0, 1, -1, 3, -3, 8, -8, and 0, 1, -1. k = 0 isolates beta; any two
        others isolate a.
        """
        rows = [self.mean + k * self.std for k in (0, 1, -1, 3, -3, 8, -8)]
        rows += [np.full(self.channels, float(k)) for k in (0, 1, -1)]
        return round_to(np.stack(rows), dtype)

    # ---- the same function in another form: bnport.algebra, which a listing does without

    def with_epsilon(self, epsilon: float) -> BatchNorm:
        """The same function with another epsilon; float64 arrays, (a, b) kept within 2 ulps of float64.

        Per channel, with s = variance + self.epsilon: variance' = s - epsilon where that is >= 0 (no gamma needed);
        elsewhere variance' = max(variance, 0) and gamma' = gamma * sqrt((variance' + epsilon) / s). A negative
        variance is never made: legal here, it amplifies rounding up to 48 000 times and is NaN to other readers. Raises
        Unrepresentable where that overflows.
        """
        from bnport.algebra import with_epsilon

        return with_epsilon(self, epsilon)

    def without_gamma(self) -> BatchNorm:
        """The same function with gamma = 1 (a layer with scale=False): variance' = (variance + epsilon) / gamma**2 - epsilon.

        Channels with gamma == 1 stay as they are. Raises Unrepresentable for a gamma <= 0 or a slope steeper than
        1/sqrt(epsilon): neither beta nor mean can change a slope.
        """
        from bnport.algebra import without_gamma

        return without_gamma(self)

    def without_beta(self) -> BatchNorm:
        """The same function with beta = 0 (a layer with center=False): mean' = mean - beta / a.

        Channels with beta == 0 stay as they are. Raises Unrepresentable where gamma is 0 and beta is not.
        """
        from bnport.algebra import without_beta

        return without_beta(self)

    def rounded(self, dtype: str) -> BatchNorm:
        """Every array rounded once to `dtype` (float64, float32, float16, bfloat16), as the target layer will hold it.

        Raises Unrepresentable, naming the channel, where a value overflows, or where underflow would change a, or
        a mean or a beta that matters, by more than `dtype`'s rounding.
        """
        from bnport.algebra import rounded

        return rounded(self, dtype)

    def fit(
        self, *, scale: bool = True, center: bool = True, epsilon: float | None = None, dtype: str = "float32"
    ) -> Fit:
        """This record as the target layer can hold it, and what had to change.

        `scale`/`center`: whether the target has gamma / beta. `epsilon`: the target's own if it cannot be changed,
        else None (the record's is kept, unless gamma can only be absorbed with a smaller one). `dtype`: how the target
        stores its arrays. Exact where nothing had to change, absorbed by the algebra above, or Unrepresentable with
        the channel.
        """
        from bnport.algebra import fit

        return fit(self, scale=scale, center=center, epsilon=epsilon, dtype=dtype)


class Fit(NamedTuple):
    """A record as a target layer will hold it, and in words what had to change for that; no notes means bit-exact."""

    record: BatchNorm
    notes: tuple[str, ...]


def _rebuild(gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float) -> BatchNorm:
    return BatchNorm(gamma=gamma, beta=beta, mean=mean, variance=variance, epsilon=epsilon)
