"""What feeds each BatchNormalization: the kernel before it, and the BatchNormalization layers before that.

From the calls that a functional model's config lists (`inbound_nodes`, in the forms of Keras 2 and 3), or from the live
model's own config. Said only where it is certain: one custom layer that holds BatchNormalization, or one subclassed
model, and nothing is said of the whole graph.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.layer import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from bnport.adapters.keras.config import Node
    from bnport.layer import Layers
    from bnport.record import Array

_NOTHING: frozenset[str] = frozenset()
_PASS = {"Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout",
         "AlphaDropout", "ActivityRegularization", "Identity", "InputLayer"}  # fmt: skip
_WRAPPERS = {"TimeDistributed"}
CALLS_LIMIT = 100_000


class Uncertain(Exception):
    """The graph is not fully known."""


class Value(NamedTuple):
    """One tensor: the BatchNormalization layers that reach it with none between, and the layer that made it, if one."""

    reached: frozenset[str]
    maker: Node | None


_Ref = tuple[str, int, int]  # layer, its call, its output


def evidence(root: Node, *, hidden: bool = False) -> tuple[dict[str, tuple[str, ...]], dict[str, Node]]:
    """(BatchNormalization path -> inputs, path -> the one layer with a kernel that feeds it).

    The first is empty where the graph is not fully known (`hidden`: there are layers that the config does not show).
    """
    inputs: dict[str, set[str]] = {}
    makers: dict[str, set[int]] = {}
    nodes = {id(node): node for node in root.walk()}
    order = [node.path for node in root.walk() if node.is_batchnorm]
    walk = _Walk(inputs, makers)
    try:
        if hidden:
            raise Uncertain
        walk.model(root, [])
        known = {path: tuple(p for p in order if p in inputs[path]) for path in order if path in inputs}
    except (Uncertain, KeyError, IndexError, TypeError, ValueError):
        return {}, {}
    feeding = {path: nodes[next(iter(ids))] for path, ids in makers.items() if len(ids) == 1 and 0 not in ids}
    return known, feeding


class _Walk:
    def __init__(self, inputs: dict[str, set[str]], makers: dict[str, set[int]]) -> None:
        self.inputs, self.makers, self.calls = inputs, makers, 0

    def model(self, model: Node, entering: list[Value]) -> list[Value]:
        """The output values of a model for these input values (none: it is the outermost one)."""
        if not model.is_model:
            raise Uncertain
        if "input_layers" not in model.config:
            return self.sequential(model, entering)
        names = {child.name: child for child in model.children}
        calls = {child.name: _calls(child, names) for child in model.children}
        values: dict[tuple[str, int], list[Value]] = {}
        starts = _references(model.config["input_layers"], names)
        for position, (name, _, _) in enumerate(starts):
            values[name, 0] = [entering[position] if position < len(entering) else Value(_NOTHING, None)]
        ends = _references(model.config["output_layers"], names)
        keras3 = any(isinstance(call, dict) for child in model.children for call in child.inbound or [])
        taken = [ref for each in calls.values() for call in each for ref in call]
        for child in model.children:
            if child.is_model:
                shift = _shift(child.name, len(calls[child.name]), taken if keras3 else taken + ends)
                calls = {
                    n: [[_less(ref, child.name, shift) for ref in call] for call in each] for n, each in calls.items()
                }
                if keras3:  # counts a functional model's creation among the outputs, whatever it does elsewhere
                    shift = int("input_layers" in child.config)
                ends = [_less(ref, child.name, shift if len(calls[child.name]) > 1 else ref[1]) for ref in ends]
        wanted = [(name, at) for name in names for at in range(len(calls[name]))]
        for start in [(name, at) for name, at, _ in ends] + wanted:
            self.evaluate(start, names, calls, values)
        return [_output(values[name, at], which) for name, at, which in ends]

    def evaluate(
        self,
        start: tuple[str, int],
        names: dict[str, Node],
        calls: dict[str, list[list[_Ref]]],
        values: dict[tuple[str, int], list[Value]],
    ) -> None:
        """Fill `values` for a call and all that it needs, without recursion (chains of 1000 layers are real)."""
        waiting, open_calls = [start], set()
        while waiting:
            call = waiting[-1]
            if call in values:
                waiting.pop()
                continue
            name, at = call
            sources = calls[name][at]
            missing = [(n, a) for n, a, _ in sources if (n, a) not in values]
            if missing:
                if call in open_calls:
                    raise Uncertain  # a cycle
                open_calls.add(call)
                waiting += missing
                continue
            values[call] = self.layer(names[name], [_output(values[n, a], which) for n, a, which in sources])
            waiting.pop()

    def sequential(self, model: Node, entering: list[Value]) -> list[Value]:
        current = entering or [Value(_NOTHING, None)]
        for child in model.children:
            if child.class_name != "InputLayer":
                current = self.layer(child, current)
        return current

    def layer(self, node: Node, entering: list[Value]) -> list[Value]:
        """The outputs of one call of a layer."""
        self.calls += 1
        if self.calls > CALLS_LIMIT:
            raise Uncertain
        if node.is_batchnorm:
            self.inputs.setdefault(node.path, set()).update(*(value.reached for value in entering))
            maker = entering[0].maker if len(entering) == 1 else None
            self.makers.setdefault(node.path, set()).add(id(maker) if maker is not None else 0)
            return [Value(frozenset({node.path}), None)]
        if node.is_model:
            return self.model(node, entering)
        if node.class_name in _WRAPPERS and len(node.children) == 1:
            return self.layer(node.children[0], entering)
        if any(child.is_batchnorm for child in node.walk()):
            raise Uncertain  # inside a layer whose call is not known
        reached = frozenset().union(*(value.reached for value in entering))
        linear = node.class_name == "Activation" and node.config.get("activation") == "linear"
        if len(entering) == 1 and (node.class_name in _PASS or linear):
            return [Value(reached, entering[0].maker)]
        return [Value(reached, node if node.class_name in _KERNELS else None)]


def _shift(name: str, count: int, taken: list[_Ref]) -> int:
    """Keras counts a nested model's creation as its first call if it had a known input then: 0 or 1.

    Only how others refer to its `count` calls tells.
    """
    used = {at for n, at, _ in taken if n == name}
    if not used or 0 in used:
        return 0
    if count in used:
        return 1
    raise Uncertain


def _less(ref: _Ref, name: str, shift: int) -> _Ref:
    if ref[0] != name:
        return ref
    if ref[1] < shift:
        raise Uncertain
    return ref[0], ref[1] - shift, ref[2]


def _output(values: list[Value], which: int) -> Value:
    return values[which] if len(values) > 1 else values[0]


def _calls(node: Node, names: dict[str, Node]) -> list[list[_Ref]]:
    """For each call of a layer, the tensors that it takes."""
    inbound = node.inbound or []
    if not isinstance(inbound, list):
        raise Uncertain
    if inbound and _is_reference(inbound[0], names):  # one call, listed without a list around it
        inbound = [inbound]
    return [_references(call, names) for call in inbound]


def _is_reference(value: Any, names: dict[str, Node]) -> bool:
    return (
        isinstance(value, list)
        and 3 <= len(value) <= 4
        and isinstance(value[0], str)
        and value[0] in names
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value[1:3])
    )


def _references(value: Any, names: dict[str, Node]) -> list[_Ref]:
    """Every tensor that a nested value mentions, in order."""
    if isinstance(value, dict):
        history = (
            value.get("config", {}).get("keras_history") if value.get("class_name") == "__keras_tensor__" else None
        )
        if history is not None:
            return [(history[0], history[1], history[2])] if history[0] in names else _unknown()
        return [ref for part in value.values() for ref in _references(part, names)]
    if isinstance(value, list):
        if _is_reference(value, names):
            more = _references(value[3], names) if len(value) == 4 else []
            return [(value[0], value[1], value[2]), *more]
        return [ref for part in value for ref in _references(part, names)]
    return []


def _unknown() -> list[_Ref]:
    raise Uncertain


# ---- kernels

# class name -> (kind, spatial dimensions, a pattern of the weight's name, its number among the layer's arrays)
_KERNELS = {
    "Dense": ("dense", 0, "kernel", 0),
    "Conv1D": ("conv", 1, "kernel", 0), "Conv2D": ("conv", 2, "kernel", 0), "Conv3D": ("conv", 3, "kernel", 0),
    "Conv1DTranspose": ("transposed", 1, "kernel", 0), "Conv2DTranspose": ("transposed", 2, "kernel", 0),
    "Conv3DTranspose": ("transposed", 3, "kernel", 0),
    "DepthwiseConv1D": ("depthwise", 1, "(?:depthwise_)?kernel", 0),
    "DepthwiseConv2D": ("depthwise", 2, "(?:depthwise_)?kernel", 0),
    "SeparableConv1D": ("separable", 1, "pointwise_kernel", 1), "SeparableConv2D": ("separable", 2, "pointwise_kernel", 1),
}  # fmt: skip


def where_kernel_is(node: Node) -> tuple[str, int]:
    """(a pattern of the weight's name, its number among the layer's arrays)."""
    return _KERNELS[node.class_name][2:]


def kernel_of(node: Node, fetch: Callable[[], Array] | None, stored: tuple[int, ...] | None = None) -> Kernel | None:
    """The Kernel of a layer; `fetch` gives its array as Keras stores it. None where its shape is not known.

    The shape comes from the config, or is `stored`, that of the array as Keras stores it.
    """
    kind, rank, _, _ = _KERNELS[node.class_name]
    shape = stored if stored is not None else _stored_shape(node, kind, rank)
    if shape is None or len(shape) != rank + 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        return None
    *space, rows, columns = shape
    groups = node.config.get("groups", 1)
    if kind == "depthwise":
        neutral = (rows * columns, 1, *space)
    elif kind == "transposed":
        neutral = (rows, columns, *space)
    else:
        neutral = (columns, rows, *space)
    if kind == "conv" and groups != 1:
        kind = "grouped"

    def values() -> Array:
        array = fetch() if fetch is not None else None
        if array is None or array.shape != tuple(shape):
            raise ValueError(f"{node.path}: no kernel of shape {tuple(shape)}")
        spatial = range(rank)
        if kind in ("depthwise", "transposed"):
            array = array.transpose(rank, rank + 1, *spatial)
        else:
            array = array.transpose(rank + 1, rank, *spatial)
        result: Array = array.reshape(neutral)
        return result

    before = _spatial(node, rank) if kind == "separable" else None
    return Kernel(kind, neutral, node.path, values if fetch is not None else None, before)


def _spatial(node: Node, rank: int) -> tuple[int, ...] | None:
    """The extents of a separable layer's depthwise kernel."""
    size = node.config.get("kernel_size")
    size = [size] * rank if isinstance(size, int) else size
    return tuple(size) if isinstance(size, list) and all(isinstance(n, int) for n in size) else None


def _stored_shape(node: Node, kind: str, rank: int) -> tuple[int, ...] | None:
    """The array's shape by the config: filters, kernel_size, groups, and the shape that the layer was built for."""
    build = node.build.get("input_shape") if isinstance(node.build, dict) else None
    if not isinstance(build, list) or len(build) < 2:
        return None
    first = node.config.get("data_format") == "channels_first" and rank
    channels = build[1] if first else build[-1]
    size, groups = node.config.get("kernel_size", []), node.config.get("groups", 1)
    multiplier = node.config.get("depth_multiplier", 1)
    size = [size] * rank if isinstance(size, int) else size
    filters = node.config.get("units" if kind == "dense" else "filters")
    numbers = [channels, groups, multiplier, *(size if isinstance(size, list) else [None])]
    if not all(isinstance(n, int) and 0 < n < 1 << 31 for n in numbers) or (rank and len(size) != rank):
        return None
    if kind == "depthwise":
        return (*size, channels, multiplier)
    if not isinstance(filters, int):
        return None
    if kind == "transposed":
        return (*size, filters, channels)
    if kind == "separable":
        return (*([1] * rank), channels * multiplier, filters)
    return (*size, channels // groups, filters) if kind == "conv" else (channels, filters)


def with_live_evidence(source: Any, layers: Layers, found: dict[str, Any]) -> Layers:
    """The layers of a live model with kernel and inputs where its own config makes them certain."""
    from bnport.adapters.keras import config

    if len(found) == 1 and next(iter(found.values())) is source:
        return layers
    try:
        value = {"class_name": type(source).__name__, "config": source.get_config()}
        root = config.tree(_plain(value), "config")
        known, feeding = evidence(root)
    except Exception:  # a custom layer's get_config may raise anything, and evidence is not worth an error
        return layers
    if set(known) - set(found):
        return layers
    by_path = _live_by_path(source)
    for name, layer in layers.items():
        inputs = known.get(name) if len(known) == len(found) else None
        maker = feeding.get(name)
        kernel = None
        if maker is not None and (live := by_path.get(maker.path)) is not None:
            kernel = _live_kernel(maker, live)
        if kernel is not None or inputs is not None:
            layers[name] = layer.but(kernel=kernel, inputs=inputs)
    return layers


def _live_kernel(node: Node, live: Any) -> Kernel | None:
    from bnport.adapters.keras.live import numbers

    names: tuple[str, ...] = ("depthwise_kernel", "pointwise_kernel", "kernel")  # tf_keras', both's, Keras 3's
    if node.class_name.startswith("Separable"):
        names = ("pointwise_kernel",)
    held = ((name, value) for name in names if (value := getattr(live, name, None)) is not None)
    name, variable = next(held, ("", None))
    if variable is None:
        return None
    # asked for again when it is read: with LoRA or 4-bit integers it is a tensor that is computed each time
    return kernel_of(node, lambda: numbers(getattr(live, name)), tuple(int(n) for n in variable.shape))


def _live_by_path(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = [(model, "")]
    while waiting:
        holder, prefix = waiting.pop()
        for child in holder._flatten_layers(include_self=False, recursive=False):
            path = f"{prefix}{child.name}"
            if path not in found:
                found[path] = child
                waiting.append((child, f"{path}/"))
    return found


def _plain(value: Any) -> Any:
    """A live config as JSON would have it: tuples and Keras' list wrappers as lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
