"""A model file in, a copy out: only statistics differ, Keras itself reads them, code in files is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from bnport.calibrate.file import calibrate_file
from bnport.calibrate.run import calibrate
from bnport.cli import main
from bnport.errors import FormatError, InvalidValue, NotFound, OutputError
from tests.calibrate import nets
from tests.calibrate.nets import L, keras

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model.keras (nested, compiled, trained, one renorm layer), data.npy, and the live model."""
    folder = tmp_path_factory.mktemp("made")
    inner = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(6, 3), L.BatchNormalization(name="bn")], name="inner")
    i = keras.Input((8, 8, 3))
    x = inner(L.ReLU()(L.BatchNormalization(name="bn", scale=False)(L.Conv2D(4, 3)(i))))
    x = L.BatchNormalization(name="last", renorm=True)(L.Dropout(0.5)(L.GlobalAveragePooling2D()(x)))
    model = nets.stir(keras.Model(i, x))
    model.compile("adam", "mse")
    model.fit(nets.data(), np.zeros((70, 6), "f4"), verbose=0)
    model.save(folder / "model.keras")
    np.save(folder / "data.npy", nets.data())
    return str(folder / "model.keras"), str(folder / "data.npy"), model


def arrays(path):
    """Every dataset of the weights in a .keras, and its other members as bytes."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    with h5py.File(io.BytesIO(members.pop("model.weights.h5"))) as file:
        file.visititems(
            lambda name, node: found.__setitem__(name, node[()]) if isinstance(node, h5py.Dataset) else None
        )
    return found, members


@pytest.mark.parametrize("method", ["population", "moving"])
def test_the_copy_loads_as_the_live_model_calibrated(made, tmp_path, method):
    path, data, _ = made
    out = str(tmp_path / "out.keras")
    calibrate_file(path, data, out, method=method, batch_size=16)
    live = keras.models.load_model(path)
    calibrate(live, np.load(data), method=method, batch_size=16)
    loaded = keras.models.load_model(out)
    for ours, theirs in zip(nets.held(loaded), nets.held(live), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert (
        loaded.get_layer("last").renorm_mean.numpy().tobytes() == live.get_layer("last").moving_mean.numpy().tobytes()
    )
    np.testing.assert_array_equal(loaded.predict(np.load(data), verbose=0), live.predict(np.load(data), verbose=0))
    before, other_before = arrays(path)
    after, other_after = arrays(out)
    assert other_before == other_after
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert set(before) == set(after)
    assert len(changed) == 2 + 2 + 5  # mean and variance of each, and with renorm three that mirror them
    assert any("optimizer" in name for name in before)
    assert not any("optimizer" in name for name in changed)


def test_a_keras_2_file_is_run_by_keras_2(tmp_path):
    script = (
        "import sys; from tests.calibrate import nets; from bnport.calibrate.run import calibrate\n"
        "m = nets.branches(); m.save(sys.argv[1]); m.save(sys.argv[2])\n"
        "calibrate(m, nets.data(), batch_size=16); m.save(sys.argv[3])\n"
    )
    paths = [str(tmp_path / name) for name in ("old.h5", "old.keras", "expected.h5")]
    subprocess.run(
        [sys.executable, "-c", script, *paths], cwd=ROOT, check=True, env={**os.environ, "LIBRARY": "tf_keras"}
    )
    from bnport import adapters

    expected = adapters.read(paths[2], format="keras")
    for path in paths[:2]:
        out = path.replace("old", "new")
        result = calibrate_file(path, nets.data(), out, batch_size=16)
        assert len(result.layers) == 5
        found = adapters.read(out, format="keras")
        for ours, theirs in zip(found.values(), expected.values(), strict=True):
            assert ours.record.mean.tobytes() == theirs.record.mean.tobytes()
            assert ours.record.variance.tobytes() == theirs.record.variance.tobytes()


def test_statistics_that_were_destroyed_are_no_obstacle(made, tmp_path):
    path, data, _ = made
    broken, out = str(tmp_path / "broken.keras"), str(tmp_path / "out.keras")
    model = keras.models.load_model(path)
    for layer in nets.norms(model):
        layer.moving_mean.assign(np.full(layer.moving_mean.shape, np.nan))
        layer.moving_variance.assign(np.full(layer.moving_mean.shape, -1.0))
    model.save(broken)
    result = calibrate_file(broken, data, out, batch_size=16)
    (first, *_) = json.loads(json.dumps(result.to_dict(), allow_nan=False))["layers"]
    assert first["old_mean"] == [None] * first["channels"]
    assert first["mean"] == result.layers[0].mean.tolist()
    good = str(tmp_path / "good.keras")
    calibrate_file(path, data, good, batch_size=16)
    assert {k: v.tobytes() for k, v in arrays(out)[0].items()} == {k: v.tobytes() for k, v in arrays(good)[0].items()}
    with pytest.raises(InvalidValue, match="statistics"):
        calibrate_file(broken, data, str(tmp_path / "moving.keras"), method="moving")
    assert not (tmp_path / "moving.keras").exists()


def test_the_command_prints_old_against_new_and_json(made, tmp_path, capsys):
    path, data, _ = made
    out = str(tmp_path / "out.keras")
    assert main(["calibrate", path, "--data", data, "-o", out, "--memory", "8GB", "--batch-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert "inner/bn" in printed
    assert "3 layers, method population, variance biased (divided by n), 70 samples in 5 batches, 3 rounds" in printed
    assert main(["calibrate", path, "--data", data, "-o", out, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (
        main(["calibrate", path, "--data", data, "-o", out, "--json", "--force", "--unbiased", "--layers", "l*"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in report["layers"]] == ["last"]
    assert report["variance"] == "unbiased"
    assert report["left"]["not asked for"] == ["bn", "inner/bn"]
    assert report["out"] == out
    assert main(["calibrate", path, "--data", data, "-o", str(tmp_path / "x.keras"), "--scale", "1/255"]) == 2
    assert "options for a folder of images, which the data are not" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out.keras"]


def rewritten(path, out, change):
    """A copy of a .keras with another config."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return out


def test_code_in_a_file_is_refused_before_keras_sees_it(made, tmp_path, monkeypatch):
    path, data, _ = made
    canary = tmp_path / "canary"
    out = str(tmp_path / "out.keras")
    monkeypatch.setattr(keras.models, "load_model", lambda *a, **k: canary.write_text("loaded"))

    def first(config, **values):
        config["config"]["layers"][1].update(values)

    cases = {
        "a Lambda layer": lambda c: first(c, class_name="Lambda"),
        "the custom class Evil>Conv": lambda c: first(c, module=None, registered_name="Evil>Conv"),
        "Conv2D of the module os.path": lambda c: first(c, module="os.path"),
        "system of the module subprocess": lambda c: c["config"]["layers"][1]["config"].update(
            activation={"module": "subprocess", "class_name": "system", "config": {}}
        ),
        "function of the module keras.utils": lambda c: c["config"]["layers"][1]["config"].update(
            activation={"module": "keras.utils", "class_name": "function", "config": "get_file"}
        ),
        "a call of tf.io.write_file": lambda c: c["config"]["layers"][1].update(
            class_name="TFOpLambda", config={"function": "io.write_file"}
        ),
    }
    for message, change in cases.items():
        bad = rewritten(path, str(tmp_path / "bad.keras"), change)
        with pytest.raises(FormatError, match="does not run from a file") as caught:
            calibrate_file(bad, data, out)
        assert message in str(caught.value)
        os.unlink(bad)
    for content in (b"", b"PK\x03\x04nonsense", b"nonsense"):
        (tmp_path / "bad.keras").write_bytes(content)
        with pytest.raises((FormatError, NotFound)):
            calibrate_file(str(tmp_path / "bad.keras"), data, out)
    assert not canary.exists()
    assert not os.path.exists(out)


def test_weights_without_a_model_and_outputs_that_cannot_be_are_refused_first(made, tmp_path):
    path, data, model = made
    weights = str(tmp_path / "m.weights.h5")
    model.save_weights(weights)
    with pytest.raises(FormatError, match="holds weights but no model"):
        calibrate_file(weights, data, str(tmp_path / "o.weights.h5"))
    with pytest.raises(OutputError, match="is the input"):
        calibrate_file(path, data, path, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        calibrate_file(path, data, str(tmp_path / "no" / "o.keras"))
    with pytest.raises(NotFound, match="no such file"):
        calibrate_file(str(tmp_path / "no.keras"), data, str(tmp_path / "o.keras"))
    with pytest.raises(NotFound, match="no such file"):
        calibrate_file(path, str(tmp_path / "no.npy"), str(tmp_path / "o.keras"))
