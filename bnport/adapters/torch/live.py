"""Live modules and state dicts: read, written into, and run, with the torch that they came with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.torch.layers import FIELD_OF, LAZY, NO_STATISTICS, Definition, feeding, kernel_of, make_layer
from bnport.adapters.torch.modules import kernel_kind
from bnport.adapters.torch.search import chosen, models_in
from bnport.adapters.torch.state import ROOT, layers_of_state, plain_names
from bnport.containers.tensor import Tensor
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, Unrepresentable, listed, printable
from bnport.layer import Layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnport.layer import Change, Kernel, Layer
    from bnport.record import Array

ABSENT = "no BatchNorm layer in it"
_STATISTICS = ("running_mean", "running_var")


def tensor_of(value: Any, name: str) -> Tensor | None:
    """A live torch tensor or numpy array as a Tensor; None for anything else, and for an uninitialised lazy one."""
    import torch
    from torch.nn.parameter import is_lazy

    if isinstance(value, torch.Tensor) and not is_lazy(value):
        live = value.detach()

        def read() -> bytes:
            if live.device.type == "meta":
                raise FormatError(
                    f"{printable(name)}: is on the meta device and holds no numbers; load the weights first"
                )
            flat = live.cpu().contiguous().reshape(-1)
            data: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            return data

        return Tensor(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), read)
    if isinstance(value, np.ndarray):
        return Tensor(
            name, value.dtype.name, value.shape, lambda: value.astype(value.dtype.newbyteorder("<")).tobytes()
        )
    return None


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
        found = [f for f in found if f.tensors is not None or any(_norms(f.value))]
    model, notes = chosen(found, key, where)
    if model is None:
        return Layers(source=where, format="torch", notes=[*notes, ABSENT])
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
    return "InstanceNorm" in _class_name(module)


def _class_name(module: Any) -> str:
    return getattr(module, "original_name", None) or type(module).__name__  # a ScriptModule keeps its class's name


def _is_batchnorm(module: Any) -> bool:
    import torch

    if _is_instance_norm(module):
        return False
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return True
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in _STATISTICS)


def _norms(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of the BatchNorm layers of a model, each module once, by torch's own names."""
    for name, module in model.named_modules():
        if _is_batchnorm(module):
            yield name, module


def _layers_of(model: Any, where: str, inplace_abn: bool | None) -> tuple[list[Layer], list[str]]:
    from bnport.adapters.torch.graph import traced

    plain, notes = plain_names([name for name, _ in model.named_modules() if name])
    plain[""] = ROOT
    norms = dict(_norms(model))
    graph = traced(model, norms) if norms else None
    kernels = feeding(_definitions(model, plain))
    layers = []
    for name, module in norms.items():
        kernel, inputs = kernels.get(plain[name]), None
        if graph is not None and name in graph:
            fed_by, reached_by = graph[name]
            inputs = tuple(plain[n] for n in reached_by)
            if kernel is None or kernel.name != plain.get(fed_by):
                kernel = module_kernel(model.get_submodule(fed_by), plain[fed_by]) if fed_by else None
        layers.append(_layer(plain[name], module, where, inplace_abn, kernel, inputs))
    others = sum(_is_instance_norm(module) for module in model.modules())
    if others:
        notes.append(f"{others} InstanceNorm layers are not BatchNorm and were left alone")
    return layers, notes


def module_kernel(module: Any, name: str, first: bool = False) -> Kernel | None:
    """The kernel of a convolution or linear module."""
    tensor = tensor_of(getattr(module, "weight", None), name)
    if tensor is None or len(tensor.shape) < 2:
        return None
    kind = kernel_kind(_class_name(module), tensor.shape, getattr(module, "groups", None))
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
    return _class_name(module).startswith("InPlaceABN") if inplace_abn is None else inplace_abn


def _layer(
    name: str, module: Any, where: str, inplace_abn: bool | None, kernel: Kernel | None, inputs: tuple[str, ...] | None
) -> Layer:
    from torch.nn.parameter import is_lazy

    values = {n: getattr(module, n, None) for n in FIELD_OF}
    if any(value is not None and is_lazy(value) for value in values.values()):
        raise FormatError(f"{where}: {printable(name)} {LAZY}")
    epsilon, notes = getattr(module, "eps", None), []
    if epsilon is None and hasattr(module, "code"):
        from bnport.adapters.torch.script import epsilon_in_code

        epsilon, _, training = epsilon_in_code(module.code)
        if training:
            raise FormatError(f"{where}: {printable(name)} was traced in training mode and uses batch statistics")
    for attribute in ("act", "activation"):
        activation = getattr(module, attribute, None)
        shown = activation if isinstance(activation, str) else type(activation).__name__
        if shown.lower() not in ("nonetype", "identity", "none"):
            notes.append(f"{_class_name(module)} applies {shown} after it, which is not part of the record")
            break
    return make_layer(
        name,
        {n: tensor_of(value, f"{name}.{n}") for n, value in values.items()},
        where,
        epsilon=epsilon,
        momentum=getattr(module, "momentum", None),
        counter=tensor_of(getattr(module, "num_batches_tracked", None), name),
        inplace_abn=_is_inplace(module, inplace_abn) and values["weight"] is not None,
        holds=[n for n, theirs in (("epsilon", "eps"), ("momentum", "momentum")) if hasattr(module, theirs)],
        kernel=kernel,
        inputs=inputs,
        notes=notes,
        channels=getattr(module, "num_features", None),
    )


# ---- writing


def apply_live(model: Any, changes: Mapping[str, Change], inplace_abn: bool | None = None) -> None:
    """Write into a live module or state dict: everything is checked first, and undone if anything fails."""
    import torch

    where = described(model)
    targets = _targets(model)
    tensors: list[tuple[Any, Any]] = []  # (live tensor, new values)
    attributes: list[tuple[Any, str, float]] = []
    for name, change in changes.items():
        if name not in targets:
            raise NotFound(f"{where}: no BatchNorm layer {printable(name)!r}; there are {listed(targets, 5)}")
        module, values = targets[name]
        for field in sorted(change.fields):
            shown = f"{where}: {printable(name)}: {field}"
            if field in ("epsilon", "momentum"):
                theirs = "eps" if field == "epsilon" else "momentum"
                if module is None or not hasattr(module, theirs):
                    raise InvalidValue(f"{shown} cannot be written, a state dict holds none")
                if field == "momentum" and change.momentum is None:
                    raise InvalidValue(f"{shown} is to be written, but none is given")
                value = change.record.epsilon if field == "epsilon" else round(1 - (change.momentum or 0.0), 12)
                attributes.append((module, theirs, value))
                continue
            live = values.get({ours: theirs for theirs, ours in FIELD_OF.items()}[field])
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
    _commit(tensors, attributes)


def _commit(tensors: list[tuple[Any, Any]], attributes: list[tuple[Any, str, float]]) -> None:
    import torch

    with torch.no_grad():
        old = [(live, live.detach().clone()) for live, _ in tensors]
        before = [(module, name, getattr(module, name)) for module, name, _ in attributes]
        try:
            for live, new in tensors:
                live.copy_(new)
            for module, name, value in attributes:
                setattr(module, name, value)
        except BaseException:
            for live, values in old:
                with contextlib.suppress(Exception):
                    live.copy_(values)
            for module, name, previous in before:
                setattr(module, name, previous)
            raise


def _targets(model: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Layer name as read -> (module or None, its live tensors by torch's names)."""
    import torch

    if isinstance(model, torch.nn.Module):
        plain, _ = plain_names([name for name, _ in model.named_modules() if name])
        plain[""] = ROOT
        return {plain[name]: (m, {n: getattr(m, n, None) for n in FIELD_OF}) for name, m in _norms(model)}
    found, _ = chosen(models_in(model, LiveReader(described(model)), lambda _: False), None, described(model))
    if found is None:
        return {}
    state = found.value
    plain, _ = plain_names([name for name, value in state.items() if tensor_of(value, name) is not None])
    targets = {}
    for full in state:
        if full == "running_mean" or full.endswith(".running_mean"):
            prefix = full.removesuffix("running_mean")
            name = plain[full].removesuffix("running_mean").removesuffix(".") or ROOT
            live = {n: state.get(prefix + n) for n in FIELD_OF}
            if any(v is not None and not isinstance(v, torch.Tensor) for v in live.values()):
                raise InvalidValue(f"{printable(name)}: only torch tensors can be written into")
            targets[name] = (None, live)
    return targets


# ---- running


def run_live(
    source: Any,
    inputs: Mapping[str, Any],
    key: str | None = None,
    inplace_abn: bool | None = None,
    epsilon: float | None = None,
) -> dict[str, dict[str, Array]]:
    """name -> outputs, for x of shape (N, C) of each named layer, by torch; see run in the package's module."""
    try:
        import torch
    except ImportError:
        raise MissingDependency("running a PyTorch layer needs torch: pip install 'bnport[torch]'") from None
    if isinstance(source, torch.nn.Module):
        return {name: _run_module(source, name, x) for name, x in inputs.items()}
    from bnport.adapters.torch import read

    layers = read(source, key=key, inplace_abn=inplace_abn)
    return {name: _run_record(layers, name, x, epsilon) for name, x in inputs.items()}


def _run_record(layers: Layers, layer: str, x: Any, epsilon: float | None) -> dict[str, Array]:
    import torch

    if layer not in layers:
        raise NotFound(f"{layers.source}: no BatchNorm layer {printable(layer)!r}; there are {listed(layers, 5)}")
    record = layers[layer].record
    if epsilon is not None and "epsilon" in layers[layer].assumed:
        record = record.replace(epsilon=epsilon)
    dtype = getattr(torch, layers[layer].dtype)
    arrays = {n: torch.from_numpy(getattr(record, field).copy()).to(dtype) for n, field in FIELD_OF.items()}
    with torch.no_grad():
        y = torch.nn.functional.batch_norm(
            torch.as_tensor(np.asarray(x)).to(dtype), **arrays, training=False, eps=record.epsilon
        )
    return {"torch.nn.functional.batch_norm": _numpy(y)}


def _run_module(model: Any, layer: str, x: Any) -> dict[str, Array]:
    import torch

    targets = _targets(model)
    if layer not in targets:
        raise NotFound(f"{described(model)}: no BatchNorm layer {printable(layer)!r}; there are {listed(targets, 5)}")
    module, values = targets[layer]
    mean = values["running_mean"]
    if mean is None:
        raise FormatError(f"{described(model)}: {printable(layer)} {NO_STATISTICS}")
    given = torch.as_tensor(np.asarray(x)).to(device=mean.device, dtype=mean.dtype)
    spatial = 0 if _class_name(module).endswith("1d") else 3 if _class_name(module).endswith("3d") else 2
    modes = [(m, m.training) for m in module.modules()]
    parts = {
        n: getattr(module, n) for n in ("act", "drop", "aa") if isinstance(getattr(module, n, None), torch.nn.Module)
    }
    activation = getattr(module, "activation", None)
    try:
        module.eval()
        for n in parts:
            setattr(module, n, torch.nn.Identity())
        if isinstance(activation, str):
            module.activation = "identity"
        with torch.no_grad():
            y = module.forward(given.reshape(*given.shape, *(1,) * spatial))
    finally:
        for n, part in parts.items():
            setattr(module, n, part)
        if isinstance(activation, str):
            module.activation = activation
        for m, training in modes:
            m.training = training
    return {f"{_class_name(module)}.forward": _numpy(y.reshape(given.shape))}


def _numpy(y: Any) -> Array:
    import torch

    array: Array = (y.float() if y.dtype == torch.bfloat16 else y).detach().cpu().numpy()
    return array
