"""Layouts of Keras files: nesting, subclasses, shards, answers; old versions: test_keras_old.py."""

from __future__ import annotations

import json
import os
import zipfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

import bnport
from bnport.errors import FormatError, InvalidValue, NotFound, Question
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits, telling_record
from tests.adapters.keras_files import KERAS, rewritten


def nested():
    L = keras.layers
    inner = keras.Sequential([keras.Input((2, 2, 3)), L.BatchNormalization(name="ibn"), L.Conv2D(3, 1)], name="inner")
    inputs = keras.Input((2, 2, 3))
    x = L.BatchNormalization(name="bn", epsilon=1e-5)(L.Conv2D(3, 3, padding="same")(inputs))
    shared = L.BatchNormalization(name="shared", renorm=True)
    model = keras.Model(inputs, shared(inner(shared(x))), name="model")
    random_ = np.random.default_rng(0)
    for layer in model._flatten_layers():
        layer.set_weights([random_.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return model


def test_everything_else_in_a_keras_file_stays_byte_for_byte(tmp_path):
    source, out = tmp_path / "a.keras", tmp_path / "b.keras"
    nested().save(source)
    record = telling_record(3, epsilon=1e-4)
    rewritten(source, out, {"inner/ibn": Change(record, frozenset({*FIELDS, "epsilon", "momentum"}), 0.5)})
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(out) as b:
        assert b.testzip() is None
        assert a.namelist() == b.namelist()
        assert a.read("metadata.json") == b.read("metadata.json")
        old, new = json.loads(a.read("config.json")), json.loads(b.read("config.json"))
        weights = a.read("model.weights.h5"), b.read("model.weights.h5")
        texts = a.read("config.json"), b.read("config.json")
    inner = next(entry for entry in old["config"]["layers"] if entry["config"]["name"] == "inner")
    settings = next(e["config"] for e in inner["config"]["layers"] if e["config"]["name"] == "ibn")
    settings["epsilon"], settings["momentum"] = 1e-4, 0.5
    assert new == old
    assert json.dumps(old).encode() == texts[1] or len(texts[1]) < len(texts[0])
    assert len(weights[0]) == len(weights[1])
    assert sum(x != y for x, y in zip(*weights, strict=True)) <= 4 * 3 * 4
    loaded = keras.models.load_model(out)
    layer = loaded.get_layer("inner").get_layer("ibn")
    assert (layer.epsilon, layer.momentum) == (1e-4, 0.5)
    for variable, field in zip(layer.get_weights(), FIELDS, strict=True):
        assert variable.tobytes() == getattr(record, field).astype(np.float32).tobytes()


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_the_extra_arrays_of_renorm_stay_consistent(tmp_path, suffix):
    source, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    model = nested()
    (model.save_weights if "weights" in suffix else model.save)(source)
    fields = FIELDS if "weights" in suffix else (*FIELDS, "epsilon")
    record = telling_record(3, epsilon=1e-3 if "weights" in suffix else 0.5)
    rewritten(source, out, {"shared": Change(record, frozenset(fields))})
    if "weights" in suffix:
        model.load_weights(out)
    else:
        model = keras.models.load_model(out)
    layer = model.get_layer("shared")
    std = np.sqrt(record.variance.astype(np.float64) + record.epsilon).astype(np.float32)
    assert layer.moving_stddev.numpy().tobytes() == std.tobytes() == layer.renorm_stddev.numpy().tobytes()
    assert layer.renorm_mean.numpy().tobytes() == record.mean.astype(np.float32).tobytes()


def test_a_compressed_archive_and_compressed_arrays_are_rewritten_instead(tmp_path):
    plain, source, out = tmp_path / "p.keras", tmp_path / "a.keras", tmp_path / "b.keras"
    nested().save(plain)
    with zipfile.ZipFile(plain) as a, zipfile.ZipFile(source, "w") as b:
        for name in a.namelist():
            b.writestr(name, a.read(name), zipfile.ZIP_DEFLATED)
    record = telling_record(3, epsilon=0.25)
    change = {"bn": Change(record, frozenset({*FIELDS, "epsilon"}))}
    rewritten(source, out, change)
    loaded = keras.models.load_model(out).get_layer("bn")
    assert loaded.epsilon == 0.25
    assert loaded.get_weights()[2].tobytes() == record.mean.astype(np.float32).tobytes()

    weights, packed, result = (str(tmp_path / f"{n}.weights.h5") for n in "wpr")
    model = nested()
    model.save_weights(weights)
    with h5py.File(weights) as a, h5py.File(packed, "w") as b:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                options = {"compression": "gzip", "chunks": True} if item.shape and item.size else {}
                b.create_dataset(name, data=item[()], **options)
            else:
                b.require_group(name).attrs.update(item.attrs)

        a.visititems(copy)
    before = {n: layer.record for n, layer in bnport.read(weights).items()}
    assert {n: layer.record for n, layer in bnport.read(packed).items()} == before
    rewritten(packed, result, {"bn": Change(record.replace(epsilon=1e-3), frozenset(FIELDS))})
    model.load_weights(result)
    assert model.get_layer("bn").get_weights()[3].tobytes() == record.variance.astype(np.float32).tobytes()
    assert model.get_layer("shared").get_weights()[2].tobytes() == before["shared"].mean.tobytes()


class Unseekable:
    """What zipfile has to stream into: sizes and checksums follow each member."""

    def __init__(self, file):
        self.write = file.write
        self.flush = file.flush


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_was_streamed_is_written_so_that_keras_loads_it(tmp_path, method):
    plain, source, out = (str(tmp_path / f"{n}.keras") for n in "pab")
    model = nested()
    model.save(plain)
    with zipfile.ZipFile(plain) as a, open(source, "wb") as file, zipfile.ZipFile(Unseekable(file), "w", method) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with zipfile.ZipFile(source) as a:
        assert all(info.flag_bits & 8 for info in a.infolist())  # what this test is about
    record = telling_record(3, epsilon=0.0625)
    rewritten(source, out, {"bn": Change(record, frozenset({*FIELDS, "epsilon", "momentum"}), 0.5)})
    with zipfile.ZipFile(out) as b:
        assert b.testzip() is None
    layer = model.get_layer("bn")
    layer.set_weights([getattr(record, field) for field in FIELDS])
    layer.epsilon, layer.momentum = record.epsilon, 0.5
    loaded = keras.models.load_model(out)
    assert (loaded.get_layer("bn").epsilon, loaded.get_layer("bn").momentum) == (0.0625, 0.5)
    x = np.random.default_rng(1).normal(size=(4, 2, 2, 3)).astype(np.float32)
    assert loaded(x).numpy().tobytes() == model(x).numpy().tobytes()


def test_bfloat16_variables_are_read_and_written_in_sixteen_bits(tmp_path):
    source, out = tmp_path / "a.keras", tmp_path / "b.keras"
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn", dtype="bfloat16")])
    model.save(source)
    record = telling_record(3, epsilon=1e-3, dtype="bfloat16")
    layer = bnport.read(str(source))["bn"]
    assert layer.dtype == "bfloat16"
    rewritten(source, out, {"bn": Change(record, frozenset(FIELDS))})
    for got, field in zip(keras.models.load_model(out).get_layer("bn").get_weights(), FIELDS, strict=True):
        assert got.dtype == ml_dtypes.bfloat16
        assert got.astype(np.float32).tobytes() == getattr(record, field).tobytes()
    assert_same_bits(bnport.read(str(out))["bn"].record, record)


def test_mixed_precision_keeps_float32(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn", dtype="mixed_float16")])
    model.save(tmp_path / "a.keras")
    assert bnport.read(str(tmp_path / "a.keras"))["bn"].dtype == "float32"
    assert bnport.read(model)["bn"].dtype == "float32"


def three(folder):
    """A model whose layers lack different things, its weights file, and the arrays of each by their Keras names."""
    L = keras.layers
    flags = {"plain": {}, "one": {"scale": False}, "two": {"center": False}, "norm3": {"scale": False, "renorm": True}}
    model = keras.Sequential([keras.Input((4,)), *(L.BatchNormalization(name=n, **f) for n, f in flags.items())])
    random_ = np.random.default_rng(3)
    for layer in model.layers:
        layer.set_weights([random_.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    path = str(folder / "three.weights.h5")
    model.save_weights(path)
    return model, path


ANSWERS = [
    "one=gamma,two=beta,norm3=gamma",
    "two=beta, *=gamma",
    {"one": "gamma", "two": "beta", "n*": "gamma"},
]


@pytest.mark.parametrize("answers", ANSWERS, ids=str)
def test_each_layer_with_three_arrays_may_lack_something_else(tmp_path, answers):
    model, path = three(tmp_path)
    layers = bnport.read(path, absent=answers)
    live = bnport.read(model)
    assert set(layers) == set(live)
    for name, layer in layers.items():
        assert_same_bits(layer.record, live[name].record)
        assert layer.stores & set(FIELDS) == live[name].stores & set(FIELDS)
    notes = " ".join(layers.notes)
    assert "gamma taken as absent (scale=False), as --absent says, in one, norm3" in notes
    assert "beta taken as absent (center=False), as --absent says, in two" in notes

    out, source = str(tmp_path / "out.weights.h5"), str(tmp_path / "source.keras")
    twin = keras.models.clone_model(model)
    random_ = np.random.default_rng(4)
    for layer in twin.layers:
        layer.set_weights([random_.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    twin.save(source)
    report = bnport.convert(source, path, out, target_options={"absent": answers})
    assert report.ok
    assert "gamma taken as absent" in " ".join(report.notes)
    model.load_weights(out)
    x = random_.normal(size=(5, 4)).astype(np.float32)
    assert model.predict(x, verbose=0).tobytes() == twin.predict(x, verbose=0).tobytes()


def test_one_answer_for_all_says_which_layers_it_was_taken_for(tmp_path):
    _, path = three(tmp_path)
    layers = bnport.read(path, absent="gamma")
    assert "in one, norm3, two" in layers.notes[0].replace("two, norm3", "norm3, two")
    assert "--absent NAME=gamma,NAME=beta" in layers.notes[1]


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        (None, Question, "3 layers hold three arrays"),
        ("one=gamma", Question, r"2 layers hold three arrays \((norm3, two|two, norm3)\).*--absent (two|norm3)=gamma"),
        ("one=gamma,plain=gamma,*=beta", InvalidValue, "plain is no layer of .* with three arrays; there are .*two"),
        ("one=gamma,tvo=beta", InvalidValue, "tvo is no layer"),
        ("one=gamma,x*=beta,*=beta", InvalidValue, r"x\* is no layer"),
        ("o*=gamma,*=beta", InvalidValue, r"one is said to lack both \(o\*=gamma, \*=beta\)"),
        ("one=gamma,one=beta", InvalidValue, "expected gamma, beta, or layers"),
        ("one=mean,*=beta", InvalidValue, "got 'mean' for 'one'"),
        ("one", InvalidValue, "expected gamma, beta, or layers"),
        ("one=gamma,beta", InvalidValue, "expected gamma, beta, or layers"),
        ("", InvalidValue, "expected gamma"),
        ({}, InvalidValue, "expected gamma"),
        ({"one": None}, InvalidValue, "got None for 'one'"),
        (["gamma"], InvalidValue, "expected gamma"),
    ],
)
def test_an_answer_that_does_not_fit_the_file_is_refused(tmp_path, answers, error, words):
    _, path = three(tmp_path)
    with pytest.raises(error, match=words):
        bnport.read(path, absent=answers)


def test_names_for_a_file_that_says_itself_what_is_absent_are_refused(tmp_path):
    model, _ = three(tmp_path)
    for name in ("a.keras", "a.h5"):
        model.save(tmp_path / name)
        with pytest.raises(InvalidValue, match=r"one is no layer of .*; it has none"):
            bnport.read(str(tmp_path / name), absent="one=gamma")


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bn = keras.layers.BatchNormalization(epsilon=0.01)
        self.more = [keras.layers.BatchNormalization(scale=False), keras.layers.LayerNormalization()]

    def build(self, shape):
        self.bn.build(shape)
        [layer.build(shape) for layer in self.more]

    def call(self, x):
        return self.more[1](self.more[0](self.bn(x)))


@keras.saving.register_keras_serializable("tests")
class Mine(keras.layers.BatchNormalization):
    pass


def test_layers_inside_custom_layers_are_found_without_their_code(tmp_path):
    path = str(tmp_path / "a.keras")
    model = keras.Sequential([keras.Input((3,)), Block(name="block"), Mine(name="mine", epsilon=0.5)])
    model.layers[0].bn.set_weights(list(np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 4, 9]])))
    model.save(path)
    with pytest.raises(Question, match="three arrays"):
        bnport.read(path)
    layers = bnport.read(path, absent="gamma")
    assert layers["mine"].epsilon == 0.5
    assert not layers["mine"].assumed
    assert "subclass" in layers["mine"].notes[0]
    first = next(layer for name, layer in layers.items() if layer.record.mean.tolist() == [7, 8, 9])
    assert first.assumed == {"epsilon"}
    assert len(layers) == 3  # LayerNormalization is none


def test_layer_normalization_alone_is_not_taken_for_batch_normalization(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.LayerNormalization(), keras.layers.GroupNormalization(1)])
    for name, save in (("a.keras", model.save), ("a.h5", model.save), ("a.weights.h5", model.save_weights)):
        save(tmp_path / name)
        assert not bnport.read(str(tmp_path / name))
    assert not bnport.read(model)


def test_a_subclassed_models_weights_are_named_by_keras_names(tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.BatchNormalization(name="one")
            self.blocks = [keras.layers.BatchNormalization(name=f"b{i}") for i in range(12)]

        def call(self, x):
            for layer in (self.first, *self.blocks):
                x = layer(x)
            return x

    model = Model()
    model(np.zeros((1, 3), "float32"))
    for i, layer in enumerate(model.blocks):
        layer.set_weights([np.full(3, i + k + 1.0) for k in range(4)])
    model.save_weights(tmp_path / "a.weights.h5")
    layers = bnport.read(str(tmp_path / "a.weights.h5"))
    assert set(layers) == {"one", *(f"b{i}" for i in range(12))}
    for i in range(12):
        assert layers[f"b{i}"].record.mean.tolist() == [i + 3.0] * 3


def test_sharded_weights_are_read_and_their_shards_stay_beside_them(tmp_path):
    model = nested()
    path = str(tmp_path / "a.weights.json")
    model.save_weights(path, max_shard_size=4e-7)
    shards = sorted(name for name in os.listdir(tmp_path) if name.endswith(".h5"))
    assert len(shards) > 1
    layers = bnport.read(path)
    live = bnport.read(model)
    assert {layer.record.mean.tobytes() for layer in layers.values()} == {
        r.record.mean.tobytes() for r in live.values()
    }
    with open(path) as file:
        text = file.read()
    for bad in ("../a.h5", "/etc/a.h5", "sub/a.h5", "..\\\\a.h5"):
        with open(path, "w") as file:
            file.write(text.replace(shards[0], bad))
        with pytest.raises(FormatError, match="beside"):
            bnport.read(path)
    with open(path, "w") as file:
        file.write(text)
    with pytest.raises(FormatError, match="not written; save the target in one file"):
        rewritten(path, tmp_path / "b.weights.json", {})
    with pytest.raises(FormatError, match="not written; save the target in one file"):
        bnport.convert(nested(), path, in_place=True, map={n: n for n in layers})


def test_a_frozen_gamma_changes_the_order_in_the_file_and_not_what_is_read(tmp_path):
    model = nested()
    model.get_layer("bn").gamma.trainable = False
    model.save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        names = list(file["model_weights/bn"].attrs["weight_names"])
    assert names[0] == "bn/beta"  # the fact that this test is about
    live, stored = bnport.read(model), bnport.read(str(tmp_path / "a.h5"))
    for name in live:
        assert_same_bits(stored[name].record, live[name].record)


def test_lists_of_names_split_into_several_attributes_are_put_together(tmp_path):
    inputs = x = keras.Input((2,))
    wanted = {}
    for number in range(40):
        name = f"bn_{number}_" + "n" * 2000
        layer = keras.layers.BatchNormalization(name=name)
        x = layer(x)
        layer.set_weights([np.full(2, number + k + 1.0) for k in range(4)])
        wanted[name] = number + 3.0
    keras.Model(inputs, x).save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert "layer_names1" in file["model_weights"].attrs
    layers = bnport.read(str(tmp_path / "a.h5"))
    assert list(layers) == list(wanted)
    assert all(layers[name].record.mean[0] == mean for name, mean in wanted.items())


@pytest.mark.parametrize("size", [512, 1024, 4096, 1 << 20])
def test_a_user_block_before_the_file_is_read_and_written_around(tmp_path, size):
    source, block, out = (str(tmp_path / f"{n}.h5") for n in "abc")
    model = nested()
    model.save(source)
    with h5py.File(source) as a, h5py.File(block, "w", userblock_size=size) as b:
        for key in a:
            a.copy(key, b)
        b.attrs.update(a.attrs)
    with open(block, "r+b") as file:
        file.write(b"x" * size)
    before = bnport.read(source)
    for name, layer in bnport.read(block).items():
        assert_same_bits(layer.record, before[name].record)
    record = telling_record(3, epsilon=0.5)
    rewritten(block, out, {"bn": Change(record, frozenset({*FIELDS, "epsilon"}))})
    with open(out, "rb") as file:
        assert file.read(size) == b"x" * size
    assert_same_bits(bnport.read(out)["bn"].record, record)
    layer = keras.models.load_model(out).get_layer("bn")
    assert layer.epsilon == 0.5
    assert layer.get_weights()[0].tobytes() == record.gamma.astype(np.float32).tobytes()


def test_only_a_file_named_like_hdf5_is_searched_for_a_large_user_block(tmp_path):
    large = bytes(4096) + b"\x89HDF\r\n\x1a\n" + bytes(100)
    for name, found in (
        ("a.h5", True),
        ("a.HDF5", True),
        ("a.pth", False),
        ("a.mat", False),
        ("a.caffemodel.h5", False),
    ):
        (tmp_path / name).write_bytes(large)
        assert KERAS.recognise(large[:4096], str(tmp_path / name)) is found
    for at in (4095, 4097, 6144, 12288):  # no power of two
        (tmp_path / "b.h5").write_bytes(bytes(at) + large[4096:])
        assert not KERAS.recognise(bytes(4096), str(tmp_path / "b.h5"))
    assert not KERAS.recognise(bytes(4096), str(tmp_path / "a.pth.missing"))


@pytest.mark.parametrize("axis", [[1, 2], [1, 2, 3]])
def test_several_axes_are_refused(axis, tmp_path):
    import tf_keras

    inputs = tf_keras.Input((2, 3, 4))
    model = tf_keras.Model(inputs, tf_keras.layers.BatchNormalization(axis=axis, name="bn")(inputs))
    model.save(tmp_path / "a.keras")
    for source in (model, str(tmp_path / "a.keras")):
        with pytest.raises(FormatError, match="several axes"):
            bnport.read(source)


def test_an_archive_without_weights_says_so(tmp_path):
    nested().save(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as a, zipfile.ZipFile(tmp_path / "b.keras", "w") as b:
        b.writestr("config.json", a.read("config.json"))
    layers = bnport.read(str(tmp_path / "b.keras"))
    assert set(layers) == {"bn", "inner/ibn", "shared"}  # the list needs no weights
    with pytest.raises(NotFound, match="no weights"):
        layers["bn"].record  # noqa: B018


def test_npz_weights_are_not_unpickled(tmp_path):
    model = nested()
    keras.saving.save_model(model, tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as a, zipfile.ZipFile(tmp_path / "b.keras", "w") as b:
        b.writestr("config.json", a.read("config.json"))
        b.writestr("model.weights.npz", b"anything")
    with pytest.raises(NotFound, match="npz"):
        bnport.read(str(tmp_path / "b.keras"))["bn"].record  # noqa: B018
