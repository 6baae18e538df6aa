"""The contract for ONNX: models made by onnx, each way of storing numbers, run by onnxruntime."""

from __future__ import annotations

import os
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import external_data_helper

from bnport.errors import BnportError
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters import onnx_files
from tests.adapters.contract import FileContract, LiveContract, telling_record


class TestOnnx(FileContract):
    adapter = "onnx"
    suffix = ".onnx"
    how: ClassVar[dict[str, object]] = {}

    def build(self, records, path, absent=()):
        onnx.save(onnx_files.model(records, dtype=self.dtype, **self.how), path)

    def run(self, path, x):
        return onnx_files.run(path, x.astype(self.dtype)).astype(np.float32)

    def others(self, path):
        return onnx_files.others(path)


class TestOnnxFloatData(TestOnnx):
    """Numbers in float_data, at an opset and IR version of 2018, where initializers are graph inputs too."""

    how: ClassVar[dict[str, object]] = {"tensor": onnx_files.typed, "opset": 7, "ir_version": 3}


class TestOnnxFloat64(TestOnnx):
    dtype = "float64"
    output_dtype = "float64"


class TestOnnxFloat64InDoubleData(TestOnnxFloat64):
    how: ClassVar[dict[str, object]] = {"tensor": onnx_files.typed}


class TestOnnxFloat16(TestOnnx):
    dtype = "float16"
    output_dtype = "float16"


class TestOnnxFloat16InInt32Data(TestOnnxFloat16):
    how: ClassVar[dict[str, object]] = {"tensor": onnx_files.typed}


class TestOnnxExternalData(TestOnnx):
    """Every tensor in another file beside the model, as for models over 2 GB."""

    def build(self, records, path, absent=()):
        made = onnx_files.model(records, dtype=self.dtype)
        onnx.save(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)

    def test_writing_an_unknown_layer_or_a_wrong_width_is_refused_and_writes_nothing(self, tmp_path):
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        self.build([self.one()], path)
        with pytest.raises(BnportError):
            self.rewritten(path, out, {"no such layer": Change(self.one(), frozenset(FIELDS))})
        assert sorted(os.listdir(tmp_path)) == ["model.onnx", "weights.bin"]

    def test_writing_puts_the_changed_tensors_inside_and_leaves_the_data_file_alone(self, tmp_path):
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        self.build([self.one()], path)
        data = (tmp_path / "weights.bin").read_bytes()
        self.rewritten(path, out, {"bn0": Change(self.one(seed=5), frozenset({"gamma", "mean"}))})
        assert (tmp_path / "weights.bin").read_bytes() == data
        inside = {
            t.name: not external_data_helper.uses_external_data(t)
            for t in onnx.load(out, load_external_data=False).graph.initializer
        }
        assert inside == {"bn0.gamma": True, "bn0.mean": True, "bn0.beta": False, "bn0.variance": False}

    def test_writing_where_the_data_file_is_not_is_refused(self, tmp_path):
        path, out = self.path(tmp_path), self.path(tmp_path / "elsewhere", "out")
        (tmp_path / "elsewhere").mkdir()
        self.build([self.one()], path)
        with pytest.raises(BnportError, match=r"weights\.bin"):
            self.rewritten(path, out, {"bn0": Change(self.one(seed=5), frozenset(FIELDS))})
        assert os.listdir(tmp_path / "elsewhere") == []


class TestLiveOnnx(LiveContract):
    adapter = "onnx"

    def build(self, records, absent=()):
        return onnx_files.model(records)

    def run(self, model, x):
        return onnx_files.run(model, x)

    def weights(self, model):
        return {"all": model.SerializeToString()}


class TestLiveOnnxOfOpset1(TestLiveOnnx):
    """onnxruntime has no kernel for it: onnx's version converter, then onnxruntime."""

    def build(self, records, absent=()):
        return onnx_files.model(records, opset=1, ir_version=3, is_test=1, consumed_inputs=[0, 0, 0, 1, 1])

    def run(self, model, x):
        made = onnx.version_converter.convert_version(model, 15)
        del made.graph.input[1:]
        return np.concatenate([onnx_files.run(made, row[None]) for row in x])


def test_a_layer_narrower_than_its_model_is_written_in_its_own_type(tmp_path):
    path, out = str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")
    record = telling_record(6, dtype="float16")
    made = onnx_files.model([record])
    for tensor in made.graph.initializer:
        if tensor.name in ("bn0.mean", "bn0.variance"):
            tensor.CopyFrom(onnx_files.raw(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(made, path)
    from bnport.adapters import onnx as adapter

    layer = adapter.read(path)["bn0"]
    assert layer.dtype == "float16"
    new = telling_record(6, seed=1, dtype="float16")
    adapter.write(path, {"bn0": Change(new, frozenset(FIELDS))}, out)
    kinds = [t.data_type for t in onnx.load(out).graph.initializer]
    assert kinds == [t.data_type for t in made.graph.initializer]
    assert adapter.read(out)["bn0"].record == new
    with pytest.raises(BnportError, match="cannot be held as float16"):
        adapter.write(path, {"bn0": Change(telling_record(6), frozenset(FIELDS))}, out)
