"""Checks run on every other Keras: each in a process of its own, because a process has one backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

on_others = pytest.mark.parametrize(
    "where",
    [
        pytest.param({"KERAS_BACKEND": "torch"}, id="torch"),
        pytest.param({"KERAS_BACKEND": "jax"}, id="jax", marks=pytest.mark.slow),
        pytest.param({"LIBRARY": "tf_keras"}, id="tf_keras"),
    ],
)


def run_on(where, *arguments):
    """Run Python with these arguments and environment; it has to end with "all held"."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("all held"), done.stdout[-500:] + done.stderr[-3000:]
