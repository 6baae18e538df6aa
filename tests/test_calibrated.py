"""A source without statistics, converted with data. Oracle: PyTorch on the whole data set as one batch.

With track_running_stats=False torch normalises by the batch's own biased statistics; with all images in one batch these are
the population's, so the Keras port calibrated on the same images must compute the same function.
"""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import bnport
from bnport.cli import main
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, OutputError, Unrepresentable

from .test_digits import DIGITS, NAMES


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number, (old, new) in enumerate(((1, 16), (16, 32), (32, 32)), start=1):
            self.add_module(f"conv{number}", torch.nn.Conv2d(old, new, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", torch.nn.BatchNorm2d(new, eps=3e-4, track_running_stats=False))
        self.fc = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = torch.nn.functional.max_pool2d
        x = pool(torch.relu(self.bn1(self.conv1(x))), 2)
        x = pool(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(torch.relu(self.bn3(self.conv3(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return (load_digits().images[..., None] / 255).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    """net.pt without statistics, twin.keras with its kernels, images.npy, and torch's outputs on one batch of all."""
    path = tmp_path_factory.mktemp("calibrated")
    state = torch.load(DIGITS / "digits.pth", weights_only=True)
    net = Net().eval()
    net.load_state_dict({k: v for k, v in state.items() if "running" not in k and "tracked" not in k})
    torch.save(net, path / "net.pt")
    with torch.no_grad():
        np.save(path / "outputs.npy", net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy())
    np.save(path / "images.npy", images)
    twin = keras.saving.load_model(DIGITS / "twin.keras")
    for number in (1, 2, 3):
        twin.get_layer(f"conv{number}").set_weights([state[f"conv{number}.weight"].numpy().transpose(2, 3, 1, 0)])
    twin.get_layer("fc").set_weights([state["fc.weight"].numpy().T, state["fc.bias"].numpy()])
    twin.save(path / "twin.keras")
    return path


def test_without_data_it_is_refused_with_the_command_that_helps(folder, tmp_path, capsys):
    assert main(["convert", str(folder / "net.pt"), str(folder / "twin.keras"), "-o", str(tmp_path / "o.keras")]) == 2
    assert "--calibrate DATA" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["show", str(folder / "net.pt")]) == 0
    assert "holds no running statistics" in capsys.readouterr().out


def test_an_output_of_another_format_is_refused_before_the_data_are_looked_at(folder, tmp_path):
    from bnport.calibrated import convert_calibrated

    with pytest.raises(OutputError, match=r"let its name end in \.keras"):
        convert_calibrated(folder / "net.pt", folder / "twin.keras", tmp_path / "out.pth", "no such data")
    assert not list(tmp_path.iterdir())


def test_data_that_are_not_there_are_said_before_anything_is_made(folder, tmp_path, monkeypatch):
    from bnport.calibrated import convert_calibrated

    monkeypatch.setitem(sys.modules, "keras", None)  # nor is it asked for
    (tmp_path / "out.keras").write_bytes(b"old")
    for data in (str(tmp_path / "none.npy"), "\0"):
        with pytest.raises(NotFound, match=r"(none.npy|x00): no such file or folder"):
            convert_calibrated(folder / "net.pt", folder / "twin.keras", tmp_path / "out.keras", data, force=True)
    assert (tmp_path / "out.keras").read_bytes() == b"old"


def test_an_error_names_the_files_of_the_call_and_no_temporary_ones(folder, tmp_path, images, monkeypatch):
    from bnport.calibrated import convert_calibrated

    inputs = x = keras.Input((8, 8, 1))
    for number, width in enumerate((16, 32, 32), start=1):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{number}")(x)
    keras.Model(inputs, keras.layers.Lambda(abs)(x)).save(tmp_path / "code.keras")
    with pytest.raises(FormatError, match=f"^{tmp_path}/code.keras: holds a Lambda layer"):
        convert_calibrated(folder / "net.pt", tmp_path / "code.keras", tmp_path / "out.keras", images)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(MissingDependency, match=f"^{folder}/twin.keras: was written by Keras"):
        convert_calibrated(folder / "net.pt", folder / "twin.keras", tmp_path / "out.keras", images)
    assert [path.name for path in tmp_path.iterdir()] == ["code.keras"]


def test_with_data_the_port_computes_what_torch_computes_on_the_whole_data_set(folder, tmp_path, images, capsys):
    out = tmp_path / "out.keras"
    command = ["convert", str(folder / "net.pt"), str(folder / "twin.keras"), "-o", str(out)]
    assert main([*command, "--calibrate", str(folder / "images.npy"), "--calibrate-options", "--batch-size 256"]) == 0
    assert "mean and variance computed from" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.keras"]
    model = keras.saving.load_model(out)
    assert {model.get_layer(name).epsilon for name in NAMES} == {3e-4}
    outputs = model.predict(images, verbose=0)
    np.testing.assert_allclose(outputs, np.load(folder / "outputs.npy"), atol=5e-4)


def test_statistics_of_a_target_whose_weights_are_not_the_sources_are_said_to_be_its_own(folder, tmp_path, images):
    """From an ONNX export, whose graph says which weights feed a layer; and from a pickled module, which does not."""
    from bnport.calibrated import convert_calibrated

    x = torch.from_numpy(images[:4].transpose(0, 3, 1, 2).copy())
    net = torch.load(folder / "net.pt", weights_only=False)
    exported = tmp_path / "net.onnx"
    torch.onnx.export(
        net, (x,), exported, dynamo=False, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False
    )
    for number, (source, target, said) in enumerate(
        (
            (exported, folder / "twin.keras", ""),
            (exported, DIGITS / "twin.keras", "the weights before bn1, bn2, bn3 are not the source's"),
            (folder / "net.pt", folder / "twin.keras", "before bn1, bn2, bn3 were not compared with the source's"),
        )
    ):
        report = convert_calibrated(source, target, tmp_path / f"{number}.keras", images)
        notes = [note for note in report.notes if "the weights before" in note]
        assert len(notes) == bool(said)
        assert said in "".join(notes)


def test_a_source_whose_own_statistics_are_not_taken_is_named_in_the_report(folder, tmp_path, images):
    from bnport.calibrated import convert_calibrated

    for source, said in ((DIGITS / "digits.pth", True), (folder / "net.pt", False)):
        report = convert_calibrated(source, folder / "twin.keras", tmp_path / f"{said}.keras", images)
        notes = [note for note in report.notes if "its own were not taken" in note]
        assert (
            notes
            == [
                f"mean and variance of 3 layers computed from data, though {source} stores them: its own were not taken"
            ]
            * said
        )


def test_an_onnx_export_in_training_mode_is_refused_and_with_data_computes_what_torch_does(
    folder, tmp_path, images, capsys
):
    """The exporter keeps gamma, beta and epsilon; its stored statistics are not those that the network used."""
    trained = torch.load(folder / "net.pt", weights_only=False)
    for number in (1, 2, 3):
        norm = getattr(trained, f"bn{number}")
        tracked = torch.nn.BatchNorm2d(norm.num_features, eps=norm.eps)
        tracked.load_state_dict(norm.state_dict(), strict=False)
        setattr(trained, f"bn{number}", tracked)
    source, out = tmp_path / "training.onnx", tmp_path / "out.keras"
    x = torch.from_numpy(images[:4].transpose(0, 3, 1, 2).copy())
    torch.onnx.export(
        trained, (x,), source, dynamo=False, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False
    )
    command = ["convert", str(source), str(folder / "twin.keras"), "-o", str(out)]
    assert main(command) == 2
    assert "--calibrate DATA" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--calibrate", str(folder / "images.npy")]) == 0
    outputs = keras.saving.load_model(out).predict(images, verbose=0)
    np.testing.assert_allclose(outputs, np.load(folder / "outputs.npy"), atol=5e-4)


def test_a_live_model_is_converted_and_calibrated_in_place(folder, images):
    from bnport.calibrated import convert_calibrated

    model = keras.saving.load_model(folder / "twin.keras")
    model.predict(images[:10], verbose=0)
    report = convert_calibrated(folder / "net.pt", model, None, images)
    assert report.ok
    np.testing.assert_allclose(model.predict(images, verbose=0), np.load(folder / "outputs.npy"), atol=5e-4)


def test_bad_data_leaves_a_live_model_as_it_was(folder, images):
    from bnport.calibrated import convert_calibrated

    model = keras.saving.load_model(folder / "twin.keras")
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(InvalidValue):
        convert_calibrated(folder / "net.pt", model, None, np.full_like(images, np.nan))
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert {model.get_layer(name).epsilon for name in NAMES} == {1e-3}


def test_a_frozen_layer_gets_its_statistics_too_as_any_port_writes_into_it(folder, images):
    from bnport.calibrated import convert_calibrated

    for frozen in (["bn2"], NAMES):
        model = keras.saving.load_model(folder / "twin.keras")
        for name in frozen:
            model.get_layer(name).trainable = False
        assert convert_calibrated(folder / "net.pt", model, None, images).ok
        assert [model.get_layer(name).trainable for name in NAMES] == [name not in frozen for name in NAMES]
        np.testing.assert_allclose(model.predict(images, verbose=0), np.load(folder / "outputs.npy"), atol=5e-4)


def test_whatever_fails_a_live_model_is_as_it_was(folder, images, monkeypatch):
    import bnport.calibrated

    model = keras.saving.load_model(folder / "twin.keras")
    before = [w.copy() for w in model.get_weights()]
    calls, real = [], bnport.calibrated.convert

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:  # the last step, when all statistics are in the model
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(bnport.calibrated, "convert", failing)
    with pytest.raises(KeyboardInterrupt):
        bnport.calibrated.convert_calibrated(folder / "net.pt", model, None, images)
    assert len(calls) == 3
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert {model.get_layer(name).epsilon for name in NAMES} == {1e-3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers bn1", "layers: the source decides"),
        ("--out other.keras", "not of"),
        ("--data x.npy --json", "not of"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, message, folder, tmp_path, capsys):
    command = ["convert", str(folder / "net.pt"), str(folder / "twin.keras"), "-o", str(tmp_path / "o.keras")]
    assert main([*command, "--calibrate", str(folder / "images.npy"), "--calibrate-options", words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-epsilon", "0.5"], "holds the epsilon of 3 layers itself"),
        (["--target-option", "nonsense=1"], "the keras format has no option nonsense"),
    ],
)
def test_what_is_said_of_the_target_is_taken_or_refused_with_data_as_without(words, message, folder, tmp_path, capsys):
    command = ["convert", str(folder / "net.pt"), str(folder / "twin.keras"), "-o", str(tmp_path / "o.keras"), *words]
    for more in ([], ["--calibrate", str(folder / "images.npy")]):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_calibrate_options_without_data_are_refused(tmp_path, capsys):
    command = ["convert", str(DIGITS / "digits.pth"), str(DIGITS / "twin.keras"), "-o", str(tmp_path / "o.keras")]
    for words in ("--limit 4", ""):
        assert main([*command, "--calibrate-options", words]) == 2
        assert "--calibrate DATA" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    assert main([*command, "--calibrate", "images.npy", "--calibrate-options", "'"]) == 2
    assert "No closing quotation" in capsys.readouterr().err


def test_a_target_without_gamma_cannot_absorb_one_before_there_are_statistics(folder, tmp_path, images):
    from bnport.calibrated import convert_calibrated

    inputs = x = keras.Input((8, 8, 1))
    for number, width in enumerate((16, 32, 32), start=1):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(name=f"bn{number}", scale=number != 2)(x)
    path, out = tmp_path / "t.keras", tmp_path / "o.keras"
    keras.Model(inputs, x).save(path)
    with pytest.raises(Unrepresentable, match="bn2: has no gamma"):
        convert_calibrated(folder / "net.pt", path, out, images)
    assert bnport.read(path)["bn1"].epsilon == 1e-3
    assert not out.exists()
