"""Where in a checkpoint the BatchNorm layers are: the state dicts and modules that training scripts nest in dicts."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple, Protocol
from bnport.adapters.torch.layers import LAZY
from bnport.adapters.torch.parameters import STATISTICS
from bnport.containers.pickle import Global, Node
from bnport.errors import FormatError, NotFound, Question, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.containers.tensor import Tensor

DEPTH = 6  # of dicts in dicts; deeper ones are configurations
VALUES = 200_000  # looked at in all

LEVELS = 100  # of modules in modules
WORK = 10_000_000  # in all modules of a file: their items, the characters of their names, and PER_MODULE for each
PER_MODULE = 100  # so there may be about 50 000; the largest published models have 10 000

_PLAIN = (type(None), bool, int, float, str, bytes, dict, list, tuple)
_LOSES = ("optimizer", "optimizer_state_dict", "optim", "scheduler", "lr_scheduler")  # never a model


class Reader(Protocol):
    """How to look into a value: a file's stand-ins, or live objects."""

    where: str

    def items(self, value: Any) -> dict[Any, Any] | None:
        """The items of a kind of dict, or None."""

    def tensor(self, value: Any, name: str) -> Tensor | None:
        """The tensor that a value is, or None."""

    def is_lazy(self, value: Any) -> bool:
        """Whether it is a parameter or buffer of a lazy layer that has seen no batch."""


def is_lazy(value: Any) -> bool:
    """Whether a pickled value is a parameter or buffer of a lazy layer that has seen no batch."""
    for _ in range(5):
        if isinstance(value, Global):
            return "Uninitialized" in value.name
        if not isinstance(value, Node):
            return False
        if "Uninitialized" in value.path:
            return True
        value = value.args[0] if value.args else None
    return False


def unwrapped(value: Any) -> Any:
    """The pickled module that torch.compile wrapped; any other value as it is."""
    for _ in range(4):
        if not isinstance(value, Node) or value.state is not None or not value.args:
            break
        if value.path != "torch._dynamo.eval_frame.OptimizedModule":
            break
        value = value.args[0]
    return value


def state_of(value: Any) -> dict[str, Any] | None:
    """The __dict__ of a pickled nn.Module, or None if the value is none."""
    value = unwrapped(value)
    if not isinstance(value, Node):
        return None
    state = value.state
    if not isinstance(state, dict) and value.path == "torch.fx.graph_module.reduce_graph_module" and value.args:
        state = value.args[0]
    return state if isinstance(state, dict) and "_modules" in state and "_buffers" in state else None


def named_modules(
    root: Any,
    checkpoint: Checkpoint,
    state_of: Callable[[Any], dict[str, Any] | None],
    children_of: Callable[[dict[str, Any]], dict[Any, Any] | None],
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, module, state) of a module and of all below it, depth first, each object once, as torch's named_modules().

    state_of: what lies in a module, None for what is none; children_of: the items of a state that may be modules. Raises
    FormatError for more than real models have: a few bytes of a pickle put one dict into any number of modules.
    """
    seen: set[int] = set()
    levels: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter([("", root)]))]
    while levels:
        prefix, rest = levels[-1]
        for key, child in rest:
            module = unwrapped(child)
            state = state_of(module)
            if state is None or id(module) in seen:
                continue
            if not isinstance(key, str):
                raise FormatError(f"{checkpoint.where}: {printable(prefix)}: a module under a key that is no text")
            seen.add(id(module))
            name = f"{prefix}.{key}" if prefix else key
            children = children_of(state) or {}
            held = (checkpoint.items(state.get(group)) or () for group in ("_parameters", "_buffers"))
            checkpoint.work += len(state) + len(children) + sum(map(len, held)) + len(name) + PER_MODULE
            if len(levels) > LEVELS + 1 or checkpoint.work > WORK:
                raise FormatError(f"{checkpoint.where}: {printable(name)}: modules nested too deep or too many")
            yield name, module, state
            levels.append((name, iter(children.items())))
            break
        else:
            levels.pop()


class Found(NamedTuple):
    """A state dict (tensors by name) or a module (`tensors` None), and the path of keys that leads to it."""

    path: str
    value: Any
    tensors: dict[str, Tensor] | None


def models_in(value: Any, reader: Reader, is_module: Callable[[Any], bool]) -> list[Found]:
    """Every state dict with running statistics, and every module, in a checkpoint; the same object only once."""
    return list(_walk(value, "", 0, reader, is_module, set(), [VALUES]))


def _walk(
    value: Any,
    path: str,
    depth: int,
    reader: Reader,
    is_module: Callable[[Any], bool],
    seen: set[int],
    budget: list[int],
) -> Iterator[Found]:
    if id(value) in seen or depth > DEPTH:
        return
    if is_module(value):
        seen.add(id(value))
        yield Found(path, value, None)
        return
    items = reader.items(value)
    if items is None:
        if not isinstance(value, list | tuple):
            return
        items = dict(enumerate(value[:64]))
    seen.add(id(value))
    budget[0] -= len(items)
    if budget[0] < 0:
        raise FormatError(f"{reader.where}: too many nested values to look for a model in; name it with --key")
    if any(isinstance(name, str) and _is_statistic(name) for name in items):
        tensors = tensors_of(items, reader)
        if any(_is_statistic(name) for name in tensors):
            yield Found(path, value, tensors)
            return
    for key, item in items.items():
        if key not in _LOSES and isinstance(key, str | int):
            yield from _walk(item, f"{path}.{key}" if path else str(key), depth + 1, reader, is_module, seen, budget)


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def tensors_of(items: dict[Any, Any], reader: Reader) -> dict[str, Tensor]:
    """The tensors of a state dict. What lies in a BatchNorm but is no known tensor is refused."""
    tensors = {}
    for name, item in items.items():
        tensor = reader.tensor(item, name) if isinstance(name, str) else None
        if tensor is not None:
            tensors[name] = tensor
    norms = {name.rpartition(".")[0] for name in items if isinstance(name, str) and _is_statistic(name)}
    for name, item in items.items():
        if isinstance(name, str) and name not in tensors and name.rpartition(".")[0] in norms:
            last = name.rpartition(".")[2]
            if reader.is_lazy(item):
                raise FormatError(f"{reader.where}: {printable(name.rpartition('.')[0]) or 'it'} {LAZY}")
            if not last.startswith(("_", "num_batches_tracked")) and type(item) not in _PLAIN:
                raise FormatError(
                    f"{reader.where}: {printable(name)!r} is no kind of tensor that is understood ({item!r:.80})"
                )
    return tensors


def chosen(found: list[Found], key: str | None, where: str) -> tuple[Found | None, list[str]]:
    """The model that `key` names, or the only one there is, and notes; None if there is none.

    Raises Question if there are several and no key, NotFound if the key names none of them.
    """
    if key is not None:
        named = [candidate for candidate in found if candidate.path == key]
        if len(named) > 1:
            raise Question(
                f"{where}: {len(named)} models are at {printable(key)!r}, because a key with a dot reads like a key within a"
                " key; load the checkpoint and give bnport the one that is meant: bnport.read(torch.load(...)[...])"
            )
        if named:
            return named[0], []
        paths = [f.path or "the top level" for f in found]
        have = f"BatchNorm is under {listed(paths)}" if paths else "there is no BatchNorm anywhere in it"
        raise NotFound(f"{where}: no BatchNorm under key {printable(key)!r}; {have}")
    if len(found) > 1:
        raise Question(
            f"{where}: holds {len(found)} models with BatchNorm: {listed(f.path for f in found)}; choose one with"
            f" --key {printable(found[0].path)}"
        )
    if not found:
        return None, []
    return found[0], [f"taken from key {printable(found[0].path)!r}"] if found[0].path else []
