"""Options that would mean nothing are refused in one line that says what to do; the display of progress."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate.file import calibrate_file
from bnport.calibrate.run import calibrate
from bnport.cli import common
from bnport.errors import FormatError, InvalidValue, NotFound
from tests.calibrate import nets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, "workers: of an engine, and none is named"),
        ({"address": "tcp://1.2.3.4:5"}, "address: of an engine"),
        ({"layers": []}, "layers: names no layer"),
        ({"layers": 5}, "layers: expected names or patterns, got 5"),
        ({"layers": ["a", None]}, "layers: expected names or patterns"),
        ({"frozen": "no"}, "frozen: expected True or False, got 'no'"),
        ({"unbiased": 0.5}, "unbiased: expected True or False, got 0.5"),
        ({"limit": "10"}, "limit: expected a whole number"),
        ({"key": "x"}, "names an array of an .npz file"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidValue, match=message):
        calibrate(nets.branches(), nets.data(), **options)


def ragged():
    import tensorflow as tf

    return tf.ragged.constant([[1.0, 2.0], [3.0]])


def table():
    """Stands for a pandas DataFrame: its length is that of its rows, and an index gives a column."""

    class DataFrame:
        iloc = property(lambda self: self)

        def __len__(self):
            return 70

        def __getitem__(self, k):
            return np.zeros((70, 8, 8, 3))

    return DataFrame()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ragged, r"RaggedTensor of the shape \(2, None\).*not of one length"),
        (table, r"a DataFrame as data: pass its numbers, data.to_numpy\(\)"),
        (dict, "a dict as data: it is empty"),
    ],
)
def test_things_that_look_like_arrays_are_refused_with_what_to_pass(make, message):
    with pytest.raises(InvalidValue, match=message):
        calibrate(nets.branches(), make())


def test_data_that_are_not_there_are_called_that_also_with_options_for_images():
    with pytest.raises(NotFound, match="nope: no such file or folder"):
        calibrate(nets.branches(), "nope", images={"scale": 1})


def test_a_file_that_is_no_keras_model_is_told_what_is_taken(tmp_path):
    import torch

    torch.save({"x": torch.zeros(3)}, tmp_path / "m.pth")
    with pytest.raises(FormatError, match=r"takes a \.keras file, or an \.h5 file that holds a whole Keras model"):
        calibrate_file(str(tmp_path / "m.pth"), np.zeros((40, 3)), str(tmp_path / "out.pth"))


def test_time_left_counts_from_the_first_call_and_from_where_it_began(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = common.Progress().__enter__()
    clock[0] = 1000.0  # imports
    show(50, 100, "batch")
    clock[0] += 10
    show(60, 100, "batch")  # 10 in 10 s, 40 to go
    assert "60/100 batch, 40 s left" in capsys.readouterr().err
    clock[0] += 10
    show(61, 0, "batch")
    assert "61 done, batch, 20 s" in capsys.readouterr().err
