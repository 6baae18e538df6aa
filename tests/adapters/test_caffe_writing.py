"""Writing into a copy of a caffemodel: the blobs asked for, in their own encoding, and not one byte more.

What was written is read back by google.protobuf or h5py and run by cv2.dnn, not by bnport.
"""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest

from bnport import adapters
from bnport.containers.files import replace_file
from bnport.convert import convert
from bnport.errors import BnportError, NotFound, Unrepresentable
from bnport.layer import Change
from bnport.record import BatchNorm
from tests.adapters.caffe_files import (
    T,
    batch_norm,
    blob,
    cv2_outputs,
    layer,
    net,
    prototxt,
    save,
    save_hdf5,
    scale,
    unpacked,
)
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record
from tests.adapters.test_caffe import convolution

ALL = frozenset(("gamma", "beta", "mean", "variance"))
caffe = adapters.load("caffe")


def one(seed=0, **more):
    return telling_record(7, seed=seed, **more)


@pytest.fixture
def paths(tmp_path):
    return str(tmp_path / "net.caffemodel"), str(tmp_path / "out.caffemodel")


def write(path, out, changes, **options):
    replace_file(out, lambda new: caffe.write(path, changes, new, **options), inputs=[path])


def load(path):
    with open(path, "rb") as file:
        return T["NetParameter"].FromString(file.read())


def differing_bytes(a, b):
    with open(a, "rb") as first, open(b, "rb") as second:
        x, y = np.frombuffer(first.read(), np.uint8), np.frombuffer(second.read(), np.uint8)
    assert x.size == y.size
    return set(np.flatnonzero(x != y).tolist())


def test_the_blobs_hold_the_record_bit_for_bit_and_the_factor_is_one(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    save(
        path,
        net(convolution("c", "data", "c", 3, 7), batch_norm("bn", old, "c", factor=999.98236), scale("s", old, "c")),
    )
    write(path, out, {"bn": Change(new, ALL)})
    conv, bn, s = load(out).layer
    for stored, expected in zip(
        [*bn.blobs, *s.blobs], (new.mean, new.variance, [1.0], new.gamma, new.beta), strict=True
    ):
        assert np.array(stored.data, np.float32).tobytes() == np.float32(expected).tobytes()
    assert conv == load(path).layer[0]


def test_only_the_bytes_of_the_numbers_change_in_every_encoding(paths):
    path, out = paths
    old, new = one(dtype="float16"), one(seed=1, dtype="float16")
    for form in ("packed", "unpacked", "double", "half", "legacy", "raw float"):
        kind = "packed" if form == "unpacked" else form
        message = net(
            convolution("c", "data", "c", 3, 7),
            layer("bn", "BatchNorm", "c", "", [blob(v, form=kind) for v in (old.mean, old.variance, np.ones(1))],
                  batch_norm_param={"eps": 2.5e-3}),
            layer("s", "Scale", "c", "", [blob(v, form=kind) for v in (old.gamma, old.beta)], scale_param={"bias_term": True}),
        )  # fmt: skip
        save(path, unpacked(message) if form == "unpacked" else message)
        write(path, out, {"bn": Change(new, ALL)})
        assert_same_bits(caffe.read(out)["bn"].record, new)
        changed = len(differing_bytes(path, out))
        assert 0 < changed <= 28 * {"double": 8, "half": 2}.get(form, 4)
        bare, was = load(out), load(path)
        for one_net in (bare, was):
            for one_layer in one_net.layer[1:]:
                for stored in one_layer.blobs:
                    for name in ("data", "double_data", "raw_data"):
                        stored.ClearField(name)
        assert bare == was
        os.unlink(out)


def test_opencv_computes_the_written_record(paths, tmp_path):
    path, out = paths
    old, new = one(), one(seed=1)
    message = net(batch_norm("bn", old, "data", "bn", factor=999.98236), scale("s", old, "bn", "out"))
    save(path, message)
    write(path, out, {"bn": Change(new, ALL)})
    x = new.probes().astype(np.float32)
    text = tmp_path / "net.prototxt"
    text.write_text(prototxt(message, input_shape=(*x.shape, 1, 1)))
    (y,) = cv2_outputs(str(text), out, x.reshape(*x.shape, 1, 1))
    assert_within_bound(y.reshape(x.shape), new, x)


def test_mean_alone_is_written_only_where_the_factor_allows_the_variance_to_stay_as_it_is(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    for factor, possible in ((1.0, True), (512.0, True), (999.98236, False)):
        save(path, net(batch_norm("bn", old, "data", "bn", factor=factor)))
        before = caffe.read(path)["bn"].record
        change = {"bn": Change(new, frozenset({"mean"}))}
        if possible:
            write(path, out, change)
            assert_same_bits(caffe.read(out)["bn"].record, before.replace(mean=new.mean))
            os.unlink(out)
        else:
            with pytest.raises(Unrepresentable, match=r"bn: variance and mean are stored times one factor.*write both"):
                write(path, out, change)
            assert not os.path.exists(out)


def test_gamma_and_beta_alone_leave_the_factor_and_the_sums_as_they_are(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    save(path, net(batch_norm("bn", old, "data", "bn", factor=999.98236), scale("s", old, "bn")))
    write(path, out, {"bn": Change(new, frozenset({"gamma", "beta"}))})
    assert load(out).layer[0] == load(path).layer[0]


def test_five_blobs_scalars_and_bias_layers_are_written_where_they_lie(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    for blobs in (
        (old.mean, old.variance, [1], old.gamma, old.beta),
        (old.gamma, old.beta, old.mean, old.variance, [1]),
    ):
        save(
            path,
            net(
                layer("bn", "BatchNorm", "data", "bn", [np.float32(b) for b in blobs], batch_norm_param={"eps": 2.5e-3})
            ),
        )
        write(path, out, {"bn": Change(new, ALL)})
        assert_same_bits(caffe.read(out)["bn"].record, new)
        os.unlink(out)
    save(
        path,
        net(
            batch_norm("bn", old, "data"),
            scale("s", old, "data", bias=False),
            layer("b", "Bias", "data", "", [old.beta]),
        ),
    )
    write(path, out, {"bn": Change(new, ALL)})
    np.testing.assert_array_equal(load(out).layer[2].blobs[0].data, new.beta)
    os.unlink(out)
    scalar = layer("s", "Scale", "data", "", [blob(np.float32(2))], scale_param={"num_axes": 0})
    save(path, net(batch_norm("bn", old, "data"), scalar))
    same = new.replace(gamma=np.full(7, 3, np.float32), beta=np.zeros(7, np.float32))
    write(path, out, {"bn": Change(same, ALL - {"beta"})})
    assert list(load(out).layer[1].blobs[0].data) == [3.0]
    with pytest.raises(Unrepresentable, match="one number for all channels"):
        write(path, out + "2", {"bn": Change(new, frozenset({"gamma"}))})


def test_records_that_share_a_batch_norm_are_changed_together_or_not_at_all(paths):
    path, out = paths
    a, b, new, other = one(), one(seed=1), one(seed=2), one(seed=3)
    save(path, net(batch_norm("bn", a, "data", "bn"), scale("x", a, "bn", "x"), scale("y", b, "bn", "y")))
    with pytest.raises(Unrepresentable, match=r"bn\+y: its mean is shared"):
        write(path, out, {"bn+x": Change(new, ALL)})
    with pytest.raises(Unrepresentable, match="the two changes differ"):
        write(path, out, {"bn+x": Change(new, ALL), "bn+y": Change(other, ALL)})
    both = {"bn+x": Change(new, ALL), "bn+y": Change(new.replace(gamma=other.gamma), ALL)}
    write(path, out, both)
    assert_same_bits(caffe.read(out)["bn+y"].record, both["bn+y"].record)


def test_what_a_caffemodel_cannot_be_given_is_refused_and_nothing_is_written(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    for message, change, why in (
        (net(batch_norm("bn", old, "data")), Change(new, frozenset({"epsilon"})), "epsilon"),
        (net(batch_norm("bn", old, "data")), Change(new, frozenset({"momentum"}), 0.9), "momentum"),
        (net(batch_norm("bn", old, "data")), Change(new, ALL), "has no beta"),
        (net(batch_norm("bn", old, "data")), Change(new.replace(epsilon=0.5), frozenset({"variance"})), "epsilon is 0.5"),
        (net(batch_norm("bn", old, "data")), Change(one(seed=1).replace(mean=np.full(7, 0.1)), ALL - {"gamma", "beta"}),
         "not a float32 value"),
        (net(batch_norm("bn", old, "data")), Change(telling_record(6), ALL), "7 channels expected"),
        (net(layer("bn", "BN", "data", "", [old.gamma, old.beta], bn_param_segnet={"bn_mode": 1})), Change(new, ALL),
         "folded affine"),
    ):  # fmt: skip
        save(path, message)
        with pytest.raises(Unrepresentable, match=why):
            write(path, out, {"bn": change})
    with pytest.raises(NotFound, match="no BatchNorm layer nb"):
        write(path, out, {"nb": Change(new, ALL)})
    assert os.listdir(os.path.dirname(path)) == ["net.caffemodel"]


def test_inverse_std_files_are_not_written_with_statistics_but_with_gamma_and_beta(paths):
    path, out = paths
    old, new = one(), one(seed=1)
    blobs = [old.gamma, old.beta, old.mean, (1 / old.std).astype(np.float32)]
    save(path, net(layer("bn", "BN", "data", "", blobs)))
    with pytest.raises(Unrepresentable, match="1/std"):
        write(path, out, {"bn": Change(new, ALL)}, stat="inverse-std")
    write(path, out, {"bn": Change(new, frozenset({"gamma", "beta"}))}, stat="inverse-std")
    np.testing.assert_array_equal(load(out).layer[0].blobs[0].data, new.gamma)


def test_an_hdf5_caffemodel_is_written_in_place_and_chunked_blobs_are_refused(tmp_path):
    path, out, text = (str(tmp_path / name) for name in ("net.caffemodel.h5", "out.caffemodel.h5", "net.prototxt"))
    old, new = one(), one(seed=1)
    message = net(convolution("c", "data", "c", 3, 7), batch_norm("bn", old, "c", factor=512), scale("s", old, "c"))
    save_hdf5(path, message)
    with open(text, "w", encoding="utf-8") as file:
        file.write(prototxt(message))
    write(path, out, {"bn": Change(new, ALL)}, prototxt=text)
    with h5py.File(out) as written, h5py.File(path) as was:
        np.testing.assert_array_equal(written["data/c/0"][()], was["data/c/0"][()])
        stored = [written[f"data/{name}"][()] for name in ("bn/0", "bn/1", "bn/2", "s/0", "s/1")]
    for array, expected in zip(stored, (new.mean, new.variance, [1], new.gamma, new.beta), strict=True):
        np.testing.assert_array_equal(array, np.float32(expected))
    assert len(differing_bytes(path, out)) <= 4 * (4 * 7 + 1)
    with h5py.File(path, "r+") as file:
        kept = file["data/s/0"][()]
        del file["data/s/0"]
        file["data/s"].create_dataset("0", data=kept, chunks=(7,), compression="gzip")
    with pytest.raises(Unrepresentable, match="h5repack"):
        write(path, out + "2", {"bn": Change(new, ALL)}, prototxt=text)


def test_a_fresh_net_whose_factors_are_zero_can_be_converted_into(paths, tmp_path):
    path, out = paths
    r = one()
    fresh = r.replace(mean=np.zeros(7, np.float32), variance=np.zeros(7, np.float32))
    save(path, net(batch_norm("bn", fresh, "data", factor=0), scale("s", fresh, "data")))
    source = str(tmp_path / "source.caffemodel")
    trained = one(seed=1, epsilon=1e-3)
    save(source, net(batch_norm("bn", trained, "data", factor=999.98236), scale("s", trained, "data")))
    report = convert(source, path, out)
    assert report.ok
    got, expected = caffe.read(out)["bn"].record, caffe.read(source)["bn"].record.with_epsilon(r.epsilon)
    assert_same_bits(got, BatchNorm(**{f: np.float32(getattr(expected, f)) for f in ALL}, epsilon=r.epsilon))


def test_a_failure_while_writing_leaves_no_file(paths, monkeypatch):
    path, out = paths
    save(path, net(batch_norm("bn", one(), "data")))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BnportError, match="No space left"):
        write(path, out, {"bn": Change(one(seed=1), frozenset({"mean", "variance"}))})
    assert os.listdir(os.path.dirname(path)) == ["net.caffemodel"]
