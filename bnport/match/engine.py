"""Aligning two sets of layers: candidate sets that evidence makes smaller until one candidate is left, or it is said.

The sides are partitioned by what two layers must share (channels, kernel), then by their place in the two graphs
(colour refinement), then by what orders them (paths in a graph, numbers in names). Where a set of candidates is left,
evidence that has proved itself on the layers already decided may break the tie: names that correspond elsewhere, an
order that agrees everywhere else. Two such witnesses that contradict each other decide nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, cast

from bnport.match import contents, guesses, names, ties
from bnport.match import graph as graphs

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bnport.layer import Kernel, Layer


class Side:
    """One of the two sets of layers, those that take part, by number."""

    __slots__ = ("by_contents", "graph", "index", "layers", "names", "numbering", "ordered", "tokens")

    def __init__(self, layers: Mapping[str, Layer], keep: Sequence[str]) -> None:
        self.names = list(keep)
        self.index = {name: i for i, name in enumerate(keep)}
        chosen = [layers[name] for name in keep]
        self.layers = guesses.proved(chosen)
        self.by_contents = guesses.proved(chosen, stem_shows=True)  # with the kernels whose contents may be compared
        self.tokens = [names.tokens(name) for name in keep]
        self.numbering = names.numbering(self.names)
        self.graph = graphs.build(layers, self.index)
        self.ordered = getattr(layers, "ordered", True)

    def intervals(self, members: Sequence[int]) -> tuple[list[int], list[int]]:
        """The range of ranks of each member, by the graph if it is known, else by numbers in names."""
        if self.graph is not None:
            return self.graph.intervals(members)
        return names.intervals([self.tokens[m] for m in members])


class Group(NamedTuple):
    """Sources and targets that evidence does not tell apart so far."""

    sources: list[int]
    targets: list[int]
    label: Hashable
    how: str  # what the members have in common


def kernel_key(kernel: Kernel | None) -> tuple[object, ...] | None:
    """What two kernels that feed the same layer share in every framework; None if nothing is known.

    Only the shape (a dense layer is a 1x1 convolution), and whether it is transposed: files
    without a graph do not tell grouped, depthwise and ordinary kernels apart.
    """
    if kernel is None:
        return None
    shape = kernel.shape[:2] if all(n == 1 for n in kernel.shape[2:]) else kernel.shape
    return (*shape, "transposed") if kernel.kind == "transposed" else tuple(shape)


class Alignment:
    """The state of one alignment. `pairs` is source -> target by number; `why` holds the words for each target."""

    def __init__(
        self,
        source: Side,
        target: Side,
        forced: Mapping[int, tuple[int, str]],
        *,
        guesses: bool = True,
        ordered: bool = True,
        strict: bool = False,
    ) -> None:
        self.source, self.target = source, target
        self.strict = strict  # nothing that may hold by chance counts: see `certain`
        self.guesses = guesses  # whether guessed kernels count
        self.ordered = ordered  # whether the order of definition may be that of execution
        self.pairs: dict[int, int] = {}
        self.back: dict[int, int] = {}
        self.why: dict[int, list[str]] = {}
        self.soft: set[int] = set()  # targets decided by a tie-break: they never vouch for another tie-break
        self.conflicts: dict[int, str] = {}  # targets whose candidates have contradicting evidence
        self.labels = self._labels()
        for t, (s, reason) in forced.items():
            self.decide(s, t, reason)

    def decide(self, s: int, t: int, reason: str, *, soft: bool = False) -> None:
        """Pair s with t."""
        self.pairs[s] = t
        self.back[t] = s
        self.why.setdefault(t, []).append(reason)
        if soft:
            self.soft.add(t)

    def withdraw(self, t: int) -> None:
        """Undo the pair of t."""
        self.soft.discard(t)
        del self.pairs[self.back.pop(t)]
        self.why.pop(t)

    def solid(self) -> list[tuple[int, int]]:
        """The pairs (source, target) that did not need a tie-break, in the order of the sources."""
        return [(s, t) for s, t in sorted(self.pairs.items()) if t not in self.soft]

    def kernel(self, layer: Layer) -> Kernel | None:
        """The kernel that feeds a layer as far as it counts as evidence."""
        return layer.kernel if self.guesses or layer.kernel is None or not layer.kernel.guessed else None

    def _labels(self) -> tuple[list[Hashable], list[Hashable]]:
        """What two layers must share to be candidates: channels, and the kernel where both sides know it alike.

        For the layers of one channel count the kernel counts if no kernel is unknown there, or as many on both sides.
        Where one is guessed, it counts if both sides have the same kernels, each equally often; and if a graph can show
        that a guess is off by one layer, where the one at the end of the row has none.
        """
        sides = [[(layer.channels, kernel_key(self.kernel(layer))) for layer in side.layers] for side in self._sides()]
        keys: dict[int, tuple[Counter[object], Counter[object]]] = {}
        for at, side in enumerate(sides):
            for channels, key in side:
                keys.setdefault(channels, (Counter(), Counter()))[at][key] += 1
        guessed = {
            layer.channels for side in self._sides() for layer in side.layers if layer.kernel and layer.kernel.guessed
        }
        drawn = any(side.graph is not None for side in self._sides())
        counts = {
            c: s == t and (drawn or None not in s) if c in guessed else self._as_unknown(s[None], t[None])
            for c, (s, t) in keys.items()
        }
        plain = [[(c, key if counts[c] else "any") for c, key in side] for side in sides]
        fed = [[self.kernel(layer) for layer in side.layers] for side in self._sides()]
        before = [[kernel.before if kernel else None for kernel in side] for side in fed]
        seen: list[dict[Hashable, list[str]]] = [{}, {}]
        for at, labels in enumerate(plain):
            for label, extents in zip(labels, before[at], strict=True):
                seen[at].setdefault(label, []).append(str(extents))
        alike = {label for label, found in seen[0].items() if sorted(found) == sorted(seen[1].get(label, ()))}
        out: list[list[Hashable]] = [
            [(*label, extents if label in alike else None) for label, extents in zip(labels, before[at], strict=True)]
            for at, labels in enumerate(plain)
        ]
        return out[0], out[1]

    def _as_unknown(self, here: int, there: int) -> bool:
        """Whether as many kernels are unknown on both sides; strictly, none."""
        return here == there == 0 if self.strict else here == there

    def _sides(self) -> tuple[Side, Side]:
        return self.source, self.target

    def run(self) -> None:
        """Decide all that can be decided."""
        progress = True
        while progress:
            progress = self._settle()
            if not progress and not self.strict:
                progress = any(ties.break_ties(self, part) for part in self.parts()) or ties.in_step(self)
                if progress:
                    self._withdraw_contradicted()

    def _settle(self) -> bool:
        before = len(self.pairs)
        for part in self.parts():
            if len(part.sources) == 1:
                self.decide(part.sources[0], part.targets[0], part.how)
        return len(self.pairs) > before

    @staticmethod
    def _even(group: Group) -> bool:
        return len(group.sources) == len(group.targets) > 0

    def groups(self) -> list[Group]:
        """The undecided layers as groups of candidates, by label and place in the graph, in the order of the targets."""
        by_label: dict[Hashable, tuple[list[int], list[int]]] = {}
        for at, (labels, done) in enumerate(zip(self.labels, (self.pairs, self.back), strict=True)):
            for node, label in enumerate(labels):
                if node not in done:
                    by_label.setdefault(label, ([], []))[at].append(node)
        colours = self._colours() if any(s and t for s, t in by_label.values()) else None
        out: list[Group] = []
        for label, (s, t) in by_label.items():
            common = describe(label)
            alone = len(s) == len(t) == 1 and self._never_more(label)
            whole = [Group(s, t, label, f"the only {common}" if alone else f"the {common} left")]
            if colours is not None and len(s) == len(t) > 1:
                out += self._by_place(whole[0], colours, common)
            else:
                out += whole
        return sorted(out, key=lambda g: g.targets[:1] or [len(self.target.names)])

    def parts(self) -> list[Group]:
        """The groups with as many sources as targets, cut further by what orders their members."""
        return [part for group in self.groups() if self._even(group) for part in self._by_rank(group)]

    def remaining(self) -> list[Group]:
        """All undecided layers as groups, cut by what orders them where a group has as many sources as targets."""
        return [part for group in self.groups() for part in (self._by_rank(group) if self._even(group) else [group])]

    def _never_more(self, label: Hashable) -> bool:
        return self.labels[0].count(label) == self.labels[1].count(label) == 1

    def _colours(self) -> tuple[list[int], list[int]] | None:
        if self.source.graph is None or self.target.graph is None:
            return None
        labels: list[list[Hashable]] = [list(side) for side in self.labels]
        for s, t in self.pairs.items():
            labels[0][s] = labels[1][t] = ("pair", s)
        first, second = graphs.refine([self.source.graph, self.target.graph], labels)
        return first, second

    def _by_place(self, group: Group, colours: tuple[list[int], list[int]], common: str) -> list[Group]:
        parts: dict[int, tuple[list[int], list[int]]] = {}
        for s in group.sources:
            parts.setdefault(colours[0][s], ([], []))[0].append(s)
        for t in group.targets:
            parts.setdefault(colours[1][t], ([], []))[1].append(t)
        how = f"same place in the graph, {common}"
        if all(len(s) == len(t) for s, t in parts.values()):
            return [Group(s, t, group.label, how) for s, t in parts.values()]
        return self._by_neighbours(group, common)

    def _by_neighbours(self, group: Group, common: str) -> list[Group]:
        """Where the graphs differ somewhere: a layer whose neighbours are all paired is the one between their pairs."""
        source, target = self.source.graph, self.target.graph
        assert source is not None
        assert target is not None
        parts: dict[Hashable, tuple[list[int], list[int]]] = {}
        for at, (members, graph, paired) in enumerate(
            ((group.sources, source, self.pairs), (group.targets, target, self.back))
        ):
            for node in members:
                around: Hashable = None
                if all(n in paired for n in (*graph.inputs[node], *graph.outputs[node])):
                    to_target = [
                        [paired[n] if at == 0 else n for n in side]
                        for side in (graph.inputs[node], graph.outputs[node])
                    ]
                    around = (frozenset(to_target[0]), frozenset(to_target[1]))
                parts.setdefault(around, ([], []))[at].append(node)
        how = f"between the same layers, {common}"
        fixed = [Group(s, t, group.label, how) for key, (s, t) in parts.items() if key is not None and len(s) == len(t)]
        rest_s = [s for s in group.sources if not any(s in g.sources for g in fixed)]
        rest_t = [t for t in group.targets if not any(t in g.targets for g in fixed)]
        return [*fixed, Group(rest_s, rest_t, group.label, f"the {common} left")] if rest_s or rest_t else fixed

    def _by_rank(self, group: Group) -> list[Group]:
        """Cut a group where both sides agree that these come before those."""
        if len(group.sources) == 1 or (self.strict and None in (self.source.graph, self.target.graph)):
            return [group]
        s_low, s_high = self.source.intervals(group.sources)
        t_low, t_high = self.target.intervals(group.targets)
        parts = cut(group, (s_low, s_high), (t_low, t_high), f"{group.how}, in the same order")
        if len(parts) > 1:
            return parts
        for side, other, members, others, low, high in (
            (self.source, self.target, group.sources, group.targets, s_low, s_high),
            (self.target, self.source, group.targets, group.sources, t_low, t_high),
        ):
            if side.graph is not None or other.graph is None or not ties.defined_as_executed(self, side):
                continue
            if not ties.defined_among(self, side, members, others):
                continue
            if not names.counted_otherwise([side.tokens[m] for m in members]):
                ranks = list(range(len(low)))  # the order of definition is total, and true wherever it was seen
                low[:], high[:] = ranks, ranks
                return cut(group, (s_low, s_high), (t_low, t_high), f"{group.how}, defined in the order of execution")
        return parts

    def _withdraw_contradicted(self) -> None:
        """Undo tie-breaks that the two graphs contradict: an edge between two pairs on one side and not on the other."""
        if self.source.graph is None or self.target.graph is None:
            return
        for t in sorted(self.soft):
            s = self.back[t]
            for near_s, near_t in (
                (self.source.graph.inputs[s], self.target.graph.inputs[t]),
                (self.source.graph.outputs[s], self.target.graph.outputs[t]),
            ):
                mapped = {self.pairs[n] for n in near_s if n in self.pairs}
                there = {n for n in near_t if n in self.back}
                if mapped != there:
                    self.conflicts[t] = "names or order say one thing, the graph another"
        for t in self.conflicts:
            if t in self.soft:
                self.withdraw(t)


def cut(
    group: Group, source: tuple[list[int], list[int]], target: tuple[list[int], list[int]], how: str
) -> list[Group]:
    """Split a group at every rank that no member's range of ranks crosses, on either side."""
    cuts = _cuts(*source) & _cuts(*target)
    if not cuts:
        return [group]
    borders = [0, *sorted(cuts), len(group.sources)]
    starts = {p: i for i, p in enumerate(borders)}
    parts: list[tuple[list[int], list[int]]] = [([], []) for _ in borders[:-1]]
    for at, (members, (_, high)) in enumerate(((group.sources, source), (group.targets, target))):
        rank_part, current = [], 0
        for p in range(len(members)):
            current = starts.get(p, current)
            rank_part.append(current)
        for member, rank in zip(members, high, strict=True):
            parts[rank_part[rank]][at].append(member)
    return [Group(s, t, group.label, how) for s, t in parts]


def _cuts(low: list[int], high: list[int]) -> set[int]:
    """Ranks p such that exactly p members must rank below p."""
    count = len(low)
    ends = [0] * (count + 1)
    for h in high:
        ends[h + 1] += 1
    found, below = set(), 0
    for p in range(1, count):
        below += ends[p]
        if below == p:
            found.add(p)
    return found


def describe(label: Hashable) -> str:
    """A label in words: '64-channel layer fed by a 3x3 kernel of 32 inputs'."""
    channels, key, before = cast("tuple[int, tuple[object, ...] | str | None, tuple[int, ...] | None]", label)
    text = f"{channels}-channel layer"
    if key is None or isinstance(key, str):
        return text
    shape = [n for n in key if n != "transposed"]
    if len(shape) < 2:
        return text
    size = "x".join(map(str, shape[2:])) or "1x1"
    size += f" after depthwise {'x'.join(map(str, before))}" if before else ""
    return f"{text} fed by a {size}{' transposed' if 'transposed' in key else ''} kernel over {shape[1]} inputs"


def align(source: Side, target: Side, forced: Mapping[str, tuple[str, str]], firm: set[str]) -> Alignment:
    """All that evidence decides. `forced` (target -> source, reason) is taken as given; `firm` even against contents.

    Guessed kernels count until a pair that they led to contradicts where the guess came from.
    """
    given = {target.index[t]: (source.index[s], why) for t, (s, why) in forced.items()}
    held = {t: pair for t, pair in given.items() if target.names[t] in firm}
    agreed = not guesses.refuted(source.layers) and not guesses.refuted(target.layers)
    ordered = agreed and source.ordered and target.ordered
    state = aligned(source, target, given, held, guesses=agreed, ordered=ordered)
    if agreed and guesses.contradicted(state):
        state = aligned(source, target, given, held, guesses=False, ordered=False)
    for part in state.parts():
        ties.same_numbers(state, part)
    return state


def aligned(
    source: Side,
    target: Side,
    given: Mapping[int, tuple[int, str]],
    held: Mapping[int, tuple[int, str]],
    *,
    guesses: bool,
    ordered: bool,
    strict: bool = False,
) -> Alignment:
    """All that evidence decides, in one go: the contents of kernels overrule what was decided without them."""
    state = Alignment(source, target, given, guesses=guesses, ordered=ordered, strict=strict)
    state.run()
    by_contents = contents.pairs(state)
    if by_contents:
        kept = dict(held)
        taken = {s for s, _ in kept.values()}
        kept |= {t: (s, "equal kernels") for s, t in by_contents.items() if t not in kept and s not in taken}
        taken = {s for s, _ in kept.values()}
        kept |= {t: v for t, v in given.items() if t not in kept and v[0] not in taken}
        state = Alignment(source, target, kept, guesses=guesses, ordered=ordered, strict=strict)
        state.run()
    return state
