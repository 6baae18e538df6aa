"""Numbers that belong to other layers of the source: layers swapped, or single arrays from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.errors import printable
from bnport.explain.fields import INITIAL, Numbers, numbers, telling
from bnport.explain.layers import Diagnosis, Mistake, diagnose
from bnport.record import FIELDS
from bnport.rounding import round_to
from bnport.verify import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bnport.layer import Layer
    from bnport.record import Array

_NEAR = 2.0**-7  # as near as 16-bit floats bring two arrays; only what is nearer is looked at closely


def from_elsewhere(
    sources: Mapping[str, Layer],
    ported: Mapping[str, Layer],
    pairs: Mapping[str, str],
    diagnoses: Mapping[str, Diagnosis],
    names: Iterable[str],
) -> dict[str, Diagnosis]:
    """Diagnoses of those of the ported layers `names` that hold other layers' numbers."""
    names = list(names)
    if not names:
        return {}
    known = {name: found for name, layer in sources.items() if (found := numbers(layer)) is not None}
    holders: dict[str, str] = {}  # ported layer -> the source layer whose numbers it holds
    others: dict[str, tuple[Mistake, ...]] = {}
    for name in names:
        held = numbers(ported[name])
        if held is None:
            continue
        for candidate in _near(held, known, pairs[name]):
            same = compare(sources, ported, {name: candidate})[name].ok
            diagnosis = Diagnosis(()) if same else diagnose(sources[candidate], ported[name])
            if same or diagnosis.complete:
                holders[name], others[name] = candidate, diagnosis.mistakes
                break
    by_source = {source: target for target, source in pairs.items()}
    result = {
        name: Diagnosis((_swapped(name, holder, pairs, holders, by_source), *others[name]))
        for name, holder in holders.items()
    }
    index = _index(known)
    for name in names:
        held = numbers(ported[name])
        if name not in result and held is not None:
            scattered = _scattered(held, diagnoses[name], pairs[name], index)
            if scattered is not None:
                result[name] = scattered
    return result


def _near(held: Numbers, known: Mapping[str, Numbers], own: str) -> list[str]:
    """Source layers of this width with an array that one of the held arrays nearly equals."""
    found = []
    ours = np.stack([getattr(held, field) for field in FIELDS])[:, None]
    for name, theirs in known.items():
        if name == own or theirs.mean.size != held.mean.size:
            continue
        arrays = [array for field in FIELDS if telling(array := getattr(theirs, field))]
        if not arrays:
            continue
        other = np.stack(arrays)[None]
        if (np.abs(ours - other) <= _NEAR * np.abs(other) + 2.0**-24).all(axis=-1).any():
            found.append(name)
    return found


def _swapped(
    name: str, holder: str, pairs: Mapping[str, str], holders: Mapping[str, str], by_source: Mapping[str, str]
) -> Mistake:
    words = f"holds the numbers of the source's {printable(holder)}"
    other = by_source.get(holder)
    if other is not None and holders.get(other) == pairs[name]:
        words += f", swapped with {printable(other)}"
    elif other is not None and other not in holders:
        words += f", which {printable(other)} rightly holds too"
    return Mistake("swapped", words, FIELDS, None, holder)


def _index(known: Mapping[str, Numbers]) -> dict[bytes, tuple[str, str]]:
    """Every telling array of the source by its float32 bits."""
    index: dict[bytes, tuple[str, str]] = {}
    for name, held in known.items():
        for field in FIELDS:
            array = getattr(held, field)
            if telling(array):
                index.setdefault(_bits(array), (name, field))
    return index


def _bits(array: Array) -> bytes:
    bits: bytes = (round_to(array, "float32") + np.float32(0)).tobytes()  # + 0: -0 and 0 are the same number
    return bits


def _scattered(
    held: Numbers, diagnosis: Diagnosis, own: str, index: Mapping[bytes, tuple[str, str]]
) -> Diagnosis | None:
    """Every array is the layer's own, at its initial value, or some array of the source; at least one is from elsewhere."""
    words, fields = [], []
    for field in FIELDS:
        array = getattr(held, field)
        if field in diagnosis.right or (array == INITIAL[field]).all():
            continue
        origin = index.get(_bits(array))
        if origin is None:
            return None
        words.append(f"{field} is the {origin[1]} of the source's {printable(origin[0])}")
        fields.append(field)
    if not any(own not in word for word in words):
        return None
    return Diagnosis((Mistake("scattered", "; ".join(words), tuple(fields)),), diagnosis.right)
