"""The safetensors container against the reference library, in both directions, and against hostile files."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from bnport.containers.files import ReadFile
from bnport.containers.patch import copy_patched
from bnport.containers.safetensors import (
    LARGEST_HEADER,
    is_safetensors,
    open_safetensors,
    tensor_patches,
    write_safetensors,
)
from bnport.containers.tensor import arrays_of
from bnport.errors import FormatError, InvalidValue, NotFound

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"]


def example(rng=None):
    rng = rng or np.random.default_rng(0)
    arrays = {f"a.{name}": (rng.normal(size=(3, 2)) * 50).astype(name) for name in DTYPES}
    arrays["flags"] = np.array([True, False, True])
    arrays["scalar"] = np.array(7, np.int64)
    arrays["empty"] = np.zeros((0, 4), np.float32)
    arrays["Łódź \u2028"] = np.arange(5, dtype=np.float32)
    return arrays


def test_files_of_the_reference_library_are_read_bit_for_bit(tmp_path):
    arrays, path = example(), str(tmp_path / "a.safetensors")
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "ü": "ö"})
    tensors, metadata = open_safetensors(path)
    assert metadata == {"format": "pt", "ü": "ö"}
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        read = tensors[name].array()
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert tensors[name].shape == array.shape


def test_files_written_here_are_read_bit_for_bit_by_the_reference_library(tmp_path):
    arrays, path = example(), str(tmp_path / "a.safetensors")
    write_safetensors(path, arrays, {"k": "v\n"})
    theirs = safetensors.numpy.load_file(path)
    assert set(theirs) == set(arrays)
    for name, array in arrays.items():
        assert (theirs[name].dtype, theirs[name].shape) == (array.dtype, array.shape)
        assert theirs[name].tobytes() == array.tobytes()
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"k": "v\n"}


def test_bfloat16_of_torch_widens_exactly(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = str(tmp_path / "a.safetensors")
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"w": values}, path)
    tensors, _ = open_safetensors(path)
    assert tensors["w"].dtype == "bfloat16"
    assert np.array_equal(tensors["w"].array(), values.float().numpy())


def test_bfloat16_written_here_is_read_by_torch(tmp_path):
    from safetensors.torch import load_file

    path = str(tmp_path / "a.safetensors")
    values = np.random.default_rng(0).normal(size=9).astype(ml_dtypes.bfloat16)
    write_safetensors(path, {"w": values})
    assert np.array_equal(load_file(path)["w"].float().numpy(), values.astype(np.float32))


def test_the_same_arrays_give_the_same_file_whatever_their_order(tmp_path):
    arrays = example()
    write_safetensors(str(tmp_path / "a"), arrays)
    write_safetensors(str(tmp_path / "b"), dict(reversed(arrays.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_patch_changes_exactly_the_named_tensors(tmp_path):
    arrays, source, out = example(), str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    safetensors.numpy.save_file(arrays, source, metadata={"x": "y"})
    before = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").touch()
    new = np.float32([[9, 8], [7, 6], [5, 4]])
    copy_patched(ReadFile(source), out, tensor_patches(source, {"a.float32": new.tobytes()}))
    expected = {**arrays, "a.float32": new}
    for name, array in safetensors.numpy.load_file(out).items():
        assert array.tobytes() == expected[name].tobytes()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    with pytest.raises(NotFound, match=r"no tensor nix"):
        tensor_patches(source, {"nix": b""})
    with pytest.raises(InvalidValue, match=r"a\.float32: 24 bytes expected, 4 given"):
        tensor_patches(source, {"a.float32": b"1234"})


def test_float8_tensors_do_not_hide_the_others_and_are_refused_when_read(tmp_path):
    path = str(tmp_path / "a.safetensors")
    raw(path, {"f8": entry("F8_E4M3", [4], 0, 4), "w": entry("F32", [1], 4, 8)}, np.float32([0, 1.5]).tobytes())
    tensors, _ = open_safetensors(path)
    assert tensors["w"].array() == 1.5
    with pytest.raises(FormatError, match=r"f8 is F8_E4M3"):
        tensors["f8"].array()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_vectors_side_by_side_are_read_in_one_go_and_others_one_by_one(tmp_path, dtype, monkeypatch):
    rng, path = np.random.default_rng(2), str(tmp_path / "a.safetensors")
    shapes = {"a": 5, "b": 5, "c": 5, "d": 7, "kernel": (5, 2), "z": 5}
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    arrays["other"] = rng.normal(size=5)
    safetensors.numpy.save_file(arrays, path)
    tensors, _ = open_safetensors(path)
    reads, pread = [], ReadFile.pread
    monkeypatch.setattr(ReadFile, "pread", lambda *args: reads.append(args[1:3]) or pread(*args))
    for names, expected in ((["b", "d", "a", "c"], 1), (["a", "c"], 2), (["a", "kernel"], 2), (["d", "kernel", "z"], 3),
                            (["a"], 1), (["a", "a"], 2), (["a", "other"], 2)):  # fmt: skip
        reads.clear()
        keys = {f"{place}": tensors[name] for place, name in enumerate(names)}
        got = arrays_of(keys)
        assert len(reads) == expected
        assert list(got) == list(keys)
        for key, name in zip(keys, names, strict=True):
            np.testing.assert_array_equal(got[key], arrays[name].astype(got[key].dtype))
            assert got[key].tobytes() == tensors[name].array().tobytes()
            assert got[key].flags.writeable


def test_opening_reads_no_tensor(tmp_path):
    path = str(tmp_path / "a.safetensors")
    size = 1 << 40  # a sparse terabyte
    header = json.dumps({"big": entry("F32", [size // 4 - 1], 0, size - 4), "w": entry("F32", [1], size - 4, size)})
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.seek(size - 4, 1)
        file.write(np.float32([2.5]).tobytes())
    tensors, _ = open_safetensors(path)
    assert tensors["big"].size == size // 4 - 1
    assert tensors["w"].array() == 2.5


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text + data)


F4 = entry("F32", [1], 0, 4)
HOSTILE = {
    "header of 2^63": (b"{}", b"", 2**63, "header of 9223372036854775808 bytes"),
    "header of 200 MB": (b"{}", b"", 200_000_000, "header of 200000000 bytes"),
    "header longer than the file": (b"{}", b"", 5000, "the header should be 5000 bytes at 8"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "starts with"),
    "a number": (b"12", b"", None, "starts with"),
    "leading space": (b" {}", b"", None, "starts with"),
    "not JSON": (b"{]", b"", None, "not JSON"),
    "text after the object": (b"{} {}", b"", None, "not JSON"),
    "NaN": (b'{"a": NaN}', b"", None, "NaN"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8), None, "a is twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4), None, "dtype is twice",
    ),
    "overlap": ({"a": F4, "b": F4}, bytes(4), None, "b overlaps a"),
    "partial overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), None, "b overlaps a"),
    "hole": ({"a": F4, "b": entry("F32", [1], 8, 12)}, bytes(12), None, "b leaves a hole after a"),
    "hole at the start": ({"a": entry("F32", [1], 4, 8)}, bytes(8), None, "leaves a hole after the header"),
    "past the end": ({"a": entry("F32", [4], 0, 16)}, bytes(12), None, "ends before its tensors do"),
    "bytes that belong to nothing": ({"a": F4}, bytes(8), None, "belong to no tensor"),
    "overflow": ({"a": entry("F32", [2**62, 2**62], 0, 4)}, bytes(4), None, "data_offsets span 4"),
    "wrapped overflow": ({"a": entry("F32", [2**62], 0, 0)}, b"", None, "data_offsets span 0"),
    "offset 2^64": ({"a": entry("F32", [1], 2**64, 2**64 + 4)}, bytes(4), None, "two positions"),
    "negative shape": ({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4), None, "list of sizes"),
    "backwards": ({"a": entry("F32", [0], 4, 0)}, bytes(4), None, "span -4"),
    "fractional shape": ({"a": entry("F32", [1.0], 0, 4)}, bytes(4), None, "list of sizes"),
    "boolean shape": ({"a": entry("F32", [True], 0, 4)}, bytes(4), None, "list of sizes"),
    "a million dimensions": ({"a": entry("F32", [2] * 1_000_000, 0, 4)}, bytes(4), None, "list of sizes"),
    "three offsets": ({"a": {**F4, "data_offsets": [0, 4, 8]}}, bytes(4), None, "two positions"),
    "unknown dtype": ({"a": entry("F31", [1], 0, 4)}, bytes(4), None, "unknown dtype F31"),
    "dtype a list": ({"a": entry(["F32"], [1], 0, 4)}, bytes(4), None, "unknown dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "expected dtype, shape and data_offsets"),
    "extra field": ({"a": {**F4, "url": "http://"}}, bytes(4), None, "expected dtype, shape and data_offsets"),
    "entry a number": ({"a": 4}, bytes(4), None, "expected dtype, shape and data_offsets"),
    "metadata a list": ({"__metadata__": []}, b"", None, "__metadata__ should map"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__ should map"),
    "deep lists": (b'{"a":' + b"[" * 900_000 + b"]" * 900_000 + b"}", b"", None, "nested too deeply"),
    "deep objects": (b'{"a":' * 300_000 + b"1" + b"}" * 300_000, b"", None, "nested too deeply"),
    "long number": (b'{"a":' + b"9" * 1_000_000 + b"}", b"", None, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_one_line_that_names_it(tmp_path, case):
    header, data, length, message = HOSTILE[case]
    path = str(tmp_path / "evil.safetensors")
    raw(path, header, data, length)
    with pytest.raises(FormatError, match=r"evil\.safetensors") as caught:
        open_safetensors(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", sorted(set(HOSTILE) - {"extra field", "leading space"}))
def test_the_case_is_no_file_for_the_reference_library_either(tmp_path, case):
    header, data, length, _ = HOSTILE[case]
    path = str(tmp_path / "evil.safetensors")
    raw(path, header, data, length)
    with pytest.raises((SafetensorError, OSError, ValueError, KeyError, TypeError)):
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x02\0\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0{"])
def test_a_truncated_start_is_refused(tmp_path, content):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"cut\.safetensors"):
        open_safetensors(str(path))


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    good, path = tmp_path / "good.safetensors", tmp_path / "cut.safetensors"
    safetensors.numpy.save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones(3)}, str(good))
    content = good.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            open_safetensors(str(path))


def test_control_characters_in_names_are_escaped_in_messages(tmp_path):
    path = str(tmp_path / "a.safetensors")
    raw(path, {"\x1b[31mred\n": entry("F31", [1], 0, 4)}, bytes(4))
    with pytest.raises(FormatError, match=r"\\x1b\[31mred\\n: unknown dtype"):
        open_safetensors(path)


@pytest.mark.parametrize("body", [b"[],", b"{},", b'"ab",', b'"a":1,'])
def test_the_largest_header_stays_within_time_and_memory(tmp_path, body):
    path = str(tmp_path / "evil.safetensors")
    opening, end = (b"{", b'"z":1}') if b":" in body else (b'{"a":[', b"1]}")
    room = LARGEST_HEADER - len(opening) - len(end)
    raw(path, opening + body * (room // len(body)) + end)
    code = """
import resource, sys, time
from bnport.containers.safetensors import open_safetensors
from bnport.errors import FormatError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
try:
    open_safetensors(sys.argv[1])
except FormatError:
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(used, time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    mebibytes, seconds = map(float, done.stdout.split())
    assert mebibytes < 512
    assert seconds < 5


def test_recognition_takes_real_files_and_nothing_longer_than_it_would_read(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(example(), str(path))
    assert is_safetensors(path.read_bytes()[:4096])
    assert not is_safetensors(b"PK\x03\x04" + bytes(100))
    assert not is_safetensors((2**63).to_bytes(8, "little") + b"{}")
    assert not is_safetensors(b"")


def test_arrays_that_the_format_cannot_hold_are_refused_on_writing(tmp_path):
    with pytest.raises(InvalidValue, match="complex128"):
        write_safetensors(str(tmp_path / "a"), {"w": np.zeros(2, np.complex128)})
    with pytest.raises(InvalidValue, match="__metadata__"):
        write_safetensors(str(tmp_path / "a"), {"__metadata__": np.zeros(2)})


def test_big_endian_and_strided_arrays_are_written_by_value(tmp_path):
    path = str(tmp_path / "a")
    values = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    write_safetensors(path, {"w": values})
    assert np.array_equal(safetensors.numpy.load_file(path)["w"], values)
