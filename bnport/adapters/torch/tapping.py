"""What goes into and comes out of every BatchNorm layer of a live module while the whole network runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.torch.live import norms_of
from bnport.adapters.torch.state import plain_names
from bnport.adapters.torch.values import activation_of
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.record import Array


def tap(model: Any, x: Array, each: Callable[[str, Array, Array, str], None]) -> list[Array]:
    """Run the module on x (N, C, ...) at inference; call each(layer, input, output, dtype) per layer call; the final outputs.

    Inputs and outputs come channel-last, shape (..., C), 16-bit ones widened and dtype naming theirs. An activation that
    a layer carries (timm's BatchNormAct2d) is not part of its output here. The module is left as it was: modes, hooks,
    gradients.
    """
    import torch

    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidValue("a TorchScript module takes no hooks, so it cannot be traced; give the Python module")
    plain, _ = plain_names([name for name, _ in model.named_modules()])
    modes = {module: module.training for module in model.modules()}
    pending: dict[int, list[Array]] = {}
    handles = []

    def before(module: Any, args: Any) -> None:
        pending.setdefault(id(module), []).append(_numpy(args[0]))  # a copy: some layers work in place

    def after(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = pending[id(module)].pop()
            plain_output = _without_activation(module, args[0], x, output)
            each(plain[name], _last(x), _last(plain_output), str(output.dtype).removeprefix("torch."))

        return hook

    try:
        model.eval()
        for name, module in norms_of(model):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
        with torch.no_grad():
            return _flat(model(_input(model, x)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _input(model: Any, x: Array) -> Any:
    import torch

    tensor = torch.from_numpy(np.array(x))
    like = next((p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()), None)
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)


def _without_activation(module: Any, argument: Any, x: Array, output: Any) -> Array:
    import torch

    if not activation_of(module) or not isinstance(argument, torch.Tensor):
        return _numpy(output)
    weight = module.weight
    if type(module).__name__.startswith("InPlaceABN"):
        weight = weight.abs() + module.eps
    held = (module.running_mean, module.running_var, weight, module.bias)
    return _numpy(torch.nn.functional.batch_norm(torch.from_numpy(x).to(held[0]), *held, eps=module.eps))


def _numpy(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().cpu()
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    array: Array = np.array((tensor.float() if narrow else tensor).numpy())
    return array


def _last(array: Array) -> Array:
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def _flat(value: Any) -> list[Array]:
    """Every tensor of an output, in order, through tuples, lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        return [_numpy(value)]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        raise InvalidValue(f"the module returns a {printable(type(value).__name__)}; tensors are expected")
    return [array for item in value for array in _flat(item)]
