"""A run goes on only where its checkpoint is of the same settings, model and data in the same order; what may be replaced."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bnport
from bnport.calibrate import run, shards
from bnport.calibrate.file import calibrate_file
from bnport.calibrate.run import calibrate
from bnport.calibrate.store import Workspace, clear
from bnport.errors import BnportError, FormatError, InvalidValue, OutputError
from tests.calibrate import nets, work
from tests.calibrate.nets import L, keras

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
X = nets.data(400, (4,))


def small(activation="relu", epsilon=1e-3):
    """Two rounds; made anew every time, as a script that is started again makes it."""
    keras.utils.set_random_seed(1)
    i = keras.Input((4,))
    x = L.Activation(activation)(L.BatchNormalization(name="a", epsilon=epsilon)(L.Dense(4)(i)))
    return keras.Model(i, L.BatchNormalization(name="b")(x))


def stop(done, total, what):
    if "round 2" in what or what == "batch 10":
        raise KeyboardInterrupt


def cut(data, path, model=None, progress=stop, **options):
    with pytest.raises(KeyboardInterrupt):
        calibrate(small() if model is None else model, data, resume=path, progress=progress, **options)
    assert os.path.exists(path)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
    return str(tmp_path / "run.ckpt")


def loader(seed, shuffle=True):
    import torch

    rows = torch.utils.data.TensorDataset(torch.from_numpy(X))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(rows, batch_size=20, shuffle=shuffle, generator=generator)


def tf_data(seed):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(X).shuffle(400, seed=seed).batch(20)


@pytest.mark.parametrize("method", ["population", "precise", "average", "moving"])
@pytest.mark.parametrize("make", [loader, tf_data])
def test_a_shuffled_source_is_refused_unless_it_shuffles_alike(method, make, path):
    for seeds in ((1, 2), (None, None)) if make is loader else ((1, 2),):
        cut(make(seeds[0]), path, method=method)
        with pytest.raises(InvalidValue, match=r"batch 0 is not the batch 0 that it has seen.*no shuffling"):
            calibrate(small(), make(seeds[1]), resume=path, method=method)
        os.unlink(path)
    if make is loader:  # tf.data with a seed of its own depends on the global one too
        expected = calibrate(small(), make(1), method=method)
        cut(make(1), path, method=method)
        result = calibrate(small(), make(1), resume=path, method=method)
        assert any("resumed" in note for note in result.notes)
        assert result.samples == 400
        for name in "ab":
            assert result[name].mean.tobytes() == expected[name].mean.tobytes()
            assert result[name].variance.tobytes() == expected[name].variance.tobytes()


def changed(first):
    y = X.copy()
    y[first:] += 100
    return y


@pytest.mark.parametrize("method", ["population", "precise"])
def test_data_of_which_a_later_part_differs_are_refused(method, path):
    cut(X, path, method=method, batch_size=20)
    for data, message in (
        (changed(50), "batch 2 is not"),
        (X[:100], "another run"),
        (X.astype("f8"), "batch 0 is not"),
    ):
        with pytest.raises(InvalidValue, match=message):
            calibrate(small(), data, resume=path, method=method, batch_size=20)
    batches = nets.batches_of
    os.unlink(path)
    cut(batches(X, 20), path, method=method)
    for data, message in ((X[:100], "end after 5 batches"), (changed(179), "batch 8 is not")):
        with pytest.raises(InvalidValue, match=message):
            calibrate(small(), batches(data, 20), resume=path, method=method)
    if method == "population":
        with pytest.raises(InvalidValue, match="more than the 20 batches"):
            calibrate(small(), batches(np.concatenate([X, X]), 20), resume=path, method=method)
    assert calibrate(small(), batches(X, 20), resume=path, method=method).samples == 400


def test_other_settings_and_models_are_refused_and_the_part_is_named(path, tmp_path):
    rows = str(tmp_path / "x.npy")
    np.save(rows, X)
    cut(rows, path, batch_size=20, limit=200)
    same = {"batch_size": 20, "limit": 200}
    for model, data, options, part in (
        (small(), rows, {"limit": None}, "the limit, the data"),
        (small(), rows, {"limit": 100}, "the limit"),
        (small(), rows, {"batch_size": 10}, "the data, or their batch size"),
        (small("tanh"), rows, {}, "the model's layers and their settings"),
        (small(epsilon=0.1), rows, {}, "the model's layers and their settings"),
        (small(), rows, {"layers": "a"}, "the layers"),
        (small(), rows, {"unbiased": True}, "the method"),
    ):
        with pytest.raises(InvalidValue, match=f"another run: it had other values for {part}"):
            calibrate(model, data, resume=path, **{**same, **options})
    later = small()
    later.get_layer("a").epsilon = 1.0
    with pytest.raises(InvalidValue, match="the model's layers"):
        calibrate(later, rows, resume=path, **same)
    os.utime(rows, ns=(1, 1))
    with pytest.raises(InvalidValue, match="the data, or their batch size"):
        calibrate(small(), rows, resume=path, **same)


class Mine(keras.Model):
    """A model without a config of its own, whose code differs by `slope` only."""

    def __init__(self, slope):
        super().__init__()
        self.norm, self.slope = L.BatchNormalization(name="a"), slope
        self.end = L.BatchNormalization(name="b")


class Once(Mine):
    def call(self, x, training=False):
        return self.end(self.norm(x) * 2)


class Twice(Mine):
    def call(self, x, training=False):
        return self.end(self.norm(x) * 3)


def test_the_code_of_a_subclassed_model_belongs_to_it(path):
    one, other = Once(2), Twice(2)
    other.__class__.__qualname__ = one.__class__.__qualname__
    for model in (one, other):
        model(X[:1])
    for a, b in zip(one.weights, other.weights, strict=True):
        b.assign(a)
    cut(X, path, one)
    with pytest.raises(InvalidValue, match="the model's layers and their settings"):
        calibrate(other, X, resume=path)
    assert calibrate(one, X, resume=path).rounds == 1


def test_a_folder_in_which_an_image_changed_or_came_is_refused(path, tmp_path):
    from PIL import Image

    i = keras.Input((8, 8, 3))
    x = L.BatchNormalization(name="b")(L.ReLU()(L.BatchNormalization(name="a")(L.Conv2D(4, 3)(i))))
    model = keras.Model(i, x)
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(60):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype("u1")).save(folder / f"{k:02}.png")
    options = {"batch_size": 20, "images": {"scale": "1/255"}}
    cut(str(folder), path, model, **options)
    with pytest.raises(InvalidValue, match="the data"):
        calibrate(model, str(folder), resume=path, batch_size=20, images={"scale": "1/127.5"})
    before = (folder / "40.png").read_bytes()
    Image.new("RGB", (8, 8)).save(folder / "40.png")
    with pytest.raises(InvalidValue, match="the data"):
        calibrate(model, str(folder), resume=path, **options)
    (folder / "40.png").write_bytes(before)
    Image.new("RGB", (8, 8)).save(folder / "99.png")
    with pytest.raises(InvalidValue, match="the data"):
        calibrate(model, str(folder), resume=path, **options)


@pytest.mark.parametrize("method", ["population", "precise"])
def test_an_object_that_gives_other_batches_is_refused_on_an_engine(method, path, monkeypatch):
    model = nets.branches()

    def interrupt(done, total, what):
        if done >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "shard_size", lambda *_: 2)
    options = {"engine": "serial", "method": method}
    cut(work.Elevens(110), path, model, progress=interrupt, **options)
    other = work.Elevens(110)
    other.x = other.x.copy()
    other.x[11:22] += 1
    for engine in ("serial", None):
        with pytest.raises(InvalidValue, match="batch 1 is not the batch 1"):
            calibrate(model, other, resume=path, method=method, engine=engine)
    assert calibrate(model, work.Elevens(110), resume=path, **options).samples == 110


# Files that are not a checkpoint, and results that do not come to stand.


@pytest.fixture
def files(tmp_path):
    small().save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", X)
    return str(tmp_path / "m.keras"), str(tmp_path / "x.npy"), str(tmp_path / "out.keras")


def test_a_file_that_is_no_checkpoint_is_refused_left_alone_and_not_to_be_deleted(files, tmp_path):
    model, rows, out = files
    for name, content in (("r.npz", None), ("text", b"hello"), ("empty", b""), ("zip", b"PK\x03\x04" + bytes(99))):
        if content is None:
            np.savez(tmp_path / name, x=X)
        else:
            (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "plain", X)
    small().save(tmp_path / "other.keras")
    for name in ("r.npz", "text", "empty", "zip", "plain.npy", "other.keras", "m.keras", "x.npy"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(BnportError, match=rf"{name}: (exists and )?is (not a checkpoint|the input)") as error:
            calibrate_file(model, rows, out, resume=str(tmp_path / name))
        assert "delete" not in str(error.value)
        assert (tmp_path / name).read_bytes() == before
    for name in ("r.npz", "plain.npy", "other.keras"):
        with pytest.raises(FormatError, match="not a checkpoint"):
            calibrate(small(), X, resume=str(tmp_path / name))


def test_an_output_that_is_read_or_is_the_checkpoint_is_refused(files, tmp_path):
    model, rows, out = files
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "0.npy", X)
    for data, target in ((rows, rows), (str(folder), str(folder / "0.npy")), (np.load(rows, mmap_mode="r"), rows)):
        before = pathlib.Path(target).read_bytes()
        with pytest.raises(OutputError, match="is the input"):
            calibrate_file(model, data, target, force=True)
        assert pathlib.Path(target).read_bytes() == before
    with pytest.raises(OutputError, match="file for checkpoints"):
        calibrate_file(model, rows, out, resume=out)
    for name in ("out.h5", "out.pth", "out.weights.h5", "out.backup", "out"):
        with pytest.raises(OutputError, match=r"will be a \.keras file, .*; let its name end in \.keras$") as refused:
            calibrate_file(model, rows, str(tmp_path / name))
        if name not in ("out.backup", "out"):  # convert leaves a suffix that no format has to its user
            with pytest.raises(OutputError) as same:
                bnport.convert(model, model, str(tmp_path / name))
            assert str(same.value) == str(refused.value)
    calibrate_file(model, str(folder), str(folder / "new.keras"))  # a new file beside the data replaces nothing
    assert (folder / "new.keras").exists()


@pytest.mark.parametrize("method", ["population", "precise"])
def test_the_checkpoint_outlives_a_result_that_could_not_be_written(files, tmp_path, method):
    model, rows, out = files
    path = str(tmp_path / "run.ckpt")

    def spoil(done, total, what):
        if done == total:
            pathlib.Path(out).write_text("somebody else's")

    options = {"method": method, "batch_size": 20, "resume": path}
    with pytest.raises(OutputError, match="exists already"):
        calibrate_file(model, rows, out, progress=spoil, **options)
    assert os.path.exists(path)
    os.unlink(out)
    result = calibrate_file(model, rows, out, **options)
    assert (result.samples, result.batches) == (400, 20)
    assert not os.path.exists(path)
    calibrate_file(model, rows, str(tmp_path / "plain.keras"), method=method, batch_size=20)
    assert pathlib.Path(out).read_bytes() == (tmp_path / "plain.keras").read_bytes()


def test_a_generator_whose_layers_were_all_known_is_still_compared(path):
    cut(nets.batches_of(X, 20), path, progress=lambda done, total, what: stop(done, total, what))
    calibrate(small(), nets.batches_of(X, 20), resume=path, keep_checkpoint=True)
    with pytest.raises(InvalidValue, match="batch 19 is not"):
        calibrate(small(), nets.batches_of(changed(390), 20), resume=path)
    assert calibrate(small(), nets.batches_of(X, 20), resume=path).samples == 400


# What is left behind.

DIES = """
import os, sys, time
from bnport.calibrate.store import Workspace
folder = Workspace(sys.argv[1])
open(os.path.join(folder.path, "1"), "w").close()
print(folder.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, alive = (process.stdout.readline().strip() for process in running)
        unlocked = tmp_path / f"{Workspace.PREFIX}1-other"
        unlocked.mkdir()
        running[0].kill()
        running[0].wait()
        clear(str(tmp_path))
        assert not os.path.exists(dead)
        assert sorted(os.listdir(alive)) == ["1", Workspace.LOCK]
        assert unlocked.exists()  # nobody says that it is not in use
        with Workspace(str(tmp_path)) as own:
            clear(str(tmp_path))
            assert os.path.exists(own.path)
        assert not os.path.exists(own.path)
    finally:
        for process in running:
            process.kill()
            process.wait()
    calibrate(small(), X, spill=str(tmp_path))
    assert not os.path.exists(alive)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_command_cleans_up_and_keeps_its_checkpoint(files, tmp_path, how):
    model, rows, out = files
    (tmp_path / "spill").mkdir()
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from bnport.calibrate import run\n"
        "from bnport.cli import common, main\n"
        "def slow(done, total, what):\n"
        "    if 'round 2' in what: time.sleep(600)\n"
        "common.Progress.__enter__ = lambda self: slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["calibrate", model, "--data", rows, "-o", out, "--memory", "0", "--spill", "spill", "--resume", "run"]
    running = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.listdir(tmp_path / "spill")
    time.sleep(0.5)
    running.send_signal(how)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 2
    assert error.splitlines()[-1] == "bnport: interrupted; no file is half-written"
    assert os.listdir(tmp_path / "spill") == []
    assert (tmp_path / "run").exists()
    assert not os.path.exists(out)
