"""Which of the tensors beside running_mean and running_var are gamma and beta. What cannot be told is refused, not left out.

| theirs                       | what it is                                                                             |
|------------------------------|----------------------------------------------------------------------------------------|
| weight, bias                 | gamma, beta                                                                            |
| weight_orig, weight_mask     | gamma = orig * mask, rounded as torch does (torch.nn.utils.prune); the same with bias  |
| gamma, beta                  | gamma, beta; a weight of two or more dimensions beside them is then a convolution's    |
| num_batches_tracked          | the counter                                                                            |
| weight_g, weight_v           | weight_norm: refused in files, computed by its own hook in a live module               |
| weight_orig, weight_u        | spectral_norm: the same                                                                |
| parametrizations.*           | torch.nn.utils.parametrize: the same                                                   |
| scale, zero_point            | of a quantised BatchNorm's output                                                      |
| any other of shape (C,)      | refused by name                                                                        |
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple, np
from bnport.adapters.torch.tensors import FLOATS
from bnport.containers.tensor import Tensor
from bnport.errors import FormatError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

STATISTICS = ("running_mean", "running_var")
_KNOWN = frozenset({*STATISTICS, "num_batches_tracked"})
_OBSERVERS = ("fake_quant", "post_process", "observer")  # of quantisation: they look at numbers and change none here

REMEDIES = {
    "pruning": "torch.nn.utils.prune.remove(layer, {role!r})",
    "weight_norm": "torch.nn.utils.remove_weight_norm(layer, {role!r})",
    "spectral_norm": "torch.nn.utils.remove_spectral_norm(layer, {role!r})",
    "a parametrization": "torch.nn.utils.parametrize.remove_parametrizations(layer, {role!r})",
}
_SUFFIXES = {"weight_norm": ("_g", "_v"), "spectral_norm": ("_orig", "_u")}


class Roles(NamedTuple):
    """Names of the tensors that make weight and bias: none (absent), one, or two whose product it is; and notes."""

    weight: tuple[str, ...]
    bias: tuple[str, ...]
    notes: tuple[str, ...]


_USUAL = _KNOWN | {"weight", "bias"}
_BOTH = Roles(("weight",), ("bias",), ())


class Product(Tensor):
    """A pruned parameter: orig * mask, in orig's dtype, each element rounded once, as prune's apply_mask computes it."""

    __slots__ = ("parts",)

    def __init__(self, name: str, orig: Tensor, mask: Tensor) -> None:
        super().__init__(name, orig.dtype, orig.shape, self._bytes)
        self.parts = (orig, mask)

    def _bytes(self) -> bytes:
        from bnport.rounding import round_to, stored

        orig, mask = (part.array() for part in self.parts)
        with np.errstate(over="ignore", invalid="ignore"):
            # float32 holds the product of two bfloat16 exactly; the others are rounded once by the multiplication
            product = orig * round_to(mask, self.dtype).astype(orig.dtype)
            return stored(round_to(product, self.dtype), self.dtype)


def roles_of(
    own: Mapping[str, Tensor],
    below: Sequence[str],
    shown: str,
    channels: int,
    given: Mapping[str, tuple[str, ...]] | None = None,
) -> Roles:
    """Which of a layer's tensors are its weight and bias.

    `own`: the tensors that lie directly in the layer, by name; `below`: names of what its child modules hold
    ("parametrizations.weight.original0"). `shown`: file and layer, for messages. `given`: what the layer's own code says
    of a role, which then decides. Raises FormatError for a parameter that is computed in a way that no file tells, and
    for a tensor of the channels' size whose role is not known.
    """
    if own.keys() <= _USUAL and "weight" in own and "bias" in own and not below and not given:
        return _BOTH  # what comes of all that follows
    for name in below:
        if name.startswith("parametrizations."):
            raise computed(shown, name.split(".")[1], "a parametrization", [name])
    used = set(_KNOWN)
    found: dict[str, tuple[str, ...]] = {}
    for role in ("weight", "bias"):
        found[role] = given[role] if given and role in given else _by_name(role, own, shown)
        used.update(found[role])
        if len(found[role]) == 2 and own[found[role][0]].shape != own[found[role][1]].shape:
            raise FormatError(f"{shown}: {' and '.join(found[role])} have different shapes")
    notes = [f"pruned: {role} is {role}_orig * {role}_mask" for role, names in found.items() if len(names) == 2]
    if "gamma" in own and "beta" in own and not given:
        if "weight" in own and len(own["weight"].shape) > 1:  # torch.nn.intrinsic.qat.ConvBn2d before version 2
            found = {"weight": ("gamma",), "bias": ("beta",)}
            used |= {"gamma", "beta", "weight", "bias"}
            notes.append("BatchNorm of a quantisation-aware ConvBn, stored under gamma and beta")
        elif not found["weight"] and not found["bias"]:
            found = {"weight": ("gamma",), "bias": ("beta",)}
            used |= {"gamma", "beta"}
            notes.append("its scale and shift are stored under gamma and beta")
    if bool(found["weight"]) != bool(found["bias"]) and not given:
        held, lacking = ("weight", "bias") if found["weight"] else ("bias", "weight")
        taken = "beta = 0" if held == "weight" else "gamma = 1"
        notes.append(f"holds {held} but no {lacking}: {taken} is taken")
    if "scale" in own and "zero_point" in own:
        used |= {"scale", "zero_point"}
        notes.append("a quantised BatchNorm: its output is rounded to 8 bits, which is not part of the record")
    others = {name: tensor for name, tensor in own.items() if name not in used}
    unknown = [name for name, tensor in others.items() if tensor.shape and tensor.size == channels]
    if unknown:
        raise FormatError(
            f"{shown}: holds {listed(unknown)}, of the channels' size, beside {_read(found)}, and what that is for is not"
            " known, so gamma and beta would be a guess; if it is one of them, save it as weight (gamma) or bias (beta),"
            " if it plays no part in the output, save without it"
        )
    aside = [name for name, tensor in others.items() if tensor.dtype in FLOATS]
    aside += [name for name in below if not any(word in name for word in _OBSERVERS)]
    if aside:
        notes.append(f"holds {listed(aside, 3)} too, which is not part of the record")
    return Roles(found["weight"], found["bias"], tuple(notes))


def _by_name(role: str, own: Mapping[str, Tensor], shown: str) -> tuple[str, ...]:
    orig, mask = f"{role}_orig", f"{role}_mask"
    if orig in own and mask in own:
        return orig, mask
    for what, suffixes in _SUFFIXES.items():
        names = [role + suffix for suffix in suffixes]
        if all(name in own for name in names):
            raise computed(shown, role, what, names)
    return (role,) if role in own else ()


def _read(found: Mapping[str, tuple[str, ...]]) -> str:
    return listed([*(name for names in found.values() for name in names), *STATISTICS])


def computed(shown: str, role: str, what: str, names: Iterable[str]) -> FormatError:
    """The error for a parameter that the layer computes anew each time that it runs."""
    remedy = REMEDIES[what].format(role=role)
    return FormatError(
        f"{shown}: its {printable(role)} is computed from {listed(names)} by {what} each time it runs, and is not stored;"
        f" call {remedy} before saving, or give bnport the live module"
    )


def by_role(own: Mapping[str, Tensor], roles: Roles, name: str) -> dict[str, Tensor | None]:
    """The four tensors that make_layer takes."""
    tensors = {last: own.get(last) for last in STATISTICS}
    for role, names in (("weight", roles.weight), ("bias", roles.bias)):
        parts = [own[part] for part in names]
        tensors[role] = Product(f"{name}.{role}", *parts) if len(parts) == 2 else parts[0] if parts else None
    return {role: tensors[role] for role in ("weight", "bias", *STATISTICS)}


# ---- classes

_PACKAGES = ("torch", "torchvision", "timm", "detectron2", "inplace_abn")


def is_foreign(path: str) -> bool:
    """Whether a class ("package.module.Class", or TorchScript's name for it) is of none of the packages known here."""
    return path.removeprefix("__torch__.").partition(".")[0] not in _PACKAGES and not path.rpartition(".")[
        2
    ].startswith("InPlaceABN")
