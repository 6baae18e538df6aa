"""Two models differ: which known mistake turns the source's numbers into the ported ones?

fields.py   one array: the formulas that people apply by mistake
layers.py   one layer: its arrays together, channels in another order, whole functions
elsewhere.py  the numbers of other layers
words.py    the mistakes by name, and their repairs

A verdict is given only where a formula reproduces every channel to within rounding, and where at least one array that is
no constant takes part: on a healthy port nothing is said, and two unrelated checkpoints show no mistake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.errors import listed, printable
from bnport.explain.elsewhere import from_elsewhere
from bnport.explain.layers import Diagnosis, Mistake, diagnose
from bnport.explain.words import MISTAKES, Repair, as_dict, as_text
from bnport.verify import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bnport.layer import Layer

__all__ = ["MISTAKES", "Diagnosis", "Explanation", "Mistake", "Verdict", "diagnose", "explain"]


class Verdict(NamedTuple):
    """One known mistake: where it was made, how it is known, and what repairs it."""

    mistake: str  # a key of MISTAKES
    title: str
    layers: tuple[str, ...]  # of the port
    evidence: str
    repair: str


class Explanation(NamedTuple):
    """What is wrong with a port, mistake by mistake. Prints itself; `same` if all layers are the same functions."""

    source: str
    ported: str
    compared: int
    differing: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    unexplained: tuple[str, ...]
    leads: tuple[str, ...]  # what is known about the unexplained ones
    diagnoses: Mapping[str, Diagnosis]  # of every differing layer

    @property
    def same(self) -> bool:
        """Whether no layer differs."""
        return not self.differing

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return as_dict(self)

    def __str__(self) -> str:
        return as_text(self)


def explain(
    sources: Mapping[str, Layer],
    ported: Mapping[str, Layer],
    pairs: Mapping[str, str],
    *,
    live: bool = False,
    command_options: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Explanation:
    """Which known mistakes turn the layers of `sources` into those of `ported`, paired by `pairs` (ported -> source).

    Repair commands name the two by their `source`, if they are Layers. live: the port is a model in memory;
    command_options: added to the commands. Layers that are the same function are never explained.
    """
    source, port = getattr(sources, "source", "SOURCE"), getattr(ported, "source", "PORTED")
    reports = compare(sources, ported, pairs)
    differing = tuple(name for name, report in reports.items() if not report.ok)
    diagnoses: dict[str, Diagnosis] = {}
    for done, name in enumerate(differing):
        if progress:
            progress(done, len(differing), name)
        diagnoses[name] = diagnose(sources[pairs[name]], ported[name])
    open_ = [name for name, diagnosis in diagnoses.items() if not diagnosis.complete]
    diagnoses.update(from_elsewhere(sources, ported, pairs, diagnoses, open_))
    repair = Repair(source, port, live, command_options)
    found: dict[str, list[tuple[str, Mistake]]] = {}
    for name, diagnosis in diagnoses.items():
        if diagnosis.complete:
            for mistake in diagnosis.mistakes:
                found.setdefault(mistake.kind, []).append((name, mistake))
    for name, mistake in _momenta(sources, ported, pairs):
        found.setdefault("momentum", []).append((name, mistake))
    verdicts = [
        _verdict(kind, made, [sources[pairs[name]] for name, _ in made], repair) for kind, made in found.items()
    ]
    verdicts.sort(key=lambda verdict: -len(verdict.layers))
    unexplained = tuple(name for name, diagnosis in diagnoses.items() if not diagnosis.complete)
    leads = tuple(_leads({name: diagnoses[name] for name in unexplained}))
    return Explanation(source, port, len(pairs), differing, tuple(verdicts), unexplained, leads, diagnoses)


def _verdict(kind: str, made: list[tuple[str, Mistake]], sources: list[Layer], repair: Repair) -> Verdict:
    name, first = max(made, key=lambda pair: len(pair[1].fields))
    evidence = f"{printable(name)}: {first.words}"
    if len(made) > 1 and kind in ("swapped", "scattered"):
        evidence = "; ".join(f"{printable(name)}: {mistake.words}" for name, mistake in made[:4])
    constants = [mistake.constant for _, mistake in made if mistake.constant is not None]
    if len(constants) == len(made) > 1 and max(constants) - min(constants) <= 1e-6 * max(constants):
        evidence += f" (the same {constants[0]:.6g} in {len(made)} layers)"
    assumed = sources[0].epsilon if all("epsilon" in layer.assumed for layer in sources) else None
    names = tuple(name for name, _ in made)
    return Verdict(kind, MISTAKES[kind].title, names, evidence, repair.of(kind, assumed, first.constant))


def _momenta(
    sources: Mapping[str, Layer], ported: Mapping[str, Layer], pairs: Mapping[str, str]
) -> list[tuple[str, Mistake]]:
    """Layers whose momentum is the fraction of the new value where that of the old one is meant."""
    found = []
    for target, name in pairs.items():
        theirs, ours = sources[name].momentum, ported[target].momentum
        if theirs is not None and ours is not None and abs(ours - (1 - theirs)) < 1e-9 and abs(ours - theirs) > 1e-9:
            words = f"momentum is {ours:.6g}; the source keeps {theirs:.6g} of the old value"
            found.append((target, Mistake("momentum", words, ("momentum",), ours)))
    return found


def _leads(diagnoses: Mapping[str, Diagnosis]) -> list[str]:
    """What is known about layers that nothing explains: which of their arrays are right."""
    by_right: dict[tuple[str, ...], list[str]] = {}
    for name, diagnosis in diagnoses.items():
        by_right.setdefault(diagnosis.right, []).append(name)
    leads = []
    for right, names in by_right.items():
        wrong = [field for field in ("gamma", "beta", "mean", "variance") if field not in right]
        if not right:
            leads.append(f"{listed(names, 4)}: no array is the source's; another checkpoint, or another layer of it?")
        elif set(wrong) <= {"mean", "variance"}:
            leads.append(f"{listed(names, 4)}: {', '.join(right)} are the source's, {' and '.join(wrong)} are not; "
                         "statistics of another checkpoint, or of further training?")  # fmt: skip
        else:
            leads.append(f"{listed(names, 4)}: {', '.join(right)} {'is' if len(right) == 1 else 'are'} the source's, "
                         f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not")  # fmt: skip
    return leads
