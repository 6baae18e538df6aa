"""BatchNorm layers in a state dict: a flat dict of tensors whose names end in running_mean and running_var."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.torch.layers import AVERAGED, Definition, feeding, kernel_of, make_layer
from bnport.adapters.torch.parameters import STATISTICS, by_role, roles_of
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.containers.tensor import Tensor
    from bnport.layer import Kernel, Layer

ROOT = "root"  # the name of a BatchNorm that is the whole model
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, DistributedDataParallel, AveragedModel; torch.compile


def plain_names(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Every name without the wrappers that all of them carry, and notes that say what was left out.

    Names of tensors, or of modules (that of the model itself, "", and a wrapper's own, "module", become ROOT).
    """
    names = [name for name in names if name]
    result = {name: name for name in names}
    notes: list[str] = []
    stripped = True
    while stripped:
        stripped = False
        counted = [name for name in names if name != "n_averaged" and result[name]]  # AveragedModel's own counter
        for wrapper in WRAPPERS:
            if counted and all(f"{result[name]}.".startswith(wrapper) for name in counted):
                for name in counted:
                    result[name] = result[name][len(wrapper) :]
                counted = [name for name in counted if result[name]]
                notes.append(f"names are given without the prefix {wrapper!r}")
                stripped = True
    shorter = {name: result[name].replace("._orig_mod.", ".").removeprefix("_orig_mod.") for name in names}
    if shorter != result and len(set(shorter.values())) == len(names):
        result = shorter
        notes.append("names are given without '_orig_mod.'")
    return {"": ROOT, **{name: short or ROOT for name, short in result.items()}}, notes


def norm_name(mean: str) -> str:
    """The name of the BatchNorm whose running_mean is called so."""
    return mean.removesuffix("running_mean").removesuffix(".") or ROOT


def layers_of_state(
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, int],
    where: str,
    inplace_abn: bool | None,
    given_epsilon: float | None = None,
) -> tuple[list[Layer], list[str]]:
    """The BatchNorm layers of a state dict in its own order, and notes about the whole.

    A prefix is a BatchNorm if it has both running_mean and running_var; weight and bias alone could be a LayerNorm, a
    GroupNorm or a linear layer. Which of the tensors under it are gamma and beta: see parameters.py.
    `versions`: the `_metadata` of torch, prefix -> module version. `given_epsilon`: what to
    assume instead of torch's default.
    """
    plain, notes = plain_names(list(tensors))
    if "n_averaged" in tensors:
        notes.append(AVERAGED.format(" unless it was made with use_buffers=True"))
    prefixes = norm_prefixes(tensors, where)
    kernels = feeding(_definitions(tensors, prefixes, plain))
    own, below = grouped(tensors, prefixes)
    layers = []
    for prefix in prefixes:
        name = norm_name(plain[prefix + "running_mean"])
        version = versions.get(prefix.removesuffix("."))
        layers.append(
            _layer(name, own[prefix], below[prefix], version, where, inplace_abn, kernels.get(name), given_epsilon)
        )
    if len({layer.name for layer in layers}) != len(layers):
        raise FormatError(f"{where}: two BatchNorm layers have one name once wrappers are left out")
    return layers, notes


def norm_prefixes(tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """What stands before running_mean and running_var in the names of a state dict; FormatError for one without the other."""
    prefixes: dict[str, None] = {}
    for name in tensors:
        for last in STATISTICS:
            if name == last or name.endswith("." + last):
                prefixes[name.removesuffix(last)] = None
    for prefix in prefixes:
        for last in STATISTICS:
            if prefix + last not in tensors:
                raise FormatError(f"{where}: {printable(prefix + last)!r} is missing beside its counterpart")
    return list(prefixes)


def grouped(
    tensors: Mapping[str, Tensor], prefixes: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """prefix -> the tensors directly under it by their last name, and the names of those further below.

    What another BatchNorm holds is its own. Of a BatchNorm that is the whole model, or its root, only parametrizations are
    given as below: the rest is the model.
    """
    own: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    below: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name, tensor in tensors.items():
        end = name.rfind(".") + 1
        if name[:end] in own:
            own[name[:end]][name[end:]] = tensor
            continue
        while end:
            end = name.rfind(".", 0, end - 1) + 1
            if name[:end] in own:
                if end or name.startswith("parametrizations."):
                    below[name[:end]].append(name[end:])
                break
    return own, below


def _layer(
    name: str,
    own: Mapping[str, Tensor],
    below: list[str],
    version: int | None,
    where: str,
    inplace_abn: bool | None,
    kernel: Kernel | None,
    given_epsilon: float | None,
) -> Layer:
    roles = roles_of(own, below, f"{where}: {printable(name)}", own["running_mean"].size)
    tensors = by_role(own, roles, name)
    notes = list(roles.notes)
    if roles.weight == ("gamma",) and "weight" in own:
        kernel = kernel_of(name, own["weight"])
    epsilon = given_epsilon
    counter = own.get("num_batches_tracked")
    if epsilon is None and counter is None and version == 2:
        # detectron2's FrozenBatchNorm2d of version 2 added epsilon to running_var when it was saved; a BatchNorm2d of
        # version 2 always has num_batches_tracked, unless somebody removed it
        epsilon = 0.0
        notes.append(
            "version 2 without num_batches_tracked, as of detectron2's FrozenBatchNorm2d: epsilon is inside running_var,"
            " so 0 is taken; if this is a BatchNorm2d whose counter was removed, give --epsilon 1e-5"
        )
    layer = make_layer(
        name,
        tensors,
        where,
        epsilon=epsilon,
        counter=counter,
        inplace_abn=bool(inplace_abn) and tensors["weight"] is not None,
        kernel=kernel,
        notes=notes,
    )
    return layer if epsilon is None else layer.but(assumed={"epsilon"})


def _definitions(tensors: Mapping[str, Tensor], prefixes: list[str], plain: Mapping[str, str]) -> list[Definition]:
    """Kernels and BatchNorms in the order of the state dict, which is that of definition."""
    norms = {prefix + "running_mean": prefix for prefix in prefixes}
    own = {prefix + "weight" for prefix in prefixes}
    definitions: list[Definition] = []
    for full, tensor in tensors.items():
        if full in norms:
            name = norm_name(plain[full])
            definitions.append(Definition(name, tensor.shape[0] if tensor.shape else 0))
        elif full not in own and len(tensor.shape) >= 2 and (full == "weight" or full.endswith(".weight")):
            name = plain[full].removesuffix("weight").removesuffix(".")
            kernel = kernel_of(name, tensor, first=not definitions)
            definitions.append(Definition(name, tensor.shape[0], kernel))
    return definitions
