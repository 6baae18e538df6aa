"""Which kernel feeds a live BatchNorm, and which other ones lie before it: by torch.fx, without an example input."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.adapters.torch.export import NORMS
from bnport.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# What passes every channel on by itself, so that the kernel before it still decides what the channels are
_CHANNELWISE_MODULES = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SiLU", "GELU", "Hardswish", "Sigmoid", "Tanh",
                        "Mish", "Identity", "Dropout", "Dropout2d", "MaxPool2d", "AvgPool2d", "ZeroPad2d", "MaxPool1d",
                        "AvgPool1d", "MaxPool3d", "AvgPool3d", "AdaptiveAvgPool2d", "BlurPool2d")  # fmt: skip
_CHANNELWISE_CALLS = ("relu", "relu_", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh",
                      "dropout", "dropout2d", "max_pool2d", "avg_pool2d", "pad", "contiguous", "max_pool1d",
                      "max_pool3d", "boolean_dispatch", "clone", "detach")  # fmt: skip


def traced(model: Any, norms: Iterable[str]) -> dict[str, tuple[str, tuple[str, ...]]] | None:
    """BatchNorm name -> (name of the module whose kernel feeds it or "", names of the BatchNorms just before it).

    None if the model cannot be traced symbolically (its path depends on the data). Layers that its forward does not
    reach in the mode that it is in (an auxiliary head in eval mode) are missing.
    """
    import logging

    import torch
    import torch.fx

    wanted = set(norms)
    kernels = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
    modules = dict(model.named_modules())
    plain = _without(modules, wanted, kernels)

    class Tracer(torch.fx.Tracer):  # type: ignore[misc]
        proxy_buffer_attributes = True  # a counter that forward() raises is raised in the trace, not in the model

        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            return (
                module_qualified_name in wanted
                or isinstance(m, kernels)
                or module_qualified_name in plain  # pooling that pads by the size of its input, and the like
                or bool(super().is_leaf_module(m, module_qualified_name))
            )

    if isinstance(model, torch.jit.ScriptModule) or wanted == {""}:
        return None
    logging_level = logging.root.manager.disable
    with _as_they_were(modules.values()), torch.random.fork_rng(devices=[]):
        try:
            logging.disable(logging.CRITICAL)
            graph = Tracer().trace(model)
        except Exception:  # whatever the user's forward does with a stand-in for a tensor
            return None
        finally:
            logging.disable(logging_level)
    return _walked(graph, modules, wanted, kernels)


@contextlib.contextmanager
def _as_they_were(modules: Iterable[Any]) -> Iterator[None]:
    """Afterwards every module has the attributes that it had, and its lists, dicts and sets the same content."""
    before = [(module, dict(module.__dict__)) for module in modules]
    contents = [
        (value, value.copy())
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, list | dict | set)
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, copy in contents:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)


def _without(modules: Mapping[str, Any], wanted: set[str], kernels: tuple[type, ...]) -> set[str]:
    """The modules that hold neither a kernel nor a BatchNorm: what they compute inside does not matter here."""
    holding = {""}
    for name, module in modules.items():
        if name in wanted or isinstance(module, kernels):
            while name:
                holding.add(name)
                name = name.rpartition(".")[0]
    return set(modules) - holding


def _walked(
    graph: Any, modules: Mapping[str, Any], wanted: set[str], kernels: tuple[type, ...]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    before: dict[Any, dict[str, None]] = {}  # the BatchNorms that reach a node with none between, in order
    feeds: dict[Any, str] = {}  # the kernel module that a node's channels come from
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for node in graph.nodes:
        reached: dict[str, None] = {}
        for source in node.all_input_nodes:
            reached.update(before[source])
        fed_by = feeds.get(node.all_input_nodes[0], "") if len(node.all_input_nodes) == 1 else ""
        before[node], feeds[node] = reached, ""
        if node.op == "call_module":
            module = modules.get(node.target)
            if node.target in wanted:
                kernel, inputs = found.get(node.target, (fed_by, ()))
                found[node.target] = (kernel if kernel == fed_by else "", tuple(dict.fromkeys((*inputs, *reached))))
                before[node] = {node.target: None}
            elif isinstance(module, kernels):
                feeds[node] = node.target
            elif type(module).__name__ in _CHANNELWISE_MODULES:
                feeds[node] = fed_by
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name in _CHANNELWISE_CALLS:
                feeds[node] = fed_by
    return found


# ---- exported programs, whose layers hold tensors and nothing else

_ORDER = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")  # of the function


class Exported(NamedTuple):
    """A call of batch_norm in a GraphModule: its arguments by name, constants and nodes."""

    graph_module: Any
    arguments: Mapping[str, Any]

    @property
    def epsilon(self) -> float | None:
        """As the call gives it."""
        value = self.arguments.get("eps", self.arguments.get("epsilon"))
        return float(value) if isinstance(value, int | float) else None

    def taken(self, own: Mapping[str, Any], shown: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
        """The layer's tensors as the call takes them, and which are its weight and bias, as `roles_of` takes it.

        Raises FormatError for a parameter that the graph computes, other than a pruned one.
        """
        if self.arguments.get("training") is True:
            raise FormatError(
                f"{shown} was exported in training mode, so it uses the statistics of each batch; call eval() before"
            )
        tensors = {name: own[name] for name in ("running_mean", "running_var", "num_batches_tracked") if name in own}
        given: dict[str, tuple[str, ...]] = {}
        for role in ("weight", "bias"):
            node = self.arguments.get(role)
            pair = (f"{role}_orig", f"{role}_mask")
            if node is None:
                given[role] = ()
            elif node.op == "get_attr":
                module, _, last = node.target.rpartition(".")
                tensors[role], given[role] = getattr(self.graph_module.get_submodule(module), last), (role,)
            elif node.name.startswith("mul") and set(_sources(node)) == {f"{self._prefix}{name}" for name in pair}:
                tensors.update({name: own[name] for name in pair})
                given[role] = pair
            else:
                raise FormatError(
                    f"{shown}: its {role} is computed by the graph ({node.name}) and is not stored; make it a plain parameter"
                    " before torch.export.export, or give bnport the module that was exported"
                )
        return tensors, given

    @property
    def _prefix(self) -> str:
        return str(self.arguments["running_mean"].target).removesuffix("running_mean")


def _sources(node: Any) -> list[str]:
    """Names of the attributes that a node is computed from, through casts."""
    return [
        before.target if before.op == "get_attr" else before.all_input_nodes[0].target
        for before in node.all_input_nodes
        if before.op == "get_attr" or (before.name.startswith("to") and before.all_input_nodes)
    ]


def exported_norms(model: Any) -> dict[int, Exported]:
    """id of a module -> the call of batch_norm that uses its running_mean, in every GraphModule of the model."""
    import torch
    import torch.fx

    found: dict[int, Exported] = {}
    for module in model.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            schema = getattr(node.target, "_schema", None)
            if node.target is torch.nn.functional.batch_norm:
                names = list(_ORDER)
            elif schema is not None and schema.name.removeprefix("aten::") in NORMS:
                names = [argument.name for argument in schema.arguments]
            else:
                continue
            arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            mean = arguments.get("running_mean")
            if mean is not None and mean.op == "get_attr":
                owner = module.get_submodule(mean.target.rpartition(".")[0])
                found.setdefault(id(owner), Exported(module, arguments))
    return found
