"""HDF5 as h5py writes it, read back by position; and everything that would reach outside or claim more than is there."""

from __future__ import annotations

import json
import os

import h5py
import ml_dtypes
import numpy as np
import pytest

from bnport.containers.files import ReadFile
from bnport.containers.hdf5 import H5, natural
from bnport.errors import BnportError, FormatError

pytestmark = pytest.mark.core


def made(path, build, **options):
    with h5py.File(path, "w", **options) as file:
        build(file)
    return str(path)


def everything(path, start=0, size=None):
    h5 = H5(ReadFile(path), start, size)
    return {t.name: t.array() for _, group in h5.walk() for t in group.tensors()}


def refused(path, pattern):
    with pytest.raises(FormatError, match=pattern) as caught:
        everything(path)
    message = str(caught.value)
    assert os.path.basename(path) in message
    assert message.isprintable()


ARRAYS = {
    "f4": np.arange(6, dtype="<f4").reshape(2, 3), "f8": np.float64([1 / 3]), "f2": np.float16([1.5, -2]),
    "big": np.arange(4, dtype=">f4"), "bigd": np.arange(4, dtype=">f8"), "i8": np.arange(3), "u1": np.uint8([255, 1]),
    "i2": np.int16([-5]), "scalar": np.float32(2.5), "empty": np.zeros((0, 3), "f4"),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 1024}], ids=str)
def test_every_plain_dtype_and_layout_reads_as_h5py_reads_it(tmp_path, options):
    def build(file):
        for name, array in ARRAYS.items():
            file[f"a/{name}"] = array
        for name in ("f4", "big", "i8"):
            file.create_dataset(f"gz/{name}", data=ARRAYS[name], chunks=True, compression=4, shuffle=True)
            file.create_dataset(f"fl/{name}", data=ARRAYS[name], chunks=True, fletcher32=True)
        many = np.random.default_rng(0).normal(size=(37, 11)).astype("f4")
        file.create_dataset("chunked", data=many, chunks=(8, 3), compression="gzip", shuffle=True, fletcher32=True)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.COMPACT)
        for name, order in (("compact", "<f4"), ("compactbig", ">f4")):
            space = h5py.h5s.create_simple((3,))
            kind = h5py.h5t.py_create(np.dtype(order))
            h5py.h5d.create(file.id, name.encode(), kind, space, plan).write(
                h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, 2, 3], order)
            )

    path = made(tmp_path / "a.h5", build, **options)
    got = everything(path)
    with h5py.File(path) as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert sorted(got) == sorted(names)
        for name in names:
            theirs = file[name][()]
            assert got[name].shape == theirs.shape
            assert got[name].dtype == theirs.dtype.newbyteorder("=")
            assert got[name].tobytes() == theirs.astype(theirs.dtype.newbyteorder("=")).tobytes(), name


def test_offsets_are_those_of_the_bytes_also_behind_a_user_block_and_inside_another_file(tmp_path):
    array = np.random.default_rng(0).normal(size=50).astype("<f4")
    path = made(tmp_path / "a.h5", lambda file: file.create_dataset("x/y", data=array), userblock_size=2048)
    with open(path, "rb") as file:
        data = file.read()
    inside = tmp_path / "b.bin"
    inside.write_bytes(b"junk!" * 7 + data + b"more")
    for where, start, size in ((path, 0, None), (str(inside), 35, len(data))):
        h5 = H5(ReadFile(where), start, size)
        tensor = h5.root.group("x").child("y")
        with open(where, "rb") as file:
            file.seek(tensor.offset)
            assert file.read(array.nbytes) == array.tobytes()
        assert tensor.array().tobytes() == array.tobytes()


def test_bfloat16_as_ml_dtypes_writes_it(tmp_path):
    values = np.float32([1.5, -0.0078125, 3.0, np.inf]).astype(ml_dtypes.bfloat16)
    got = everything(made(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=values)))
    assert got["x"].tobytes() == values.astype(np.float32).tobytes()


def test_text_attributes_in_every_form_that_keras_wrote(tmp_path):
    def build(file):
        file.attrs["variable"] = "läyer"
        file.attrs["fixed"] = np.bytes_(b"layer")
        file.attrs["list"] = [b"a", b"bc"]
        file.attrs.create("fixedlist", np.array([b"a", b"bc"]))
        file.attrs["none"] = []
        file.attrs["number"] = 7
        file.attrs["long"] = json.dumps(["x"] * 50_000)

    root = H5(ReadFile(made(tmp_path / "a.h5", build))).root
    assert root.attribute("variable") == "läyer"
    assert root.attribute("fixed") == "layer"
    assert root.attribute("list") == root.attribute("fixedlist") == ["a", "bc"]
    assert root.attribute("none") == []
    assert root.attribute("missing") is None
    assert root.attribute_number("number") == 7
    assert len(root.attribute("long")) == 250_000
    with pytest.raises(FormatError, match="not text"):
        root.attribute("number")


def test_names_sort_by_their_numbers():
    assert sorted(["a_10", "a_9", "a", "a_2b", "b"], key=natural) == ["a", "a_2b", "a_9", "a_10", "b"]


# ---- what reaches outside


def outside(tmp_path):
    return made(tmp_path / "outside.h5", lambda file: file.create_dataset("x", data=np.float32([42, 43])))


@pytest.mark.parametrize("kind", ["external link", "external storage", "virtual", "soft link", "soft link out"])
def test_nothing_outside_the_file_is_opened(tmp_path, kind):
    other = outside(tmp_path)

    def build(file):
        group = file.create_group("layers")
        if kind == "external link":
            group["vars"] = h5py.ExternalLink("outside.h5", "/")
        elif kind == "soft link":
            file["there"] = np.float32([1])
            group["vars"] = h5py.SoftLink("/there")
        elif kind == "soft link out":
            group["link"] = h5py.ExternalLink("outside.h5", "/")
            group["vars"] = h5py.SoftLink("/layers/link/x")
        elif kind == "external storage":
            group.create_dataset("x", (2,), "f4", external=[(other, 2048, 8)])
        else:
            layout = h5py.VirtualLayout((2,), "f4")
            layout[:] = h5py.VirtualSource("outside.h5", "x", (2,))
            group.create_virtual_dataset("x", layout)

    path = made(tmp_path / "bad.h5", build)
    os.utime(other, (1, 1))
    refused(path, "link|external storage|virtual")
    assert os.stat(other).st_atime == 1  # reading it would set the time (unless the file system keeps none)


# ---- what claims too much


def test_a_terabyte_shape_is_refused_before_anything_is_allocated(tmp_path):
    def build(file):
        file.create_dataset("contiguous", (1 << 40,), "f4")

    refused(made(tmp_path / "a.h5", build), "not in the file")
    path = made(tmp_path / "b.h5", lambda f: f.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 20,)))
    refused(path, "are stored")
    path = made(tmp_path / "c.h5", lambda f: f.create_dataset("x", (1 << 38,), "f4", chunks=(1 << 20,), compression=9))
    refused(path, "are stored")


def test_a_deflate_bomb_inflates_no_further_than_its_chunk(tmp_path):
    import zlib

    bomb = zlib.compress(b"\0" * (200 << 20), 9)

    def build(file):
        dataset = file.create_dataset("x", (1000,), "f4", chunks=(1000,), compression=9)
        dataset.id.write_direct_chunk((0,), bomb)

    refused(made(tmp_path / "a.h5", build), "inflates to more")


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [("S8", "text"), (h5py.string_dtype(), "text"), ("c8", "compound"), ([("a", "f4"), ("b", "f4")], "compound"),
     (h5py.ref_dtype, "references"), (h5py.vlen_dtype(np.float32), "type"), ("V3", "type")],
)  # fmt: skip
def test_anything_but_plain_real_numbers_is_refused(tmp_path, dtype, pattern):
    refused(made(tmp_path / "a.h5", lambda file: file.create_dataset("x", (3,), dtype)), pattern)


def test_unknown_filters_are_refused_by_name(tmp_path):
    path = made(
        tmp_path / "a.h5", lambda f: f.create_dataset("x", data=np.zeros(3, "f4"), chunks=(3,), compression="lzf")
    )
    refused(path, "h5repack")


def test_cycles_and_second_links_are_refused(tmp_path):
    def cycle(file):
        group = file.create_group("a/b")
        group["up"] = file["a"]

    refused(made(tmp_path / "a.h5", cycle), "linked twice or within itself")


def test_three_thousand_nested_groups_are_refused_in_time(tmp_path):
    def build(file):
        group = file
        for _ in range(3000):
            group = group.create_group("g")

    refused(made(tmp_path / "a.h5", build), "deep")


def test_control_characters_in_names_are_escaped(tmp_path):
    path = made(tmp_path / "a.h5", lambda file: file.create_dataset("x\x1b[31m\n", (3,), "S8"))
    refused(path, r"\\x1b")


def test_many_texts_that_are_one_long_text_are_refused(tmp_path):
    """Variable-length texts lie elsewhere: 3000 of them can all be one of a megabyte."""

    def build(file):
        file.attrs["long"] = "y" * 1_000_000
        file.attrs["names"] = [b"name%d" % i for i in range(3000)]

    path = made(tmp_path / "a.h5", build)
    assert len(H5(ReadFile(path)).root.attribute("names")) == 3000
    with open(path, "rb") as file:
        data = bytearray(file.read())
    long = data.index((1_000_000).to_bytes(4, "little"), data.index(b"long\0"))
    first = data.index((5).to_bytes(4, "little"), data.index(b"names\0") + 40)
    while data[first + 16 : first + 20] != (5).to_bytes(4, "little"):
        first = data.index((5).to_bytes(4, "little"), first + 1)
    for number in range(3000):
        data[first + 16 * number : first + 16 * number + 16] = data[long : long + 16]
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(FormatError, match="more than is read"):
        H5(ReadFile(path)).root.attribute("names")


def test_texts_of_newer_object_headers_are_read_as_h5py_reads_them(tmp_path):
    def build(file):
        for number in range(6):
            file.attrs[f"a{number}"] = ["x" * number, "läyer", ""]
        file.attrs["model"] = "y" * 100_000

    for track in (False, True):
        path = made(tmp_path / f"{track}.h5", build, libver="latest", track_order=track)
        root = H5(ReadFile(path)).root
        with h5py.File(path) as file:
            for number in range(6):
                assert root.attribute(f"a{number}") == list(file.attrs[f"a{number}"])
            assert root.attribute("model") == file.attrs["model"]


def test_a_heap_object_of_no_length_is_not_walked_for_ever(tmp_path):
    """The library loops on it."""
    path = made(tmp_path / "a.h5", lambda file: file.attrs.update({"a": "text", "b": ["more", "texts"]}))
    with open(path, "rb") as file:
        data = bytearray(file.read())
    heap = data.index(b"GCOL")
    for size in (0xFFFFFFFFFFFFFFF0, 0, 1 << 40):
        data[heap + 24 : heap + 32] = size.to_bytes(8, "little")
        with open(path, "wb") as file:
            file.write(data)
        with pytest.raises(FormatError, match=r"not where the file says|should be"):
            [H5(ReadFile(path)).root.attribute(name) for name in "ab"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = made(
        tmp_path / "a.h5", lambda file: [file.create_dataset(f"g/{i}", data=np.arange(100.0)) for i in range(9)]
    )
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(path, "truncated|damaged|cannot")


@pytest.mark.fuzz
def test_flipped_bits_give_numbers_or_a_format_error(tmp_path):
    def build(file):
        for layer in range(4):
            for number in range(4):
                file[f"layers/bn_{layer}/vars/{number}"] = np.arange(5, dtype="f4")
            file[f"layers/bn_{layer}/vars"].attrs["name"] = f"bn{layer}"

    path = made(tmp_path / "a.h5", build)
    with open(path, "rb") as file:
        data = file.read()
    random_ = np.random.default_rng(3)
    bad = tmp_path / "b.h5"
    for _ in range(400):
        mutant = bytearray(data)
        for at in random_.integers(0, len(data), random_.integers(1, 5)):
            mutant[at] ^= 1 << random_.integers(0, 8)
        bad.write_bytes(mutant)
        try:
            h5 = H5(ReadFile(str(bad)))
            for _, group in h5.walk():
                group.attribute("name")
                [t.array() for t in group.tensors()]
        except BnportError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("length", [68, 4096, 2**32 - 1])
def test_a_chunk_that_claims_another_length_than_it_has_is_refused_and_never_read_by_hdf5(tmp_path, length):
    """h5py's read_direct_chunk puts as many bytes as are claimed into a buffer of the chunk's size, and the process dies."""
    path = made(
        tmp_path / "a.h5", lambda file: file.create_dataset("a/x", data=np.arange(64, dtype="f4"), chunks=(16,))
    )
    with open(path, "r+b") as file:
        data = file.read() + bytes(8192)
        node = next(at for at in range(len(data)) if data.startswith(b"TREE\x01", at))
        at = node + 24  # behind signature, type, level, number of entries and two siblings: the first chunk's length
        assert int.from_bytes(data[at : at + 4], "little") == 64
        file.seek(0)
        file.write(data[:at] + length.to_bytes(4, "little") + data[at + 4 :])
    refused(path, "chunk 0 holds" if length < len(data) else "a/x")
