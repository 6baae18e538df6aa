"""Custom layers whose config calls their BatchNormalization otherwise than their attributes do, against Keras itself."""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest

import bnport
from bnport.cli import main
from bnport.errors import Question
from bnport.layer import Layer, Layers
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits, telling_record

C = 5


def custom(package, attributes):
    """A layer class that keeps what its config has under `key` in the attribute attributes[key]."""
    K = importlib.import_module(package)

    class Custom(K.layers.Layer):
        def __init__(self, parts=None, **kwargs):
            super().__init__(**kwargs)
            self.keys = list(attributes)
            for key, attribute in attributes.items():
                setattr(self, attribute, kwargs.get(key) or parts[key])

        def build(self, shape):
            for attribute in attributes.values():
                if not getattr(self, attribute).built:
                    getattr(self, attribute).build(shape)
            self.built = True

        def call(self, x):
            for attribute in attributes.values():
                x = getattr(self, attribute)(x, training=False)
            return x

        def get_config(self):
            parts = {
                key: K.saving.serialize_keras_object(getattr(self, attribute)) for key, attribute in attributes.items()
            }
            return {**super().get_config(), **parts}

        @classmethod
        def from_config(cls, given):
            parts = {key: K.saving.deserialize_keras_object(given[key]) for key in attributes}
            return cls(parts, **{key: value for key, value in given.items() if key not in attributes})

    return K.saving.register_keras_serializable("tests_custom")(Custom)


def model_of(package, attributes, flags):
    """A model of two such layers, and the parts of the first and the second by key."""
    K = importlib.import_module(package)
    kind = custom(package, attributes)
    parts = [{key: K.layers.BatchNormalization(**flags[key]) for key in attributes} for _ in range(2)]
    model = K.Sequential([K.Input((C,)), *(kind(each, name=f"block{n}") for n, each in enumerate(parts))])
    random_ = np.random.default_rng(0)
    for each in parts:
        for layer in each.values():
            layer.set_weights([random_.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return K, kind, model, parts


def arrays_of(layer):
    names = {"gamma": layer.gamma, "beta": layer.beta, "mean": layer.moving_mean, "variance": layer.moving_variance}
    return {field: np.array(value) for field, value in names.items() if value is not None}


def port(model, path, out, layers, parts):
    """Write telling records into all layers of the file; the model is changed by Keras to match. Returns x and y of both."""
    pairs, sources = {}, []
    live = [layer for each in parts for layer in each.values()]
    for number, (name, layer) in enumerate(layers.items()):
        record = telling_record(C, seed=number, epsilon=1e-3 if "epsilon" not in layer.stores else 0.01 * (number + 1))
        held = {field: getattr(record, field) for field in FIELDS if field in layer.stores}
        fitting = [k for k in live if np.array(k.moving_mean).tobytes() == layer.record.mean.tobytes()]
        assert len(fitting) == 1
        fitting[0].epsilon = record.epsilon if "epsilon" in layer.stores else layer.epsilon
        if "epsilon" not in layer.stores:
            record = record.replace(epsilon=layer.epsilon)
        fitting[0].set_weights(list(held.values()))
        sources.append(Layer(f"s{number}", channels=C, epsilon=record.epsilon, load=lambda held=held: held))
        pairs[name] = f"s{number}"
    report = bnport.convert(Layers(sources, source="memory", format="records"), path, out, map=pairs)
    assert report.ok
    return np.random.default_rng(1).normal(size=(4, C)).astype(np.float32)


CASES = {
    "an underscore": ({"bn": "_bn"}, {"bn": {"name": "bn", "epsilon": 1e-5}}),
    "other words": ({"inner": "norm_layer"}, {"inner": {"name": "w", "epsilon": 1e-5}}),
    "no gamma": ({"bn": "_bn"}, {"bn": {"name": "bn", "epsilon": 1e-5, "scale": False}}),
    "two by name": ({"a": "z", "b": "y"}, {"a": {"name": "one", "epsilon": 0.1}, "b": {"name": "two", "epsilon": 0.2}}),
    "two by arrays": ({"a": "z", "b": "y"}, {"a": {"name": "n", "epsilon": 0.1, "scale": False, "center": False},
                                              "b": {"name": "n", "epsilon": 0.2}}),
    "two by place": ({"a": "_a", "b": "_b"}, {"a": {"name": "n", "epsilon": 0.1}, "b": {"name": "n", "epsilon": 0.2}}),
    "two of one name": ({"a": "a", "b": "b"}, {"a": {"name": "n", "epsilon": 0.1}, "b": {"name": "n", "epsilon": 0.2}}),
    "swapped": ({"a": "b", "b": "a"}, {"a": {"name": "one", "epsilon": 0.1}, "b": {"name": "two", "epsilon": 0.2}}),
}  # fmt: skip


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
@pytest.mark.parametrize("case", CASES)
def test_the_layers_of_the_config_get_their_own_arrays(tmp_path, package, case):
    if package == "tf_keras" and case in ("two by name", "swapped"):
        pytest.skip("tf_keras stores no names of layers: see the tests of what is not certain")
    attributes, flags = CASES[case]
    K, kind, model, parts = model_of(package, attributes, flags)
    path, out = str(tmp_path / "a.keras"), str(tmp_path / "b.keras")
    model.save(path)
    layers = bnport.read(path)
    assert len(layers) == 2 * len(attributes)
    live = [layer for each in parts for layer in each.values()]
    for keras_layer, layer in zip(live, layers.values(), strict=True):
        assert layer.epsilon == keras_layer.epsilon
        assert not layer.assumed
        assert "epsilon" in layer.stores
        arrays = layer.arrays()
        for field, value in arrays_of(keras_layer).items():
            assert arrays[field].tobytes() == value.tobytes(), field
    x = port(model, path, out, layers, parts)
    loaded = K.models.load_model(out, custom_objects={"Custom": kind})
    assert np.array(loaded(x)).tobytes() == np.array(model(x)).tobytes()


@pytest.mark.parametrize("other", [0.1, 0.2])
@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_what_cannot_be_told_apart_is_not_picked(tmp_path, package, other):
    flags = {"a": {"name": "n", "epsilon": 0.1}, "b": {"name": "n", "epsilon": other}}
    K, kind, model, parts = model_of(package, {"a": "x", "b": "y"}, flags)
    path, out = str(tmp_path / "a.keras"), str(tmp_path / "b.keras")
    model.save(path)
    layers = bnport.read(path)
    assert len(layers) == 4
    live = {np.array(k.moving_mean).tobytes(): k for each in parts for k in each.values()}
    for layer in layers.values():
        keras_layer = live.pop(layer.arrays()["mean"].tobytes())
        assert "epsilon" not in layer.stores
        assert not layer.assumed
        if other == 0.1:  # the same in both, so known
            assert layer.epsilon == keras_layer.epsilon
            assert "all with epsilon 0.1; the file does not say which" in layer.notes[-1]
        else:
            with pytest.raises(
                Question, match=r"one of .*/a, .*/b, with epsilons 0.1, 0.2; the file does not say which"
            ):
                layer.record  # noqa: B018
    if other == 0.1:
        x = port(model, path, out, layers, parts)
        loaded = K.models.load_model(out, custom_objects={"Custom": kind})
        assert np.array(loaded(x)).tobytes() == np.array(model(x)).tobytes()


def test_a_layer_that_the_config_does_not_show_beside_one_of_the_same_name_gets_another_name(tmp_path):
    K, _, model, parts = model_of("keras", {"bn": "bn"}, {"bn": {"name": "bn", "epsilon": 0.1}})
    hidden = K.layers.BatchNormalization(name="bn")
    object.__setattr__(model.layers[0], "more", hidden)  # Keras tracks nothing new in a built layer, but saves it
    hidden.build((None, C))
    hidden.set_weights([np.full(C, k + 1.0) for k in range(4)])
    path = str(tmp_path / "a.keras")
    model.save(path)
    layers = bnport.read(path)
    assert len(layers) == 3
    assert_same_bits(layers["block0/bn"].record, bnport.read(parts[0]["bn"])["bn"].record)
    assert [layer.record.mean[0] for layer in layers.values() if layer.assumed] == [3.0]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize(
    ("settings", "name"), [({"scale": False, "center": False}, "bn_of_two"), ({"scale": False}, "second")]
)
def test_arrays_that_may_be_a_batchnorm_and_are_not_taken_for_one_are_said(tmp_path, suffix, settings, name):
    """Left out on both sides they would be neither written nor compared, without a word."""
    import keras

    @keras.saving.register_keras_serializable("tests_custom")
    class Silent(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.full = keras.layers.BatchNormalization(name="bn")
            self.other = keras.layers.BatchNormalization(name=name, **settings)
            self.ln = keras.layers.LayerNormalization()

        def build(self, shape):
            for layer in (self.full, self.other, self.ln):
                layer.build(shape)

        def call(self, x):
            return self.ln(self.other(self.full(x)))

    model = keras.Sequential([keras.Input((C,)), Silent(name="block")])
    path = str(tmp_path / f"model{suffix}")
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    layers = bnport.read(path)
    assert list(layers) == ["block/bn"]
    (note,) = layers.notes
    assert name in note
    assert "not taken for BatchNormalization" in note
    assert "layer_norm" not in note
    assert note in bnport.verify(path, path).notes


def of_parts(package, base, attributes):
    """A Model or Layer class that keeps the models that its config has under `key` in the attribute attributes[key]."""
    K = importlib.import_module(package)

    class Parts(getattr(K, base, None) or getattr(K.layers, base)):
        def __init__(self, parts, **kwargs):
            super().__init__(**kwargs)
            for key, attribute in attributes.items():
                setattr(self, attribute, parts[key])

        def call(self, x, training=False):
            for attribute in attributes.values():
                x = getattr(self, attribute)(x, training=training)
            return x

        def compute_output_shape(self, shape):
            return shape

        def get_config(self):
            own = {key: K.saving.serialize_keras_object(getattr(self, at)) for key, at in attributes.items()}
            return {**super().get_config(), **own}

        @classmethod
        def from_config(cls, given):
            parts = {key: K.saving.deserialize_keras_object(given.pop(key)) for key in attributes}
            return cls(parts, **given)

    return K.saving.register_keras_serializable("tests_custom")(Parts)


def saved_parts(path, package, base, attributes, epsilons, seed, names=None, channels=C):
    """Save a network of such a Model or Layer; every part is a model with one BatchNormalization called "bn"."""
    K = importlib.import_module(package)
    parts = {}
    for key, epsilon in epsilons.items():
        x = K.Input((channels,))
        bn = K.layers.BatchNormalization(name="bn", epsilon=epsilon)
        parts[key] = K.Model(x, bn(x), name=(names or {}).get(key, key))
    made = of_parts(package, base, attributes)(parts, name="net")
    if base == "Model":
        network = made
        network(np.zeros((1, channels), np.float32))
    else:
        network = K.Sequential([K.Input((channels,)), made])
    chance = np.random.default_rng(seed)
    for key in attributes:
        bn = parts[key].get_layer("bn")
        bn.set_weights([chance.uniform(0.02, 0.3, w.shape).astype(np.float32) for w in bn.get_weights()])
    network.save(path)
    return K.models.load_model(path)


PARTS = {
    "in layers of a Model": ("Model", {"stem": "stem", "stage": "stage"}),
    "in attributes of other names": ("Layer", {"stem": "one", "stage": "two"}),
    "in one another's attributes": ("Layer", {"stem": "stage", "stage": "stem"}),
}


@pytest.mark.parametrize("place", PARTS)
def test_layers_of_one_name_are_told_apart_by_the_names_of_the_models_around_them(tmp_path, place):
    source, target, out, again = (str(tmp_path / f"{name}.keras") for name in ("source", "target", "out", "again"))
    base, attributes = PARTS[place]
    ours = saved_parts(source, "keras", base, attributes, {"stem": 1e-5, "stage": 0.1}, 1)
    theirs = saved_parts(target, "keras", base, attributes, {"stem": 2e-3, "stage": 3e-3}, 2)
    import keras

    x = np.random.default_rng(0).normal(size=(4, C)).astype(np.float32)
    expected = ours.predict(x, verbose=0)
    layers = bnport.read(source)
    assert [layer.epsilon for layer in layers.values()] == [1e-5, 0.1]
    assert not any(layer.assumed or layer.notes for layer in layers.values())
    assert bnport.convert(source, target, out).ok
    assert keras.models.load_model(out).predict(x, verbose=0).tobytes() == expected.tobytes()
    assert bnport.convert(ours, target, again).ok
    assert keras.models.load_model(again).predict(x, verbose=0).tobytes() == expected.tobytes()
    assert bnport.convert(source, theirs).ok
    assert theirs.predict(x, verbose=0).tobytes() == expected.tobytes()


def test_the_same_arrays_with_other_epsilons_in_such_models_are_not_the_same_function(tmp_path):
    one, two = str(tmp_path / "one.keras"), str(tmp_path / "two.keras")
    base, attributes = PARTS["in layers of a Model"]
    first = saved_parts(one, "keras", base, attributes, {"stem": 1e-5, "stage": 0.1}, 1)
    second = saved_parts(two, "keras", base, attributes, {"stem": 2e-3, "stage": 3e-3}, 1)
    x = np.ones((1, C), np.float32)
    assert np.abs(first.predict(x, verbose=0) - second.predict(x, verbose=0)).max() > 0.01
    assert main(["verify", one, two]) == 1
    assert main(["verify", one, one]) == 0


def test_parts_with_equal_settings_are_still_called_by_their_names(tmp_path):
    one, two = str(tmp_path / "one.keras"), str(tmp_path / "two.keras")
    same = {"stem": 0.1, "stage": 0.1}
    saved_parts(one, "keras", *PARTS["in layers of a Model"], same, 1)
    saved_parts(two, "keras", "Model", {"stem": "a_stem", "stage": "a_stage"}, same, 1)  # not under `layers`
    assert list(bnport.read(one)) == list(bnport.read(two)) == ["stem/bn", "stage/bn"]
    assert bnport.verify(one, two).ok


def test_arrays_that_bear_the_whole_name_of_one_layer_are_not_taken_for_another_by_their_place(tmp_path):
    """The config has the model `old` under the key of the attribute where `stage` lies; its own was renamed."""
    import keras

    base = of_parts("keras", "Layer", {"a": "x", "b": "a"})

    @keras.saving.register_keras_serializable("tests_custom")
    class Renaming(base):
        def __init__(self, parts, **kwargs):
            made = parts["a"]
            renamed = type(made).from_config({**made.get_config(), "name": "new"})
            super().__init__({**parts, "a": renamed}, **kwargs)

        def get_config(self):
            own = super().get_config()
            own["a"]["config"]["name"] = "old"
            return own

    def part(name, epsilon):
        x = keras.Input((C,))
        return keras.Model(x, keras.layers.BatchNormalization(name="bn", epsilon=epsilon)(x), name=name)

    made = Renaming({"a": part("old", 0.1), "b": part("stage", 0.2)}, name="net")
    model = keras.Sequential([keras.Input((C,)), made])
    for number, attribute in enumerate(("x", "a")):
        bn = getattr(made, attribute).get_layer("bn")
        bn.set_weights([np.full(C, number + 0.5, np.float32) for _ in range(4)])
    path = str(tmp_path / "a.keras")
    model.save(path)
    loaded = keras.models.load_model(path).layers[0]
    layers = bnport.read(path)
    for part_, name in ((loaded.x, "net/old/bn"), (loaded.a, "net/stage/bn")):
        bn = part_.get_layer("bn")
        assert layers[name].epsilon == bn.epsilon
        assert layers[name].record.mean[0] == np.asarray(bn.moving_mean)[0]
    assert "which alone fit" in layers["net/old/bn"].notes[-1]


def test_epsilons_that_names_do_not_decide_are_asked_for(tmp_path, capsys):
    """tf_keras stores no names: which of the two the arrays belong to is open, on either side."""
    path, out = str(tmp_path / "a.keras"), str(tmp_path / "out.keras")
    epsilons = {"stem": 1e-5, "stage": 0.1}
    live = saved_parts(path, "tf_keras", *PARTS["in attributes of other names"], epsilons, 1)
    said = r"one of net/stem/bn, net/stage/bn, with epsilons 1e-05, 0.1; the file does not say which"
    names = list(bnport.read(path))
    for other in (path, bnport.read(live)):
        pairs = dict(zip(names, names if other is path else bnport.read(live), strict=True))
        back = {there: here for here, there in pairs.items()}
        with pytest.raises(Question, match=said):
            bnport.verify(other, path, map=pairs)
        with pytest.raises(Question, match=said):
            bnport.convert(other, path, out, map=pairs)
        with pytest.raises(Question, match=said):
            bnport.convert(path, path if other is path else live, out if other is path else None, map=back)
    assert not os.path.exists(out)
    with pytest.raises(Question, match=said):
        bnport.save_records(path, str(tmp_path / "r.safetensors"))
    assert main(["show", path]) == 0
    shown = capsys.readouterr().out
    assert "with epsilons 1e-05, 0.1" in shown
    assert "assumed" not in shown
    assert "0.001" not in shown
    assert [layer.epsilon for layer in bnport.read(path, epsilon=0.1).values()] == [0.1, 0.1]  # who knows may say
    assert bnport.verify(path, path, epsilon=0.1, target_epsilon=0.1, map=dict(zip(names, names, strict=True))).ok


def test_of_layers_that_cannot_be_told_apart_only_those_with_other_epsilons_are_asked_about(tmp_path):
    """Two of 5 channels with one epsilon, two of 3 with two: the first two are known, and can be compared."""
    K = importlib.import_module("keras")
    epsilons = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.3}
    attributes = {key: f"z{key}" for key in epsilons}
    kind = custom("keras", attributes)
    parts = {key: K.layers.BatchNormalization(name="n", epsilon=e) for key, e in epsilons.items()}
    for key, layer in parts.items():
        layer.build((None, 5 if key in "ab" else 3))
    made = kind(parts, name="block")
    made.call = lambda x: x
    model = K.Sequential([K.Input((5,)), made])
    path = str(tmp_path / "a.keras")
    model.save(path)
    layers = bnport.read(path)
    assert sorted(layer.epsilon for layer in layers.values() if layer.channels == 5) == [0.1, 0.1]
    for layer in layers.values():
        assert bool(layer.question) == (layer.channels == 3)
    assert bnport.verify(path, path, skip=[name for name, layer in layers.items() if layer.question]).ok


def test_arrays_that_may_be_of_a_layer_that_the_config_does_not_show_are_asked_about(tmp_path):
    """Two layers called n and one n in the config, whose place is not theirs: either may be the one of 0.1."""
    K, _, model, _ = model_of("keras", {"bn": "x"}, {"bn": {"name": "n", "epsilon": 0.1}})
    hidden = K.layers.BatchNormalization(name="n", epsilon=0.2)
    object.__setattr__(model.layers[0], "more", hidden)  # Keras tracks nothing new in a built layer, but saves it
    hidden.build((None, C))
    path = str(tmp_path / "a.keras")
    model.save(path)
    layers = bnport.read(path)
    asked = [layer.question for layer in layers.values() if layer.question]
    assert len(asked) == 2
    assert all("block0/n, with epsilon 0.1, or a layer that the config does not show" in each for each in asked)
    assert layers["block1/n"].epsilon == 0.1


@pytest.mark.parametrize(("suffix", "same"), [(".keras", False), (".keras", True), (".h5", False)])
def test_layers_in_dicts_tuples_and_lists_of_lists_are_found_in_the_config(tmp_path, suffix, same):
    """As Keras serialises an attribute that holds them. `same`: all are called n, and only their place tells."""
    import keras

    @keras.saving.register_keras_serializable("tests_custom")
    class Nested(keras.layers.Layer):
        def __init__(self, parts, **kwargs):
            super().__init__(**kwargs)
            self.parts = parts

        def flat(self):
            return [self.parts["one"]["two"], *self.parts["list"], *self.parts["tuple"][0], self.parts["tuple"][1]]

        def build(self, shape):
            for layer in self.flat():
                if not layer.built:
                    layer.build(shape)
            self.built = True

        def call(self, x):
            for layer in self.flat():
                x = layer(x)
            return x

        def get_config(self):
            return {**super().get_config(), "parts": keras.saving.serialize_keras_object(self.parts)}

        @classmethod
        def from_config(cls, given):
            return cls(keras.saving.deserialize_keras_object(given.pop("parts")), **given)

    def network(epsilons, seed):
        a, b, c, d = (
            keras.layers.BatchNormalization(name="n" if same else f"n{number}", epsilon=epsilon)
            for number, epsilon in enumerate(epsilons)
        )
        parts = {"one": {"two": a}, "list": [b, c], "tuple": ([d], keras.layers.Dense(C, use_bias=False))}
        model = keras.Sequential([keras.Input((C,)), Nested(parts, name="block")])
        chance = np.random.default_rng(seed)
        for layer in (a, b, c, d):
            layer.set_weights([chance.uniform(0.02, 0.3, w.shape).astype(np.float32) for w in layer.get_weights()])
        parts["tuple"][1].set_weights([np.eye(C, dtype=np.float32)])
        return model

    source, target, out = (str(tmp_path / f"{name}{suffix}") for name in ("source", "target", "out"))
    ours = network((0.1, 0.2, 0.3, 0.4), 1)
    ours.save(source)
    network((0.5, 0.6, 0.7, 0.8), 2).save(target)
    layers = bnport.read(source)
    assert [layer.epsilon for layer in layers.values()] == [0.1, 0.2, 0.3, 0.4]
    assert not any(layer.assumed for layer in layers.values())
    assert bnport.convert(source, target, out).ok
    x = np.random.default_rng(0).normal(size=(4, C)).astype(np.float32)
    loaded = keras.models.load_model(out, custom_objects={"Nested": Nested})
    assert loaded.predict(x, verbose=0).tobytes() == ours.predict(x, verbose=0).tobytes()
