"""`bnport explain` on real files: the mistake is named, and the command it gives repairs it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import bnport
from bnport.cli import main

DIGITS = Path(__file__).parent.parent.parent / "fixtures" / "digits"
NAMES = ("bn1", "bn2", "bn3")


@pytest.fixture(scope="module")
def state():
    return torch.load(DIGITS / "digits.pth", weights_only=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    out = tmp_path_factory.mktemp("good") / "good.keras"
    assert bnport.convert(DIGITS / "digits.pth", DIGITS / "twin.keras", out).ok
    return out


def weights(state, name):
    return [state[f"{name}.{part}"].numpy() for part in ("weight", "bias", "running_mean", "running_var")]


def mean_before_beta(layer, held):
    layer.set_weights([held[0], held[2], held[1], held[3]])


def std(layer, held):
    layer.set_weights([*held[:3], np.sqrt(held[3])])


def default_epsilon(layer, held):
    layer.set_weights(held)
    layer.epsilon = 1e-3


def statistics_left(layer, held):
    layer.set_weights([*held[:2], np.zeros_like(held[2]), np.ones_like(held[3])])


def halved(layer, held):
    layer.set_weights([torch.from_numpy(array).half().float().numpy() for array in held])


def torch_momentum(layer, held):
    layer.set_weights(held)
    layer.momentum = 0.1


MADE = {
    "order": mean_before_beta, "std": std, "epsilon": default_epsilon, "partial": statistics_left, "half": halved,
    "momentum": torch_momentum,
}  # fmt: skip


@pytest.mark.parametrize("mistake", MADE)
def test_the_mistake_is_named_and_the_command_that_is_given_repairs_it(mistake, state, good, tmp_path, capsys):
    model = keras.saving.load_model(good)
    for name in NAMES:
        MADE[mistake](model.get_layer(name), weights(state, name))
    wrong = tmp_path / "wrong port.keras"  # a blank, which the command must quote
    model.save(wrong)
    source = DIGITS / ("digits-module.pt" if mistake == "momentum" else "digits.pth")  # a state dict holds no momentum
    assert main(["explain", str(source), str(wrong), "--json"]) == (0 if mistake == "momentum" else 1)
    found = json.loads(capsys.readouterr().out)
    assert [verdict["mistake"] for verdict in found["verdicts"]] == [mistake]
    assert found["verdicts"][0]["layers"] == list(NAMES)
    command = shlex.split(found["verdicts"][0]["repair"].splitlines()[0])
    assert command[:2] == ["bnport", "convert"]
    assert main(command[1:]) == 0
    fixed = tmp_path / "wrong port.fixed.keras"
    capsys.readouterr()
    assert main(["explain", str(source), str(fixed), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["verdicts"]
    assert main(["verify", str(source), str(fixed)]) == 0


def test_a_healthy_port_gets_one_line(good, capsys):
    assert main(["explain", str(DIGITS / "digits.pth"), str(good)]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_failing_verify_says_where_the_reason_is_to_be_had(good, tmp_path, capsys):
    model = keras.saving.load_model(good)
    model.get_layer("bn1").epsilon = 1e-2
    model.save(tmp_path / "wrong.keras")
    source = str(DIGITS / "digits.pth")
    assert main(["verify", source, str(tmp_path / "wrong.keras")]) == 1
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removesuffix(" looks for the mistake behind it"))
    assert main(command[1:]) == 1
    assert "epsilon is 0.01" in capsys.readouterr().out


def test_options_are_repeated_in_the_command(good, tmp_path, capsys):
    model = keras.saving.load_model(good)
    for name in NAMES:
        model.get_layer(name).epsilon = 1e-2
    model.save(tmp_path / "wrong.keras")
    arguments = [
        "explain",
        str(DIGITS / "digits.pth"),
        str(tmp_path / "wrong.keras"),
        "--epsilon",
        "0.0005",
        "--skip",
        "bn2",
    ]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "epsilon is 0.01; the source's is 0.0005" in out
    assert "wrong.fixed.keras --epsilon 0.0005 --skip bn2" in out
    assert "is assumed" not in out


def test_models_that_cannot_be_compared_are_exit_2(good, tmp_path, capsys):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "none.pth")
    assert main(["explain", str(tmp_path / "none.pth"), str(good)]) == 2
    assert "no BatchNorm found" in capsys.readouterr().err
