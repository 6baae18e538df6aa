"""Layers run by torch itself: a live module's own, and for a file or state dict the function that such a layer calls."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.torch.layers import FIELD_OF, NO_STATISTICS
from bnport.adapters.torch.live import described, targets_of
from bnport.adapters.torch.values import class_name, own_forward
from bnport.errors import BnportError, FormatError, InvalidValue, MissingDependency, NotFound, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnport.layer import Layers
    from bnport.record import Array


def run_live(
    source: Any,
    inputs: Mapping[str, Any],
    key: str | None,
    inplace_abn: bool | None,
    epsilon: float | None,
) -> dict[str, dict[str, Array]]:
    """name -> outputs, for x of shape (N, C) of each named layer, by torch; see run in the package's module."""
    try:
        import torch
    except ImportError:
        raise MissingDependency("running a PyTorch layer needs torch: pip install 'bnport[torch]'") from None
    if isinstance(source, torch.nn.Module):
        targets = targets_of(source, inplace_abn)
        return {name: _run_module(source, targets, name, x) for name, x in inputs.items()}
    from bnport.adapters.torch import read

    layers = read(source, key=key, inplace_abn=inplace_abn, epsilon=epsilon)
    return {name: _run_record(layers, name, x) for name, x in inputs.items()}


def _run_record(layers: Layers, layer: str, x: Any) -> dict[str, Array]:
    import torch

    if layer not in layers:
        raise NotFound(f"{layers.source}: no BatchNorm layer {printable(layer)!r}; there are {listed(layers, 5)}")
    record = layers[layer].record
    dtype = getattr(torch, layers[layer].dtype)
    arrays = {n: torch.from_numpy(getattr(record, field).copy()).to(dtype) for n, field in FIELD_OF.items()}
    with torch.no_grad():
        y = torch.nn.functional.batch_norm(
            torch.as_tensor(np.asarray(x)).to(dtype), **arrays, training=False, eps=record.epsilon
        )
    return {"torch.nn.functional.batch_norm": _numpy(y)}


def _run_module(model: Any, targets: Mapping[str, Any], layer: str, x: Any) -> dict[str, Array]:
    """One layer's own forward at x (N, C). Raises InvalidValue where it has none that can be called alone."""
    import torch

    where = described(model)
    if layer not in targets:
        raise NotFound(f"{where}: no BatchNorm layer {printable(layer)!r}; there are {listed(targets, 5)}")
    module, values, _ = targets[layer]
    mean = values["running_mean"]
    if mean is None:
        raise FormatError(f"{where}: {printable(layer)} {NO_STATISTICS}")
    given = torch.as_tensor(np.asarray(x)).to(device=mean.device, dtype=mean.dtype)
    kinds = [class_name(module), *(base.__name__ for base in type(module).__mro__)]
    spatial = next((rank for kind in kinds for end, rank in _SPATIAL.items() if kind.endswith(end)), 2)
    try:
        y = _at_inference(module, given.reshape(*given.shape, *(1,) * spatial)).reshape(given.shape)
    except BnportError as error:
        raise InvalidValue(f"{where}: {printable(layer)}: {error}") from None
    except Exception as error:  # whatever a forward() that is not torch's own makes of it
        raise InvalidValue(
            f"{where}: {printable(layer)}: {class_name(module)} does not run alone on x of shape (N, C"
            f"{', 1' * spatial}): {printable(str(error), 120)}"
        ) from None
    return {f"{class_name(module)}.forward": _numpy(y)}


_SPATIAL = {"1d": 0, "2d": 2, "3d": 3}  # dimensions that x gets, by the end of the class's name


def _at_inference(module: Any, x: Any) -> Any:
    """module.forward(x) in eval mode, without hooks and without the activation that it may carry.

    All is put back: modes, its tensors and the random state too, which a forward() that is not torch's own may change.
    """
    import torch

    modes = [(m, m.training) for m in module.modules()]
    parts = {
        n: getattr(module, n) for n in ("act", "drop", "aa") if isinstance(getattr(module, n, None), torch.nn.Module)
    }
    activation = getattr(module, "activation", None)
    forward = module.forward
    if isinstance(module, torch.jit.ScriptModule):
        if any(class_name(part) != "Identity" for part in parts.values()):
            raise InvalidValue("a TorchScript layer with an activation in it does not run without that")
        parts = {}
        if isinstance(module, torch.jit.TracedModule):  # its Python side refuses, what was traced does not
            forward = module._c._get_method("forward")
    elif type(module) is torch.nn.Module:
        raise InvalidValue("a layer of an exported program has no forward() of its own, the whole graph runs it")
    try:
        module.eval()
        for n in parts:
            setattr(module, n, torch.nn.Identity())
        if isinstance(activation, str):
            module.activation = "identity"
        with torch.no_grad(), _left_alone(module):
            return forward(x)
    finally:
        for n, part in parts.items():
            setattr(module, n, part)
        if isinstance(activation, str):
            module.activation = activation
        for m, training in modes:
            m.training = training


@contextlib.contextmanager
def _left_alone(module: Any) -> Iterator[None]:
    """Afterwards the tensors of the module and the random state are what they were, whatever its forward() does to them."""
    import torch

    if not own_forward(module, None):  # torch's own does nothing to them
        yield
        return
    before = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for tensor, values in before:
            if not torch.equal(tensor, values):
                tensor.copy_(values)


def _numpy(y: Any) -> Array:
    import torch

    array: Array = (y.float() if y.dtype == torch.bfloat16 else y).detach().cpu().numpy()
    return array
