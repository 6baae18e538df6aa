"""Pairs written as patterns, so that the map of a ResNet-50 is a page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bnport.match import patterns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Parts = tuple[str, ...]  # literals at even places, numbers and counting letters at odd ones
    Entry = tuple[Parts, Parts]

_SLOT = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,5})(?![0-9])|(?<=[0-9])([a-z])(?![a-z0-9])")
_NAMES = "ijklmnpqrst"


def compress(pairs: Mapping[str, str], targets: Sequence[str]) -> dict[str, str]:
    """`pairs` (target -> source) with patterns for what repeats; `patterns.expand` gives exactly `pairs` back.

    `targets` are all names that the map will be asked about, so that no pattern takes a layer that has no pair.
    """
    groups: dict[tuple[Parts, Parts], list[Entry]] = {}
    for target, source in pairs.items():
        t, s = _split(target), _split(source)
        shape = (_shape(t), _shape(s))
        groups.setdefault(shape, []).append((t, s))
    found: dict[str, str] = {}
    for entries in groups.values():
        found.update({key: value for key, value, count in _patterns(entries) if count > 1})
    while True:
        exact, wrong = _check(found, pairs, targets)
        if not wrong:
            return _in_order({**found, **exact}, pairs, targets)
        for key in wrong:
            del found[key]


def _split(name: str) -> Parts:
    parts: list[str] = []
    at = 0
    for slot in _SLOT.finditer(name):
        parts += [name[at : slot.start()], slot[0]]
        at = slot.end()
    return (*parts, name[at:])


def _shape(parts: Parts) -> Parts:
    return tuple(p if i % 2 == 0 else "#" if p.isdigit() else "@" for i, p in enumerate(parts))


def _number(text: str) -> int:
    return int(text) if text.isdigit() else ord(text) - ord("a")


def _patterns(entries: list[Entry], depth: int = 0) -> list[tuple[str, str, int]]:
    """Patterns for entries of one shape, each with the number of entries it stands for; split where no line fits."""
    whole = _pattern(entries)
    if whole is not None:
        return [(*whole, len(entries))]
    best: list[tuple[str, str, int]] = []
    slots = range(1, len(entries[0][0]), 2) if depth < 2 else ()
    for slot in slots:
        by_value: dict[str, list[Entry]] = {}
        for entry in entries:
            by_value.setdefault(entry[0][slot], []).append(entry)
        if 1 < len(by_value) < len(entries):
            tried = [p for part in by_value.values() for p in _patterns(part, depth + 1)]
            if not best or len(tried) < len(best):
                best = tried
    return best


def _pattern(entries: list[Entry]) -> tuple[str, str] | None:
    """One pattern for all entries: each source number a constant, or factor * (a target number) + offset."""
    first_t, first_s = entries[0]
    slots_t = [i for i in range(1, len(first_t), 2) if len({t[i] for t, _ in entries}) > 1]
    names = dict(zip(slots_t, _NAMES, strict=False))
    if len(names) < len(slots_t):
        return None
    target = "".join(
        f"{{{names[i]}{'' if p.isdigit() else ':a'}}}" if i in names else _escaped(p) for i, p in enumerate(first_t)
    )
    source = ""
    for i, part in enumerate(first_s):
        if i % 2 == 0 or len({s[i] for _, s in entries}) == 1:
            source += _escaped(part)
            continue
        for j, name in names.items():
            line = _line([(_number(t[j]), _number(s[i])) for t, s in entries])
            if line is not None:
                factor, offset = line
                times = f"{factor}*" if factor != 1 else ""
                source += f"{{{times}{name}{f'{offset:+d}' if offset else ''}{'' if part.isdigit() else ':a'}}}"
                break
        else:
            return None
    return target, source


def _line(points: list[tuple[int, int]]) -> tuple[int, int] | None:
    (x0, y0) = points[0]
    other = next(((x, y) for x, y in points if x != x0), None)
    if other is None or (other[1] - y0) % (other[0] - x0):
        return None
    factor = (other[1] - y0) // (other[0] - x0)
    offset = y0 - factor * x0
    if factor < 1 or abs(offset) > 999_999 or any(y != factor * x + offset for x, y in points):
        return None
    return factor, offset


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _check(
    found: Mapping[str, str], pairs: Mapping[str, str], targets: Sequence[str]
) -> tuple[dict[str, str], set[str]]:
    """(pairs that no pattern gives, patterns that give a wrong pair)."""
    compiled = [(patterns.TargetPattern(key), value) for key, value in found.items()]
    compiled.sort(key=patterns.rank)
    exact: dict[str, str] = {}
    wrong: set[str] = set()
    used: dict[str, tuple[list[str], list[str]]] = {}
    for target in targets:
        fitting = [(p, p.fill(v, values)) for p, v in compiled if (values := p.match(target)) is not None]
        if not fitting:
            if target in pairs:
                exact[target] = pairs[target]
            continue
        best, source = fitting[0]
        tied = any(patterns.rank((p, "")) == patterns.rank((best, "")) and s != source for p, s in fitting[1:])
        right, exceptions = used.setdefault(best.text, ([], []))
        if target not in pairs:
            wrong.add(best.text)
        elif pairs[target] == source and not tied:
            right.append(target)
        else:
            exceptions.append(target)
    for key, (right, exceptions) in used.items():
        if len(right) <= len(exceptions) + 1:
            wrong.add(key)
        exact.update({target: pairs[target] for target in exceptions})
    return exact, wrong | (set(found) - set(used))


def _in_order(found: Mapping[str, str], pairs: Mapping[str, str], targets: Sequence[str]) -> dict[str, str]:
    first: dict[str, int] = {}
    compiled = sorted(((patterns.TargetPattern(k), v) for k, v in found.items() if k not in pairs), key=patterns.rank)
    for at, target in enumerate(targets):
        if target in found:
            first[target] = at
            continue
        key = next((p.text for p, _ in compiled if p.match(target) is not None), None)
        if key is not None:
            first.setdefault(key, at)
    return dict(sorted(found.items(), key=lambda kv: first[kv[0]]))
