"""Layers that people write, on every backend: right statistics or a refusal, and nothing else changes. See custom.py."""

from __future__ import annotations

import pytest

from tests.calibrate import custom
from tests.calibrate.backends import on_others, run_on


@pytest.mark.parametrize("check", custom.CHECKS, ids=lambda check: check.__name__)
def test_on_this_backend(check):
    check()


@on_others
def test_all_of_them_on(where):
    run_on(where, "-m", "tests.calibrate.custom")
