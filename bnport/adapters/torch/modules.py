"""BatchNorm layers in a whole pickled nn.Module, read from its recorded state without its class and without running it.

Here epsilon, momentum, groups and the kind of every layer are real. Works for classes that are not installed, because
nn.Module keeps everything in three dicts: _modules, _parameters and _buffers.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.torch.layers import AVERAGED, INSTANCE_NORMS, LAZY, Definition, feeding, kernel_of, make_layer
from bnport.adapters.torch.parameters import by_role, is_foreign, roles_of
from bnport.adapters.torch.search import is_lazy, named_modules, state_of
from bnport.adapters.torch.state import plain_names
from bnport.containers.pickle import Global, Node
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from typing import Any

    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.containers.tensor import Tensor
    from bnport.layer import Kernel, Layer


def class_of(value: Any) -> str:
    """ "module.Class" of a pickled object."""
    if isinstance(value, Node):
        if value.path in ("copy_reg._reconstructor", "copyreg._reconstructor") and value.args:
            base = value.args[0]
            return base.path if isinstance(base, Global) else ""
        return value.path
    return ""


def layers_of_module(root: Any, checkpoint: Checkpoint, inplace_abn: bool | None) -> tuple[list[Layer], list[str]]:
    """The BatchNorm layers of a pickled module, in its own order, and notes about the whole."""
    found = named_modules(root, checkpoint, state_of, lambda state: checkpoint.items(state["_modules"]))
    modules = [(name, class_of(value), state) for name, value, state in found]
    plain, notes = plain_names([name for name, _, _ in modules])
    kernels = feeding(_definitions(modules, plain, checkpoint))
    layers, instance_norms = [], 0
    for name, kind, state in modules:
        short = kind.rpartition(".")[2]
        if "InstanceNorm" in short:
            instance_norms += 1
        elif _is_batchnorm(short, state, checkpoint):
            layers.append(_layer(plain[name], kind, state, checkpoint, inplace_abn, kernels.get(plain[name])))
    if instance_norms:
        notes.append(INSTANCE_NORMS.format(instance_norms))
    if layers and any(_averages_no_buffers(state, checkpoint) for _, _, state in modules):
        notes.append(AVERAGED.format(" (use_buffers=False)"))
    return layers, notes


def _averages_no_buffers(state: dict[str, Any], checkpoint: Checkpoint) -> bool:
    return state.get("use_buffers") is False and "n_averaged" in (checkpoint.items(state.get("_buffers")) or {})


def _get(state: dict[str, Any], name: str, checkpoint: Checkpoint) -> Any:
    for group in ("_parameters", "_buffers"):
        items = checkpoint.items(state.get(group)) or {}
        if items.get(name) is not None:
            return items[name]
    return None


def _is_batchnorm(short: str, state: dict[str, Any], checkpoint: Checkpoint) -> bool:
    buffers = checkpoint.items(state.get("_buffers")) or {}
    if buffers.get("running_mean") is not None and buffers.get("running_var") is not None:
        return True
    # num_features and track_running_stats: attributes of torch's own _NormBase and of nothing else
    return "BatchNorm" in short and "running_mean" in buffers and "track_running_stats" in state


def _own(state: dict[str, Any], name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that lie directly in a layer: plain attributes, parameters and buffers."""
    where = f"{checkpoint.where}: {printable(name)}"
    own = {}
    for last, value in state.items():
        tensor = checkpoint.tensor(value, f"{name}.{last}") if isinstance(value, Node) else None
        if tensor is not None:
            own[last] = tensor
    plain = set(own)
    for group in ("_parameters", "_buffers"):
        for last, value in (checkpoint.items(state.get(group)) or {}).items():
            if value is None or not isinstance(last, str):
                continue
            if is_lazy(value):
                raise FormatError(f"{where} {LAZY}")
            tensor = checkpoint.tensor(value, f"{name}.{last}")
            if tensor is None:
                raise FormatError(f"{where}.{printable(last)}: is no tensor that is understood here")
            own[last] = tensor
    for role in plain & {"weight", "bias"}:
        if f"{role}_orig" in own or f"{role}_g" in own:
            del own[role]  # as it was computed at the last forward pass, perhaps before what it comes from changed
    return own


def _layer(
    name: str,
    kind: str,
    state: dict[str, Any],
    checkpoint: Checkpoint,
    inplace_abn: bool | None,
    kernel: Kernel | None,
) -> Layer:
    where, short = f"{checkpoint.where}: {printable(name)}", kind.rpartition(".")[2]
    own = _own(state, name, checkpoint)
    channels = state.get("num_features")
    channels = channels if isinstance(channels, int) and channels > 0 else None
    size = own["running_mean"].size if "running_mean" in own else channels or 0
    children = checkpoint.items(state.get("_modules")) or {}
    parametrized = _parametrized(children.get("parametrizations"), checkpoint)
    roles = roles_of(own, parametrized, where, size)
    tensors = by_role(own, roles, name)
    epsilon, momentum = state.get("eps"), state.get("momentum")
    if momentum is not None and not isinstance(momentum, float | int):
        raise FormatError(f"{where}: momentum {printable(momentum)} is no number")
    notes = list(roles.notes)
    if is_foreign(kind):
        notes.append(
            f"its class {printable(kind)} is none that bnport knows, and no file holds what a class computes: taken for a"
            " plain BatchNorm"
        )
    activation = children.get("act") or state.get("activation")
    shown = activation if isinstance(activation, str) else class_of(activation).rpartition(".")[2]
    if shown and shown.lower() not in ("identity", "none"):
        notes.append(f"{short} applies {printable(shown)} after it, which is not part of the record")
    inplace = short.startswith("InPlaceABN") if inplace_abn is None else inplace_abn
    return make_layer(
        name,
        tensors,
        checkpoint.where,
        epsilon=epsilon,
        momentum=momentum,
        counter=own.get("num_batches_tracked"),
        inplace_abn=inplace and tensors["weight"] is not None,
        kernel=kernel,
        notes=notes,
        channels=channels,
    )


def _parametrized(holder: Any, checkpoint: Checkpoint) -> list[str]:
    """Names of what torch.nn.utils.parametrize put into a layer."""
    state = state_of(holder)
    names = checkpoint.items(state["_modules"]) if state is not None else None
    return [f"parametrizations.{name}" for name in names or ([] if holder is None else ["weight"])]


def _definitions(
    modules: list[tuple[str, str, dict[str, Any]]], plain: dict[str, str], checkpoint: Checkpoint
) -> list[Definition]:
    definitions: list[Definition] = []
    for name, kind, state in modules:
        short = kind.rpartition(".")[2]
        tensor = checkpoint.tensor(_get(state, "weight", checkpoint), name)
        if _is_batchnorm(short, state, checkpoint):
            mean = checkpoint.tensor(_get(state, "running_mean", checkpoint), name)
            definitions.append(Definition(plain[name], mean.shape[0] if mean is not None and mean.shape else 0))
        elif tensor is not None and len(tensor.shape) >= 2:
            exact = kernel_kind(short, tensor.shape, state.get("groups"))
            kernel = kernel_of(plain[name], tensor, kind=exact, first=not definitions)
            definitions.append(Definition(plain[name], kernel.shape[0], kernel))
    return definitions


def kernel_kind(short: str, shape: tuple[int, ...], groups: Any) -> str | None:
    """The kind of kernel of a torch class with that weight; None if the class does not tell."""
    if "ConvTranspose" in short:
        return "transposed"
    if len(shape) == 2:
        return "dense"
    if type(groups) is not int:
        return None
    if groups == 1:
        return "conv"
    return "depthwise" if shape[1] == 1 else "grouped"
