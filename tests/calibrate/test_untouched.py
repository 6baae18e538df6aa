"""Only mean and variance change; errors and interruptions change nothing; runs resume to the same bits."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from importlib import import_module

import numpy as np
import pytest

from bnport.calibrate.run import METHODS, calibrate
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, OutputError
from tests.calibrate import nets
from tests.calibrate.nets import L, keras

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def everything(model):
    """Every variable of the model and its optimizer with an id, statistics of BatchNorm apart."""
    statistics = {id(v) for layer in nets.norms(model) for v in (layer.moving_mean, layer.moving_variance)}
    variables = [*model.variables, *model.optimizer.variables]
    kept = {k: np.array(v.numpy()).tobytes() for k, v in enumerate(variables) if id(v) not in statistics}
    return kept, {k: np.array(v.numpy()).tobytes() for k, v in enumerate(variables) if id(v) in statistics}


@pytest.fixture(scope="module")
def trained():
    """A model with optimizer state, and a dropout that draws even at inference."""
    i = keras.Input((8, 8, 3))
    x = L.BatchNormalization(name="one")(L.Conv2D(4, 3)(i))
    x = L.Dropout(0.3, seed=5)(L.ReLU()(x), training=True)
    x = L.BatchNormalization(name="two")(L.Dense(3)(L.Flatten()(x)))
    model = nets.stir(keras.Model(i, x))
    model.compile("adam", "mse")
    model.fit(nets.data(), np.zeros((70, 3), "f4"), epochs=2, verbose=0)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_only_statistics_change_and_undo_restores_them(trained, method):
    kept, statistics = everything(trained)
    calls = [layer.__dict__.get("call") for layer in nets.norms(trained)]
    state = np.random.get_state()[1].tobytes()
    result = calibrate(trained, nets.data(), batch_size=16, method=method)
    now, changed = everything(trained)
    assert now == kept  # gamma, beta, kernels, optimizer slots, iterations, seed generators
    assert all(changed[k] != statistics[k] for k in statistics)
    assert np.random.get_state()[1].tobytes() == state
    assert calls == [layer.__dict__.get("call") for layer in nets.norms(trained)] == [None, None]
    assert trained.get_layer("one").trainable
    result.undo()
    assert everything(trained) == (kept, statistics)
    with pytest.raises(InvalidValue, match="undone already"):
        result.undo()


def test_a_layer_outside_the_graph_and_states_of_recurrent_layers_stay_as_they_are():
    i = keras.Input(batch_shape=(10, 4, 3))
    model = keras.Model(i, L.BatchNormalization(name="bn")(L.LSTM(5, stateful=True, return_sequences=True)(i)))
    model.spare = L.BatchNormalization(name="spare")
    model.spare.build((None, 2))
    model(np.ones((10, 4, 3), "f4"))
    before = [np.array(state) for state in model.layers[1].states]
    assert np.abs(before[0]).max() > 0
    for method in METHODS:
        result = calibrate(model, nets.data(40, (4, 3)), batch_size=10, method=method)
        assert result.left == {"never called at inference": ["spare"]}
        assert [layer.name for layer in result.layers] == ["bn"]
        assert all(a.tobytes() == np.array(b).tobytes() for a, b in zip(before, model.layers[1].states, strict=True))
    with pytest.raises(NotFound, match="none of the 1 layers is called"):
        calibrate(model, nets.data(40, (4, 3)), batch_size=10, layers="spare")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(trained, method, error):
    before = everything(trained)

    def stopping(done, total, what):
        if "round 2" in what or "batch 3" in what:
            raise error

    with pytest.raises(error):
        calibrate(trained, nets.data(), batch_size=16, method=method, progress=stopping)
    assert everything(trained) == before
    assert [layer.__dict__.get("call") for layer in nets.norms(trained)] == [None, None]


def test_an_interrupted_population_run_goes_on_with_the_rounds_that_are_left(tmp_path):
    model, x, path = nets.branches(), nets.data(), str(tmp_path / "run.npz")
    result = calibrate(model, x, batch_size=16)
    expected = nets.held(model)
    result.undo()

    def stopping(done, total, what):
        if "round 3" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, x, batch_size=16, resume=path, progress=stopping)
    assert os.path.exists(path)
    result = calibrate(model, x, batch_size=16, resume=path)
    assert result.rounds == 2
    assert "resumed: 3 of 5 layers were known" in result.notes
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(model), strict=True))
    assert os.listdir(tmp_path) == []  # the checkpoint has done its work


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("method", ["precise", "average", "moving"])
def test_an_interrupted_pass_goes_on_after_the_last_batch_it_saved(tmp_path, monkeypatch, method, repeatable):
    monkeypatch.setattr(import_module("bnport.calibrate.run"), "SAVE_EVERY", 0.0)
    model, path, drawn = nets.branches(), str(tmp_path / "run.npz"), []

    def source():
        for batch in nets.batches_of(nets.data(), 16):
            drawn.append(len(batch))
            yield batch

    def data():
        return source if repeatable else source()

    result = calibrate(model, data(), method=method)
    expected, samples = nets.held(model), result.samples
    result.undo()

    def stopping(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, data(), method=method, resume=path, progress=stopping)
    result = calibrate(model, data(), method=method, resume=path)
    assert "resumed after 2 batches" in result.notes
    assert (result.samples, result.batches) == (samples, 5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, nets.held(model), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = str(tmp_path / "run.npz")

    def stopping(done, total, what):
        if "round 2" in what:
            raise KeyboardInterrupt

    model, x = nets.branches(), nets.data()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, x, resume=path, progress=stopping)
    good = pathlib.Path(path).read_bytes()
    for changed in ({"unbiased": True}, {"layers": "stem"}, {"batch_size": 8}):
        with pytest.raises(InvalidValue, match="is the checkpoint of another run"):
            calibrate(model, x, resume=path, **changed)
    with pytest.raises(InvalidValue, match="another run"):
        calibrate(model, nets.data(seed=1), resume=path)
    model.get_layer("conv").bias.assign([0.0, 0.0, 0.0, 1.0])
    with pytest.raises(InvalidValue, match="another run"):
        calibrate(model, x, resume=path)
    assert pathlib.Path(path).read_bytes() == good
    for bad in (b"", b"nonsense", good[: len(good) // 2], good[:400] + b"\xff" * 8 + good[408:]):
        pathlib.Path(path).write_bytes(bad)
        with pytest.raises((FormatError, InvalidValue), match=r"run\.npz|moments"):
            calibrate(model, x, resume=path)
    np.savez(path, made_for=np.array([{}], dtype=object))
    with pytest.raises(FormatError, match="not a checkpoint"):
        calibrate(model, x, resume=path)


def test_a_checkpoint_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        calibrate(nets.branches(), nets.data(), resume=str(tmp_path / "no" / "run.npz"))


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_to_the_same_bits(tmp_path):
    path = str(tmp_path / "run.npz")
    script = textwrap.dedent(
        f"""
        import sys, time
        from tests.calibrate import nets
        nets.keras.utils.set_random_seed(3)
        from bnport.calibrate.run import calibrate
        model = nets.branches()
        def slow(done, total, what):
            print(what, flush=True)
            if "round 3" in what and "--slow" in sys.argv:
                time.sleep(60)
        calibrate(model, nets.data(), batch_size=16, resume={path!r}, progress=slow)
        print("sum", [w.tobytes().hex() for w in nets.held(model)])
        """
    )

    def command(*more):
        return [sys.executable, "-c", script, *more]

    running = subprocess.Popen(
        command("--slow"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in running.stdout:
        if "round 3" in line:
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert os.path.exists(path)
    resumed = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert resumed[0].startswith("round 1 of 2")
    keras.utils.set_random_seed(3)
    model = nets.branches()
    assert calibrate(model, nets.data(), batch_size=16).rounds == 4
    assert resumed[-1] == f"sum {[w.tobytes().hex() for w in nets.held(model)]}"


@pytest.mark.parametrize("version", ["3.0.5", "3.2.1"])
def test_a_keras_3_too_old_is_refused_in_a_line(monkeypatch, trained, version):
    monkeypatch.setattr(keras, "__version__", version)
    with pytest.raises(MissingDependency, match=rf"needs Keras 3\.3 or newer, or Keras 2: this is {version}"):
        calibrate(trained, nets.data())
