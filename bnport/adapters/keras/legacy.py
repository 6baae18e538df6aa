"""Legacy `.h5` files: Keras 0.x and 1 (`running_std`), Keras 2, tf.keras, Keras 3. Matched by weight name, not position."""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.adapters.keras import config
from bnport.adapters.keras.entry import Contents, Entry
from bnport.adapters.keras.weights import checked
from bnport.errors import FormatError, InvalidValue, Question, listed, printable, repeated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.containers.hdf5 import H5, Group, H5Tensor

_FIELD = {
    "gamma": "gamma", "beta": "beta", "moving_mean": "mean", "running_mean": "mean", "moving_variance": "variance",
    "running_variance": "variance", "running_std": "std", "moving_stddev": "moving_stddev", "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}  # fmt: skip
_WEIGHT = re.compile(rf"(?:(.*)[/_.])?({'|'.join(_FIELD)})(?:_\d+)?(?::\d+)?", re.DOTALL)
_KEY = re.compile(r"layer_(\d+)")
STATS = ("variance", "std", "root")
LEAST_FUSED = 1.001e-5  # TensorFlow up to 2.11: tf.compat.v1.nn.fused_batch_norm takes it for any smaller epsilon


def is_legacy(h5: H5) -> bool:
    """Whether the file keeps its weights by layer and weight name (or is older still)."""
    return _weights(h5) is not None


def _weights(h5: H5) -> Group | None:
    root = h5.root
    if "model_weights" in root:
        return root.group("model_weights")
    for name in ("layer_names", "layer_names0", "nb_layers"):
        if root.has_attribute(name):
            return root
    graph = root.group("graph") if "graph" in root else None
    return graph if graph is not None and graph.has_attribute("nb_layers") else None


class Part(NamedTuple):
    """The arrays of one BatchNormalization: the layer's group, what stands before the field in the weight names."""

    group: str
    prefix: str
    tensors: dict[str, H5Tensor]

    @property
    def name(self) -> str:
        """group, or group/inner, as a user of Keras would say it; a layer's own name may hold slashes (conv1/bn)."""
        inner = "/".join(piece for piece in self.prefix.split("/") if piece)
        _, found, below = f"/{inner}/".partition(f"/{self.group}/")
        if not found and not re.fullmatch(rf"{re.escape(self.group)}_\d+", inner):
            below = f"{inner}/" if inner else ""
        own, pieces = self.group.split("/"), f"{self.group}/{below}"[:-1].split("/")
        size = len(own)
        while pieces[-size:] == own == pieces[-2 * size : -size]:
            del pieces[-size:]
        return "/".join(pieces)


def read(h5: H5, stat: str | None, *, evidence: bool) -> Contents:
    """The contents of a legacy file."""
    if stat not in (None, *STATS):
        raise InvalidValue(f"stat: expected one of {', '.join(STATS)}, got {stat!r:.40}")
    shown = printable(h5.file.path)
    weights = _weights(h5)
    assert weights is not None  # is_legacy said so
    text = h5.root.attribute("model_config")
    if text is not None and not isinstance(text, str):
        raise FormatError(f"{shown}: model_config is not text")
    version = h5.root.attribute("keras_version") or weights.attribute("keras_version")
    version = version if isinstance(version, str) else None
    root = None if text is None else config.tree(config.parse(text, f"{shown}: model_config"), f"{shown}: model_config")
    parts = list(_parts(weights, shown))
    nodes = _paired(root, parts, shown) if root is not None else [None] * len(parts)
    order = {id(node): i for i, node in enumerate(root.walk())} if root is not None else {}
    paired = sorted(zip(parts, nodes, strict=True), key=lambda p: order.get(id(p[1]), len(order)))
    old = [part for part, _ in paired if "std" in part.tensors]
    form = _form(old, version, stat, shown) if old else "variance"
    entries = [_entry(part, node, form if "std" in part.tensors else "variance", shown) for part, node in paired]
    _note_replaced_epsilons(entries, version, h5.root.attribute("backend"))
    if root is not None and evidence:
        _add_evidence(root, entries, weights)
    contents = Contents(h5.file.path, "legacy", entries, holds_epsilon=root is not None)
    contents.extra = {"text": text, "root": root, "h5": h5, "weights": weights}
    return contents


def _note_replaced_epsilons(entries: list[Entry], version: str | None, backend: object) -> None:
    """Say of layers with an epsilon below LEAST_FUSED, in a file of a TensorFlow up to 2.11, what they were computed with."""
    number = re.match(r"(\d{1,4})\.(\d{1,4})", version or "")
    if number is None or tuple(map(int, number.groups())) > (2, 11) or backend not in ("tensorflow", None):
        return
    for entry in entries:
        if entry.epsilon is not None and entry.epsilon < LEAST_FUSED:
            entry.notes += (
                f"the file is of Keras {printable(version, 20)}: TensorFlow up to 2.11 computes it, on images (4 axes), with"
                f" epsilon {LEAST_FUSED!r} instead of {entry.epsilon!r}; elsewhere bnport.set_weights(layer,"
                f" epsilon={LEAST_FUSED!r}) makes it the same",
            )


def _add_evidence(root: config.Node, entries: list[Entry], weights: Group) -> None:
    from bnport.adapters.keras import graph

    known, feeding = graph.evidence(root)
    for entry in entries:
        if entry.node is None:
            continue
        entry.inputs = known.get(entry.node.path)
        maker = feeding.get(entry.node.path)
        tensor = _kernel(maker, weights) if maker is not None else None
        if maker is not None and tensor is not None:
            entry.kernel = graph.kernel_of(maker, tensor.array, tensor.shape)


def _kernel(node: config.Node, weights: Group) -> H5Tensor | None:
    """The kernel of a layer by its weight's name; None where the name is not there exactly once."""
    from bnport.adapters.keras.graph import where_kernel_is

    name = where_kernel_is(node)[0]
    group = weights.group(_top(node))
    names = _texts(group, "weight_names") if group is not None else None
    fitting = [n for n in names or () if re.fullmatch(rf"(?:.*/)?{re.escape(node.name)}/{name}(?::0)?", n)]
    return _dataset(group, fitting[0]) if group is not None and len(fitting) == 1 else None


def _top(node: config.Node) -> str:
    """The name of the outermost model's layer that the node is, or lies in."""
    while node.parent is not None and node.parent.parent is not None:
        node = node.parent
    return node.name


def _form(parts: list[Part], version: str | None, stat: str | None, shown: str) -> str:
    """What `running_std` holds: a variance in every file that says which Keras wrote it, except 1.0.7 on Theano."""
    if stat is not None:
        return stat
    names = listed((part.name for part in parts), 3)
    if any(_KEY.fullmatch(part.group) and not part.prefix for part in parts):
        return "std"  # Keras 0.x: param_0 ... param_3, always the std
    if version is None:
        raise Question(
            f"{shown}: running_std of {len(parts)} layers ({names}): the file does not say which Keras wrote it. It is a"
            " variance from Keras 1.0.6 (TensorFlow) or 1.0.8 on, a standard deviation in 1.0.5 and older and 1.0.6 on"
            " Theano: say --stat variance or --stat std"
        )
    if version.startswith("1.0.7"):
        raise Question(
            f"{shown}: running_std of {len(parts)} layers ({names}), by Keras 1.0.7: a variance; on TensorFlow divided by"
            " as sqrt(variance + epsilon), on Theano as sqrt(variance) + epsilon: say --stat variance or --stat root"
        )
    return "variance"


def _entry(part: Part, node: config.Node | None, form: str, shown: str) -> Entry:
    where = f"{shown}: {printable(part.name)}"
    tensors = dict(part.tensors)
    if "std" in tensors:
        tensors["variance"] = tensors.pop("std")
    for field in ("mean", "variance"):
        if field not in tensors:
            raise FormatError(f"{where}: no moving {field} among its weights")
    tensors = checked(tensors, where)
    if node is None:
        default = 1e-6 if form != "variance" else config.EPSILON
        return Entry(part.name, where, lambda: tensors, epsilon=None, default_epsilon=default, form=form)
    settings = config.settings(node, shown)
    for field, there in (("gamma", settings.scale), ("beta", settings.center)):
        if there != (field in tensors):
            said = "says it has" if there else "says it has no"
            raise FormatError(f"{where}: the config {said} {field}, the weights do{' not' if there else ''}")
    return Entry(
        node.path or part.name, where, lambda: tensors, epsilon=settings.epsilon, momentum=settings.momentum, form=form,
        node=node, notes=settings.notes,
    )  # fmt: skip


def _parts(weights: Group, shown: str) -> Iterator[Part]:
    """The layers of the file, in its own order, by the names of their weights."""
    names = _texts(weights, "layer_names")
    if names is None:
        names = [name for name in weights.names() if _KEY.fullmatch(name)]  # Keras 0.x
        if weights.attribute_number("nb_layers") != len(names):
            raise FormatError(
                f"{shown}: nb_layers is {weights.attribute_number('nb_layers')}, {len(names)} groups are there"
            )
    if (twice := repeated(names)) is not None:
        raise FormatError(f"{shown}: layer_names lists {printable(twice)!r} twice")
    for name in names:
        group = weights.group(name)  # a name may hold slashes: then it lies in groups of its parts
        if group is None:
            raise FormatError(f"{shown}: layer_names lists {printable(name)!r}, which has no group")
        listing = _texts(group, "weight_names")
        if listing is None:
            yield from _numbered(group, name)
            continue
        if (twice := repeated(listing)) is not None:
            raise FormatError(f"{shown}: {printable(name)}: weight_names lists {printable(twice)!r} twice")
        fields: dict[str, dict[str, H5Tensor]] = {}
        for each in listing:
            match = _WEIGHT.fullmatch(each)
            if match is None:
                continue
            tensor = _dataset(group, each)
            if tensor is None:
                raise FormatError(
                    f"{shown}: {printable(name)}: weight_names lists {printable(each)!r}, which is not there"
                )
            found = fields.setdefault(match[1] or "", {})
            field = _FIELD[match[2]]
            if field in found:
                raise FormatError(
                    f"{shown}: {printable(name)}: {printable(match[1] or '')!r} has two arrays for {field}"
                )
            found[field] = tensor
        for prefix, found in fields.items():
            if found.keys() & {"mean", "variance", "std"}:  # gamma and beta alone are LayerNormalization
                yield Part(name, prefix, found)


def _numbered(group: Group, name: str) -> Iterator[Part]:
    """Keras 0.x: param_0 ... param_3 are gamma, beta, mean and std of a layer with four vectors of one length."""
    tensors = [t for t in group.tensors() if re.fullmatch(r"param_\d+", t.name.rsplit("/", 1)[-1])]
    if len(tensors) == 4 and all(len(t.shape) == 1 and t.shape == tensors[0].shape for t in tensors):
        yield Part(name, "", dict(zip(("gamma", "beta", "mean", "std"), tensors, strict=True)))


def _dataset(group: Group, path: str) -> H5Tensor | None:
    from bnport.containers.hdf5 import H5Tensor

    folder, _, name = path.rpartition("/")
    inside = group.group(folder) if folder else group
    if inside is None or not inside.has(name):
        return None
    child = inside.child(name)
    return child if isinstance(child, H5Tensor) else None


def _texts(group: Group, name: str) -> list[str] | None:
    """A list of names, which Keras splits into name0, name1, ... beyond 64 KiB."""
    value = group.attribute(name)
    if value is not None:
        return [value] if isinstance(value, str) else value
    texts: list[str] = []
    number = 0
    while (value := group.attribute(f"{name}{number}")) is not None:
        texts += [value] if isinstance(value, str) else value
        number += 1
    return texts if number else None


class _Inside:
    """The nodes in one top-level layer. They are looked up: a file may have many, and many parts that fit none."""

    def __init__(self) -> None:
        self.nodes: list[config.Node] = []
        self.named: dict[str, list[config.Node]] = {}
        self.slashes: set[int] = set()  # in their names

    def add(self, node: config.Node) -> None:
        self.nodes.append(node)
        self.named.setdefault(node.name, []).append(node)
        self.slashes.add(node.name.count("/"))

    def at_end(self, path: str) -> list[config.Node]:
        """Those with whose name the path ends, behind a slash."""
        found: list[config.Node] = []
        for slashes in sorted(self.slashes):
            pieces = path.rsplit("/", slashes + 1)
            if len(pieces) > slashes + 1:
                found += self.named.get("/".join(pieces[1:]), [])
        return found


def _paired(root: config.Node, parts: list[Part], shown: str) -> list[config.Node | None]:
    """The config node of each part: by path, else by the last name within the same top-level layer."""
    nodes = [node for node in root.walk() if node.is_batchnorm and node.parent is not None]
    by_path = {node.path: node for node in nodes}
    inside: dict[str, _Inside] = {}
    for each in nodes:
        inside.setdefault(_top(each), _Inside()).add(each)
    crowd: dict[str, int] = {}
    for part in parts:
        crowd[part.group] = crowd.get(part.group, 0) + 1
    result: list[config.Node | None] = []
    for part in parts:
        node = by_path.get(part.name)
        if node is None:
            held, prefix = inside.get(part.group, _Inside()), f"/{part.prefix}"
            numbered = re.fullmatch(r"(.*)_\d+", prefix, re.DOTALL)
            same = held.at_end(prefix) or (held.at_end(numbered[1]) if numbered else [])
            candidates = held.nodes if len(held.nodes) == crowd[part.group] == 1 else same
            if len(candidates) > 1:
                raise FormatError(
                    f"{shown}: the weights {printable(part.name)!r} belong to one of"
                    f" {listed((n.path for n in candidates), 3)}; nothing in the file says to which"
                )
            node = candidates[0] if candidates else None
        result.append(node)
    used = [id(node) for node in result if node is not None]
    if len(set(used)) < len(used):
        raise FormatError(f"{shown}: two sets of weights belong to one layer of model_config")
    lost = [node.path for node in nodes if id(node) not in used]
    if lost:
        raise FormatError(f"{shown}: model_config has {listed(lost, 3)}, the weights have no arrays for it")
    return result
