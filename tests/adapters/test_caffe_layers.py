"""Which blobs make up a Caffe BatchNorm, and what they mean.

The oracle is cv2.dnn on the whole net wherever it can read the variant. Where it cannot (types BN and Bias, Intel's and
DIGITS' blobs, doubles), Caffe's own lines are stated in numpy and quoted with their source.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from bnport import adapters
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, Question
from bnport.record import BatchNorm
from tests.adapters.caffe_files import (
    T,
    batch_norm,
    blob,
    cv2_outputs,
    field,
    layer,
    net,
    prototxt,
    save,
    save_hdf5,
    scale,
    varint,
)
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record, without

FACTOR = np.float32(999.98236)  # what moving_average_fraction 0.999 tends to
caffe = adapters.load("caffe")


class Files:
    """A caffemodel and its prototxt in a folder."""

    def __init__(self, folder):
        self.model, self.text = os.path.join(folder, "net.caffemodel"), os.path.join(folder, "net.prototxt")

    def save(self, message, channels=7, text=None, rows=10):
        save(self.model, message)
        with open(self.text, "w", encoding="utf-8") as file:
            file.write(prototxt(message, input_shape=(rows, channels, 1, 1)) if text is None else text)

    def cv2(self, x, *outputs):
        ys = cv2_outputs(self.text, self.model, x.reshape(*x.shape, 1, 1), outputs)
        return [y.reshape(x.shape) for y in ys]

    def read(self, **options):
        return caffe.read(self.model, **options)


@pytest.fixture
def files(tmp_path):
    return Files(str(tmp_path))


def one(seed=0, epsilon=2.5e-3):
    return telling_record(7, seed=seed, epsilon=epsilon)


def probes(record):
    return record.probes().astype(np.float32)


def assert_divided_within_bound(y, record, x):
    """As assert_within_bound, where the engine itself divided mean and variance by the factor: two roundings each."""
    bound = record.error_bound(x) + 2 * record.storage_bound(x)
    assert (np.abs(y - record(x)) <= bound).all()


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


# ---- other blob counts


def test_two_blobs_are_mean_and_variance_as_in_opencv(files):
    record = without(one(), ["gamma", "beta"])
    files.save(
        net(layer("bn", "BatchNorm", "data", "bn", [record.mean, record.variance], batch_norm_param={"eps": 2.5e-3}))
    )
    read = files.read()["bn"].record
    assert_same_bits(read, record)
    x = probes(record)
    assert_within_bound(files.cv2(x)[0], read, x)


def five(record, factor=1.0, order="mean-first", epsilon=2.5e-3, **parameters):
    factor = np.float32([factor])
    sums = [record.mean * factor, record.variance * factor]
    blobs = [*sums, factor, record.gamma, record.beta]
    if order == "scale-first":
        blobs = [record.gamma, record.beta, *sums, factor]
    return layer("bn", "BatchNorm", "data", "bn", blobs, batch_norm_param={"eps": epsilon, **parameters})


def test_five_blobs_of_nvidia_are_mean_variance_factor_scale_bias_as_in_opencv(files):
    record = one()
    files.save(net(five(record, scale_bias=True)))
    read = files.read()["bn"].record
    assert_same_bits(read, record)
    x = probes(record)
    assert_within_bound(files.cv2(x)[0], read, x)


def test_a_scale_behind_five_blobs_is_a_layer_of_its_own(files):
    record = one()
    files.save(net(five(record, scale_bias=True), scale("again", one(seed=1), "bn", "out")))
    layers = files.read()
    assert list(layers) == ["bn"]
    assert_same_bits(layers["bn"].record, record)
    assert layers.notes == ("Scale layers that belong to no BatchNorm, left out: again",)


def test_intels_four_and_five_blobs_divide_by_their_factor(files):
    """intel/caffe batch_norm_layer.cpp: scale_factor = blobs_[2] == 0 ? 0 : 1 / blobs_[2]; mean, variance times it;
    then top *= blobs_[3] and, with bias_term, += blobs_[4]."""
    record = one()
    message = net(five(record, factor=512.0))  # a power of two: the division is exact
    files.save(message)
    assert_same_bits(files.read()["bn"].record, record)
    del message.layer[0].blobs[4]
    files.save(message)
    assert_same_bits(files.read()["bn"].record, without(record, ["beta"]))
    assert files.read()["bn"].stores == {"gamma", "mean", "variance"}


def test_legacy_digits_files_hold_scale_bias_mean_variance_first(files):
    """NVIDIA/caffe net.cpp reorders such a layer when blobs[4].count() == 1."""
    record = one()
    files.save(net(five(record, order="scale-first")))
    assert_same_bits(files.read()["bn"].record, record)
    files.save(net(five(record, factor=2, order="scale-first")))
    with pytest.raises(InvalidValue, match=r"bn: fifth blob 2\.0 .* hold 1 there"):
        _ = files.read(allow_untrained=True)["bn"].record


@pytest.mark.parametrize("order", ["mean-first", "scale-first"])
def test_five_blobs_of_one_channel_are_asked_about_and_the_option_decides(files, order):
    record = telling_record(1, epsilon=2.5e-3)
    files.save(net(five(record, order=order)))
    with pytest.raises(Question, match=r"'bn' has five blobs.*--blob-order mean-first.*--blob-order scale-first"):
        files.read()
    assert_same_bits(files.read(blob_order=order)["bn"].record, record)


@pytest.mark.parametrize("count", [1, 6])
def test_other_numbers_of_blobs_are_refused(files, count):
    files.save(net(layer("bn", "BatchNorm", "data", "bn", [np.ones(3, np.float32)] * count)))
    with pytest.raises(FormatError, match=f"layer 'bn'.*{count} blobs"):
        files.read()


# ---- layers of type BN


def bn_layer(record, parameter="bn_param", statistic=None, **more):
    blobs = [v.reshape(1, -1, 1, 1) for v in (record.gamma, record.beta, record.mean, record.variance)]
    if statistic is not None:
        blobs[3] = statistic.reshape(1, -1, 1, 1)
    return layer("bn", "BN", "data", "bn", blobs, **{parameter: {"eps": record.epsilon, **more}})


@pytest.mark.parametrize("parameter", ["bn_param", "bn_param_pspnet", "bn_param_chen"])
def test_bn_layers_are_slope_bias_mean_variance_and_the_epsilon_is_found_under_each_forks_number(files, parameter):
    """PSPNet bn_layer.cpp at TEST: x -= blobs_[2]; x *= (blobs_[3] + bn_eps_)^-0.5; x *= blobs_[0]; x += blobs_[1]."""
    record = one()
    files.save(net(bn_layer(record, parameter, momentum=0.95)))
    layer_ = files.read()["bn"]
    assert_same_bits(layer_.record, record)
    assert layer_.momentum == 0.95
    assert any("variance assumed" in note for note in layer_.notes)
    assert not any("variance assumed" in note for note in files.read(stat="variance")["bn"].notes)
    x = probes(record).astype(np.float32)
    slope, bias, mean, variance = (np.array(b.data, np.float32) for b in T["LayerParameter"].FromString(
        bn_layer(record, parameter).SerializeToString()).blobs)  # fmt: skip
    y = (x - mean) * (variance + np.float32(record.epsilon)) ** np.float32(-0.5) * slope + bias
    assert_within_bound(y, layer_.record, x)


def test_bn_files_of_the_inverse_std_time_compute_what_their_caffe_computed_when_told_so(files):
    """yjxiong/caffe of Dec 2015 to Apr 2016, bn_layer.cpp at TEST: x -= blobs_[2]; x *= blobs_[3] (1/sqrt(var + eps));
    python/bn_convert_style.py turns such files into (1 / std^2 - eps)."""
    record = one(epsilon=1e-5)
    inverse = (1 / record.std).astype(np.float32)
    files.save(net(bn_layer(record, statistic=inverse)))
    layer_ = files.read(stat="inverse-std")["bn"]
    x = probes(record)
    y = (x - record.mean) * inverse * record.gamma + record.beta
    assert_within_bound(y, layer_.record, x)
    assert layer_.epsilon == 0
    assert "epsilon" not in layer_.assumed
    wrong = files.read()["bn"].record
    assert (np.abs(y - wrong(x)) > 10 * wrong.error_bound(x)).mean() > 0.5


def test_segnets_inference_layers_are_a_folded_affine_and_its_learn_layers_are_sent_to_calibrate(files):
    """caffe-segnet bn_layer.cpp, BNParameter_BNMode_INFERENCE: top = bottom * scale + shift, nothing else."""
    record = one()
    blobs = [record.gamma.reshape(1, -1, 1, 1), record.beta.reshape(1, -1, 1, 1)]
    files.save(net(layer("bn", "BN", "data", "bn", blobs, bn_param_segnet={"bn_mode": 1})))
    layer_ = files.read()["bn"]
    assert_same_bits(layer_.record, BatchNorm.from_affine(slope=record.gamma, intercept=record.beta))
    assert layer_.stores == {"gamma", "beta"}
    assert any("not recoverable" in note for note in layer_.notes)
    learn = net(layer("bn", "BN", "data", "bn", blobs, bn_param_segnet={"bn_mode": 0}))
    files.save(learn, text='layer { name: "bn" type: "BN" bottom: "data" top: "bn" bn_param { bn_mode: INFERENCE } }')
    with pytest.raises(InvalidValue, match=r"bn: .*LEARN.*bnport calibrate"):
        files.read()["bn"].record  # noqa: B018
    assert set(files.read()["bn"].arrays()) == {"gamma", "beta"}
    assert_same_bits(files.read(prototxt=files.text)["bn"].record, layer_.record)


def test_a_bn_layer_that_names_no_mode_is_in_mode_learn(files):
    files.save(net(layer("bn", "BN", "data", "bn", [np.ones((1, 3, 1, 1), np.float32)] * 2)))
    with pytest.raises(InvalidValue, match="calibrate"):
        files.read()["bn"].record  # noqa: B018


def test_parameters_of_two_forks_in_one_layer_are_refused(files):
    message = bn_layer(one())
    message.bn_param_pspnet.eps = 0.5
    files.save(net(message))
    with pytest.raises(FormatError, match="different forks"):
        files.read()


# ---- encodings


@pytest.mark.parametrize("form", ["packed", "legacy", "half", "raw float"])
def test_every_encoding_that_opencv_reads_gives_the_numbers_that_opencv_computes_with(files, form):
    dtype = "float16" if form == "half" else "float32"
    record = telling_record(7, epsilon=2.5e-3, dtype=dtype)
    statistics = [blob(v, form=form) for v in (record.mean, record.variance, np.ones(1, np.float32))]
    scales = [blob(v, form=form) for v in (record.gamma, record.beta)]
    bn = layer("bn", "BatchNorm", "data", "bn", statistics, batch_norm_param={"eps": 2.5e-3})
    files.save(net(bn, layer("scale", "Scale", "bn", "out", scales, scale_param={"bias_term": True})))
    layer_ = files.read()["bn"]
    assert_same_bits(layer_.record, record)
    assert layer_.dtype == dtype
    if form != "raw float":  # cv2 reads raw_data as halves only
        x = probes(record)
        assert_within_bound(files.cv2(x)[0], layer_.record, x)


def test_doubles_are_read_as_doubles_and_win_over_floats(files):
    """blob.cpp, FromProto: if (proto.double_data_size() > 0) it is read, else proto.data()."""
    record = one()
    wide = record.replace(mean=record.mean.astype(np.float64) + 1e-12)
    blobs = [blob(v, form="double") for v in (wide.mean, wide.variance, np.ones(1))]
    blobs[0].data.extend([9.0] * 7)
    files.save(net(layer("bn", "BatchNorm", "data", "bn", blobs, batch_norm_param={"eps": 2.5e-3})))
    assert_same_bits(files.read()["bn"].record, without(wide, ["gamma", "beta"]))


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (1, 1, 1, 7), (7, 1, 1, 1)])
def test_a_legacy_shape_wins_over_shape_and_a_vector_may_lie_along_any_axis(files, shape):
    """blob.cpp, FromProto: has_num() || has_channels() || ... "Using deprecated 4D Blob dimensions"."""
    record = without(one(), ["gamma", "beta"])
    message = net(batch_norm("bn", record, "data", "bn"))
    for stored in message.layer[0].blobs[:2]:
        stored.num, stored.channels, stored.height, stored.width = shape
        stored.shape.dim[0] = 3
    files.save(message)
    assert_same_bits(files.read()["bn"].record, record)


# ---- old files, other files


def test_a_file_whose_layers_keep_no_settings_reads_a_second_scale_blob_as_beta(files):
    record = one(epsilon=1e-5)
    message = net(batch_norm("bn", record, "data", "bn"), scale("s", record, "bn", "out"))
    text = prototxt(message, input_shape=(10, 7, 1, 1))
    for one_layer in message.layer:
        one_layer.ClearField("batch_norm_param")
        one_layer.ClearField("scale_param")
    files.save(message, text=text)
    assert_same_bits(files.read()["bn"].record, record)
    x = probes(record)
    assert_within_bound(files.cv2(x)[0], files.read()["bn"].record, x)
    files.save(message, text=text.replace("bias_term: true", ""))
    with pytest.raises(FormatError, match=r"layer 's' \(Scale\): 2 blobs, 1 expected"):
        files.read(prototxt=files.text)


def test_layers_that_do_not_say_what_they_read_are_asked_about_and_the_prototxt_answers(files):
    record = one()
    message = net(batch_norm("bn", record, "data", "bn"), scale("s", record, "bn", "out"))
    text = prototxt(message)
    for one_layer in message.layer:
        one_layer.ClearField("bottom")
        one_layer.ClearField("top")
    files.save(message, text=text)
    with pytest.raises(Question, match=r"which of s belongs to 'bn'.*--prototxt"):
        files.read()
    assert_same_bits(files.read(prototxt=files.text)["bn"].record, record)


def test_a_caffemodel_of_another_name_is_recognised_by_its_first_layer_and_other_files_are_not(files, tmp_path):
    named = net(batch_norm("bn", one(), "data"))
    nameless = net(batch_norm("bn", one(), "data"))
    nameless.ClearField("name")
    for message in (named, nameless):
        files.save(message)
        other = str(tmp_path / "weights.bin")
        os.replace(files.model, other)
        assert list(adapters.read(other)) == ["bn"]
    assert not caffe.recognise(b"\x08\x07" + field(2, b"pytorch") + field(7, b"graph"), "model.onnx")
    assert not caffe.recognise(b"PK\x03\x04" + bytes(100), "x.pth")


def v1_net(record):
    message = T["NetParameter"](name="old")
    conv = message.layers.add(name="conv1", type=4, bottom=["data"], top=["conv1"])
    conv.blobs.add(num=7, channels=3, height=1, width=1, data=[0.5] * 21)
    norm = message.layers.add(name="bn1", type=41, bottom=["conv1"], top=["conv1"])
    for array in (record.gamma, record.beta, record.mean, record.variance):
        norm.blobs.add(num=1, channels=7, height=1, width=1, data=array)
    return message


def test_v1_layers_are_said_and_read_when_a_prototxt_names_their_types(files):
    record = one(epsilon=1e-5)
    text = (
        'layers { name: "conv1" type: CONVOLUTION bottom: "data" top: "conv1" }'
        'layers { name: "bn1" type: BN bottom: "conv1" top: "conv1" bn_param { momentum: 0.9 } }'
    )
    files.save(v1_net(record), text=text)
    layers = files.read()
    assert not layers
    assert "V1 form" in layers.notes[0]
    assert "1 Convolution" in layers.notes[0]
    layers = files.read(prototxt=files.text)
    assert_same_bits(layers["bn1"].record, record)
    assert layers["bn1"].kernel.shape == (7, 3, 1, 1)


def test_an_hdf5_caffemodel_of_another_name_is_told_from_keras_files(tmp_path):
    import shutil

    import keras

    fixtures = os.path.join(os.path.dirname(__file__), "..", "..", "fixtures")
    renamed = str(tmp_path / "weights.h5")
    shutil.copy(os.path.join(fixtures, "caffe", "bvlc.caffemodel.h5"), renamed)
    assert adapters.find(renamed).__name__ == "bnport.adapters.caffe"
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="data")], name="data")
    model.save_weights(tmp_path / "keras.weights.h5")
    model.save(tmp_path / "keras.h5")
    for name in ("keras.weights.h5", "keras.h5"):
        assert adapters.find(str(tmp_path / name)).__name__ == "bnport.adapters.keras"


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\n<!DOCTYPE html>", "web page")],
)
def test_what_a_failed_download_leaves_is_said(files, data, why):
    files.save(data, text="")
    with pytest.raises(FormatError, match=why):
        files.read()
    message = net(batch_norm("bn", one(), "data"))
    message.name = "n" * ord("<")  # begins with a line feed and this very sign
    files.save(message)
    assert list(files.read()) == ["bn"]


def test_a_net_without_batch_norm_says_what_it_holds(files):
    merged = layer("s", "Scale", "data", "s", [np.ones(3, np.float32)])
    files.save(net(merged, layer("odd", "SyncBatchNorm", "s", "t", [np.ones(3, np.float32)] * 4)))
    layers = files.read()
    assert not layers
    text = " ".join(layers.notes)
    assert "merged" in text
    assert "SyncBatchNorm" in text


def test_hdf5_with_its_prototxt_reads_as_the_binary_file_does(files, tmp_path):
    a, b = one(), one(seed=1, epsilon=1e-4)
    message = net(
        batch_norm("z/bn", a, "data", "a", factor=FACTOR), scale("a/scale", a, "a", "a"),
        batch_norm("b", b, "a", "b"), scale("bs", b, "b", "b", bias=False),
    )  # fmt: skip
    files.save(message)
    path = str(tmp_path / "net.caffemodel.h5")
    save_hdf5(path, message)
    hdf5, binary = caffe.read(path, prototxt=files.text), files.read(prototxt=files.text)
    assert list(hdf5) == list(binary) == ["z/bn", "b"]
    for name in binary:
        assert_same_bits(hdf5[name].record, binary[name].record)
        assert hdf5[name].stores == binary[name].stores


def test_hdf5_without_its_prototxt_asks_which_scale_belongs_where(files, tmp_path):
    record = one()
    path = str(tmp_path / "net.caffemodel.h5")
    save_hdf5(path, net(batch_norm("bn", record, "data", "bn"), scale("sc", record, "bn", "bn")))
    with pytest.raises(Question, match=r"sc.*'bn'.*prototxt"):
        caffe.read(path)
    save_hdf5(path, net(batch_norm("bn", record, "data", "bn")))
    layer_ = caffe.read(path)["bn"]
    assert_same_bits(layer_.record, without(record, ["gamma", "beta"]).replace(epsilon=1e-5))
    assert layer_.assumed == {"epsilon", "momentum"}


# ---- evidence for pairing


@pytest.mark.parametrize(("group", "kind"), [(1, "conv"), (2, "grouped"), (4, "depthwise")])
def test_the_convolution_that_feeds_a_layer_is_its_kernel(files, group, kind):
    record = telling_record(4, epsilon=2.5e-3)
    weights = np.random.default_rng(0).normal(size=(4, 4 // group, 3, 3)).astype(np.float32)
    conv = layer("conv", "Convolution", "data", "conv", [weights], convolution_param={"group": group})
    files.save(net(conv, layer("sp", "Split", "conv", "c0 c1"), batch_norm("bn", record, "c1", "out")))
    kernel = files.read()["bn"].kernel
    assert (kernel.kind, kernel.shape, kernel.name) == (kind, weights.shape, "conv")
    np.testing.assert_array_equal(kernel.values(), weights)


@pytest.mark.parametrize("group", [1, 2])
def test_a_deconvolution_is_turned_to_output_channels_first(files, group):
    """deconv_layer.cpp swaps the roles of input and output of Convolution: its blob is (in, out/group, kh, kw)."""
    record = telling_record(6, epsilon=2.5e-3)
    weights = np.arange(4 * 6 // group * 4, dtype=np.float32).reshape(4, 6 // group, 2, 2)
    conv = layer("up", "Deconvolution", "data", "up", [weights], convolution_param={"group": group})
    files.save(net(conv, batch_norm("bn", record, "up", "out")))
    kernel = files.read()["bn"].kernel
    assert (kernel.kind, kernel.shape) == ("transposed", (6, 4 // group, 2, 2))
    values = kernel.values()
    for i in range(4):
        for o in range(6 // group):
            whole = i // (4 // group) * (6 // group) + o
            np.testing.assert_array_equal(values[whole, i % (4 // group)], weights[i, o])


def test_an_inner_product_is_a_dense_kernel_whichever_way_it_is_stored(files):
    record = telling_record(4, epsilon=2.5e-3)
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    for stored, shape, transpose in ((weights, None, False), (weights.T, None, True), (weights, (1, 1, 4, 3), False)):
        stored = np.ascontiguousarray(stored)
        dense = layer("fc", "InnerProduct", "data", "fc", [blob(stored, shape=shape, form="legacy" if shape else "packed")],
                      inner_product_param={"transpose": transpose})  # fmt: skip
        files.save(net(dense, batch_norm("bn", record, "fc")))
        kernel = files.read()["bn"].kernel
        assert (kernel.kind, kernel.shape) == ("dense", (4, 3))
        np.testing.assert_array_equal(kernel.values(), weights)


def test_inputs_are_the_batch_norms_that_reach_a_layer_with_none_between(files):
    r = one()
    files.save(
        net(
            batch_norm("a", r, "data", "a"), scale("as", r, "a", "a"), layer("ra", "ReLU", "a", "a"),
            batch_norm("b", r, "a", "b"), layer("sum", "Eltwise", "a b", "sum"),
            batch_norm("c", r, "sum", "c"), batch_norm("d", r, "data", "d"),
        )
    )  # fmt: skip
    layers = files.read()
    assert {name: layer_.inputs for name, layer_ in layers.items()} == {"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}


# ---- running


def test_run_is_opencvs_own_output(files):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn", factor=FACTOR), scale("scale", record, "bn", "out")))
    x = probes(record)
    (y,) = files.cv2(x)
    np.testing.assert_array_equal(caffe.run(files.model, "bn", x)["cv2.dnn"], y)
    np.testing.assert_array_equal(caffe.run(files.model, "bn", x, prototxt=files.text)["cv2.dnn"], y)


def test_run_uses_the_layers_own_bytes_from_hdf5_and_nvidia_files_too(files, tmp_path):
    record = one()
    x = probes(record)
    files.save(net(five(record, scale_bias=True)))
    assert_within_bound(caffe.run(files.model, "bn", x)["cv2.dnn"], record, x)
    path = str(tmp_path / "net.caffemodel.h5")
    save_hdf5(path, net(five(record)))
    assert_within_bound(caffe.run(path, "bn", x)["cv2.dnn"], record.replace(epsilon=1e-5), x)


def test_many_layers_run_in_one_process_and_each_gets_its_own_input_and_epsilon(files):
    a, b = one(), one(seed=1, epsilon=7e-3)
    first, second = batch_norm("a", a, "data", "x"), batch_norm("b", b, "x", "y")
    second.ClearField("batch_norm_param")
    files.save(net(first, scale("as", a, "x", "x"), second, scale("bs", b, "y", "p"), scale("bt", a, "y", "q")))
    inputs = {"a": probes(a), "b+bs": probes(b)}
    outputs = caffe.run_all(files.model, inputs, epsilon=7e-3)
    assert_within_bound(outputs["a"]["cv2.dnn"], a, inputs["a"])
    assert_within_bound(outputs["b+bs"]["cv2.dnn"], b, inputs["b+bs"])


def test_run_says_what_no_engine_can_run_and_refuses_wrong_input(files):
    record = one()
    files.save(net(bn_layer(record)))
    with pytest.raises(NotFound, match="type BN"):
        caffe.run(files.model, "bn", probes(record))
    files.save(net(batch_norm("bn", record, "data", "bn")))
    with pytest.raises(InvalidValue, match=r"\(N, 7\)"):
        caffe.run(files.model, "bn", np.ones((2, 6), np.float32))
    with pytest.raises(NotFound, match="no BatchNorm layer 'nb'"):
        caffe.run(files.model, "nb", probes(record))


def test_run_without_opencv_4_says_what_to_install(files, monkeypatch, tmp_path):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "cv2.py").write_text("raise ImportError('no cv2 here')")
    with pytest.raises(MissingDependency, match=r"opencv-python-headless>=4\.5,<5"):
        caffe.run(files.model, "bn", probes(record))
    (tmp_path / "cv2.py").write_text("__version__ = '5.0.0'\nclass dnn: pass")
    with pytest.raises(MissingDependency, match=r"this is 5\.0\.0"):
        caffe.run(files.model, "bn", probes(record))


def test_a_crash_of_the_engine_is_an_error_of_ours(files, monkeypatch, tmp_path):
    from bnport.errors import BnportError

    record = one()
    files.save(net(batch_norm("bn", record, "data", "bn")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "cv2.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BnportError, match=r"bn: cv2\.dnn crashed \(signal 11\)"):
        caffe.run(files.model, "bn", probes(record))


# ---- bad input


def test_a_layer_that_bears_anothers_name_is_refused_where_blobs_are_at_stake(files):
    record = one()
    files.save(net(batch_norm("bn", record, "data", "a"), batch_norm("bn", record, "a", "b")))
    with pytest.raises(FormatError, match="two layers are called 'bn'"):
        files.read()
    files.save(net(batch_norm("bn", record, "data", "a"), layer("r", "ReLU", "a"), layer("r", "ReLU", "a")))
    assert list(files.read()) == ["bn"]


def _net_with_blob(data):
    """A BatchNorm layer whose first blob is these bytes."""
    good = net(batch_norm("bn", one(), "data", "bn")).layer[0]
    rest = b"".join(field(7, b.SerializeToString()) for b in good.blobs[1:])
    good.ClearField("blobs")
    return field(100, good.SerializeToString() + field(7, data) + rest)


FLOATS = field(5, np.ones(7, "<f4").tobytes())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(field(7, field(1, varint(8))) + FLOATS, id="shape and data disagree"),
        pytest.param(FLOATS, id="no shape"),
        pytest.param(field(7, field(1, varint(-7))) + FLOATS, id="negative dimension"),
        pytest.param(field(7, field(1, varint(-7) + varint(-1))) + FLOATS, id="negative dimensions whose product fits"),
        pytest.param(field(7, field(1, varint(2**62) + varint(4))) + FLOATS, id="product over 64 bits"),
        pytest.param(field(7, field(1, varint(0))), id="no channel"),
        pytest.param(field(7, field(1, varint(7) + varint(1) * 40)) + FLOATS, id="40 axes"),
        pytest.param(field(7, field(1, varint(7))) + field(5, b"123"), id="half a float"),
        pytest.param(field(7, field(1, varint(7))) + varint(5 << 3) + varint(1), id="a varint for a float"),
        pytest.param(field(7, field(1, varint(7))) + varint(5 << 3 | 3) + varint(5 << 3 | 4), id="a group"),
        pytest.param(
            field(7, field(1, varint(7))) + field(12, b"1" * 14) + varint(10 << 3) + b"\x03", id="raw integers"
        ),
        pytest.param(field(7, field(1, varint(7))) + field(12, b"1" * 13), id="raw data of no whole number"),
        pytest.param(field(7, field(1, b"\x87" * 11)) + FLOATS, id="a varint without end"),
        pytest.param(field(7, field(1, varint(7))) + FLOATS[:-3], id="truncated"),
        pytest.param(field(7, field(1, varint(7))) + varint(5 << 3 | 2) + varint(2**60), id="2^60 bytes declared"),
    ],
)
def test_a_blob_that_is_not_what_it_says_is_refused_by_file_name(files, data):
    files.save(_net_with_blob(data), text="")
    with pytest.raises(FormatError, match=r"net\.caffemodel"):
        _ = [layer_.record for layer_ in files.read().values()]


def test_wrong_wire_types_of_names_settings_and_layers_are_refused(files):
    inside = field(1, b"bn") + field(2, b"BatchNorm")
    for bad in (
        varint(100 << 3) + varint(5),
        field(100, varint(1 << 3) + varint(5)),
        field(100, inside + varint(7 << 3) + varint(1)),
        field(100, inside + field(139, varint(3 << 3) + varint(1))),
        field(100, inside + field(139, field(3, b"1234"))),
        field(100, inside + varint(99 << 3 | 3)),
    ):
        files.save(bad, text="")
        with pytest.raises(FormatError, match=r"net\.caffemodel"):
            files.read()


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), float("inf")])
def test_an_epsilon_that_is_none_is_refused_by_file_and_layer(files, epsilon):
    message = net(batch_norm("bn", one(), "data", "bn"))
    message.layer[0].batch_norm_param.eps = epsilon
    files.save(message, text="")
    with pytest.raises(FormatError, match=r"net\.caffemodel: bn: epsilon"):
        files.read()


def test_a_group_of_zero_is_refused_before_any_engine_sees_it(files):
    record = telling_record(4, epsilon=2.5e-3)
    for group in (0, -1, 3):
        conv = layer("conv", "Convolution", "data", "conv", [np.ones((4, 4, 1, 1), np.float32)],
                     convolution_param={"group": group})  # fmt: skip
        files.save(net(conv, batch_norm("bn", record, "conv")))
        with pytest.raises(FormatError, match=f"layer 'conv'.*group {group}"):
            files.read()


def test_names_of_control_characters_and_bytes_that_are_no_text_are_shown_escaped(files):
    message = net(batch_norm("\x1b[31mred\n", one(), "data", "a", factor=-1))
    files.save(message)
    (layer_,) = files.read().values()
    with pytest.raises(InvalidValue) as caught:
        _ = layer_.record
    assert str(caught.value).isprintable()
    data = message.SerializeToString().replace(b"\x1b[31mred\n", b"\xff\xfe\xfdred\n12")
    files.save(data, text="")
    assert next(iter(files.read())).startswith("\\xff")


def test_options_that_do_not_exist_or_mean_nothing_are_refused(files):
    files.save(net(batch_norm("bn", one(), "data", "bn")))
    for options in ({"stat": "std"}, {"blob_order": "x"}, {"allow_untrained": "maybe"}):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            files.read(**options)
