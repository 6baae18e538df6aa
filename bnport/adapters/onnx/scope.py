"""Names and what they stand for: constants followed to where their numbers are stored, or the reason why there are none.

A name is looked up in its graph, then through the call of the function or the graphs around it. Only position decides
which parameter a value is; the name of an initializer proves nothing (exporters share equal tensors between roles).
"""

from __future__ import annotations

import math
from functools import partial

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.adapters.onnx.tensors import DTYPES, FLOATS
from bnport.errors import FormatError, printable
from bnport.rounding import round_to

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.adapters.onnx.model import Attribute, Graph, Model, Node
    from bnport.adapters.onnx.tensors import Stored
    from bnport.containers.protobuf import Numbers
    from bnport.containers.tensor import Tensor
    from bnport.record import Array

MOST_STEPS = 64  # nodes between a BatchNormalization and the tensor that it uses
_MOST_COMPARED = 1 << 16  # values looked at while a model is only listed

# what nodes on the way to a mean or variance say when there is no constant at the end
_OF_THE_BATCH = {
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "MeanVarianceNormalization",
    "GlobalAveragePool",
}


class Known(NamedTuple):
    """A constant. `shape` None: one value, to be repeated for as many channels as the layer has."""

    dtype: str
    shape: tuple[int, ...] | None
    array: Callable[[], Array]
    stored: Stored | None = None  # where exactly these numbers lie, if anywhere
    tensor: Tensor | None = None  # and how to read them
    through: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        """How many numbers; None for one value to be repeated."""
        return None if self.shape is None else math.prod(self.shape)


class Unknown(NamedTuple):
    """Not a constant, and why: "is fed at run time (graph input 'x')"."""

    why: str
    batch: bool = False  # computed from the batch itself


class Scope:
    """A graph where names are looked up: the main graph, a subgraph within `parent`, or a function body as called."""

    __slots__ = (
        "attributes",
        "bindings",
        "found",
        "function",
        "graph",
        "label",
        "model",
        "opset",
        "parent",
        "producers",
        "reach",
    )

    def __init__(
        self,
        model: Model,
        graph: Graph,
        *,
        parent: Scope | None = None,
        bindings: dict[str, tuple[Scope, str]] | None = None,
        attributes: dict[str, Attribute] | None = None,
        opset: int = 1,
        label: str = "",
    ) -> None:
        self.model, self.graph, self.parent, self.opset, self.label = model, graph, parent, opset, label
        self.function: bool = bindings is not None or (parent is not None and parent.function)  # in the body of one
        self.bindings = bindings or {}  # of a function: formal input -> (calling scope, name there)
        self.attributes = attributes or {}  # of a function: name -> as called, or its default
        self.producers = _producers(graph)
        self.found: dict[str, Known | Unknown] = {}  # of outputs of nodes; a node may take one of them twice
        self.reach: dict[str, frozenset[int]] = {}  # BatchNorm layers by number that reach a value with none between

    def origin(self, name: str) -> tuple[Scope, str]:
        """The scope and name where a value is made, out of this function and into the graphs around this one."""
        scope = self
        while True:
            if name in scope.producers or name in scope.graph.names or name in scope.graph.sparse:
                return scope, name
            if name in scope.bindings:
                scope, name = scope.bindings[name]
            elif name in scope.graph.inputs or scope.parent is None:
                return scope, name
            else:
                scope = scope.parent

    def around(self, name: str) -> Scope | None:
        """The next graph around this one that defines the name too, which ONNX forbids; None if there is none."""
        at = self.parent
        while at is not None and not (
            name in at.producers or name in at.graph.names or name in at.graph.sparse or name in at.graph.inputs
        ):
            at = at.parent
        return at

    def constant(self, name: str) -> Known | Unknown:
        """The constant that a name stands for. FormatError for a name that nothing defines, or damaged tensors."""
        return self._constant(name, MOST_STEPS)

    def _constant(self, name: str, steps: int) -> Known | Unknown:
        scope, name = self.origin(name)
        if steps == 0:
            return Unknown(f"lies behind more than {MOST_STEPS} nodes")
        if scope.around(name) is not None:
            return Unknown(defined_twice(name))
        stored = scope.graph.initializer(name)
        if stored is not None and name not in scope.producers:
            return _as_stored(stored, scope.model.folder)
        if name in scope.graph.sparse:
            return Unknown(f"is the sparse initializer {printable(name)!r}")
        if name in scope.producers:
            if stored is not None:
                raise _bad(scope, f"{printable(name)!r} is an initializer and the output of a node")
            if name not in scope.found:
                scope.found[name] = _of_node(scope, scope.producers[name], steps - 1)
            return scope.found[name]
        if name in scope.graph.inputs:
            where = "graph input" if scope.parent is None else "input of a subgraph"
            return Unknown(f"is fed at run time ({where} {printable(name)!r})")
        raise _bad(scope, f"nothing defines {printable(name)!r}: no initializer, node or input of that name")

    def kind(self, name: str) -> int:
        """The data type of a value, 0 where the file does not state it."""
        scope, name = self.origin(name)
        stored = scope.graph.initializer(name)
        return scope.graph.kind(name) if stored is None else stored.kind

    def attribute(self, node: Node, name: str) -> Attribute | None:
        """A node's attribute, through the call where it stands for one of the function's."""
        found = node.attributes.get(name)
        if found is not None and found.reference:
            return self.attributes.get(found.reference)
        return found


def defined_twice(name: str) -> str:
    """What is wrong with a name that `Scope.around` finds."""
    return f"is {printable(name)!r}, a name that a graph and one within it define: engines differ in which counts"


def _producers(graph: Graph) -> dict[str, Node]:
    producers: dict[str, Node] = {}
    for node in graph.nodes:
        for output in node.outputs:
            if output:
                if output in producers:
                    raise FormatError(
                        f"{printable(graph.place.buffer.name)}: two nodes make {printable(output)!r}:"
                        f" {printable(producers[output].shown)} and {printable(node.shown)}"
                    )
                producers[output] = node
    return producers


def _bad(scope: Scope, why: str) -> FormatError:
    return FormatError(f"{printable(scope.model.source)}: {why}")


def _as_stored(stored: Stored, folder: str | None) -> Known:
    tensor = stored.tensor(folder)
    return Known(tensor.dtype, tensor.shape, tensor.array, stored, tensor)


def _of_node(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    if node.domain == "" and node.op in _FOLLOWED:
        found = _FOLLOWED[node.op](scope, node, steps)
        return found._replace(through=(*found.through, node.op)) if isinstance(found, Known) else found
    return Unknown(
        f"is computed at run time by {printable(node.op)} (node {printable(node.shown)!r})", of_batch(scope, node)
    )


def of_batch(scope: Scope, node: Node) -> bool:
    """Whether a reduction lies within a few nodes above: then it is a statistic of the batch."""
    level = [(scope, node)]
    for _ in range(8):
        following = []
        for at, each in level:
            if each.op in _OF_THE_BATCH:
                return True
            for name in each.inputs:
                inner, origin = at.origin(name)
                if origin in inner.producers:
                    following.append((inner, inner.producers[origin]))
        level = following[:16]
    return False


def _input(scope: Scope, node: Node, position: int, steps: int) -> Known | Unknown:
    if position >= len(node.inputs) or not node.inputs[position]:
        raise _bad(scope, f"node {printable(node.shown)!r} ({printable(node.op)}) lacks input {position}")
    return scope._constant(node.inputs[position], steps)


def _ints(scope: Scope, node: Node, position: int, steps: int) -> tuple[int, ...] | None:
    """A small integer input that is a constant: a shape."""
    found = _input(scope, node, position, steps)
    if isinstance(found, Unknown) or found.size is None or found.size > MOST_STEPS:
        return None
    return tuple(int(n) for n in found.array().ravel())


def _pass(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    return _input(scope, node, 0, steps)


def _constant_node(scope: Scope, node: Node, steps: int) -> Known | Unknown:  # noqa: ARG001
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attribute = scope.attribute(node, name)
        if attribute is None:
            continue
        if attribute.tensor is not None:
            return _as_stored(attribute.tensor, scope.model.folder)
        if attribute.f is not None or attribute.i is not None:
            dtype = "int64" if attribute.f is None else "float32"
            return Known(dtype, (), partial(_array, attribute.i if attribute.f is None else attribute.f, dtype))
        if attribute.floats is not None:
            return Known("float32", (attribute.floats.count,), partial(_floats, attribute.floats))
        if attribute.ints is not None:
            return Known("int64", (len(attribute.ints),), partial(_array, attribute.ints, "int64"))
    return Unknown(f"is a Constant (node {printable(node.shown)!r}) of a kind that holds no plain numbers")


def _array(values: object, dtype: str) -> Array:
    return np.array(values, dtype)


def _floats(numbers: Numbers) -> Array:
    return np.frombuffer(numbers.read(), "<f4").astype(np.float32)


def _cast(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    found = _input(scope, node, 0, steps)
    to = scope.attribute(node, "to")
    return _rounded(found, node, to.i if to is not None and to.i is not None else -1)


def _cast_like(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    found = _input(scope, node, 0, steps)
    like = node.inputs[1] if len(node.inputs) > 1 else ""
    kind = scope.kind(like)
    if kind or isinstance(found, Unknown):
        return _rounded(found, node, kind)
    if _the_same_in_every_type(found):
        return found
    return Unknown(
        f"is cast to the type of {printable(like)!r} (node {printable(node.shown)!r}), which the file does not state"
        " (onnx.shape_inference.infer_shapes adds it)"
    )


def _the_same_in_every_type(found: Known) -> bool:
    """Whether the values are exact in every floating-point type, as 0 and 1 are, which exporters write for affine=False."""
    if found.dtype not in FLOATS or (found.size or 1) > _MOST_COMPARED:
        return False
    array = found.array()
    return all(np.array_equal(round_to(array, dtype), array) for dtype in FLOATS)


def _rounded(found: Known | Unknown, node: Node, kind: int) -> Known | Unknown:
    if isinstance(found, Unknown):
        return found
    if DTYPES.get(kind) == found.dtype:
        return found
    if DTYPES.get(kind) not in FLOATS:
        return Unknown(f"is cast to data type {kind} (node {printable(node.shown)!r}), which is no float")
    dtype = DTYPES[kind]
    return Known(dtype, found.shape, lambda: round_to(found.array(), dtype))


def _expand(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    found = _input(scope, node, 0, steps)
    if isinstance(found, Unknown):
        return found
    shape = _ints(scope, node, 1, steps)
    if shape is None:
        if found.size in (1, None):
            return Known(found.dtype, None, lambda: found.array().reshape(-1)[:1])
        return Unknown(f"is expanded to a shape known at run time only (node {printable(node.shown)!r})")
    size = found.size
    if size is None or size == 1:
        return _filled(scope, node, found.dtype, shape, lambda: found.array().reshape(-1)[:1])
    if all(n in (1, size) for n in shape) and sum(n == size for n in (found.shape or ())) == 1:
        return found
    return Unknown(f"is expanded from {size} numbers to {list(shape)} (node {printable(node.shown)!r})")


def _filled(
    scope: Scope, node: Node, dtype: str, shape: tuple[int, ...], value: Callable[[], Array]
) -> Known | Unknown:
    if any(length < 0 for length in shape):
        raise _bad(scope, f"node {printable(node.shown)!r} makes the impossible shape {list(shape)}")
    total = math.prod(shape)
    if total > 1 << 24:  # nothing is allocated for a size that somebody only declared
        return Unknown(f"is one value repeated {total} times (node {printable(node.shown)!r})")
    return Known(dtype, shape, lambda: np.broadcast_to(value().reshape(()), shape).copy())


def _constant_of_shape(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    attribute = scope.attribute(node, "value")
    dtype: str = "float32"
    value: Callable[[], Array] = partial(_array, (0.0,), dtype)
    if attribute is not None and attribute.tensor is not None:
        held = _as_stored(attribute.tensor, scope.model.folder)
        if held.size != 1:
            raise _bad(scope, f"node {printable(node.shown)!r}: ConstantOfShape holds {held.size} values, not one")
        dtype, value = held.dtype, held.array
    shape = _ints(scope, node, 0, steps)
    if shape is None:
        return Known(dtype, None, lambda: value().reshape(-1)[:1])
    return _filled(scope, node, dtype, shape, value)


def _flat(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    """Reshape, Squeeze, Unsqueeze, Flatten: the same numbers in the same order."""
    found = _input(scope, node, 0, steps)
    if isinstance(found, Unknown) or found.size is None:
        return found
    size = found.size
    return Known(found.dtype, (size,), lambda: found.array().reshape(-1), found.stored, None, found.through)


def _transpose(scope: Scope, node: Node, steps: int) -> Known | Unknown:
    found = _input(scope, node, 0, steps)
    if isinstance(found, Unknown) or found.shape is None:
        return found
    rank = len(found.shape)
    given = scope.attribute(node, "perm")
    order = tuple(range(rank))[::-1] if given is None or given.ints is None else given.ints
    if sorted(order) != list(range(rank)):
        raise _bad(scope, f"node {printable(node.shown)!r}: Transpose by {list(order)[:8]} of {rank} dimensions")
    shape = tuple(found.shape[k] for k in order)
    return Known(found.dtype, shape, lambda: found.array().transpose(order))


_FOLLOWED = {
    "Identity": _pass, "CastLike": _cast_like, "Constant": _constant_node, "Cast": _cast,
    "Expand": _expand, "ConstantOfShape": _constant_of_shape, "Reshape": _flat, "Squeeze": _flat, "Unsqueeze": _flat,
    "Flatten": _flat, "Transpose": _transpose,
}  # fmt: skip
