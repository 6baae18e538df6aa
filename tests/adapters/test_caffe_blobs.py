"""What the blobs of a Caffe layer mean, by their number, their type and their encoding.

The oracle is cv2.dnn on the whole net wherever it can read the variant. Where it cannot (types BN and Bias, Intel's and
DIGITS' blobs, doubles), Caffe's own lines are stated in numpy and quoted with their source.
"""

from __future__ import annotations

import numpy as np
import pytest

from bnport.errors import FormatError, InvalidValue, Question
from bnport.record import BatchNorm
from tests.adapters.caffe_files import (
    T,
    batch_norm,
    blob,
    layer,
    net,
    scale,
)
from tests.adapters.caffe_nets import bn_layer, five, one, probes
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record, without

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
