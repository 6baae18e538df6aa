"""Patterns of a map: `"conv{i}_block{j}_{k}_bn" = "layer{i-1}.{j-1}.bn{k}"`.

On the target side a variable in braces stands for a whole number: `{i}`; for letters counted from a = 0: `{j:a}`; or
for any text: `{rest:any}`. On the source side it is used again, with a little arithmetic: `{i}`, `{i-1}`, `{3*i+1}`,
`{j:a}` (written as a letter). A brace itself is doubled. The most specific key of a map wins: an exact name first, then
the pattern with the fewest variables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bnport.errors import MatchError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FIELD = re.compile(
    r"\{(?:(?P<factor>\d{1,6})\*)?(?P<name>[A-Za-z_]\w*)(?P<offset>[+-]\d{1,6})?(?::(?P<kind>a|any))?\}"
)
_KINDS = {None: r"(\d{1,9})", "a": r"([a-z])", "any": r"(.+?)"}


def split(pattern: str) -> list[str | re.Match[str]]:
    """`pattern` as literal texts and the fields between them. Raises MatchError on braces that are neither."""
    parts: list[str | re.Match[str]] = []
    literal, at = "", 0
    while at < len(pattern):
        if pattern[at : at + 2] in ("{{", "}}"):
            literal, at = literal + pattern[at], at + 2
        elif pattern[at] in "{}":
            field = _FIELD.match(pattern, at)
            if field is None:
                raise MatchError(
                    f"map: {printable(pattern)!r} has a brace that is no variable; write {{i}}, {{i-1}}, {{2*i+1}},"
                    " {j:a} or {rest:any}, and double a brace that is meant as itself"
                )
            parts += [literal, field]
            literal, at = "", field.end()
        else:
            literal, at = literal + pattern[at], at + 1
    return [*parts, literal]


def is_pattern(text: str) -> bool:
    """Whether `text` has a brace, so that it must be read as a pattern."""
    return "{" in text or "}" in text


class TargetPattern:
    """The left side of a map entry, compiled."""

    __slots__ = ("kinds", "literals", "regex", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: dict[str, str | None] = {}
        self.literals = 0
        regex = ""
        for part in split(text):
            if isinstance(part, str):
                regex += re.escape(part)
                self.literals += len(part)
                continue
            name, kind = part["name"], part["kind"]
            if part["factor"] or part["offset"]:
                raise MatchError(f"map: {printable(text)!r}: arithmetic belongs on the source side, the right one")
            if name in self.kinds:
                regex += f"(?P={name})"
                continue
            self.kinds[name] = kind
            regex += f"(?P<{name}>{_KINDS[kind][1:-1]})"
        self.regex = re.compile(regex, re.DOTALL)

    def match(self, name: str) -> dict[str, str] | None:
        """The values of the variables if `name` fits, else None."""
        found = self.regex.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, source: str, values: Mapping[str, str]) -> str:
        """The source name that the right side `source` gives for the values of the variables."""
        out = ""
        for part in split(source):
            if isinstance(part, str):
                out += part
                continue
            name = part["name"]
            if name not in values:
                raise MatchError(
                    f"map: {printable(source)!r} uses {{{printable(name)}}}, which {printable(self.text)!r} does not have"
                )
            value = values[name]
            if self.kinds[name] == "any":
                out += value
                continue
            number = ord(value) - ord("a") if self.kinds[name] == "a" else int(value)
            number = number * int(part["factor"] or 1) + int(part["offset"] or 0)
            if part["kind"] == "a":
                out += chr(ord("a") + number) if 0 <= number < 26 else "?"
            else:
                out += str(number)
        return out


def rank(entry: tuple[TargetPattern, str]) -> tuple[int, int]:
    """How general a pattern is: fewer variables first, then more literal text."""
    return len(entry[0].kinds), -entry[0].literals


def expand(map: Mapping[str, str], targets: Iterable[str], sources: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Every target that the map names, with its source and the entry that said so.

    Raises MatchError for an entry that names no target, a source that is not there, a pattern that fits but is never
    the most specific one, two patterns that fit equally well, and one source asked for by two targets.
    """
    known_targets, known_sources = list(targets), set(sources)
    exact = {key: value for key, value in map.items() if key in set(known_targets)}
    patterns = [(TargetPattern(key), value) for key, value in map.items() if key not in exact and is_pattern(key)]
    nothing = [key for key in map if key not in exact and not is_pattern(key)]
    if nothing:
        raise MatchError(f"map: no target layer is called {listed(nothing)}; remove or correct these entries")
    for pattern, value in patterns:
        pattern.fill(value, {name: "a" if kind == "a" else "0" for name, kind in pattern.kinds.items()})
    patterns.sort(key=rank)
    found: dict[str, tuple[str, str]] = {key: (value, key) for key, value in exact.items()}
    used: set[str] = set()
    for name in known_targets:
        if name in found:
            continue
        fits = [(p, value, values) for p, value in patterns if (values := p.match(name)) is not None]
        if not fits:
            continue
        best, value, values = fits[0]
        for other, other_value, other_values in fits[1:]:
            if rank((other, "")) == rank((best, "")) and other.fill(other_value, other_values) != best.fill(
                value, values
            ):
                raise MatchError(
                    f"map: {printable(name)} fits {printable(best.text)!r} and {printable(other.text)!r} equally well;"
                    " give it an entry of its own"
                )
        used.add(best.text)
        found[name] = (best.fill(value, values), best.text)
    unused = [p.text for p, _ in patterns if p.text not in used]
    if unused:
        raise MatchError(f"map: no target layer is left for {listed(unused)}; remove or correct these entries")
    absent = [f"{name} = {source}" for name, (source, _) in found.items() if source not in known_sources]
    if absent:
        raise MatchError(f"map: the source has no such layer: {listed(absent)}")
    taken: dict[str, str] = {}
    for name, (source, _) in found.items():
        if source in taken:
            raise MatchError(
                f"map: the source layer {printable(source)!r} is asked for twice, by {printable(taken[source])} and"
                f" {printable(name)}"
            )
        taken[source] = name
    return found
