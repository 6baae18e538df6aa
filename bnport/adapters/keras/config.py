"""A Keras model's config (JSON) as a tree of layers: names, BatchNormalization settings, and where the weights lie.

Nothing of it is ever looked up or called: custom classes and Lambda layers are names here, nothing more.
"""

from __future__ import annotations

import functools
import re

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.errors import FormatError, InvalidValue, printable, repeated
from bnport.record import checked_epsilon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

CONFIG_LIMIT = 64 << 20  # bytes of a config.json
VALUES_LIMIT = 3_000_000  # values in it: each costs up to 100 bytes once parsed
DEPTH_LIMIT = 64  # models within models
EPSILON, MOMENTUM = 1e-3, 0.99  # BatchNormalization's defaults, Keras 1.2 to 3

_BATCHNORM = {"BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization"}
_LIKE_BATCHNORM = {"axis", "momentum", "epsilon", "center", "scale", "moving_mean_initializer"}  # a subclass's config
_WORD_START = re.compile(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])")
_PACKAGES = {"keras", "tf_keras", "tensorflow"}
_MODELS = {"Functional", "Sequential", "Model"}


class Real(float):
    """A number of a JSON text that remembers the how-many-eth it is, so that it can be replaced where it stands."""

    __slots__ = ("at",)
    at: int


class Whole(int):
    """As Real, for a number written without a fraction or an exponent."""

    at: int


def parse(text: bytes | str, where: str, *, positions: bool = False) -> Any:
    """The JSON value of `text`. Duplicate keys, too many values and too deep nesting are refused, naming `where`.

    With `positions`, numbers are Real and Whole.
    """
    from bnport.containers.json_text import loads

    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if len(text) > CONFIG_LIMIT or text.count(",") + text.count("[") + text.count("{") > VALUES_LIMIT:
        raise FormatError(f"{where}: {len(text)} characters of JSON are more than is read")
    count = 0

    def numbered(kind: type) -> Any:
        def make(digits: str) -> Any:
            nonlocal count
            if len(digits) > 400:
                raise FormatError(f"{where}: a number of {len(digits)} digits")
            value = kind(digits)
            value.at, count = count, count + 1
            return value

        return make

    hooks = {"parse_float": numbered(Real), "parse_int": numbered(Whole)} if positions else {"parse_int": _integer}
    return loads(text, where, **hooks)


def _integer(digits: str) -> int:
    if len(digits) > 400:  # int() of a million digits takes minutes
        raise FormatError(f"a number of {len(digits)} digits")
    return int(digits)


_TOKEN = r'"(?:[^"\\]|\\.)*"|(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)'  # compiled only where something is replaced


def replaced(text: str, numbers: dict[int, float], *, same_length: bool = False) -> str:
    """`text` with the numbers at these positions (Real.at) written anew and every other character kept.

    same_length: a shorter number is followed by blanks, so that all else stays where it is; one that is longer, also when
    written with a short exponent (1e-5 for 1e-05), makes the text longer all the same.
    """
    parts, done, count = [], 0, 0
    for token in re.finditer(_TOKEN, text):
        if token[1] is None:
            continue
        if count in numbers:
            new, room = repr(float(numbers[count])), len(token[1]) if same_length else 0
            if room and len(new) > room:
                new = re.sub(r"e([-+])0(?=\d)", r"e\1", new)
            parts += [text[done : token.start()], new.ljust(room)]
            done = token.end()
        count += 1
    return "".join([*parts, text[done:]])


class Settings(NamedTuple):
    """What a BatchNormalization config says, checked. epsilon, momentum, channels, dtype: None where it does not say."""

    epsilon: float | None
    momentum: float | None
    scale: bool
    center: bool
    renorm: bool
    channels: int | None
    dtype: str | None
    notes: tuple[str, ...]


class Node:
    """One layer of a config: a model, a BatchNormalization, anything.

    name: its own; path: its names from the outermost model's child down; storage: its path in the weights file of
    Keras >= 2.15; inbound: the calls as they are in the config.
    """

    __slots__ = (
        "build",
        "children",
        "class_name",
        "config",
        "custom",
        "inbound",
        "is_model",
        "name",
        "parent",
        "storage",
    )

    def __init__(self, entry: dict[str, Any], parent: Node | None, storage: str, where: str) -> None:
        self.class_name = entry["class_name"]
        config = entry["config"]
        if self.class_name == "Sequential" and isinstance(config, list):  # Keras <= 2.2.2
            config = {"name": entry.get("name", "sequential"), "layers": config}
        if not isinstance(config, dict) or not isinstance(self.class_name, str):
            raise FormatError(f"{where}: a layer's config is not an object")
        self.config = config
        self.parent, self.storage = parent, storage
        name = config.get("name", entry.get("name"))
        self.name: str = name if isinstance(name, str) and name else snake(self.class_name)
        self.build = entry.get("build_config")
        self.inbound = entry.get("inbound_nodes")
        module = entry.get("module")
        self.custom = ">" in self.class_name or (module is None and "module" in entry)
        if isinstance(module, str):
            self.custom = module.split(".")[0] not in _PACKAGES
        self.is_model = isinstance(config.get("layers"), list) and (
            self.class_name in _MODELS or "input_layers" in config or "build_input_shape" in config
        )
        self.children: list[Node] = []

    @property
    def path(self) -> str:
        """`outer/inner/name`, without the outermost model."""
        names: list[str] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            names.append(node.name)
            node = node.parent
        return "/".join(reversed(names))

    @property
    def is_batchnorm(self) -> bool:
        """Whether this is a BatchNormalization or, by its config, a subclass of it."""
        short = self.class_name.rsplit(">", 1)[-1]
        return short in _BATCHNORM or self.config.keys() >= _LIKE_BATCHNORM

    def walk(self) -> Iterator[Node]:
        """This node and all below, in the model's order."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


def tree(value: Any, where: str) -> Node:
    """The tree of a whole model's config. Raises FormatError where it is not one."""
    if not _is_layer(value):
        raise FormatError(f"{where}: not the config of a Keras model (no class_name and config)")
    root = Node(value, None, "", where)
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > DEPTH_LIMIT:
            raise FormatError(f"{where}: layers nested more than {DEPTH_LIMIT} deep")
        if node.is_batchnorm and node.parent is not None:
            continue
        node.children = _children(node, where)
        waiting.extend((child, depth + 1) for child in node.children)
    return root


def _children(node: Node, where: str) -> list[Node]:
    prefix = f"{node.storage}/" if node.storage else ""
    if node.is_model:
        entries = node.config["layers"]
        for entry in entries:
            if not _is_layer(entry):
                raise FormatError(
                    f"{where}: layers of {printable(node.name)!r}: an entry without class_name and config"
                )
        children = _numbered(node, entries, f"{prefix}layers", where)
        if (twice := repeated(child.name for child in children)) is not None:
            raise FormatError(f"{where}: two layers are named {printable(f'{node.path}/{twice}'.lstrip('/'))!r}")
        return children
    children = []  # a wrapper's layer, a custom layer's parts: kept under the attribute's name, as the config usually is
    for key, value in node.config.items():
        if key == "dtype":  # a policy is written like a layer
            continue
        if _is_named(value):
            children.append(Node(value, node, f"{prefix}{key}", where))
        else:
            children += _contained(node, value, f"{prefix}{key}", where)
    return children


def _contained(parent: Node, value: Any, folder: str, where: str, depth: int = 0) -> list[Node]:
    """The nodes of the layers in lists, tuples and dicts; one inside another is a folder `container` in the weights."""
    if depth > DEPTH_LIMIT:
        raise FormatError(f"{where}: lists nested more than {DEPTH_LIMIT} deep")
    if isinstance(value, dict) and not _is_layer(value):
        value = value.get("items") if value.get("class_name") == "__tuple__" else list(value.values())
    if not isinstance(value, list):
        return []
    held: list[Any] = [each for each in value if isinstance(each, dict | list)]  # a vocabulary may have a million words
    layers = iter(_numbered(parent, [each for each in held if _is_named(each)], folder, where))
    nodes, containers = [], 0
    for each in held:
        if _is_named(each):
            nodes.append(next(layers))
        elif not _is_layer(each):
            name = f"container_{containers}" if containers else "container"
            containers += 1
            nodes += _contained(parent, each, f"{folder}/{name}", where, depth + 1)
    return nodes


def _numbered(parent: Node, entries: list[dict[str, Any]], folder: str, where: str) -> list[Node]:
    """The nodes of a list, kept under the class name in snake case and a number from the second of a class on."""
    used: dict[str, int] = {}
    nodes = []
    for entry in entries:
        node = Node(entry, parent, "", where)
        if entry.get("module") != "keras.src.ops" and not str(entry.get("module")).startswith("keras.src.ops."):
            base = snake(node.class_name.rsplit(">", 1)[-1])
            used[base] = used.get(base, -1) + 1
            node.storage = f"{folder}/{base}_{used[base]}" if used[base] else f"{folder}/{base}"
        nodes.append(node)
    return nodes


def _is_layer(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_name"), str) and "config" in value


def _is_named(value: Any) -> bool:
    """Whether it is a layer with a name, and no initializer or policy, which are written like one."""
    return _is_layer(value) and isinstance(value["config"], dict) and "name" in value["config"]


@functools.lru_cache(256)
def snake(name: str) -> str:
    """The class name as Keras writes it in a weights file: BatchNormalization -> batch_normalization."""
    return _WORD_START.sub("_", re.sub(r"\W", "", name)).lower()


def settings(node: Node, where: str) -> Settings:
    """The checked settings of a BatchNormalization node. Raises FormatError naming the layer, also for one by batches."""
    config = node.config
    where = f"{where}: {printable(node.path)}"
    epsilon = momentum = None
    if "epsilon" in config:
        try:
            epsilon = checked_epsilon(_plain(config["epsilon"]))
        except InvalidValue as error:
            raise FormatError(f"{where}: {error}") from None
    if config.get("momentum") is not None:
        momentum = _plain(config["momentum"])
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not -1e9 < momentum < 1e9:
            _refuse(where, "momentum", "a number", momentum)
        momentum = float(momentum)
    flags = {
        name: config.get(name, default) for name, default in (("scale", True), ("center", True), ("renorm", False))
    }
    for name, value in flags.items():
        if value is None and name == "renorm":
            flags[name] = False
        elif not isinstance(value, bool):
            _refuse(where, name, "true or false", value)
    mode = config.get("mode", 0)  # Keras 1
    if mode not in (0, 1, 2):
        _refuse(where, "mode", "0, 1 or 2", mode)
    if mode:
        raise FormatError(f"{where}: mode {mode} of Keras 1 normalises by each batch; it is no fixed function")
    notes = []
    short = node.class_name.rsplit(">", 1)[-1]
    if short not in _BATCHNORM:
        notes.append(
            f"{printable(short, 60)} is a subclass of BatchNormalization, by its config; its own call is not known"
        )
    return Settings(
        epsilon, momentum, flags["scale"], flags["center"], flags["renorm"], _channels(node, where), _dtype(config),
        tuple(notes),
    )  # fmt: skip


def axis(node: Node, where: str) -> int:
    """The one axis that is normalised. Raises FormatError for several, or for anything else."""
    value = node.config.get("axis", -1)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        raise FormatError(
            f"{where}: normalises several axes ({str(value)[:60]}); no single BatchNorm over channels does the same"
        )
    if isinstance(value, bool) or not isinstance(value, int) or not -32 <= value < 32:
        _refuse(where, "axis", "an integer", value)
    return int(value)


def _channels(node: Node, where: str) -> int | None:
    """C by the shape that the layer was built for, if the config says."""
    at = axis(node, where)
    shape = node.build.get("input_shape") if isinstance(node.build, dict) else None
    if not isinstance(shape, list) or not -len(shape) <= at < len(shape):
        return None
    channels = shape[at]
    if isinstance(channels, bool) or not isinstance(channels, int) or not 0 < channels < 1 << 40:
        return None
    return int(channels)


def _dtype(config: dict[str, Any]) -> str | None:
    """float32 where that is certain (mixed policies keep float32 variables), else None: only the arrays tell.

    Keras 3 stores the variables of a float16 layer in 16 bits, tf_keras stores float32.
    """
    value = config.get("dtype")
    if isinstance(value, dict):
        value = value.get("config")
        value = value.get("name") if isinstance(value, dict) else ""
    return "float32" if value in (None, "float32", "mixed_float16", "mixed_bfloat16") else None


def _plain(value: Any) -> Any:
    """A Real or Whole as the plain number that it is."""
    return float(value) if isinstance(value, Real) else int(value) if isinstance(value, Whole) else value


def _refuse(where: str, name: str, expected: str, value: Any) -> NoReturn:
    raise FormatError(f"{where}: {name}: expected {expected}, got {printable(repr(value)[:80])}")
