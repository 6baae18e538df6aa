"""One BatchNorm layer of a live Keras model: its statistics and settings, and how new statistics are stored in it.

What its arrays are called in each Keras is in the table of models.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import InvalidValue, Unrepresentable, printable
from bnport.rounding import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from bnport.calibrate.moments import Moments
    from bnport.record import Array


class Norm:
    """One BatchNorm layer of a live model.

    name:     the layer's name, or outer/inner for one inside another model, as everywhere in bnport.
    channels: C.
    axis:     the channel axis of its input.
    base:     the class of Keras whose call() normalises.
    dtype:    of the statistics; precision: the largest relative error of rounding to it, subnormals apart.
    plain:    False for a subclass with a call() of its own, which may do anything before and after that one.
    """

    __slots__ = (
        "axis", "base", "before", "channels", "dtype", "epsilon", "exact", "frozen", "layer", "momentum", "name", "plain",
        "precision", "renorm",
    )  # fmt: skip

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name
        axis = layer.axis
        if not isinstance(axis, int):
            if len(axis) != 1:
                raise InvalidValue(
                    f"{printable(name)}: normalises over {len(axis)} axes at once; only one is supported"
                )
            axis = axis[0]
        if len(layer.moving_mean.shape) != 1:
            raise InvalidValue(
                f"{printable(name)}: its statistics have the shape {tuple(layer.moving_mean.shape)}, as with"
                " virtual_batch_size; only one number per channel is supported. Leave virtual_batch_size away: it does"
                " nothing at inference"
            )
        self.axis = int(axis)
        self.channels = int(layer.moving_mean.shape[0])
        self.epsilon = float(layer.epsilon)
        self.momentum = float(layer.momentum)
        self.frozen = not layer.trainable
        self.renorm = bool(getattr(layer, "renorm", False))
        self.base, self.plain = _base(layer)
        self.before = self._snapshot()
        self.exact: tuple[Array, Array] | None = None  # what was written last, before rounding
        self.dtype: str = self.before[1].dtype.name  # JAX may hold float32 in a variable that says float64
        self.precision = UNIT_ROUNDOFF.get(self.dtype, UNIT_ROUNDOFF["float64"])

    def _variables(self) -> list[Any]:
        names = ["moving_mean", "moving_variance"]
        if self.renorm:
            names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
        return [getattr(self.layer, name) for name in names]

    def _snapshot(self) -> list[Array]:
        return [np.array(variable.numpy()) for variable in self._variables()]

    def read(self) -> tuple[Array, Array]:
        """(mean, variance) as they are stored now, widened to float64."""
        mean, variance = self._snapshot()[:2]
        return mean.astype(np.float64), variance.astype(np.float64)

    def affine(self) -> tuple[Array, Array]:
        """(gamma, beta) in float64: ones and zeros where the layer has none."""
        given = (self.layer.gamma if self.layer.scale else None, self.layer.beta if self.layer.center else None)
        gamma, beta = (
            np.full(self.channels, missing) if variable is None else np.array(variable.numpy()).astype(np.float64)
            for variable, missing in zip(given, (1.0, 0.0), strict=True)
        )
        return gamma, beta

    def write(self, mean: Array, variance: Array) -> None:
        """Store float64 (C,) statistics, rounded once to the layer's dtype.

        With renorm the three training-only arrays are set to agree, as the layer would have left them:
        moving_stddev = renorm_stddev = sqrt(variance + epsilon), renorm_mean = mean.
        Raises Unrepresentable if a value does not fit the dtype: too large, or a variance so small that rounding moves
        variance + epsilon by more than the dtype's precision (to 0 without epsilon, or by its subnormals).
        """
        values = [mean, variance]
        if self.renorm:
            stored = variance.astype(self.before[1].dtype).astype(np.float64)
            stddev = np.sqrt(stored + self.epsilon)  # of what is stored, as a writer of files has it
            values += [stddev, mean, stddev]
        for variable, value, old in zip(self._variables(), values, self.before, strict=True):
            with np.errstate(over="ignore", under="ignore"):
                rounded = value.astype(old.dtype)
            if not np.isfinite(rounded.astype(np.float64)).all():
                raise Unrepresentable(
                    f"{printable(self.name)}: statistics up to {np.abs(value).max():.3g} do not fit its {old.dtype} variables"
                )
            variable.assign(rounded)
        self._check_small(variance)
        self.exact = mean, variance

    def _check_small(self, exact: Array) -> None:
        _, stored = self.read()
        moved = np.abs(stored - exact)
        bad = (moved > 1.001 * self.precision * (exact + self.epsilon)) | (
            (stored == 0) & (exact > 0) & (self.epsilon == 0)
        )
        if bad.any():
            channel = int(np.argmax(bad))
            raise Unrepresentable(
                f"{printable(self.name)}: a variance of {exact[channel]:.3g} (channel {channel}) becomes {stored[channel]:.3g}"
                f" in its {self.dtype} variables, and epsilon {self.epsilon:.3g} does not make up for it; give the layer"
                " dtype float32 (or a mixed_... policy), or leave it out with layers="
            )

    def variance(self, moments: Moments, unbiased: bool) -> Array:
        """The variance that `moments` of this layer's input have. InvalidValue that names the layer if they are too few."""
        if moments.n < 1 + unbiased:
            why = "a mask hides everything that reaches it" if not moments.n else "one number per channel reaches it"
            what = "an unbiased variance" if moments.n else "a mean and a variance"
            raise InvalidValue(
                f"{printable(self.name)}: {why}, and {what} needs {1 + unbiased} or more; use more data, or leave the layer"
                " out with layers="
            )
        return moments.variance(unbiased)

    def take(self, moments: Moments, unbiased: bool) -> None:
        """Store the statistics that `moments` of this layer's input have. Raises what `variance` and `write` raise."""
        self.write(moments.mean, self.variance(moments, unbiased))

    def rounding(self) -> str:
        """How far variables of 16 bits are from what was computed, for the report; empty for wider ones, or if not written."""
        if self.exact is None or self.precision < 2.0**-20:
            return ""
        mean, variance = self.read()
        std = np.sqrt(self.exact[1] + self.epsilon)
        moved = np.divide(np.abs(mean - self.exact[0]), std, out=np.zeros_like(std), where=std > 0).max()
        error = np.divide(np.abs(variance - self.exact[1]), std**2, out=np.zeros_like(std), where=std > 0).max()
        return (
            f"{self.name}: its statistics are {self.dtype}, rounded by up to {error:.1e} of the variance + epsilon and"
            f" {moved:.1e} standard deviations of the mean"
        )

    def restore(self) -> None:
        """Put back, bit for bit, what the layer held when this object was made."""
        for variable, old in zip(self._variables(), self.before, strict=True):
            variable.assign(old)


def _base(layer: Any) -> tuple[type, bool]:
    """The class of Keras whose call() a BatchNorm layer has or inherits, and whether that is what calling it runs."""
    own = "call" in vars(layer)
    for base in type(layer).__mro__:
        if base.__module__.split(".")[0] in ("keras", "tf_keras"):
            if "call" in vars(base):
                return base, not own
        elif "call" in vars(base) or "__call__" in vars(base):
            own = True
    return type(layer), True
