"""Live models on every backend: what predict gives after a port is what the layers then hold, never what was compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax", "tf_keras"])
def test_predict_evaluate_and_nested_models_are_never_stale_after_a_port(backend):
    child = [sys.executable, "-m", "tests.adapters.keras_backend_child", backend]
    done = subprocess.run(child, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split("\n")[-2:-1] == [f"done {backend}"], done.stdout + done.stderr[-3000:]
