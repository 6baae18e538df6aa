"""A Caffe net as it lies in files: its layers with their settings, and where their blobs are.

Three kinds of file say parts of it: the binary `.caffemodel` (layers, settings, blobs), the HDF5 one (blobs by layer
name) and the `.prototxt` (layers, settings). Where a prototxt is given it decides, as in Caffe: Net::CopyTrainedLayersFrom
takes nothing but blobs from a caffemodel, by layer name. Field numbers: BVLC/caffe src/caffe/proto/caffe.proto.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.caffe.blob import Blob, Budget, from_hdf5, from_message, kernel_shape
from bnport.containers import HDF5_SIGNATURE
from bnport.containers.files import ReadFile
from bnport.containers.protobuf import FIXED32, LENGTH, VARINT, Buffer, fields, signed
from bnport.errors import FormatError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from bnport.containers.hdf5 import Group
    from bnport.containers.protobuf import Span, Value
    from bnport.containers.textproto import Message

    Setting: TypeAlias = "int | float | bool | str"

MOST_LAYERS = 1 << 16

# type -> (field numbers of its parameters in LayerParameter, their name in text, setting -> (number, kind)).
# Forks use some numbers twice (137 is BVLC's embed_param and yjxiong's bn_param), so a layer's type decides what is read.
# BatchNormParameter 4 to 10 mean other things in each fork and are never read: blobs say enough.
SETTINGS: dict[str, tuple[tuple[int, ...], str, dict[str, tuple[int, str]]]] = {
    "BatchNorm": (
        (139,),
        "batch_norm_param",
        {"use_global_stats": (1, "bool"), "moving_average_fraction": (2, "float"), "eps": (3, "float")},
    ),
    "Scale": ((142,), "scale_param", {"axis": (1, "int"), "num_axes": (2, "int"), "bias_term": (4, "bool")}),
    "Bias": ((141,), "bias_param", {"axis": (1, "int"), "num_axes": (2, "int")}),
    # yjxiong 137, PSPNet 152, ChenglongChen 41; SegNet 45, whose field 3 is bn_mode, an enum
    "BN": ((137, 152, 41, 45), "bn_param", {"momentum": (3, "float"), "eps": (4, "float"), "bn_mode": (3, "mode")}),
    "Convolution": ((106,), "convolution_param", {"group": (5, "int")}),
    "InnerProduct": ((117,), "inner_product_param", {"transpose": (6, "bool")}),
}
SETTINGS["Deconvolution"] = SETTINGS["Convolution"]
_PARAMETERS = {number for numbers, *_ in SETTINGS.values() for number in numbers}
_MODES = {0: "LEARN", 1: "INFERENCE"}  # SegNet's BNParameter.BNMode

# V1LayerParameter.LayerType, for saying what an old file holds
_V1_TYPES = {
    4: "Convolution", 14: "InnerProduct", 39: "Deconvolution", 22: "Split", 18: "ReLU", 17: "Pooling", 15: "LRN",
    6: "Dropout", 20: "Softmax", 21: "SoftmaxWithLoss", 3: "Concat", 5: "Data", 25: "Eltwise", 1: "Accuracy",
}  # fmt: skip
_V1_WORDS = {"CONVOLUTION": "Convolution", "INNER_PRODUCT": "InnerProduct", "DECONVOLUTION": "Deconvolution",
             "SPLIT": "Split"}  # fmt: skip


class Node:
    """One layer: name, type, the blobs (activations) it reads and makes, its settings, its stored blobs.

    message: the whole LayerParameter in a V2 binary file.  old: from a V1 `layers` field.
    """

    __slots__ = ("_blobs", "bottoms", "message", "name", "old", "settings", "tops", "type")

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.type = name, kind
        self.bottoms: list[str] = []
        self.tops: list[str] = []
        self.settings: dict[str, Setting] = {}
        self.message: Span | None = None
        self.old = False
        self._blobs: Stored | None = None

    @property
    def blob_count(self) -> int:
        """How many blobs the file holds for it."""
        return len(self._blobs.spans) if self._blobs else 0

    @property
    def has_blobs(self) -> bool:
        """Whether the file names the layer's blobs at all, be there none of them."""
        return self._blobs is not None

    def blob(self, index: int) -> Blob:
        """One stored blob, its shape held against its numbers."""
        assert self._blobs is not None
        return self._blobs.blob(index)

    def kernel_shape(self) -> tuple[int, ...] | None:
        """The shape of blob 0, without walking through unpacked numbers."""
        return self._blobs.kernel_shape() if self._blobs and self._blobs.spans else None


class Stored:
    """Where the blobs of one layer lie: spans of a binary file, or the tensors of an HDF5 group."""

    __slots__ = ("_net", "name", "spans")

    def __init__(self, net: Net, name: str, spans: list[object]) -> None:
        self._net, self.name, self.spans = net, name, spans

    def blob(self, index: int) -> Blob:
        """Blob `index`."""
        span = self.spans[index]
        if self._net.buffer is None:
            return from_hdf5(self._net.path, span)  # type: ignore[arg-type]
        what = f"layer {self.name!r} blob {index}"
        return from_message(self._net.buffer, span, what, self._net.budget)  # type: ignore[arg-type]

    def kernel_shape(self) -> tuple[int, ...] | None:
        """The shape of blob 0, or None if that is costly to know."""
        if self._net.buffer is None:
            return self.blob(0).shape
        return kernel_shape(self._net.buffer, self.spans[0], f"layer {self.name!r} blob 0")  # type: ignore[arg-type]


class Net:
    """The layers of a `.caffemodel`, in file order, joined with its prototxt if one is given.

    nodes:     the layers; those of the prototxt (at phase TEST) where there is one.
    held:      name -> layer of the caffemodel itself (binary), or nothing.
    typed:     whether layer types and connections are known: not in an HDF5 file on its own.
    described: whether a prototxt decided the settings.
    """

    def __init__(self, path: str, prototxt: str | None = None) -> None:
        self.path, self.prototxt = path, prototxt
        self.buffer: Buffer | None = None
        self.budget = Budget()
        self.input_rank: int | None = None
        self.described = prototxt is not None
        file = ReadFile(path)
        self.file = file
        if not file.size:
            raise FormatError(f"{printable(path)}: an empty file")
        if file.pread(0, min(file.size, 8)) != HDF5_SIGNATURE:
            self.buffer = Buffer(file)
            self.held = list(self._binary(self.buffer))
            self.typed = True
        else:
            self.held = list(self._hdf5(file))
            self.typed = self.described
        self._unique(self.held, path)
        self.nodes = self.held
        if prototxt is not None:
            from bnport.containers import textproto

            self.nodes = self._joined(textproto.read(prototxt), prototxt)

    def error(self, node: Node, why: str) -> FormatError:
        """A FormatError that names the file and the layer."""
        return FormatError(
            f"{printable(self.path)}: layer {printable(node.name, 80)!r} ({printable(node.type, 40)}): {why}"
        )

    def _unique(self, nodes: list[Node], path: str) -> None:
        """Layers with blobs must have names of their own: blobs find their layer by name. Others may share one."""
        seen: dict[str, Node] = {}
        for node in nodes:
            other = seen.setdefault(node.name, node)
            if other is not node and (_matters(node) or _matters(other)):
                raise FormatError(f"{printable(path)}: two layers are called {printable(node.name, 80)!r}")

    # ---- binary

    def _binary(self, buffer: Buffer) -> Iterator[Node]:
        count = 0
        for number, wire, value in fields(buffer):
            self.budget.take(buffer, 0)
            if number in (2, 100):
                if wire != LENGTH or isinstance(value, int):
                    raise buffer.error(0, f"field {number} (a layer) has wire type {wire}; this is no caffemodel")
                count += 1
                if count > MOST_LAYERS:
                    raise buffer.error(value[0], f"more than {MOST_LAYERS} layers")
                yield self._layer(buffer, value, old=number == 2)
            elif number == 8 and not isinstance(value, int):  # input_shape
                axes = 0
                for inner, _, dims in fields(buffer, value[0], value[0] + value[1], 1):
                    self.budget.take(buffer, value[0])
                    axes += (
                        0 if inner != 1 else 1 if isinstance(dims, int) else sum(b < 0x80 for b in buffer.read(dims))
                    )
                self.input_rank = axes

    def _layer(self, buffer: Buffer, span: Span, *, old: bool) -> Node:
        node = Node("", "")
        spans: list[object] = []
        parameters: dict[int, list[Span]] = {}
        for number, wire, value in fields(buffer, span[0], span[0] + span[1], 1):
            self.budget.take(buffer, span[0])
            if old:
                number = {4: 1, 5: 2, 2: 3, 3: 4, 6: 7}.get(number, -1)  # V1's name, type, bottom, top, blobs
            if number in (1, 3, 4) or (number == 2 and not old):
                text = buffer.text(_span(buffer, number, wire, value), "a name")
                if number == 1:
                    node.name = text
                elif number == 2:
                    node.type = text
                else:
                    (node.bottoms if number == 3 else node.tops).append(text)
            elif number == 2:
                if not isinstance(value, int):
                    raise buffer.error(value[0], f"the type of a V1 layer has wire type {wire}")
                kind = signed(value, 32)
                node.type = _V1_TYPES.get(kind, f"V1 type {kind}")
            elif number == 7:
                spans.append(_span(buffer, number, wire, value))
            elif number in _PARAMETERS and wire == LENGTH and not isinstance(value, int):
                parameters.setdefault(number, []).append(value)
        node.message, node.old = None if old else span, old
        node._blobs = Stored(self, node.name, spans)
        if node.type in SETTINGS:
            node.settings = self._settings(buffer, node, parameters)
        return node

    def _settings(self, buffer: Buffer, node: Node, parameters: dict[int, list[Span]]) -> dict[str, Setting]:
        numbers, _, wanted = SETTINGS[node.type]
        present = [number for number in numbers if number in parameters]
        if len(present) > 1:
            raise self.error(node, f"parameters in fields {listed(present)}, which belong to different forks")
        found: dict[str, Setting] = {}
        for span in (s for number in present for s in parameters[number]):  # given twice: merged, the last value wins
            for number, wire, value in fields(buffer, span[0], span[0] + span[1], 2):
                self.budget.take(buffer, span[0])
                for name, (field, kind) in wanted.items():
                    if field != number or (node.type == "BN" and field == 3 and (kind == "mode") != (wire == VARINT)):
                        continue
                    if (kind == "float") != (wire == FIXED32) or (kind != "float" and wire != VARINT):
                        raise self.error(node, f"{name} is stored with wire type {wire}, which is no {kind}")
                    if kind == "float":
                        found[name] = buffer.float32(value)  # type: ignore[arg-type]
                    elif kind == "mode":
                        found[name] = _MODES.get(signed(value, 32), "unknown")
                    else:
                        found[name] = bool(value) if kind == "bool" else signed(value, 32)
        return found

    # ---- HDF5

    def _hdf5(self, file: ReadFile) -> Iterator[Node]:
        from bnport.containers.hdf5 import H5, Group

        h5 = H5(file)
        data = h5.root.group("data")
        if data is None:
            raise FormatError(f"{printable(self.path)}: no group /data, so it is no .caffemodel saved as HDF5")
        for path, group in h5.walk():
            if not path.startswith("data/"):
                continue
            tensors = {name: child for name, child in _children(group) if not isinstance(child, Group)}
            indices = [str(i) for i in range(len(tensors))]
            if set(tensors) != set(indices):
                h5.refuse(path, f"blobs should be called {listed(indices, 5)}, they are {listed(tensors, 5)}")
            name = path.removeprefix("data/")
            node = Node(name, "")
            node._blobs = Stored(self, name, [tensors[i] for i in indices])
            yield node

    # ---- prototxt

    def _joined(self, message: Message, path: str) -> list[Node]:
        blobs = {node.name: node for node in self.held}
        inputs = message.messages("input_shape")
        rank = len(inputs[0].all("dim")) if inputs else len(message.all("input_dim"))
        self.input_rank = rank or self.input_rank
        nodes = []
        for old in (True, False):
            for layer in message.messages("layers" if old else "layer"):
                if not _included(layer):
                    continue
                node = Node(layer.text("name") or "", layer.text("type") or "")
                node.old = old
                if old:
                    node.type = _V1_WORDS.get(node.type, node.type)
                node.bottoms, node.tops = layer.texts("bottom"), layer.texts("top")
                if node.type in SETTINGS:
                    node.settings = _text_settings(layer, node.type)
                source = blobs.get(node.name)
                if source is not None:
                    node._blobs, node.message = source._blobs, source.message
                nodes.append(node)
        if not nodes:
            raise FormatError(f"{printable(path)}: no layer in it; the prototxt of the net was expected")
        if len(nodes) > MOST_LAYERS:
            raise FormatError(f"{printable(path)}: more than {MOST_LAYERS} layers")
        self._unique(nodes, path)
        return nodes


def _children(group: Group) -> Iterator[tuple[str, object]]:
    for name in group.names():
        yield name, group.child(name)


def _matters(node: Node) -> bool:
    return bool(node.blob_count) or node.type in SETTINGS


def _span(buffer: Buffer, number: int, wire: int, value: Value) -> Span:
    if wire != LENGTH or isinstance(value, int):
        raise buffer.error(0 if isinstance(value, int) else value[0], f"field {number} of a layer has wire type {wire}")
    return value


def _text_settings(layer: Message, kind: str) -> dict[str, Setting]:
    _, name, wanted = SETTINGS[kind]
    messages = layer.messages(name)
    if len(messages) > 1:
        raise layer.error(f"{name} is given {len(messages)} times")
    found: dict[str, Setting] = {}
    for message in messages:
        for setting, (_, sort) in wanted.items():
            value: Setting | None
            if sort == "float":
                value = message.number(setting)
            elif sort == "int":
                value = message.integer(setting)
            elif sort == "bool":
                value = message.truth(setting)
            else:
                word = message.text(setting)
                value = None if word is None else {"0": "LEARN", "1": "INFERENCE"}.get(word, str(word))
            if value is not None:
                found[setting] = value
    return found


def _included(layer: Message) -> bool:
    """Whether a layer is in the net at phase TEST, level 0, no stages: Net::FilterNet and StateMeetsRule."""
    include, exclude = layer.messages("include"), layer.messages("exclude")
    if include:
        return any(_meets(rule) for rule in include)
    return not any(_meets(rule) for rule in exclude)


def _meets(rule: Message) -> bool:
    phase = rule.text("phase")
    if phase is not None and phase not in ("TEST", "1"):
        return False
    low, high = rule.integer("min_level"), rule.integer("max_level")
    return (low is None or low <= 0) and (high is None or high >= 0) and not rule.all("stage")
