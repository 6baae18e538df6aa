"""Fixtures of the adapters' tests."""

import pytest


@pytest.fixture
def files(tmp_path):
    """A caffemodel and its prototxt in a folder of the test's own."""
    from tests.adapters.caffe_nets import Files  # needs protobuf, which tests without a framework do not have

    return Files(str(tmp_path))
