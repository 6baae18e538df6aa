"""What one ported layer was made from: its arrays' explanations put together, channels in another order, whole functions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.errors import BnportError
from bnport.explain.fields import (
    EPSILONS,
    INITIAL,
    Finding,
    Numbers,
    close,
    explain_field,
    numbers,
    telling,
)
from bnport.record import FIELDS, BatchNorm
from bnport.rounding import UNIT_ROUNDOFF, round_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.layer import Layer
    from bnport.record import Array


class Mistake(NamedTuple):
    """One mistake in one layer: what kind, and the evidence in words."""

    kind: str  # a key of MISTAKES
    words: str
    fields: tuple[str, ...] = ()
    constant: float | None = None
    other: str = ""  # the source layer whose numbers these are, for swapped layers


class Diagnosis(NamedTuple):
    """What is known of one layer: its mistakes, the arrays that are right, and those that nothing explains."""

    mistakes: tuple[Mistake, ...]
    right: tuple[str, ...] = ()
    unexplained: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether known mistakes explain every array."""
        return bool(self.mistakes) and not self.unexplained


def diagnose(source: Layer, port: Layer) -> Diagnosis:
    """Which known mistakes turn the source layer's numbers into the port's. `unexplained` where none does."""
    theirs, ours = numbers(source), numbers(port)
    if theirs is None or ours is None or theirs.mean.size != ours.mean.size:
        return Diagnosis((), (), FIELDS)
    best = _by_field(theirs, ours)
    if best.unexplained:
        for attempt in (_absorbed, _by_channels, _by_function):
            found = attempt(theirs, ours)
            if found is not None and len(found.unexplained) < len(best.unexplained):
                best = found
            if not best.unexplained:
                break
    return best


def _by_field(source: Numbers, port: Numbers) -> Diagnosis:
    candidates = {field: list(explain_field(field, source, port)) for field in FIELDS}
    chosen = {field: found[0] for field, found in candidates.items() if found}
    if any(finding.mistake == "order" for finding in chosen.values()):
        for field, found in candidates.items():  # then a constant array is likelier misplaced too than initial
            misplaced = [finding for finding in found if finding.mistake == "order"]
            if misplaced and found[0].mistake:
                chosen[field] = misplaced[0]
    chosen.update(_same_factor(candidates))
    right = tuple(field for field, finding in chosen.items() if finding.mistake == "")
    unexplained = tuple(field for field in FIELDS if field not in chosen)
    if unexplained and set(unexplained) <= {"mean", "variance"}:
        mixed = _mixed_with_initial(source, port)
        if mixed:
            others: dict[str, Finding] = {field: chosen[field] for field in ("gamma", "beta") if field in chosen}
            return Diagnosis((mixed, *_grouped(others)), tuple(f for f in right if f in others))
    if unexplained == ("gamma",) and len(right) == 3 and (source.gamma == 1).all() and _informative(source, right):
        words = "beta, mean and variance are the source's; gamma is 1 in the source and other values in the port"
        return Diagnosis((Mistake("kept", words, ("gamma",)),), right)
    if not _informative(source, [f.source_field for f in chosen.values() if f.source_field]):
        if all((getattr(port, field) == INITIAL[field]).all() for field in FIELDS):
            return Diagnosis((Mistake("untouched", "gamma 1, beta 0, mean 0, variance 1 everywhere", FIELDS),))
        return Diagnosis((), right, tuple(f for f in FIELDS if f not in right) or FIELDS)
    mistakes = list(_grouped(chosen))
    mistakes += _epsilon(source, port, chosen)
    return Diagnosis(tuple(mistakes), right, unexplained)


def _informative(source: Numbers, fields: object) -> bool:
    """Whether at least one matched array of the source is no constant: constants match anything."""
    one_channel = source.mean.size == 1
    return any(telling(getattr(source, f)) or (one_channel and getattr(source, f)[0] not in (0, 1)) for f in fields)  # type: ignore[attr-defined]


def _same_factor(candidates: dict[str, list[Finding]]) -> dict[str, Finding]:
    """Caffe's factor multiplies mean and variance alike; then it is not n / (n - 1)."""
    mean, variance = ([f for f in candidates[field] if f.mistake == "factor"] for field in ("mean", "variance"))
    if mean and variance:
        one, other = mean[0].constant, variance[0].constant
        if one is not None and other is not None and abs(one - other) <= 1e-5 * one:
            return {"mean": mean[0], "variance": variance[0]}
    return {}


def _grouped(chosen: dict[str, Finding]) -> Iterator[Mistake]:
    """The findings of one kind as one Mistake."""
    kinds = dict.fromkeys(finding.mistake for finding in chosen.values() if finding.mistake)
    for kind in kinds:
        findings = [finding for finding in chosen.values() if finding.mistake == kind]
        fields = tuple(finding.field for finding in findings)
        if kind == "ignored" and "partial" in kinds:
            continue
        if kind == "partial":
            findings = [f for f in chosen.values() if f.mistake in ("partial", "ignored")]
            fields = tuple(f.field for f in findings)
        constant = next((f.constant for f in findings if f.constant is not None), None)
        yield Mistake(kind, "; ".join(f.words for f in findings), fields, constant)


def _epsilon(source: Numbers, port: Numbers, chosen: dict[str, Finding]) -> list[Mistake]:
    """The epsilons differ and the variance does not make up for it."""
    variance = chosen.get("variance")
    if variance is None or port.epsilon == source.epsilon or variance.mistake in ("epsilon", "outside", "partial"):
        return []
    if variance.mistake == "" and "absorbs" in variance.words:
        return []
    if variance.mistake in ("std", "inverse-std", "squared", "root-twice", "order") and variance.constant is None:
        return [_epsilon_words(source, port)]
    with np.errstate(invalid="ignore", divide="ignore"):
        before, after = source.variance + source.epsilon, source.variance + port.epsilon
        matters = not close(after, before, dtype=port.dtype, roundings=8)  # a's relative error is half of this
    return [_epsilon_words(source, port)] if matters else []


def _epsilon_words(source: Numbers, port: Numbers) -> Mistake:
    whose = EPSILONS.get(port.epsilon)
    words = f"epsilon is {port.epsilon!r}{f' ({whose})' if whose else ''}; the source's is {source.epsilon!r}"
    return Mistake("epsilon", words, ("epsilon",), port.epsilon)


def _mixed_with_initial(source: Numbers, port: Numbers) -> Mistake | None:
    """mean' = c mean and variance' = A + B variance, A not 0: steps of another momentum away from mean 0 and variance 1."""
    u = UNIT_ROUNDOFF[port.dtype]
    nonzero = source.mean != 0
    if np.unique(source.variance).size < 4 or np.unique(source.mean[nonzero]).size < 4:
        return None
    c = float(np.median(port.mean[nonzero] / source.mean[nonzero]))
    if not np.isfinite(c) or c <= 0 or abs(c - 1) < 1e-4:
        return None
    low, high = int(np.argmin(source.variance)), int(np.argmax(source.variance))
    slope = (port.variance[high] - port.variance[low]) / (source.variance[high] - source.variance[low])
    offset = port.variance[low] - slope * source.variance[low]
    if not (0.4 * c < slope < 2.1 * c) or abs(offset) < 1e-4:
        return None
    # both sides' values went through a step m old + (1 - m) new in their own precision; the slope magnifies the source's
    mean_scale = np.abs(port.mean) + c * np.abs(source.mean)
    variance_scale = np.abs(port.variance) + slope * (np.abs(source.variance) + 1) + abs(offset)
    if (np.abs(port.mean - c * source.mean) > 16 * u * mean_scale + 1e-30).any():
        return None
    if (np.abs(port.variance - offset - slope * source.variance) > 16 * u * variance_scale).any():
        return None
    words = f"mean is {c:.4g} times the source's and variance {slope:.4g} times the source's + {offset:.4g}"
    return Mistake("steps", words, ("mean", "variance"), c)


def _absorbed(source: Numbers, port: Numbers) -> Diagnosis | None:
    """The same, if the port's epsilon was rightly absorbed into gamma and variance first."""
    if source.epsilon == port.epsilon or not (source.variance + source.epsilon > 0).all():
        return None
    record = _record(source)
    if record is None:
        return None
    moved = record.with_epsilon(port.epsilon)
    return _by_field(source._replace(gamma=moved.gamma, variance=moved.variance, epsilon=port.epsilon), port)


def _record(source: Numbers, **changes: object) -> BatchNorm | None:
    values = {name: getattr(source, name) for name in (*FIELDS, "epsilon")}
    try:
        return BatchNorm(**{**values, **changes})
    except BnportError:
        return None


def _by_channels(source: Numbers, port: Numbers) -> Diagnosis | None:
    """One permutation of the channels, the same for all four arrays."""
    if source.mean.size < 2 or port.held != source.held & port.held:
        return None
    fields = [f for f in FIELDS if f in port.held]
    theirs = np.stack([round_to(getattr(source, f), port.dtype).astype(np.float64) for f in fields])
    ours = np.stack([getattr(port, f) for f in fields])
    order, found = np.lexsort(theirs), np.lexsort(ours)
    if not np.array_equal(theirs[:, order], ours[:, found]) or np.unique(theirs, axis=1).shape[1] < 2:
        return None
    permutation = np.empty(order.size, np.int64)
    permutation[found] = order
    mistakes = [Mistake("channels", f"channel i holds the source's channel {_named(permutation)}", tuple(fields))]
    permuted = source._replace(**{f: getattr(source, f)[permutation] for f in FIELDS})
    chosen = {f: Finding("", f, "") for f in FIELDS}
    return Diagnosis((*mistakes, *_epsilon(permuted, port, chosen)))


def _named(permutation: Array) -> str:
    """A permutation in words: reversed, shifted, interleaved, or its first entries."""
    count = permutation.size
    indices = np.arange(count)
    if np.array_equal(permutation, indices[::-1]):
        return f"{count - 1} - i (reversed)"
    shift = int(permutation[0])
    if np.array_equal(permutation, (indices + shift) % count):
        return f"(i + {shift}) mod {count} (shifted)"
    for groups in range(2, count):
        if count % groups == 0 and np.array_equal(permutation, indices.reshape(groups, -1).T.reshape(-1)):
            return f"of a {groups} x {count // groups} transposition (interleaved groups)"
    moved = np.flatnonzero(permutation != indices)
    shown = ", ".join(f"{i} from {permutation[i]}" for i in moved[:4])
    return f"in another order: {shown}" + (", ..." if moved.size > 4 else "")


def _by_function(source: Numbers, port: Numbers) -> Diagnosis | None:
    """The port's slope and intercept are those of a wrong record, whatever form they are stored in (a folded affine, ...)."""
    held = _record(port)
    if held is None:
        return None
    a, b = held.affine()
    for mistake, wrong in _wrong_records(source):
        new_a, new_b = wrong.affine()
        scale = np.abs(wrong.beta) + np.abs(wrong.mean * new_a) + np.abs(held.beta) + np.abs(held.mean * a)
        if telling(new_a) and close(a, new_a, dtype=port.dtype, roundings=8):  # noqa: SIM102  # one question after the other
            if close(b, new_b, scale, dtype=port.dtype, roundings=8) and telling(new_b):
                return Diagnosis((mistake,))
    return None


def _wrong_records(source: Numbers) -> Iterator[tuple[Mistake, BatchNorm]]:
    """Every mistake without a free constant, made on the source's record."""

    def made(kind: str, words: str, **changes: object) -> Iterator[tuple[Mistake, BatchNorm]]:
        record = _record(source, **changes)
        if record is not None:
            yield Mistake(kind, f"slope and intercept are those of the source with {words}", tuple(changes)), record

    positive = np.maximum(source.variance, 0.0)
    std = np.sqrt(positive)
    for epsilon in EPSILONS:
        if epsilon != source.epsilon:
            yield from made("epsilon", f"epsilon {epsilon!r}", epsilon=epsilon)
    if (source.gamma != 1).any():
        yield from made("ignored", "gamma 1", gamma=np.ones_like(std))
    if (source.gamma < 0).any():
        yield from made("absolute", "|gamma|", gamma=np.abs(source.gamma))
    if source.epsilon:
        yield from made("absolute", f"gamma |gamma| + {source.epsilon!r}", gamma=np.abs(source.gamma) + source.epsilon)
        yield from made("outside", "epsilon outside the root", variance=(std + source.epsilon) ** 2, epsilon=0.0)
    yield from made("std", "sqrt(variance) for the variance", variance=std)
    yield from made("squared", "variance ** 2 for the variance", variance=positive**2)
    yield from made("root-twice", "variance ** 0.25 for the variance", variance=np.sqrt(std))
    with np.errstate(divide="ignore"):
        inverse = 1 / np.sqrt(positive + source.epsilon)
    yield from made("inverse-std", "1 / sqrt(variance + epsilon) for the variance", variance=inverse)
    yield from made("partial", "mean 0 and variance 1", mean=np.zeros_like(std), variance=np.ones_like(std))
    for order in itertools.islice(itertools.permutations(FIELDS), 1, None):
        arrays = {field: getattr(source, other) for field, other in zip(FIELDS, order, strict=True)}
        yield from made("order", f"{', '.join(order)} taken as {', '.join(FIELDS)}", **arrays)
