"""Files whose name says another format than their contents: read as what they are, or refused with what they look like."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest

from bnport import adapters
from bnport.containers import looks_like
from bnport.errors import FormatError

from .test_cli import DIGITS

SUFFIXES = (".pth", ".safetensors", ".index.json", ".keras", ".weights.h5", ".weights.json", ".onnx", ".caffemodel",
            ".prototxt", ".pt2", ".other")  # fmt: skip
MODELS = ("digits.pth", "digits-legacy.pth", "digits.safetensors", "twin.keras", "twin.h5")


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


OTHERS = {
    "a web page: the download failed": b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "a Git LFS pointer: 'git lfs pull' fetches": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "an empty zip archive": archive(),
    "a gzip file: unpack it first": b"\x1f\x8b\x08" + bytes(30),
    "an .npy array": array(),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_model_is_refused_with_what_it_looks_like_whatever_its_name(what, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(OTHERS[what])
    with pytest.raises(FormatError, match=rf"model{suffix}: not a model file that bnport reads \({what}"):
        adapters.read(path)


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("format", adapters.names())
def test_what_is_no_model_is_said_too_where_the_format_was_given(format, what, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(OTHERS[what])
    with pytest.raises(FormatError, match=f"; by its first bytes it is {what}"):
        adapters.read(path, format=format)


@pytest.mark.parametrize("suffix", [".safetensors", ".caffemodel", ".prototxt", ".keras", ".onnx"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_with_the_suffix_of_another_format_is_read_as_what_it_is(model, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes((DIGITS / model).read_bytes())
    if (model, suffix) == ("twin.h5", ".caffemodel"):  # there are caffemodels in HDF5
        with pytest.raises(FormatError, match="no group /data"):
            adapters.read(path)
    else:
        assert adapters.read(path).format == adapters.read(DIGITS / model).format


def test_a_text_is_a_net_only_by_its_name(tmp_path):
    for name, message in (("net.prototxt", "describes a net"), ("net.safetensors", "a text file")):
        (tmp_path / name).write_text('layer { name: "bn" type: "BatchNorm" }')
        with pytest.raises(FormatError, match=message):
            adapters.read(tmp_path / name)


def test_each_kind_of_model_is_named(tmp_path):
    heads = {name: (DIGITS / name).read_bytes()[: adapters.HEAD_BYTES] for name in MODELS}
    assert [looks_like(heads[name]) for name in MODELS] == [
        "a zip archive of PyTorch", "a legacy file of PyTorch", "a .safetensors file", "a .keras file", "an HDF5 file"
    ]  # fmt: skip
    assert looks_like(archive(a=b"x")) == "a zip archive"
    assert looks_like(archive(**{"a.npy": array()})) == "an .npz archive"
    assert looks_like((DIGITS / ".." / "onnx" / "torch-kept.onnx").read_bytes()[:4096]) == ""
    assert looks_like(b"") == ""
