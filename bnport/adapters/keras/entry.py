"""One BatchNormalization layer of a Keras file as the readers find it and the writer needs it."""

from __future__ import annotations

from collections.abc import Mapping

from bnport._lazy import TYPE_CHECKING, np
from bnport.adapters.keras.config import EPSILON
from bnport.errors import FormatError, InvalidValue, NotFound, listed, printable, repeated
from bnport.layer import Layer, Layers
from bnport.record import FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from bnport.adapters.keras.config import Node
    from bnport.containers.hdf5 import H5Tensor
    from bnport.layer import Kernel, StoredTensor
    from bnport.record import Array, BatchNorm

OUTSIDE = "the standard deviation is stored; it is divided by as std + epsilon"


class Entry:
    """A layer of a file: its settings, and its arrays, which are looked up at the first call of `tensors`.

    epsilon is None where the file holds none; question: what to ask where it holds several and does not say which is
    this layer's. `fetch` returns field -> H5Tensor, with RENORM's names among the fields.
    form: "variance"; "std" or "root" for Keras 1, where y = (x - mean) / (divisor + epsilon), divisor being the stored
    array or its root.
    """

    __slots__ = (
        "_tensors", "center", "channels", "default_epsilon", "dtype", "epsilon", "fetch", "form", "inputs", "kernel",
        "momentum", "name", "node", "notes", "question", "scale", "where",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        where: str,
        fetch: Callable[[], dict[str, H5Tensor]],
        *,
        epsilon: float | None,
        default_epsilon: float = EPSILON,
        momentum: float | None = None,
        scale: bool | None = None,
        center: bool | None = None,
        channels: int | None = None,
        dtype: str | None = None,
        form: str = "variance",
        node: Node | None = None,
        notes: tuple[str, ...] = (),
        question: str = "",
    ) -> None:
        self.name, self.where, self.fetch = name, where, fetch
        self.epsilon, self.default_epsilon, self.momentum = epsilon, default_epsilon, momentum
        self.form, self.node, self.notes, self.question = form, node, notes, question
        self.kernel: Kernel | None = None
        self.inputs: tuple[str, ...] | None = None
        self._tensors: dict[str, H5Tensor] | None = None
        if None in (scale, center, channels, dtype):
            tensors = self.tensors()
            scale, center = "gamma" in tensors, "beta" in tensors
            channels, dtype = tensors["mean"].shape[0], tensors["mean"].dtype
        self.scale, self.center, self.channels, self.dtype = bool(scale), bool(center), int(channels or 0), str(dtype)

    def tensors(self) -> dict[str, H5Tensor]:
        """field -> array of the file, of gamma, beta, mean, variance and the three of renorm."""
        if self._tensors is None:
            self._tensors = self.fetch()
        return self._tensors

    @property
    def applied_epsilon(self) -> float:
        """The file's own, or the default where it holds none."""
        return self.default_epsilon if self.epsilon is None else self.epsilon

    def stores(self, *, holds_epsilon: bool) -> set[str]:
        """What the file has a place for. `holds_epsilon`: whether it has a config, for an epsilon and a momentum."""
        stores = {"mean", "variance"} | ({"gamma"} if self.scale else set()) | ({"beta"} if self.center else set())
        if holds_epsilon and self.node is not None and self.form == "variance":
            stores |= {field for field in ("epsilon", "momentum") if getattr(self, field) is not None}
        return stores

    def load(self) -> dict[str, Array]:
        """The four fields (gamma, beta where there are any) in neutral terms."""
        arrays = {field: tensor.array() for field, tensor in self.tensors().items() if field in FIELDS}
        if self.form != "variance":
            epsilon = self.applied_epsilon
            divisor = arrays["variance"].astype(np.float64)
            if self.form == "root":
                if (divisor < 0).any():
                    raise FormatError(f"{self.where}: a negative variance under a root")
                divisor = np.sqrt(divisor)
            if (divisor + epsilon <= 0).any():
                raise FormatError(f"{self.where}: std + epsilon must be positive")
            arrays["variance"] = (divisor + epsilon) ** 2
        return arrays

    def layer(self, *, holds_epsilon: bool) -> Layer:
        """This as a Layer. `holds_epsilon`: as for `stores`."""
        notes, assumed, epsilon = list(self.notes), set(), self.applied_epsilon
        if self.form != "variance":
            notes.append(f"{OUTSIDE if self.form == 'std' else 'divided by as sqrt(variance) + epsilon'}, {epsilon!r}")
            epsilon = 0.0
        elif self.epsilon is None and not self.question:
            assumed.add("epsilon")
        try:
            return Layer(
                self.name, channels=self.channels, epsilon=epsilon, load=self.load, momentum=self.momentum,
                stores=self.stores(holds_epsilon=holds_epsilon), assumed=assumed, dtype=self.dtype,
                tensors=_Tensors(self) if self.form == "variance" else None,
                kernel=self.kernel, inputs=self.inputs, notes=notes, question=self.question,
            )  # fmt: skip
        except InvalidValue as error:
            raise FormatError(f"{self.where}: {error}") from None


class _Tensors(Mapping[str, "StoredTensor"]):
    """field -> Tensor of an entry; the weights are opened when it is first looked into."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def __getitem__(self, field: str) -> StoredTensor:
        return self._entry.tensors()[field]

    def __iter__(self) -> Iterator[str]:
        return (field for field in self._entry.tensors() if field in FIELDS)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Contents:
    """What one Keras file holds: its BatchNormalization layers, how they can be written, and what to say about it.

    kind: "keras", "weights" or "legacy". holds_epsilon: whether it has a config to put one into.
    """

    def __init__(self, path: str, kind: str, entries: list[Entry], *, holds_epsilon: bool, notes: tuple[str, ...] = ()):
        self.path, self.kind, self.entries, self.holds_epsilon, self.notes = path, kind, entries, holds_epsilon, notes
        self.extra: dict[str, Any] = {}
        self.files: tuple[str, ...] = ()  # the other files that it lies in
        self.read_only = ""  # why it cannot be written
        if (twice := repeated(entry.name for entry in entries)) is not None:
            raise FormatError(f"{printable(path)}: two BatchNormalization layers are named {printable(twice)!r}")

    def layers(self) -> Layers:
        """The Layers of the file."""
        found = [entry.layer(holds_epsilon=self.holds_epsilon) for entry in self.entries]
        layers = Layers(found, source=self.path, format="keras", notes=self.notes, files=self.files)
        layers.opened, layers.read_only = self, self.read_only
        return layers

    def entry(self, name: str) -> Entry:
        """The entry of that name. Raises NotFound listing some there are."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = listed((e.name for e in self.entries), 5) if self.entries else "none"
        raise NotFound(f"{printable(self.path)}: no BatchNormalization layer {printable(name)!r}; there are {names}")


def renorm_arrays(record: BatchNorm, epsilon: float, fields: frozenset[str]) -> dict[str, Array]:
    """What a renorm layer keeps besides: training goes on from std = sqrt(variance + epsilon) and squares it back."""
    arrays: dict[str, Array] = {}
    if fields & {"variance", "epsilon"}:
        std = np.sqrt(record.variance.astype(np.float64) + epsilon)
        arrays |= {"moving_stddev": std, "renorm_stddev": std}
    if "mean" in fields:
        arrays["renorm_mean"] = record.mean
    return arrays
