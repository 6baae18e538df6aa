"""The `.keras` file: a zip of metadata.json, config.json and model.weights.h5. The list comes from config.json alone."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.keras import config
from bnport.adapters.keras.entry import Contents, Entry
from bnport.containers.zip import STORED, Archive
from bnport.errors import FormatError, NotFound, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from bnport.adapters.keras.absent import Absent
    from bnport.adapters.keras.inside import OneOf
    from bnport.adapters.keras.weights import Found, Store
    from bnport.containers.files import ReadFile
    from bnport.containers.hdf5 import H5, H5Tensor
    from bnport.record import Array

CONFIG, WEIGHTS, SHARDS = "config.json", "model.weights.h5", "model.weights.json"
WEIGHTS_LIMIT = 256 << 20  # of a compressed weights member, which has to be unpacked whole
CRC_LIMIT = 16 << 20  # weights up to this size have their CRC checked: it takes less time than opening them


def read(file: ReadFile, absent: Absent | None, *, evidence: bool) -> Contents:
    """The contents of a `.keras` file."""
    shown = printable(file.path)
    archive = Archive(file)
    if CONFIG not in archive:
        raise FormatError(f"{shown}: no {CONFIG} in the archive; it is not a .keras file")
    text = archive.read(CONFIG, config.CONFIG_LIMIT)
    root = config.tree(config.parse(text, f"{shown}: {CONFIG}"), f"{shown}: {CONFIG}")
    weights = Weights(archive)
    notes: list[str] = []
    if any(node.custom for node in root.walk()) and WEIGHTS in archive:
        entries, notes = _with_hidden(root, weights, shown, absent)
    else:
        entries = [_entry(node, weights, shown) for node in root.walk() if node.is_batchnorm]
    if evidence:
        _add_evidence(root, entries, weights, hidden=any(entry.node is None for entry in entries))
    contents = Contents(file.path, "keras", entries, holds_epsilon=True, notes=tuple(notes))
    contents.extra = {"archive": archive, "text": text, "root": root}
    return contents


class Weights:
    """The weights member of an archive, opened (and its module imported) at the first use: a listing needs none."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """Its groups by path."""
        if self._store is None:
            from bnport.adapters.keras.weights import Store

            self._store = Store(self._opened)
        return self._store

    def _opened(self) -> H5:
        from bnport.containers.hdf5 import H5

        archive, shown = self._archive, printable(self._archive.file.path)
        if WEIGHTS not in archive:
            others = [name for name in archive.members if "weights" in name]
            why = "its weights are in shards or npz, which are not read" if others else "it holds no weights"
            raise NotFound(f"{shown}: no {WEIGHTS} in the archive; {why}")
        member = archive.member(WEIGHTS)
        if member.method == STORED:
            if member.size <= CRC_LIMIT:
                archive.check_crc(WEIGHTS)
            start, size = archive.window(WEIGHTS)
            return H5(archive.file, start, size)
        return H5(Memory(archive.read(WEIGHTS, WEIGHTS_LIMIT), archive.file.path))  # type: ignore[arg-type]


class Memory:
    """Bytes that read like a ReadFile."""

    def __init__(self, data: bytes, path: str) -> None:
        self.data, self.path, self.size = data, path, len(data)

    def pread(self, offset: int, length: int, what: str = "data") -> bytes:
        """As ReadFile.pread."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(f"{printable(self.path)}: {printable(what)} should be {length} bytes at {offset}")
        return self.data[offset : offset + length]


def _entry(node: config.Node, weights: Weights, shown: str) -> Entry:
    settings = config.settings(node, shown)
    where = f"{shown}: {printable(node.path) or printable(node.name)}"
    return Entry(
        node.path or node.name, where, _fetcher(node.storage, weights, settings, where, shown),
        epsilon=settings.epsilon, momentum=settings.momentum, scale=settings.scale, center=settings.center,
        channels=settings.channels, dtype=settings.dtype, node=node, notes=settings.notes,
    )  # fmt: skip


def _add_evidence(root: config.Node, entries: list[Entry], weights: Weights, *, hidden: bool) -> None:
    from bnport.adapters.keras import graph

    known, feeding = graph.evidence(root, hidden=hidden)
    for entry in entries:
        if entry.node is None:
            continue
        entry.inputs = known.get(entry.node.path)
        maker = feeding.get(entry.node.path)
        if maker is not None:
            entry.kernel = graph.kernel_of(maker, lambda maker=maker: _kernel(maker, weights))  # type: ignore[misc]


def _kernel(node: config.Node, weights: Weights) -> Array:
    from bnport.adapters.keras.graph import where_kernel_is

    group = weights.store.variables(node.storage)
    tensors = group.tensors() if group is not None else []
    _, number = where_kernel_is(node)
    if number >= len(tensors):
        raise FormatError(f"{printable(node.path)}: no kernel in the weights")
    return tensors[number].array()


def _fetcher(
    storage: str, weights: Weights, settings: config.Settings, where: str, shown: str
) -> Callable[[], dict[str, H5Tensor]]:
    def fetch() -> dict[str, H5Tensor]:
        from bnport.adapters.keras.weights import named, order

        group = weights.store.variables(storage)
        if group is None:
            raise FormatError(
                f"{where}: the weights hold nothing at {printable(storage)}; was the model saved unbuilt?"
            )
        fields = order(scale=settings.scale, center=settings.center, renorm=settings.renorm)
        try:
            held = group.tensors()
        except FormatError as error:
            raise FormatError(f"{where}: {str(error).removeprefix(f'{shown}: ')}") from None
        tensors = named(held, fields, where)
        if settings.channels not in (None, tensors["mean"].shape[0]):
            raise FormatError(
                f"{where}: {settings.channels} channels by the config, {tensors['mean'].shape[0]} in the weights"
            )
        return tensors

    return fetch


def _with_hidden(
    root: config.Node, weights: Weights, shown: str, absent: Absent | None
) -> tuple[list[Entry], list[str]]:
    """The layers of a model with custom layers, whose configs need not mention what is in them, nor where it lies.

    And what is to be said of arrays that belong to none of them.
    """
    from bnport.adapters.keras import inside
    from bnport.adapters.keras.weights import unique

    joined = inside.join(root, weights.store, shown)
    nodes = [node for node in root.walk() if node.is_batchnorm and id(node) not in joined.open]
    entries = [_entry(node, weights, shown) for node in nodes]
    names = unique((e.name for e in entries), (node.storage or node.name for node in nodes))
    for entry, node, name in zip(entries, nodes, names, strict=True):
        entry.name, entry.notes = name, (*entry.notes, *joined.notes.get(id(node), ()))
    store = weights.store
    certain = {path: one for path, one in joined.one_of.items() if one.tensors is not None}
    paths = list(certain)
    for name, path in zip(unique(map(store.name_of, paths), paths, names), paths, strict=True):
        entries.append(_entry_of_one(name, certain[path], certain[path].tensors or {}, shown))
    hidden, notes_on_others = _hidden(entries, certain, joined.one_of, store, shown, absent)
    return entries + hidden, notes_on_others


def _entry_of_one(
    name: str, one: OneOf, tensors: dict[str, H5Tensor], shown: str, notes: tuple[str, ...] = ()
) -> Entry:
    """The layer that has these arrays, whichever of several it is."""
    said = () if one.is_open else (str(one),)
    return Entry(
        name, f"{shown}: {printable(name)}", lambda: tensors, epsilon=one.epsilon, momentum=one.momentum,
        notes=(*notes, *one.notes, *said), question=str(one) if one.is_open else "",
    )  # fmt: skip


def _hidden(
    known: list[Entry],
    found_already: Iterable[str],
    one_of: Mapping[str, OneOf],
    store: Store,
    shown: str,
    absent: Absent | None,
) -> tuple[list[Entry], list[str]]:
    """The layers that are found by their arrays alone, and what there is to say of the rest."""
    from bnport.adapters.keras.weights import scan, unique

    paths = {store.h5.root.path} | {f"{entry.node.storage}/vars" for entry in known if entry.node is not None}
    listed_ = {group.path for entry in known if entry.node and (group := store.variables(entry.node.storage))}
    skip = {p.replace("\\", "/") for p in paths | listed_} | {f"{path}/vars" for path in found_already}
    found, notes = scan(store, shown, absent, skip=skip)
    taken = [entry.name for entry in known]
    places = [each.path.removesuffix("/vars") for each in found]
    entries = []
    for each, name, path in zip(found, unique((each.name for each in found), places, taken), places, strict=True):
        one = one_of.get(path)
        if one is not None:
            entries.append(_entry_of_one(name, one, each.tensors, shown, each.notes))
        else:
            entries.append(_hidden_entry(name, each, shown))
    return entries, notes


def _hidden_entry(name: str, found: Found, shown: str) -> Entry:
    note = "lies inside a custom layer; no epsilon was found for it in the config"
    tensors: dict[str, Any] = found.tensors
    return Entry(name, f"{shown}: {printable(name)}", lambda: tensors, epsilon=None, notes=(*found.notes, note))
