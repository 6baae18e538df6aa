"""The loops that numba compiles against those of numpy: the same bits for any shape, dtype, layout; and when they are used."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnport.calibrate import compiled, sums
from bnport.calibrate.moments import exact_moments, moments

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def _as_it_was():
    before = list(compiled._loaded)
    yield
    compiled._loaded[:] = before


def both_ways(function, *arguments):
    """What `function` gives with the compiled loops and without, and how often those were called."""
    assert compiled.use(True), "the test environment must have numba"
    real, calls = compiled._loaded[0], []

    def counted(loop):
        return lambda *given: (calls.append(loop), loop(*given))[1]

    with np.errstate(all="ignore"):  # as moments has it: what is not finite is seen in the result
        compiled._loaded[:] = [compiled.Kernels(*map(counted, real))]
        fast = function(*arguments)
        compiled.use(False)
        plain = function(*arguments)
    compiled._loaded[:] = [real]
    return fast, plain, len(calls)


def same(fast, plain):
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(fast, plain, strict=True))


def features(rows, channels, dtype, seed=0):
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=channels) * 10, 10.0 ** rng.uniform(-2, 2, channels)
    return (rng.standard_normal((rows, channels)) * std + mean).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "channels"),
    [(1, 1), (5, 1), (70_001, 1), (1, 3), (40_003, 3), (997, 64), (9000, 64), (1, 1000), (301, 769), (2049, 1000)],
)
def test_sums_of_floats_have_the_same_bits(rows, channels, dtype):
    x = features(rows, channels, dtype)
    shift = x[0].astype(np.float64) + 0.125
    fast, plain, calls = both_ways(sums.shifted_sums, x, shift)
    assert same(fast, plain)
    assert calls == 1


@given(rows=st.integers(1, 3000), channels=st.integers(1, 900), seed=st.integers(0, 2**32 - 1))
def test_sums_of_any_shape_have_the_same_bits(rows, channels, seed):
    x = features(rows, channels, np.float32, seed)
    fast, plain, calls = both_ways(sums.shifted_sums, x, x[-1].astype(np.float64))
    assert same(fast, plain)
    assert calls == 1


def test_they_have_the_same_bits_beyond_a_flush_and_a_part():
    x = features(9_500_001, 1, np.float32)  # 145 pieces, where 128 are one flush
    fast, plain, _ = both_ways(sums.shifted_sums, x, np.array([3.0]))
    assert same(fast, plain)
    fast, plain, calls = both_ways(moments, x)  # five parts in threads, perhaps twice
    assert fast.same_bits(plain)
    assert calls in (5, 10)


def test_they_are_right_not_only_equal():
    x = features(30_011, 5, np.float32)
    wide = x.astype(np.longdouble)
    compiled.use(True)
    np.testing.assert_allclose(moments(x).variance(), ((wide - wide.mean(0)) ** 2).mean(0).astype(float), rtol=1e-14)


def test_products_are_not_fused_with_additions():
    """Squares whose last bits are lost: a fused multiply-add would keep them."""
    x = np.full((4096, 96), 1 + 2.0**-23, np.float64) * np.random.default_rng(1).uniform(1, 2, (4096, 96))
    fast, plain, _ = both_ways(sums.shifted_sums, x, np.zeros(96))
    assert same(fast, plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_or_very_large_comes_through_alike(bad):
    x = features(5000, 7, np.float32)
    x[4321, 3] = bad
    fast, plain, _ = both_ways(sums.shifted_sums, x, np.zeros(7))
    np.testing.assert_array_equal(np.isnan(fast), np.isnan(plain))
    assert same(np.nan_to_num(fast), np.nan_to_num(plain))


LAYOUTS = {
    "memory map": lambda x, path: (
        np.lib.format.open_memmap(path, "w+", x.dtype, x.shape).__setitem__(slice(None), x)
        or np.load(path, mmap_mode="r")
    ),
    "read-only": lambda x, _: (x.setflags(write=False), x)[1],
    "every second row": lambda x, _: np.repeat(x, 2, axis=0)[::2],
    "Fortran order": lambda x, _: np.asfortranarray(x),
    "the other byte order": lambda x, _: x.astype(x.dtype.newbyteorder()),
    "unaligned": lambda x, _: np.frombuffer(b"\0" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape),
    "four axes": lambda x, _: x.reshape(-1, 2, 5, x.shape[-1]),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "bool"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits_whether_it_is_taken_or_not(layout, dtype, tmp_path):
    x = LAYOUTS[layout](features(6000, 9, "float32").astype(dtype), tmp_path / "x.npy")
    fast, plain, calls = both_ways(moments, x)
    assert fast.same_bits(plain)
    taken = layout in ("memory map", "read-only", "four axes") and dtype in ("float32", "int16")
    assert (calls > 0) == taken


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), ("int16", -32768, 32767), ("int32", -(2**21), 2**21),
     ("uint32", 0, 2**21), ("int64", -(2**21), 2**21), ("uint64", 0, 2**21)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3, 1000])
def test_sums_of_integers_are_exact(dtype, low, high, channels):
    x = np.random.default_rng(2).integers(low, high, (3001, channels), dtype, endpoint=True)
    x[0], x[1] = low, high
    fast, plain, calls = both_ways(exact_moments, x)
    wide = x.astype(object)
    assert fast == plain
    assert fast.total == tuple(wide.sum(axis=0))
    assert fast.squares == tuple((wide * wide).sum(axis=0))
    assert (calls > 0) == (dtype != "uint64")


def test_sums_that_an_int64_may_not_hold_are_left_to_numpy():
    x = np.full((sums.SPLIT, 1), 2**21, np.int32)  # their squares add up to 2**63
    fast, plain, calls = both_ways(exact_moments, x)
    assert fast == plain
    assert fast.squares == (2**63,)
    assert not calls
    x[0] = 0
    x = x.astype(np.uint16) + np.uint16(65535)
    fast, plain, calls = both_ways(exact_moments, x)
    assert fast == plain
    assert calls


def test_numba_is_loaded_once_enough_was_summed_and_not_before(monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", [])
    monkeypatch.setattr(compiled, "_summed", 0)
    monkeypatch.setattr(compiled, "AFTER", 1 << 20)
    x = features(1 << 15, 4, np.float32)  # half of that
    first = moments(x)
    assert not compiled._loaded
    second = moments(x)
    assert compiled._loaded[0] is not None
    assert first.same_bits(second)


def test_while_one_thread_loads_it_the_others_go_on(monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", [])
    monkeypatch.setattr(compiled, "AFTER", 0)
    asked, go_on = threading.Event(), threading.Event()

    def slow():
        asked.set()
        assert go_on.wait(60)

    monkeypatch.setattr(compiled, "_compiled", slow)
    loading = threading.Thread(target=compiled.kernels, args=(1,))
    loading.start()
    assert asked.wait(60)
    assert compiled.kernels(1) is None
    go_on.set()
    loading.join(60)
    assert compiled._loaded == [None]


@pytest.mark.parametrize("how", ['sys.modules["numba"] = None', 'os.environ["NUMBA_DISABLE_JIT"] = "1"'])
def test_without_numba_everything_works(how):
    """In a process of its own, where importing it fails as it does where it is not installed, or it compiles nothing."""
    code = f"""
import os, sys; {how}
import numpy as np
from bnport.calibrate import compiled
from bnport.calibrate.moments import moments
compiled.AFTER = 0
print(moments(np.arange(12.0).reshape(4, 3)).mean.tolist(), compiled.use(True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[4.5, 5.5, 6.5] False\n"
