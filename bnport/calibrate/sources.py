"""What data are made of: one `Source` per kind of object, which yields raw batches from any batch number on."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.errors import FormatError, InvalidValue, NotFound, Question, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from bnport.calibrate.inputs import Inputs
    from bnport.record import Array

BATCH_SIZE = 32


class Source(NamedTuple):
    """Raw batches and what is known about them; the fields as in Batches."""

    name: str
    make: Callable[[int], Iterator[Any]]  # the items from batch number k on
    repeatable: bool = True
    samples: int | None = None
    length: int | None = None
    fingerprint: Callable[[], str] | None = None  # of files, whose batch k is the same in every run
    notes: tuple[str, ...] = ()
    batch_size: int | None = None
    bytes: bool = False  # rows of uint8 with more than one axis each: pixels, most likely
    kept: bool = False  # nobody writes into a batch once it was given; a generator may fill one buffer again and again


def to_numpy(value: Any) -> Array:
    """A tensor of any framework as a numpy array in the machine's byte order (torch takes no other); 16-bit floats that
    numpy does not have widen to float32.

    Raises InvalidValue for a masked array: numpy would hand out what the mask hides.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidValue(
            "a masked array as data: what its mask hides would be counted; pass x.filled(value), or the rows that count"
        )
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):
            value = value.float()
        value = value.numpy()
    try:
        array: Array = np.asarray(value)
    except ValueError:  # a list of rows of several lengths
        array = np.array(None)
    if array.dtype == object and not isinstance(value, np.ndarray):
        raise InvalidValue(
            f"a {printable(type(value).__name__)} as data, where a dense array of numbers is expected: bring ragged and sparse"
            " tensors to dense ones, and inputs within inputs to a dict or list of arrays"
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of every array of a batch."""
    if isinstance(batch, dict):
        return {name: function(value) for name, value in batch.items()}
    return [function(value) for value in batch] if isinstance(batch, list) else function(batch)


# Arrays and files of arrays.


def _rows_source(
    arrays: Any,
    name: str,
    batch_size: int | None,
    fingerprint: Callable[[], str] | None = None,
    notes: tuple[str, ...] = (),
) -> Source:
    """Rows of one array-like, or of a list or dict of them."""
    flat = list(arrays.values()) if isinstance(arrays, dict) else arrays if isinstance(arrays, list) else [arrays]
    for array in flat:
        if not array.shape:
            raise InvalidValue(f"{name}: a single number, not rows of data")
    lengths = {array.shape[0] for array in flat}
    if len(lengths) != 1:
        raise InvalidValue(f"{name}: arrays of different lengths: {', '.join(str(a.shape) for a in flat)}")
    samples, size = lengths.pop(), batch_size or BATCH_SIZE

    def make(skip: int) -> Iterator[Any]:
        for start in range(skip * size, samples, size):
            yield mapped(arrays, lambda array: array[start : start + size])  # noqa: B023

    raw = any("uint8" in str(array.dtype) and len(array.shape) > 2 for array in flat)
    return Source(name, make, True, samples, -(-samples // size), fingerprint, notes, size, raw, True)


def of_path(path: str, inputs: Inputs | None, batch_size: int | None, key: str | None) -> Source:
    """A source for an .npy or .npz file, or a folder of .npy files."""
    from bnport.calibrate import arrays

    shown = printable(path)
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".npy"))
        files = [os.path.join(path, name) for name in names]
        whole = _Concatenated([arrays.npy(file) for file in files], shown)
        others = len(os.listdir(path)) - len(names)
        notes = (
            (f"{len(names)} .npy files in {shown}, one after the other; {others} others left out",) if others else ()
        )
        return _rows_source(whole, shown, batch_size, lambda: " ".join(map(arrays.fingerprint, files)), notes)
    rows = rows_of_file(path, key, inputs)
    return _rows_source(rows, shown, batch_size, lambda: f"{arrays.fingerprint(path)} {key}")


def rows_of_file(path: str, key: str | None = None, inputs: Inputs | None = None) -> Any:
    """The rows of an .npy file; of an .npz its one array, `key`, or a dict of those that are named like `inputs`.

    Only what is returned is opened: labels as text, or single numbers, beside it are no obstacle.
    """
    from bnport.calibrate import arrays

    shown = printable(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".npy":
        return arrays.npy(path)
    if suffix != ".npz":
        if not os.path.exists(path):
            raise NotFound(f"{shown}: no such file or folder")
        raise FormatError(
            f"{shown}: not data that bnport reads; it reads .npy, .npz and folders of images or .npy files"
        )
    found = arrays.npz(path)
    if key is not None:
        if key not in found:
            raise NotFound(f"{shown}: holds no array {printable(key)!r}; it holds {listed(found)}")
        return found[key]
    if len(found) == 1:
        return found[next(iter(found))]
    if inputs and (names := inputs.names_in(found)):
        return {name: found[there] for name, there in zip(inputs, names, strict=True)}
    if inputs and len(inputs) > 1:
        raise InvalidValue(f"{shown}: holds the arrays {listed(found)}; the model takes {listed(inputs)}")
    raise Question(f"{shown}: holds {len(found)} arrays ({listed(found)}); name the input data with --key")


class _Concatenated:
    """Arrays of one row shape, one after the other, as one."""

    def __init__(self, parts: list[Any], name: str) -> None:
        self.parts, self.starts = parts, [0, *itertools.accumulate(part.shape[0] for part in parts)]
        for part in parts:
            if part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
                raise InvalidValue(
                    f"{name}: rows of {parts[0].shape[1:]} {parts[0].dtype} in one file, of {part.shape[1:]}"
                    f" {part.dtype} in another"
                )
        self.shape, self.dtype = (self.starts[-1], *parts[0].shape[1:]), parts[0].dtype

    def __getitem__(self, where: slice) -> Array:
        start, stop, _ = where.indices(self.shape[0])
        found = [
            part[max(0, start - first) : stop - first]
            for part, first in zip(self.parts, self.starts, strict=False)
            if start < first + part.shape[0] and first < stop
        ]
        return found[0] if len(found) == 1 else np.concatenate(found or [self.parts[0][:0]])


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def of_arrays(data: Any, inputs: Inputs | None, batch_size: int | None) -> Source | None:
    """A source for arrays and tensors, alone or together; None if `data` is not that."""
    if inputs is not None and isinstance(data, dict | list):
        data = inputs.flat(data) or data
    if hasattr(data, "iloc") or type(data).__module__.split(".")[0] == "polars":  # indexing these gives columns
        raise InvalidValue(f"a {printable(type(data).__name__)} as data: pass its numbers, data.to_numpy()")
    if _is_array(data):
        return _rows_source(_sliceable(data), f"the array {tuple(data.shape)}", batch_size)
    if isinstance(data, dict):
        if not data:
            raise InvalidValue("a dict as data: it is empty; expected input name -> array")
        if not all(_is_array(value) for value in data.values()):
            raise InvalidValue(f"a dict as data: expected input name -> array, got the keys {listed(data)}")
        return _rows_source({k: _sliceable(v) for k, v in data.items()}, "the dict of arrays", batch_size)
    if isinstance(data, tuple) and data and _is_array(data[0]):
        return of_arrays(data[0], inputs, batch_size)
    if isinstance(data, tuple) and data and isinstance(data[0], list | dict):
        x = data[0]
        if inputs is None and isinstance(x, list) and x and all(_is_array(value) for value in x):
            return _rows_source([_sliceable(value) for value in x], "the list of arrays", batch_size)
        return of_arrays(x, inputs, batch_size)
    if isinstance(data, list) and data and all(_is_array(value) for value in data):
        if len({value.shape[:1] for value in data}) == 1 and (inputs is not None and len(inputs) == len(data)):
            return _rows_source([_sliceable(value) for value in data], "the list of arrays", batch_size)
        if inputs is None:
            raise Question(
                f"a list of {len(data)} arrays: batches, or inputs of this model, whose number is not known? For batches pass"
                " iter(list), for inputs a tuple (list, None), as (x, y)"
            )
        raise Question(
            f"a list of {len(data)} arrays: as inputs they must be as many as the model's and of one length; the model takes"
            f" {len(inputs)}. For batches pass iter(list), for inputs by name a dict"
        )
    if isinstance(data, list):
        raise InvalidValue("a list as data: expected arrays; for batches pass iter(list)")
    return None


def _sliceable(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else _Tensor(value)


class _Tensor:
    """A framework's tensor, turned into numpy a slice at a time."""

    def __init__(self, value: Any) -> None:
        if None in tuple(value.shape):
            raise InvalidValue(
                f"a {printable(type(value).__name__)} of the shape {tuple(value.shape)} as data: its rows are not of one"
                " length; pad them, or yield batches that are each of one shape"
            )
        self.value, self.shape, self.dtype = value, tuple(int(k) for k in value.shape), value.dtype

    def __getitem__(self, where: slice) -> Array:
        return to_numpy(self.value[where])


# Things that yield batches.


def _module(data: object) -> set[str]:
    return {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(data).__mro__}


def of_batches(data: Any, endless: bool = False) -> Source:
    """A source for whatever yields batches; one that never ends only if `endless` is allowed."""
    kinds = _module(data)
    kind = type(data).__name__
    if "tensorflow.DatasetV2" in kinds:
        cardinality = int(data.cardinality().numpy())
        if cardinality == -1 and not endless:
            raise InvalidValue(
                "the tf.data dataset never ends (repeat without a count); end it with take(n), or set a limit"
            )
        return Source(
            "the tf.data dataset", lambda k: iter(data.skip(k) if k else data), True, None, max(0, cardinality) or None
        )
    if "torch.DataLoader" in kinds:
        return _of_data_loader(data)
    if kinds & {"keras.PyDataset", "tf_keras.Sequence", "keras.Sequence"} or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        count = _count(data)
        if count is None:
            raise InvalidValue(f"the {kind} has no length, so where it ends is not known; give __len__ a number")
        return Source(f"the {kind}", lambda k: (data[i] for i in range(k, count)), True, None, count)
    if callable(data):
        return Source(f"the batches of {kind}", lambda k: itertools.islice(iter(data()), k, None), True)
    if not hasattr(data, "__iter__"):
        raise InvalidValue(
            f"a {printable(kind)} is not data: expected arrays, a path, or something that yields batches"
        )
    return Source(
        f"the {kind}", lambda k: itertools.islice(iter(data), k, None), iter(data) is not data, None, _count(data)
    )


def _of_data_loader(data: Any) -> Source:
    notes = []
    length, samples = _count(data), None
    if getattr(data, "drop_last", False):
        notes.append(
            "the DataLoader drops the last, smaller batch (drop_last=True): those samples are not in the statistics"
        )
    elif length is not None and getattr(data, "batch_sampler", None) is not None:
        samples = _count(data.sampler)
    if type(getattr(data, "sampler", None)).__name__ == "RandomSampler":
        notes.append("the DataLoader shuffles: repeated runs differ in the last bits")

    def make(skip: int) -> Iterator[Any]:
        for item in itertools.islice(iter(data), skip, None):
            yield tuple(item) if isinstance(item, list) else item

    return Source("the DataLoader", make, True, samples, length, None, tuple(notes), getattr(data, "batch_size", None))


def _count(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, ValueError, OverflowError, NotImplementedError):  # no __len__, None, or infinite
        return None
