"""ONNX messages as ranges of bytes: models, graphs, nodes, attributes and tensors, each looked into when asked.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.adapters.onnx.tensors import EXTERNAL, Stored
from bnport.containers.files import ReadFile
from bnport.containers.protobuf import FIXED32, LENGTH, VARINT, Buffer, Numbers, fields, signed, varints
from bnport.errors import FormatError, InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, KeysView
    from typing import Any

    from bnport.containers.protobuf import Span, Value

DEFAULT_DOMAIN = ("", "ai.onnx")
MOST_NODES = 300_000  # of real models, unrolled ones of some 100 000 nodes are the largest
_MOST_VALUES = 1 << 20  # in an attribute
_WITH_SUBGRAPHS = {"If", "Loop", "Scan", "SequenceMap"}

# ModelProto: number -> wire type
MODEL_FIELDS = {1: VARINT, 2: LENGTH, 3: LENGTH, 4: LENGTH, 5: VARINT, 6: LENGTH, 7: LENGTH, 8: LENGTH, 14: LENGTH,
                20: LENGTH, 25: LENGTH, 26: LENGTH}  # fmt: skip


class Place(NamedTuple):
    """Where a message lies: a buffer, its span, and the spans of it and all that enclose it but the top level."""

    buffer: Buffer
    span: Span
    path: tuple[Span, ...]

    def fields(self) -> Iterator[tuple[int, int, Value]]:
        """Its fields, as containers.protobuf.fields gives them."""
        return fields(self.buffer, self.span[0], self.span[0] + self.span[1], len(self.path))

    def inner(self, value: Value) -> Place:
        """The message that lies in one of its LENGTH fields."""
        return Place(self.buffer, self.bytes_of(value), (*self.path, self.bytes_of(value)))

    def bytes_of(self, value: Value) -> Span:
        """A value that must be bytes."""
        if isinstance(value, int):
            raise self.buffer.error(self.span[0], "a message or a name was expected, the field holds an integer")
        return value

    def integer(self, value: Value, bits: int = 64) -> int:
        """An int64 (or int32, by `bits`) field."""
        if not isinstance(value, int):
            raise self.buffer.error(value[0], "an integer was expected, the field holds bytes")
        return signed(value, bits)

    def text(self, value: Value) -> str:
        """A string field."""
        return self.buffer.text(self.bytes_of(value))


def whole(buffer: Buffer) -> Place:
    """The top-level message of a buffer."""
    return Place(buffer, (0, buffer.size), ())


class Attribute(NamedTuple):
    """An AttributeProto: what of it is there. `f_span` is where a float lies, for writing."""

    name: str
    place: Place
    f: float | None = None
    f_span: Span | None = None
    i: int | None = None
    tensor: Stored | None = None
    graph: Place | None = None
    graphs: tuple[Place, ...] = ()
    floats: Numbers | None = None
    ints: tuple[int, ...] | None = None
    reference: str = ""  # the attribute of the enclosing function that it stands for
    other: bool = False  # a string, sparse tensor or type


def _attribute(place: Place) -> Attribute:
    found: dict[str, Any] = {}
    graphs: list[Place] = []
    floats = Numbers(place.buffer, 4)
    ints: list[int] = []
    name, kind = "", 0
    for number, wire, value in place.fields():
        if number == 1:
            name = place.text(value)
        elif number == 21:
            found["reference"] = place.text(value)
        elif number == 20 and isinstance(value, int):
            kind = value
        elif number == 2:
            if wire != FIXED32:
                raise place.buffer.error(place.span[0], f"attribute {name}: a float was expected")
            found["f_span"] = place.bytes_of(value)
            found["f"] = place.buffer.float32(place.bytes_of(value))
        elif number == 3:
            found["i"] = place.integer(value)
        elif number == 5:
            found["tensor"] = Stored(place.inner(value), name)
        elif number == 6:
            found["graph"] = place.inner(value)
        elif number == 11:
            graphs.append(place.inner(value))
        elif number == 7:
            floats.add(wire, value)
        elif number == 8:
            ints += varints(place.buffer, wire, value, _MOST_VALUES)
            if len(ints) > _MOST_VALUES:
                raise place.buffer.error(place.span[0], f"attribute {name}: more than {_MOST_VALUES} integers")
        elif number in (4, 9, 10, 14, 15, 22, 23):
            found["other"] = True
    # proto3 leaves a zero and an empty list out; the type says which was meant
    if kind == 1:
        found.setdefault("f", 0.0)
    elif kind == 2:
        found.setdefault("i", 0)
    if floats.count or kind == 6:
        found["floats"] = floats
    if ints or kind == 7:
        found["ints"] = tuple(ints)
    return Attribute(name, place, graphs=tuple(graphs), **found)


class Node:
    """A NodeProto. Attributes and metadata are parsed when asked for."""

    __slots__ = ("_attributes", "_metadata", "_spans", "domain", "inputs", "name", "op", "outputs", "overload", "place")

    def __init__(self, place: Place) -> None:
        self._attributes: dict[str, Attribute] | None = None
        self.place = place
        self.op = self.domain = self.name = self.overload = ""
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._spans: list[Value] = []
        self._metadata: list[Value] = []
        for number, _, value in place.fields():
            if number == 5:
                self._spans.append(value)
            elif number == 1:
                self.inputs.append(place.text(value))
            elif number == 2:
                self.outputs.append(place.text(value))
            elif number == 3:
                self.name = place.text(value)
            elif number == 4:
                self.op = place.text(value)
            elif number == 7:
                self.domain = place.text(value)
            elif number == 8:
                self.overload = place.text(value)
            elif number == 9:
                self._metadata.append(value)
        if self.domain == "ai.onnx":
            self.domain = ""

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Its attributes by name; FormatError for a name that is there twice."""
        if self._attributes is None:
            place = self.place
            self._attributes = {}
            for value in self._spans:
                attribute = _attribute(place.inner(value))
                if attribute.name in self._attributes:
                    raise place.buffer.error(place.span[0], f"node {self.name!r}: two attributes {attribute.name!r}")
                self._attributes[attribute.name] = attribute
        return self._attributes

    @property
    def metadata(self) -> dict[str, str]:
        """metadata_props: what the exporter said about this node."""
        place = self.place
        return dict(_key_and_value(place.inner(value)) for value in self._metadata)

    @property
    def shown(self) -> str:
        """Its name, or where it has none its first output, for messages and as a layer's name."""
        return self.name or next((o for o in self.outputs if o), "") or self.op

    def subgraphs(self) -> Iterator[tuple[str, Place]]:
        """(attribute name, graph) of what If, Loop, Scan and nodes of other domains hold."""
        if self._spans and (self.op in _WITH_SUBGRAPHS or self.domain):
            for attribute in self.attributes.values():
                if attribute.graph is not None:
                    yield attribute.name, attribute.graph
                for k, place in enumerate(attribute.graphs):
                    yield f"{attribute.name}{k}", place


def _key_and_value(place: Place) -> tuple[str, str]:
    pair = {1: "", 2: ""}
    for number, _, value in place.fields():
        if number in pair:
            pair[number] = place.buffer.text(place.bytes_of(value), "metadata", 1 << 20)
    return pair[1], pair[2]


class Graph:
    """A GraphProto or the body of a function: its nodes, and its initializers by name, none of them read."""

    __slots__ = ("_initializers", "_kinds", "_stored", "declared", "inputs", "nodes", "outputs", "place", "sparse")

    def __init__(self, place: Place, *, function: bool = False) -> None:
        self.place = place
        self.nodes: list[Node] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.sparse: set[str] = set()
        self._initializers: dict[str, Callable[[], Place] | None] = {}
        self._stored: dict[str, Stored] = {}
        self._kinds: dict[str, int] | None = None
        values: list[Value] = []
        self.declared: Callable[[], Iterable[Place]] = lambda: map(place.inner, values)  # what says the types of values
        node, inputs, outputs, typed = (7, 4, 5, (12,)) if function else (1, 11, 12, (11, 12, 13))
        for number, _, value in place.fields():
            if number == node:
                self.nodes.append(Node(place.inner(value)))
                if len(self.nodes) > MOST_NODES:
                    raise place.buffer.error(place.span[0], f"a graph of more than {MOST_NODES} nodes")
            elif number == inputs:
                self.inputs.append(place.text(value) if function else _name_of(place.inner(value), 1))
            elif number == outputs:
                self.outputs.append(place.text(value) if function else _name_of(place.inner(value), 1))
            elif number == 5 and not function:
                stored = Stored(place.inner(value))
                self.add_initializer(stored.name, None)
                self._stored[stored.name] = stored
            elif number == 15 and not function:
                sparse = place.inner(value)
                self.sparse.update(_name_of(sparse.inner(v), 8) for n, _, v in sparse.fields() if n == 1)
            if number in typed:
                values.append(value)

    def kind(self, name: str) -> int:
        """The data type that the graph declares for a value; 0 where it declares none."""
        if self._kinds is None:
            self._kinds = dict(map(_kind_of, self.declared()))
        return self._kinds.get(name, 0)

    def add_initializer(self, name: str, place: Callable[[], Place] | None) -> None:
        """Note that there is one, and how to get at it later; FormatError if there is one of that name already."""
        if name in self._initializers:
            raise FormatError(f"{printable(self.place.buffer.name)}: two initializers are called {printable(name)!r}")
        self._initializers[name] = place
        if len(self._initializers) > MOST_NODES:
            raise self.place.buffer.error(self.place.span[0], f"more than {MOST_NODES} initializers")

    def files(self, folder: str) -> list[str]:
        """The files in `folder` in which initializers of a model file lie, as external data."""
        found = {}
        for stored in self._stored.values():
            if stored.location == EXTERNAL and stored.external.get("location") not in found:
                found[stored.external.get("location")] = stored.file(folder)
        return [path for path in found.values() if path is not None]

    @property
    def names(self) -> KeysView[str]:
        """Of its initializers."""
        return self._initializers.keys()

    def initializer(self, name: str) -> Stored | None:
        """The tensor of that name, if it is an initializer here."""
        place = self._initializers.get(name)
        if place is not None and name not in self._stored:
            self._stored[name] = Stored(place(), name)
        return self._stored.get(name)


def _name_of(place: Place, field: int) -> str:
    name = ""
    for number, _, value in place.fields():
        if number == field:
            name = place.text(value)
    return name


def _kind_of(place: Place) -> tuple[str, int]:
    """(name, data type) of a ValueInfoProto; 0 where it is no tensor, or of any type."""
    kind = 0
    for number, _, value in place.fields():
        if number == 2:
            of_value = place.inner(value)
            tensors = [of_value.inner(v) for n, _, v in of_value.fields() if n == 1]
            kind = next((t.integer(v, 32) for t in tensors for n, _, v in t.fields() if n == 1), 0)
    return _name_of(place, 1), kind


class Function(NamedTuple):
    """A FunctionProto: its body, the opset its nodes are of, and the defaults of its attributes."""

    body: Graph
    opset: int
    defaults: dict[str, Attribute]


class Model:
    """A ModelProto, of a file or a live one."""

    __slots__ = ("buffer", "folder", "functions", "graph", "ir_version", "opset", "producer", "source")

    def __init__(self, place: Place, source: str, folder: str | None, graph: Graph | None = None) -> None:
        self.source, self.folder, self.buffer = source, folder, place.buffer
        self.ir_version, self.opset, self.producer = 0, 1, ""
        self.functions: dict[tuple[str, str, str], Function] = {}
        graphs = [graph] if graph else []
        imports: dict[str, int] = {}
        for number, wire, value in place.fields():
            if MODEL_FIELDS.get(number, wire) != wire:
                raise place.buffer.error(0, f"field {number} has wire type {wire}: this is no ONNX model")
            if number == 7:
                if graphs:
                    raise place.buffer.error(place.bytes_of(value)[0], "a second graph")
                graphs.append(Graph(place.inner(value)))
            elif number == 1:
                self.ir_version = place.integer(value)
            elif number == 2:
                self.producer = place.text(value)
            elif number == 8:
                domain, version = _opset(place.inner(value))
                if imports.setdefault(domain, version) != version:
                    raise place.buffer.error(
                        0, f"two opset versions of domain {domain!r}: {imports[domain]}, {version}"
                    )
            elif number == 25:
                name, function = _function(place.inner(value))
                if name in self.functions:
                    raise place.buffer.error(place.bytes_of(value)[0], f"two functions are called {name}")
                self.functions[name] = function
        if not graphs:
            raise FormatError(f"{printable(source)}: holds no graph; is it an ONNX model?")
        self.graph = graphs[0]
        self.opset = imports.get("", 1)
        self.functions = {k: f._replace(opset=f.opset or self.opset) for k, f in self.functions.items()}


def _opset(place: Place) -> tuple[str, int]:
    domain, version = "", 0
    for number, _, value in place.fields():
        if number == 1:
            domain = place.text(value)
        elif number == 2:
            version = place.integer(value)
    return "" if domain in DEFAULT_DOMAIN else domain, version


def _function(place: Place) -> tuple[tuple[str, str, str], Function]:
    name = {1: "", 10: "", 13: ""}
    opset, defaults = 0, {}
    for number, _, value in place.fields():
        if number in name:
            name[number] = place.text(value)
        elif number == 9:
            domain, version = _opset(place.inner(value))
            opset = opset if domain else version
        elif number == 11:
            attribute = _attribute(place.inner(value))
            defaults[attribute.name] = attribute
    body = Graph(place, function=True)
    domain = "" if name[10] in DEFAULT_DOMAIN else name[10]
    return (domain, name[1], name[13]), Function(body, opset, defaults)


# ---- opening


def looks_like_model(buffer: Buffer) -> bool:
    """Whether the top level holds a graph and nothing that a ModelProto has not. Blobs are skipped, not read."""
    seen = set()
    try:
        for number, wire, _ in fields(buffer):
            if MODEL_FIELDS.get(number) != wire:
                return False
            seen.add(number)
    except FormatError:
        return 1 in seen and 7 in seen
    return 7 in seen and bool(seen & {1, 8})


def of_file(path: str) -> Model:
    """A model file, walked lazily; external data is looked for in its folder and nowhere else."""
    import os

    return Model(whole(Buffer(ReadFile(path))), path, os.path.dirname(os.path.abspath(path)))


def of_live(proto: Any, folder: str | None) -> Model:
    """A live ModelProto. Nodes are parsed from their own bytes; an initializer is serialised only when it is read."""
    if type(proto).__name__ != "ModelProto":
        raise InvalidValue(f"expected an onnx.ModelProto, got {printable(type(proto).__qualname__)}")
    name = "a live ONNX model"
    frame = type(proto)()
    for field in ("ir_version", "producer_name"):
        if proto.HasField(field):
            setattr(frame, field, getattr(proto, field))
    frame.opset_import.extend(proto.opset_import)
    frame.functions.extend(proto.functions)
    graph = Graph(whole(Buffer(b"", name)))
    for node in proto.graph.node:
        graph.nodes.append(Node(whole(Buffer(node.SerializeToString(), name))))
    for tensor in proto.graph.initializer:
        graph.add_initializer(tensor.name, lambda t=tensor: whole(Buffer(t.SerializeToString(), name)))  # type: ignore[misc]
    graph.inputs = [value.name for value in proto.graph.input]
    graph.outputs = [value.name for value in proto.graph.output]
    graph.declared = lambda: (
        whole(Buffer(value.SerializeToString(), name))
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    )
    graph.sparse = {sparse.values.name for sparse in proto.graph.sparse_initializer}
    return Model(whole(Buffer(frame.SerializeToString(), name)), name, folder, graph)
