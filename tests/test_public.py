"""The public names: all there, functions where a module has the same name, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import bnport
from bnport.errors import InvalidValue


@pytest.mark.parametrize("name", bnport.__all__)
def test_a_public_name_is_a_function_or_class_with_a_docstring_even_after_its_module_was_imported(name):
    home = bnport._HOMES[name]
    code = f"import bnport, bnport.{home}; v = bnport.{name}; print(callable(v), bool(v.__doc__), type(v).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["True", "True"]
    assert done.stdout.split()[2] in ("function", "type")


def test_the_list_of_public_names_is_the_list_of_homes():
    assert sorted(bnport.__all__) == sorted(bnport._HOMES)
    assert set(bnport.__all__) <= set(dir(bnport))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'port'"):
        bnport.port  # noqa: B018


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("bnport.calibrate('model.keras', [])", "calibrate_file"),
        ("bnport.image_statistics(np.zeros((1, 2, 2, 3)))", "moments"),
    ],
)
def test_the_import_that_a_refusal_names_works(call, name):
    """As it stands: `bnport.calibrate` is a function, so that no module can be reached through it."""
    with pytest.raises(InvalidValue) as raised:
        eval(call, {"bnport": bnport, "np": np})
    line = str(raised.value).split("'")[-2]
    spaces = {}
    exec(line, spaces)
    assert callable(spaces[name])
