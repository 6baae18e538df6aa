"""BatchNormalization inside custom layers: which arrays in the weights are those of which layer in the config.

Keras stores arrays under the names of attributes, and a custom layer's config is its author's: what it writes under "bn"
may lie in `self._bn`. The two are joined where the names that Keras >= 3.6 stores for a layer and for those around it,
the number and shape of the arrays and the place leave one possibility for both; otherwise nothing is picked.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.keras import config
from bnport.adapters.keras.weights import named, order, unique
from bnport.errors import FormatError, listed, printable

if TYPE_CHECKING:
    from bnport.adapters.keras.config import Node, Settings
    from bnport.adapters.keras.weights import Store
    from bnport.containers.hdf5 import Group, H5Tensor


class OneOf:
    """Arrays that belong to one of several layers of the config, or with `or_hidden` to one that it does not show.

    names, settings: of those layers. tensors: field -> array; None where the layers differ in what the arrays are.
    """

    __slots__ = ("_epsilons", "momentum", "names", "notes", "or_hidden", "tensors")

    def __init__(
        self, names: list[str], settings: list[Settings], tensors: dict[str, H5Tensor] | None, *, or_hidden: bool
    ) -> None:
        self.names, self.tensors, self.or_hidden = names, tensors, or_hidden
        self._epsilons = {each.epsilon for each in settings}
        momenta = {each.momentum for each in settings}
        self.momentum = momenta.pop() if len(momenta) == 1 and not or_hidden else None
        self.notes = tuple(dict.fromkeys(note for each in settings for note in each.notes))

    @property
    def is_open(self) -> bool:
        """Whether it matters which layer it is: their epsilons differ, or there may be another."""
        return len(self._epsilons) > 1 or self.or_hidden

    @property
    def epsilon(self) -> float | None:
        """The epsilon of all these layers; None where it is open, or none of them says one."""
        return None if self.is_open else next(iter(self._epsilons))

    def __str__(self) -> str:
        """What to say of the layer that has the arrays."""
        said = sorted(epsilon for epsilon in self._epsilons if epsilon is not None)
        epsilons = listed([*map(repr, said), *(["one that is not said"] if None in self._epsilons else [])], 4)
        which = f"is {'one of ' if len(self.names) > 1 else ''}{listed(self.names, 4)}"
        inside = f"lies inside a custom layer, and {which},"
        if not self.is_open:
            all_with = f"all with epsilon {epsilons}" if said else "none of which says its epsilon"
            return f"{inside} {all_with}; the file does not say which, so epsilon and momentum stay as they are"
        several = "s" if len(self._epsilons) > 1 else ""
        hidden = ", or a layer that the config does not show" if self.or_hidden else ""
        return (
            f"{inside} with epsilon{several} {epsilons}{hidden}; the file does not say which:"
            " load it with Keras and give the model itself, or leave the layer out with --skip"
        )


class Joined:
    """What `join` found out: id(node) -> notes; nodes whose arrays are not certain; path of such arrays -> OneOf."""

    __slots__ = ("notes", "one_of", "open")

    def __init__(self) -> None:
        self.notes: dict[int, tuple[str, ...]] = {}
        self.open: set[int] = set()
        self.one_of: dict[str, OneOf] = {}


def join(root: Node, store: Store, shown: str) -> Joined:
    """Set `storage` of the BatchNormalization nodes whose arrays lie elsewhere than their key in the config says."""
    result = Joined()
    lost: dict[str, list[Node]] = {}
    taken: set[str] = set()
    for node in root.walk():
        group = store.variables(node.storage) if node.storage else None
        home = _home(node)
        if home is not None and node.is_batchnorm and (group is None or _named_otherwise(_path(group), node, store)):
            lost.setdefault(store.folder(home.storage), []).append(node)
        elif group is not None:
            taken.add(_path(group))
    if not lost:
        return result
    free = {path: group for path, group in store.layers.items() if path and path not in taken}
    for folder, nodes in lost.items():
        below = {path: group for path, group in free.items() if not folder or path.startswith(f"{folder}/")}
        _join_below(nodes, below, store, shown, result)
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
    """Of the layer whose `vars` the group is."""
    return group.path.replace("\\", "/").removesuffix("/vars")


def _named_otherwise(path: str, node: Node, store: Store) -> bool:
    """Whether the names stored for the layer at `path` and those around it are others than the node's."""
    return store.own_names.get(path) not in (None, node.name) or _whole(path, node, store) is False


def _whole(path: str, node: Node, store: Store) -> bool | None:
    """Whether the names stored from the node's home down to `path` are all those of the config; None without names."""
    home, names = _home(node), []
    assert home is not None
    stored = store.names_to(path, store.folder(home.storage))
    while node is not home and node.parent is not None:
        names.append(node.name)
        node = node.parent
    return None if stored is None else stored == names[::-1]


def _join_below(nodes: list[Node], groups: dict[str, Group], store: Store, shown: str, result: Joined) -> None:
    """Join the nodes of one custom layer with the groups below it."""
    settings = [config.settings(node, shown) for node in nodes]
    fits = [
        {p for p, group in groups.items() if store.own_names.get(p) in (None, node.name) and _fits(each, group)}
        for node, each in zip(nodes, settings, strict=True)
    ]
    whole = [{p for p in fit if _whole(p, node, store)} for node, fit in zip(nodes, fits, strict=True)]
    certain = set().union(*whole)
    fits = [named_so or fit - certain for named_so, fit in zip(whole, fits, strict=True)]
    near = [{p for p in fit if _bare(p) == _bare(node.storage)} for node, fit in zip(nodes, fits, strict=True)]
    chosen = _only(near)
    rest = [set() if at in chosen else fit - set(chosen.values()) for at, fit in enumerate(fits)]
    chosen |= _only(rest)
    for at, path in chosen.items():
        if len(fits[at]) > 1 or sum(path in fit for fit in fits) > 1 or not whole[at]:
            result.notes[id(nodes[at])] = (f"its arrays are taken to be those at {printable(path)}, which alone fit",)
        nodes[at].storage = path
    for some, paths in _together({at: fit for at, fit in enumerate(rest) if fit and at not in chosen}):
        result.open |= {id(nodes[at]) for at in some}
        for path in sorted(paths):
            here = [at for at in some if path in rest[at]]
            orders = {_fields(settings[at]) for at in here}
            tensors = None
            if len(orders) == 1:
                tensors = named(groups[path].tensors(), orders.pop(), f"{shown}: {printable(path)}")
            names = unique([nodes[at].path for at in here], [nodes[at].storage for at in here])
            kinds = [settings[at] for at in here]
            result.one_of[path] = OneOf(names, kinds, tensors, or_hidden=len(paths) > len(some))


def _only(choices: list[set[str]]) -> dict[int, str]:
    """Position -> its one choice, where that is nobody else's choice."""
    return {
        at: next(iter(each))
        for at, each in enumerate(choices)
        if len(each) == 1 and sum(each <= other for other in choices) == 1
    }


def _together(choices: dict[int, set[str]]) -> list[tuple[list[int], set[str]]]:
    """The positions whose choices overlap, directly or through others, with all that they choose from."""
    parts: list[tuple[list[int], set[str]]] = []
    for at, paths in choices.items():
        joined, apart = ([at], set(paths)), []
        for part in parts:
            if part[1] & paths:
                joined = (part[0] + joined[0], part[1] | joined[1])
            else:
                apart.append(part)
        parts = [*apart, joined]
    return parts


def _bare(path: str) -> str:
    """The path without underscores at the beginning of its parts."""
    return "/".join(part.lstrip("_") for part in path.split("/"))


def _fields(settings: Settings) -> tuple[str, ...]:
    return order(scale=settings.scale, center=settings.center, renorm=settings.renorm)


def _fits(settings: Settings, group: Group) -> bool:
    """Whether the group can hold arrays of a layer with these settings, by their number and shape."""
    fields = _fields(settings)
    if len(group.names()) != len(fields):
        return False
    try:
        channels = named(group.tensors(), fields, "")["mean"].shape[0]
    except FormatError:
        return False
    return settings.channels in (None, channels)
