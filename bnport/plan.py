"""What to write into each target layer: fitted, rounded, complete before anything is written. Knows no format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.errors import InvalidValue, Unrepresentable, listed, printable
from bnport.layer import Change
from bnport.record import FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bnport.layer import Layer

WRITABLE = (*FIELDS, "epsilon")


def plan(
    sources: Mapping[str, Layer],
    targets: Mapping[str, Layer],
    pairs: Mapping[str, str],
    *,
    fields: frozenset[str],
    momentum: str = "keep",
) -> tuple[dict[str, Change], dict[str, tuple[str, ...]]]:
    """Every target layer's Change, and what had to be adapted for it, in words.

    All records are fitted before anything is written, so that every layer that does not fit is named at once.
    """
    changes: dict[str, Change] = {}
    notes: dict[str, tuple[str, ...]] = {}
    refused: list[str] = []
    for name, source_name in pairs.items():
        source, target = sources[source_name], targets[name]
        try:
            changes[name], notes[name] = (
                _whole(source, target) if fields == set(WRITABLE) else _partial(source, target, fields)
            )
        except (Unrepresentable, InvalidValue) as error:
            refused.append(f"{printable(name)} <- {printable(source_name)}: {error}")
            continue
        if momentum == "port":
            changes[name], said = _with_momentum(changes[name], source, target)
            notes[name] += said
    if refused:
        more = f"; and {len(refused) - 5} more layers" if len(refused) > 5 else ""
        raise Unrepresentable("; ".join(refused[:5]) + more)
    return changes, notes


def _whole(source: Layer, target: Layer) -> tuple[Change, tuple[str, ...]]:
    holds = target.stores
    fit = source.record.fit(
        scale="gamma" in holds,
        center="beta" in holds,
        epsilon=None if "epsilon" in holds else target.epsilon,
        dtype=target.dtype,
    )
    notes = fit.notes
    if "epsilon" in holds and fit.record.epsilon != target.epsilon:
        notes = (f"epsilon {target.epsilon!r} of the target becomes {fit.record.epsilon!r}", *notes)
    return Change(fit.record, frozenset(WRITABLE) & holds), notes


def _partial(source: Layer, target: Layer, fields: frozenset[str]) -> tuple[Change, tuple[str, ...]]:
    """Some fields copied, each rounded once, nothing absorbed: the target keeps its own for the rest."""
    cannot = sorted(field for field in fields if field not in target.stores)
    if cannot:
        raise Unrepresentable(f"the target does not hold {listed(cannot)}, which 'only' asks for")
    held = target.record
    record = held.replace(**{field: getattr(source.record, field) for field in fields})
    rounded = record.rounded(target.dtype)
    notes = [f"rounded to {target.dtype}"] if rounded != record else []
    if "epsilon" not in fields and source.epsilon != target.epsilon and "variance" in fields:
        notes.append(f"epsilon stays {target.epsilon!r}; the source's is {source.epsilon!r}")
    notes.append(f"only {', '.join(f for f in WRITABLE if f in fields)} written, as asked")
    return Change(rounded, fields), tuple(notes)


def _with_momentum(change: Change, source: Layer, target: Layer) -> tuple[Change, tuple[str, ...]]:
    if source.momentum is None:
        raise InvalidValue(
            f"{printable(source.name)}: the source holds no momentum (unknown, or a cumulative average); use --momentum keep"
        )
    if "momentum" not in target.stores:
        return change, ("momentum not ported: the target file holds none",)
    notes = (f"momentum {target.momentum!r} becomes {source.momentum!r}",) if source.momentum != target.momentum else ()
    return change._replace(fields=change.fields | {"momentum"}, momentum=source.momentum), notes


def chosen(only: Iterable[str] | None) -> frozenset[str]:
    """The fields to write: those of `only`, or all. Raises InvalidValue for an unknown one, or none."""
    from collections.abc import Iterable

    if only is None:
        return frozenset(WRITABLE)
    if not isinstance(only, Iterable):
        raise InvalidValue(f"only: expected some of {', '.join(WRITABLE)}, got {printable(repr(only), 60)}")
    fields = frozenset([only] if isinstance(only, str) else only)
    unknown = sorted(fields - set(WRITABLE))
    if unknown or not fields:
        raise InvalidValue(f"only: expected some of {', '.join(WRITABLE)}, got {listed(unknown) or 'nothing'}")
    return fields
