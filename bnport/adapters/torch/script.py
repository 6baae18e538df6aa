"""BatchNorm layers of a TorchScript archive: the tensors from its pickle, epsilon and roles from its code."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.torch.code import applied, given_by
from bnport.adapters.torch.layers import INSTANCE_NORMS, Definition, feeding, kernel_of, make_layer
from bnport.adapters.torch.parameters import by_role, is_foreign, roles_of
from bnport.adapters.torch.search import named_modules
from bnport.adapters.torch.state import plain_names
from bnport.containers.pickle import Node
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from typing import Any

    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.layer import Kernel, Layer

CODE_LIMIT = 8 << 20  # bytes of one source file

IN_TRAINING = "was traced in training mode, so it uses the statistics of each batch; call eval() before torch.jit.trace"
FOREIGN = "its class {} is none that bnport knows: what it passes to batch_norm is read, not what else it computes"


def layers_of_script(checkpoint: Checkpoint, inplace_abn: bool | None) -> tuple[list[Layer], list[str]]:
    """The BatchNorm layers of a scripted or traced module, in its own order, and notes about the whole."""
    found = named_modules(checkpoint.value, checkpoint, _state_of, lambda state: state)
    modules: list[tuple[str, Node]] = [(name, node) for name, node, _ in found]
    plain, notes = plain_names([name for name, _ in modules])
    kernels = feeding(_definitions(modules, plain, checkpoint))
    code: dict[str, str] = {}
    layers, instance_norms = [], 0
    for name, node in modules:
        if not _has_statistics(node):
            continue
        text = _code_of(node.path, checkpoint, code)
        if "InstanceNorm" in node.path.rpartition(".")[2] or "torch.instance_norm(" in text:
            instance_norms += 1
            continue
        layers.append(_layer(plain[name], node, text, checkpoint, inplace_abn, kernels.get(plain[name])))
    if instance_norms:
        notes.append(INSTANCE_NORMS.format(instance_norms))
    if not layers:
        notes.append("TorchScript without BatchNorm: torch.jit.freeze and optimize_for_inference fold it away")
    return layers, notes


def _state_of(value: Any) -> dict[str, Any] | None:
    """What lies in a module, None for what is none."""
    if isinstance(value, Node) and value.path.startswith("__torch__.") and isinstance(value.state, dict):
        return value.state
    return None


def _has_statistics(node: Node) -> bool:
    return isinstance(node.state.get("running_mean"), Node) and isinstance(node.state.get("running_var"), Node)


def _code_of(path: str, checkpoint: Checkpoint, known: dict[str, str]) -> str:
    """The source of one class; "" if the archive does not hold it."""
    if path not in known:
        namespace, _, short = path.rpartition(".")
        member = f"{checkpoint.root}code/{namespace.replace('.', '/')}.py"
        text = ""
        if checkpoint.archive is not None and member in checkpoint.archive:
            text = checkpoint.archive.read(member, CODE_LIMIT).decode("utf-8", "replace")
        at = text.find(f"class {short}(")
        end = text.find("\nclass ", at + 1)
        known[path] = "" if at < 0 else text[at : end if end > 0 else len(text)]
    return known[path]


def _layer(
    name: str, node: Node, code: str, checkpoint: Checkpoint, inplace_abn: bool | None, kernel: Kernel | None
) -> Layer:
    state: dict[str, Any] = node.state
    shown = f"{checkpoint.where}: {printable(name)}"
    says = applied(code, shown)
    if says.training:
        raise FormatError(f"{shown} {IN_TRAINING}")
    epsilon = says.number("eps", state)
    if epsilon is None and isinstance(state.get("eps"), float):  # an attribute, in files of older versions
        epsilon = state["eps"]
    momentum = (
        says.constants.get("momentum") or says.number("momentum", state) or None
    )  # a cumulative one is traced as 0
    own = {
        last: tensor
        for last, value in state.items()
        if (tensor := checkpoint.tensor(value, f"{name}.{last}")) is not None
    }
    size = own["running_mean"].size if "running_mean" in own else 0
    absent = [last for last, value in state.items() if value is None]
    given = given_by(says.arguments, own, shown, absent=absent, inplace_abn=bool(inplace_abn))
    roles = roles_of(own, _parametrized(state), shown, size, given)
    tensors = by_role(own, roles, name)
    notes = list(roles.notes)
    if epsilon is None and code:
        notes.append("its code never applies it in a way that shows epsilon (a trace holds only what it called)")
    if is_foreign(node.path):
        words = node.path.removeprefix("__torch__.").split(".")
        shown_class = ".".join(word for word in words if not word.startswith("___torch_mangle_"))
        notes.append(FOREIGN.format(printable(shown_class)))
    return make_layer(
        name,
        tensors,
        checkpoint.where,
        epsilon=epsilon,
        momentum=momentum,
        counter=own.get("num_batches_tracked"),
        inplace_abn=bool(inplace_abn) and tensors["weight"] is not None,
        kernel=kernel,
        notes=notes,
    )


def _parametrized(state: dict[str, Any]) -> list[str]:
    holder = state.get("parametrizations")
    children = holder.state if isinstance(holder, Node) and isinstance(holder.state, dict) else {}
    return [f"parametrizations.{name}" for name, child in children.items() if isinstance(child, Node)]


def _definitions(modules: list[tuple[str, Node]], plain: dict[str, str], checkpoint: Checkpoint) -> list[Definition]:
    definitions: list[Definition] = []
    for name, node in modules:
        if _has_statistics(node):
            mean = checkpoint.tensor(node.state["running_mean"], name)
            definitions.append(Definition(plain[name], mean.shape[0] if mean is not None and mean.shape else 0))
            continue
        tensor = checkpoint.tensor(node.state.get("weight"), name)
        if tensor is not None and len(tensor.shape) >= 2:
            kind = "transposed" if "ConvTranspose" in node.path else None
            kernel = kernel_of(plain[name], tensor, kind=kind, first=not definitions)
            definitions.append(Definition(plain[name], kernel.shape[0], kernel))
    return definitions
