"""Are two sets of layers the same function? Decided on (a, b), not by sampling; and the Report that says so.

Three rungs, each a `Check` in the report:

bits      what was to be written is what is read back, bit for bit.
affine    a = gamma / sqrt(variance + epsilon) and b = beta - mean a of both sides, in float64, epsilon as the float32 that
          every engine uses (as it is where the checked side stores float64): |da| <= 4u |a| and
          |db| <= 4u (|beta| + |a mean|) + w (1 + |a|), u the unit roundoff of the checked side's stored dtype (rounding
          gamma, variance, mean and beta once costs at most 1.5u and 2.5u), w half the spacing of its subnormals.
run       the real layer's output at the probes against the reference formula in float64, within the float32 error bound of
          record.error_bound plus the storage term; and against the source's own engine, within the sum of both bounds.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.errors import InvalidValue
from bnport.record import FIELDS, BatchNorm
from bnport.rounding import LARGEST, UNDERFLOW, UNIT_ROUNDOFF, round_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, TypeAlias

    from bnport.layer import Change, Layer
    from bnport.record import Array

    _Pair: TypeAlias = tuple[str, BatchNorm, BatchNorm, str]  # target layer, source's, held, the dtype that is stored

EXACT, BOUNDED, DIFFERENT, INVALID = "exact", "bounded", "different", "invalid"


class Check(NamedTuple):
    """One comparison of one layer, at the place where it is worst.

    ratio is error / bound there (0 where both are 0; <= 1 passes); error and bound are in the units of what is compared.
    """

    name: str  # "bits", "a", "b", or how the engine was called: "keras model(x)", ...
    error: float
    bound: float
    ratio: float
    channel: int
    probe: float | None = None  # the input value, for a run

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.ratio <= 1


class Compared(NamedTuple):
    """The two records that a layer's checks are about, and the dtype that the checked side stores; for the charts."""

    source: BatchNorm
    held: BatchNorm
    dtype: str = "float32"

    def affine(self) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
        """Per channel, for the slope and for the intercept: the source's, the one held, and error / bound."""
        (a, b), (new_a, new_b), errors, bounds = _held_against([("", self.source, self.held, self.dtype)])
        ratio_a, ratio_b = map(_ratio, errors, bounds)
        return (a, new_a, ratio_a), (b, new_b, ratio_b)


class LayerReport(NamedTuple):
    """What happened to one target layer, and what the checks say."""

    target: str
    source: str
    channels: int
    status: str  # exact, bounded, different, invalid
    checks: tuple[Check, ...] = ()
    written: tuple[str, ...] = ()  # the fields, in order; empty for a mere comparison
    notes: tuple[str, ...] = ()  # what was assumed, changed or absorbed; what is wrong
    evidence: str = ""  # why this source layer belongs to this target layer
    compared: Compared | None = None

    @property
    def ok(self) -> bool:
        """Whether the two are the same function within the bound."""
        return self.status in (EXACT, BOUNDED)

    @property
    def worst(self) -> Check | None:
        """The check nearest to its bound, or furthest beyond it."""
        return max(self.checks, key=lambda check: check.ratio, default=None)


class Report:
    """What was done and what was proved, layer by layer. Prints itself; `ok` is the verdict."""

    def __init__(
        self,
        *,
        source: str,
        target: str,
        layers: Iterable[LayerReport],
        action: str = "verify",
        out: str | None = None,
        notes: Iterable[str] = (),
        not_run: Iterable[str] = (),
        left: Mapping[str, Iterable[str]] | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        self.action, self.source, self.target, self.out = action, source, target, out
        self.layers = tuple(layers)
        self.notes = tuple(dict.fromkeys(notes))
        self.not_run = tuple(dict.fromkeys(not_run))
        self.left = {key: tuple(names) for key, names in (left or {}).items() if names}
        self.sha256 = dict(sha256 or {})

    @property
    def ok(self) -> bool:
        """True iff there is at least one layer and every layer is exact or bounded."""
        return bool(self.layers) and all(layer.ok for layer in self.layers)

    def count(self, status: str) -> int:
        """How many layers have this status."""
        return sum(layer.status == status for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as plain JSON values."""
        from bnport.report import as_dict

        return as_dict(self)

    def __str__(self) -> str:
        from bnport.report import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return f"<Report {self.action}: {len(self.layers)} layers, {'ok' if self.ok else 'NOT ok'}>"

    def _repr_html_(self) -> str:
        from bnport.html import fragment

        return fragment(self)


def compare(
    sources: Mapping[str, Layer], targets: Mapping[str, Layer], pairs: Mapping[str, str]
) -> dict[str, LayerReport]:
    """Compare every pair (target name -> source name) on the `affine` rung, all layers in one pass.

    A layer whose numbers are not BatchNorm parameters (NaN, variance + epsilon <= 0) is reported as invalid.
    """
    reports: dict[str, LayerReport] = {}
    rounded: list[_Pair] = []
    for target, source in pairs.items():
        held = targets[target]
        try:
            ours, theirs = sources[source].record, held.record
            if ours.channels != theirs.channels:
                raise InvalidValue(f"{ours.channels} channels in {source}, {theirs.channels} in {target}")
        except InvalidValue as error:
            reports[target] = LayerReport(target, source, held.channels, INVALID, notes=(str(error),))
            continue
        both = Compared(ours, theirs, held.dtype)
        reports[target] = LayerReport(target, source, ours.channels, EXACT, _ALL_EQUAL, compared=both)
        if ours != theirs:
            rounded.append((target, ours, theirs, held.dtype))
    for (target, *_), checks in zip(rounded, _affine_checks(rounded), strict=True):
        status = BOUNDED if all(check.ok for check in checks) else DIFFERENT
        reports[target] = reports[target]._replace(status=status, checks=checks)
    return reports


_ALL_EQUAL = (Check("a", 0.0, 0.0, 0.0, 0), Check("b", 0.0, 0.0, 0.0, 0))
_TOGETHER = 1 << 11  # channels worked on at once: a core's cache holds the arrays, and the allocator keeps them


def _affine_checks(pairs: list[_Pair]) -> Iterator[tuple[Check, Check]]:
    together: list[_Pair] = []
    channels = 0
    for pair in pairs:
        together.append(pair)
        channels += pair[1].channels
        if channels >= _TOGETHER:
            yield from _checks_of(together)
            together, channels = [], 0
    if together:
        yield from _checks_of(together)


def _checks_of(pairs: list[_Pair]) -> Iterator[tuple[Check, Check]]:
    """The checks on a and b of each pair, computed over the channels of all of them."""
    counts = [ours.channels for _, ours, _, _ in pairs]
    _, _, errors, bounds = _held_against(pairs)
    ratios = [_ratio(error, bound) for error, bound in zip(errors, bounds, strict=True)]
    end = 0
    for count in counts:
        start, end = end, end + count
        found = []
        for name, error, bound, ratio in zip("ab", errors, bounds, ratios, strict=True):
            channel = int(ratio[start:end].argmax())
            at = start + channel
            found.append(Check(name, error.item(at), bound.item(at), ratio.item(at), channel))
        yield found[0], found[1]


def _held_against(pairs: list[_Pair]) -> tuple[tuple[Array, Array], ...]:
    """Over the channels of all pairs: (a, b) of the sources, of those held, their distances, and the bounds of these."""
    counts = [ours.channels for _, ours, _, _ in pairs]
    wide = np.array([dtype == "float64" for *_, dtype in pairs])
    a, b, size = _affine([ours for _, ours, _, _ in pairs], counts, wide)
    new_a, new_b, new_size = _affine([theirs for _, _, theirs, _ in pairs], counts, wide)
    unit = np.repeat([4 * UNIT_ROUNDOFF[dtype] for *_, dtype in pairs], counts)
    least = np.repeat([UNDERFLOW[dtype] for *_, dtype in pairs], counts)
    slope = np.abs(a)
    bounds = unit * slope, unit * np.maximum(size, new_size) + least * (1 + slope)
    return (a, b), (new_a, new_b), (np.abs(new_a - a), np.abs(new_b - b)), bounds


def _affine(records: list[BatchNorm], counts: list[int], wide: Array) -> tuple[Array, Array, Array]:
    """(a, b, |beta| + |a mean|) over the channels of all records (`counts` of them each).

    epsilon is the float32 next to it unless the pair is `wide`: engines that compute in float64 take it as it is.
    """
    gamma, beta, mean, variance = np.concatenate([r.values for r in records], axis=1).astype(np.float64)
    epsilon = np.array([r.epsilon for r in records], np.float64)
    variance += np.repeat(np.where(wide, epsilon, epsilon.astype(np.float32)), counts)
    a = np.divide(gamma, np.sqrt(variance, out=variance), out=gamma)
    shift = np.multiply(mean, a, out=mean)
    size = np.abs(beta) + np.abs(shift)
    return a, np.subtract(beta, shift, out=beta), size


def _ratio(error: Array, bound: Array) -> Array:
    """error / bound, with 0 where the error is 0, and NaN counted as infinitely wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = error / bound
    ratio[np.isnan(ratio)] = np.inf
    ratio[error == 0] = 0.0
    return ratio


def check_bits(
    before: Mapping[str, Layer], after: Mapping[str, Layer], changes: Mapping[str, Change]
) -> dict[str, tuple[Check, tuple[str, ...]]]:
    """What was to be written against what is read back, bit for bit; also that nothing else of any layer moved.

    Returns, for every layer of `before`, a Check whose error is the number of values that differ, and notes on them.
    """
    results: dict[str, tuple[Check, tuple[str, ...]]] = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            results[name] = Check("bits", float("inf"), 0.0, float("inf"), 0), ("the layer is gone from the output",)
            continue
        change, differing, channel = changes.get(name), 0, 0
        notes: list[str] = []
        held, absent = new.arrays(), {"gamma": np.ones(new.channels), "beta": np.zeros(new.channels)}
        unwritten = set(FIELDS) - (change.fields if change else set()) - ({"gamma", "beta"} - old.stores)
        untouched = old.arrays() if unwritten else {}
        for field in FIELDS:
            if change is not None and field in change.fields:
                expected = getattr(change.record, field)
            else:
                expected = untouched.get(field, absent.get(field))
            wrong = _bits(expected, held.get(field, absent.get(field)))
            if wrong.any():
                differing += int(np.count_nonzero(wrong))
                channel = int(np.argmax(wrong))
                notes.append(f"{field} reads back differently (channel {channel})")
        epsilon = change.record.epsilon if change and "epsilon" in change.fields else old.epsilon
        if new.epsilon != epsilon:
            differing += 1
            notes.append(f"epsilon reads back as {new.epsilon!r}, not {epsilon!r}")
        momentum = change.momentum if change and "momentum" in change.fields else old.momentum
        if new.momentum != momentum:
            differing += 1
            notes.append(f"momentum reads back as {new.momentum!r}, not {momentum!r}")
        results[name] = Check("bits", differing, 0.0, float("inf") if differing else 0.0, channel), tuple(notes)
    return results


def _bits(expected: Array | None, found: Array | None) -> Array:
    """Where two arrays differ as float64 bit patterns."""
    if expected is None or found is None or expected.shape != found.shape:
        return np.ones(1, bool)
    one, other = (np.ascontiguousarray(array, np.float64).view(np.uint64) for array in (expected, found))
    different: Array = one != other
    return different


def check_outputs(
    reference: BatchNorm, held: BatchNorm, x: Array, outputs: Mapping[str, Array], *, dtype: str
) -> tuple[Check, ...]:
    """A real layer's outputs against `reference`, for each way that its engine was called.

    held: the values in the layer under test (already rounded to `dtype`); its bound and storage term apply.
    outputs: way -> y, what it gave for x of shape (N, C) as float32. A 16-bit y means that the engine rounded x and y.
    """
    checks = []
    for way, y in outputs.items():
        narrow = output_dtype(y, dtype)
        seen = round_to(x, narrow)
        bound = _output_bound(held, dtype, seen, y)
        checks.append(_at_worst(way, np.asarray(y, np.float64), reference(seen), bound, seen, _largest(y, dtype)))
    return tuple(checks)


def check_between(
    one: tuple[BatchNorm, str, Mapping[str, Array]], other: tuple[BatchNorm, str, Mapping[str, Array]], x: Array
) -> tuple[Check, ...]:
    """Two real layers against each other at the same x, each (record, stored dtype, way -> output).

    The bound is the sum of both engines' bounds and of the storage terms of both. `x` must hold what both saw: if one of
    them computes in 16 bits, values of that dtype. Every way of `other` is held against the first way of `one`.
    """
    record_a, dtype_a, outputs_a = one
    record_b, dtype_b, outputs_b = other
    way_a, y_a = next(iter(outputs_a.items()))
    bound_a = _output_bound(record_a, dtype_a, x, y_a)
    checks = []
    for way, y in outputs_b.items():
        bound = bound_a + _output_bound(record_b, dtype_b, x, y)
        found, expected = np.asarray(y, np.float64), np.asarray(y_a, np.float64)
        largest = min(_largest(y_a, dtype_a), _largest(y, dtype_b))
        checks.append(_at_worst(f"{way} against {way_a}", found, expected, bound, x, largest))
    return tuple(checks)


def _output_bound(held: BatchNorm, stored: str, x: Array, y: Array) -> Array:
    """How far a correct engine that gave y for x may be from the formula, for a layer that stores `held` as `stored`."""
    return held.error_bound(x, output_dtype=output_dtype(y, stored)) + held.storage_bound(x, dtype=stored)


def output_dtype(y: Array, stored: str) -> str:
    """The float type that an engine's output was rounded to: its own, or the 16-bit one that its layer stores."""
    for name in (str(y.dtype), stored):
        if name in ("float16", "bfloat16"):
            return name
    return "float32"


def _largest(y: Array, stored: str) -> float:
    """The largest number that an engine's output could be: float64 ones are given as they are."""
    narrow = output_dtype(y, stored)
    return LARGEST["float64" if y.dtype == np.float64 and narrow == "float32" else narrow]


def _at_worst(name: str, found: Array, expected: Array, bound: Array, x: Array, largest: float) -> Check:
    """The check at the place where error over bound is largest.

    largest: of the type that the outputs were rounded to. What is beyond it, infinity included, counts as it.
    """
    if found.shape != expected.shape:
        return Check(name, float("inf"), 0.0, float("inf"), 0)
    with np.errstate(invalid="ignore"):
        error = np.abs(np.clip(found, -largest, largest) - np.clip(expected, -largest, largest))
    ratio = _ratio(error, bound)
    row, channel = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    at = (row, channel)
    return Check(name, float(error[at]), float(bound[at]), float(ratio[at]), int(channel), float(x[at]))


def with_checks(report: LayerReport, checks: Iterable[Check], notes: Iterable[str] = ()) -> LayerReport:
    """The report with more checks and notes; a check that fails makes the layer different."""
    all_checks = report.checks + tuple(checks)
    failed = report.status in (EXACT, BOUNDED) and not all(check.ok for check in all_checks)
    return report._replace(
        checks=all_checks, status=DIFFERENT if failed else report.status, notes=report.notes + tuple(notes)
    )
