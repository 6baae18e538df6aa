"""A file changed in place is the old one, the new one, or opened by nobody, wherever the change is killed or fails."""

from __future__ import annotations

import errno
import json
import os
import zipfile

import h5py
import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch

import bnport
from bnport.cli import main
from bnport.containers import in_place
from bnport.containers.files import ReadFile
from bnport.containers.in_place import UNDO, change, restore
from bnport.containers.patch import Patch, write_at
from bnport.errors import BnportError, FormatError, InvalidValue, NotFound, OutputError
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits
from tests.dying_child import NEW, ROOT, killed, patches_of
from tests.test_atomic import target


def opens(path):
    """Whether zipfile, which Keras and torch open files as, or h5py opens the file; what is in it is not looked at."""
    try:
        with zipfile.ZipFile(path) if path.endswith(".keras") else h5py.File(path, "r"):
            return True
    except (zipfile.BadZipFile, OSError):
        return False


def contents(path):
    with open(path, "rb") as file:
        return file.read()


def put(path, data):
    with open(path, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("kind", [".keras", ".weights.h5"])
def test_a_kill_at_any_step_leaves_the_old_file_the_new_one_or_one_that_nobody_opens(tmp_path, kind):
    path = target(tmp_path, kind)
    old = contents(path)
    total = int(killed(0, "change", path).stdout)
    new, seen = contents(path), set()
    assert total >= 10
    assert new != old
    assert opens(path)
    for step in range(1, total + 1):
        put(path, old)
        assert killed(step, "change", path).returncode == -9
        found = contents(path)
        assert (found in (old, new)) if opens(path) else (found not in (old, new)), f"step {step}"
        seen.add("old" if found == old else "new" if found == new else "closed")
        if not opens(path):
            with pytest.raises(FormatError, match="bnport restore"):
                bnport.read(path)
        if os.path.exists(path + UNDO):
            with pytest.raises(OutputError, match="bnport restore"):
                change(path, [Patch(0, b"x")], lambda: None)
            restore(path)
        assert contents(path) in (old, new)
        assert not os.path.exists(path + UNDO)
    assert seen == {"old", "new", "closed"}


def test_a_kill_while_it_is_put_back_is_put_back_again(tmp_path):
    path = target(tmp_path, ".keras")
    old = contents(path)
    for step in range(1, 40):
        put(path, old)
        first = killed(14, "change", path)
        assert first.returncode == -9
        assert not opens(path)
        half, undo = contents(path), contents(path + UNDO)
        second = killed(step, "restore", path)
        if second.returncode == 0:
            assert contents(path) == old
            assert half != old
            break
        assert not opens(path) or contents(path) == old
        if os.path.exists(path + UNDO):
            assert contents(path + UNDO) == undo
            restore(path)
        assert contents(path) == old
    else:
        pytest.fail("restoring never ended")


def test_what_a_reader_begins_with_is_overwritten_first_and_put_back_last(tmp_path, monkeypatch):
    packed, plain, behind = (str(tmp_path / name) for name in ("a.keras", "b.h5", "c.h5"))
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("config.json", b"PK\x05\x06" + b"\xff" * 1000)  # begins like an end record and is none
    for path, block in ((plain, 0), (behind, 512)):
        with h5py.File(path, "w", userblock_size=block) as file:
            file["x"] = np.zeros(3)
            file["inner"] = np.frombuffer(b"\x89HDF\r\n\x1a\n" * 600, "u1")  # also where a signature might be
    for path, count in ((packed, 3), (plain, 2), (behind, 2)):
        old, seals = contents(path), in_place._seals(ReadFile(path))
        assert len(seals) >= count
        data = bytearray(old)
        data[seals[-1].offset : seals[-1].offset + len(seals[-1].data)] = seals[-1].data
        put(path, bytes(data))
        assert not opens(path)
        put(path, old)
        with monkeypatch.context() as patched:
            steps = []
            written = lambda descriptor, at, data, steps=steps: (steps.append(at), write_at(descriptor, at, data))  # noqa: E731
            patched.setattr(in_place, "write_at", written)
            change(path, [Patch(len(old) // 2, bytes([1 ^ old[len(old) // 2]]))], lambda: None)
        assert steps[1] == steps[-1] == seals[-1].offset, path  # steps[0] is the undo file


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_an_error_at_any_step_puts_the_old_bytes_back(tmp_path, name, code, monkeypatch):
    path = target(tmp_path, ".keras")
    old, patches, real = contents(path), patches_of(path), getattr(os, name)
    for nth in range(1, 40):
        calls = 0

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        put(path, old)
        monkeypatch.setattr(os, name, failing)
        try:
            change(path, patches, lambda: None)
            raised = None
        except OutputError as error:
            raised = error
        finally:
            monkeypatch.setattr(os, name, real)
        if calls < nth:
            break
        if raised is not None and "checked" in str(raised):  # the flush after the undo file was removed
            assert contents(path) != old
            assert opens(path)
        else:
            assert contents(path) == old, nth
        assert not os.path.exists(path + UNDO)
        assert "\n" not in str(raised)
    assert nth > 4


def failing_at(monkeypatch, name, when):
    """os.`name` fails at the calls for which when(its number, its arguments) is true."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if when(len(calls), args):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    return calls


def raised(call):
    with pytest.raises(OutputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_undo_file_that_cannot_be_removed_is_named_with_what_the_file_then_holds(tmp_path, monkeypatch):
    path = target(tmp_path, ".keras")
    old, patches = contents(path), patches_of(path)
    stays = f"but {path + UNDO} cannot be removed (Permission denied); remove it yourself"

    def refuse():
        raise ValueError("not the same")

    with monkeypatch.context() as patched:
        failing_at(patched, "unlink", lambda *_: True)
        assert raised(lambda: change(path, patches, lambda: None)) == f"{path}: is changed and checked, {stays}"
        assert contents(path) != old
        assert raised(lambda: restore(path)) == f"{path}: its old contents are back, {stays}"
        assert contents(path) == old
        os.remove(path + UNDO)
        assert raised(lambda: change(path, patches, refuse)) == f"{path}: its old contents are back, {stays}"
        assert contents(path) == old
        put(path + UNDO, b"bnport undo")
        assert raised(lambda: restore(path)) == f"{path}: had not been changed yet, {stays}"
    os.remove(path + UNDO)


def test_a_folder_that_cannot_be_flushed_is_no_undo_file_that_is_there(tmp_path, monkeypatch):
    path = target(tmp_path, ".keras")
    old, patches = contents(path), patches_of(path)
    with monkeypatch.context() as patched:
        failing_at(patched, "fsync", lambda *_: not os.path.exists(path + UNDO))
        said = raised(lambda: change(path, patches, lambda: None))
        assert said.startswith(
            f"{path}: is changed and checked, but its folder cannot be flushed to disk (Permission denied)"
        )
    assert contents(path) != old
    put(path, old)
    assert killed(14, "change", path).returncode == -9
    with monkeypatch.context() as patched:
        failing_at(patched, "fsync", lambda *_: not os.path.exists(path + UNDO))
        said = raised(lambda: restore(path))
        assert said.startswith(f"{path}: its old contents are back, but its folder cannot be flushed to disk")
    assert contents(path) == old
    assert not os.path.exists(path + UNDO)


def test_a_check_that_fails_puts_the_old_bytes_back(tmp_path):
    path = target(tmp_path, ".keras")
    old = contents(path)

    def check():
        assert opens(path)
        raise ValueError("not the same")

    with pytest.raises(ValueError, match="not the same"):
        change(path, patches_of(path), check)
    assert contents(path) == old
    assert sorted(os.listdir(tmp_path)) == ["target.h5", "target.keras"]


def test_patches_under_the_signature_are_written_too(tmp_path):
    path = str(tmp_path / "f")
    put(path, bytes(range(100)))
    change(path, [Patch(5, b"abc"), Patch(15, b"defgh"), Patch(90, b"z" * 10)], lambda: None)
    expected = bytearray(range(100))
    expected[5:8], expected[15:20], expected[90:] = b"abc", b"defgh", b"z" * 10
    assert contents(path) == bytes(expected)


# ---- what it gives


@pytest.mark.parametrize("kind", [".keras", ".weights.h5", ".h5"])
def test_keras_files_are_what_a_copy_would_be(tmp_path, kind):
    (tmp_path / "a").mkdir()
    path = target(tmp_path, kind)
    source = bnport.read(path)
    changed = {name: layer.but(load=lambda: {f: getattr(NEW, f) for f in FIELDS}) for name, layer in source.items()}
    source = type(source)(changed.values(), source="made", format="made")
    copy = str(tmp_path / "a" / os.path.basename(path))
    assert bnport.convert(source, path, copy).ok
    report = bnport.convert(source, path, in_place=True)
    assert report.ok
    assert report.out == path
    assert contents(path) == contents(copy)
    (layer,) = bnport.read(path).values()
    assert_same_bits(layer.record, NEW.replace(epsilon=layer.epsilon))


def test_epsilon_goes_into_the_config_with_blanks_behind_it(tmp_path):
    path = target(tmp_path, ".keras")
    assert bnport.convert(_source(1e-5), path, in_place=True).ok
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        text = file.read("config.json")
        assert json.loads(text)["config"]["layers"][0]["config"]["epsilon"] == 1e-5
    assert bnport.convert(_source(0.1), path, in_place=True).ok
    with zipfile.ZipFile(path) as file:
        assert b'"epsilon": 0.1  ,' in file.read("config.json")
        assert len(file.read("config.json")) == len(text)
    (layer,) = bnport.read(path).values()
    assert layer.epsilon == 0.1


def test_an_epsilon_without_room_is_refused_and_nothing_changes(tmp_path):
    path = target(tmp_path, ".keras")
    old = contents(path)
    with pytest.raises(InvalidValue, match=r"no room for epsilon in config\.json\); make a new file"):
        bnport.convert(_source(1.0000001e-5), path, in_place=True)
    assert contents(path) == old
    assert not os.path.exists(path + UNDO)


def _source(epsilon, names=("bn",)):
    layers = []
    for name in names:
        record = NEW.replace(epsilon=epsilon)
        held = bnport.Layer(name, channels=3, epsilon=epsilon, load=lambda r=record: {f: getattr(r, f) for f in FIELDS})
        layers.append(held)
    return bnport.Layers(layers, source="made", format="made")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_torch_files_are_changed_in_place(tmp_path, form):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    path = str(tmp_path / ("m.safetensors" if form == "safetensors" else "m.pth"))
    if form == "safetensors":
        safetensors.numpy.save_file({k: v.numpy() for k, v in module.state_dict().items()}, path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    assert bnport.convert(_source(1e-5), path, in_place=True).ok
    state = (
        {k: torch.from_numpy(v) for k, v in safetensors.numpy.load_file(path).items()}
        if form == "safetensors"
        else torch.load(path, weights_only=True)
    )
    for ours, theirs in (("gamma", "weight"), ("beta", "bias"), ("mean", "running_mean"), ("variance", "running_var")):
        np.testing.assert_array_equal(state[f"1.{theirs}"].numpy(), getattr(NEW, ours))
    np.testing.assert_array_equal(state["0.weight"].numpy(), module[0].weight.detach().numpy())


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_nobody_opens_a_torch_file_that_is_being_changed(tmp_path, form, monkeypatch):
    module = torch.nn.BatchNorm2d(3)
    path = str(tmp_path / ("m.safetensors" if form == "safetensors" else "m.pth"))
    if form == "safetensors":
        safetensors.numpy.save_file({k: v.numpy() for k, v in module.state_dict().items()}, path)
    else:
        torch.save(
            {"0." + k: v for k, v in module.state_dict().items()}, path, _use_new_zipfile_serialization=form == "zip"
        )
    file, old = ReadFile(path), contents(path)
    for seal in in_place._seals(file):
        with open(path, "r+b") as changed:
            changed.seek(seal.offset)
            changed.write(seal.data)
    with pytest.raises(Exception, match=r".") as raised:
        safetensors.numpy.load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
    assert not isinstance(raised.value, OSError | AssertionError) or "rror" in str(raised.value)
    with pytest.raises(FormatError, match="bnport restore"):
        bnport.read(path)
    put(path, old)


def test_caffe_files_are_changed_in_place_as_a_copy_would_be(tmp_path):
    path, copy = str(tmp_path / "net.caffemodel"), str(tmp_path / "copy.caffemodel")
    put(path, contents(os.path.join(ROOT, "fixtures", "caffe", "bvlc.caffemodel")))
    source = bnport.read(path)
    doubled = bnport.Layers(
        (
            layer.but(load=lambda r=layer.record: {f: (getattr(r, f) * 2).astype("float32") for f in FIELDS})
            for layer in source.values()
            if {"gamma", "beta"} <= layer.stores
        ),
        source="made",
        format="made",
    )
    others = [name for name in source if name not in doubled]
    assert bnport.convert(doubled, path, copy, skip=others).ok
    assert bnport.convert(doubled, path, in_place=True, skip=others).ok
    assert contents(path) == contents(copy)


def test_onnx_files_are_changed_in_place_as_a_copy_would_be(tmp_path):
    path, copy = str(tmp_path / "net.onnx"), str(tmp_path / "copy.onnx")
    put(path, contents(os.path.join(ROOT, "fixtures", "onnx", "torch-kept.onnx")))
    old = bnport.read(path)
    doubled = bnport.Layers(
        (
            layer.but(epsilon=2e-3, load=lambda r=layer.record: {f: getattr(r, f) * np.float32(2) for f in FIELDS})
            for layer in old.values()
        ),
        source="made",
        format="made",
    )
    shares = list(old)[2]  # its gamma and beta are one constant each, for several readers
    assert bnport.convert(doubled, path, copy, skip=[shares]).ok
    assert bnport.convert(doubled, path, in_place=True, skip=[shares]).ok
    assert contents(path) == contents(copy)
    onnx.checker.check_model(path)
    with pytest.raises(InvalidValue, match="make it longer"):
        bnport.convert(doubled, path, in_place=True)


# ---- what is refused


def test_links_and_files_with_other_names_are_refused(tmp_path):
    path = target(tmp_path, ".keras")
    link, name = str(tmp_path / "link.keras"), str(tmp_path / "name.keras")
    os.symlink(path, link)
    with pytest.raises(OutputError, match="not a regular file"):
        bnport.convert(_source(1e-5), link, in_place=True)
    os.link(path, name)
    with pytest.raises(OutputError, match="1 other names"):
        bnport.convert(_source(1e-5), path, in_place=True)


def test_the_source_itself_is_refused(tmp_path):
    path = target(tmp_path, ".keras")
    with pytest.raises(OutputError, match="is the source itself"):
        bnport.convert(path, path, in_place=True)


def test_what_goes_with_in_place(tmp_path):
    path = target(tmp_path, ".keras")
    with pytest.raises(InvalidValue, match="in_place: is for a target that is a file, without out"):
        bnport.convert(_source(1e-5), path, str(tmp_path / "out.keras"), in_place=True)
    old = contents(path)
    assert bnport.convert(_source(1e-5), path, in_place=True, dry_run=True).ok
    assert contents(path) == old


def test_a_legacy_file_whose_epsilon_changes_and_a_compressed_one_are_refused(tmp_path):
    with pytest.raises(InvalidValue, match="epsilon is inside an attribute"):
        bnport.convert(_source(1e-5), target(tmp_path, ".h5"), in_place=True)
    path = target(tmp_path, ".weights.h5")
    packed = str(tmp_path / "packed.weights.h5")
    with h5py.File(path) as file, h5py.File(packed, "w") as other:
        for number in range(4):
            name = f"layers/batch_normalization/vars/{number}"
            other.create_dataset(name, data=file[name][()], compression="gzip", chunks=(3,))
    with pytest.raises(InvalidValue, match="compressed"):
        bnport.convert(_source(1e-3), packed, in_place=True)


def test_damaged_undo_files_are_not_written_back(tmp_path):
    path = target(tmp_path, ".keras")
    old = contents(path)
    with pytest.raises(NotFound, match="nothing to put back"):
        restore(path)
    assert killed(14, "change", path).returncode == -9
    undo, half = contents(path + UNDO), contents(path)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(undo)
        at = int(rng.integers(len(damaged)))
        damaged[at] ^= 1 << int(rng.integers(8))
        put(path + UNDO, bytes(damaged[: int(rng.integers(len(damaged)))] if rng.random() < 0.3 else damaged))
        try:
            restore(path)
        except BnportError as error:
            assert "\n" not in str(error)
            assert contents(path) == half
        else:
            assert contents(path) == old
            put(path, half)
    put(path + UNDO, undo)
    put(path, half + b"x")
    with pytest.raises(FormatError, match="is of a file of"):
        restore(path)
    put(path, half)
    assert "old contents are back" in restore(path)
    assert contents(path) == old


def test_the_commands(tmp_path, capsys):
    path = str(tmp_path / "twin.keras")
    put(path, contents(os.path.join(ROOT, "fixtures", "digits", "twin.keras")))
    source = os.path.join(ROOT, "fixtures", "digits", "digits.pth")
    assert main(["convert", source, path, "--in-place"]) == 0
    assert "3 exact), written and verified" in capsys.readouterr().out
    assert main(["verify", source, path]) == 0
    assert main(["restore", path]) == 2
    assert "nothing to put back" in capsys.readouterr().err
    assert main(["convert", source, path, "--in-place", "-o", str(tmp_path / "x.keras")]) == 2
