"""The numbers of one HDF5 dataset: its layout held against the file, its chunks unpacked with a limit."""

from __future__ import annotations

import functools
import math

from bnport._lazy import TYPE_CHECKING, np
from bnport.containers.tensor import ITEM_SIZE, Tensor
from bnport.errors import BnportError, printable

if TYPE_CHECKING:
    from typing import Any

    from bnport.containers.hdf5 import H5

CHUNKED_LIMIT = 256 << 20  # bytes of one chunked array once unpacked
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3

# what h5py and the library raise on a damaged file, depending on where it is damaged
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, UnicodeError, SystemError)


class H5Tensor(Tensor):
    """A Tensor of an HDF5 file. `offset`: where its plain little-endian bytes begin in the file, or None if they do not
    lie there in one piece (chunked, compressed, big-endian, in the header)."""

    __slots__ = ("offset",)

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], read: Any, offset: int | None) -> None:
        super().__init__(name, dtype, shape, read)
        self.offset = offset


def tensor_of(h5: H5, dataset: Any, path: str) -> H5Tensor:
    """A dataset as a tensor: its layout, type and size held against the file before anything is read."""
    import h5py

    try:
        dtype, swapped = _dtype(h5, dataset, path)
        shape = tuple(map(int, dataset.shape))
        nbytes = math.prod(shape) * ITEM_SIZE[dtype]
        layout, offset = h5py.h5d.CONTIGUOUS, dataset.get_offset()  # no more is asked of it where there is one
        if offset is None:  # chunked, in the header, in other files, or nothing is stored
            layout = _other_layout(h5, dataset, path, shape, nbytes)
        elif not nbytes:
            offset = None
        elif dataset.get_storage_size() != nbytes or offset + nbytes > h5.size:
            h5.refuse(path, f"shape {shape} needs {nbytes} bytes, which are not in the file")
        else:
            offset += h5.start
    except BnportError:
        raise
    except DAMAGE as error:
        h5.refuse(path, f"damaged ({reason(error)})")

    if offset is not None and not swapped:
        at = offset

        def read() -> bytes:
            return h5.file.pread(at, nbytes, path)
    else:

        def read() -> bytes:
            return _unpacked(h5, dataset, path, layout, offset, shape, ITEM_SIZE[dtype], swapped)

    return H5Tensor(path, dtype, shape, read, None if swapped else offset)


def _other_layout(h5: H5, dataset: Any, path: str, shape: tuple[int, ...], nbytes: int) -> int:
    """The layout of a dataset whose numbers do not lie in the file in one piece, held against the file."""
    import h5py

    plan = dataset.get_create_plist()
    layout: int = plan.get_layout()
    if plan.get_external_count():
        h5.refuse(path, "keeps its numbers in another file (external storage); bnport does not open it")
    if layout == h5py.h5d.VIRTUAL:
        h5.refuse(path, "keeps its numbers in other files (a virtual dataset); bnport does not open them")
    if layout == h5py.h5d.CHUNKED:
        filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
        if unknown := set(filters) - {_DEFLATE, _SHUFFLE, _FLETCHER32}:
            h5.refuse(path, f"is packed by a filter that is not read ({unknown}); rewrite it (h5repack -f NONE)")
        stored = int(dataset.get_storage_size())
        most = stored * 1032 if _DEFLATE in filters else stored
        if nbytes > most or nbytes > CHUNKED_LIMIT:
            h5.refuse(path, f"shape {shape} needs {nbytes} bytes, {stored} are stored")
    elif nbytes and (layout == h5py.h5d.CONTIGUOUS or nbytes > h5.size):
        h5.refuse(path, f"shape {shape} needs {nbytes} bytes, which are not in the file")
    return layout


def _dtype(h5: H5, dataset: Any, path: str) -> tuple[str, bool]:
    """(key of ITEM_SIZE, whether it is big-endian)."""
    import h5py

    h5t = h5py.h5t
    kind = dataset.get_type()
    if kind.equal(h5t.IEEE_F32LE):  # most are
        return "float32", False
    group, size = kind.get_class(), kind.get_size()
    if group == h5t.FLOAT:
        name = {2: "float16", 4: "float32", 8: "float64"}.get(size)
        for order in ("LE", "BE"):
            if name and kind.equal(getattr(h5t, f"IEEE_F{size * 8}{order}")):
                return name, order == "BE"
    elif group == h5t.INTEGER and size in (1, 2, 4, 8):
        sign = "" if kind.get_sign() == h5t.SGN_2 else "u"
        for order in ("LE", "BE"):
            if kind.equal(getattr(h5t, f"STD_{'U' if sign else 'I'}{size * 8}{order}")):
                return f"{sign}int{size * 8}", order == "BE"
    elif group == h5t.OPAQUE and size == 2:
        return "bfloat16", False  # as ml_dtypes' bfloat16 is written by h5py: |V2
    elif group == h5t.ENUM and size == 1:
        return "bool", False
    what = {h5t.STRING: "text", h5t.COMPOUND: "a compound (complex?) type", h5t.REFERENCE: "references"}
    return h5.refuse(path, f"holds {what.get(group, f'type {group} of {size} bytes')}, not plain real numbers")


def _unpacked(
    h5: H5, dataset: Any, path: str, layout: int, offset: int | None, shape: tuple[int, ...], item: int, swapped: bool
) -> bytes:
    """The bytes of a dataset that does not lie in the file as plain little-endian numbers in one piece."""
    import h5py

    try:
        raw = np.dtype(f"V{item}")
        if not math.prod(shape):
            return b""
        if offset is not None:
            values = np.frombuffer(h5.file.pread(offset, math.prod(shape) * item, path), raw)
        elif layout == h5py.h5d.CHUNKED:
            values = _chunks(h5, dataset, path, shape, raw)
        else:  # compact: at most 64 KiB, in the object's header
            native = np.empty(shape, dataset.dtype)
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, native)
            values = native.view(raw) if native.ndim else native.reshape(1).view(raw)
        if swapped:
            values = np.ascontiguousarray(values).view(f"u{item}").byteswap()
        return values.tobytes()
    except BnportError:
        raise
    except DAMAGE as error:
        h5.refuse(path, f"cannot be read ({reason(error)})")


def _chunks(h5: H5, dataset: Any, path: str, shape: tuple[int, ...], raw: Any) -> Any:
    import h5py

    plan = dataset.get_create_plist()
    chunk = tuple(int(length) for length in plan.get_chunk())
    filters = [plan.get_filter(i) for i in range(plan.get_nfilters())]
    size = math.prod(chunk) * raw.itemsize
    if size > CHUNKED_LIMIT:
        h5.refuse(path, f"has chunks of {size} bytes, more than is read")
    values, expected = np.zeros(shape, raw), math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    if dataset.get_num_chunks() != expected:
        h5.refuse(path, f"{expected} chunks expected, {dataset.get_num_chunks()} are stored")
    block = h5py.h5i.get_file_id(dataset).get_create_plist().get_userblock()
    base = h5.start + (block if block and not _offsets_count_the_user_block() else 0)
    for index in range(expected):
        info = dataset.get_chunk_info(index)
        data = h5.file.pread(base + info.byte_offset, info.size, path)
        for position, (code, *_) in reversed(list(enumerate(filters))):
            if not info.filter_mask >> position & 1:
                data = _undone(h5, path, code, data, size, raw.itemsize)
        if len(data) != size:
            h5.refuse(path, f"chunk {index} holds {len(data)} bytes, {size} expected")
        piece = np.frombuffer(data, raw).reshape(chunk)
        where = tuple(slice(o, min(o + c, n)) for o, c, n in zip(info.chunk_offset, chunk, shape, strict=True))
        values[where] = piece[tuple(slice(0, s.stop - s.start) for s in where)]
    return values


@functools.cache
def _offsets_count_the_user_block() -> bool:
    """Whether this HDF5 counts the offset of a chunk from the beginning of the file: 1.14.2 leaves the user block out."""
    import io

    import h5py

    file, values = io.BytesIO(), np.arange(1.0, 9.0)
    with h5py.File(file, "w", userblock_size=512) as made:
        offset = made.create_dataset("x", data=values, chunks=values.shape).id.get_chunk_info(0).byte_offset
    return file.getvalue()[offset : offset + values.nbytes] == values.tobytes()


def _undone(h5: H5, path: str, code: int, data: bytes, size: int, item: int) -> bytes:
    """One filter of a chunk undone; no more than `size` bytes (and a checksum) ever come out of it."""
    if code == _FLETCHER32:
        return data[:-4]  # h5py checks it when it reads; a wrong number is caught by our own checks of values
    if code == _SHUFFLE:
        return np.frombuffer(data, np.uint8).reshape(item, -1).T.tobytes() if len(data) % item == 0 else data
    import zlib

    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, size + 5)
    except zlib.error as error:
        h5.refuse(path, f"cannot be inflated ({error})")
    if len(plain) > size + 4:
        h5.refuse(path, f"inflates to more than the {size} bytes of a chunk")
    return plain


def reason(error: BaseException) -> str:
    """The library's words on one line, short."""
    return printable(error, 120) or type(error).__name__
