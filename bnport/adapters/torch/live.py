"""Live modules and state dicts: read and written into with the torch that they came with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.torch import STATE_WITHOUT
from bnport.adapters.torch.layers import AVERAGED, FIELD_OF, INSTANCE_NORMS, Definition, feeding, kernel_of, make_layer
from bnport.adapters.torch.modules import kernel_kind
from bnport.adapters.torch.parameters import REMEDIES, STATISTICS, by_role, roles_of
from bnport.adapters.torch.script import IN_TRAINING
from bnport.adapters.torch.search import chosen, models_in
from bnport.adapters.torch.state import grouped, layers_of_state, norm_name, norm_prefixes, plain_names
from bnport.adapters.torch.values import activation_of, class_name, held_by, hooked, own_forward, tensor_of
from bnport.errors import FormatError, InvalidValue, NotFound, Unrepresentable, first_line, listed, printable
from bnport.layer import Layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnport.adapters.torch.graph import Exported
    from bnport.containers.tensor import Tensor
    from bnport.layer import Change, Kernel, Layer

ABSENT = "No BatchNorm layer in it"


class LiveReader:
    """How search.models_in looks into live objects."""

    def __init__(self, where: str) -> None:
        self.where = where

    def items(self, value: Any) -> dict[Any, Any] | None:
        """The items of a dict, or None."""
        return value if isinstance(value, dict) else None

    def tensor(self, value: Any, name: str) -> Tensor | None:
        """A live tensor or array as a Tensor, or None."""
        return tensor_of(value, name)

    def is_lazy(self, value: Any) -> bool:
        """Whether it is a parameter or buffer of a lazy layer that has seen no batch."""
        from torch.nn.parameter import is_lazy

        return bool(is_lazy(value))


def described(source: Any) -> str:
    """What a live object is called in messages."""
    return f"live {type(source).__name__}"


def read_live(source: Any, key: str | None, inplace_abn: bool | None, epsilon: float | None = None) -> Layers:
    """The BatchNorm layers of an nn.Module, a state dict, or a checkpoint that was loaded."""
    import torch

    where = described(source)
    found = models_in(source, LiveReader(where), lambda value: isinstance(value, torch.nn.Module))
    if not found and not isinstance(source, dict | list | tuple):
        raise FormatError(f"{where}: neither an nn.Module nor a state dict")
    if len(found) > 1:
        found = [f for f in found if f.tensors is not None or any(norms_of(f.value))]
    model, notes = chosen(found, key, where)
    if model is None:
        return Layers(source=where, format="torch", notes=[*notes, f"{ABSENT}. {STATE_WITHOUT}"])
    if model.tensors is not None:
        layers, more = layers_of_state(model.tensors, _versions(model.value), where, inplace_abn, epsilon)
    else:
        layers, more = _layers_of(model.value, where, inplace_abn)
        more = more if layers else [*more, ABSENT]
    return Layers(layers, source=where, format="torch", notes=[*notes, *more])


def _versions(state: Any) -> dict[str, int]:
    metadata = getattr(state, "_metadata", None) or {}
    return {prefix: entry["version"] for prefix, entry in metadata.items() if isinstance(entry.get("version"), int)}


def _is_instance_norm(module: Any) -> bool:
    return "InstanceNorm" in class_name(module)


def _is_batchnorm(module: Any) -> bool:
    import torch

    if _is_instance_norm(module):
        return False
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return True
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in STATISTICS)


def norms_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of the BatchNorm layers of a model, each module once, by torch's own names."""
    for name, module in model.named_modules():
        if _is_batchnorm(module):
            yield name, module


def _layers_of(model: Any, where: str, inplace_abn: bool | None) -> tuple[list[Layer], list[str]]:
    from bnport.adapters.torch.graph import exported_norms, traced

    plain, notes = plain_names([name for name, _ in model.named_modules()])
    norms = dict(norms_of(model))
    graph = traced(model, norms) if norms else None
    exported = exported_norms(model) if norms else {}
    kernels = feeding(_definitions(model, plain))
    layers = []
    for name, module in norms.items():
        kernel, inputs = kernels.get(plain[name]), None
        if graph is not None and name in graph:
            fed_by, reached_by = graph[name]
            inputs = tuple(plain[n] for n in reached_by)
            if kernel is None or kernel.name != plain.get(fed_by):
                kernel = module_kernel(model.get_submodule(fed_by), plain[fed_by]) if fed_by else None
            kernel = kernel and kernel._replace(guessed=False, refuted=False)
        layers.append(_layer(plain[name], module, where, inplace_abn, kernel, inputs, exported.get(id(module))))
    if graph and (idle := [plain[name] for name in norms if name not in graph]):
        notes.append(
            f"forward() never calls {listed(idle, 3)}; a target without them pairs with --skip {printable(idle[0])}"
        )
    others = sum(_is_instance_norm(module) for module in model.modules())
    if others:
        notes.append(INSTANCE_NORMS.format(others))
    if layers and any(getattr(m, "use_buffers", None) is False and hasattr(m, "n_averaged") for m in model.modules()):
        notes.append(AVERAGED.format(" (use_buffers=False)"))
    return layers, notes


def module_kernel(module: Any, name: str, first: bool = False) -> Kernel | None:
    """The kernel of a convolution or linear module."""
    tensor = tensor_of(getattr(module, "weight", None), name)
    if tensor is None or len(tensor.shape) < 2:
        return None
    kind = kernel_kind(class_name(module), tensor.shape, getattr(module, "groups", None))
    return kernel_of(name, tensor, kind=kind, first=first)


def _definitions(model: Any, plain: Mapping[str, str]) -> Iterator[Definition]:
    first = True
    for name, module in model.named_modules():
        if _is_batchnorm(module):
            mean = tensor_of(module.running_mean, name)
            yield Definition(plain[name], mean.size if mean is not None else 0)
        elif kernel := module_kernel(module, plain[name], first):
            yield Definition(plain[name], kernel.shape[0], kernel)
            first = False


def _is_inplace(module: Any, inplace_abn: bool | None) -> bool:
    return class_name(module).lower().startswith("inplaceabn") if inplace_abn is None else inplace_abn


def _layer(
    name: str,
    module: Any,
    where: str,
    inplace_abn: bool | None,
    kernel: Kernel | None,
    inputs: tuple[str, ...] | None,
    exported: Exported | None,
) -> Layer:
    import torch

    inplace = _is_inplace(module, inplace_abn)
    held = held_by(module, name, where, inplace, exported)
    if held.says.training:
        raise FormatError(f"{where}: {printable(name)} {IN_TRAINING}")
    epsilon = exported.epsilon if exported is not None else None
    if isinstance(module, torch.jit.ScriptModule):
        attribute = held.says.arguments["eps"].attribute if held.says.arguments else ""
        epsilon = held.says.number("eps", {attribute: getattr(module, attribute, None)})
    if epsilon is None:
        epsilon = getattr(module, "eps", None)
    own_code = own_forward(module, exported)
    notes = [*held.roles.notes, *([own_code] if own_code else []), *hooked(module)]
    notes += [
        f"its {role} is computed by {what} each time it runs; it is read as it is now"
        for role, what in held.computed.items()
        if what != "pruning"
    ]
    if activation := activation_of(module):
        notes.append(f"{class_name(module)} applies {activation} after it, which is not part of the record")
    return make_layer(
        name,
        by_role(held.tensors, held.roles, name),
        where,
        epsilon=epsilon,
        momentum=getattr(module, "momentum", None),
        counter=held.tensors.get("num_batches_tracked"),
        inplace_abn=inplace and bool(held.roles.weight),
        holds=[field for field, theirs in ATTRIBUTES.items() if _can_set(module, theirs)],
        kernel=kernel,
        inputs=inputs,
        notes=notes,
        channels=getattr(module, "num_features", None),
        own_code=bool(own_code),
    )


# ---- writing

ATTRIBUTES = {"epsilon": "eps", "momentum": "momentum"}


def _can_set(module: Any, theirs: str) -> bool:
    """Whether a layer has an attribute that its forward uses: in a TorchScript module it is a constant in the code."""
    import torch

    return hasattr(module, theirs) and not isinstance(module, torch.jit.ScriptModule)


def apply_live(model: Any, changes: Mapping[str, Change], inplace_abn: bool | None = None) -> None:
    """Write into a live module or state dict: everything is checked first, and undone if anything fails."""
    import torch

    where = described(model)
    targets = targets_of(model, inplace_abn)
    tensors: list[tuple[Any, Any]] = []  # (live tensor, new values)
    attributes: list[tuple[Any, str, float]] = []
    for name, change in changes.items():
        if name not in targets:
            raise NotFound(f"{where}: no BatchNorm layer {printable(name)!r}; there are {listed(targets, 5)}")
        module, values, computed = targets[name]
        for field in sorted(change.fields):
            shown = f"{where}: {printable(name)}: {field}"
            if field in ("epsilon", "momentum"):
                theirs = ATTRIBUTES[field]
                if module is None or not _can_set(module, theirs):
                    what = "a state dict" if module is None else f"{class_name(module)} in this form"
                    raise InvalidValue(f"{shown} cannot be written, {what} holds none")
                if field == "momentum" and change.momentum is None:
                    raise InvalidValue(f"{shown} is to be written, but none is given")
                value = change.record.epsilon if field == "epsilon" else round(1 - (change.momentum or 0.0), 12)
                attributes.append((module, theirs, value))
                continue
            role = {ours: theirs for theirs, ours in FIELD_OF.items()}[field]
            if role in computed:
                raise InvalidValue(
                    f"{shown} cannot be written: the layer computes it by {computed[role]} each time it runs, so it would not"
                    f" stay; call {REMEDIES[computed[role]].format(role=role)} first"
                )
            live = values[role]
            if live is None:
                raise InvalidValue(f"{shown} cannot be written, the layer has none")
            array = getattr(change.record, field)
            if field == "gamma" and module is not None and _is_inplace(module, inplace_abn):
                array = array.astype(np.float64) - (change.record.epsilon if "epsilon" in change.fields else module.eps)
                if (array < 0).any():
                    raise Unrepresentable(
                        f"{shown}: InPlaceABN's gamma is |weight| + eps and cannot be smaller than eps"
                    )
            new = torch.from_numpy(np.array(array)).to(live.dtype)
            if new.shape != live.shape:
                raise InvalidValue(f"{shown}: {live.numel()} channels in the layer, {new.numel()} given")
            if not bool(torch.isfinite(new).all()):
                raise InvalidValue(f"{shown}: does not fit {live.dtype}")
            tensors.append((live, new))
    _commit(where, tensors, attributes)


def _commit(where: str, tensors: list[tuple[Any, Any]], attributes: list[tuple[Any, str, float]]) -> None:
    import torch

    with torch.no_grad():
        old = [(live, live.detach().clone()) for live, _ in tensors]
        before = [(module, name, getattr(module, name)) for module, name, _ in attributes]
        try:
            for live, new in tensors:
                live.copy_(new)
            for module, name, value in attributes:
                setattr(module, name, value)
        except BaseException as error:
            for live, values in old:
                with contextlib.suppress(Exception):
                    live.copy_(values)
            for module, name, previous in before:
                setattr(module, name, previous)
            if isinstance(error, RuntimeError):  # made in inference mode, expanded from fewer numbers, ...
                raise InvalidValue(f"{where}: torch does not write into its tensors: {first_line(error)}") from None
            raise


def targets_of(model: Any, inplace_abn: bool | None = None) -> dict[str, tuple[Any, dict[str, Any], dict[str, str]]]:
    """Layer name as read -> (module or None, its live tensors by torch's names, role -> what computes it)."""
    import torch

    where = described(model)
    if isinstance(model, torch.nn.Module):
        from bnport.adapters.torch.graph import exported_norms

        plain, _ = plain_names([name for name, _ in model.named_modules()])
        exported = exported_norms(model)
        targets = {}
        for name, m in norms_of(model):
            held = held_by(m, plain[name], where, _is_inplace(m, inplace_abn), exported.get(id(m)))
            targets[plain[name]] = (m, held.live(), held.computed)
        return targets
    found, _ = chosen(models_in(model, LiveReader(where), lambda _: False), None, where)
    if found is None or found.tensors is None:
        return {}
    state = found.value
    plain, _ = plain_names(list(found.tensors))
    prefixes = norm_prefixes(found.tensors, where)
    own, below = grouped(found.tensors, prefixes)
    targets = {}
    for prefix in prefixes:
        name = norm_name(plain[prefix + "running_mean"])
        roles = roles_of(own[prefix], below[prefix], f"{where}: {printable(name)}", own[prefix]["running_mean"].size)
        names = {"weight": roles.weight, "bias": roles.bias, **{n: (n,) for n in STATISTICS}}
        live = {role: state.get(prefix + parts[0]) if len(parts) == 1 else None for role, parts in names.items()}
        if any(v is not None and not isinstance(v, torch.Tensor) for v in live.values()):
            raise InvalidValue(f"{printable(name)}: only torch tensors can be written into")
        targets[name] = (None, live, {role: "pruning" for role, parts in names.items() if len(parts) == 2})
    return targets
