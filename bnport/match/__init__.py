"""Which source layer belongs to which target layer. Dicts of layers in, a `Match` out; knows no format.

Evidence, in the order in which it is asked:

1. a map that the user gave;
2. equal names, if the layers that share a name fit each other;
3. the number of channels, and the shape of the kernel that feeds the layer;
4. the place in the graph of layers, where both sides have one; otherwise paths in the graph of one side against the
   numbers in the names of the other;
5. names that correspond as they do elsewhere in the model, words of one meaning, orders that hold everywhere else;
6. the contents of the kernels, where the target's are already ported: that overrules 3 to 5.

What is left with two candidates is ambiguous, and said; it is never picked.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from bnport.errors import InvalidValue, MatchError, listed, printable
from bnport.match.result import Ambiguity, Match, Mismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bnport.layer import Layer

__all__ = ["Ambiguity", "Match", "Mismatch", "match"]


def match(
    sources: Mapping[str, Layer],
    targets: Mapping[str, Layer],
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
) -> Match:
    """Pair every target layer with the source layer that it is.

    sources, targets: layers by name, in their order of definition.
    map:        target name -> source name; patterns as in `bnport.match.patterns`. Overrules all evidence but channel
                counts.
    skip:       names or shell patterns (`head.*`) of layers to leave out, on either side.
    only_under: only layers whose names start with this, on the side or sides that have such names.

    Raises MatchError for a map entry or pattern that names nothing, and for a source that a map asks for twice. All
    else that is wrong is in the Match; its `raise_if_bad` raises it.
    """
    kept_s, kept_t, left_s, left_t = _leave_out(list(sources), list(targets), _checked(map, skip), only_under)
    from bnport.match import engine, names, patterns, questions
    from bnport.match.facts import facts

    both = sorted({*(map or {})} & {*left_t} | {*(map or {}).values()} & {*left_s})
    if both:
        raise MatchError(
            f"map: {listed(both)}: left out by skip or only-under; remove the map's entry, or what leaves the layer out"
        )
    forced: dict[str, tuple[str, str]] = {}
    mismatched: list[Mismatch] = []
    mapped = patterns.expand(map, kept_t, kept_s) if map else {}
    for t, (s, entry) in mapped.items():
        reason = "the map says so" if entry == t else f"the map says so: {entry}"
        _force(forced, mismatched, sources, targets, t, s, reason)
    used = {s for s, _ in mapped.values()}
    free_s, free_t = [s for s in kept_s if s not in used], [t for t in kept_t if t not in mapped]
    equal, rivals = names.equal(sources, free_s, targets, free_t)
    for t, s in equal.items():
        _force(forced, mismatched, sources, targets, t, s, "equal names" if s == t else "equal names under a prefix")
    bad_s, bad_t = {m.source for m in mismatched}, {m.target for m in mismatched}
    source = engine.Side(sources, [s for s in kept_s if s not in bad_s])
    target = engine.Side(targets, [t for t in kept_t if t not in bad_t])
    state = engine.align(source, target, forced, firm=set(mapped))
    named = [target.index[t] for t in equal if t in target.index]
    given = {t: f for t, f in forced.items() if t not in equal}
    against = questions.contradicted(state, named, given, set(mapped))
    ambiguous, missing, unexpected = questions.undecided(state, rivals)
    evidence = {i: (*state.why[i], *facts(state, i)) for i in sorted(state.back)}
    if against:
        ambiguous.append(questions.names_or_rest(state, against))
    for contradicted in against:
        state.withdraw(contradicted)
        del forced[target.names[contradicted]]
    decided = {i: t for i, t in enumerate(target.names) if i in state.back}
    found = Match(
        pairs={t: source.names[state.back[i]] for i, t in decided.items()},
        evidence={t: evidence[i] for i, t in decided.items()},
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        ambiguous=ambiguous,
        prefixes=list(rivals),
        left_sources=left_s,
        left_targets=left_t,
        source=getattr(sources, "source", "the source"),
        target=getattr(targets, "source", "the target"),
        source_notes=getattr(sources, "notes", ()),
    )
    if not found.ok:
        uncertain = names.counted_from_elsewhere(free_s, free_t, equal, perhaps=True)
        sure = questions.certain(source, target, {t: f for t, f in forced.items() if t not in uncertain}, set(mapped))
        found.guessed, found.ambiguous = questions.doubted(state, sure, ambiguous)
    return found


def _checked(map: object, skip: object) -> list[str]:
    """`skip` as a list; InvalidValue for a map or skip of another kind."""
    from collections.abc import Iterable, Mapping

    if map is not None and not isinstance(map, Mapping):
        raise InvalidValue(
            f"map: expected a mapping of target to source names, got {printable(repr(map), 60)}; a map file is read with"
            " bnport.mapfile.read_map(path), whose pairs are for map= and whose skip is for skip="
        )
    given = [skip] if isinstance(skip, str) or not isinstance(skip, Iterable) else list(skip)
    patterns = [pattern for pattern in given if isinstance(pattern, str)]
    if len(patterns) < len(given):
        raise InvalidValue(f"skip: expected names or patterns, got {printable(repr(skip), 60)}")
    return patterns


def _force(
    forced: dict[str, tuple[str, str]],
    mismatched: list[Mismatch],
    sources: Mapping[str, Layer],
    targets: Mapping[str, Layer],
    target: str,
    source: str,
    reason: str,
) -> None:
    t, s = targets[target].channels, sources[source].channels
    if t == s:
        forced[target] = source, reason
    else:
        mismatched.append(Mismatch(target, source, t, s))


def _leave_out(
    sources: Sequence[str], targets: Sequence[str], skip: Iterable[str], only_under: str | None
) -> tuple[list[str], list[str], list[str], list[str]]:
    """(sources kept, targets kept, sources left out, targets left out)."""
    kept = [list(sources), list(targets)]
    if only_under is not None:
        under = [[n for n in side if _is_under(n, only_under)] for side in kept]
        if not any(under):
            raise MatchError(f"--only-under {printable(only_under)}: no layer of either side is under that name")
        kept = [chosen or side for chosen, side in zip(under, kept, strict=True)]
    for pattern in skip:
        rest = [[n for n in side if n != pattern and not fnmatch.fnmatchcase(n, pattern)] for side in kept]
        if rest == kept:
            raise MatchError(f"--skip {printable(pattern)}: no layer of either side has that name")
        kept = rest
    chosen_s, chosen_t = set(kept[0]), set(kept[1])
    return kept[0], kept[1], [s for s in sources if s not in chosen_s], [t for t in targets if t not in chosen_t]


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or (
        name.startswith(prefix) and (prefix[-1:] in "./_" or name[len(prefix) : len(prefix) + 1] in "./_")
    )
