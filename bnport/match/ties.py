"""Evidence that breaks a tie, and how it has to prove itself first on the layers that needed none."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from bnport.errors import InvalidValue
from bnport.match import names

if TYPE_CHECKING:
    from bnport.match.engine import Alignment, Group, Side

    Proposal = dict[int, int]  # source -> target, for the whole group

SEEN = 3  # how many decided pairs must confirm an order before it breaks a tie


def break_ties(state: Alignment, group: Group) -> bool:
    """Decide a group if witnesses do and none contradicts; returns whether it was."""
    found = {
        reason: proposal
        for reason, proposal in (
            ("names correspond as elsewhere", learnt(state, group)),
            ("names share a word", shared_words(state, group)),
            ("joined in the same order", operand_order(state, group)),
            ("defined in the same order as all others", trusted_order(state, group, numbered=False)),
            ("numbered in the order of definition, as all others", trusted_order(state, group, numbered=True)),
        )
        if proposal is not None
    }
    if not found:
        return False
    first, *others = found.values()
    if any(other != first for other in others):
        for t in group.targets:
            state.conflicts[t] = f"evidence contradicts itself: {'; '.join(found)}"
        return False
    if any(t in state.conflicts for t in group.targets):
        return False
    for s, t in first.items():
        state.decide(s, t, f"{group.how}; {', '.join(found)}", soft=True)
    return True


def learnt(state: Alignment, group: Group) -> Proposal | None:
    """A correspondence of names that pairs decided elsewhere all confirm."""
    source, target = state.source, state.target
    s_keys = names.keys([source.tokens[s] for s in group.sources])
    t_keys = names.keys([target.tokens[t] for t in group.targets])
    if len(set(s_keys)) < len(s_keys) or len(set(t_keys)) < len(t_keys):
        return None
    proposal: Proposal = {}
    solid = state.solid()
    for s, s_key in zip(group.sources, s_keys, strict=True):
        votes = set()
        for known_s, known_t in solid:
            if names.fits(source.tokens[known_s], s_key):
                votes |= {
                    t
                    for t, t_key in zip(group.targets, t_keys, strict=True)
                    if names.fits(target.tokens[known_t], t_key)
                }
        if len(votes) == 1:
            proposal[s] = votes.pop()
        elif votes:
            return None
    return _completed(proposal, group)


def shared_words(state: Alignment, group: Group) -> Proposal | None:
    """Words of the same meaning that exactly one candidate has on either side."""
    proposal: Proposal = {}
    s_words = {s: names.words(state.source.tokens[s]) for s in group.sources}
    t_words = {t: names.words(state.target.tokens[t]) for t in group.targets}
    for word in frozenset().union(*s_words.values()):
        s_with = [s for s, w in s_words.items() if word in w]
        t_with = [t for t, w in t_words.items() if word in w]
        if len(s_with) == len(t_with) == 1 and proposal.setdefault(s_with[0], t_with[0]) != t_with[0]:
            return None
    return _completed(proposal, group)


def operand_order(state: Alignment, group: Group) -> Proposal | None:
    """The order in which a layer further on joins the candidates, if that order agrees wherever it can be seen."""
    source, target = state.source.graph, state.target.graph
    if source is None or target is None:
        return None
    seen = 0
    for s, t in state.solid():
        if len(source.inputs[s]) > 1 and all(n in state.pairs for n in source.inputs[s]):
            if [state.pairs[n] for n in source.inputs[s]] != target.inputs[t]:
                return None
            seen += 1
    if seen < SEEN:
        return None
    s_group, t_group = set(group.sources), set(group.targets)
    proposals = []
    for s, t in state.pairs.items():
        s_order = [n for n in source.inputs[s] if n in s_group]
        t_order = [n for n in target.inputs[t] if n in t_group]
        if len(s_order) == len(t_order) == len(group.sources):
            proposals.append(dict(zip(s_order, t_order, strict=True)))
    if not proposals or any(p != proposals[0] for p in proposals):
        return None
    return proposals[0]


def trusted_order(state: Alignment, group: Group, *, numbered: bool) -> Proposal | None:
    """The order of definition on both sides, or the target's automatic numbers, if no decided pair contradicts it.

    With a graph the order must have been seen to hold between layers that no path orders.
    """
    rank: list[int | None] = list(state.target.numbering) if numbered else list(range(len(state.target.names)))
    if any(rank[t] is None for t in group.targets):
        return None
    known = [t for _, t in state.solid() if rank[t] is not None]
    if any((rank[a] or 0) >= (rank[b] or 0) for a, b in itertools.pairwise(known)):
        return None
    seen = len(known) - 1
    if state.target.graph is not None:
        _, after = state.target.graph.reach()
        seen = sum(not after[a] >> b & 1 for a, b in itertools.pairwise(known))
    if seen < SEEN:
        return None
    by_rank = sorted(group.targets, key=lambda t: rank[t] or 0)
    return dict(zip(sorted(group.sources), by_rank, strict=True))


def defined_as_executed(state: Alignment, side: Side) -> bool:
    """Whether the definitions of `side`, which has no graph, follow the other side's graph at every decided edge."""
    here = state.back if side is state.source else state.pairs
    graph = state.target.graph if side is state.source else state.source.graph
    assert graph is not None
    seen = 0
    for node, before in enumerate(graph.inputs):
        for b in before:
            if node in here and b in here and b not in graph.cyclic:
                if here[b] >= here[node]:
                    return False
                seen += 1
    return seen >= SEEN


def same_numbers(state: Alignment, group: Group) -> bool:
    """Decide a group whose sources hold the same numbers: any pairing of them gives the same model."""
    try:
        first, *others = (state.source.layers[s].record for s in group.sources)
        if any(other != first for other in others):
            return False
    except InvalidValue:
        return False
    for s, t in zip(group.sources, group.targets, strict=True):
        state.decide(s, t, f"{group.how}; the candidates hold the same numbers, so that any choice is the same")
    return True


def _completed(proposal: Proposal, group: Group) -> Proposal | None:
    """`proposal` for the whole group if at most one source is left open, which the last target then takes."""
    if not proposal or len(set(proposal.values())) < len(proposal) or len(proposal) < len(group.sources) - 1:
        return None
    open_s = [s for s in group.sources if s not in proposal]
    open_t = [t for t in group.targets if t not in set(proposal.values())]
    return {**proposal, **dict(zip(open_s, open_t, strict=True))}
