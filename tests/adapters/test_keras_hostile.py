"""Hostile Keras files: refused in one line within the limits of time and memory, and never executed."""

from __future__ import annotations

import json
import os
import zipfile

import h5py
import numpy as np
import pytest

import bnport
from bnport.errors import BnportError
from tests.hostile import outcome

pytestmark = pytest.mark.core

BN = {"name": "bn", "axis": -1, "momentum": 0.99, "epsilon": 0.001, "center": True, "scale": True}


def entry(config=None, name="BatchNormalization", channels=3, module="keras.layers", **more):
    return {
        "module": module, "class_name": name, "config": {**BN, **(config or {})}, "registered_name": None,
        "build_config": {"input_shape": [None, channels]}, **more,
    }  # fmt: skip


def sequential(*layers):
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": list(layers)}}


def weights(path, arrays=None, where="layers/batch_normalization/vars"):
    if arrays is None:
        arrays = [np.float32([1, 2, 3])] * 4
    with h5py.File(path, "w") as file:
        for number, array in enumerate(arrays):
            file[f"{where}/{number}"] = array
    return str(path)


def archive(folder, config, members=None, name="a.keras", h5=None):
    path = str(folder / name)
    text = config if isinstance(config, str | bytes) else json.dumps(config)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", text)
        file.write(h5 or weights(folder / "w.h5"), "model.weights.h5")
        for member, data in (members or {}).items():
            file.writestr(member, data)
    return path


def here(path):
    """As tests.hostile.outcome, in this process: for what needs no limits."""
    try:
        layers = bnport.read(path)
        [layer.record for layer in layers.values()]
    except BnportError as error:
        return type(error).__name__, str(error)
    return "read", f"{len(layers)} layers"


def refused(path, *words, kind="FormatError", limits=False):
    got, said = (outcome if limits else here)(path)
    assert said.isprintable()
    assert got == kind, said
    assert os.path.basename(path) in said
    for word in words:
        assert word in said, said


def test_the_files_made_here_are_read_when_nothing_is_wrong(tmp_path):
    assert here(archive(tmp_path, sequential(entry()))) == ("read", "1 layers")
    assert here(weights(tmp_path / "a.weights.h5")) == ("read", "1 layers")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"epsilon": "0.001"}, "epsilon"), ({"epsilon": -1}, "epsilon"), ({"epsilon": [1e-3]}, "epsilon"),
        ({"epsilon": None}, "epsilon"), ({"epsilon": True}, "epsilon"), ({"epsilon": float("inf")}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"), ({"epsilon": {"a": 1}}, "epsilon"), ({"epsilon": 10**400}, "digits"),
        ({"axis": "1"}, "axis"), ({"axis": 1.5}, "axis"), ({"axis": [1, 2]}, "several axes"), ({"axis": True}, "axis"),
        ({"axis": 10**9}, "axis"), ({"axis": []}, "axis"), ({"axis": {}}, "axis"),
        ({"scale": "yes"}, "scale"), ({"scale": 1}, "scale"), ({"center": None}, "center"), ({"renorm": "no"}, "renorm"),
        ({"momentum": "x"}, "momentum"), ({"momentum": 1e300}, "momentum"), ({"scale": False}, "3 arrays expected"),
        ({"renorm": True}, "7 arrays expected"), ({"mode": 1}, "mode 1"), ({"mode": "x"}, "mode"),
    ],
)  # fmt: skip
def test_a_config_of_wrong_types_is_refused_by_layer_and_word(tmp_path, config, word):
    refused(archive(tmp_path, sequential(entry(config))), "bn" if word != "digits" else word, word)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("[" * 60_000 + "]" * 60_000, "deep"),
        ('{"a":' * 60_000 + "1" + "}" * 60_000, "deep"),
        ("", "JSON"),
        ("{", "JSON"),
        (b"\xff\xfe", "UTF-8"),
        ("[]", "not the config"),
        ("null", "not the config"),
        ('{"class_name": 1, "config": {}}', "not the config"),
        ('{"class_name": "S", "config": 3}', "not an object"),
        ('{"class_name": "Sequential", "config": {"layers": [1]}}', "entry"),
        ('{"class_name": "Sequential", "config": {"name": "a", "name": "b"}}', "twice"),
        ("[" + "1," * 3_100_000 + "1]", "more than is read"),
        ("9" * 5_000_000, "digits"),
        ('{"class_name": "Sequential", "config": {"a": 1' + "0" * 500 + "}}", "digits"),
        ("{" + ", ".join(f'"{n}": 1' for n in range(300_000)) + ', "299999": 1}', "twice"),
    ],
    ids=range(15),
)
def test_json_that_is_deep_long_or_not_a_model_is_refused(tmp_path, config, word):
    refused(archive(tmp_path, config), word, limits=True)


def test_models_within_models_beyond_all_reason_are_refused(tmp_path):
    model = sequential(entry())
    for _ in range(100):
        model = sequential(model)
    refused(archive(tmp_path, model), "nested more than", limits=True)


def test_lists_within_lists_of_a_layer_beyond_all_reason_are_refused(tmp_path):
    parts = [entry()]
    for number in range(100):
        parts = [parts] if number % 2 else {"parts": parts}
    block = {"module": None, "class_name": "Custom>Block", "config": {"name": "block", "parts": parts}}
    refused(archive(tmp_path, sequential(block)), "nested more than", limits=True)


def test_two_layers_of_one_name_are_refused(tmp_path):
    refused(archive(tmp_path, sequential(entry(), entry())), "two layers are named", "bn")


def test_a_ghost_layer_has_no_numbers(tmp_path):
    refused(archive(tmp_path, sequential(entry(), entry({"name": "ghost"}))), "ghost", "nothing at")


def test_control_characters_in_names_are_escaped(tmp_path):
    path = archive(tmp_path, sequential(entry({"name": "x\x1b[31m\r\n", "epsilon": "bad"})))
    refused(path, "\\x1b", "\\r\\n")


@pytest.mark.parametrize(
    "layer",
    [
        entry(name="Lambda", config={"function": ["4wEAAAAAAAAA", None, None]}),
        entry(name="os>system", config={"command": "touch CANARY"}, module="os"),
        entry(name="system", config={"command": "touch CANARY"}, module="posix", registered_name="os.system"),
    ],
)
def test_code_in_a_config_is_a_name_and_nothing_else(tmp_path, layer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer["config"] = {k: v for k, v in layer["config"].items() if k not in BN} | {"name": "evil"}
    assert here(archive(tmp_path, sequential(layer, entry()))) == ("read", "1 layers")
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ([np.float32([1, 2, 3])] * 3, "4 arrays expected"), ([np.float32([1, 2, 3])] * 5, "4 arrays expected"),
        ([np.float32([1, 2, 3])] * 3 + [np.float32([1, 2])], "different lengths"),
        ([np.float32([[1, 2, 3]])] * 4, "expected shape"), ([np.float32(1)] * 4, "expected shape"),
        ([np.arange(3)] * 4, "floating-point"), ([np.complex64([1, 2, 3])] * 4, "compound"),
        ([np.bytes_(b"abc")] * 4, "text"), ([np.float32([1, 2])] * 4, "3 channels by the config"),
        ([np.zeros(0, "f4")] * 4, "expected shape"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, word):
    refused(archive(tmp_path, sequential(entry()), h5=weights(tmp_path / "w.h5", arrays)), word, "bn")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_numbers_that_no_layer_can_have_are_refused_by_layer(tmp_path, bad):
    arrays = [np.float32([1, 2, 3])] * 3 + [np.float32([1, bad, 3])]
    got, said = here(archive(tmp_path, sequential(entry()), h5=weights(tmp_path / "w.h5", arrays)))
    assert got == "InvalidValue"
    assert "bn: " in said
    assert "channel" in said


def test_a_terabyte_of_weights_is_refused_before_it_is_allocated(tmp_path):
    path = str(tmp_path / "w.h5")
    with h5py.File(path, "w") as file:
        for number in range(4):
            file.create_dataset(f"layers/batch_normalization/vars/{number}", (1 << 40,), "f4")
    refused(archive(tmp_path, sequential(entry(channels=1 << 40)), h5=path), "not in the file", limits=True)


def test_a_linked_variable_is_refused_in_an_archive_too(tmp_path):
    weights(tmp_path / "outside.h5")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["layers/batch_normalization/vars"] = h5py.ExternalLink(str(tmp_path / "outside.h5"), "/layers")
    refused(archive(tmp_path, sequential(entry()), h5=str(tmp_path / "w.h5")), "link to another file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_duplicate_members_are_refused(tmp_path, member):
    refused(archive(tmp_path, sequential(entry()), {member: "{}"}), "twice")


def test_a_compressed_weights_bomb_is_refused(tmp_path):
    path = str(tmp_path / "a.keras")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", json.dumps(sequential(entry())))
        with file.open("model.weights.h5", "w") as member:
            for _ in range(400):
                member.write(bytes(1 << 20))
    refused(path, "at most", limits=True)


def test_a_config_bomb_is_refused(tmp_path):
    path = str(tmp_path / "a.keras")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("config.json", "w") as member:
        for _ in range(200):
            member.write(b" " * (1 << 20))
    refused(path, "at most", limits=True)


def test_a_wrong_crc_is_noticed_in_weights_that_are_small_enough_to_check(tmp_path):
    path = archive(tmp_path, sequential(entry()))
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[data.index(np.float32([1, 2, 3]).tobytes())] ^= 1
    with open(path, "wb") as file:
        file.write(data)
    refused(path, "CRC-32")


# ---- legacy


def legacy(path, *, layers=("bn",), names=("gamma", "beta", "moving_mean", "moving_variance"), config=None, missing=()):
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [name.encode() for name in layers]
        group = root.create_group("bn")
        group.attrs["weight_names"] = [f"bn/{name}:0".encode() for name in names]
        for number, name in enumerate(dict.fromkeys(names)):
            if name not in missing:
                group[f"bn/{name}:0"] = np.float32([1, 2, 3 + number])
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["model_config"] = json.dumps(sequential(entry()) if config is None else config)
    return str(path)


def test_legacy_lists_that_do_not_hold_are_refused(tmp_path):
    assert here(legacy(tmp_path / "a.h5")) == ("read", "1 layers")
    full = ("gamma", "beta", "moving_mean", "moving_variance")
    for number, (word, options) in enumerate(
        {
            "lists 'ghost'": {"layers": ("bn", "ghost")},
            "lists 'bn' twice": {"layers": ("bn", "bn")},
            "twice": {"names": (*full, "gamma")},
            "which is not there": {"missing": ("beta",)},
            "no moving variance": {"names": full[:3]},
            "says it has gamma": {"names": full[1:]},
            "has no arrays": {"names": ("kernel",)},
            "two arrays for gamma": {"names": (*full, "gamma_1")},
            "weights have no arrays for it": {"config": sequential(entry(), entry({"name": "more"}))},
        }.items()
    ):
        word = "weights have no arrays for it" if word == "has no arrays" else word
        refused(legacy(tmp_path / f"b{number}.h5", **options), word)


def test_many_layers_in_one_under_numbered_names_are_paired_in_time(tmp_path):
    """1500 of them took half a minute."""
    names = [f"conv{number}/bn" for number in range(1500)]
    inner = sequential(*(entry({"name": name}) for name in names))
    inner["config"]["name"] = "inner"
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w", libver="latest") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [b"inner"]
        group = root.create_group("inner")
        fields = [
            f"x/{name}_1/{field}:0" for name in names for field in ("gamma", "beta", "moving_mean", "moving_variance")
        ]
        group.attrs["weight_names"] = np.array(fields, "S")
        for field in fields:
            group[field] = np.float32([1, 2, 3])
        file.attrs["model_config"] = json.dumps(sequential(inner))
    assert outcome(path) == ("read", "1500 layers")


def test_a_negative_variance_within_epsilon_is_read(tmp_path):
    """A published MobileNet has -1e-5."""
    arrays = [np.float32([1, 2, 3])] * 3 + [np.float32([-1e-5, 2, 3])]
    assert here(weights(tmp_path / "a.weights.h5", arrays))[0] == "read"


@pytest.mark.parametrize("name", ["a.keras", "a.h5", "a.weights.h5"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(4096)])
def test_a_signature_without_a_file_is_refused(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    refused(str(path))


def test_a_name_listed_twice_among_many_is_found_in_time(tmp_path):
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w", libver="latest") as file:  # an attribute beyond 64 KiB
        file.attrs["layer_names"] = np.array([f"n{number}" for number in (*range(200_000), 199_999)], "S7")
    refused(path, "layer_names lists 'n199999' twice", limits=True)


def test_six_thousand_empty_groups_are_walked_in_time(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        for number in range(20_000):
            file.create_group(f"layers/dense_{number}/vars")
    assert outcome(str(tmp_path / "a.weights.h5")) == ("read", "0 layers")
