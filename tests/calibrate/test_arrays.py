"""Files of arrays whose rows do not lie one after the other: what is mapped, checked first, and inflated on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from bnport.calibrate import arrays
from bnport.calibrate.data import read
from bnport.errors import BnportError, OutputError

pytestmark = pytest.mark.core

X = np.asfortranarray(np.round(np.random.default_rng(0).normal(size=(70, 4, 5, 3)), 1).astype("f4"))
SAVES = [np.savez, np.savez_compressed]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", ">i2"])
def test_rows_in_fortran_order_come_as_they_were_saved_and_leave_no_file(save, dtype, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    x = np.asfortranarray((X * 10).astype(dtype))
    save(tmp_path / "x.npz", x=x)
    found = list(read(tmp_path / "x.npz", batch_size=32))
    assert [len(batch) for batch in found] == [32, 32, 6]
    assert all(batch.dtype == x.dtype.newbyteorder("=") and batch.dtype.isnative for batch in found)
    np.testing.assert_array_equal(np.concatenate(found), x)
    assert not os.listdir(tmp_path / "tmp")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("spoil", [200, 3000, -200])
def test_a_flipped_bit_in_rows_in_fortran_order_is_refused(save, spoil, tmp_path):
    path = tmp_path / "x.npz"
    save(path, x=X)
    data = bytearray(path.read_bytes())
    data[spoil] ^= 4
    path.write_bytes(data)
    with pytest.raises(BnportError):
        list(read(path))


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x=X)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=X.nbytes))
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    with pytest.raises(OutputError, match=r"'x': is compressed and in Fortran order.*do not fit.*ascontiguousarray"):
        list(read(tmp_path / "x.npz"))


def test_rows_in_fortran_order_are_inflated_in_little_memory(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 25_000), "f4", order="F"))
    tracemalloc.start()
    rows = arrays.npz(str(tmp_path / "x.npz"))["x"]
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert rows.shape == (1000, 25_000)
