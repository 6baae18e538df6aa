"""Which blobs make up a Caffe BatchNorm: the factor, the epsilon, the Scale and Bias that belong to it.

The oracle is cv2.dnn on the whole net wherever it can read the variant. Where it cannot (types BN and Bias, Intel's and
DIGITS' blobs, doubles), Caffe's own lines are stated in numpy and quoted with their source.
"""

from __future__ import annotations

import numpy as np
import pytest

from bnport import adapters
from bnport.errors import FormatError, InvalidValue
from tests.adapters.caffe_files import (
    batch_norm,
    blob,
    layer,
    net,
    prototxt,
    scale,
)
from tests.adapters.caffe_nets import FACTOR, assert_divided_within_bound, one, probes
from tests.adapters.contract import assert_same_bits, assert_within_bound, without

# ---- the factor


def test_statistics_are_the_blobs_divided_by_the_factor_as_opencv_computes(files):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn", factor=FACTOR), scale("scale", record, "bn", "out")))
    read = files.read()["bn"].record
    stored = np.float32(FACTOR * record.mean.astype(np.float64))
    np.testing.assert_array_equal(read.mean, stored.astype(np.float64) / float(FACTOR))
    x = probes(record)
    (y,) = files.cv2(x)
    assert_divided_within_bound(y, read, x)
    undivided = read.replace(mean=read.mean * FACTOR, variance=read.variance * FACTOR)
    assert (np.abs(y - undivided(x)) > 100 * undivided.error_bound(x)).mean() > 0.5


def test_a_factor_of_zero_is_refused_unless_asked_for_and_then_reads_as_opencv_does(files):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn", factor=0), scale("scale", record, "bn", "out")))
    with pytest.raises(InvalidValue, match=r"bn.*factor 0 in .*net\.caffemodel.*--allow-untrained"):
        _ = files.read()["bn"].record
    for yes in (True, "yes", "true"):
        read = files.read(allow_untrained=yes)["bn"].record
        assert not read.mean.any()
        assert not read.variance.any()
    x = probes(record)
    assert_within_bound(files.cv2(x)[0], read, x)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_is_negative_or_no_number_is_refused_whatever_is_asked(files, factor):
    record = one()
    message = net(batch_norm("bn", record, "data", "bn"))
    message.layer[0].blobs[2].data[0] = factor
    files.save(message)
    with pytest.raises(InvalidValue, match="bn: scale factor"):
        _ = files.read(allow_untrained=True)["bn"].record


# ---- epsilon and the prototxt


def test_the_epsilon_of_the_prototxt_wins_over_the_caffemodels_as_in_opencv(files):
    record = one()
    message = net(batch_norm("bn", record, "data", "bn"), scale("scale", record, "bn", "out"))
    text = prototxt(message, input_shape=(10, 7, 1, 1)).replace("eps: 0.0025", "eps: 0.075")
    files.save(message, text=text)
    assert files.read()["bn"].epsilon == 0.0025
    layer_ = files.read(prototxt=files.text)["bn"]
    assert layer_.epsilon == 0.075
    assert not layer_.assumed
    x = probes(record)
    (y,) = files.cv2(x)
    assert_within_bound(y, layer_.record, x)
    assert not (np.abs(y - record(x)) <= record.error_bound(x)).all()


def test_a_prototxt_that_names_no_epsilon_means_1e_5_and_nothing_is_assumed(files):
    record = one(epsilon=1e-5)
    message = net(batch_norm("bn", record, "data", "bn"), scale("scale", record, "bn", "out"))
    text = prototxt(message, input_shape=(10, 7, 1, 1)).replace("eps: 1e-05", "")
    message.layer[0].batch_norm_param.eps = 0.5
    files.save(message, text=text)
    layer_ = files.read(prototxt=files.text)["bn"]
    assert (layer_.epsilon, layer_.momentum, layer_.assumed) == (1e-5, 0.999, frozenset())
    x = probes(record)
    assert_within_bound(files.cv2(x)[0], layer_.record, x)


def test_two_epsilons_in_one_net_stay_two_and_a_float32_one_reads_as_the_decimal_that_was_meant(files):
    first, second = one(epsilon=1e-5), one(seed=1, epsilon=2e-4)
    files.save(
        net(
            batch_norm("a", first, "data", "a"), scale("as", first, "a", "a"),
            batch_norm("b", second, "a", "b"), scale("bs", second, "b", "b"),
        )
    )  # fmt: skip
    layers = files.read()
    assert [layer_.epsilon for layer_ in layers.values()] == [1e-5, 2e-4]
    x = probes(first)
    after_first, after_second = files.cv2(x, "as", "bs")
    assert_within_bound(after_first, layers["a"].record, x)
    assert_within_bound(after_second, layers["b"].record, after_first)


def test_the_momentum_is_the_fraction_of_the_old_value_kept_and_0_999_where_nothing_says(files):
    record = one()
    fast = batch_norm("fast", record, "data", "a", moving_average_fraction=0.9)
    files.save(net(fast, batch_norm("slow", record, "a", "b")))
    layers = files.read()
    assert layers["fast"].momentum == 0.9  # stored as float32
    assert (layers["slow"].momentum, layers["slow"].assumed) == (0.999, {"momentum"})


def test_a_prototxt_that_asks_for_batch_statistics_is_said(files):
    record = one()
    message = net(batch_norm("bn", record, "data", "bn", use_global_stats=False))
    files.save(message)
    assert any("saved from a training net" in note for note in files.read()["bn"].notes)
    assert any("normalise by each batch" in note for note in files.read(prototxt=files.text)["bn"].notes)


def test_layers_of_a_training_prototxt_are_filtered_for_the_test_phase(files):
    record, other = one(), one(seed=1)
    message = net(
        batch_norm("bn", record, "data", "bn"), scale("train", other, "bn", "bn"), scale("test", record, "bn", "bn")
    )
    text = "input: 'data' input_dim: 10 input_dim: 7 input_dim: 1 input_dim: 1\n"
    for one_layer, rule in zip(
        message.layer, ("", "include { phase: TRAIN }", "exclude: < phase: TRAIN, >"), strict=True
    ):
        bare = prototxt(net(one_layer)).split("\n", 1)[1].rstrip()[:-1]
        text += f"{bare} {rule} # {one_layer.name}\n}}\n"
    files.save(message, text=text)
    layers = files.read(prototxt=files.text)
    assert list(layers) == ["bn"]
    assert_same_bits(layers["bn"].record, record)


def test_a_prototxt_of_another_net_is_refused_and_layers_that_it_leaves_out_are_named(files):
    record = one()
    files.save(
        net(batch_norm("bn", record, "data", "bn")),
        text='layer { name: "norm" type: "BatchNorm" bottom: "data" top: "n" }',
    )
    with pytest.raises(FormatError, match=r"net\.prototxt: layer 'norm' .*is it the prototxt of this net"):
        files.read(prototxt=files.text)
    files.save(
        net(batch_norm("bn", record, "data", "bn")), text='layer { name: "norm" type: "ReLU" bottom: "data" top: "n" }'
    )
    layers = files.read(prototxt=files.text)
    assert not layers
    assert any("left out" in note and "bn" in note for note in layers.notes)


def test_a_prototxt_given_as_the_source_is_refused_with_what_to_give(files):
    files.save(net(batch_norm("bn", one(), "data", "bn")))
    with pytest.raises(FormatError, match=r"give the \.caffemodel"):
        adapters.read(files.text)


# ---- which Scale belongs to which BatchNorm


def test_a_scale_is_followed_in_place_through_split_and_when_other_layers_lie_between_in_the_file(files):
    a, b, c = one(), one(seed=1), one(seed=2)
    files.save(
        net(
            batch_norm("a", a, "data", "a"),
            layer("split", "Split", "a", "a_split_0 a_split_1"),
            layer("other", "ReLU", "data", "other"),
            scale("a_scale", a, "a_split_0", "a_out"),
            batch_norm("b", b, "a_out", "a_out"),
            scale("b_scale", b, "a_out", "a_out"),
            layer("relu", "ReLU", "a_out", "a_out"),
            batch_norm("c", c, "other", "c"),
            layer("pool", "ReLU", "a_out", "a_relu"),
            scale("c_scale", c, "c", "c_out", bias=False),
        )
    )
    layers = files.read()
    assert list(layers) == ["a", "b", "c"]
    x = probes(a)
    ya, yb, other, yc = files.cv2(x, "a_scale", "b_scale", "other", "c_scale")
    assert_within_bound(ya, layers["a"].record, x)
    assert_within_bound(yb, layers["b"].record, ya)
    assert_within_bound(yc, layers["c"].record, other)
    assert_same_bits(layers["c"].record, without(c, ["beta"]))
    assert layers["c"].stores == {"gamma", "mean", "variance"}
    assert [layers[name].inputs for name in "abc"] == [(), ("a",), ()]


def test_a_relu_between_breaks_the_pair(files):
    record = one()
    files.save(
        net(
            batch_norm("bn", record, "data", "bn"), layer("relu", "ReLU", "bn", "r"), scale("scale", record, "r", "out")
        )
    )
    layer_ = files.read()["bn"]
    assert layer_.stores == {"mean", "variance"}
    assert_same_bits(layer_.record, without(record, ["gamma", "beta"]))
    x = probes(record)
    assert_within_bound(files.cv2(x, "bn")[0], layer_.record, x)


def test_two_scales_give_two_records_and_each_is_what_opencv_computes(files):
    a, b = one(), one(seed=1)
    files.save(net(batch_norm("bn", a, "data", "bn"), scale("first", a, "bn", "x"), scale("second", b, "bn", "y")))
    layers = files.read()
    assert list(layers) == ["bn+first", "bn+second"]
    assert all("several ways" in layer_.notes[0] for layer_ in layers.values())
    x = probes(a)
    for layer_, y in zip(layers.values(), files.cv2(x, "first", "second"), strict=True):
        assert_within_bound(y, layer_.record, x)


def test_a_scale_and_another_reader_give_a_record_with_and_one_without_gamma(files):
    record, after = one(), one(seed=3)
    files.save(
        net(
            batch_norm("bn", record, "data", "bn"), layer("relu", "ReLU", "bn", "r"), scale("s", record, "bn", "s"),
            batch_norm("behind_relu", after, "r", "p"), batch_norm("behind_scale", after, "s", "q"),
        )
    )  # fmt: skip
    layers = files.read()
    assert list(layers) == ["bn", "bn+s", "behind_relu", "behind_scale"]
    assert_same_bits(layers["bn"].record, without(record, ["gamma", "beta"]))
    assert_same_bits(layers["bn+s"].record, record)
    assert layers["behind_relu"].inputs == ("bn",)
    assert layers["behind_scale"].inputs == ("bn+s",)


def test_a_scale_of_two_inputs_holds_no_parameters_of_the_batch_norm(files):
    record = one()
    two = layer("gate", "Scale", "bn data", "out")
    files.save(net(batch_norm("bn", record, "data", "bn"), two))
    layer_ = files.read()["bn"]
    assert layer_.stores == {"mean", "variance"}
    assert_same_bits(layer_.record, without(record, ["gamma", "beta"]))


def test_a_bias_layer_gives_beta_alone_or_behind_a_scale_without_bias(files):
    """bias_layer.cpp adds its blob along axis 1: y = x + bias[c]. cv2 has no Bias layer."""
    a, b = one(), one(seed=1)
    files.save(
        net(
            batch_norm("a", a, "data", "a"), scale("as", a, "a", "a", bias=False), layer("ab", "Bias", "a", "a", [a.beta]),
            batch_norm("b", b, "a", "b"), layer("bb", "Bias", "b", "b", [b.beta]),
        )
    )  # fmt: skip
    layers = files.read()
    assert_same_bits(layers["a"].record, a)
    assert_same_bits(layers["b"].record, without(b, ["gamma"]))
    assert layers["b"].stores == {"beta", "mean", "variance"}


def test_a_scale_of_one_number_for_all_channels_is_broadcast(files):
    """scale_layer.cpp: with num_axes 0 the scale blob has no axes and multiplies everything; bias_term likewise."""
    record = one()
    scalar = layer("s", "Scale", "bn", "bn", [blob(np.float32(-1.5)), blob(np.float32(0.25))],
                   scale_param={"num_axes": 0, "bias_term": True})  # fmt: skip
    files.save(net(batch_norm("bn", record, "data", "bn"), scalar))
    layer_ = files.read()["bn"]
    expected = record.replace(gamma=np.full(7, -1.5, np.float32), beta=np.full(7, 0.25, np.float32))
    assert_same_bits(layer_.record, expected)
    assert "gamma is one number for all channels" in layer_.notes


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((7, 4, 4), {"num_axes": -1}), ((7, 4, 4), {"num_axes": 3}), ((4,), {"axis": 2}), ((7,), {"axis": 2}), ((6,), {}),
     ((7,), {"axis": 0}), ((7,), {"axis": -1})],
)  # fmt: skip
def test_a_scale_that_is_no_vector_of_channels_is_refused_by_name(files, shape, parameters):
    wide = layer("wide", "Scale", "bn", "bn", [np.ones(shape, np.float32)], scale_param=parameters)
    files.save(net(batch_norm("bn", one(), "data", "bn"), wide))
    with pytest.raises(FormatError, match=r"net\.caffemodel: layer 'wide' \(Scale\)"):
        files.read()


def test_a_negative_axis_counts_from_the_end_of_what_feeds_the_net(files):
    record = one()
    weights = np.ones((7, 7), np.float32)
    dense = layer(
        "fc", "InnerProduct", "data", "fc", [weights], inner_product_param={"num_output": 7, "bias_term": False}
    )
    files.save(net(dense, batch_norm("bn", record, "fc"), scale("s", record, "fc", axis=-1)))
    assert_same_bits(files.read()["bn"].record, record)
    kernel = layer("conv", "Convolution", "data", "conv", [np.ones((7, 7, 1, 1), np.float32)])
    files.save(net(kernel, batch_norm("bn", record, "conv"), scale("s", record, "conv", axis=-3)))
    assert_same_bits(files.read()["bn"].record, record)
    files.save(net(kernel, batch_norm("bn", record, "conv"), scale("s", record, "conv", axis=-1)))
    with pytest.raises(FormatError, match="axis 3; channels are axis 1"):
        files.read()
