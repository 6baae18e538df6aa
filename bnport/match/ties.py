"""Evidence that breaks a tie, and how it has to prove itself first on the layers that needed none."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from bnport.errors import InvalidValue, Question
from bnport.match import names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnport.match.engine import Alignment, Group, Side

    Proposal = dict[int, int]  # source -> target, for the whole group
    Rank = Sequence[int | None]  # of each layer of one side; None where it has none

SEEN = 3  # how many decided pairs must confirm an order before it breaks a tie


def break_ties(state: Alignment, group: Group) -> bool:
    """Decide a group if witnesses do and none contradicts; returns whether it was."""
    found = {
        reason: proposal
        for reason, proposal in (
            ("names correspond as elsewhere", learnt(state, group)),
            ("numbers in names correspond as elsewhere", numbers(state, group)),
            ("names share a word", shared_words(state, group)),
            ("beside its neighbour", siblings(state, group)),
            ("joined in the same order", operand_order(state, group)),
            *((why, trusted_order(state, group, own, theirs)) for why, own, theirs in ranks(state)),
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
    """Words of the same meaning that exactly one candidate has on either side.

    Not if a word that one layer of each side has is known to mislead: those two have other channels or other partners.
    """
    if _words_mislead(state):
        return None
    proposal: Proposal = {}
    fed = all(state.kernel(state.source.layers[s]) for s in group.sources)
    fed = fed and all(state.kernel(state.target.layers[t]) for t in group.targets)  # else having one would be a word
    s_words = {s: _words(state, state.source, s, fed) for s in group.sources}
    t_words = {t: _words(state, state.target, t, fed) for t in group.targets}
    for word in frozenset().union(*s_words.values()):
        s_with = [s for s, w in s_words.items() if word in w]
        t_with = [t for t, w in t_words.items() if word in w]
        if len(s_with) == len(t_with) == 1 and proposal.setdefault(s_with[0], t_with[0]) != t_with[0]:
            return None
    return _completed(proposal, group)


def _words_mislead(state: Alignment) -> bool:
    owners: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for side, owner in zip((state.source, state.target), owners, strict=True):
        for node, tokens in enumerate(side.tokens):
            for word in names.words(tokens):
                owner.setdefault(word, []).append(node)
    solid = dict(state.solid())
    for word, found in owners[0].items():
        if len(found) == len(owners[1].get(word, ())) == 1:
            (s,), (t,) = found, owners[1][word]
            if state.source.layers[s].channels != state.target.layers[t].channels or solid.get(s, t) != t:
                return True
    return False


def siblings(state: Alignment, group: Group) -> Proposal | None:
    """A candidate that shares an unbranched path with a decided layer is named most like that layer's source.

    Of `branch0`, `branch1.0` and `branch2.0`, `branch1.0` belongs to the target that leads to that of `branch1.1`. Only
    for a source without a graph: names then are all that says which of its layers form one branch.
    """
    graph = state.target.graph
    if graph is None or state.source.graph is not None:
        return None
    before, after = graph.reach()
    if any((before[a] | after[a]) >> b & 1 for a, b in itertools.combinations(group.targets, 2)):
        return None  # in different blocks: the neighbour of one is named like another
    proposal: Proposal = {}
    for t in group.targets:
        alone = [n for n in graph.outputs[t] if len(graph.outputs[t]) == len(graph.inputs[n]) == 1]
        alone += [n for n in graph.inputs[t] if len(graph.inputs[t]) == len(graph.outputs[n]) == 1]
        votes = {_nearest(state, group, state.back[n]) for n in alone if n in state.back} - {None}
        if len(votes) > 1:
            return None
        if votes:
            s = votes.pop()
            assert s is not None
            if s in proposal:
                return None
            proposal[s] = t
    return _completed(proposal, group)


def _nearest(state: Alignment, group: Group, other: int) -> int | None:
    """The source whose name has the longest beginning in common with that of `other`; None if several have."""
    names_of = state.source.tokens
    shared = sorted((names.common(names_of[s], names_of[other]), s) for s in group.sources)
    return shared[-1][1] if shared[-1][0] > shared[-2][0] else None


def _words(state: Alignment, side: Side, node: int, fed: bool) -> frozenset[str]:
    """The words in the name of a layer and, if `fed`, in that of the kernel that feeds it."""
    kernel = state.kernel(side.layers[node]) if fed else None
    return names.words((*side.tokens[node], *(names.tokens(kernel.name) if kernel else ())))


def numbers(state: Alignment, group: Group) -> Proposal | None:
    """A number in the source names that is, but for a constant, a number in the target names, wherever it is seen.

    Of names whose words and numbers stand in the same places, whatever the words: `cell_4.comb_iter_0_left.bn_sep_1`
    and `separable_conv_1_bn_normal_left1_4` say left0 = left1, and so right1 = right2. Not a number that runs through all
    layers of a side (`bn5`, `batch_normalization_4`): it says in which order they were made, and that may be another. All
    numbers but one must have been seen: what lies beyond them may be counted otherwise.
    """
    source, target = state.source.tokens, state.target.tokens
    s_shape, t_shape = names.shape(source[group.sources[0]]), names.shape(target[group.targets[0]])
    if any(names.shape(source[s]) != s_shape for s in group.sources):
        return None
    if any(names.shape(target[t]) != t_shape for t in group.targets):
        return None
    known = [
        (source[s], target[t])
        for s, t in state.solid()
        if names.shape(source[s]) == s_shape and names.shape(target[t]) == t_shape
    ]
    proposals: list[Proposal] = []
    for i, kind_s in enumerate(s_shape):
        own = {source[s][i][1]: s for s in group.sources}
        if not kind_s or len(own) < len(group.sources) or _runs_through(source, i):
            continue
        for j, kind_t in enumerate(t_shape):
            theirs = {target[t][j][1]: t for t in group.targets}
            if not kind_t or len(theirs) < len(group.targets) or _runs_through(target, j):
                continue
            seen = {(int(s[i][1]), int(t[j][1])) for s, t in known}
            offsets = {b - a for a, b in seen}
            if len(offsets) != 1 or len(seen) < 2:
                continue
            offset = offsets.pop()
            unseen = {int(a) for a in own} - {a for a, _ in seen}
            if len(unseen) < 2 and all(int(a) + offset in theirs for a in own):
                proposals.append({s: theirs[int(a) + offset] for a, s in own.items()})
    return proposals[0] if proposals and all(p == proposals[0] for p in proposals) else None


def _runs_through(side: Sequence[Sequence[names.Token]], place: int) -> bool:
    """Whether most names of a side are the same but for the number in this place."""
    rests = Counter((*name[:place], *name[place + 1 :]) for name in side if len(name) > place)
    return max(rests.values(), default=0) * 2 > len(side)


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


def trusted_order(state: Alignment, group: Group, own: Rank, theirs: Rank) -> Proposal | None:
    """An order of all layers on each side (of definition, or the framework's own numbers) that every decided pair keeps.

    It must have been seen to hold right there too: between any two candidates lies, in both orders, a decided pair, and
    not because one path of the graph runs through all three. Elsewhere an order may hold because nothing could break it.
    """
    known = kept_by_all(state, own, theirs)
    if known is None or None in [own[s] for s in group.sources] or None in [theirs[t] for t in group.targets]:
        return None
    sources = sorted(group.sources, key=lambda s: own[s] or 0)
    targets = sorted(group.targets, key=lambda t: theirs[t] or 0)
    graph = state.target.graph
    before, after = graph.reach() if graph is not None else ([], [])
    for (s1, s2), (t1, t2) in zip(itertools.pairwise(sources), itertools.pairwise(targets), strict=True):
        between = (
            t
            for s, t in known
            if (own[s1] or 0) < (own[s] or 0) < (own[s2] or 0)
            and (theirs[t1] or 0) < (theirs[t] or 0) < (theirs[t2] or 0)
            and not (graph and (before[t] | after[t]) >> t1 & (before[t] | after[t]) >> t2 & 1)
        )
        if next(between, None) is None:
            return None
    return dict(zip(sources, targets, strict=True))


def ranks(state: Alignment) -> list[tuple[str, Rank, Rank]]:
    """The orders that may be trusted: (in words, rank of each source, rank of each target)."""
    sides = state.source, state.target
    defined = [list(range(len(side.names))) for side in sides]
    numbered = [side.numbering for side in sides]
    if not state.ordered:
        return [("numbered in the same order as all others", numbered[0], numbered[1])]
    return [
        ("defined in the same order as all others", defined[0], defined[1]),
        ("numbered in the order of definition, as all others", defined[0], numbered[1]),
        ("defined in the order of the source's numbers, as all others", numbered[0], defined[1]),
        ("numbered in the same order as all others", numbered[0], numbered[1]),
    ]


def kept_by_all(state: Alignment, own: Rank, theirs: Rank) -> list[tuple[int, int]] | None:
    """The decided pairs in that order, if most layers are decided and no pair breaks it; else None."""
    if not mostly_decided(state):
        return None
    known = sorted(
        ((s, t) for s, t in state.solid() if own[s] is not None and theirs[t] is not None), key=lambda p: own[p[0]] or 0
    )
    if len(known) <= SEEN or any((theirs[a] or 0) >= (theirs[b] or 0) for (_, a), (_, b) in itertools.pairwise(known)):
        return None
    return known


def in_step(state: Alignment) -> bool:
    """Decide undecided layers between two decided ones where both sides run through the same labels in the same order.

    Only in an order that every decided pair keeps, and only a layer whose neighbours in that order have other labels: of
    two alike in a row the order could still be the other way round.
    """
    for reason, own, theirs in ranks(state):
        known = kept_by_all(state, own, theirs)
        if known is None or None in own or None in theirs:
            continue
        orders = [sorted(range(len(rank)), key=rank.__getitem__) for rank in (own, theirs)]  # type: ignore[arg-type]
        segments = [
            [list(part) for is_open, part in itertools.groupby(order, lambda n, d=done: n not in d) if is_open]  # type: ignore[misc]
            for order, done in zip(orders, (state.pairs, state.back), strict=True)
        ]
        progress = False
        for s_part, t_part in zip(*segments, strict=False):
            labels = [state.labels[0][s] for s in s_part]
            if len(set(labels)) < 2 or labels != [state.labels[1][t] for t in t_part]:
                continue
            if any(t in state.conflicts for t in t_part):
                continue
            for at, (s, t) in enumerate(zip(s_part, t_part, strict=True)):
                if labels[at] not in labels[max(at - 1, 0) : at] + labels[at + 1 : at + 2]:
                    state.decide(s, t, f"in step with its neighbours; {reason}", soft=True)
                    progress = True
        if progress:
            return True
    return False


def mostly_decided(state: Alignment) -> bool:
    """Whether at least half of the layers needed no tie-break: fewer would not say much about an order."""
    return len(state.pairs) - len(state.soft) >= max(SEEN, min(len(state.source.names), len(state.target.names)) // 2)


def defined_as_executed(state: Alignment, side: Side) -> bool:
    """Whether the definitions of `side`, which has no graph, follow the other side's graph at every decided edge.

    A row of more than `SEEN` edges must be among them: the order of a shorter one is too often right by chance.
    """
    here = state.back if side is state.source else state.pairs
    graph = state.target.graph if side is state.source else state.source.graph
    assert graph is not None
    if not state.ordered or not mostly_decided(state):
        return False
    length: dict[int, int] = {}  # of the longest row of decided layers that ends with each, in edges
    for node in graph.order:
        for b in graph.inputs[node]:
            if node in here and b in here and b not in graph.cyclic:
                if here[b] >= here[node]:
                    return False
                length[node] = max(length.get(node, 0), length.get(b, 0) + 1)
    return max(length.values(), default=0) > SEEN


def defined_among(state: Alignment, side: Side, members: Sequence[int], others: Sequence[int]) -> bool:
    """Whether every decided layer lies among the members of a group, by definition, where the other side's graph allows.

    members: of `side`, which has no graph; others: their candidates. A norm that is made first and called last, defined
    before layers that run before all its candidates, is found out by that.
    """
    here = state.back if side is state.source else state.pairs
    graph = state.target.graph if side is state.source else state.source.graph
    assert graph is not None
    before, after = graph.reach()
    candidates = sum(1 << other for other in others)
    for node, defined in here.items():
        earlier = sum(member < defined for member in members)
        least, most = (before[node] & candidates).bit_count(), len(others) - (after[node] & candidates).bit_count()
        if not least <= earlier <= most:
            return False
    return True


def same_numbers(state: Alignment, group: Group) -> bool:
    """Decide a group whose sources hold the same numbers: any pairing of them gives the same model."""
    try:
        first, *others = (state.source.layers[s].record for s in group.sources)
        if any(other != first for other in others):
            return False
    except (InvalidValue, Question):
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
