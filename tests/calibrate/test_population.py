"""The population method against prefix passes (bit for bit) and against a two-pass reference in extended precision."""

from __future__ import annotations

import os

import numpy as np
import pytest

import bnport
from bnport.calibrate.run import calibrate
from bnport.errors import InvalidValue, NotFound, OutputError, Unrepresentable
from tests.calibrate import nets
from tests.calibrate.nets import L, keras


def stored(model):
    return {layer.name: (layer.moving_mean.numpy(), layer.moving_variance.numpy()) for layer in nets.norms(model)}


def test_carrying_the_frontier_gives_the_bits_of_one_prefix_pass_per_layer():
    model, x = nets.branches(), nets.data()
    result = calibrate(model, x, batch_size=16)
    ours = {name: (m.copy(), v.copy()) for name, (m, v) in stored(model).items()}
    result.undo()
    plain = nets.prefix_passes(model, x, 16)
    assert set(plain) == set(ours) == {"stem", "left", "right", "joined", "fine"}
    for name, (mean, variance) in plain.items():
        assert mean.tobytes() == ours[name][0].tobytes(), name
        assert variance.tobytes() == ours[name][1].tobytes(), name


def test_branches_that_do_not_depend_on_each_other_share_a_round():
    assert calibrate(nets.branches(), nets.data(), batch_size=16).rounds == 4  # for five layers


@pytest.mark.parametrize("make", [nets.branches, nets.nested])
def test_every_layer_holds_the_statistics_of_what_reaches_it_at_inference(make):
    model, x = make(), nets.data()
    calibrate(model, x, batch_size=16)
    nets.close_to_two_pass(model, x)


def test_a_subclassed_model_gets_the_same_bits_as_the_functional_one_with_its_layers():
    functional, x = nets.branches(), nets.data()
    model = nets.Subclassed(functional)
    model(x[:2])
    result = calibrate(functional, x, batch_size=16)
    expected = {name: (m.copy(), v.copy()) for name, (m, v) in stored(functional).items()}
    result.undo()
    result = calibrate(model, x, batch_size=16)
    assert result.rounds == 5
    assert any("subclassed" in note for note in result.notes)
    for name, (mean, variance) in stored(model).items():
        assert mean.tobytes() == expected[name][0].tobytes(), name
        assert variance.tobytes() == expected[name][1].tobytes(), name


def test_a_layer_used_by_two_towers_pools_what_both_see():
    rng = np.random.default_rng(3)
    model = nets.siamese()
    x = {"a": rng.normal(4, 1, (70, 6)).astype("f4"), "b": rng.normal(-4, 3, (70, 6)).astype("f4")}
    result = calibrate(model, x, batch_size=16)
    assert result["tower/first"].n == 140
    np.testing.assert_allclose(result["tower/first"].mean, np.concatenate([x["a"], x["b"]]).mean(0), rtol=1e-5)
    nets.close_to_two_pass(model, x)


def test_a_shared_layer_that_feeds_itself_is_refused_before_any_data_is_read():
    i = keras.Input((5,))
    shared = L.BatchNormalization(name="again")
    model = keras.Model(i, shared(L.Dense(5)(shared(i))))

    def never():
        raise AssertionError("read")
        yield

    with pytest.raises(Unrepresentable, match=r"again: used several times, and one use feeds another.*precise"):
        calibrate(model, never())
    result = calibrate(model, nets.data(40, (5,)), method="precise")
    assert result["again"].n == 80


class TwiceApart(L.Layer):
    """One BatchNorm called twice on inputs that do not depend on each other, another one in between."""

    def __init__(self, chained, **kwargs):
        super().__init__(**kwargs)
        self.chained = chained
        self.shared, self.other = L.BatchNormalization(name="shared"), L.BatchNormalization(name="other")

    def build(self, shape):
        self.shared.build(shape)
        self.other.build(shape)

    def call(self, x, training=None):
        first = self.shared(x, training=training)
        middle = self.other(first * 2 + 1, training=training)
        return middle + self.shared(first if self.chained else x * x, training=training)


def test_inside_a_custom_layer_calls_are_told_apart_by_what_depends_on_what():
    i = keras.Input((5,))
    model = nets.stir(keras.Model(i, L.BatchNormalization(name="end")(TwiceApart(False)(L.Dense(5)(i)))))
    x = nets.data(70, (5,))
    result = calibrate(model, x, batch_size=16)
    assert {layer.name.split("/")[-1]: layer.n for layer in result.layers} == {"shared": 140, "other": 70, "end": 70}
    nets.close_to_two_pass(model, x)
    chained = nets.stir(keras.Model(i, TwiceApart(True)(i)))
    before = nets.held(chained)
    with pytest.raises(Unrepresentable, match="shared"):
        calibrate(chained, x)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(chained), strict=True))


def test_padding_that_a_mask_hides_does_not_count():
    i = keras.Input((6,), dtype="int32")
    x = L.Embedding(20, 4, mask_zero=True)(i)
    x = L.BatchNormalization(name="one")(x)
    x = L.BatchNormalization(name="two")(L.ReLU()(x))
    model = nets.stir(keras.Model(i, x))
    tokens = np.random.default_rng(0).integers(0, 20, (40, 6)).astype("int32")
    tokens[:, 4:] = 0
    result = calibrate(model, tokens, batch_size=16)
    assert result["one"].n == int((tokens != 0).sum()) < 160
    # Keras' own masked moments: momentum 0 and everything in one batch. "one" first: "two" then sees the population's
    for name in ("one", "two"):
        layer = model.get_layer(name)
        layer.momentum = 0.0
        y, mask = keras.Model(i, layer.input)(tokens, training=False)
        layer.call(y, mask=mask, training=True)
        np.testing.assert_allclose(layer.moving_mean.numpy(), result[name].mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance.numpy(), result[name].variance, rtol=1e-5)
        layer.moving_mean.assign(result[name].mean.astype("f4"))
        layer.moving_variance.assign(result[name].variance.astype("f4"))


def test_channels_first_and_other_ranks():
    i = keras.Input((3, 9, 4))
    x = L.BatchNormalization(axis=1, name="first")(i)
    x = L.BatchNormalization(axis=2, name="middle")(x)
    x = L.BatchNormalization(axis=-1, name="last")(L.Reshape((27, 4))(x))
    model = nets.stir(keras.Model(i, x))
    data = nets.data(50, (3, 9, 4))
    calibrate(model, data, batch_size=16)
    nets.close_to_two_pass(model, data)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (10, 0.1), (1e3, 1), (1e4, 1), (1e4, 0.05)])
def test_the_error_stays_below_a_millionth_whatever_the_mean(mean, std):
    i = keras.Input((4,))
    model = keras.Model(i, L.BatchNormalization(name="bn")(i))
    x = nets.data(512, (4,), mean, std)  # batches of 50, the last of 12, of another distribution
    for method in ("population", "precise"):
        result = calibrate(model, x, batch_size=50, method=method)
        want_mean, want_variance = nets.two_pass([x])
        np.testing.assert_allclose(result["bn"].variance, want_variance, rtol=1e-6)
        # the stored float32 is what limits the mean
        assert np.all(
            np.abs(result["bn"].mean - want_mean) <= np.spacing(np.abs(want_mean).astype("f4")) / 2 + 1e-6 * std
        )
        result.undo()


def test_unbiased_divides_by_n_minus_one_and_is_said():
    i = keras.Input((4,))
    model, x = keras.Model(i, L.BatchNormalization(name="bn")(i)), nets.data(40, (4,))
    result = calibrate(model, x, unbiased=True)
    np.testing.assert_allclose(result["bn"].variance, x.astype(float).var(axis=0, ddof=1), rtol=1e-6)
    assert "unbiased" in str(result)
    assert result.to_dict()["variance"] == "unbiased"


def test_a_memory_budget_of_nothing_spills_to_disk_and_changes_no_bit(tmp_path):
    model, x = nets.branches(), nets.data()
    result = calibrate(model, x, batch_size=16)
    expected = nets.held(model)
    assert result.spilled == 0 < result.resident
    result.undo()
    result = calibrate(model, x, batch_size=16, memory=0, spill=str(tmp_path))
    assert result.resident == 0 < result.spilled
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(model), strict=True))
    assert os.listdir(tmp_path) == []
    result.undo()
    half = calibrate(model, x, batch_size=16, memory="20kB", spill=str(tmp_path))
    assert 0 < half.resident <= 20_000
    assert half.spilled > 0
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(model), strict=True))


def test_a_spill_folder_that_is_not_there_is_an_error_that_changes_nothing(tmp_path):
    model = nets.branches()
    before = nets.held(model)
    for memory in (0, None):  # also where nothing would be spilled
        with pytest.raises(OutputError, match="absent: no such folder"):
            calibrate(model, nets.data(), memory=memory, spill=str(tmp_path / "absent"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))


def test_mixed_precision_keeps_float32_statistics_of_what_reaches_the_layers():
    i = keras.Input((8, 8, 3))
    policy = {"dtype": "mixed_bfloat16"}
    x = L.BatchNormalization(name="one", **policy)(L.Conv2D(4, 3, **policy)(i))
    x = L.BatchNormalization(name="two", **policy)(L.Conv2D(4, 3, **policy)(L.ReLU(**policy)(x)))
    model, x = nets.stir(keras.Model(i, x)), nets.data()
    calibrate(model, x, batch_size=16)
    nets.close_to_two_pass(model, x)
    expected = nets.held(model)
    calibrate(model, x, batch_size=16, memory=0)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(model), strict=True))


def test_renorm_layers_stay_consistent():
    i = keras.Input((4,))
    model = keras.Model(i, L.BatchNormalization(name="bn", renorm=True, epsilon=0.01)(i))
    layer, x = model.get_layer("bn"), nets.data(40, (4,))
    result = calibrate(model, x)
    np.testing.assert_array_equal(layer.renorm_mean.numpy(), layer.moving_mean.numpy())
    np.testing.assert_allclose(layer.moving_stddev.numpy() ** 2 - 0.01, layer.moving_variance.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_stddev.numpy(), layer.renorm_stddev.numpy())
    result.undo()
    np.testing.assert_array_equal(layer.renorm_mean.numpy(), 0)


def test_layers_and_frozen_choose_what_changes():
    model, x = nets.branches(), nets.data()
    model.get_layer("left").trainable = False
    before = stored(model)
    result = calibrate(model, x, layers=["le*", "joined"], batch_size=16)
    assert [layer.name for layer in result.layers] == ["joined"]
    assert result.left == {
        "not asked for": ["stem", "right", "fine"],
        "frozen (trainable=False; frozen=True includes them)": ["left"],
    }
    for name, (mean, variance) in stored(model).items():
        assert (mean.tobytes() == before[name][0].tobytes()) == (name != "joined")
        assert (variance.tobytes() == before[name][1].tobytes()) == (name != "joined")
    # the layer sees what the others, on their old statistics, make of the data
    seen = nets.tapped(model, x)
    mean, variance = nets.two_pass(seen[id(model.get_layer("joined"))])
    np.testing.assert_allclose(result["joined"].variance, variance, rtol=1e-6)
    result.undo()
    assert {layer.name for layer in calibrate(model, x, frozen=True).layers} == set(before)
    with pytest.raises(NotFound, match="no BatchNorm layer is called 'lfet'; there are stem"):
        calibrate(model, x, layers="lfet")
    model.trainable = False
    with pytest.raises(NotFound, match=r"frozen=True \(--frozen\) includes them"):
        calibrate(model, x)


def test_data_that_do_not_fit_are_refused_and_nothing_changes():
    model, x = nets.branches(), nets.data()
    before = nets.held(model)
    bad = x.copy()
    bad[40, 1, 1, 1] = np.nan
    with pytest.raises(InvalidValue, match="sample 8 holds nan"):
        calibrate(model, bad, batch_size=32)
    with pytest.raises(InvalidValue, match="10 samples, at least 32 needed"):
        calibrate(model, x[:10])
    with pytest.raises(InvalidValue, match="no samples at all"):
        calibrate(model, x[:0])
    with pytest.raises(InvalidValue, match=r"shape \(32, 8, 8, 2\)"):
        calibrate(model, x[..., :2])
    for memory in ("lots", b"8GB", 10**400, [8]):
        with pytest.raises(InvalidValue, match="memory: expected a size"):
            calibrate(model, x, memory=memory)
    with pytest.raises(InvalidValue, match="method: expected one of population"):
        calibrate(model, x, method="exact")
    with pytest.raises(InvalidValue, match="expected a live Keras model"):
        calibrate(object(), x)
    model.get_layer("conv").kernel.assign(np.full((3, 3, 3, 4), 3e38, "f4"))
    with pytest.raises(InvalidValue, match="stem: its input is not finite"):
        calibrate(model, x)
    model.get_layer("conv").kernel.assign(before[0])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))


def test_the_kind_of_data_changes_no_bit(tmp_path):
    import tensorflow as tf
    import torch

    x, labels = nets.data(), np.arange(70)
    np.save(tmp_path / "x.npy", x)

    class Items(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, k):
            return x[16 * k : 16 * k + 16], labels[16 * k : 16 * k + 16]

    tensors = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(labels))
    kinds = {
        "array": (x, 16),
        "file": (str(tmp_path / "x.npy"), 16),
        "tf.data": (tf.data.Dataset.from_tensor_slices((x, labels)).batch(16), None),
        "DataLoader": (torch.utils.data.DataLoader(tensors, batch_size=16), None),
        "PyDataset": (Items(), None),
        "generator": (nets.batches_of(x, 16), None),
    }
    model, found = nets.branches(), {}
    for kind, (data, size) in kinds.items():
        result = calibrate(model, data, batch_size=size)
        assert (result.samples, result.batches) == (70, 5), kind
        found[kind] = [a.tobytes() for a in nets.held(model)]
        result.undo()
    assert all(bits == found["array"] for bits in found.values())


def test_one_number_per_channel_has_no_unbiased_variance():
    i = keras.Input((4,))
    model = keras.Model(i, L.BatchNormalization()(i))
    with pytest.raises(InvalidValue, match="unbiased"):
        calibrate(model, nets.data(1, (4,)), minimum=1, unbiased=True)


def test_progress_ends_at_its_total_and_never_goes_back():
    seen = []
    calibrate(nets.branches(), nets.data(), batch_size=16, progress=lambda *a: seen.append(a))
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert {total for _, total, _ in seen} == {seen[-1][1]}
    assert "round 2 of 4 (left, right)" in {what for _, _, what in seen}


def test_it_is_offered_at_the_top():
    assert bnport.calibrate is calibrate
    assert repr(bnport.calibrate(nets.branches(), nets.data())) == "<Calibration of 5 layers by population>"


@pytest.mark.parametrize("method", ["population", "precise"])
def test_too_few_numbers_name_the_layer_and_the_way_out(method):
    i = keras.Input((3,))
    model = keras.Model(i, L.BatchNormalization(name="one")(i))
    with pytest.raises(InvalidValue, match=r"one: one number per channel.*unbiased variance needs 2.*layers="):
        calibrate(model, nets.data(1, (3,)), minimum=1, unbiased=True, method=method)


def test_a_layer_that_a_mask_hides_everything_from_is_named():
    i = keras.Input((5, 3))
    masked = L.Masking()(i)
    model = keras.Model(i, L.BatchNormalization(name="bn")(masked))
    with pytest.raises(InvalidValue, match=r"bn: a mask hides everything that reaches it.*layers="):
        calibrate(model, np.zeros((40, 5, 3), "f4"))
    with pytest.raises(NotFound, match="or a mask hides all that reaches it; nothing was changed"):
        calibrate(model, np.zeros((40, 5, 3), "f4"), method="precise")
    across = keras.Model(i, L.BatchNormalization(name="across", axis=1)(masked))
    x = nets.data(40, (5, 3))
    x[3, 2] = 0
    with pytest.raises(InvalidValue, match=r"across: its channels are on axis 1, and a mask.*layers="):
        calibrate(across, x)


def test_a_replaced_call_whose_signature_is_not_known_is_refused_in_words():
    layer = L.BatchNormalization(name="own")
    model = keras.Sequential([keras.Input((4,)), layer])

    class Compiled:
        __signature__ = "none"  # as inspect.signature fails for what is written in C

        def __call__(self, x, training=None, mask=None):
            return x

    layer.call = Compiled()
    with pytest.raises(InvalidValue, match="own: its class BatchNormalization normalises without"):
        calibrate(model, np.zeros((64, 4), "f4"))
