"""What the TorchScript code of a layer passes to batch_norm: the code is only looked through, never run."""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.errors import FormatError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from bnport.containers.tensor import Tensor

CALLS = 8  # of batch_norm looked at in one layer's code
_LENGTH = 4000  # characters of one call
_ALIAS = re.compile(r"(\w+) = __torch__\.torch\.nn\.functional\.(?:___torch_mangle_\d+\.)?batch_norm\n")
_ATEN = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_FUNCTIONAL = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TENSORS = _ATEN[:4]


class Passed(NamedTuple):
    """One argument: `attribute` of the layer, a `literal`, "None", or with neither an `expression`.

    from_outside: it is a parameter of the function, which the caller gives.
    """

    attribute: str = ""
    literal: str = ""
    expression: str = ""
    from_outside: bool = False


class Applied(NamedTuple):
    """What a layer's code says: the arguments of its call of batch_norm by torch's names ({} without one), and constants."""

    arguments: dict[str, Passed]
    constants: dict[str, float]  # eps and momentum, of a scripted module

    @property
    def training(self) -> bool:
        """Whether it uses the statistics of each batch."""
        return self.arguments.get("training", Passed()).literal == "True"

    def number(self, name: str, attributes: Mapping[str, object]) -> float | None:
        """epsilon ("eps") or momentum: as it is passed, from an attribute of the layer, or its constant; else None."""
        passed = self.arguments.get(name, Passed())
        value = attributes.get(passed.attribute) if passed.attribute else _number(passed.literal)
        if isinstance(value, float):
            return value
        return self.constants.get(name) if not passed.expression or passed.from_outside else None


def applied(code: str, shown: str) -> Applied:
    """What the code of a layer (its class, or its forward alone) applies.

    A scripted module has `eps : Final[float] = 0.001` and calls torch.nn.functional.batch_norm by an alias; a traced one
    calls torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn). Raises FormatError for code that
    calls it in several ways.
    """
    constants = {
        name: value
        for name in ("eps", "momentum")
        if (value := _number(_after(code, f"{name} : Final[float] = "))) is not None
    }
    starts = [("torch.batch_norm(", _ATEN), ("torch.nn.functional.batch_norm(", _FUNCTIONAL)]
    starts += [(f" {alias}(", _FUNCTIONAL) for alias in dict.fromkeys(_ALIAS.findall(code)[:CALLS])]
    calls: list[dict[str, Passed]] = []
    for start, order in starts:
        at = code.find(start)
        while at >= 0 and len(calls) <= CALLS:
            calls.append(_call(code, at, at + len(start), order))
            at = code.find(start, at + 1)
    if len(calls) > CALLS or any(call != calls[0] for call in calls):
        raise FormatError(f"{shown}: its code calls batch_norm in several ways; which of them is meant is not known")
    return Applied(calls[0] if calls else {}, constants)


def _call(code: str, at: int, inside: int, order: tuple[str, ...]) -> dict[str, Passed]:
    words = _split(code, inside)[1:]  # without the input
    function = code[max(code.rfind("def ", 0, at), 0) : at]
    if len(words) < len(order):
        return {name: Passed(expression=code[at : at + 60]) for name in order}
    return {name: _passed(word, function) for name, word in zip(order, words, strict=False)}


def _split(code: str, at: int) -> list[str]:
    """The arguments of a call whose parenthesis opens just before `at`; [] if it does not close in time."""
    found, depth, start = [], 0, at
    for position in range(at, min(len(code), at + _LENGTH)):
        character = code[position]
        if character in "([":
            depth += 1
        elif character in ")]" and depth:
            depth -= 1
        elif character in ",)" and not depth:
            found.append(code[start:position].strip())
            start = position + 1
            if character == ")":
                return found
    return []


def _passed(word: str, function: str) -> Passed:
    """What a word of a function's code stands for, through the assignments to it."""
    owner = re.match(r"def \w+\((\w+)", function)
    for _ in range(8):
        attribute = re.fullmatch(r"(\w+)\.(\w+)", word)
        if attribute and owner and attribute[1] == owner[1]:
            return Passed(attribute=attribute[2])
        cast = re.fullmatch(r"unchecked_cast\(\w+, (\w+)\)", word)
        if cast:
            word = cast[1]
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*", word) or word in ("None", "True", "False"):
            break
        values = set(re.findall(rf"^ *{word} = (.+)$", function, re.MULTILINE))
        if not values:
            header = function[: function.find(") ->")]
            return Passed(expression=word, from_outside=f" {word}:" in header)
        if len(values) > 1:
            return Passed(expression=word)
        word = values.pop()
    if word in ("None", "True", "False") or _number(word) is not None:
        return Passed(literal=word)
    return Passed(expression=_product(word, function))


def _product(word: str, function: str) -> str:
    """torch.mul(a, b) with what a and b stand for, "a * b"; any other expression as it is."""
    factors = re.fullmatch(r"torch\.mul\((\w+), (\w+)\)", word)
    if not factors:
        return word
    names = []
    for factor in factors.groups():
        value = re.findall(rf"^ *{factor} = torch\.to\((\w+), \d+\)$", function, re.MULTILINE)
        names.append(_passed(value[0] if len(value) == 1 else factor, function).attribute)
    return " * ".join(names) if all(names) else word


def _after(code: str, start: str) -> str:
    at = code.find(start)
    return code[at + len(start) : at + len(start) + 40].split("\n")[0] if at >= 0 else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def given_by(
    arguments: Mapping[str, Passed],
    own: Mapping[str, Tensor],
    shown: str,
    *,
    absent: Collection[str] = (),
    inplace_abn: bool = False,
) -> dict[str, tuple[str, ...]]:
    """role -> names of the layer's own tensors, as `roles_of` takes it, for the roles that the code decides.

    A parameter that the caller gives is decided by name: tracing passes tied ones in from the module that has them first,
    and pruned ones from the hook that computes them. So is InPlaceABN's weight, which is no gamma. `absent` are the
    attributes that hold None. Raises FormatError for any other expression, and for statistics that
    are not the layer's running_mean and running_var.
    """
    found: dict[str, tuple[str, ...]] = {}
    for role in _TENSORS if arguments else ():
        passed = arguments[role]
        pair = (f"{role}_orig", f"{role}_mask")
        if role == "weight" and inplace_abn:
            continue
        if passed.from_outside and (role in own or all(name in own for name in pair) or f"{role}_g" in own):
            continue
        if passed.literal == "None" or (passed.attribute in absent and not role.startswith("running")):
            names: tuple[str, ...] = ()
        elif passed.attribute in own:
            names = (passed.attribute,)
        elif set(passed.expression.split(" * ")) == set(pair) and all(name in own for name in pair):
            names = pair
        else:
            raise FormatError(
                f"{shown}: the {role} that its code passes to batch_norm is no tensor that it stores but"
                f" {printable(passed.attribute or passed.expression or passed.literal, 60)!r}; save the module itself or its"
                f" state dict with that value as its {role}"
            )
        if role.startswith("running") and names != (role,):
            raise FormatError(f"{shown}: its code passes {listed(names) or 'None'} to batch_norm as {role}")
        found[role] = names
    return {role: names for role, names in found.items() if role in ("weight", "bias")}
