"""A record as it was found in a model, the set of them that one source holds, and a change to one of them."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple, Protocol
from bnport.errors import FormatError, InvalidValue, Question, printable
from bnport.record import FIELDS, BatchNorm, checked_epsilon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.record import Array


CHANNELS = 12 << 20  # of all layers of one source; the largest published models have 2 M


class StoredTensor(Protocol):
    """An array as it lies in a file: what a listing needs of containers.tensor.Tensor."""

    dtype: str

    def read(self) -> bytes:
        """Its bytes, little-endian, C order."""


class Kernel(NamedTuple):
    """The weights that feed a BatchNorm layer, in one layout whatever the framework's.

    kind:   "dense", "conv", "depthwise", "grouped", "transposed" or "separable".
    shape:  (out channels, in channels per group, *spatial); depthwise is (channels, 1, *spatial).
    name:   of the layer or tensor in the source.
    values: reads the weights, transposed to `shape`; called only when somebody compares contents. None: not readable.
    before: spatial shape of the depthwise kernel whose output it takes directly (a separable convolution), if known.
    guessed: whether it is known to feed the layer only because it is defined before it, not from a graph.
    refuted: of a guess: whether other shapes in the source show that it does not call things in the order of definition.
    """

    kind: str
    shape: tuple[int, ...]
    name: str
    values: Callable[[], Array] | None = None
    before: tuple[int, ...] | None = None
    guessed: bool = False
    refuted: bool = False


class Layer:
    """One BatchNorm layer as found in a source. Its numbers are read only when `record` or `arrays()` is asked for.

    name:      in the source's own words, unique there.
    channels:  C.
    epsilon:   as stored, or the framework's default: then "epsilon" is in `assumed`, or there is a `question`.
    momentum:  the fraction of the OLD value kept (Keras' meaning; 1 - torch's). None: unknown, or a cumulative average.
    stores:    what the source itself holds for this layer and could hold if written to: of gamma, beta, mean,
               variance, epsilon, momentum. Without "gamma" the layer has scale=False, without "beta" center=False.
    assumed:   the fields whose value is a guess because the source does not hold them ("epsilon", "momentum").
    dtype:     of the stored arrays: float64, float32, float16 or bfloat16.
    load:      returns the four fields as arrays of shape (C,) in neutral terms; gamma and beta may be missing.
    tensors:   where a stored tensor is the field itself, field -> Tensor; lets a listing skip numpy.
    kernel:    the weights that feed the layer, where known.
    inputs:    names of the BatchNorm layers whose outputs reach this one with no BatchNorm between; None: no graph known.
    notes:     what a user should know about this layer ("training mode", "epsilon of a traced graph", ...).
    question:  what to ask the user where the source holds epsilons and does not say which is the layer's; "" where it
               does, or holds none. Such a layer has no record.
    without:   why the source stores no mean and variance for this layer; "" where it does. Such a layer has no record.
    own_code:  whether a live layer runs code that is its user's own: its numbers may not be all of what it computes, and
               convert runs it to see. The code of a layer in a file is never run.
    untrained: whether the source itself says that the layer never saw a batch. `notes` say so too, as of `own_code`.
    """

    __slots__ = (
        "_record", "assumed", "channels", "dtype", "epsilon", "inputs", "kernel", "load", "momentum", "name", "notes",
        "own_code", "question", "stores", "tensors", "untrained", "without",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        channels: int,
        epsilon: float,
        load: Callable[[], Mapping[str, Array]],
        momentum: float | None = None,
        stores: Iterable[str] = FIELDS,
        assumed: Iterable[str] = (),
        dtype: str = "float32",
        tensors: Mapping[str, StoredTensor] | None = None,
        kernel: Kernel | None = None,
        inputs: tuple[str, ...] | None = None,
        notes: Iterable[str] = (),
        question: str = "",
        without: str = "",
        own_code: bool = False,
        untrained: bool = False,
    ) -> None:
        self.name = name
        self.channels = channels
        try:
            self.epsilon = checked_epsilon(epsilon)
        except InvalidValue as error:
            raise InvalidValue(f"{printable(name)}: {error}") from None
        self.load = load
        self.momentum = momentum
        self.stores = _one(stores)
        self.assumed = _one(assumed)
        self.dtype = dtype
        self.tensors = tensors
        self.kernel = kernel
        self.inputs = inputs
        self.notes = tuple(notes)
        if dtype == "float64" and self.epsilon != epsilon:
            self.notes += (
                f"epsilon {float(epsilon)!r} is taken for {self.epsilon!r};"
                " an engine that computes in float64 tells them apart, by up to 3e-8 of the output",
            )
        self.question = question
        self.without = without
        self.own_code = own_code
        self.untrained = untrained
        self._record: BatchNorm | None = None

    def arrays(self) -> dict[str, Array]:
        """The stored numbers in neutral terms, not validated: what `show` looks at when they are broken."""
        return dict(self.load())

    @property
    def record(self) -> BatchNorm:
        """The validated record; read at the first call, then kept.

        Raises InvalidValue that names the layer, Question where its epsilon has to be asked for.
        """
        if self._record is not None:
            return self._record
        if self.question:
            raise Question(f"{printable(self.name)}: {self.question}")
        if self.without:
            raise InvalidValue(f"{printable(self.name)}: {self.without}")
        try:
            record = BatchNorm(**self.load(), epsilon=self.epsilon)
        except InvalidValue as error:
            raise InvalidValue(f"{printable(self.name)}: {error}") from None
        if record.channels != self.channels:
            raise InvalidValue(f"{printable(self.name)}: {self.channels} channels expected, {record.channels} read")
        self._record = record
        return record

    def but(self, **changes: object) -> Layer:
        """A copy with some attributes changed (`epsilon`, `assumed`, `name`, ...); numbers are not read."""
        values = {slot: getattr(self, slot) for slot in Layer.__slots__ if not slot.startswith("_")}
        return Layer(**{**values, **changes})

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.channels} channels, epsilon={self.epsilon!r})"


_SETS: dict[frozenset[str], frozenset[str]] = {}


def _one(names: Iterable[str]) -> frozenset[str]:
    """A set, the same object for equal ones: the layers of a network have equal ones, and each takes 216 bytes."""
    made = frozenset(names)
    return _SETS.setdefault(made, made)


class Layers(dict[str, Layer]):
    """The BatchNorm layers of one source by name, in the source's own order, and what there is to say of the whole.

    source: a path or a description of the live object, for messages.
    format: the adapter's name ("torch", "keras", ...).
    notes:  what a user should know about the source as a whole.
    ordered: whether their order is the source's own, of definition or of execution; False where a file is sorted by name.
    files:  paths of the other files that belong to it (the parts of a set, external data); no output may replace one.
    read_only: why the file cannot be written to, as a target; "" where it can.
    opened: what the adapter holds of the file, so that its `write` and `patches` need not open it again; else None.

    Raises FormatError for more than CHANNELS in all: any number of layers of a small file may name one array of it.
    """

    def __init__(
        self,
        layers: Iterable[Layer] = (),
        *,
        source: str,
        format: str,
        notes: Iterable[str] = (),
        ordered: bool = True,
        files: Iterable[str] = (),
    ) -> None:
        super().__init__((layer.name, layer) for layer in layers)
        total = sum(layer.channels for layer in self.values())
        if total > CHANNELS:
            raise FormatError(
                f"{printable(source)}: {total} channels in {len(self)} layers; at most {CHANNELS} are read"
            )
        self.source = source
        self.format = format
        self.notes = tuple(notes)
        self.ordered = ordered
        self.files = tuple(files)
        self.read_only = ""
        self.opened: object = None

    def but(self, layers: Iterable[Layer], *, notes: Iterable[str] = ()) -> Layers:
        """The same source with other layers, and more notes; what is held of the file is not taken along."""
        return Layers(
            layers,
            source=self.source,
            format=self.format,
            notes=(*self.notes, *notes),
            ordered=self.ordered,
            files=self.files,
        )


class Change(NamedTuple):
    """What to write into one target layer: exactly the named fields, nothing else.

    record: the final values, already fitted and rounded to the target's dtype.
    fields: of gamma, beta, mean, variance, epsilon, momentum.
    momentum: the fraction of the old value kept, if "momentum" is in `fields`.
    """

    record: BatchNorm
    fields: frozenset[str]
    momentum: float | None = None
