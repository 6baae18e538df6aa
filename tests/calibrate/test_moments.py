"""Moments against exact rational arithmetic and an 80-bit two-pass; merging in a fixed tree."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnport.calibrate import sums
from bnport.calibrate.moments import ExactMoments, Moments, Tree, exact_moments, merge, merge_all, moments
from bnport.errors import FormatError, InvalidValue

pytestmark = pytest.mark.core

U = 2.0**-53


def two_pass_80_bit(x):
    wide = np.asarray(x).astype(np.longdouble).reshape(-1, x.shape[-1])
    mean = wide.mean(axis=0)
    return mean, ((wide - mean) ** 2).mean(axis=0)


def rational(column):
    numbers = [Fraction(float(v)) for v in column]
    mean = sum(numbers) / len(numbers)
    return mean, sum((v - mean) ** 2 for v in numbers)


def assert_close_to_rational(found, x, ulps=50):
    for c in range(x.shape[-1]):
        mean, m2 = rational(x[..., c].ravel())
        spread = float(m2 / found.n) ** 0.5
        underflow = found.n * Fraction(2) ** -1021  # of a square
        assert abs(Fraction(float(found.m2[c])) - m2) <= ulps * Fraction(U) * m2 + underflow
        held = Fraction(float(found.mean[c])) + Fraction(float(found.mean_low[c]))
        slack = Fraction(2.0**-100) * abs(mean) + Fraction(2) ** -510
        assert abs(held - mean) <= ulps * Fraction(U) * Fraction(spread) + slack
        assert found.mean[c] == pytest.approx(float(mean), rel=4 * U, abs=ulps * U * spread + 1e-150)


CASES = [(1e4, 1e-2), (1e4, 1.0), (0.5, 0.25), (1e2, 1e-2), (-3e-4, 2e-3), (0.0, 1.0)]


@pytest.mark.parametrize(("mean", "std"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_variance_is_within_1e_minus_12_of_an_80_bit_two_pass_also_at_mean_1e4_std_1e_minus_2(mean, std, dtype):
    rng = np.random.default_rng(3)
    x = (mean + std * rng.standard_normal((50_021, 7))).astype(dtype)
    true_mean, true_variance = two_pass_80_bit(x)
    whole = moments(x)
    pooled = merge_all(moments(x[i : i + 611]) for i in range(0, len(x), 611))
    for found in (whole, pooled):
        assert found.n == len(x)
        assert (abs(found.variance() / true_variance - 1) <= 1e-12).all()
        assert (abs(found.mean - true_mean) <= 1e-15 * abs(true_mean) + 1e-13 * std).all()


def test_a_shift_that_the_first_rows_get_wrong_does_not_cost_accuracy():
    rng = np.random.default_rng(4)
    x = 1e6 + rng.standard_normal((100_000, 3))
    x[rng.choice(len(x), 64, replace=False), 1] = 0
    where = np.unique(np.linspace(0, len(x) - 1, 64).astype(int))
    x[where, 2] = -1e7  # exactly the rows that the shift is sampled from
    _, true_variance = two_pass_80_bit(x)
    assert (abs(moments(x).variance() / true_variance - 1) <= 1e-13).all()


finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@settings(max_examples=80)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=finite))
def test_moments_agree_with_exact_rational_arithmetic(x):
    assert_close_to_rational(moments(x), x)


@settings(max_examples=60)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(3, 24), st.integers(1, 2)), elements=st.floats(-1, 1, width=64)),
    st.sampled_from([0.0, 1.0, 1e4, -1e8]),
    st.data(),
)
def test_merging_is_associative_within_the_bound_and_every_grouping_is_near_the_exact_value(x, offset, data):
    x = x + offset
    a, b = sorted(data.draw(st.tuples(st.integers(1, len(x) - 1), st.integers(1, len(x) - 1))))
    first, second, third = moments(x[:a]), moments(x[a:b]), moments(x[b:])
    left = merge(merge(first, second), third)
    right = merge(first, merge(second, third))
    for found in (left, right, merge(third, merge(second, first))):
        assert found.n == len(x)
        assert_close_to_rational(found, x)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_a_tree_that_is_stored_and_resumed_anywhere_gives_the_same_bits(sizes):
    rng = np.random.default_rng(len(sizes))
    blocks = [moments(rng.normal(5, 2, (n, 3))) for n in sizes]
    expected = merge_all(blocks)
    tree = Tree()
    for k, block in enumerate(blocks):
        tree.add(block)
        if k == len(blocks) // 2:
            tree = Tree.from_arrays(tree.to_arrays())
    assert tree.result().same_bits(expected)
    assert pickle.loads(pickle.dumps(tree)).result().same_bits(expected)
    assert tree.blocks == len(sizes)
    assert tree.n == sum(sizes)


def test_the_tree_depends_on_the_number_of_blocks_only():
    def shape(count):
        blocks = [Moments(1, [float(k)], [0.0]) for k in range(count)]
        tree = Tree()
        for block in blocks:
            tree.add(block)
        return [level for level, _ in tree._waiting]

    assert [shape(k) for k in (1, 2, 3, 7, 8)] == [[0], [1], [1, 0], [2, 1, 0], [3]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "uint16", "int16", "int32", "int64"])
@pytest.mark.parametrize("shape", [(700, 3), (13, 9, 11, 3), (5, 2000), (3, 1), (1, 2)])
def test_integers_are_summed_exactly_and_rounded_once(dtype, shape):
    rng = np.random.default_rng(5)
    if dtype == "bool":
        x = rng.integers(0, 2, shape).astype(bool)
    else:
        limits = np.iinfo(dtype)
        x = rng.integers(max(limits.min, -(2**21)), min(limits.max, 2**21), shape, dtype=dtype, endpoint=True)
    columns = x.reshape(-1, shape[-1]).astype(object)
    total, squares = columns.sum(axis=0), (columns * columns).sum(axis=0)
    exact = exact_moments(x)
    assert exact == ExactMoments(len(columns), total, squares)
    found = moments(x)
    for c in range(shape[-1]):
        assert found.mean[c] == float(Fraction(int(total[c]), len(columns)))
        n, s, q = len(columns), int(total[c]), int(squares[c])
        assert found.m2[c] == float(Fraction(n * q - s * s, n))


def test_the_largest_bytes_everywhere_do_not_overflow_a_partial_sum():
    x = np.full((1_600_003, 3), 255, np.uint8)
    assert exact_moments(x) == ExactMoments(len(x), [255 * len(x)] * 3, [255 * 255 * len(x)] * 3)
    wide = np.full((300_001, 2), -(2**21), np.int32)
    assert exact_moments(wide) == ExactMoments(len(wide), [-(2**21) * len(wide)] * 2, [2**42 * len(wide)] * 2)


@pytest.mark.parametrize("part", [1, 60, 1000])
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_exact_sums_shared_out_among_threads_miss_nothing_and_count_nothing_twice(part, dtype, monkeypatch):
    monkeypatch.setattr(sums, "SPLIT", part)
    monkeypatch.setattr(sums, "threads", lambda: 3)
    x = np.random.default_rng(14).integers(0, 256, (17, 7, 9, 4)).astype(dtype)
    columns = x.reshape(-1, 4).astype(object)
    expected = ExactMoments(len(columns), columns.sum(axis=0), (columns * columns).sum(axis=0))
    assert exact_moments(x) == expected
    assert exact_moments(x[::-1]) == expected
    assert exact_moments(x[:, :, ::-1]) == expected
    assert exact_moments(np.ascontiguousarray(np.moveaxis(x, -1, 1)), axis=1) == expected
    assert exact_moments(x.ravel(), axis=0).total == tuple(x.ravel().tolist())


@pytest.mark.parametrize("rows", [1, 259, 511, 513, 767, 1535, 3071, 3073, 50_003])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_bright_pixels_that_fill_no_whole_tile_are_summed_exactly(rows, channels):
    x = np.random.default_rng(15).integers(250, 256, (rows, channels), dtype=np.uint8)
    wide = x.astype(np.int64)
    assert exact_moments(x) == ExactMoments(rows, wide.sum(axis=0), (wide * wide).sum(axis=0))


def test_exact_moments_merge_in_any_order_to_the_same_integers():
    rng = np.random.default_rng(6)
    x = rng.integers(0, 256, (1000, 3), dtype=np.uint8)
    whole = exact_moments(x)
    parts = [exact_moments(x[i : i + 90]) for i in range(0, 1000, 90)]
    rng.shuffle(parts)
    pooled = parts[0]
    for part in parts[1:]:
        pooled = pooled.merge(part)
    assert pooled == whole
    assert hash(pooled) == hash(whole)


def test_integers_too_large_for_exact_sums_at_once_are_taken_as_floats_by_moments_only():
    x = np.array([[2**40, 1], [2**41, 2], [3, 3]], np.int64)
    found = moments(x)
    _, m2 = rational(x[:, 0])
    assert found.m2[0] == pytest.approx(float(m2), rel=1e-14)
    assert list(exact_moments(x).total) == [2**40 + 2**41 + 3, 6]
    assert list(exact_moments(x).squares) == [2**80 + 2**82 + 9, 14]


@pytest.mark.parametrize("dtype", ["int32", ">i4", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("axis", [0, -1])
def test_integers_of_every_width_are_summed_exactly(dtype, axis):
    kind = np.dtype(dtype).newbyteorder("=")
    low, high = (int(f) for f in (np.iinfo(kind).min, np.iinfo(kind).max))
    for least, most in ((low, high), (high - 5, high), (low, low + 5), (max(low, -(2**22)), 2**22)):
        x = np.random.default_rng(3).integers(least, most, (5, 40, 3), kind.type, endpoint=True).astype(dtype)
        x[0, 0, 0], x[-1, -1, -1] = least, most
        found = exact_moments(x, axis)
        for c in range(x.shape[axis]):
            values = [int(v) for v in np.take(x, c, axis).ravel()]
            assert (found.total[c], found.squares[c]) == (sum(values), sum(v * v for v in values))


@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 70, 9, 9), (2, 3, 300, 300), (5, 4, 6, 6), (2, 900, 40)])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_channels_first_and_channels_last_are_the_same_numbers(shape, dtype):
    rng = np.random.default_rng(7)
    x = (100 + 20 * rng.standard_normal(shape)).astype(dtype)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    true_mean, true_variance = two_pass_80_bit(last)
    for found in (moments(x, axis=1), moments(last), moments(np.moveaxis(x, 1, -1)), moments(x[::-1], axis=1)):
        assert (abs(found.mean - true_mean) <= 1e-13 * abs(true_mean)).all()
        assert (abs(found.variance() / true_variance - 1) <= 1e-12).all()
    everywhere = moments(x, axis=0)
    assert everywhere.channels == shape[0]


def test_buffers_are_kept_for_each_byte_order():
    """In a thread of its own, which has none yet: the first one must not be what native numbers are then put into."""
    swapped, native = np.dtype(np.float32).newbyteorder(), np.dtype(np.float32)
    kept = []
    thread = threading.Thread(target=lambda: kept.extend(sums.scratch(4, kind) for kind in (swapped, native)))
    thread.start()
    thread.join()
    assert [buffer.dtype for buffer in kept] == [swapped, native]


@pytest.mark.parametrize("inner", [8192, 8193, 40_001, 65_536, 150_000])
def test_long_planes_are_added_up_in_runs_that_every_numpy_takes_in_the_same_order(inner):
    """Up to numpy 1.23 a sum along an axis is cut into runs of 8192, from 1.24 on it is not; of no more both give the same."""
    x = np.random.default_rng(inner).standard_normal((3, 2, inner))
    total, squares = sums.shifted_plane_sums(x, np.zeros(2))
    for channel in range(2):
        for found, values in ((total, x[:, channel]), (squares, x[:, channel] ** 2)):
            expected = 0.0
            for plane in values:
                for start in range(0, inner, 65_536):
                    part = plane[start : start + 65_536]
                    runs = [np.add.reduce(part[k : k + 8192]) for k in range(0, len(part), 8192)]
                    short = runs.pop() if len(part) % 8192 and len(runs) > 1 else 0.0
                    expected += np.add.reduce(np.array(runs)) + short
            assert found[channel] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_floats_are_widened_before_they_are_summed(dtype):
    import ml_dtypes

    x = np.random.default_rng(8).normal(30, 2, (70_000, 2)).astype(getattr(ml_dtypes, dtype, np.float16))
    true_mean, true_variance = two_pass_80_bit(x.astype(np.float64))
    found = moments(x)
    assert (abs(found.mean / true_mean - 1) <= 1e-14).all()
    assert (abs(found.variance() / true_variance - 1) <= 1e-12).all()


def test_a_constant_channel_has_a_variance_of_exactly_zero():
    x = np.full((1234, 2), 0.1, np.float64)
    x[:, 1] = np.float32(-7.3)
    assert moments(x).variance().tolist() == [0.0, 0.0]
    assert moments(x).mean.tolist() == [0.1, float(np.float32(-7.3))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [1, -1])
def test_a_nan_or_infinity_is_refused_and_named_with_its_channel_and_position(bad, axis):
    x = np.ones((6, 5, 40, 5), np.float32)
    x[(4, 3, 2, 1)] = bad
    channel = {1: 3, -1: 1}[axis]
    with pytest.raises(InvalidValue, match=rf"{bad} in channel {channel}, at position \(4, "):
        moments(x, axis=axis)


def test_numbers_whose_squares_overflow_are_refused_not_returned_as_infinity():
    with pytest.raises(InvalidValue, match="so large"):
        moments(np.array([[1e200], [-1e200]]))


@pytest.mark.parametrize(
    ("array", "axis", "message"),
    [
        (np.ones((2, 2), complex), -1, "dtype complex"),
        (np.array([[None]]), -1, "dtype object"),
        (np.array([["a"]]), -1, "dtype <U1"),
        (np.ones((2, 3)), 2, "no axis 2"),
        (np.float32(3), -1, "no axis"),
        (np.ones((3, 0)), -1, "no channels"),
    ],
)
def test_arrays_that_have_no_moments_are_refused(array, axis, message):
    with pytest.raises(InvalidValue, match=message):
        moments(array, axis=axis)


def test_no_rows_at_all_are_the_neutral_element_of_merge():
    some = moments(np.random.default_rng(9).normal(size=(9, 3)))
    none = moments(np.empty((0, 3)))
    assert none.n == 0
    assert merge(some, none) is some
    assert merge(none, some) is some
    with pytest.raises(InvalidValue, match="needs one"):
        none.variance()
    with pytest.raises(InvalidValue, match="needs two"):
        moments(np.ones((1, 3))).variance(unbiased=True)
    with pytest.raises(InvalidValue, match="do not merge"):
        merge(some, moments(np.ones((2, 4))))
    with pytest.raises(InvalidValue, match="nothing"):
        merge_all([])


def test_one_row_without_a_batch_axis_counts_as_one():
    found = moments(np.array([3.0, 4.0]))
    assert (found.n, found.mean.tolist(), found.variance().tolist()) == (1, [3.0, 4.0], [0.0, 0.0])


def test_the_unbiased_variance_divides_by_n_minus_one():
    x = np.random.default_rng(10).normal(2, 3, (11, 4))
    wide = x.astype(np.longdouble)
    assert moments(x).variance(unbiased=True) == pytest.approx(wide.var(axis=0, ddof=1).astype(float), rel=1e-14)
    assert moments(x).std() == pytest.approx(wide.std(axis=0).astype(float), rel=1e-14)


def test_moments_are_immutable_and_survive_pickle_and_bytes_with_every_bit():
    found = moments(np.random.default_rng(11).normal(1e5, 1, (999, 5)))
    assert Moments.from_bytes(found.to_bytes()).same_bits(found)
    assert pickle.loads(pickle.dumps(found)).same_bits(found)
    with pytest.raises(AttributeError):
        found.n = 3
    with pytest.raises(ValueError, match="read-only"):
        found.mean[0] = 0


def test_stored_moments_with_any_byte_changed_or_cut_off_are_refused():
    stored = moments(np.random.default_rng(12).normal(size=(9, 2))).to_bytes()
    for k in range(len(stored)):
        broken = bytearray(stored)
        broken[k] ^= 0x10
        with pytest.raises(FormatError):
            Moments.from_bytes(bytes(broken))
        with pytest.raises(FormatError):
            Moments.from_bytes(stored[:k])


@pytest.mark.parametrize(
    ("n", "mean", "m2"),
    [(1, [np.nan], [0.0]), (1, [0.0], [np.inf]), (1, [0.0], [-1.0]), (-1, [0.0], [0.0]), (1, [0.0, 1.0], [0.0]),
     (1, [], []), (1, [[0.0]], [[0.0]])],
)  # fmt: skip
def test_moments_that_cannot_be_are_refused(n, mean, m2):
    with pytest.raises(InvalidValue):
        Moments(n, mean, m2)


def test_the_array_that_was_given_is_left_as_it_was():
    for x in (np.random.default_rng(13).normal(size=(900, 3)), np.arange(300, dtype=np.uint8).reshape(100, 3)):
        before = x.copy()
        moments(x)
        assert (x == before).all()


CODE = """
import numpy as np
from bnport.calibrate.moments import moments
x = np.random.default_rng(0).standard_normal((1_300_000, 5), dtype=np.float32) * 3 + 1e3
print(moments(x).to_bytes().hex())
print(moments(x.reshape(130, 5, 100, 100), axis=1).to_bytes().hex())
"""


def test_the_number_of_threads_does_not_change_a_bit():
    def run(threads):
        import os

        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)

    assert run("1").stdout == run("2").stdout == run("3").stdout != ""


def test_a_nan_in_any_part_of_a_large_array_is_found_without_a_warning():
    x = np.ones((3_000_000, 2), np.float32)
    x[2_900_000, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidValue, match=r"nan in channel 1, at position \(2900000\)"):
            moments(x)


def test_one_row_of_very_many_channels_is_not_cut_between_channels():
    x = np.arange(10_000_000, dtype=np.float32)[::2]
    assert moments(x).mean.tolist() == x.tolist()
