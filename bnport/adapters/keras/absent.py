"""What `absent` says: which of gamma and beta a layer with three arrays lacks, for all layers or one by one."""

from __future__ import annotations

import fnmatch

from bnport._lazy import TYPE_CHECKING
from bnport.errors import InvalidValue, listed, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_FLAGS = {"gamma": "scale=False", "beta": "center=False"}


class Absent:
    """ "gamma" or "beta" for every layer; or names -> one of them, as a mapping or as "bn1=gamma,bn2=beta".

    A name may be a pattern (*, ?, [abc]), as for --skip; a layer's own name goes before patterns. `asked` are the layers
    that were asked about so far, with the answer that each got. Raises InvalidValue for anything else.
    """

    def __init__(self, given: str | Mapping[str, str]) -> None:
        self._all = given in _FLAGS if isinstance(given, str) else False
        self._answers: Mapping[str, str] = {"*": given} if self._all else _parsed(given)  # type: ignore[dict-item]
        self.asked: dict[str, str | None] = {}

    def of(self, name: str) -> str | None:
        """The field that the layer called `name` lacks; None if nothing is said of it."""
        answer = self._answers.get(name)
        if answer is None:
            fitting = {field: p for p, field in self._answers.items() if fnmatch.fnmatchcase(name, p)}
            if len(fitting) > 1:
                said = ", ".join(f"{printable(p)}={field}" for field, p in fitting.items())
                raise InvalidValue(f"absent: {printable(name)} is said to lack both ({said}); name it itself")
            answer = next(iter(fitting), None)
        self.asked[name] = answer
        return answer

    def check_names(self, where: str) -> None:
        """InvalidValue if a name or pattern is none of the layers that were asked about."""
        if self._all:
            return
        for name in self._answers:
            if name not in self.asked and not fnmatch.filter(self.asked, name):
                there = f"there are {listed(self.asked, 5)}" if self.asked else "it has none"
                raise InvalidValue(f"absent: {printable(name)} is no layer of {where} with three arrays; {there}")

    def notes(self) -> list[str]:
        """Which layers were taken to lack what."""
        notes = []
        for field, flag in _FLAGS.items():
            names = [name for name, answer in self.asked.items() if answer == field]
            if names:
                notes.append(f"{field} taken as absent ({flag}), as --absent says, in {listed(names, 8)}")
        if self._all and len(self.asked) > 1:
            notes.append("the file does not say so itself; where layers differ: --absent NAME=gamma,NAME=beta")
        return notes


def _parsed(given: str | Mapping[str, str]) -> dict[str, str]:
    expected = "expected gamma, beta, or layers with one of them (bn1=gamma,bn2=beta)"
    pairs: list[tuple[str, str]] = []
    if isinstance(given, str):
        for part in given.split(","):
            name, equals, field = part.rpartition("=")
            if not equals:
                raise InvalidValue(f"absent: {expected}, got {printable(repr(given)[:80])}")
            pairs.append((name.strip(), field.strip()))
    else:
        pairs = list(given.items()) if hasattr(given, "items") else []
    for name, field in pairs:
        if not isinstance(name, str) or not name or field not in _FLAGS:
            raise InvalidValue(
                f"absent: {expected}, got {printable(repr(field)[:40])} for {printable(repr(name)[:80])}"
            )
    answers = dict(pairs)
    if not answers or any(answers[name] != field for name, field in pairs):
        raise InvalidValue(f"absent: {expected}, got {printable(repr(given)[:80])}")
    return answers
