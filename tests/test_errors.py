"""What a message takes from other libraries' exceptions."""

from __future__ import annotations

import pytest

from bnport.errors import first_line

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("said", "line"),
    [("one", "one"), ("\n\n  two \nthree", "two"), ("", "ValueError"), (" \n", "ValueError")],
)
def test_the_first_line_that_is_not_blank_or_the_name_of_the_class(said, line):
    assert first_line(ValueError(said)) == line
