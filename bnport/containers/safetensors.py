"""safetensors: an 8-byte length, a JSON header with every tensor's dtype, shape and position, then the bytes.

Layout as documented at https://github.com/huggingface/safetensors#format: a little-endian u64 N, N bytes of JSON
starting with "{", then one buffer that the tensors' `data_offsets` must cover without hole or overlap.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, NamedTuple
from bnport.containers.files import ReadFile
from bnport.containers.tensor import ITEM_SIZE, FileTensor, Tensor
from bnport.errors import FormatError, InvalidValue, NotFound, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

    from bnport.containers.patch import Patch
    from bnport.record import Array

# The reference library stops at 100 MB; nested JSON grows thirtyfold in memory, and 10 MB describe 100 000 tensors.
LARGEST_HEADER = 10_000_000
MOST_DIMENSIONS = 64  # numpy's own limit

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
# known to the format and of known size, but no numbers that numpy can hold: listed, refused when read
_OPAQUE = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}


_SIZES = {**{theirs: ITEM_SIZE[ours] for theirs, ours in DTYPES.items()}, **_OPAQUE}
_KEYS = {"dtype", "shape", "data_offsets"}


class _Place(NamedTuple):
    dtype: str  # the header's word
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int


def is_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file can be a safetensors header."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_HEADER


def open_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, in file order, and its metadata; no tensor's bytes are read.

    Raises FormatError, naming the file and the tensor, for a header that is too long, cut off, not UTF-8, not JSON of
    the documented form, or has duplicate keys, and for positions that overlap, leave a hole or leave the file.
    """
    file = ReadFile(path)
    places, metadata = _header(file)
    return {name: _tensor(file, name, place) for name, place in places.items()}, metadata


def write_safetensors(path: str, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Fill the file at `path` with arrays (any dtype of DTYPES, bfloat16 by ml_dtypes) and string metadata.

    The same input gives the same bytes: tensors lie in order of decreasing item size and then name, as the reference
    library writes them, so that each is aligned.
    """
    import json

    for name, array in arrays.items():
        if array.dtype.name not in _NAMES:
            raise InvalidValue(f"{printable(name)}: safetensors has no dtype {array.dtype}")
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    position = 0
    for name in order:
        if name == "__metadata__":
            raise InvalidValue("a tensor cannot be called __metadata__ in safetensors")
        array = arrays[name]
        end = position + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        bad = printable(error.object[error.start : error.end])
        raise InvalidValue(
            f"{printable(path)}: a name with {bad} in it, which is no character, cannot be written"
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise InvalidValue(f"{printable(path)}: a header of {len(text)} bytes; at most {LARGEST_HEADER} are read back")
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = arrays[name]
            little = array if array.dtype.name == "bfloat16" else array.astype(array.dtype.newbyteorder("<"))
            out.write(little.tobytes())


def tensor_patches(source: str, changes: Mapping[str, bytes]) -> list[Patch]:
    """Where new bytes of some tensors of the file lie; dtypes and shapes stay.

    Raises NotFound for a name that is not there, InvalidValue for another number of bytes.
    """
    from bnport.containers.patch import Patch

    places, _ = _header(ReadFile(source))
    patches = []
    for name, data in changes.items():
        if name not in places:
            raise NotFound(f"{printable(source)}: no tensor {printable(name)}")
        place = places[name]
        if len(data) != place.end - place.begin:
            raise InvalidValue(f"{printable(name)}: {place.end - place.begin} bytes expected, {len(data)} given")
        patches.append(Patch(place.begin, data))
    return patches


def _tensor(file: ReadFile, name: str, place: _Place) -> Tensor:
    if place.dtype in _OPAQUE:
        # the stand-in dtype has the right size; read() refuses before anybody takes the bytes for numbers
        stand_in = "uint64" if _OPAQUE[place.dtype] == 8 else "uint8"
        return Tensor(name, stand_in, place.shape, _refusal(file.path, name, place.dtype))
    return FileTensor(name, DTYPES[place.dtype], place.shape, file, place.begin)


def _refusal(path: str, name: str, dtype: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise FormatError(f"{printable(path)}: {printable(name)} is {dtype}, which is not read as numbers")

    return read


def _header(file: ReadFile) -> tuple[dict[str, _Place], dict[str, str]]:
    """Positions of all tensors and the metadata, fully checked."""
    shown = printable(file.path)
    length = int.from_bytes(file.pread(0, 8, "the header's length"), "little")
    if length > LARGEST_HEADER:
        raise FormatError(f"{shown}: declares a header of {length} bytes; at most {LARGEST_HEADER} are read")
    text = file.pread(8, length, "the header")
    if not text.startswith(b"{"):
        raise FormatError(f"{shown}: the safetensors header should be a JSON object, it starts with {text[:8]!r}")
    header = _parse(shown, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{shown}: __metadata__ should map names to strings")
    data = 8 + length
    places = {name: _place(shown, name, value, data) for name, value in header.items()}
    _check_cover(shown, places, data, file.size)
    return places, metadata


def _parse(shown: str, text: bytes) -> dict[str, Any]:
    from bnport.containers.json_text import loads

    def constant(word: str) -> object:
        raise FormatError(f"{word} is no number")

    header: dict[str, Any] = loads(text, f"{shown}: the safetensors header", parse_constant=constant)
    assert isinstance(header, dict)  # it starts with "{"
    return header


def _place(shown: str, name: str, value: Any, data: int) -> _Place:
    if not isinstance(value, dict) or value.keys() != _KEYS:
        _refuse(shown, name, "expected dtype, shape and data_offsets in the safetensors header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    size = _SIZES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        _refuse(shown, name, f"unknown dtype {printable(dtype, 40)}")
    if not _lengths(shape) or len(shape) > MOST_DIMENSIONS:
        _refuse(shown, name, f"its shape should be a list of sizes, it is {printable(shape, 60)}")
    if not _lengths(offsets) or len(offsets) != 2:
        _refuse(shown, name, f"data_offsets should be two positions, they are {printable(offsets, 60)}")
    for side in shape:
        size *= side
    begin, end = offsets
    if end - begin != size:
        _refuse(shown, name, f"{dtype} of shape {tuple(shape)} is {size} bytes, data_offsets span {end - begin}")
    return _Place(dtype, tuple(shape), data + begin, data + end)


def _refuse(shown: str, name: str, why: str) -> NoReturn:
    raise FormatError(f"{shown}: {printable(name)}: {why}")


def _lengths(value: Any) -> bool:
    """A list of plain integers that fit a signed 64-bit number and are not negative."""
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  (there are two lists for every tensor, and all() takes twice as long)
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def _check_cover(shown: str, places: dict[str, _Place], data: int, size: int) -> None:
    """The tensors must cover the bytes after the header once, as the format demands: no place for anything hidden."""
    position, before = data, "the header"
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.begin != position:
            what = "overlaps" if place.begin < position else "leaves a hole after"
            raise FormatError(f"{shown}: {printable(name)} {what} {printable(before)}")
        position, before = place.end, name
    if position != size:
        what = "ends before its tensors do" if position > size else "holds bytes that belong to no tensor"
        raise FormatError(f"{shown}: {what} ({position} bytes expected, {size} found)")
