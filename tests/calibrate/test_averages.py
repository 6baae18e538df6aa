"""The values of the one-pass methods: laws of their merge, and the plain loop in exact rational numbers as the oracle."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnport.calibrate import shards
from bnport.calibrate.averages import Updates, UpdatesTree
from bnport.calibrate.moments import Moments
from bnport.calibrate.onepass import Averaged, Moving, Pooled
from bnport.errors import FormatError, InvalidValue

pytestmark = pytest.mark.core

U = 2.0**-53
KINDS = {"precise": Pooled, "average": Averaged, "moving": Moving}


def norm(momentum=0.99, mean=(3.0, -2.0), variance=(0.25, 40.0)):
    """What the methods look at in a layer."""
    stored = np.array(mean), np.array(variance)
    return SimpleNamespace(
        name="bn", channels=2, epsilon=1e-3, momentum=momentum, read=lambda: stored, variance=Moments.variance
    )


number = st.floats(-1e6, 1e6, allow_nan=False)
spread = st.floats(0, 1e8, allow_nan=False, allow_subnormal=False)
batch = st.builds(
    lambda n, mean, m2: Moments(n, mean, m2) if n else Moments(0, [0, 0], [0, 0]),
    st.integers(0, 2000),
    st.tuples(number, number),
    st.tuples(spread, spread),
).filter(lambda b: b.n != 1)
batches = st.lists(batch, min_size=1, max_size=40).filter(lambda bs: any(b.n for b in bs))
momenta = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.9, 0.99, 0.999, 1.0]))


def seen(kind, norm, calls, unbiased=False):
    kept = kind(norm, unbiased)
    for call in calls:
        kept.add(call)
        kept.end_batch()
    return kept


def exact(array):
    return [Fraction(float(v)) for v in array]


def plain_loop(method, norm, calls, unbiased):
    """(value, sum of the magnitudes of its terms) of mean and variance, batch after batch, in rational numbers."""
    result = []
    for which, start in enumerate(norm.read()):
        total = exact(start) if method == "moving" else [Fraction(0), Fraction(0)]
        sizes = [abs(v) for v in total]
        n = 0
        for call in calls:
            if not call.n:
                continue
            statistics = exact(call.variance(unbiased) if which else call.mean)
            n += call.n
            keep = Fraction(norm.momentum) if method == "moving" else 1 - Fraction(call.n, n)
            total = [keep * t + (1 - keep) * s for t, s in zip(total, statistics, strict=True)]
            sizes = [keep * t + (1 - keep) * abs(s) for t, s in zip(sizes, statistics, strict=True)]
        result.append((total, sizes))
    return result


@settings(max_examples=150)
@given(batches, momenta, st.booleans())
@pytest.mark.parametrize("method", ["average", "moving"])
def test_the_result_is_within_the_derived_bound_of_a_plain_loop_in_rational_numbers(method, calls, momentum, unbiased):
    layer = norm(momentum)
    found = seen(KINDS[method], layer, calls, unbiased).result()
    count = len(calls)
    depth = math.ceil(math.log2(count)) if count > 1 else 0
    factor = depth + 3 if method == "average" else count + 2 * depth + 4
    for ours, (true, sizes) in zip(found, plain_loop(method, layer, calls, unbiased), strict=True):
        for value, want, size in zip(ours, true, sizes, strict=True):
            tiny = Fraction(1, 2**1000)  # products of keeps that underflow
            assert abs(Fraction(float(value)) - want) <= Fraction(factor * U * (1 + 1e-9)) * size + tiny


@settings(max_examples=100)
@given(batches, momenta, st.booleans(), st.data())
@pytest.mark.parametrize("method", ["precise", "average", "moving"])
def test_any_division_into_shards_and_any_point_of_resuming_give_the_same_bits(method, calls, momentum, unbiased, data):
    layer, kind = norm(momentum), KINDS[method]
    expected = seen(kind, layer, calls, unbiased)
    first = data.draw(st.integers(0, len(calls)))
    largest = 1 << data.draw(st.integers(0, 6))
    start = seen(kind, layer, calls[:first], unbiased)
    found = kind(layer, unbiased)
    found.from_arrays(start.to_arrays(), first)
    covered = first
    for part in shards.parts(None, first, len(calls), largest):
        assert part.first == covered
        covered += 1 << part.level
        assert 1 << part.level <= largest
        shard = seen(kind, layer, calls[part.first : covered], unbiased)
        found.add_run(shard.tree.result().to_bytes(), part.level)
    assert covered == len(calls)
    assert [a.tobytes() for a in found.result()] == [a.tobytes() for a in expected.result()]
    assert found.tree.n == expected.tree.n == sum(c.n for c in calls)


updates = st.builds(
    lambda n, keep, mean, variance: Updates(n, keep, mean, variance) if n else Updates(0, 1, [0, 0], [0, 0]),
    st.integers(0, 100),
    st.floats(0, 1),
    st.tuples(number, number),
    st.tuples(spread, spread),
)


@settings(max_examples=200)
@given(updates, updates, updates)
def test_merging_is_associative_within_rounding_and_nothing_is_neutral(a, b, c):
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert left.n == right.n == a.n + b.n + c.n
    tiny = 2.0**-1000
    assert abs(left.keep - right.keep) <= 4 * U * left.keep + tiny
    for name in ("mean", "variance"):
        parts = [np.abs(getattr(v, name)) for v in (a, b, c)]
        size = b.keep * c.keep * parts[0] + c.keep * parts[1] + parts[2]
        assert (np.abs(getattr(left, name) - getattr(right, name)) <= 10 * U * size + tiny).all()
    nothing = Updates(0, 1.0, [0, 0], [0, 0])
    assert a.merge(nothing).to_bytes() == nothing.merge(a).to_bytes() == a.to_bytes()


@settings(max_examples=50)
@given(updates)
def test_stored_updates_come_back_bit_for_bit(value):
    for back in (Updates.from_bytes(value.to_bytes()), pickle.loads(pickle.dumps(value))):
        assert back.to_bytes() == value.to_bytes()
    assert len(value.to_bytes()) == 16 * value.channels + 36


def test_the_order_of_the_batches_matters_to_moving_and_is_kept_by_a_merge():
    one, two = Moments(4, [1, 1], [4, 4]), Moments(4, [9, 9], [8, 8])
    layer = norm(0.5, mean=(0, 0), variance=(0, 0))
    np.testing.assert_array_equal(seen(Moving, layer, [one, two]).result()[0], [4.75, 4.75])
    np.testing.assert_array_equal(seen(Moving, layer, [two, one]).result()[0], [2.75, 2.75])


def test_calls_of_one_batch_count_one_after_the_other_and_keep_the_tree_over_batches():
    one, two = Moments(4, [1, 1], [4, 4]), Moments(4, [9, 9], [8, 8])
    kept = Moving(norm(0.5, mean=(0, 0), variance=(0, 0)), False)
    for _ in range(3):
        kept.add(one)
        kept.add(two)
        kept.end_batch()
    assert kept.tree.blocks == 3
    want = 0.0
    for value in (1, 9) * 3:
        want = 0.5 * want + 0.5 * value
    np.testing.assert_array_equal(kept.result()[0], [want, want])


def test_a_batch_in_which_a_layer_sees_nothing_changes_nothing():
    none, one = Moments(0, [0, 0], [0, 0]), Moments(5, [2, 3], [10, 20])
    for kind in (Pooled, Averaged, Moving):
        found = seen(kind, norm(), [none, one, none, none]).result()
        want = seen(kind, norm(), [one]).result()
        assert [a.tobytes() for a in found] == [a.tobytes() for a in want]


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan])
def test_a_momentum_that_is_no_share_is_refused(momentum):
    with pytest.raises(InvalidValue, match="is not between 0 and 1"):
        Moving(norm(momentum), False)


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, 1, [0], [0]),
        (1, -0.5, [0], [0]),
        (1, math.nan, [0], [0]),
        (1, 1, [math.inf], [0]),
        (1, 1, [0], [-1]),
        (1, 1, [0, 0], [0]),
        (1, 1, [], []),
    ],
)
def test_updates_that_cannot_be_are_refused(arguments):
    with pytest.raises(InvalidValue, match="averages"):
        Updates(*arguments)


def test_damaged_or_foreign_bytes_are_refused():
    data = Updates(3, 0.5, [1, 2], [3, 4]).to_bytes()
    for k in range(len(data)):
        with pytest.raises(FormatError):
            Updates.from_bytes(data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :])
        with pytest.raises(FormatError):
            Updates.from_bytes(data[:k])
    with pytest.raises(FormatError):
        Updates.from_bytes(Moments(3, [1, 2], [3, 4]).to_bytes())


def test_a_run_from_elsewhere_must_fit_the_layer_and_the_tree():
    kept = Averaged(norm(), False)
    with pytest.raises(FormatError, match="3 channels stored"):
        kept.add_run(Updates(3, 1, [1, 2, 3], [3, 4, 5]).to_bytes(), 0)
    kept.add_run(Updates(3, 1, [1, 2], [3, 4]).to_bytes(), 0)
    with pytest.raises(InvalidValue, match="must start at a multiple"):
        kept.add_run(Updates(3, 1, [1, 2], [3, 4]).to_bytes(), 1)
    with pytest.raises(FormatError, match="1 batches stored, of 2"):
        kept.from_arrays(kept.to_arrays(), 2)
    for levels in ([-1], [4000000000], [64]):
        with pytest.raises(FormatError, match="does not have the levels"):
            UpdatesTree.from_arrays({**kept.to_arrays(), "levels": np.array(levels)})
