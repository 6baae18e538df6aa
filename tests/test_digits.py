"""Real input: a CNN trained in PyTorch on scikit-learn's digits, ported into its Keras twin, from every file form.

The convolutions are ported here by plain transposition; BatchNorm by bnport. The oracle is PyTorch's own output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import bnport

DIGITS = Path(__file__).parent.parent / "fixtures" / "digits"
SOURCES = [
    "digits.pth", "digits-legacy.pth", "digits-checkpoint.pt", "digits-module.pt", "digits-scripted.pt", "digits-traced.pt",
    "digits.safetensors",
]  # fmt: skip
NAMES = ("bn1", "bn2", "bn3")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return torch.load(DIGITS / "digits.pth", weights_only=True)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return (load_digits().images[..., None] / 255).astype(np.float32)


@pytest.fixture(scope="module")
def torch_outputs() -> np.ndarray:
    return np.load(DIGITS / "digits-outputs.npz")["outputs"]


@pytest.fixture(scope="module")
def twin_with_kernels(state, tmp_path_factory) -> dict[str, Path]:
    """The Keras twin with torch's convolutions and linear layer, and BatchNorm as Keras initialises it."""
    model = keras.saving.load_model(DIGITS / "twin.keras")
    for number in (1, 2, 3):
        model.get_layer(f"conv{number}").set_weights([state[f"conv{number}.weight"].numpy().transpose(2, 3, 1, 0)])
    model.get_layer("fc").set_weights([state["fc.weight"].numpy().T, state["fc.bias"].numpy()])
    folder = tmp_path_factory.mktemp("twin")
    paths = {suffix: folder / f"twin{suffix}" for suffix in (".keras", ".h5", ".weights.h5")}
    model.save(paths[".keras"])
    model.save(paths[".h5"])
    model.save_weights(paths[".weights.h5"])
    return paths


def loaded(path: Path) -> keras.Model:
    """The model in `path`; a weights file goes into the untrained twin."""
    if path.name.endswith(".weights.h5"):
        model = keras.saving.load_model(DIGITS / "twin.keras")
        model.load_weights(path)
        return model
    return keras.saving.load_model(path, compile=False)


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_port_predicts_the_same_digit_as_pytorch_for_every_image(
    source, suffix, twin_with_kernels, tmp_path, images, torch_outputs
):
    out = tmp_path / f"ported{suffix}"
    report = bnport.convert(DIGITS / source, twin_with_kernels[suffix], out)
    assert report.ok
    assert len(report.layers) == 3
    outputs = loaded(out).predict(images, verbose=0)
    np.testing.assert_array_equal(outputs.argmax(1), torch_outputs.argmax(1))
    np.testing.assert_allclose(outputs, torch_outputs, atol=2e-4)


def test_what_a_keras_file_can_hold_is_written_bit_for_bit(twin_with_kernels, tmp_path, state):
    out = tmp_path / "ported.keras"
    report = bnport.convert(DIGITS / "digits.pth", twin_with_kernels[".keras"], out)
    assert report.count("exact") == 3
    model = loaded(out)
    for name in NAMES:
        layer = model.get_layer(name)
        assert layer.epsilon == 1e-5
        keys = ("weight", "bias", "running_mean", "running_var")
        for theirs, ours in zip(keys, layer.get_weights(), strict=True):
            assert ours.tobytes() == state[f"{name}.{theirs}"].numpy().tobytes()


def test_a_live_model_is_ported_in_place_and_predict_is_never_stale(twin_with_kernels, images, torch_outputs):
    model = loaded(twin_with_kernels[".keras"])
    before = model.predict(images[:100], verbose=0)  # traced with epsilon 1e-3
    assert (before.argmax(1) != torch_outputs[:100].argmax(1)).any()
    report = bnport.convert(DIGITS / "digits.pth", model)
    assert report.ok
    for batch in (100, 7):
        outputs = model.predict(images[:batch], verbose=0, batch_size=batch)
        np.testing.assert_allclose(outputs, torch_outputs[:batch], atol=2e-4)


def accuracy_with(model: keras.Model, images: np.ndarray, change) -> float:
    for name in NAMES:
        layer = model.get_layer(name)
        weights, epsilon = change(layer.get_weights(), layer.epsilon)
        layer.set_weights(weights)
        layer.epsilon = epsilon
    model.predict_function = None
    return float((model.predict(images, verbose=0).argmax(1) == load_digits().target).mean())


def test_accuracy_lost_by_a_wrong_epsilon_order_or_std(twin_with_kernels, tmp_path, images):
    """The numbers in the README are printed here (pytest -s)."""
    out = tmp_path / "ported.keras"
    bnport.convert(DIGITS / "digits.pth", twin_with_kernels[".keras"], out)
    mistakes = {
        "ported by bnport": lambda w, e: (w, e),
        "epsilon left at Keras' 1e-3": lambda w, e: (w, 1e-3),
        "gamma and beta swapped": lambda w, e: ([w[1], w[0], w[2], w[3]], e),
        "std in place of variance": lambda w, e: ([*w[:3], np.sqrt(w[3])], e),
    }
    found = {name: accuracy_with(loaded(out), images, change) for name, change in mistakes.items()}
    print(json.dumps(found, indent=1))
    right = found.pop("ported by bnport")
    assert right > 0.99
    assert all(wrong < right - 0.005 for wrong in found.values())


def test_the_readmes_first_command_ports_the_fixture_and_verify_agrees(tmp_path):
    out = tmp_path / "ported.keras"

    def bnport_command(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bnport", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = bnport_command("convert", DIGITS / "digits.pth", DIGITS / "twin.keras", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "3 exact" in done.stdout
    assert "epsilon 1e-05 assumed for 3 layers" in done.stdout
    assert bnport_command("verify", DIGITS / "digits.pth", out).returncode == 0
    different = bnport_command("verify", DIGITS / "digits.pth", DIGITS / "twin.keras")
    assert different.returncode == 1
    assert "NOT the same function" in different.stdout
    again = bnport_command("convert", DIGITS / "digits.pth", DIGITS / "twin.keras", "-o", out)
    assert again.returncode == 2
    assert "exists already; --force replaces it" in again.stderr
