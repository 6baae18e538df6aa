"""A write that is killed or fails at any step leaves the output old, new or absent, and the inputs as they were."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import zipfile

import h5py
import numpy as np
import pytest

import bnport
from bnport.containers import files
from bnport.containers.files import TEMPORARY, replace_file
from bnport.errors import OutputError
from tests.adapters.contract import assert_same_bits
from tests.dying_child import NEW, WRITING, killed, write

pytestmark = pytest.mark.core


def target(folder, kind):
    """A small Keras file, by h5py and zipfile."""
    h5 = str(folder / "target.h5")
    config = {"name": "bn", "axis": -1, "momentum": 0.99, "epsilon": 0.001, "center": True, "scale": True}
    layer = {"class_name": "BatchNormalization", "config": config, "build_config": {"input_shape": [None, 3]}}
    model = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    legacy = kind == ".h5"
    with h5py.File(h5, "w") as file:
        names = ["gamma", "beta", "moving_mean", "moving_variance"]
        for number, name in enumerate(names):
            path = f"model_weights/bn/bn/{name}" if legacy else f"layers/batch_normalization/vars/{number}"
            file[path] = np.float32([1, 2, 3]) + number
        if legacy:
            file.attrs["model_config"] = json.dumps(model)
            file["model_weights"].attrs["layer_names"] = [b"bn"]
            file["model_weights/bn"].attrs["weight_names"] = [f"bn/{name}".encode() for name in names]
    if kind == ".h5":
        return h5
    path = str(folder / f"target{kind}")
    if kind == ".keras":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("config.json", json.dumps(model))
            file.write(h5, "model.weights.h5")
    else:
        os.rename(h5, path)
    return path


def leftovers(folder):
    return [name for name in os.listdir(folder) if TEMPORARY in name]


@pytest.mark.parametrize("kind", [".keras", ".weights.h5"])
def test_a_kill_at_any_step_leaves_the_output_old_or_new(tmp_path, kind):
    path, out = target(tmp_path, kind), str(tmp_path / f"out{kind}")
    with open(path, "rb") as file:
        source = file.read()
    total = int(killed(0, "write", path, out).stdout)
    assert total >= 6
    with open(out, "rb") as file:
        new = file.read()
    seen = set()
    for step in range(1, total + 1):
        with open(out, "wb") as file:
            file.write(b"the old output")
        assert killed(step, "write", path, out).returncode == -9
        with open(out, "rb") as file:
            found = file.read()
        assert found in (b"the old output", new), f"step {step}"
        seen.add(found == new)
        with open(path, "rb") as file:
            assert file.read() == source
        for name in leftovers(tmp_path):
            os.unlink(tmp_path / name)
    assert False in seen


@pytest.mark.parametrize("kind", [".keras", ".weights.h5", ".h5"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EXDEV, errno.EDQUOT])
def test_an_error_at_any_step_leaves_the_output_old_and_no_temporary_file(tmp_path, kind, code, monkeypatch):
    path, out = target(tmp_path, kind), str(tmp_path / f"out{kind}")
    with open(path, "rb") as file:
        source = file.read()
    for name in WRITING:
        real = getattr(os, name)
        for nth in range(1, 40):
            with open(out, "wb") as file:
                file.write(b"the old output")
            calls = 0

            def failing(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == nth:  # noqa: B023
                    raise OSError(code, os.strerror(code))
                return real(*args, **kwargs)  # noqa: B023

            monkeypatch.setattr(os, name, failing)
            try:
                write(path, out)
                raised = None
            except (OutputError, ValueError) as error:
                raised = error
            finally:
                monkeypatch.setattr(os, name, real)
            if calls < nth:
                break  # every call of this function has failed once
            with open(out, "rb") as file:
                found = file.read()
            assert not leftovers(tmp_path), (name, nth)
            if raised is None:
                # copy_file_range may fail (another file system) and is then done without; the last fsync is of the folder
                (layer,) = bnport.read(out).values()
                assert_same_bits(layer.record, NEW.replace(epsilon=layer.epsilon))
                assert name in ("copy_file_range", "open")
            elif "is written, but" in str(raised):  # the folder's flush, the last step
                (layer,) = bnport.read(out).values()
                assert_same_bits(layer.record, NEW.replace(epsilon=layer.epsilon))
            else:
                assert found == b"the old output", (name, nth)
            assert "\n" not in str(raised)
            with open(path, "rb") as file:
                assert file.read() == source


@pytest.mark.parametrize("kernel", [True, False])
def test_a_range_is_copied_and_bytes_are_appended_also_where_a_system_takes_less_at_once(tmp_path, kernel, monkeypatch):
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "in").write_bytes(data)
    real_copy, real_write = os.copy_file_range, os.write

    def copy(source, out, count, offset):
        if not kernel:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real_copy(source, out, min(count, 700), offset)

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:700]))
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    try:
        files.append(descriptor, data[:2000])
        files.copy_range(files.ReadFile(str(tmp_path / "in")), descriptor, 1500, 4999)
    finally:
        os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == data[:2000] + data[1500:4999]


@pytest.fixture
def waiting(monkeypatch):
    """An event; while a file is copied, each step waits until it is set: threads have their turn in time."""
    arrived = threading.Event()
    monkeypatch.setattr(files, "tell", lambda *_: arrived.wait(10))
    return arrived


def test_what_is_large_is_flushed_while_it_is_copied(tmp_path, monkeypatch, waiting):
    path, out = target(tmp_path, ".keras"), str(tmp_path / "out.keras")
    flushed, real = set(), os.fsync
    monkeypatch.setattr(files, "COPIED", 500)

    def flush(descriptor):
        flushed.add(threading.current_thread())
        waiting.set()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    write(path, out)
    (layer,) = bnport.read(out).values()
    assert_same_bits(layer.record, NEW.replace(epsilon=layer.epsilon))
    assert len(flushed) > 1
    assert not any(thread.is_alive() for thread in flushed - {threading.current_thread()})


def test_an_error_of_a_flush_that_nobody_waited_for_is_not_lost(tmp_path, monkeypatch, waiting):
    path, out = target(tmp_path, ".keras"), str(tmp_path / "out.keras")
    real = os.fsync

    def once(descriptor):  # as Linux says it: to the first who asks
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(files, "COPIED", 500)
    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(OutputError, match="Input/output error; nothing was written"):
        write(path, out)
    assert sorted(os.listdir(tmp_path)) == ["target.h5", "target.keras"]


def test_a_large_file_is_copied_and_hashed_where_the_system_gives_no_thread(tmp_path, monkeypatch):
    path, out = target(tmp_path, ".keras"), str(tmp_path / "out.keras")

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(files, "COPIED", 500)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    write(path, out)
    (layer,) = bnport.read(out).values()
    assert_same_bits(layer.record, NEW.replace(epsilon=layer.epsilon))
    with open(out, "rb") as file:
        assert files.Digest(out).result() == hashlib.sha256(file.read()).hexdigest()
    with pytest.raises(OSError, match="nix"):
        files.Digest(str(tmp_path / "nix")).result()


def test_a_check_that_fails_leaves_nothing(tmp_path):
    path, out = target(tmp_path, ".keras"), str(tmp_path / "out.keras")

    def check(_):
        raise OutputError("what was written reads back differently")

    with pytest.raises(OutputError):
        replace_file(out, lambda new: files.copy_contents(path, os.open(new, os.O_WRONLY)), check)
    assert sorted(os.listdir(tmp_path)) == ["target.h5", "target.keras"]
