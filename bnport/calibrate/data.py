"""Data of every kind as one thing: batches of model inputs, checked, targets left out.

`read(data, ...)` gives `Batches`. Iterating over it yields, for every batch, what the model is called with:

    ndarray (N, ...)                     one input
    list of ndarray, each (N, ...)       several inputs, in the model's order
    dict of name -> ndarray (N, ...)     several inputs by name
    any structure of these               what came by name, for a model that was built with that structure

N may differ from batch to batch (the last one is usually smaller); weight by it. Empty batches are left out.

    ours                       theirs
    ndarray, .npy              rows along the first axis, `batch_size` at a time; a file is never read whole
    .npz                       its one array, or the arrays named like the model's inputs, or `key`; else a Question
    folder of .npy files       the files in the order of their names, as one long array
    folder of images           `images(path)`, which the caller brings: an iterable of batches
    dict of arrays             several inputs by name; list of arrays: in order; tuple of arrays: (x, y) or (x, y, weights);
                               dicts and lists within these: as the model was built
    tf.data.Dataset            must be batched and end; a tuple is (x, y) or (x, y, weights)
    torch DataLoader           the same, and its lists are tuples (default_collate makes lists)
    keras PyDataset, Sequence  items 0 ... len - 1, in that order
    generator, any iterable    batches as above; can be read once. Each is copied: it may come in one buffer every time
    a function                 called for a new iterable each time: a generator that can be read again

Within a batch a tuple is (x, y[, weights]) and only x is kept, as in keras.Model.fit; a list is several inputs.

Refused with InvalidValue that names the batch: no data, fewer than `minimum` samples, NaN or infinity, dtypes that are
not numbers, a structure or shape that is not the model's or changes on the way, inputs of different lengths.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.calibrate.folder import ImageFolder, first_image
from bnport.calibrate.inputs import Inputs
from bnport.calibrate.sources import mapped, of_arrays, of_batches, of_path, to_numpy
from bnport.errors import InvalidValue, NotFound, Question, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, TypeAlias

    from bnport.calibrate.inputs import Shape
    from bnport.calibrate.sources import Source
    from bnport.record import Array

    Batch: TypeAlias = Array | list[Array] | dict[str, Array]


class Batches:
    """Batches of model inputs (see the module); made by `read`.

    name:        what to call the data in a message.
    samples:     how many there are, or None if only reading tells.
    length:      number of batches, or None.
    repeatable:  whether it can be iterated over more than once.
    by_position: whether batch k is read from files by its number, so that it is the same in every run while they are.
    fingerprint: of such files: changes when they do (names, sizes, times); else None.
    limit:       stop after so many samples, or None.
    bytes:       whether it is an array of uint8 that looks like images.
    notes:       what a report should say about them (samples that a loader drops, a random order, keys left out).
    """

    __slots__ = (
        "_make",
        "_settings",
        "_size",
        "_started",
        "_stored",
        "by_position",
        "bytes",
        "kept",
        "length",
        "limit",
        "name",
        "notes",
        "repeatable",
        "samples",
    )

    def __init__(self, source: Source, settings: _Settings) -> None:
        self._make, self._settings, self._started, self._size = source.make, settings, False, source.batch_size
        self.name, self.repeatable, self.kept = source.name, source.repeatable, source.kept
        self.bytes = source.bytes
        self._stored, self.by_position = source.fingerprint, source.fingerprint is not None
        self.samples, self.length, self.notes = source.samples, source.length, list(source.notes)
        self.limit = limit = settings.limit
        if limit is not None and self.samples is not None and limit < self.samples:
            if self.length is not None and source.batch_size:
                self.length = -(-limit // source.batch_size)
            self.samples = limit

    @property
    def fingerprint(self) -> str | None:
        """See the class; the files are looked at now."""
        return None if self._stored is None else self._stored()

    def about(self) -> tuple[object, ...]:
        """What a resumed run must find again before it reads anything."""
        return (self.fingerprint, self.samples, self.length, self._size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, skip: int = 0) -> Iterator[Batch]:
        """The batches from number `skip` on: what a resumed run needs. Skipped ones are not read where that is possible."""
        if self._started and not self.repeatable:
            raise InvalidValue(f"{self.name}: can be read only once; pass a function that returns it anew")
        self._started = True
        return self._checked(skip)

    def _checked(self, skip: int) -> Iterator[Batch]:
        seen, limit, check = 0, self._settings.limit, _Check(self.name, self._settings, self.notes)
        start = skip
        if limit is not None and skip:  # the limit counts from the first sample, also of those that are passed over
            seen, start = (skip * self._size, skip) if self._size else (0, 0)
        for number, item in enumerate(self._make(start) if limit is None or seen < limit else (), start):
            batch, count = check(item, number, copy=not self.kept)
            if limit is not None and seen + count > limit:
                count = limit - seen
                batch = mapped(batch, lambda array: array[:count])  # noqa: B023
            if count:
                seen += count
                if number >= skip:
                    yield batch if check.inputs is None else check.inputs.packed(batch)
            if seen == limit:
                break
        least = max(1, self._settings.minimum)
        if seen < least and not skip:
            have = f"{seen} sample{'s' * (seen != 1)}" if seen else "no samples at all"
            raise InvalidValue(f"{self.name}: {have}, at least {least} needed")

    def __repr__(self) -> str:
        return f"Batches({self.name}, {'?' if self.samples is None else self.samples} samples)"


class _Settings(NamedTuple):
    inputs: Inputs | None
    minimum: int
    limit: int | None


def read(
    data: Any,
    *,
    inputs: Mapping[str, Shape] | None = None,
    batch_size: int | None = None,
    key: str | None = None,
    minimum: int = 1,
    limit: int | None = None,
    images: Callable[[str], Any] | None = None,
) -> Batches:
    """`data` (see the module) as checked batches. Nothing is read yet except headers.

    inputs:     the model's, an Inputs, or only name -> shape with None for what is free, (None, 224, 224, 3); None: any
                structure.
    batch_size: rows per batch for arrays and array files (default 32); refused for data that come in batches already.
    key:        the array of an `.npz` with several.
    minimum:    fewer samples are refused, at the end of an iteration.
    limit:      stop after so many samples, in the middle of a batch if need be.
    images:     opens a folder of images; gets the path, returns data of any kind above.

    Raises InvalidValue, NotFound, FormatError for damaged files, Question where an `.npz` or a list can mean two things.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("minimum", minimum, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least):
            raise InvalidValue(f"{name}: expected a whole number, {least} or more, got {printable(repr(value), 60)}")
    if isinstance(data, Batches):
        return data
    if inputs is not None and not isinstance(inputs, Inputs):
        inputs = Inputs(inputs)
    settings = _Settings(inputs, minimum, limit)
    path = os.fspath(data) if isinstance(data, str | os.PathLike) else ""
    if key is not None and not (path.lower().endswith(".npz") and not os.path.isdir(path)):
        raise InvalidValue(f"key {printable(key)!r}: names an array of an .npz file, which the data are not")
    if os.path.isdir(path):
        if not any(name.endswith(".npy") for name in os.listdir(path)):
            return _of_images(path, images, settings)
        if (image := first_image(path)) is not None:
            raise Question(
                f"{printable(path)}: holds .npy files, and images ({printable(image)}); name a folder that holds one kind"
            )
    if path:
        return Batches(of_path(path, inputs, batch_size, key), settings)
    source = of_arrays(data, inputs, batch_size)
    if source is None:
        if batch_size is not None:
            raise InvalidValue(
                f"batch_size {batch_size}: the data come in batches already; set their size where they are made"
            )
        source = of_batches(data, endless=limit is not None)
    return Batches(source, settings)


def _of_images(path: str, images: Callable[[str], Any] | None, settings: _Settings) -> Batches:
    if images is None:
        raise NotFound(f"{printable(path)}: a folder without .npy files, and nothing here opens images")
    opened = images(path)
    source = of_arrays(opened, settings.inputs, None) or of_batches(opened, endless=settings.limit is not None)
    source = source._replace(name=printable(path))
    if isinstance(opened, ImageFolder):  # makes a new array each time
        source = source._replace(
            samples=len(opened.files), batch_size=opened.batch_size, fingerprint=opened.fingerprint, kept=True
        )
    return Batches(source, settings)


# Checking one batch.


class _Check:
    """Turns what a source yields into a Batch, held against the model's inputs and the first batch."""

    def __init__(self, name: str, settings: _Settings, notes: list[str]) -> None:
        self.name, self.inputs, self.notes = name, settings.inputs, notes
        self.first: list[tuple[str, int]] | None = None  # (input, rank) of the first batch

    def __call__(self, item: Any, number: int, copy: bool = False) -> tuple[Any, int]:
        """(the batch, how many samples); a `copy` stays what it is when its maker fills its buffer anew."""
        where = f"{self.name}, batch {number}"
        if isinstance(item, tuple):
            if not item:
                raise InvalidValue(f"{where}: is empty, ()")
            item = item[0]
        if isinstance(item, tuple):
            item = list(item)  # ((a, b), y): several inputs
        if self.inputs is not None:
            item = self.inputs.flat(item) or item
        batch = self._fitted(mapped(item, to_numpy), where)
        if copy:
            batch = mapped(batch, np.array)
        named = self._named(batch)
        for name, array in named.items():
            self._check_array(array, f"{where}{f', input {printable(name)!r}' if name else ''}")
        lengths = {array.shape[0] for array in named.values()}
        if len(lengths) != 1:
            shapes = ", ".join(str(array.shape) for array in named.values())
            raise InvalidValue(f"{where}: inputs of different lengths: {shapes}")
        structure = [(name, array.ndim) for name, array in named.items()]
        if self.first is None:
            self.first = structure
        elif structure != self.first:
            raise InvalidValue(f"{where}: inputs and ranks {structure}, the first batch had {self.first}")
        self._check_shapes(named, where)
        return batch, lengths.pop()

    def _fitted(self, batch: Any, where: str) -> Any:
        """The inputs of the model out of what came, as single array, list or dict."""
        if isinstance(batch, dict | list) and not batch:
            raise InvalidValue(f"{where}: is empty, {batch!r}")
        if self.inputs is None:
            return batch
        wanted = list(self.inputs)
        if isinstance(batch, dict):
            names = self.inputs.names_in(batch)
            if names is None:
                raise InvalidValue(f"{where}: has the inputs {listed(batch)}; the model takes {self.inputs.shown}")
            extra = [name for name in batch if name not in names]
            note = f"left out, not inputs of the model: {listed(extra)}"
            if extra and note not in self.notes:
                self.notes.append(note)
            chosen = {name: batch[there] for name, there in zip(wanted, names, strict=True)}
            return chosen if len(chosen) > 1 else chosen[wanted[0]]
        count = len(batch) if isinstance(batch, list) else 1
        if count != len(wanted):
            hint = "; if the second is the target, yield a tuple (x, y)" if len(wanted) == 1 and count <= 3 else ""
            raise InvalidValue(
                f"{where}: {count} array{'s' * (count > 1)}, the model takes {len(wanted)} ({listed(wanted)}){hint}"
            )
        if count > 1 and not self.inputs.in_order:
            raise InvalidValue(
                f"{where}: a list, and the model takes its inputs by name: pass a dict of {listed(wanted)}"
            )
        return batch[0] if isinstance(batch, list) and count == 1 else batch

    def _named(self, batch: Any) -> dict[str, Array]:
        if isinstance(batch, dict):
            return batch
        values = batch if isinstance(batch, list) else [batch]
        names = (
            list(self.inputs)
            if self.inputs is not None
            else [str(k) if len(values) > 1 else "" for k in range(len(values))]
        )
        return dict(zip(names, values, strict=True))

    @staticmethod
    def _check_array(array: Array, where: str) -> None:
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise InvalidValue(f"{where}: expected numbers, got dtype {array.dtype}")
        if not array.ndim:
            raise InvalidValue(f"{where}: a single number; expected (samples, ...)")
        if array.dtype.kind not in "iub":
            with np.errstate(over="ignore", invalid="ignore"):
                total = array.sum(dtype=np.float64 if array.dtype.itemsize < 4 else None)
            if not np.isfinite(total):  # rare: then look again, a sum may overflow
                bad = ~np.isfinite(array.astype(np.float32) if array.dtype.kind != "f" else array)
                if bad.any():
                    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
                    raise InvalidValue(
                        f"{where}: sample {at[0]} holds {array[at]} at {at[1:]} ({int(bad.sum())} such values)"
                    )

    def _check_shapes(self, named: Mapping[str, Array], where: str) -> None:
        for name, expected in (self.inputs or {}).items():
            shape = named[name].shape
            if _fits(shape, expected):
                continue
            hint = ""
            if len(shape) == len(expected) - 1 and _fits((1, *shape), expected):
                hint = "; these are single samples: put them into batches first"
            elif len(shape) > 2 and _fits((shape[0], *shape[2:], shape[1]), expected):
                hint = "; the data are channels-first, the model is channels-last: transpose them"
            elif len(shape) > 2 and _fits((shape[0], shape[-1], *shape[1:-1]), expected):
                hint = "; the data are channels-last, the model is channels-first: transpose them"
            raise InvalidValue(
                f"{where}: shape {shape} for input {printable(name)!r}, the model takes {_shown(expected)}{hint}"
            )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        e is None or e == s for s, e in zip(shape[1:], expected[1:], strict=True)
    )


def _shown(expected: Iterable[int | None]) -> str:
    return "(" + ", ".join("any" if k is None else str(k) for k in expected) + ")"
