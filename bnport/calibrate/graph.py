"""A model as a list of steps in an order in which they can run, nested models taken apart.

A functional or Sequential model becomes one step per node of its graph; a model inside it is inlined, however deep, so
that its layers take part one by one. What has no graph (a subclassed model, a wrapper, a custom layer) is one step,
with the BatchNorm layers somewhere inside. Running all steps calls the same layers on the same tensors with the same
arguments as calling the model does.

Keras 3: Functional._nodes_by_depth, node.arguments.fill_in, Functional._standardize_inputs. Keras 2: _nodes_by_depth,
node.map_arguments, _flatten_to_reference_inputs. They are not public: where one is missing, the model is one step.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bnport.calibrate.models import below

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnport.calibrate.models import LiveModel, Norm

    Key = int
    Run = Callable[[list[Any]], Sequence[Any]]

DATA: Key = 0  # the key of a whole batch, as the caller gave it

# Keras 3 layers whose __call__, at inference and on tensors of their dtype without masks, comes to their call(): what
# lies between (signatures, masks, casts, scopes, regularizers) is half of the time that small batches take.
PLAIN = """
Activation Add Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Concatenate Conv1D Conv2D
Conv3D Cropping2D Dense DepthwiseConv1D DepthwiseConv2D Dropout ELU Flatten GlobalAveragePooling2D GlobalMaxPooling2D
LeakyReLU MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum Multiply ReLU Reshape SeparableConv2D Subtract
UpSampling2D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""


class Step:
    """One call of a layer or operation.

    inputs, outputs: keys of the values that it takes and makes.
    run:             list of input values -> flat sequence of output values.
    norms:           the BatchNorm layers that it may call.
    whole:           True for a BatchNorm layer itself; False where they are somewhere inside.
    training:        True for a BatchNorm layer itself that the graph calls with training=True whatever the model is called
                     with (Keras 2), unless it is frozen.
    layer:           what is called; None for what the graph itself does with its inputs and outputs.
    written:         keys of inputs that it was seen to work on in place (torch; it was given a copy).
    """

    __slots__ = ("inputs", "layer", "name", "norms", "outputs", "run", "training", "whole", "written")

    def __init__(
        self,
        name: str,
        inputs: tuple[Key, ...],
        outputs: tuple[Key, ...],
        run: Run,
        norms: tuple[Norm, ...],
        whole: bool,
        layer: Any = None,
    ) -> None:
        self.name, self.inputs, self.outputs, self.run = name, inputs, outputs, run
        self.norms, self.whole, self.layer = norms, whole, layer
        self.training = False
        self.written: set[Key] = set()

    def __repr__(self) -> str:
        return f"Step({self.name}, {self.inputs} -> {self.outputs})"


def steps_of(live: LiveModel) -> tuple[list[Step], bool]:
    """The steps of a model, and whether it was taken apart (False: it is one step)."""
    try:
        builder = _Builder(live)
        outputs = builder.inline(live.model, (DATA,), lambda values: values[0])
        if outputs is not None:
            return builder.steps, True
    except (AttributeError, KeyError, TypeError, ValueError):  # another version's internals
        pass
    return [whole_model(live)], False


def whole_model(live: LiveModel) -> Step:
    """The model as one step."""

    def call(values: list[Any]) -> Sequence[Any]:
        return [live.call(values[0])]

    step = Step(live.what, (DATA,), (DATA + 1,), call, tuple(live.norms), False, live.model)
    return _on_copies(live, step)


def _on_copies(live: LiveModel, step: Step) -> Step:
    """Where a layer may work in place on a tensor that others read, it is given a copy of it.

    Only tensors of torch can be written to, and Keras' own layers do not: others keep what they are given.
    """
    if live.backend != "torch" or step.layer is None or not any(_is_foreign(layer) for layer in below(step.layer)):
        return step
    run = step.run

    def copied(values: list[Any]) -> Sequence[Any]:
        copies = [live.tree.map_structure(live.copied, value) for value in values]
        try:
            return run(copies)
        finally:
            for key, copy in zip(step.inputs, copies, strict=True):
                if any(getattr(leaf, "_version", 0) for leaf in live.tree.flatten(copy)):
                    step.written.add(key)

    step.run = copied
    return step


def _is_foreign(layer: Any) -> bool:
    """Whether a layer runs code that is not Keras'."""
    codes = [type(layer), getattr(layer, "activation", None)]
    if type(layer).__name__ in ("Lambda", "TorchModuleWrapper"):
        return True
    modules = [getattr(code, "__module__", None) or type(code).__module__ for code in codes if code is not None]
    return any(module.split(".")[0] not in ("keras", "tf_keras") for module in modules)


class _Builder:
    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.steps: list[Step] = []
        self.by_layer = {id(norm.layer): norm for norm in live.norms}
        self.next_key = DATA + 1

    def keys(self, count: int) -> tuple[Key, ...]:
        keys = tuple(range(self.next_key, self.next_key + count))
        self.next_key += count
        return keys

    def add(
        self,
        name: str,
        inputs: tuple[Key, ...],
        count: int,
        run: Run,
        layer: Any = None,
    ) -> tuple[Key, ...]:
        outputs = self.keys(count)
        norms = () if layer is None else self.inside(layer)
        whole = id(layer) in self.by_layer and norms[0].plain
        self.steps.append(_on_copies(self.live, Step(name, inputs, outputs, run, norms, whole, layer)))
        return outputs

    def inside(self, layer: Any) -> tuple[Norm, ...]:
        if id(layer) in self.by_layer:
            return (self.by_layer[id(layer)],)
        if not hasattr(layer, "_flatten_layers"):
            return ()
        below = {id(inner) for inner in layer._flatten_layers(include_self=False, recursive=True)}
        return tuple(norm for key, norm in self.by_layer.items() if key in below)

    def inline(self, layer: Any, inputs: tuple[Key, ...], pack: Callable[[list[Any]], Any]) -> tuple[Key, ...] | None:
        """Add the steps of a functional or Sequential `layer` called on pack(values of `inputs`); its output keys.

        None, and nothing added, if it has no graph of its own.
        """
        graph = _graph_of(self.live, layer)
        if graph is None:
            return None
        if self.live.version == 3:
            return self._inline_3(layer, graph, inputs, pack)
        return self._inline_2(graph, inputs, pack)

    # ---- Keras 3

    def _inline_3(
        self, layer: Any, graph: Any, inputs: tuple[Key, ...], pack: Callable[[list[Any]], Any]
    ) -> tuple[Key, ...]:
        live = self.live

        def enter(values: list[Any]) -> Any:
            given = pack(values)
            if getattr(layer, "_convert_input_args", False):  # a Sequential converts as any layer does
                given = live.tree.map_structure(lambda x: _converted(live, layer, x), given)
            masks = [None if x is None else live.mask_of(x) for x in live.tree.flatten(given)]
            standard = live.tree.flatten(graph._standardize_inputs(given))
            for x, mask in zip(standard, masks, strict=False):
                if mask is not None:
                    live.set_mask(x, mask)
            return standard

        keys = self.add(f"{layer.name} (inputs)", inputs, len(graph.inputs), enter)
        known: dict[int, Key] = {id(x): key for x, key in zip(graph.inputs, keys, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if not node.operation or node.is_input or any(id(x) not in known for x in node.input_tensors):
                    continue
                self._node_3(node, known)
        outputs = tuple(known[id(x)] for x in graph.outputs)
        if not getattr(layer, "supports_masking", False):
            return outputs

        def leave(values: list[Any]) -> Sequence[Any]:
            given = pack(values[: len(inputs)])
            masks = live.tree.map_structure(lambda x: None if x is None else live.mask_of(x), given)
            out = values[len(inputs) :]
            if any(mask is not None for mask in live.tree.flatten(masks)):
                packed = live.tree.pack_sequence_as(graph._outputs_struct, out)
                layer._set_mask_metadata(given, packed, masks)
            return out

        # the model's inputs are needed for their masks only; at the top nothing comes after
        return (
            outputs
            if layer is live.model
            else self.add(f"{layer.name} (outputs)", inputs + outputs, len(outputs), leave)
        )

    def _node_3(self, node: Any, known: dict[int, Key]) -> None:
        operation, tensors = node.operation, list({id(x): x for x in node.input_tensors}.values())
        keys = tuple(known[id(x)] for x in tensors)
        ids = [id(x) for x in tensors]
        inner = self.inside(operation)
        if inner and id(operation) not in self.by_layer:
            args, kwargs = node.arguments.args, node.arguments.kwargs
            if len(args) == 1 and not {k for k, v in kwargs.items() if v is not None} - {"training"}:

                def pack(values: list[Any]) -> Any:
                    return node.arguments.fill_in(dict(zip(ids, values, strict=True)))[0][0]

                outputs = self.inline(operation, keys, pack)
                if outputs is not None:
                    known.update((id(x), key) for x, key in zip(node.outputs, outputs, strict=True))
                    return
        trains = "training" in getattr(operation, "_call_context_args", ()) or getattr(
            operation, "_call_has_training_arg", False
        )

        plain = _is_plain(self.live, operation)
        takes_training = plain and "training" in inspect.signature(operation.call).parameters

        def run(values: list[Any]) -> Sequence[Any]:
            args, kwargs = node.arguments.fill_in(dict(zip(ids, values, strict=True)))
            if trains:
                kwargs = {**kwargs, "training": False}  # as Functional passes its own on to every layer
            if plain and all(self.live.as_it_is(operation, x) for x in values):
                if not takes_training:  # a layer drops what its call() does not take
                    kwargs.pop("training", None)
                return [operation.call(*args, **kwargs)]
            flat: Sequence[Any] = self.live.tree.flatten(operation(*args, **kwargs))
            return flat

        outputs = self.add(operation.name, keys, len(node.outputs), run, operation)
        known.update((id(x), key) for x, key in zip(node.outputs, outputs, strict=True))

    # ---- Keras 2

    def _inline_2(self, graph: Any, inputs: tuple[Key, ...], pack: Callable[[list[Any]], Any]) -> tuple[Key, ...]:
        live = self.live

        def enter(values: list[Any]) -> Sequence[Any]:
            given = live.tree.map_structure(lambda x: x if hasattr(x, "numpy") else live.tensor(x), pack(values))
            flat = graph._flatten_to_reference_inputs(given)
            masks = [live.mask_of(x) for x in flat]
            standard = [
                graph._conform_to_reference_input(x, ref_input=r) for x, r in zip(flat, graph.inputs, strict=True)
            ]
            return [x if m is None else live.set_mask(x, m) for x, m in zip(standard, masks, strict=True)]

        keys = self.add(f"{graph.name} (inputs)", inputs, len(graph.inputs), enter)
        known: dict[str, Key] = {str(id(x)): key for x, key in zip(graph.inputs, keys, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if not node.is_input and all(x in known for x in node.flat_input_ids):
                    self._node_2(node, known)
        return tuple(known[str(id(x))] for x in graph.outputs)

    def _node_2(self, node: Any, known: dict[str, Key]) -> None:
        layer, ids = node.layer, list(dict.fromkeys(node.flat_input_ids))
        keys = tuple(known[x] for x in ids)
        inner = self.inside(layer)

        def arguments(values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            often = len(node.flat_input_ids)  # map_arguments pops one for every use
            args, kwargs = node.map_arguments({x: [value] * often for x, value in zip(ids, values, strict=True)})
            return tuple(args), kwargs

        if inner and id(layer) not in self.by_layer and len(node.call_args) == 1 and not node.call_kwargs:
            outputs = self.inline(layer, keys, lambda values: arguments(values)[0][0])
            if outputs is not None:
                known.update(zip(node.flat_output_ids, outputs, strict=True))
                return

        def run(values: list[Any]) -> Sequence[Any]:
            args, kwargs = arguments(values)
            if layer._expects_training_arg and kwargs.get("training") is None:
                kwargs["training"] = False
            flat: Sequence[Any] = self.live.tree.flatten(layer(*args, **kwargs))
            return flat

        outputs = self.add(layer.name, keys, len(node.flat_output_ids), run, layer)
        self.steps[-1].training = bool(self.steps[-1].whole and layer.trainable and node.call_kwargs.get("training"))
        known.update(zip(node.flat_output_ids, outputs, strict=True))


def _graph_of(live: LiveModel, layer: Any) -> Any:
    """The functional graph that calling `layer` runs, or None: a subclass that overrides call() has none."""
    keras = live.keras
    call = getattr(type(layer), "call", None)
    if live.version == 3:
        functional = keras.src.models.functional.Functional
        if isinstance(layer, keras.Sequential):
            return layer._functional if call is keras.Sequential.call else None
    else:
        functional = _functional_2(keras)
        if isinstance(layer, keras.Sequential) and call is keras.Sequential.call:
            return layer if layer._graph_initialized else None
    return layer if isinstance(layer, functional) and call is functional.call else None


def _is_plain(live: LiveModel, layer: Any) -> bool:
    """Whether a Keras 3 layer is one of PLAIN itself, of one dtype, and set up so that nothing else hangs on its calls."""
    keras, name = live.keras, type(layer).__name__
    if name not in PLAIN.split() or type(layer) is not getattr(keras.layers, name, None) or "call" in vars(layer):
        return False
    try:
        policy = layer.dtype_policy
        return bool(
            layer.built
            and type(policy) is keras.dtype_policies.DTypePolicy
            and policy.compute_dtype == policy.variable_dtype
            and layer.activity_regularizer is None
            and getattr(layer, "quantization_mode", None) is None
            and not getattr(layer, "_remat_mode", None)
            and keras.distribution.distribution() is None
        )
    except AttributeError:  # another version: then by __call__, as any layer
        return False


def _functional_2(keras: Any) -> Any:
    import importlib

    return importlib.import_module(f"{keras.__name__}.src.engine.functional").Functional


def _converted(live: LiveModel, layer: Any, x: Any) -> Any:
    mask = live.mask_of(x)
    y = layer.dtype_policy.convert_input(x, layer.autocast, layer.input_dtype)
    return y if mask is None else live.set_mask(y, mask)


def needed(steps: list[Step], selected: set[int]) -> list[Step]:
    """The steps that a BatchNorm layer in `selected` (ids of Norm) depends on, or is in; the rest need not run."""
    wanted: set[Key] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        if wanted.intersection(step.outputs) or any(id(norm) in selected for norm in step.norms):
            kept.append(step)
            wanted.update(step.inputs)
    return kept[::-1]
