"""Caffe files of old versions and of other names, HDF5 ones, and what is not read."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bnport import adapters
from bnport.errors import FormatError, InvalidValue, Question
from tests.adapters.caffe_files import (
    T,
    batch_norm,
    field,
    layer,
    net,
    prototxt,
    save_hdf5,
    scale,
    varint,
)
from tests.adapters.caffe_nets import FACTOR, caffe, one, probes
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record, without

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


def test_a_net_whose_name_makes_it_begin_as_a_web_page_does_is_read(files):
    message = net(batch_norm("bn", one(), "data"))
    message.name = "html".ljust(ord("<"))  # begins with a line feed and this very sign
    files.save(message)
    assert list(adapters.read(files.model)) == ["bn"]


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
