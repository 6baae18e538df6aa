"""Fixtures of the adapters' tests."""

import pytest

from tests.adapters.caffe_nets import Files


@pytest.fixture
def files(tmp_path):
    """A caffemodel and its prototxt in a folder of the test's own."""
    return Files(str(tmp_path))
