"""The weights file of Keras >= 2.12 (`.weights.h5`, also inside a `.keras`, also in shards): arrays 0, 1, 2, ... per layer.

It holds no names of arrays and no settings: `vars/0..` are gamma, beta, moving mean and moving variance, minus those
that the layer does not have, then three more with renorm.
"""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING
from bnport.containers.hdf5 import natural
from bnport.errors import FormatError, Question, listed, printable
from bnport.rounding import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bnport.adapters.keras.absent import Absent
    from bnport.containers.hdf5 import H5, Group, H5Tensor

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
_OLD = "_layer_checkpoint_dependencies"  # Keras and TensorFlow 2.12 to 2.14
_NORM = re.compile(r"bn|batch|norm", re.IGNORECASE)
_OTHER_NORM = re.compile(r"layer_?norm|group_?norm|rms_?norm", re.IGNORECASE)  # by their names in Keras


def order(*, scale: bool, center: bool, renorm: bool) -> tuple[str, ...]:
    """What a layer's arrays are, in the order in which every Keras stores them."""
    return (
        *(("gamma",) if scale else ()), *(("beta",) if center else ()), "mean", "variance", *(RENORM if renorm else ()),
    )  # fmt: skip


class Store:
    """The groups of one or several weights files by path. Files written on Windows by Keras <= 2.15 have backslashes."""

    ordered = True  # whether the places of the arrays tell the layers' order

    def __init__(self, opened: Callable[[], H5]) -> None:
        self._opened = opened
        self._h5: H5 | None = None
        self._index: dict[str, Group] | None = None
        self._layers: dict[str, Group] | None = None
        self._own_names: dict[str, str | None] | None = None

    @property
    def h5(self) -> H5:
        """The file, opened at the first call."""
        if self._h5 is None:
            self._h5 = self._opened()
            if any("\\" in name for name in self._h5.root.names()):
                self._index = {path.replace("\\", "/"): group for path, group in self._h5.walk()}
        return self._h5

    def group(self, path: str) -> Group | None:
        """The group at `path`, or None."""
        root = self.h5.root
        if self._index is not None:
            return self._index.get(path)
        return root.group(path) if path else root

    def names(self, path: str) -> list[str]:
        """The names of the groups in the group at `path`."""
        if self._index is not None:
            prefix = f"{path}/" if path else ""
            below = {p[len(prefix) :].split("/")[0] for p in self._index if p.startswith(prefix) and p != path}
            return sorted(below, key=natural)
        group = self.group(path)
        return group.names() if group is not None else []

    def folder(self, storage: str) -> str:
        """Where in this file a layer lies whose path in a file of Keras >= 2.15 is `storage`."""
        if storage and self.group(storage) is None and _OLD in self.names(""):
            return self._old_path(storage) or storage
        return storage

    def variables(self, storage: str) -> Group | None:
        """The `vars` group of a layer whose path in a file of Keras >= 2.15 is `storage`; None if it is not there."""
        self.h5  # noqa: B018  (opens the file, which fills the index)
        group = self.group(f"{storage}/vars" if storage else "vars")
        if group is None and _OLD in self.names(""):
            path = self._old_path(storage)
            group = None if path is None else self.group(f"{path}/vars")
        return group

    def _old_path(self, storage: str) -> str | None:
        """Keras 2.12 to 2.14 count a layer with weights twice: the n-th of a class is the n-th there, whatever its number."""
        parts, path = storage.split("/"), ""
        while parts:
            part = parts.pop(0)
            prefix = f"{path}/" if path else ""
            if part == "layers" and parts:
                match = re.fullmatch(r"(.*?)(?:_(\d+))?", parts.pop(0), re.DOTALL)
                base, number = (match[1], int(match[2] or 0)) if match else ("", 0)
                names = [n for n in self.names(f"{prefix}{_OLD}") if re.fullmatch(rf"{re.escape(base)}(_\d+)?", n)]
                if number >= len(names):
                    return None
                path = f"{prefix}{_OLD}/{names[number]}"
            else:
                path = f"{prefix}{part}"
        return path

    def walk(self) -> Iterable[tuple[str, Group]]:
        """Every group with its path (slashes, whatever is in the file)."""
        h5 = self.h5
        return self._index.items() if self._index is not None else h5.walk()

    @property
    def layers(self) -> dict[str, Group]:
        """Path of a layer -> its `vars` group; "" is the whole model."""
        if self._layers is None:
            ends = ((path, group) for path, group in self.walk() if path == "vars" or path.endswith("/vars"))
            self._layers = {path[: -len("/vars")]: group for path, group in ends}
        return self._layers

    @property
    def own_names(self) -> dict[str, str | None]:
        """Path of a layer -> the name that Keras >= 3.6 stores for it, None where none is stored."""
        if self._own_names is None:
            stored = {path: group.attribute("name") for path, group in self.layers.items()}
            self._own_names = {path: own if isinstance(own, str) else None for path, own in stored.items()}
        return self._own_names

    def names_to(self, layer: str, start: str = "") -> list[str] | None:
        """The names stored for the layers on the way from the layer `start` to `layer`; None where one is missing."""
        pieces, names = layer.split("/"), []
        for end in range(len(start.split("/")) + 1 if start else 1, len(pieces) + 1):
            path = "/".join(pieces[:end])
            if path in self.own_names:
                own = self.own_names[path]
                if not own:
                    return None
                names.append(own)
        return names

    def name_of(self, layer: str) -> str:
        """What the layer at this path is called: the names that Keras >= 3.6 stores, outer/inner; else the path."""
        if not layer:
            return self.own_names.get("") or "/"
        return "/".join(self.names_to(layer) or ()) or layer


def named(tensors: list[H5Tensor], fields: tuple[str, ...], where: str) -> dict[str, H5Tensor]:
    """field -> array; FormatError unless there are exactly these, each of one length and of floating-point numbers."""
    if len(tensors) != len(fields):
        raise FormatError(
            f"{where}: {len(fields)} arrays expected ({', '.join(fields)}), the weights hold {len(tensors)}"
        )
    return checked(dict(zip(fields, tensors, strict=True)), where)


def checked(tensors: dict[str, H5Tensor], where: str) -> dict[str, H5Tensor]:
    """The same, once each is known to be a vector of floating-point numbers, all of one length."""
    for field, tensor in tensors.items():
        if len(tensor.shape) != 1 or not tensor.shape[0]:
            raise FormatError(f"{where}: {field}: expected shape (channels,), got {tensor.shape}")
        if tensor.dtype not in UNIT_ROUNDOFF:
            raise FormatError(f"{where}: {field}: expected floating-point numbers, got {tensor.dtype}")
    if len({t.shape for t in tensors.values()}) > 1:
        lengths = ", ".join(f"{field} {t.shape[0]}" for field, t in tensors.items())
        raise FormatError(f"{where}: arrays of different lengths: {lengths}")
    return tensors


class Found:
    """A group that holds BatchNormalization's arrays: its path, name, field -> array, and what is not certain about it."""

    __slots__ = ("name", "notes", "own_name", "path", "tensors")

    def __init__(self, path: str, name: str, own_name: str | None) -> None:
        self.path, self.name, self.own_name = path, name, own_name
        self.tensors: dict[str, H5Tensor] = {}
        self.notes: tuple[str, ...] = ()


def scan(store: Store, where: str, absent: Absent | None, skip: Iterable[str] = ()) -> tuple[list[Found], list[str]]:
    """The BatchNormalization layers of a weights file without a config, and what to say about the rest.

    Four vectors of one length are one, seven one with renorm. Three may lack gamma or beta, which the file does not
    say: Question, unless `absent` does for that layer. Two are one only where the path says so:
    LayerNormalization has two as well. Those that are left out are said. `skip`: paths that are known already.
    """
    candidates, others = _candidates(store, set(skip))
    found = [each for each, _ in candidates]
    unclear = []
    for each, tensors in candidates:
        count = len(tensors)
        lacks: str | None = None
        if count in (3, 6):
            lacks = absent.of(each.name) if absent is not None else None
            if lacks is None:
                unclear.append(each.name)
                continue
        bare = count in (2, 5)
        fields = order(scale=not bare and lacks != "gamma", center=not bare and lacks != "beta", renorm=count > 4)
        each.tensors = named(tensors, fields, f"{where}: {printable(each.name)}")
        if not _NORM.search(f"{each.path} {each.own_name or ''}"):
            each.notes = (f"taken for BatchNormalization by its {count} arrays; nothing else in the file says so",)
    if unclear:
        if absent is not None:
            absent.check_names(where)
        raise Question(
            f"{where}: {len(unclear)} layers hold three arrays ({listed(unclear, 4)}) and the file does not say which is"
            " missing, gamma (scale=False) or beta (center=False): say --absent gamma or --absent beta, or for each layer"
            f" --absent {printable(unclear[0])}=gamma,..., or use the .keras file"
        )
    # Keras writes the layers in the model's order, HDF5 lists them by name: where the arrays lie tells the order
    if store.ordered and all(each.tensors["mean"].offset is not None for each in found):
        found.sort(key=lambda each: each.tensors["mean"].offset or 0)
    notes = absent.notes() if absent is not None else []
    if found or skip:
        others = [layer for layer in others if not _OTHER_NORM.search(layer)]
    if others:
        notes.append(
            f"{listed(others, 3)}: arrays of one length, not taken for BatchNormalization (LayerNormalization has two of them)"
        )
    return found, notes


def _candidates(store: Store, skip: set[str]) -> tuple[list[tuple[Found, list[H5Tensor]]], list[str]]:
    """Groups whose arrays may be BatchNormalization's, each with a name of its own; and the others with such vectors."""
    names = store.own_names
    candidates: list[tuple[Found, list[H5Tensor]]] = []
    others: list[str] = []
    for layer, group in store.layers.items():
        path = f"{layer}/vars" if layer else "vars"
        if path in skip or not 2 <= len(group.names()) <= 7:
            continue
        tensors = group.tensors()
        count = len(tensors)
        if any(len(t.shape) != 1 or t.shape != tensors[0].shape or not t.shape[0] for t in tensors):
            continue
        if any(t.dtype not in UNIT_ROUNDOFF for t in tensors):
            continue
        words = f"{layer.rsplit('/', 1)[-1]} {names[layer] or ''}"
        if count in (4, 7) or ("batch_normalization" in words if count == 2 else _NORM.search(words)):
            candidates.append((Found(path, layer, names[layer]), tensors))
        else:
            others.append(layer)
    full = [store.name_of(each.name) for each, _ in candidates]
    for (each, _), name in zip(
        candidates, unique(full, (each.path.removesuffix("/vars") for each, _ in candidates)), strict=True
    ):
        each.name = name
    return candidates, [f"{layer} ({own})" if (own := names[layer]) else layer for layer in others]


def unique(names: Iterable[str], paths: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, those that occur twice or are taken replaced by the paths."""
    names, used = list(names), set(taken)
    count: dict[str, int] = {}
    for name in names:
        count[name] = count.get(name, 0) + 1
    return [p if name in used or count[name] > 1 else name for name, p in zip(names, paths, strict=True)]


def shards(text: object, where: str) -> list[str]:
    """The file names of a `.weights.json`'s shards, in order. Each must be a bare name beside it."""
    weight_map = text.get("weight_map") if isinstance(text, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError(f"{where}: no weight_map")
    names: dict[str, None] = {}
    for value in weight_map.values():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.h5", name) or name.startswith("."):
                raise FormatError(
                    f"{where}: a shard is named {printable(repr(name)[:80])}; it must lie beside this file"
                )
            names[name] = None
    return list(names)
