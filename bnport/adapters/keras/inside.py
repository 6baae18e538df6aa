"""BatchNormalization inside custom layers: which arrays in the weights are those of which layer in the config.

Keras stores arrays under the names of attributes, and a custom layer's config is its author's: what it writes under "bn"
may lie in `self._bn`. The two are joined where the name that Keras >= 3.6 stores, the number and shape of the arrays and
the place leave one possibility for both; otherwise nothing is picked.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.keras import config
from bnport.adapters.keras.weights import arrays, named, order
from bnport.errors import FormatError, listed, printable

if TYPE_CHECKING:
    from bnport.adapters.keras.config import Node, Settings
    from bnport.adapters.keras.weights import Store
    from bnport.containers.hdf5 import Group, H5Tensor


class Alike:
    """Arrays that belong to one of several layers of the config, all with these settings; `names`: how those are called."""

    __slots__ = ("names", "settings", "tensors")

    def __init__(self, settings: Settings, tensors: dict[str, H5Tensor], names: list[str]) -> None:
        self.settings, self.tensors, self.names = settings, tensors, names


class Joined:
    """What `join` found out: id(node) -> note; the nodes whose arrays are not certain; storage -> Alike."""

    __slots__ = ("alike", "notes", "open")

    def __init__(self) -> None:
        self.notes: dict[int, tuple[str, ...]] = {}
        self.open: set[int] = set()
        self.alike: dict[str, Alike] = {}


def join(root: Node, store: Store, shown: str) -> Joined:
    """Set `storage` of the BatchNormalization nodes whose arrays lie elsewhere than their key in the config says."""
    result = Joined()
    lost: dict[str, list[Node]] = {}
    taken: set[str] = set()
    for node in root.walk():
        group = store.variables(node.storage) if node.storage else None
        home = _home(node)
        if home is not None and node.is_batchnorm and (group is None or _named_otherwise(group, node)):
            lost.setdefault(store.folder(home.storage), []).append(node)
        elif group is not None:
            taken.add(_path(group))
    if not lost:
        return result
    free = {path.removesuffix("/vars"): group for path, group in store.walk() if path.endswith("/vars")}
    free = {path: group for path, group in free.items() if f"{path}/vars" not in taken}
    for folder, nodes in lost.items():
        below = {path: group for path, group in free.items() if not folder or path.startswith(f"{folder}/")}
        _join_below(nodes, below, shown, result)
    return result


def _home(node: Node) -> Node | None:
    """The outermost layer around `node` that is no model of layers: all above it is where the config says."""
    home = None
    while node.parent is not None:
        node = node.parent
        if not node.is_model:
            home = node
    return home


def _path(group: Group) -> str:
    return group.path.replace("\\", "/")


def _name(group: Group) -> str | None:
    name = group.attribute("name")
    return name if isinstance(name, str) else None


def _named_otherwise(group: Group, node: Node) -> bool:
    return _name(group) not in (None, node.name)


def _join_below(nodes: list[Node], groups: dict[str, Group], shown: str, result: Joined) -> None:
    """Join the nodes of one custom layer with the groups below it."""
    settings = [config.settings(node, shown) for node in nodes]
    fits = [
        {p for p, group in groups.items() if _fits(node, each, group)}
        for node, each in zip(nodes, settings, strict=True)
    ]
    near = [{p for p in fit if _bare(p) == _bare(node.storage)} for node, fit in zip(nodes, fits, strict=True)]
    chosen = _only(near)
    rest = [set() if at in chosen else fit - set(chosen.values()) for at, fit in enumerate(fits)]
    chosen |= _only(rest)
    for at, path in chosen.items():
        if len(fits[at]) > 1 or sum(path in fit for fit in fits) > 1 or _name(groups[path]) is None:
            result.notes[id(nodes[at])] = (f"its arrays are taken to be those at {printable(path)}, which alone fit",)
        nodes[at].storage = path
    undecided = [at for at, fit in enumerate(rest) if fit and at not in chosen]
    paths = sorted({p for at in undecided for p in rest[at]} - set(chosen.values()))
    result.open |= {id(nodes[at]) for at in undecided}
    kinds = {settings[at]._replace(channels=None) for at in undecided}
    if len(kinds) == 1 and len(paths) <= len(undecided):
        names = [nodes[at].path for at in undecided]
        kind = kinds.pop()
        fields = order(scale=kind.scale, center=kind.center, renorm=kind.renorm)
        for path in paths:
            result.alike[path] = Alike(kind, named(arrays(groups[path]), fields, f"{shown}: {printable(path)}"), names)


def _only(choices: list[set[str]]) -> dict[int, str]:
    """Position -> its one choice, where that is nobody else's choice."""
    return {
        at: next(iter(each))
        for at, each in enumerate(choices)
        if len(each) == 1 and sum(each <= other for other in choices) == 1
    }


def _bare(path: str) -> str:
    """The path without underscores at the beginning of its parts."""
    return "/".join(part.lstrip("_") for part in path.split("/"))


def _fits(node: Node, settings: Settings, group: Group) -> bool:
    """Whether the group can hold the node's arrays, by its name and theirs."""
    fields = order(scale=settings.scale, center=settings.center, renorm=settings.renorm)
    if len(group.names()) != len(fields) or _named_otherwise(group, node):
        return False
    try:
        channels = named(arrays(group), fields, "")["mean"].shape[0]
    except FormatError:
        return False
    return settings.channels in (None, channels)


def alike_note(alike: Alike) -> str:
    """What to say of a layer whose arrays belong to one of several."""
    return (
        f"lies inside a custom layer, and is one of {listed(alike.names, 4)}, all with the same settings; the file does not"
        " say which, so epsilon and momentum stay as they are"
    )
