"""What a live layer holds: its tensors by name, which of them it computes at each run, and if its forward is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bnport._lazy import np
from bnport.adapters.torch.code import Applied, applied, given_by
from bnport.adapters.torch.layers import LAZY
from bnport.adapters.torch.parameters import Roles, is_foreign, roles_of
from bnport.containers.tensor import Tensor
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.torch.graph import Exported

UNKNOWN = "what it computes is not known"
_HOOKS = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}


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


class Held(NamedTuple):
    """A live layer.

    own:      its tensors by name, live; what a hook or a parametrization computes, as it is now.
    tensors:  the same as Tensors.
    roles:    which of them are weight and bias.
    computed: role -> what computes it each time that the layer runs (a key of parameters.REMEDIES).
    says:     what its TorchScript code says, else nothing.
    """

    own: dict[str, Any]
    tensors: dict[str, Tensor]
    roles: Roles
    computed: dict[str, str]
    says: Applied

    def live(self) -> dict[str, Any]:
        """The live tensors by torch's four names; None for what is absent, or computed."""
        found: dict[str, Any] = {name: self.own.get(name) for name in ("running_mean", "running_var")}
        for role, names in (("weight", self.roles.weight), ("bias", self.roles.bias)):
            found[role] = self.own[names[0]] if len(names) == 1 and role not in self.computed else None
        return found


def class_name(module: Any) -> str:
    """The name of a module's class; a ScriptModule keeps that of the class it was made from."""
    return getattr(module, "original_name", None) or type(module).__name__


def activation_of(module: Any) -> str:
    """The activation that a layer carries and applies to its own output (timm's BatchNormAct2d, InPlaceABN); "" for none."""
    for attribute in ("act", "activation"):
        held = getattr(module, attribute, None)
        name = held if isinstance(held, str) else type(held).__name__
        if name.lower() not in ("nonetype", "identity", "none"):
            return name
    return ""


def held_by(module: Any, name: str, where: str, inplace_abn: bool, exported: Exported | None = None) -> Held:
    """What a BatchNorm layer holds. `exported`: the call of batch_norm in the graph of an exported program that is its own.

    Raises FormatError for an uninitialised lazy layer, and as `roles_of` and `given_by` do.
    """
    import torch
    from torch.nn.parameter import is_lazy

    shown = f"{where}: {printable(name)}"
    own: dict[str, Any] = {n: value for n, value in vars(module).items() if isinstance(value, torch.Tensor)}
    own.update(module.named_parameters(recurse=False, remove_duplicate=False))
    own.update(module.named_buffers(recurse=False, remove_duplicate=False))
    if any(is_lazy(value) for value in own.values()):
        raise FormatError(f"{shown} {LAZY}")
    computed = _computed(module, own)
    for last in ("weight", "bias", "running_mean", "running_var"):
        if f"{last}_orig" in own and f"{last}_mask" in own:
            own.pop(last, None)  # as it was computed at the last forward pass
        elif last not in own and isinstance(value := getattr(module, last, None), torch.Tensor):
            own[last] = value  # a property, or an attribute of the class
    given: Mapping[str, tuple[str, ...]] | None = None
    says = applied(_code(module), shown)
    if exported is not None:
        own, given = exported.taken(own, shown)
    tensors = {n: t for n, value in own.items() if (t := tensor_of(value, f"{name}.{n}")) is not None}
    if says.arguments:
        absent = [last for last in ("weight", "bias") if getattr(module, last, ...) is None]
        given = given_by(says.arguments, tensors, shown, absent=absent, inplace_abn=bool(inplace_abn))
    mean = own.get("running_mean")
    channels = mean.numel() if mean is not None else getattr(module, "num_features", 0)
    roles = roles_of(tensors, (), shown, channels, given)
    computed |= {role: "pruning" for role in ("weight", "bias") if len(getattr(roles, role)) == 2}
    return Held(own, tensors, roles, computed, says)


def _computed(module: Any, own: dict[str, Any]) -> dict[str, str]:
    """role -> what computes it; its present value is put into `own`, and what it is computed from taken out."""
    import torch
    from torch.nn.utils import parametrize

    computed = {}
    with torch.no_grad():
        if parametrize.is_parametrized(module):
            parts = module.parametrizations
            modes = [(m, m.training) for m in parts.modules()]
            try:
                parts.eval()  # in training mode some count how often they are asked
                for role in parts:
                    own[role], computed[role] = getattr(module, role), "a parametrization"
            finally:
                for m, training in modes:
                    m.training = training
        for hook in module._forward_pre_hooks.values():
            what = _HOOKS.get(type(hook).__name__)
            if what:
                more = {"do_power_iteration": False} if what == "spectral_norm" else {}
                value = hook.compute_weight(module, **more)
                for suffix in ("_g", "_v", "_orig", "_u"):
                    own.pop(hook.name + suffix, None)
                own[hook.name], computed[hook.name] = value, what
    return computed


def _code(module: Any) -> str:
    """The code of a ScriptModule's forward; "" for any other module, and for one that has none."""
    import torch

    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    try:
        return str(module.code)
    except (AttributeError, RuntimeError):
        return ""


def own_forward(module: Any, exported: Exported | None) -> str:
    """What to say of a layer whose forward() is none that is known here; "" otherwise."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        path = str(module._c._type())
        return f"{printable(class_name(module))} is no class that bnport knows; {UNKNOWN}" if is_foreign(path) else ""
    if type(module) is torch.nn.Module:
        return "" if exported is not None else f"it has no forward() of its own; {UNKNOWN}"
    if "forward" in vars(module):
        return f"its forward() was replaced; {UNKNOWN}"
    for base in type(module).__mro__:
        if "forward" in vars(base):
            known = not is_foreign(f"{base.__module__}.{base.__qualname__}")
            return "" if known else f"{printable(base.__name__)} defines its own forward(); {UNKNOWN}"
    return ""


def hooked(module: Any) -> list[str]:
    """What to say of hooks that run with a layer, but for torch's own (pruning, weight_norm, ...), which are understood."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others = sum(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)
    ran = "a hook runs" if others == 1 else f"{others} hooks run"
    return [f"{ran} with it; what may be changed there is not part of the record"] if others else []
