"""The record file: everything a layer is survives it bit for bit, and no damage to it goes unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open

from bnport import adapters
from bnport.adapters import records
from bnport.convert import save_records
from bnport.errors import BnportError, FormatError, InvalidValue
from bnport.layer import Change, Kernel, Layer, Layers
from tests.adapters.contract import FileContract, telling_record

THEIRS = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}


def torch_module(record, absent=()):
    module = torch.nn.BatchNorm1d(record.channels, eps=record.epsilon).eval()
    with torch.no_grad():
        for ours, theirs in THEIRS.items():
            getattr(module, theirs).copy_(torch.from_numpy(np.array(getattr(record, ours))))
    return module


def as_layer(name, module, absent=()):
    arrays = {
        ours: getattr(module, theirs).detach().numpy() for ours, theirs in THEIRS.items() if ours not in absent
    }  # fmt: skip
    return Layer(
        name, channels=len(arrays["mean"]), epsilon=module.eps, momentum=1 - module.momentum, load=lambda: arrays,
        stores={*arrays, "epsilon", "momentum"},
    )  # fmt: skip


class TestRecords(FileContract):
    adapter = "records"
    suffix = ".safetensors"
    optional = (("gamma",), ("beta",), ("gamma", "beta"))

    def build(self, records_, path, absent=()):
        layers = [as_layer(f"bn{i}", torch_module(r), absent) for i, r in enumerate(records_)]
        records.save(Layers(layers, source="a torch model", format="torch"), path)

    def run(self, path, x):
        arrays = safetensors.numpy.load_file(path)
        with safe_open(path, "np") as file:
            (entry,) = json.loads(file.metadata()["layers"])
        held = {
            theirs: torch.from_numpy(arrays[f"bn0.{ours}"])
            for ours, theirs in THEIRS.items()
            if f"bn0.{ours}" in arrays
        }
        return torch.nn.functional.batch_norm(torch.from_numpy(x), **held, eps=entry["epsilon"]).numpy()

    def others(self, path):
        with safe_open(path, "np") as file:
            return {key: value.encode() for key, value in file.metadata().items() if key.startswith("source")}


class TestRecordsInFloat16(TestRecords):
    """Of a half-precision source: the record stays as narrow, its float32 values exactly those of the source."""

    dtype = "float16"

    def build(self, records_, path, absent=()):
        layers = []
        for i, r in enumerate(records_):
            half = {f: getattr(r, f).astype(np.float16) for f in THEIRS if f not in absent}
            layers.append(
                Layer(f"bn{i}", channels=r.channels, epsilon=r.epsilon, load=lambda half=half: half, dtype="float16")
            )
        records.save(Layers(layers, source="x", format="torch"), path)

    def run(self, path, x):
        arrays = {name: array.astype(np.float32) for name, array in safetensors.numpy.load_file(path).items()}
        with safe_open(path, "np") as file:
            (entry,) = json.loads(file.metadata()["layers"])
        held = {
            theirs: torch.from_numpy(arrays[f"bn0.{ours}"])
            for ours, theirs in THEIRS.items()
            if f"bn0.{ours}" in arrays
        }
        return torch.nn.functional.batch_norm(torch.from_numpy(x), **held, eps=entry["epsilon"]).numpy()


def saved(tmp_path, *layers, source="model"):
    path = str(tmp_path / "r.safetensors")
    records.save(Layers(layers, source=source, format="torch"), path)
    return path


def layer(name="bn", record=None, **settings):
    record = record or telling_record()
    arrays = {f: getattr(record, f) for f in THEIRS}
    return Layer(name, channels=record.channels, epsilon=record.epsilon, load=lambda: arrays, **settings)


def test_everything_known_about_a_layer_survives(tmp_path):
    first = layer(
        "блок.1/bn", momentum=0.9, assumed={"epsilon", "momentum"}, kernel=Kernel("conv", (7, 3, 3, 3), "conv1.weight"),
        inputs=("a", "b"), notes=("training mode",),
    )  # fmt: skip
    second = layer("a", telling_record(3, epsilon=0.1), inputs=())
    read = records.read(saved(tmp_path, first, second))
    assert list(read) == ["блок.1/bn", "a"]
    for name in ("name", "epsilon", "momentum", "assumed", "kernel", "inputs", "notes", "channels", "dtype"):
        assert getattr(read["блок.1/bn"], name) == getattr(first, name)
    assert read["a"].momentum is None
    assert read["a"].inputs == ()
    assert read["a"].kernel is None


def test_the_source_file_is_named_and_its_sha256_kept(tmp_path):
    source = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(torch_module(telling_record(3, epsilon=1e-5))).eval(), source)
    path = str(tmp_path / "a.safetensors")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert save_records(source, path).sha256 == {str(source): digest}
    assert records.read(path).notes == (f"records of model.pth (sha256 {digest})",)
    assert save_records(source, path, force=True, sha256=False).sha256 == {}
    assert records.read(path).notes == ("records of model.pth",)


def test_the_same_layers_give_the_same_bytes(tmp_path):
    one = Path(saved(tmp_path, layer(), layer("b"))).read_bytes()
    assert one == Path(saved(tmp_path, layer(), layer("b"))).read_bytes()


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = saved(tmp_path, layer(record=telling_record(3)), layer("c", telling_record(2)))
    good = Path(path).read_bytes()
    expected = {name: each.record for name, each in records.read(path).items()}
    size = int.from_bytes(good[:8], "little")
    bad = str(tmp_path / "bad.safetensors")
    unnoticed = 0
    for position in [*range(8, 8 + size, 3), *range(8 + size, len(good))]:
        mutant = bytearray(good)
        mutant[position] ^= 1 << (position % 8)
        Path(bad).write_bytes(mutant)
        try:
            read = {name: each.record for name, each in records.read(bad).items()}
        except BnportError:
            continue
        else:
            assert read == expected, position
            unnoticed += 1
    assert unnoticed <= 9, "only padding and the like may change"


def test_a_listing_through_tensors_is_checked_too(tmp_path):
    path = saved(tmp_path, layer())
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)
    (read,) = records.read(path).values()
    with pytest.raises(FormatError, match=r"r\.safetensors: bn: the checksum of its arrays is wrong"):
        read.tensors["gamma"].array()


def test_an_edited_epsilon_is_refused(tmp_path):
    path = saved(tmp_path, layer(record=telling_record(epsilon=0.0025)))
    data = Path(path).read_bytes()
    assert data.count(b"0.0025") == 1
    Path(path).write_bytes(data.replace(b"0.0025", b"0.0026"))
    with pytest.raises(FormatError, match="checksum of its metadata"):
        records.read(path)


def test_numbers_that_are_no_batchnorm_are_not_saved(tmp_path):
    bad = Layer("bn7", channels=1, epsilon=0.0, load=lambda: {"mean": np.zeros(1), "variance": np.zeros(1)})
    with pytest.raises(InvalidValue, match="bn7: variance"):
        saved(tmp_path, bad)


def test_other_safetensors_files_are_not_taken_for_records(tmp_path):
    path = str(tmp_path / "model.safetensors")
    safetensors.numpy.save_file({"bn.mean": np.zeros(3, np.float32)}, path, metadata={"format": "pt"})
    assert not records.recognise(adapters.read_head(path), path)
    with pytest.raises(FormatError, match="not a record file"):
        records.read(path)


def rewritten(path, **changes):
    """The file with other metadata, and a checksum that fits it: what an attacker would write."""
    arrays = safetensors.numpy.load_file(path)
    with safe_open(path, "np") as file:
        metadata = {**file.metadata(), **changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    digest = hashlib.sha256()
    for key in sorted(set(metadata) - {"checksum"}):
        digest.update(f"{key} {len(metadata[key].encode())}\n".encode() + metadata[key].encode())
    safetensors.numpy.save_file(arrays, path, metadata={**metadata, "checksum": digest.hexdigest()})


ENTRY = {"name": "bn", "epsilon": 0.001, "dtype": "float32", "sha256": "0" * 64}
EVIL = {
    "newer version": ({"version": "2"}, "version 2"),
    "no layers": ({"layers": None}, "not JSON"),
    "not JSON": ({"layers": "{"}, "not JSON"),
    "deep": ({"layers": "[" * 100_000}, "nested too deeply"),
    "a key twice": ({"layers": '[{"name": "a", "name": "b"}]'}, "name is twice"),
    "an object": ({"layers": "{}"}, "should be a list"),
    "numbers": ({"layers": "[1]"}, "should be a list"),
    "no name": ({"layers": json.dumps([{**ENTRY, "name": 3}])}, "each with name"),
    "unknown layer": ({"layers": json.dumps([{**ENTRY, "name": "x"}])}, "x: its mean or variance is missing"),
    "layer twice": ({"layers": json.dumps([ENTRY, ENTRY])}, "two layers have the same name"),
    "no layer for arrays": ({"layers": "[]"}, "belongs to no layer"),
    "epsilon text": ({"layers": json.dumps([{**ENTRY, "epsilon": "1e-3"}])}, "epsilon: expected a number"),
    "epsilon missing": ({"layers": json.dumps([{k: v for k, v in ENTRY.items() if k != "epsilon"}])}, "epsilon"),
    "epsilon infinite": ({"layers": json.dumps([{**ENTRY, "epsilon": float("inf")}])}, "epsilon"),
    "epsilon negative": ({"layers": json.dumps([{**ENTRY, "epsilon": -1}])}, "epsilon"),
    "momentum text": ({"layers": json.dumps([{**ENTRY, "momentum": "0.9"}])}, "momentum should be a number"),
    "kernel": ({"layers": json.dumps([{**ENTRY, "kernel": ["conv", "3", "x"]}])}, "kernel should be"),
    "inputs": ({"layers": json.dumps([{**ENTRY, "inputs": [1]}])}, "inputs should be"),
    "dtype": ({"layers": json.dumps([{**ENTRY, "dtype": "int8"}])}, "not floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVIL)
def test_a_forged_description_is_refused_with_one_line(tmp_path, case):
    path = saved(tmp_path, layer())
    changes, message = EVIL[case]
    rewritten(path, **changes)
    with pytest.raises(FormatError, match=r"r\.safetensors") as caught:
        records.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_saved_again_by_the_safetensors_library_still_reads(tmp_path):
    original = layer()
    path = saved(tmp_path, original)
    rewritten(path)
    assert records.read(path)["bn"].record == original.record


DIGITS = Path(__file__).parent.parent.parent / "fixtures" / "digits"


@pytest.mark.parametrize("name", ["digits.pth", "digits-module.pt", "digits.safetensors"])
def test_a_port_by_way_of_records_is_the_direct_port_byte_for_byte(name, tmp_path):
    """Recorded where PyTorch files are, written where Keras is: pairing evidence survives, too."""
    import bnport

    bnport.save_records(DIGITS / name, tmp_path / "records.safetensors")
    bnport.convert(DIGITS / name, DIGITS / "twin.keras", tmp_path / "direct.keras")
    report = bnport.convert(tmp_path / "records.safetensors", DIGITS / "twin.keras", tmp_path / "by-records.keras")
    assert report.ok
    assert (tmp_path / "direct.keras").read_bytes() == (tmp_path / "by-records.keras").read_bytes()


def test_an_assumed_epsilon_stays_assumed_until_somebody_says_it(tmp_path):
    import bnport

    bnport.save_records(DIGITS / "digits.pth", tmp_path / "a.safetensors")
    assert all("epsilon" in layer.assumed for layer in records.read(str(tmp_path / "a.safetensors")).values())
    bnport.save_records(DIGITS / "digits.pth", tmp_path / "b.safetensors", epsilon=1e-3)
    told = records.read(str(tmp_path / "b.safetensors"))
    assert {(layer.epsilon, layer.assumed) for layer in told.values()} == {(1e-3, frozenset())}


def test_a_source_whose_name_is_no_text_is_named_with_escapes(tmp_path):
    source = f"{tmp_path}/caf\udce9.pt"  # Latin-1 on Linux
    torch.save(torch.nn.Sequential(torch_module(telling_record(3, epsilon=1e-5))).eval(), source)
    save_records(source, f"{tmp_path}/a.safetensors")
    (note,) = adapters.read(f"{tmp_path}/a.safetensors").notes
    assert r"caf\udce9.pt" in note.replace("\\\\", "\\")


def test_a_layer_whose_name_is_no_text_is_refused(tmp_path):
    layers = Layers([as_layer("bn\ud800", torch_module(telling_record(3, epsilon=1e-5)))], source="m", format="torch")
    with pytest.raises(InvalidValue, match="no character"):
        save_records(layers, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_that_the_source_was_sorted_by_name_is_kept(tmp_path):
    from safetensors.torch import save_file

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    for path, ordered in (("net.pth", True), ("net.safetensors", False)):
        (torch.save if ordered else save_file)(net.state_dict(), str(tmp_path / path))
        layers = adapters.read(str(tmp_path / path))
        assert layers.ordered is ordered
        records.save(layers, str(tmp_path / "records.safetensors"))
        assert records.read(str(tmp_path / "records.safetensors")).ordered is ordered
        change = Change(layers["1"].record, frozenset(("gamma",)))
        records.write(str(tmp_path / "records.safetensors"), {"1": change}, str(tmp_path / "changed.safetensors"))
        assert records.read(str(tmp_path / "changed.safetensors")).ordered is ordered
