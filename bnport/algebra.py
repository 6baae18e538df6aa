"""The same function in another form: what a record becomes to fit a layer that cannot hold it as it is.

Every function here is the method of BatchNorm of its name, which says what it computes and what it raises. All is in
float64; `rounded` is the one rounding. The formulas are exact: (a, b) stay what they were, to a few ulps of float64.
"""

from __future__ import annotations

import contextlib
import math

from bnport._lazy import TYPE_CHECKING, np
from bnport.errors import Unrepresentable
from bnport.record import FIELDS, Fit, checked_epsilon, first_channels
from bnport.rounding import LARGEST, UNIT_ROUNDOFF, round_to

if TYPE_CHECKING:
    from bnport.record import BatchNorm


def with_epsilon(record: BatchNorm, epsilon: float) -> BatchNorm:
    """variance' = s - epsilon, or variance and gamma where that is negative; s = variance + record.epsilon."""
    epsilon = checked_epsilon(epsilon)
    if epsilon == record.epsilon:
        return record
    variance = record.variance.astype(np.float64)
    gamma = record.gamma.astype(np.float64)
    total = variance + record.epsilon
    shifted = total - epsilon
    if record.epsilon > epsilon:  # one rounding instead of two when epsilon shrinks; a negative variance cancels
        shifted = np.where(variance < 0, shifted, variance + (record.epsilon - epsilon))
    fits = (shifted >= 0) & (shifted + epsilon > 0)
    new_variance = np.where(fits, shifted, np.maximum(variance, 0.0))
    with np.errstate(over="ignore"):
        new_gamma = np.where(fits, gamma, gamma * np.sqrt((new_variance + epsilon) / total))
    for name, array in (("variance", new_variance), ("gamma", new_gamma)):
        if not np.isfinite(array).all():
            raise Unrepresentable(
                f"{first_channels(~np.isfinite(array))}: {name} would overflow with epsilon {epsilon!r}"
            )
    return record.replace(gamma=new_gamma, variance=new_variance, epsilon=epsilon)


def without_gamma(record: BatchNorm) -> BatchNorm:
    """variance' = (variance + epsilon) / gamma**2 - epsilon, gamma' = 1."""
    gamma = record.gamma.astype(np.float64)
    one = gamma == 1
    if one.all():
        return record
    variance = record.variance.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        absorbed = np.where(one, variance, (variance + record.epsilon) / gamma**2 - record.epsilon)
    steep = f"its slope is steeper than 1/sqrt(epsilon {record.epsilon!r})"
    for bad, why, smaller in (
        (gamma <= 0, "gamma is not positive", ""),
        (~one & ~(absorbed >= 0), steep, ", or a smaller epsilon"),
        (~np.isfinite(absorbed), "its variance would overflow", ""),
    ):
        if bad.any():
            raise Unrepresentable(
                f"{first_channels(bad)} cannot be held without gamma (scale=False, no Scale layer): {why}."
                f" Use a target that has gamma{smaller}"
            )
    return record.replace(gamma=np.ones_like(gamma), variance=absorbed)


def without_beta(record: BatchNorm) -> BatchNorm:
    """mean' = mean - beta / a, beta' = 0."""
    beta = record.beta.astype(np.float64)
    if not beta.any():
        return record
    a, _ = record.affine()
    bad = (a == 0) & (beta != 0)
    if bad.any():
        raise Unrepresentable(
            f"{first_channels(bad)} cannot be held without beta (center=False, no bias): gamma is 0, so no mean gives"
            " that output. Use a target that has beta"
        )
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        mean = np.where(beta == 0, record.mean, record.mean - beta / np.where(a == 0, 1.0, a))
    if not np.isfinite(mean).all():
        raise Unrepresentable(
            f"{first_channels(~np.isfinite(mean))}: mean would overflow without beta (center=False, no bias)"
        )
    return record.replace(beta=np.zeros_like(beta), mean=mean)


def rounded(record: BatchNorm, dtype: str) -> BatchNorm:
    """Each value to the nearest of `dtype`, ties to even; refused where that changes the function by more."""
    arrays = {name: round_to(getattr(record, name), dtype) for name in FIELDS}
    for name, array in arrays.items():
        over = ~np.isfinite(array)
        if over.any():
            at = int(np.argmax(over))
            raise Unrepresentable(
                f"{name}, {first_channels(over)}: {float(getattr(record, name)[at])!r} does not fit {dtype}"
                f" (largest {LARGEST[dtype]:g}); a target that stores {_wider(record, dtype)} holds it"
            )
    lost = arrays["variance"].astype(np.float64) + record.epsilon <= 0
    if lost.any():
        raise Unrepresentable(f"variance, {first_channels(lost)}: underflows to 0 in {dtype} and epsilon is 0")
    result = record.replace(**arrays)
    u = UNIT_ROUNDOFF[dtype]
    (a, _), (new_a, _) = record.affine(), result.affine()
    bad = np.abs(new_a - a) > 2 * u * np.abs(a)
    # a channel's output moves by less than its own spread times u: mean in units of std, beta in units of gamma
    for name, spread in (("mean", record.std), ("beta", np.abs(record.gamma.astype(np.float64)))):
        old, new = getattr(record, name).astype(np.float64), getattr(result, name).astype(np.float64)
        bad |= np.abs(new - old) > u * np.maximum(np.abs(old), spread)
    if bad.any():
        raise Unrepresentable(
            f"{first_channels(bad)}: values underflow in {dtype} and would change the function; a target that stores"
            f" {_wider(record, dtype)} holds them"
        )
    return result


def _wider(record: BatchNorm, dtype: str) -> str:
    """The least type that holds what `dtype` does not."""
    with contextlib.suppress(Unrepresentable):
        if dtype != "float32":
            rounded(record, "float32")
            return "float32"
    return "float64"


def _with_room_for_gamma(record: BatchNorm, dtype: str) -> BatchNorm:
    """The record with a smaller epsilon, a power of ten, where without_gamma needs one: (variance + epsilon) / gamma**2.

    None that is subnormal in what `dtype` is computed in: engines take such a number for zero, or lose digits of it.
    """
    gamma = record.gamma.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        room = ((record.variance.astype(np.float64) + record.epsilon) / gamma**2)[gamma != 1]
    least = float(room.min(initial=np.inf))
    if not 0 < least < record.epsilon:
        return record
    smaller = float(f"1e{math.floor(math.log10(least) - math.log10(2))}")
    return record if smaller < 2.0 ** (-1022 if dtype == "float64" else -126) else with_epsilon(record, smaller)


def fit(record: BatchNorm, *, scale: bool, center: bool, epsilon: float | None, dtype: str) -> Fit:
    """The steps above, those that are needed, in their order; then rounded."""
    notes: list[str] = []
    fitted = record
    if epsilon is not None and checked_epsilon(epsilon) != record.epsilon:
        fitted = with_epsilon(record, epsilon)
        by_gamma = int(np.count_nonzero(fitted.gamma != record.gamma))
        where = {0: "variance", record.channels: "gamma"}.get(by_gamma, f"variance and gamma ({by_gamma} channels)")
        notes.append(f"epsilon {record.epsilon!r} -> {fitted.epsilon!r} absorbed into {where}")
    if epsilon is None and not scale:
        fitted = _with_room_for_gamma(record, dtype)
        if fitted is not record:
            notes.append(f"epsilon {record.epsilon!r} -> {fitted.epsilon!r}, so that gamma can be absorbed")
    for absent, change, note in (
        (not scale, without_gamma, "gamma absorbed into variance (target has scale=False)"),
        (not center, without_beta, "beta absorbed into mean (target has center=False)"),
    ):
        if absent:
            before, fitted = fitted, change(fitted)
            if fitted is not before:
                notes.append(note)
    stored = rounded(fitted, dtype)
    if stored != fitted:
        if fitted is record:
            notes.append(f"rounded to {dtype}")
        fitted = stored
    return Fit(fitted, tuple(notes))
