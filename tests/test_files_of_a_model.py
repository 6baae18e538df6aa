"""A model that lies in several files: no output may replace one of them, and the report shows the sha256 of each."""

from __future__ import annotations

import hashlib
import json
import os

import keras
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

import bnport
from bnport.calibrated import convert_calibrated
from bnport.errors import FormatError, OutputError


def network():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    torch.nn.init.normal_(net[1].weight)
    torch.nn.init.uniform_(net[1].running_var, 0.1, 2)
    return net


def torch_index(folder):
    state = network().state_dict()
    where = {name: f"model-0000{1 + name.startswith('1')}-of-00002.safetensors" for name in state}
    for part in set(where.values()):
        safetensors.torch.save_file({n: t for n, t in state.items() if where[n] == part}, str(folder / part))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return "model.safetensors.index.json", sorted(set(where.values()))


def keras_shards(folder):
    layers = [keras.layers.Conv2D(4, 1), keras.layers.BatchNormalization()]
    keras.Sequential([keras.Input((2, 2, 3)), *layers]).save_weights(folder / "m.weights.json", max_shard_size=1e-7)
    return "m.weights.json", sorted(name for name in os.listdir(folder) if name.endswith(".h5"))


def onnx_external(folder):
    torch.onnx.export(
        network(), (torch.zeros(1, 3, 2, 2),), str(folder / "whole.onnx"), dynamo=False, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    model = onnx.load(folder / "whole.onnx")
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    return "m.onnx", ["m.onnx.data"]


@pytest.fixture(params=[torch_index, keras_shards, onnx_external])
def parts(request, tmp_path):
    """(the model's path, the other files that it lies in, a target for it)"""
    model, others = request.param(tmp_path)
    target = keras.Sequential([keras.Input((2, 2, 3)), keras.layers.Conv2D(4, 1), keras.layers.BatchNormalization()])
    target.save(tmp_path / "target.keras")
    assert others
    return tmp_path / model, [tmp_path / name for name in others], tmp_path / "target.keras"


def test_no_output_replaces_a_file_that_the_source_lies_in(parts):
    source, others, target = parts
    before = {path: path.read_bytes() for path in others}
    for path in others:
        with pytest.raises(OutputError, match=r"is the input|will be a"):
            bnport.convert(source, target, path, force=True)
        with pytest.raises(OutputError, match="is the input"):
            bnport.save_records(source, path, force=True)
    assert {path: path.read_bytes() for path in others} == before


def test_no_output_replaces_a_file_that_the_target_lies_in(tmp_path):
    model, others = onnx_external(tmp_path)
    torch.save(network().state_dict(), tmp_path / "source.pth")
    with pytest.raises(OutputError, match="is the input"):
        bnport.convert(tmp_path / "source.pth", tmp_path / model, tmp_path / others[0], force=True)


def test_the_report_shows_the_digest_of_every_file(parts, tmp_path):
    source, others, target = parts
    expected = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, *others)}
    assert bnport.convert(source, target, tmp_path / "out.keras").sha256 == expected
    assert expected.items() <= bnport.verify(source, tmp_path / "out.keras").sha256.items()
    assert bnport.save_records(source, tmp_path / "records.safetensors").sha256 == expected


def test_a_location_outside_the_folder_is_not_looked_at(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"x" * 64)
    (tmp_path / "model").mkdir()
    name, _ = onnx_external(tmp_path / "model")
    model = onnx.load(tmp_path / "model" / name, load_external_data=False)
    extra = onnx.helper.make_tensor("extra", onnx.TensorProto.FLOAT, [16], b"x" * 64, raw=True)
    extra.ClearField("raw_data")
    extra.data_location = onnx.TensorProto.EXTERNAL
    extra.external_data.add(key="location", value="../secret.bin")
    model.graph.initializer.append(extra)
    (tmp_path / "model" / name).write_bytes(model.SerializeToString())
    assert bnport.read(tmp_path / "model" / name).files == (str(tmp_path / "model" / "m.onnx.data"),)


@pytest.mark.parametrize("made", [torch_index, keras_shards])
@pytest.mark.parametrize("how", [{"dry_run": True}, {"in_place": True}, {"out": "out"}])
def test_a_set_of_files_is_not_written_and_a_dry_run_says_so(made, how, tmp_path):
    model, others = made(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (model, *others)}
    torch.save(network().state_dict(), tmp_path / "source.pth")
    where = {"out": tmp_path / f"out{model[model.index('.') :]}"} if "out" in how else how
    with pytest.raises(FormatError, match="read, not written; save"):
        bnport.convert(tmp_path / "source.pth", tmp_path / model, **where)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "source.pth"} == before


def test_statistics_from_data_show_the_digest_of_every_file_too(tmp_path):
    source, others = torch_index(tmp_path)
    layers = [keras.layers.Conv2D(4, 1), keras.layers.BatchNormalization()]
    keras.Sequential([keras.Input((2, 2, 3)), *layers]).save(tmp_path / "target.keras")
    data = np.random.default_rng(0).normal(size=(40, 2, 2, 3)).astype(np.float32)
    report = convert_calibrated(tmp_path / source, tmp_path / "target.keras", tmp_path / "out.keras", data)
    digests = {str(tmp_path / n): hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in others}
    assert digests.items() <= report.sha256.items()
