"""Caffe files made to hurt: sizes that are not there, floods of tiny fields, mutated bytes. Only bnport's errors come out,
within seconds, in little memory.
"""

from __future__ import annotations

import os
import random
import time

import h5py
import numpy as np
import pytest
from google.protobuf.message import DecodeError

from bnport import adapters
from bnport.errors import BnportError, FormatError
from bnport.record import FIELDS, BatchNorm
from tests.adapters.caffe_files import T, batch_norm, field, layer, net, save, save_hdf5, scale, tag, unpacked, varint
from tests.adapters.contract import assert_same_bits, telling_record
from tests.adapters.test_caffe import chain
from tests.hostile import SECONDS, measured, outcome

FIXTURES = os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "caffe")
caffe = adapters.load("caffe")


def read_all(path, **options):
    layers = caffe.read(path, **options)
    for one in layers.values():
        _ = one.record
        if one.kernel is not None:
            one.kernel.values()
    return layers


def refused(path, match=""):
    """Refused within time and memory, in one line that names the file."""
    kind, said = outcome(path, format="caffe")
    assert kind != "read"
    assert said.isprintable()
    assert match in said
    assert os.path.basename(path) in said


def bn_bytes(extra=b""):
    one = net(batch_norm("bn", telling_record(7), "data")).layer[0]
    return field(100, one.SerializeToString() + extra)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(b"\xff" * 1000, id="a varint that does not end"),
        pytest.param(tag(100, 2) + varint(2**63), id="a layer of 2^63 bytes"),
        pytest.param(tag(100, 2) + varint(2**40) + bn_bytes(), id="a layer of a terabyte"),
        pytest.param(tag(100, 3) + bn_bytes() + tag(100, 4), id="a group"),
        pytest.param(tag(100, 6) + b"1234", id="wire type 6"),
        pytest.param(bn_bytes() + tag(2**29, 0) + b"\x01", id="field 2^29"),
        pytest.param(bn_bytes() + varint(0) + b"\x01", id="field 0"),
        pytest.param(bn_bytes()[:-1], id="truncated by a byte"),
        pytest.param(bn_bytes(tag(1, 2) + varint(1 << 20) + b"n" * (1 << 20)), id="a name of a megabyte"),
        pytest.param(b"".join(field(100, b"") for _ in range(70_000)), id="70 000 empty layers"),
        pytest.param(bn_bytes() + b"\x18\x01" * 3_000_000, id="a flood of integers"),
        pytest.param(bn_bytes(b"\x50\x01" * 3_000_000), id="a flood of integers in a layer"),
        pytest.param(
            field(100, field(1, b"bn") + field(2, b"BatchNorm") + field(7, (tag(5, 5) + b"1234") * 3_000_000)),
            id="a flood of unpacked floats",
        ),
        pytest.param(
            field(100, field(1, b"bn") + field(2, b"BatchNorm") + field(7, b"") * 500_000), id="500 000 empty blobs"
        ),
        pytest.param(
            field(100, field(1, b"bn") + field(2, b"BatchNorm") + field(7, field(7, field(1, varint(1)) * 100_000))),
            id="100 000 axes",
        ),
        pytest.param(field(100, b"".join(field(3, b"b%d" % i) for i in range(200_000))) * 12, id="a flood of inputs"),
    ],
)
def test_bytes_made_to_hurt_are_refused_in_time_or_hold_no_batch_norm(tmp_path, data):
    path = str(tmp_path / "hostile.caffemodel")
    save(path, data)
    if b"BatchNorm" in data or not data.startswith(tag(100, 2)):
        refused(path)
    else:
        started = time.process_time()
        try:
            assert not caffe.read(path)
        except FormatError as error:
            assert "hostile.caffemodel" in str(error)
        assert time.process_time() - started < SECONDS


def test_a_net_in_which_everything_reads_everything_is_read_in_time(tmp_path):
    """Layers x inputs grow with the file, what reaches what with its square: then `inputs` is left out."""
    record = telling_record(2)
    layers = [batch_norm(f"n{i}", record, "data", f"t{i}") for i in range(1500)]
    layers += [layer(f"c{i}", "Concat", " ".join(f"t{j}" for j in range(i)), f"u{i}") for i in range(1, 1500, 3)]
    layers += [batch_norm("last", record, "u1498", "end")]
    path = str(tmp_path / "dense.caffemodel")
    save(path, net(*layers))
    started = time.process_time()
    found = caffe.read(path)
    assert time.process_time() - started < SECONDS
    assert len(found) == 1501
    assert found["last"].inputs is None or len(found["last"].inputs) == 1498


def test_thousands_of_scales_on_one_batch_norm_are_read_in_time(tmp_path):
    record = telling_record(2)
    path = str(tmp_path / "wide.caffemodel")
    save(path, net(batch_norm("bn", record, "data", "t"), *(scale(f"s{i}", record, "t", f"u{i}") for i in range(3000))))
    started = time.process_time()
    assert len(caffe.read(path)) == 3000
    assert time.process_time() - started < SECONDS


def test_the_batch_norm_of_a_caffemodel_of_five_gigabytes_costs_what_a_small_one_costs(tmp_path):
    """A convolution of 5 GB lies between; the file is sparse, so nothing of that size is written or may be read."""
    record, count = telling_record(4), 5 * 2**28
    path = str(tmp_path / "large.caffemodel")
    data_head = tag(5, 2) + varint(4 * count)
    shape = field(7, field(1, varint(4) + varint(count // 4) + varint(1) * 2))
    blob_head = tag(7, 2) + varint(len(data_head) + 4 * count + len(shape))
    names = field(1, b"conv") + field(2, b"Convolution") + field(3, b"data") + field(4, b"c")
    size = len(names) + len(blob_head) + len(data_head) + 4 * count + len(shape)
    with open(path, "wb") as file:
        file.write(tag(100, 2) + varint(size) + names + blob_head + data_head)
        file.seek(4 * count, os.SEEK_CUR)
        file.write(shape + net(batch_norm("bn", record, "c"), scale("s", record, "c")).SerializeToString())
    if os.stat(path).st_blocks * 512 > 1 << 30:
        pytest.skip("this file system keeps no holes")
    body = """
layer = adapters.load("caffe").read(arguments["path"])["bn"]
values = layer.record.values
said = values.tobytes().hex(), values.dtype.name, layer.record.epsilon, layer.kernel.shape
"""
    (values, dtype, epsilon, shape), seconds, mebibytes = measured(body, path=path)
    found = dict(zip(FIELDS, np.frombuffer(bytes.fromhex(values), dtype).reshape(4, -1), strict=True))
    assert_same_bits(BatchNorm(**found, epsilon=epsilon), record)
    assert shape == [4, count // 4, 1, 1]
    assert seconds < SECONDS
    assert mebibytes < 32


# ---- HDF5


def hdf5(tmp_path):
    path = str(tmp_path / "net.caffemodel.h5")
    save_hdf5(path, net(batch_norm("bn", telling_record(7), "data")))
    return path


def change(path, name, make):
    with h5py.File(path, "r+") as file:
        del file[name]
        make(file, name)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda f, n: f.__setitem__(n, h5py.ExternalLink("other.h5", "x")), id="external link"),
        pytest.param(lambda f, n: f.__setitem__(n, h5py.SoftLink("/data/bn/1")), id="soft link"),
        pytest.param(
            lambda f, n: f.create_dataset(n, shape=(7,), dtype="f4", external=[("other.bin", 0, 28)]),
            id="external storage",
        ),
        pytest.param(lambda f, n: f.create_dataset(n, data=np.ones(7, np.complex64)), id="complex"),
        pytest.param(lambda f, n: f.create_dataset(n, data=np.ones(7, np.int32)), id="integers"),
        pytest.param(lambda f, n: f.create_dataset(n, data=b"text"), id="text"),
        pytest.param(
            lambda f, n: f.create_dataset(n, shape=(1 << 38,), dtype="f4", chunks=(1 << 20,)), id="a terabyte"
        ),
        pytest.param(lambda f, n: f.create_dataset(n + "x", data=np.ones(7, "f4")), id="a blob of another name"),
        pytest.param(lambda f, n: f.__setitem__(n + "/loop", f["data"]), id="a cycle"),
    ],
)
def test_hdf5_that_reaches_outside_or_lies_is_refused(tmp_path, make):
    path = hdf5(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"1" * 28)
    change(path, "data/bn/0", make)
    refused(path)


def test_hdf5_that_is_no_caffemodel_is_refused_and_not_recognised_by_its_suffix_alone(tmp_path):
    path = str(tmp_path / "keras.h5")
    with h5py.File(path, "w") as file:
        file["x"] = [1.0]
    with open(path, "rb") as file:
        assert not caffe.recognise(file.read(4096), path)
    refused(path, match="no group /data")


# ---- the prototxt


@pytest.mark.parametrize(
    "text",
    [
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param { eps: nan } }',
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param { eps: -1 } }',
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param { eps: "1e-5" } }',
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param { eps: [1e-5, 1e-3] } }',
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param { } batch_norm_param { } }',
        'layer { name: "bn" type: "BatchNorm" bottom: "data" batch_norm_param: 3 }',
        'layer { name: "bn" type: "BatchNorm" name: "bn" }',
        'layer { name: "bn" type: "BatchNorm" } layer { name: "bn" type: "BatchNorm" }',
        'layer { name: "bn" type: "BatchNorm" batch_norm_param { moving_average_fraction: 7 } }',
        'layer { name: "bn" type: "BatchNorm" batch_norm_param { use_global_stats: perhaps } }',
        "layer: 1",
        "",
        "\x08\x07\x12\x00",
    ],
)
def test_a_prototxt_that_means_nothing_is_refused(tmp_path, text):
    model, described = str(tmp_path / "net.caffemodel"), str(tmp_path / "net.prototxt")
    save(model, net(batch_norm("bn", telling_record(7), "data")))
    with open(described, "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(BnportError, match=r"net\.(prototxt|caffemodel)"):
        read_all(model, prototxt=described)


# ---- mutants


def mutants(data, seed, count, pieces):
    random_ = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(random_.choice((1, 1, 1, 3, 8))):
            at = random_.randrange(len(mutant))
            kind = random_.randrange(5)
            if kind == 0:
                mutant[at] ^= 1 << random_.randrange(8)
            elif kind == 1:
                mutant[at] = random_.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                del mutant[at : at + random_.randrange(1, 20)]
            elif kind == 3:
                mutant[at:at] = random_.choice(pieces)
            else:
                start = random_.randrange(len(mutant))
                mutant[at : at + 8] = mutant[start : start + random_.randrange(1, 40)]
            if not mutant:
                mutant = bytearray(b"\x00")
        yield bytes(mutant)


PIECES = [
    varint(2**63),
    varint(2**31),
    varint(-1),
    tag(100, 2),
    tag(7, 2) + varint(2**40),
    tag(5, 3),
    b"\xff" * 12,
    b"\x80" * 9,
]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["bvlc", "nvidia", "legacy", "generated", "many readers"])
def test_a_mutated_caffemodel_is_read_or_refused_by_name_and_nothing_else(tmp_path, name):
    path = str(tmp_path / "mutant.caffemodel")
    text = os.path.join(FIXTURES, f"{name}.prototxt")
    if name == "generated":
        save(path, unpacked(chain([telling_record(c) for c in (5, 8)])))
    elif name == "many readers":
        r = telling_record(3)
        relu = layer("r", "ReLU", "a", "r")
        save(
            path,
            net(batch_norm("a", r, "data", "a"), scale("s", r, "a", "s"), scale("t", r, "a", "t", bias=False), relu),
        )
    else:
        with open(os.path.join(FIXTURES, f"{name}.caffemodel"), "rb") as file:
            save(path, file.read())
    with open(path, "rb") as file:
        data = file.read()
    options = [{}] if not os.path.exists(text) else [{}, {"prototxt": text}]
    outcomes = {"read": 0, "refused": 0}
    for number, mutant in enumerate(mutants(data, 7, 1500, PIECES)):
        save(path, mutant)
        started = time.process_time()
        try:
            read_all(path, **options[number % len(options)])
            outcomes["read"] += 1
        except BnportError as error:
            outcomes["refused"] += 1
            assert str(error).isprintable()
            assert (
                not isinstance(error, FormatError)
                or "mutant.caffemodel" in str(error)
                or f"{name}.prototxt" in str(error)
            )
        assert time.process_time() - started < SECONDS
    assert min(outcomes.values()) > 50  # the mutants tell something


@pytest.mark.fuzz
def test_a_mutated_hdf5_caffemodel_is_read_or_refused_and_nothing_else(tmp_path):
    path = str(tmp_path / "mutant.caffemodel.h5")
    with open(os.path.join(FIXTURES, "bvlc.caffemodel.h5"), "rb") as file:
        data = file.read()
    for mutant in mutants(data, 8, 300, [b"\xff" * 8, b"\x00" * 8]):
        save(path, mutant)
        started = time.process_time()
        try:
            read_all(path, prototxt=os.path.join(FIXTURES, "bvlc.prototxt"))
        except BnportError as error:
            assert str(error).isprintable()
        assert time.process_time() - started < SECONDS


def numbers_by_google(stored):
    """What blob.cpp takes from a BlobProto."""
    if len(stored.double_data):
        return np.array(stored.double_data, np.float64)
    if len(stored.data):
        return np.array(stored.data, np.float32)
    return np.frombuffer(stored.raw_data, "<f2")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["bvlc", "nvidia", "legacy"])
def test_what_is_read_of_a_mutated_caffemodel_is_what_googles_parser_sees_in_it(tmp_path, name):
    path = str(tmp_path / "mutant.caffemodel")
    with open(os.path.join(FIXTURES, f"{name}.caffemodel"), "rb") as file:
        data = file.read()
    compared = 0
    for mutant in mutants(data, 11, 1500, PIECES):
        save(path, mutant)
        try:
            layers = caffe.read(path)
            arrays = {key: one.arrays() for key, one in layers.items()}
        except BnportError:
            continue
        try:
            theirs = T["NetParameter"].FromString(mutant)
        except DecodeError:  # damage in a convolution that no BatchNorm needed: it is not read
            continue
        stored = {one.name: one.blobs for one in theirs.layer if one.type == "BatchNorm"}
        for key, found in arrays.items():
            if key not in stored or len(stored[key]) not in (3, 5):
                continue
            blobs = [numbers_by_google(one) for one in stored[key]]
            with np.errstate(over="ignore", invalid="ignore"):
                expected = [sums.astype(np.float64) / float(blobs[2][0]) for sums in blobs[:2]]
            for field_, values in zip(("mean", "variance"), expected, strict=True):
                np.testing.assert_array_equal(found[field_].astype(np.float64), values)
                compared += 1
    assert compared > 500
