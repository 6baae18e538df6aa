"""What an alignment leaves open, and which of the pairs and candidates beside an open question are no more than likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.errors import listed, printable
from bnport.match import engine
from bnport.match.facts import differ
from bnport.match.result import Ambiguity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def undecided(
    state: engine.Alignment, rivals: Mapping[str, Sequence[str]]
) -> tuple[list[Ambiguity], list[str], list[str]]:
    """(ambiguous, missing, unexpected) of what is left. `rivals`: prefixes under which names fit equally well."""
    ambiguous, missing, unexpected = [], [], []
    for part in state.remaining():
        s, t = [state.source.names[i] for i in part.sources], [state.target.names[i] for i in part.targets]
        if not s or not t:
            missing += t
            unexpected += s
            continue
        why = next((state.conflicts[i] for i in part.targets if i in state.conflicts), None)
        fitting = [prefix for prefix in rivals if any(n.startswith(prefix) for n in (*s, *t))]
        if why is None and len(fitting) > 1:
            why = f"the names fit under {listed([repr(printable(p)) for p in fitting])}"
        if why is None and len(s) != len(t):
            why = f"{engine.describe(part.label)}: {len(s)} in the source, {len(t)} in the target"
        ambiguous.append(Ambiguity(tuple(t), tuple(s), why or f"each is a {engine.describe(part.label)}"))
    order_t, order_s = state.target.index, state.source.index
    return ambiguous, sorted(missing, key=order_t.__getitem__), sorted(unexpected, key=order_s.__getitem__)


def certain(
    source: engine.Side, target: engine.Side, forced: Mapping[str, tuple[str, str]], firm: set[str]
) -> engine.Alignment:
    """What follows without anything that may hold by chance.

    Left are a map, equal names, contents of kernels, channel counts, kernels that are known and places in two graphs. Not
    guessed kernels, tie-breaks, or numbers in names against a graph: where something is missing or ambiguous, what these
    led to may be wrong without being contradicted.
    """
    given = {target.index[t]: (source.index[s], why) for t, (s, why) in forced.items()}
    held = {t: pair for t, pair in given.items() if target.names[t] in firm}
    return engine.aligned(source, target, given, held, guesses=False, ordered=False, strict=True)


def contradicted(
    state: engine.Alignment, named: Sequence[int], forced: Mapping[str, tuple[str, str]], firm: set[str]
) -> dict[int, int]:
    """Targets whose pairs by equal names (`named`) known kernels or the two graphs contradict, and their sources.

    They do where they are not alike in the pair, and are alike in another that follows from them without the names.
    forced: all that is given beside the names.
    """
    doubtful = [t for t in named if differ(state, t)]
    if not doubtful:
        return {}
    sure = certain(state.source, state.target, forced, firm)
    return {
        t: state.back[t] for t in doubtful if t in sure.back and sure.back[t] != state.back[t] and not differ(sure, t)
    }


def names_or_rest(state: engine.Alignment, against: Mapping[int, int]) -> Ambiguity:
    """The question about what `contradicted` found."""
    targets, sources = (
        tuple(side.names[at] for at in found)
        for side, found in ((state.target, against), (state.source, against.values()))
    )
    return Ambiguity(
        targets, sources, "their names are equal, but the kernels that feed them, or their places in the graphs, are"
        " those of others"
    )  # fmt: skip


def doubted(
    state: engine.Alignment, sure: engine.Alignment, open_groups: Sequence[Ambiguity]
) -> tuple[tuple[str, ...], tuple[Ambiguity, ...]]:
    """(targets whose pairs `sure` has not, the questions with what it says of their candidates)."""
    target = state.target.names
    likely = tuple(t for i, t in enumerate(target) if i in state.back and sure.back.get(i) != state.back[i])
    candidates = {t: group.sources for group in undecided(sure, {})[0] for t in group.targets}
    questions = []
    for group in open_groups:
        others = {s for t in group.targets for s in candidates.get(t, ())} - set(group.sources)
        why = f"{group.why}; what rules out others of as many channels is a guess" if others else group.why
        questions.append(group._replace(why=why))
    return likely, tuple(questions)
