"""Numbers written into copies of PyTorch files: torch reads them back, and every other byte is as it was."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from bnport import adapters
from bnport.containers.files import replace_file
from bnport.errors import InvalidValue
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits, telling_record
from tests.adapters.torch_models import chain, norm_of

OLD, NEW = (telling_record(6, seed=s, epsilon=1e-5) for s in (1, 2))
CHANGE = Change(NEW, frozenset(FIELDS))


def written(path, out, changes, **options):
    replace_file(out, lambda new: adapters.load("torch").write(path, changes, new, **options), inputs=[path])
    return out


def saved(value, tmp_path, name="model.pth", **more):
    path = str(tmp_path / name)
    torch.save(value, path, **more)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_only_the_storages_that_change_differ_and_the_checksums_fit(tmp_path, protocol):
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), norm_of(OLD), torch.nn.Linear(6, 2))
    path = saved({"state_dict": model.state_dict(), "epoch": 3}, tmp_path, pickle_protocol=protocol)
    out = written(path, str(tmp_path / "out.pth"), {"1": CHANGE})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out) as new:
        assert new.testzip() is None  # zipfile checks every CRC-32
        differ = [name for name in old.namelist() if old.read(name) != new.read(name)]
        assert old.namelist() == new.namelist()
    assert len(differ) == 4
    assert all("/data/" in name for name in differ)
    theirs = torch.load(out, weights_only=protocol == 2)  # its restricted reader knows protocol 2 only
    assert theirs["epoch"] == 3
    assert theirs["state_dict"]["0.weight"].equal(model[0].weight)
    assert theirs["state_dict"]["1.running_var"].numpy().tobytes() == NEW.variance.tobytes()


def test_a_legacy_stream_differs_only_where_the_numbers_lie(tmp_path):
    path = saved(norm_of(OLD).state_dict(), tmp_path, _use_new_zipfile_serialization=False)
    out = written(path, str(tmp_path / "out.pth"), {"root": Change(NEW, frozenset({"mean"}))})
    with open(path, "rb") as old, open(out, "rb") as new:
        before, after = old.read(), new.read()
    assert before.replace(OLD.mean.tobytes(), NEW.mean.tobytes()) == after
    assert torch.load(out, weights_only=True)["running_mean"].numpy().tobytes() == NEW.mean.tobytes()


def test_a_file_without_checksums_stays_one(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(norm_of(OLD).state_dict(), tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    out = written(path, str(tmp_path / "out.pth"), {"root": CHANGE})
    layers = adapters.read(out)
    assert_same_bits(layers["root"].record, NEW)
    assert any("without checksums" in note for note in layers.notes)
    assert torch.load(out, weights_only=True)["running_var"].numpy().tobytes() == NEW.variance.tobytes()


def test_the_chosen_model_of_a_checkpoint_is_written_and_the_other_is_not(tmp_path):
    path = saved({"model": norm_of(OLD).state_dict(), "ema": norm_of(OLD).state_dict()}, tmp_path)
    out = written(path, str(tmp_path / "out.pth"), {"root": CHANGE}, key="ema")
    theirs = torch.load(out, weights_only=True)
    assert theirs["ema"]["weight"].numpy().tobytes() == NEW.gamma.tobytes()
    assert theirs["model"]["weight"].numpy().tobytes() == OLD.gamma.tobytes()


def test_memory_that_two_layers_share_is_not_changed_behind_anyones_back(tmp_path):
    norm = norm_of(OLD)
    shared = torch.nn.Sequential(norm, torch.nn.ReLU(), norm).state_dict()
    path, out = saved(shared, tmp_path), str(tmp_path / "out.pth")
    with pytest.raises(InvalidValue, match=r"2: .* shares its memory with numbers that are to change"):
        written(path, out, {"0": CHANGE})
    with pytest.raises(InvalidValue, match="shares its memory with another layer that is to get other numbers"):
        written(path, out, {"0": CHANGE, "2": Change(OLD.replace(mean=OLD.mean * 2), frozenset(FIELDS))})
    written(path, out, {"0": CHANGE, "2": CHANGE})
    assert_same_bits(adapters.read(out)["2"].record, NEW)


def test_what_cannot_be_written_in_place_is_refused(tmp_path):
    state = norm_of(OLD).state_dict()
    strided = {**state, "running_mean": torch.zeros(12)[::2]}
    out = str(tmp_path / "out.pth")
    with pytest.raises(InvalidValue, match="mean: is a strided view"):
        written(saved(strided, tmp_path), out, {"root": CHANGE})
    path = saved(state, tmp_path)
    packed = str(tmp_path / "packed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InvalidValue, match="compressed"):
        written(packed, out, {"root": CHANGE})
    for fields, match in (({"epsilon"}, "the file holds none"), ({"momentum"}, "the file holds none")):
        with pytest.raises(InvalidValue, match=match):
            written(path, out, {"root": Change(NEW, frozenset(fields))})
    with pytest.raises(InvalidValue, match="not rounded to the file's float32"):
        written(path, out, {"root": Change(NEW.replace(mean=NEW.mean.astype(np.float64) + 1e-12), frozenset({"mean"}))})
    with pytest.raises(InvalidValue, match="InPlaceABN"):
        written(path, out, {"root": CHANGE}, inplace_abn=True)
    assert not (tmp_path / "out.pth").exists()


def test_safetensors_keep_their_metadata_and_other_tensors(tmp_path):
    path, out = str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")
    state = chain([OLD, NEW]).state_dict()
    safetensors.torch.save_file(state, path, {"note": "kept"})
    written(path, out, {"0": CHANGE})
    theirs = safetensors.torch.load_file(out)
    assert theirs["0.running_mean"].numpy().tobytes() == NEW.mean.tobytes()
    assert all(theirs[name].equal(state[name]) for name in state if not name.startswith("0."))
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"note": "kept"}
