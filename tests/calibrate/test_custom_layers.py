"""Layers that people write, on every backend: right statistics or a refusal, and nothing else changes. See custom.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.calibrate import custom

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.parametrize("check", custom.CHECKS, ids=lambda check: check.__name__)
def test_on_this_backend(check):
    check()


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"KERAS_BACKEND": "torch"}, id="torch"),
        pytest.param({"KERAS_BACKEND": "jax"}, id="jax", marks=pytest.mark.slow),
        pytest.param({"LIBRARY": "tf_keras"}, id="tf_keras"),
    ],
)
def test_all_of_them_on(where):
    done = subprocess.run(
        [sys.executable, "-m", "tests.calibrate.custom"],
        cwd=ROOT,
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("all held"), done.stdout[-500:] + done.stderr[-3000:]
