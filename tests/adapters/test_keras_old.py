"""Files of Keras 0.x to 3.0 and of tf.keras, as those versions wrote them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import h5py
import numpy as np
import pytest

import bnport
from bnport.containers.files import replace_file
from bnport.errors import InvalidValue, Question
from bnport.layer import Change
from bnport.record import FIELDS, BatchNorm
from tests.adapters.contract import assert_same_bits, telling_record
from tests.adapters.keras_files import FIXTURES, KERAS, PATHS, THEIRS, assert_is, bits, expected_of, rewritten


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_names_with_slashes_are_read_from_a_legacy_file_and_written(tmp_path, whole, nested):
    """As in the DenseNets of Keras 2, whose first layers are conv1/conv and conv1/bn."""
    import tf_keras

    make = tf_keras.layers
    x = images = tf_keras.Input((4, 4, 3))
    for block in (1, 2):
        x = make.Conv2D(3, 1, use_bias=False, name=f"block{block}/conv")(x)
        x = make.BatchNormalization(name=f"block{block}/bn")(x)
    model = inner = tf_keras.Model(images, x, name="densenet")
    if nested:
        outer = tf_keras.Input((4, 4, 3))
        model = tf_keras.Model(outer, inner(outer))
    path, out = str(tmp_path / "model.h5"), str(tmp_path / "out.h5")
    model.save(path) if whole else model.save_weights(path)
    prefix = "densenet/" if nested else ""
    layers = bnport.read(path)
    assert list(layers) == [f"{prefix}block1/bn", f"{prefix}block2/bn"]
    if whole:
        assert layers[f"{prefix}block2/bn"].kernel.name == f"{prefix}block2/conv"
    records = {f"{prefix}block{k}/bn": telling_record(3, seed=k, epsilon=1e-3) for k in (1, 2)}
    replace_file(
        out, lambda new: KERAS.write(path, {name: Change(r, frozenset(FIELDS)) for name, r in records.items()}, new)
    )
    if whole:
        model = tf_keras.models.load_model(out)
    else:
        model.load_weights(out)
    holder = model.get_layer("densenet") if nested else model
    for k in (1, 2):
        for field, theirs in THEIRS.items():
            held = getattr(holder.get_layer(f"block{k}/bn"), theirs).numpy()
            assert bits(held) == bits(getattr(records[f"{prefix}block{k}/bn"], field))


@pytest.mark.parametrize("name", ["tf213.keras", "tf213.h5", "k305.keras"])
def test_a_full_file_of_an_old_keras_reads_as_that_keras_held_it(name):
    expected = expected_of(name.split(".")[0])
    settings = json.loads(str(expected["settings"]))
    layers = bnport.read(os.path.join(FIXTURES, name))
    assert list(layers) == PATHS
    for path, layer in layers.items():
        assert_is(layer, expected, path)
        assert layer.epsilon == settings[path]["epsilon"]
        assert layer.momentum == settings[path]["momentum"]
        assert not layer.assumed


@pytest.mark.parametrize("name", ["tf213.weights.h5", "k305.weights.h5"])
def test_a_weights_file_of_an_old_keras_has_the_models_order_and_asks_what_three_arrays_are(name):
    source = os.path.join(FIXTURES, name)
    with pytest.raises(Question, match="--absent gamma or --absent beta"):
        bnport.read(source)
    expected = expected_of(name.split(".")[0])
    layers = list(bnport.read(source, absent="beta").values())
    for path, layer in zip(PATHS, layers, strict=True):
        assert layer.assumed == {"epsilon"}
        if path != "fn/fbn2":  # the only one without gamma, taken for one without beta here
            assert_is(layer, expected, path)


def test_a_weights_only_file_of_keras_2_is_matched_by_weight_name():
    expected = expected_of("tf213")
    layers = bnport.read(os.path.join(FIXTURES, "tf213-only.h5"))
    inner = {"fn/deep": "fn/dseq/deep", "td": "td/tbn"}  # what the weight names say
    assert {inner.get(name, name) for name in layers} == set(PATHS)
    for name, layer in layers.items():
        assert_is(layer, expected, inner.get(name, name))
        assert layer.assumed == {"epsilon"}


def test_an_epsilon_that_tensorflow_up_to_2_11_replaced_is_said_with_the_one_it_computed_with(tmp_path):
    source = os.path.join(FIXTURES, "tf211.h5")
    held = np.load(os.path.join(FIXTURES, "tf211.npz"))  # by TensorFlow 2.11 itself
    layers = bnport.read(source)
    for name, used in (("fused", 1.001e-5), ("flat", 1e-6)):
        record, x, y = layers[name].record, held[f"{name} x"], held[f"{name} y"]
        assert record.epsilon == 1e-6
        computed = record.replace(epsilon=used)
        assert (np.abs(computed(x) - y) <= computed.error_bound(x)).all()
        other = record.replace(epsilon=1.001e-5 if used == 1e-6 else 1e-6)
        assert (np.abs(other(x) - y) > other.error_bound(x)).any()
        (note,) = layers[name].notes
        assert (
            "2.11.0: TensorFlow up to 2.11 computes it, on images (4 axes), with epsilon 1.001e-05 instead of 1e-06"
            in note
        )
    for version, epsilon, said in (("2.12.0", 1e-6, False), ("2.2.4-tf", 1e-6, True), ("2.11.0", 1.001e-5, False)):
        out = tmp_path / f"{version}.h5"
        shutil.copy(source, out)
        with h5py.File(out, "r+") as file:
            for holder in (file, file["model_weights"]):
                holder.attrs["keras_version"] = version
            file.attrs["model_config"] = file.attrs["model_config"].replace("1e-06", repr(epsilon))
        assert bool(bnport.read(out)["fused"].notes) == said


@pytest.mark.parametrize("name", ["tf213.keras", "tf213.h5", "k305.keras"])
def test_an_old_file_is_written_without_moving_anything_else(name, tmp_path):
    source, out = os.path.join(FIXTURES, name), tmp_path / name
    layers = bnport.read(source)
    record = telling_record(3, epsilon=0.0625)
    rewritten(source, out, {"fn/fbn": Change(record, frozenset({*FIELDS, "epsilon"}))})
    again = bnport.read(str(out))
    assert_same_bits(again["fn/fbn"].record, record)
    for path, layer in layers.items():
        if path != "fn/fbn":
            assert_same_bits(again[path].record, layer.record)


def keras1(path, version=None, epsilon=None, suffix="_running_std", layer="batchnormalization_1"):
    """As Keras 1 wrote it: a group and weight names without slashes; attributes as byte strings."""
    with h5py.File(path, "w") as file:
        root = file
        if version is not None:
            file.attrs["keras_version"] = np.bytes_(version)
            root = file.create_group("model_weights")
            config = {
                "name": layer,
                "axis": 1,
                "mode": 0,
                "momentum": 0.9,
                "epsilon": epsilon,
                "gamma_regularizer": None,
            }
            value = [{"class_name": "BatchNormalization", "config": config}]
            file.attrs["model_config"] = np.bytes_(json.dumps({"class_name": "Sequential", "config": value}).encode())
        root.attrs["layer_names"] = np.array([layer.encode()])
        group = root.create_group(layer)
        names = [f"{layer}_gamma", f"{layer}_beta", f"{layer}_running_mean", f"{layer}{suffix}"]
        group.attrs["weight_names"] = np.array([n.encode() for n in names])
        for number, name in enumerate(names):
            group[name] = np.float32([number + 1, number + 2, 0.5])
    return str(path)


def test_running_std_of_a_file_that_says_its_keras_is_a_variance(tmp_path):
    layer = bnport.read(keras1(tmp_path / "a.h5", "1.2.2", 1e-3))["batchnormalization_1"]
    assert layer.record.variance.tolist() == [4, 5, 0.5]
    assert (layer.epsilon, layer.momentum) == (1e-3, 0.9)


def test_running_std_of_a_file_that_does_not_say_is_asked_about(tmp_path):
    path = keras1(tmp_path / "a.h5")
    with pytest.raises(Question, match="--stat variance or --stat std"):
        bnport.read(path)
    assert bnport.read(path, stat="variance")["batchnormalization_1"].record.variance.tolist() == [4, 5, 0.5]
    layer = bnport.read(path, stat="std")["batchnormalization_1"]
    assert layer.record.epsilon == 0
    expected = (np.float64([4, 5, 0.5]) + 1e-6) ** 2  # Keras 1.0.5: (x - mean) / (std + epsilon), epsilon 1e-6
    assert np.array_equal(layer.record.variance, expected)
    assert "variance" not in (layer.tensors or {})
    with pytest.raises(InvalidValue, match="stat"):
        bnport.read(path, stat="sd")


def test_keras_1_0_7_is_asked_about_its_backend(tmp_path):
    path = keras1(tmp_path / "a.h5", "1.0.7", 1e-6)
    with pytest.raises(Question, match="--stat variance or --stat root"):
        bnport.read(path)
    record = bnport.read(path, stat="root")["batchnormalization_1"].record
    assert np.array_equal(record.variance, (np.sqrt(np.float64([4, 5, 0.5])) + 1e-6) ** 2)


def test_keras_0_files_hold_the_std_under_numbers(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["nb_layers"] = 2
        for number, arrays in enumerate(([np.ones((3, 2))], [np.float32([1, 2]) + k for k in range(4)])):
            group = file.create_group(f"layer_{number}")
            group.attrs["nb_params"] = len(arrays)
            for k, array in enumerate(arrays):
                group[f"param_{k}"] = array
    record = bnport.read(str(tmp_path / "a.h5"))["layer_1"].record
    assert record.mean.tolist() == [3, 4]
    assert np.array_equal(record.variance, (np.float64([4, 5]) + 1e-6) ** 2)


@pytest.mark.parametrize("name", ["k305.weights.h5", "tf213.weights.h5"])
def test_backslashes_of_windows_are_slashes(name, tmp_path):
    """Keras <= 2.15 on Windows made one group named `layers\\bn` where others made two."""
    source, out = os.path.join(FIXTURES, name), str(tmp_path / "windows.weights.h5")
    with h5py.File(source) as a, h5py.File(out, "w") as b:

        def copy(path, item):
            if isinstance(item, h5py.Dataset):
                layer, _, rest = path.partition("/vars/")
                b.require_group(layer.replace("/", "\\")).require_group("vars")[rest] = item[()]

        a.visititems(copy)
    for absent in ("gamma", "beta"):
        theirs, ours = bnport.read(source, absent=absent), bnport.read(out, absent=absent)
        by_name = {name.replace("\\", "/"): layer for name, layer in ours.items()}
        assert set(by_name) == set(theirs)
        for path, layer in theirs.items():
            assert_same_bits(by_name[path].record, layer.record)
    archive = str(tmp_path / "windows.keras")
    with zipfile.ZipFile(source.replace(".weights.h5", ".keras")) as a, zipfile.ZipFile(archive, "w") as b:
        for member in ("metadata.json", "config.json"):
            b.writestr(member, a.read(member))
        b.write(out, "model.weights.h5")
    expected = expected_of(name.split(".")[0])
    for path, layer in bnport.read(archive).items():
        assert_is(layer, expected, path)


def test_fixtures_are_not_written_to(tmp_path):
    shutil.copy(os.path.join(FIXTURES, "k305.keras"), tmp_path / "a.keras")
    os.chmod(tmp_path / "a.keras", 0o400)
    [layer.record for layer in bnport.read(str(tmp_path / "a.keras")).values()]
    assert BatchNorm(mean=[0.0], variance=[1.0], epsilon=0.1).channels == 1
