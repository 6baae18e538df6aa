"""The BatchNorm layers of one model as a directed graph, and colour refinement over two of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bnport.layer import Layer


class Graph:
    """inputs[i] are the nodes whose output reaches node i with no other node between; outputs is its inverse.

    order: nodes so that inputs come first, wherever the graph has no cycle. cyclic: nodes on a cycle (shared layers).
    """

    __slots__ = ("_reach", "cyclic", "inputs", "order", "outputs")

    def __init__(self, inputs: list[list[int]]) -> None:
        self.inputs = inputs
        self.outputs: list[list[int]] = [[] for _ in inputs]
        for node, before in enumerate(inputs):
            for b in before:
                self.outputs[b].append(node)
        self.order, self.cyclic = self._sort()
        self._reach: tuple[list[int], list[int]] | None = None

    def _sort(self) -> tuple[list[int], set[int]]:
        """Tarjan's strongly connected components without recursion, in topological order."""
        count = len(self.inputs)
        index, low, on_stack = [-1] * count, [0] * count, [False] * count
        stack: list[int] = []
        order: list[int] = []
        cyclic: set[int] = set()
        clock = 0
        for root in range(count):
            if index[root] >= 0:
                continue
            work = [(root, 0)]
            while work:
                node, at = work.pop()
                if at == 0:
                    index[node] = low[node] = clock
                    clock += 1
                    stack.append(node)
                    on_stack[node] = True
                descend = False
                for i in range(at, len(self.inputs[node])):
                    other = self.inputs[node][i]
                    if index[other] < 0:
                        work += [(node, i + 1), (other, 0)]
                        descend = True
                        break
                    if on_stack[other]:
                        low[node] = min(low[node], index[other])
                if descend:
                    continue
                if low[node] == index[node]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack[member] = False
                        component.append(member)
                        if member == node:
                            break
                    order += component
                    if len(component) > 1 or node in self.inputs[node]:
                        cyclic.update(component)
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
        return order, cyclic

    def reach(self) -> tuple[list[int], list[int]]:
        """(ancestors, descendants) of every node as bit sets; nodes on cycles are left out of them."""
        if self._reach is None:
            ancestors, descendants = [0] * len(self.inputs), [0] * len(self.inputs)
            for node in self.order:
                for b in self.inputs[node]:
                    ancestors[node] |= ancestors[b] | (0 if b in self.cyclic else 1 << b)
            for node in reversed(self.order):
                for a in self.outputs[node]:
                    descendants[node] |= descendants[a] | (0 if a in self.cyclic else 1 << a)
            self._reach = ancestors, descendants
        return self._reach

    def intervals(self, members: Sequence[int]) -> tuple[list[int], list[int]]:
        """How early and how late each member can rank in an order of execution: (lowest, highest inclusive)."""
        ancestors, descendants = self.reach()
        mask = 0
        for m in members:
            mask |= 1 << m
        last = len(members) - 1
        return (
            [(ancestors[m] & mask).bit_count() for m in members],
            [last - (descendants[m] & mask).bit_count() for m in members],
        )


def build(layers: Mapping[str, Layer], keep: Mapping[str, int]) -> Graph | None:
    """The graph of the layers in `keep` (name -> node); a layer that is not kept is bridged: its inputs stand for it.

    None unless every layer that is kept, or bridged, knows its inputs. Names of layers that are not there are ignored.
    """
    if any(layers[name].inputs is None for name in keep):
        return None
    unknown = {name for name, layer in layers.items() if layer.inputs is None}
    if unknown and any(n in unknown for layer in layers.values() for n in layer.inputs or ()):
        return None
    bridged: dict[str, dict[int, None]] = {}

    def resolve(name: str) -> dict[int, None]:
        work = [name]
        open_: set[str] = set()
        while work:
            current = work[-1]
            if current in bridged:
                work.pop()
                continue
            needed = [n for n in layers[current].inputs or () if n in layers and n not in keep and n not in bridged]
            needed = [n for n in needed if n not in open_]
            if needed:
                open_.add(current)
                work += needed
                continue
            found: dict[int, None] = {}
            for n in layers[current].inputs or ():
                if n in keep:
                    found[keep[n]] = None
                else:
                    found.update(bridged.get(n, {}))
            bridged[current] = found
            work.pop()
        return bridged[name]

    return Graph([list(resolve(name)) for name in keep])


def refine(graphs: Sequence[Graph], labels: Sequence[list[Hashable]]) -> list[list[int]]:
    """Colours of the nodes of all graphs such that equal colours have equal labels and equally coloured neighbours.

    Weisfeiler and Leman's colour refinement. Each pass goes once down and once up the order of execution, so that a
    chain settles in two or three passes however long it is; nodes on cycles see their neighbours of the pass before.
    """
    colours, classes = _interned(labels)
    while True:
        down = _pass(graphs, colours, forward=True)
        both = _pass(graphs, down, forward=False)
        refined, count = _interned(both)
        if count == classes:
            return refined
        colours, classes = refined, count


def _interned(labels: Sequence[Sequence[Hashable]]) -> tuple[list[list[int]], int]:
    numbers: dict[Hashable, int] = {}
    out = [[numbers.setdefault(label, len(numbers)) for label in side] for side in labels]
    return out, len(numbers)


def _pass(graphs: Sequence[Graph], colours: Sequence[list[int]], *, forward: bool) -> list[list[int]]:
    numbers: dict[Hashable, int] = {}
    out = []
    for graph, own in zip(graphs, colours, strict=True):
        new = [0] * len(own)
        near = graph.inputs if forward else graph.outputs
        for node in graph.order if forward else reversed(graph.order):
            around = sorted(
                (0, own[n]) if n in graph.cyclic and node in graph.cyclic else (1, new[n]) for n in near[node]
            )
            new[node] = numbers.setdefault((own[node], tuple(around)), len(numbers))
        out.append(new)
    return out
