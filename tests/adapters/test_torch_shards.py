"""Models in several files, as Hugging Face's save_pretrained makes them: the index is read, a part alone is refused."""

from __future__ import annotations

import collections
import json

import pytest
import safetensors.torch
import torch

from bnport.adapters import read
from bnport.cli import main
from bnport.convert import save_records
from bnport.errors import FormatError, NotFound, OutputError


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        collections.OrderedDict(
            conv1=torch.nn.Conv2d(3, 4, 3), bn1=torch.nn.BatchNorm2d(4), conv2=torch.nn.Conv2d(4, 6, 3),
            bn2=torch.nn.BatchNorm2d(6),
        )
    )  # fmt: skip
    for layer in (net.bn1, net.bn2):
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            torch.nn.init.normal_(tensor)
        torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return net


def split(state, folder, kind, cut=3):
    """The state dict in two parts, cut within bn1, and their index; returns the index's path."""
    names = list(state)
    stem, end, save = {
        "safetensors": ("model", "safetensors", safetensors.torch.save_file),
        "bin": ("pytorch_model", "bin", torch.save),
    }[kind]
    parts = {f"{stem}-0000{i + 1}-of-00002.{end}": part for i, part in enumerate((names[:cut], names[cut:]))}
    for part, held in parts.items():
        save({name: state[name] for name in held}, str(folder / part))
    where = {name: part for part, held in parts.items() for name in held}
    index = folder / f"{stem}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}, indent=2, sort_keys=True))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_layer_whose_arrays_lie_in_two_parts_is_read_whole(model, tmp_path, kind):
    state = model.state_dict()
    layers = read(str(split(state, tmp_path, kind)))
    assert list(layers) == ["bn1", "bn2"]
    for name, layer in layers.items():
        for theirs, ours in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "mean"),
            ("running_var", "variance"),
        ):
            assert layer.arrays()[ours].tobytes() == state[f"{name}.{theirs}"].numpy().tobytes()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_part_alone_is_refused_and_the_index_named(model, tmp_path, kind):
    index = split(model.state_dict(), tmp_path, kind)
    for part in sorted(tmp_path.glob("*-of-*")):
        with pytest.raises(FormatError, match=f"one of 2 parts of a model.*give the index, {index};? ?"):
            read(str(part))
    index.unlink()
    with pytest.raises(FormatError, match="which is not there"):
        read(str(part))


def test_a_file_that_is_the_only_part_is_read(model, tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    safetensors.torch.save_file(model.state_dict(), str(path))
    assert list(read(str(path))) == ["bn1", "bn2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"bn1.bias": "../model-00001-of-00002.safetensors"}), "does not lie beside it"),
        (lambda m: m.update({"bn1.bias": "/etc/passwd"}), "does not lie beside it"),
        (lambda m: m.update({"bn1.bias": "a\\b"}), "does not lie beside it"),
        (lambda m: m.update({"bn1.bias": ""}), "does not lie beside it"),
        (lambda m: m.update({"bn1.bias": 1}), "not an index"),
        (lambda m: m.clear(), "not an index"),
        (lambda m: m.update({"bn1.extra": "model-00001-of-00002.safetensors"}), "'bn1.extra' is not in model-00001"),
        (lambda m: m.update({"bn1.bias": "model-00001-of-00002.safetensors"}), "'bn1.bias' is not in model-00001"),
    ],
)
def test_an_index_that_is_not_what_it_should_be_is_refused(model, tmp_path, change, message):
    index = split(model.state_dict(), tmp_path, "safetensors")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        read(str(index))


TWICE = '{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}'


@pytest.mark.parametrize("text", ["{", "{}", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": {}}}', TWICE])
def test_other_json_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"not (an index|a model file)"):
        read(str(path))


def test_a_missing_part_is_said(model, tmp_path):
    index = split(model.state_dict(), tmp_path, "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFound, match=r"model-00002-of-00002\.safetensors: no such file"):
        read(str(index))


def test_a_part_that_holds_a_module_is_refused(model, tmp_path):
    index = split(model.state_dict(), tmp_path, "bin")
    torch.save(model, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(FormatError, match="should hold a plain state dict"):
        read(str(index))


@pytest.mark.parametrize("name", ["a\ud800.bin", "a\ud800.safetensors"])
def test_a_part_whose_name_no_file_can_have_is_not_there(tmp_path, name):
    (tmp_path / "model.bin.index.json").write_text(json.dumps({"weight_map": {"bn.weight": name}}))
    with pytest.raises(NotFound, match=r"a\\ud800\.\w+: no such file"):
        read(str(tmp_path / "model.bin.index.json"))


def test_names_that_no_file_can_have_are_refused_in_words(model, tmp_path):
    for name in ("a\0.pth", "a\ud800.pth"):
        with pytest.raises(NotFound, match="no such file"):
            read(str(tmp_path / name))
        with pytest.raises(OutputError, match="no file can have this name"):
            save_records(model, str(tmp_path / f"{name}.safetensors"))


def test_an_index_is_no_target(model, tmp_path, capsys):
    index, source = split(model.state_dict(), tmp_path, "bin"), tmp_path / "other.pth"
    torch.save({name: value * 1.5 for name, value in model.state_dict().items()}, source)
    for more in (["-o", str(tmp_path / "out.index.json")], ["--in-place"]):
        assert main(["convert", str(source), str(index), *more]) == 2
        assert "read, not written; save it as one file" in capsys.readouterr().err
    assert not (tmp_path / "out.index.json").exists()


@pytest.mark.parametrize(("lacking", "taken"), [("weight", "gamma = 1"), ("bias", "beta = 0")])
def test_half_of_the_parameters_is_said(model, tmp_path, lacking, taken):
    state = model.state_dict()
    del state[f"bn1.{lacking}"]
    torch.save(state, tmp_path / "half.pth")
    layers = read(str(tmp_path / "half.pth"))
    assert any(f"no {lacking}: {taken} is taken" in note for note in layers["bn1"].notes)
    assert not any("is taken" in note for note in layers["bn2"].notes)
