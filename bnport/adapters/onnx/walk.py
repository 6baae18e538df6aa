"""Every BatchNormalization of a model, in the order in which they run: in graphs, subgraphs and the bodies of functions.

A function that is called twice is two places. Along the way it is noted which layers reach which with none between.
"""

from __future__ import annotations

from collections import Counter

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.adapters.onnx.model import MOST_NODES, Graph
from bnport.adapters.onnx.scope import Known, Scope, of_batch
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from bnport.adapters.onnx.model import Model, Node

BATCHNORM = "BatchNormalization"
AFFINE_MARK = "/batchnorm/"  # TensorFlow's name scope of the operations that make up a BatchNorm, kept by tf2onnx
_ARITHMETIC = ("Add", "Div", "Mul", "Neg", "Reciprocal", "Sqrt", "Sub")  # those operations, as far as none is folded
DEEPEST = 40  # graphs within graphs, functions within functions
MOST_SCOPES = 20_000  # calls and subgraphs entered; a function that calls another twice doubles at every level
_MOST_REACHING = 2_000_000  # names in all of `inputs`; past that the graph is not evidence anybody can use


class Affine(NamedTuple):
    """x * slope + intercept: the names of x and the constants; no intercept where the exporter left out zeros."""

    x: str
    slope: str
    intercept: str | None


class Found(NamedTuple):
    """A layer's node in its scope; `affine` is of one that was taken apart into Mul and Add, then `node` is the last."""

    node: Node
    scope: Scope
    inputs: frozenset[int]
    affine: Affine | None = None


class Walk:
    """found: the layers; scopes: all that were entered; weighted: (scope, node) of every node with weights."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found: list[Found] = []
        self.scopes: list[Scope] = []
        self.weighted: list[tuple[Scope, Node]] = []
        self.foreign: list[Node] = []  # nodes of that name in another domain
        self.of_batch: list[str] = []  # normalisations by TensorFlow's names that compute their statistics: no layers
        self.entered = _with_batchnorm(model)  # functions; others are passed over
        self._left: dict[Scope, Counter[str | None]] = {}  # the arithmetic of each BatchNorm by TensorFlow's names
        self._visited = 0
        self._reaching = 0
        self.main = Scope(model, model.graph, opset=model.opset)
        self._graph(self.main, 0)

    @property
    def graph_known(self) -> bool:
        """Whether `inputs` of what was found is complete."""
        return self._reaching <= _MOST_REACHING

    def _graph(self, scope: Scope, depth: int) -> None:
        if depth > DEEPEST:
            raise FormatError(f"{printable(self.model.source)}: graphs or functions nested more than {DEEPEST} deep")
        self.scopes.append(scope)
        if len(self.scopes) > MOST_SCOPES:
            raise FormatError(f"{printable(self.model.source)}: more than {MOST_SCOPES} calls and subgraphs to look at")
        for node in scope.graph.nodes:
            self._visited += 1
            if self._visited > MOST_NODES:
                raise FormatError(f"{printable(self.model.source)}: more than {MOST_NODES} nodes to look at")
            reaching = self._union(_reach(scope, name) for name in node.inputs if name)
            key = (node.domain, node.op, node.overload)
            if node.op == BATCHNORM and node.domain == "":
                reaching = self._add(Found(node, scope, reaching))
            elif key in self.entered:
                self._call(scope, node, reaching, depth)
                continue
            elif node.domain == "" and node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                self.weighted.append((scope, node))
            elif node.domain == "" and node.op in ("Add", "Mul") and _part_of(node) is not None:
                affine = _affine(scope, node) if node.op == "Add" else self._without_intercept(scope, node)
                if affine is not None:
                    reaching = self._add(Found(node, scope, reaching, affine))
            elif node.domain == "" and node.op == "Sqrt" and _part_of(node) is not None and of_batch(scope, node):
                self.of_batch.append(scope.label + (_part_of(node) or node.shown))
            elif node.op == BATCHNORM:
                self.foreign.append(node)
            for label, place in node.subgraphs():
                reaching = self._subgraph(scope, node, label, Graph(place), reaching, depth)
            if reaching:
                scope.reach.update(dict.fromkeys(node.outputs, reaching))

    def _add(self, found: Found) -> frozenset[int]:
        self.found.append(found)
        self._reaching += len(found.inputs)
        return frozenset((len(self.found) - 1,))

    def _union(self, sets: object) -> frozenset[int]:
        if not self.graph_known:
            return frozenset()
        distinct = {id(s): s for s in sets if s}  # type: ignore[attr-defined]
        if len(distinct) < 2:
            return next(iter(distinct.values()), frozenset())
        self._reaching += sum(map(len, distinct.values()))
        return frozenset().union(*distinct.values()) if self.graph_known else frozenset()

    def _without_intercept(self, scope: Scope, mul: Node) -> Affine | None:
        """The affine of a Mul that is all that is left of its BatchNorm: what computes statistics too is no affine."""
        if scope not in self._left:
            self._left[scope] = Counter(_part_of(node) for node in scope.graph.nodes if node.op in _ARITHMETIC)
        factor = _slope(scope, mul)
        return Affine(*factor, None) if factor and self._left[scope][_part_of(mul)] == 1 else None

    def _subgraph(
        self, scope: Scope, node: Node, label: str, graph: Graph, reaching: frozenset[int], depth: int
    ) -> frozenset[int]:
        inner = Scope(
            self.model,
            graph,
            parent=scope,
            attributes=scope.attributes,
            opset=scope.opset,
            label=f"{scope.label}{node.shown}/{label}/",
        )
        inner.reach.update(dict.fromkeys(graph.inputs, reaching))
        self._graph(inner, depth + 1)
        return self._union([reaching, *(_reach(inner, name) for name in graph.outputs)])

    def _call(self, scope: Scope, node: Node, reaching: frozenset[int], depth: int) -> None:
        function = self.model.functions[node.domain, node.op, node.overload]
        attributes = dict(function.defaults)
        for name in node.attributes:
            given = scope.attribute(node, name)
            if given is not None:
                attributes[name] = given
        body = function.body
        inner = Scope(
            self.model,
            body,
            bindings={
                formal: (scope, actual) for formal, actual in zip(body.inputs, node.inputs, strict=False) if actual
            },
            attributes=attributes,
            opset=function.opset,
            label=f"{scope.label}{node.shown}/",
        )
        for formal, (_, actual) in inner.bindings.items():
            inner.reach[formal] = _reach(scope, actual)
        self._graph(inner, depth + 1)
        for formal, actual in zip(body.outputs, node.outputs, strict=False):
            scope.reach[actual] = _reach(inner, formal) or (frozenset() if formal in inner.producers else reaching)


def _with_batchnorm(model: Model) -> set[tuple[str, str, str]]:
    """The functions that hold a BatchNormalization, or may: themselves, in a subgraph, or in one that they call."""
    callers: dict[tuple[str, str, str], set[tuple[str, str, str]]] = {}
    found = set()
    for key, function in model.functions.items():
        for node in function.body.nodes:
            called = (node.domain, node.op, node.overload)
            if node.op == BATCHNORM or any(True for _ in node.subgraphs()):
                found.add(key)
            elif called in model.functions:
                callers.setdefault(called, set()).add(key)
    level = set(found)
    while level:
        level = {caller for key in level for caller in callers.get(key, ())} - found
        found |= level
    return found


def _reach(scope: Scope, name: str) -> frozenset[int]:
    at: Scope | None = scope
    while at is not None:
        if name in at.reach:
            return at.reach[name]
        at = at.parent
    return frozenset()


def _part_of(node: Node) -> str | None:
    """The BatchNorm of which TensorFlow's names say that the node is a part; None if they say nothing."""
    return next((n.rpartition(AFFINE_MARK)[0] for n in (node.name, *node.outputs) if AFFINE_MARK in n), None)


def _slope(scope: Scope, mul: Node) -> tuple[str, str] | None:
    """(x, slope) of a Mul with exactly one constant."""
    if len(mul.inputs) != 2:
        return None
    constant = [isinstance(scope.constant(name), Known) for name in mul.inputs]
    return (mul.inputs[constant[0]], mul.inputs[constant[1]]) if sum(constant) == 1 else None


def _affine(scope: Scope, add: Node) -> Affine | None:
    """x * slope + intercept, if `add` is the end of one by TensorFlow's names."""
    for product, intercept in (add.inputs, add.inputs[::-1]) if len(add.inputs) == 2 else ():
        mul = scope.producers.get(product)
        if mul is None or mul.op != "Mul" or mul.domain or _part_of(mul) != _part_of(add):
            continue
        factor = _slope(scope, mul)
        if factor and isinstance(scope.constant(intercept), Known):
            return Affine(*factor, intercept)
    return None
