"""The record and its algebra, against 60-digit decimal arithmetic: what is promised holds for adversarial values."""

from __future__ import annotations

import pickle
import re
from decimal import Decimal, getcontext

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bnport.errors import InvalidValue, Unrepresentable
from bnport.record import FIELDS, BatchNorm
from bnport.rounding import meant_epsilon, round_to, stored

pytestmark = pytest.mark.core

getcontext().prec = 60
U64 = Decimal(2) ** -53
U32 = Decimal(2) ** -24


def single(low: float, high: float) -> st.SearchStrategy[float]:
    """float32 values spread over orders of magnitude, not over the number line."""
    exponents = st.floats(np.log10(low), np.log10(high))
    return exponents.map(lambda e: float(np.float32(10.0**e)))


signed = st.one_of(st.just(0.0), st.tuples(st.sampled_from([-1, 1]), single(1e-6, 1e4)).map(lambda p: p[0] * p[1]))
variances = st.one_of(st.just(0.0), single(1e-12, 1e6))
epsilons = st.one_of(st.sampled_from([1e-3, 1e-5, 1.001e-5, 2e-5, 1e-10]), single(1e-9, 1.0))


@st.composite
def records(draw: st.DrawFn, channels: int = 4) -> BatchNorm:
    def vector(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=channels, max_size=channels)), np.float32)

    return BatchNorm(
        gamma=vector(signed),
        beta=vector(signed),
        mean=vector(signed),
        variance=vector(variances),
        epsilon=draw(epsilons),
    )


def exact_affine(bn: BatchNorm) -> list[tuple[Decimal, Decimal]]:
    rows = zip(*(getattr(bn, f).tolist() for f in ("gamma", "beta", "mean", "variance")), strict=True)
    result = []
    for gamma, beta, mean, variance in rows:
        a = Decimal(gamma) / (Decimal(variance) + Decimal(bn.epsilon)).sqrt()
        result.append((a, Decimal(beta) - Decimal(mean) * a))
    return result


def assert_same_function(one: BatchNorm, other: BatchNorm, ulps: int, unit: Decimal = U64) -> None:
    """|da| <= ulps u |a| and |db| <= ulps u (|beta| + |a mean|), both exactly."""
    sizes = zip(one.beta.tolist(), one.mean.tolist(), other.beta.tolist(), other.mean.tolist(), strict=True)
    for (a, b), (new_a, new_b), (beta, mean, beta2, mean2) in zip(
        exact_affine(one), exact_affine(other), sizes, strict=True
    ):
        size = max(abs(Decimal(beta)) + abs(a * Decimal(mean)), abs(Decimal(beta2)) + abs(a * Decimal(mean2)))
        assert abs(new_a - a) <= ulps * unit * abs(a)
        assert abs(new_b - b) <= ulps * unit * size


# ---- the door


def test_arguments_by_position_are_a_type_error():
    with pytest.raises(TypeError):
        BatchNorm(np.ones(2), np.zeros(2), np.zeros(2), np.ones(2), 1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": [0.0, np.nan]}, "mean: channel 1 is nan"),
        ({"gamma": [np.inf, 1.0]}, "gamma: channel 0 is inf"),
        ({"variance": [1.0, -2e-5]}, "variance + epsilon must be positive; channel 1"),
        ({"variance": [[1.0, 2.0]]}, "expected shape (channels,)"),
        ({"variance": []}, "at least one channel"),
        ({"beta": [0.0, 0.0, 0.0]}, "different lengths: gamma 2, beta 3, mean 2, variance 2"),
        ({"beta": [0j, 0j]}, "complex"),
        ({"beta": ["0", "0"]}, "expected floating-point"),
        ({"beta": [True, False]}, "bool"),
        ({"epsilon": "1e-5"}, "epsilon: expected a number"),
        ({"epsilon": -1e-5}, "epsilon: expected a finite number >= 0"),
        ({"epsilon": float("nan")}, "epsilon: expected a finite number"),
        ({"epsilon": [1e-5]}, "epsilon: expected a number"),
        ({"epsilon": True}, "epsilon: expected a number"),
    ],
)
def test_what_is_not_a_batchnorm_is_refused_with_the_field_and_the_channel(changes, words):
    values = {"gamma": [1.0, 1.0], "beta": [0.0, 0.0], "mean": [0.0, 0.0], "variance": [1.0, 1.0], "epsilon": 1e-5}
    with pytest.raises(InvalidValue, match=re.escape(words)):
        BatchNorm(**{**values, **changes})


def test_a_negative_variance_is_kept_when_epsilon_makes_it_positive():
    bn = BatchNorm(mean=[0.0], variance=np.float32([-9e-6]), epsilon=1e-5)
    assert bn.variance[0] == np.float32(-9e-6)


def test_absent_gamma_and_beta_are_ones_and_zeros():
    bn = BatchNorm(mean=[3.0, 4.0], variance=[1.0, 2.0], epsilon=0)
    assert bn.gamma.tolist() == [1, 1]
    assert bn.beta.tolist() == [0, 0]


@pytest.mark.parametrize("field", FIELDS)
def test_masked_values_are_refused_and_an_empty_mask_is_none(field):
    arrays = {name: np.arange(3.0) + 1 for name in FIELDS}
    bad = np.ma.masked_array(arrays[field], [0, 0, 1])
    with pytest.raises(InvalidValue, match=f"{field}: channel 2 masked"):
        BatchNorm(**{**arrays, field: bad}, epsilon=0.1)
    with pytest.raises(InvalidValue, match="masked"):
        BatchNorm(**arrays, epsilon=0.1).replace(**{field: bad})
    assert BatchNorm(**{**arrays, field: np.ma.masked_array(arrays[field])}, epsilon=0.1) == BatchNorm(
        **arrays, epsilon=0.1
    )


def test_arrays_are_copied_and_read_only():
    mean = np.zeros(2, np.float32)
    bn = BatchNorm(mean=mean, variance=[1.0, 1.0], epsilon=1e-5)
    mean[0] = 7
    assert bn.mean[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        bn.mean[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        bn.values[3, 0] = 1
    with pytest.raises(AttributeError, match="immutable"):
        bn.mean = mean


def test_the_values_are_the_four_arrays_in_the_order_of_the_fields():
    bn = BatchNorm(gamma=[1.0, 2], beta=[3.0, 4], mean=[5.0, 6], variance=[7.0, 8], epsilon=0)
    assert bn.values.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert [getattr(bn, field).tolist() for field in ("gamma", "beta", "mean", "variance")] == bn.values.tolist()


def test_one_float64_array_widens_the_others_exactly():
    third = np.array([1 / 3], np.float32)
    bn = BatchNorm(mean=third, variance=np.array([1 / 3]), epsilon=0)
    assert bn.mean.dtype == bn.variance.dtype == np.float64
    assert bn.mean[0] == float(third[0])
    assert bn.variance[0] == 1 / 3


@pytest.mark.parametrize("field", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_field_and_channel(field, bad):
    values = {name: np.ones(5, np.float32) for name in ("gamma", "beta", "mean", "variance")}
    values[field][3] = bad
    with pytest.raises(InvalidValue, match=f"{field}: channel 3 is {bad}; every value must be finite"):
        BatchNorm(**values, epsilon=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_values_widen_exactly_to_float32(dtype):
    values = np.array([0.1, -3.3, 6e-5, 1000.0]).astype(dtype)
    bn = BatchNorm(mean=values, variance=abs(values), epsilon=1e-5)
    assert bn.mean.dtype == np.float32
    assert (bn.mean == values.astype(np.float64)).all()


def test_a_record_survives_pickling():
    bn = BatchNorm(mean=[0.5], variance=[2.0], epsilon=1e-3)
    assert pickle.loads(pickle.dumps(bn)) == bn


def test_equality_is_of_bits_and_zero_is_not_minus_zero():
    one = BatchNorm(mean=[0.0], variance=[1.0], epsilon=1e-3)
    assert one == one.replace(epsilon=1e-3)
    assert one != one.replace(mean=[-0.0])
    assert one != one.replace(epsilon=1e-5)


@given(st.sampled_from([1e-5, 1e-3, 1.001e-5, 2e-5, 1e-6, 1e-4, 0.1, 1e-8, 1e-10, 5e-4]))
def test_a_float32_epsilon_reads_as_the_decimal_that_was_meant(epsilon):
    assert meant_epsilon(float(np.float32(epsilon))) == epsilon
    assert BatchNorm(mean=[0], variance=[1], epsilon=np.float32(epsilon)).epsilon == epsilon


@given(st.floats(0, 1e30))
def test_the_meant_epsilon_is_the_same_float32(epsilon):
    assert np.float32(meant_epsilon(epsilon)) == np.float32(epsilon)


# ---- the function


@given(records())
@settings(max_examples=200)
def test_affine_is_within_three_ulps_of_the_exact_affine(bn):
    a, b = bn.affine()
    sizes = zip(exact_affine(bn), a.tolist(), b.tolist(), bn.beta.tolist(), bn.mean.tolist(), strict=True)
    for (exact_a, exact_b), got_a, got_b, beta, mean in sizes:
        assert abs(Decimal(got_a) - exact_a) <= 3 * U64 * abs(exact_a)
        assert abs(Decimal(got_b) - exact_b) <= 6 * U64 * (abs(Decimal(beta)) + abs(exact_a * Decimal(mean)))


FORMS = {
    "A": lambda x, g, b, m, v, e: x * (g * (1 / np.sqrt(v + e))) + (b - m * (g * (1 / np.sqrt(v + e)))),
    "B": lambda x, g, b, m, v, e: (x - m) * (g * (1 / np.sqrt(v + e))) + b,
    "divide": lambda x, g, b, m, v, e: g * ((x - m) / np.sqrt(v + e)) + b,
}


@pytest.mark.parametrize("form", sorted(FORMS))
@given(bn=records())
@settings(max_examples=300)
def test_every_float32_form_of_the_formula_is_within_the_error_bound(form, bn):
    x = bn.probes().astype(np.float32)
    parameters = [getattr(bn, f).astype(np.float32) for f in ("gamma", "beta", "mean", "variance")]
    with np.errstate(over="ignore", invalid="ignore"):
        y = FORMS[form](x, *parameters, np.float32(bn.epsilon))
    assume(np.isfinite(y).all())
    assert y.dtype == np.float32
    assert (np.abs(y - bn(x)) <= bn.error_bound(x)).all()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda bn: bn.replace(epsilon=1e-3),
        lambda bn: bn.replace(epsilon=1.001e-5),
        lambda bn: bn.replace(gamma=bn.beta, beta=bn.gamma),
        lambda bn: bn.replace(variance=np.sqrt(bn.variance)),
        lambda bn: bn.replace(variance=bn.variance * (1000 / 999)),
        lambda bn: bn.replace(mean=bn.beta, beta=bn.mean),
        lambda bn: bn.replace(gamma=np.abs(bn.gamma)),
        lambda bn: bn.replace(gamma=np.abs(bn.gamma) + bn.epsilon),
    ],
)
def test_every_classic_mistake_is_outside_the_error_bound_and_the_storage_term(mistake):
    rng = np.random.default_rng(5)
    bn = BatchNorm(
        gamma=rng.normal(1, 0.3, 64) * rng.choice([-1, 1], 64),
        beta=rng.normal(0, 0.5, 64),
        mean=rng.normal(0, 1, 64),
        variance=10 ** rng.uniform(-6, 0, 64),
        epsilon=1e-5,
    )
    wrong, x = mistake(bn), bn.probes()
    allowed = bn.error_bound(x) + bn.storage_bound(x)
    assert (np.abs(wrong(x) - bn(x)) > allowed).any()


def test_probes_are_float32_values():
    bn = BatchNorm(mean=[0.1, 1e4], variance=[1e-7, 3.0], epsilon=1e-5)
    assert (bn.probes() == bn.probes().astype(np.float32)).all()
    assert bn.probes().shape == (10, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(bn=records())
@settings(max_examples=100)
def test_a_16_bit_output_is_within_its_own_bound(dtype, bn):
    x = bn.probes(dtype)
    y = bn(x).astype(np.float32)
    with np.errstate(over="ignore"):
        stored = y.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16).astype(np.float64)
    keep = np.isfinite(stored) & np.isfinite(x)
    x, stored = np.where(keep, x, 0), np.where(keep, stored, 0)
    bound = bn.error_bound(x, output_dtype=dtype)
    assert (np.abs(stored - bn(x))[keep] <= bound[keep]).all()


@given(bn=records(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(max_examples=300)
def test_parameters_rounded_once_move_the_output_within_the_storage_bound(bn, dtype):
    try:
        stored = bn.rounded(dtype)
    except Unrepresentable:
        assume(False)
    x = bn.probes()
    moved = np.abs(stored(x) - bn(x))
    assert (moved <= 1.02 * bn.storage_bound(x, dtype=dtype) + 1e-12 * np.abs(bn(x))).all()


# ---- the same function in another form


@given(records(), epsilons)
@settings(max_examples=300)
def test_another_epsilon_is_the_same_function_within_four_ulps_and_never_a_negative_variance(bn, epsilon):
    other = bn.with_epsilon(epsilon)
    assert other.epsilon == meant_epsilon(epsilon)
    assert_same_function(bn, other, ulps=4)
    assert (other.variance >= 0).all()


@given(records(), epsilons)
@settings(max_examples=300)
def test_absorbed_and_rounded_to_float32_it_is_the_same_function_within_three_ulps_of_float32(bn, epsilon):
    try:
        fitted = bn.fit(epsilon=epsilon).record
    except Unrepresentable:
        assume(False)
    assert_same_function(bn, fitted, ulps=3, unit=U32)


@given(
    st.sampled_from([1.0, 1e-3, 1e-5]),
    st.lists(st.floats(1e-16, 1.0), min_size=3, max_size=3),
    st.one_of(st.just(0.0), single(1e-16, 10.0)),
)
@settings(max_examples=300)
def test_a_variance_just_above_minus_epsilon_keeps_its_function_with_any_epsilon(epsilon, parts, other):
    variance = [-epsilon * (1 - part) for part in parts]
    assume(all(v + epsilon > 0 for v in variance) and other != epsilon)
    bn = BatchNorm(
        gamma=[0.3, -2.0, 1.0], beta=[0.5, 0.0, -1.0], mean=[0.1, -0.2, 3.0], variance=variance, epsilon=epsilon
    )
    changed = bn.with_epsilon(other)
    assert (changed.variance >= 0).all()
    assert_same_function(bn, changed, ulps=4)


def test_what_overflows_with_another_epsilon_is_unrepresentable_and_names_the_channel():
    bn = BatchNorm(gamma=[1.0, 1e300], mean=[0.0, 0.0], variance=[1.0, 0.0], epsilon=1e-30)
    with pytest.raises(Unrepresentable, match="channel 1: gamma would overflow with epsilon 10"):
        bn.with_epsilon(10.0)


def test_a_legal_negative_variance_becomes_positive_with_another_epsilon():
    bn = BatchNorm(gamma=[2.0], mean=[0.5], variance=[-9e-6], epsilon=1e-5)
    for epsilon in (1e-3, 1e-6, 1e-7):
        other = bn.with_epsilon(epsilon)
        assert other.variance[0] >= 0
        assert_same_function(bn, other, ulps=4)


def test_the_same_epsilon_changes_no_bit():
    bn = BatchNorm(mean=[0.5], variance=np.float32([-9e-6]), epsilon=1e-5)
    assert bn.with_epsilon(np.float32(1e-5)) == bn


@given(records())
@settings(max_examples=300)
def test_without_gamma_it_is_the_same_function_or_refused_by_channel(bn):
    gamma, total = bn.gamma.astype(np.float64), bn.variance.astype(np.float64) + bn.epsilon
    feasible = (gamma > 0) & (total / np.where(gamma > 0, gamma, 1) ** 2 >= bn.epsilon)
    feasible |= gamma == 1
    try:
        other = bn.without_gamma()
    except Unrepresentable as error:
        assert not feasible.all()
        named = {int(n) for n in re.findall(r"\d+", str(error).partition(" cannot")[0])}
        assert named
        assert named <= set(np.flatnonzero(~feasible).tolist())
    else:
        assert (other.gamma == 1).all()
        assert_same_function(bn, other, ulps=8)


@given(records())
@settings(max_examples=300)
def test_without_gamma_a_smaller_epsilon_is_taken_where_the_target_can_hold_one(bn):
    gamma = bn.gamma.astype(np.float64)
    try:
        fit = bn.fit(scale=False, dtype="float64")
    except Unrepresentable as error:
        assert "slope" not in str(error)
        assert ((gamma <= 0) & (gamma != 1)).any() or "overflow" in str(error) or "underflow" in str(error)
    else:
        assert (fit.record.gamma == 1).all()
        assert (fit.record.variance >= np.minimum(bn.variance, 0)).all()
        assert_same_function(bn, fit.record, ulps=16)
        assert fit.record.epsilon <= bn.epsilon
        assert (fit.record.epsilon != bn.epsilon) == any("so that gamma" in note for note in fit.notes)


@given(records())
@settings(max_examples=300)
def test_without_beta_it_is_the_same_function_or_refused_by_channel(bn):
    impossible = (bn.gamma == 0) & (bn.beta != 0)
    try:
        other = bn.without_beta()
    except Unrepresentable as error:
        assert impossible.any()
        assert "gamma is 0" in str(error)
    else:
        assert not impossible.any()
        assert not other.beta.any()
        assert_same_function(bn, other, ulps=8)


def test_what_a_target_can_hold_as_it_is_stays_bit_for_bit():
    rng = np.random.default_rng(0)
    values = {f: rng.normal(size=8).astype(np.float32) for f in ("gamma", "beta", "mean")}
    bn = BatchNorm(**values, variance=rng.uniform(1e-8, 1, 8).astype(np.float32), epsilon=1e-5)
    fit = bn.fit()
    assert fit.record == bn
    assert fit.notes == ()


@pytest.mark.parametrize(("dtype", "exponent"), [("float32", -37), ("float64", -307)])
def test_no_epsilon_is_taken_that_an_engine_would_take_for_zero(dtype, exponent):
    """Subnormal float32 numbers are zero to TensorFlow, and epsilon 1e-38 is a part of 1 in 15 here."""
    least = 15 * 10.0 ** np.array([exponent, exponent - 1])  # (variance + epsilon) / gamma**2
    fits, does_not = (
        BatchNorm(gamma=[(1.001 / each) ** 0.5], beta=[0.0], mean=[0.0], variance=[1.0], epsilon=1e-3) for each in least
    )
    fit = fits.fit(scale=False, center=True, epsilon=None, dtype=dtype)
    assert fit.record.epsilon == float(f"1e{exponent}")
    with pytest.raises(Unrepresentable, match="scale=False"):
        does_not.fit(scale=False, center=True, epsilon=None, dtype=dtype)


@pytest.mark.parametrize(
    ("gamma", "variance", "why", "helps"),
    [
        (-1.0, 1.0, "gamma is not positive", False),  # no epsilon turns a slope round
        (0.0, 1.0, "gamma is not positive", False),
        (1e-160, 1.0, "its variance would overflow", False),
        (300.0, 0.5, "its slope is steeper than 1/sqrt(epsilon 0.001)", True),
    ],
)
def test_a_smaller_epsilon_is_advised_only_where_it_helps(gamma, variance, why, helps):
    bn = BatchNorm(gamma=[0.5, gamma], beta=[1.0, 1.0], mean=[0.0, 0.0], variance=[1.0, variance], epsilon=1e-3)
    with pytest.raises(Unrepresentable) as refused:
        bn.without_gamma()
    advice = "Use a target that has gamma" + ", or a smaller epsilon" * helps
    assert (
        str(refused.value) == f"channel 1 cannot be held without gamma (scale=False, no Scale layer): {why}. {advice}"
    )
    for smaller in (1e-6, 1e-9, 1e-12):
        try:
            bn.with_epsilon(smaller).without_gamma()
        except Unrepresentable:
            assert not helps or smaller > 1e-9
        else:
            assert helps


def test_a_fit_says_what_it_absorbed():
    bn = BatchNorm(gamma=[2.0, 1.0], beta=[1.0, 0.0], mean=[0.0, 0.0], variance=[1e-6, 1.0], epsilon=1e-5)
    assert bn.fit(epsilon=1e-3).notes == ("epsilon 1e-05 -> 0.001 absorbed into variance and gamma (1 channels)",)
    assert "beta absorbed into mean (target has center=False)" in bn.fit(center=False).notes


def test_a_value_too_large_for_float16_is_refused_with_the_channel():
    bn = BatchNorm(mean=[0.0, 7e4], variance=[1.0, 1.0], epsilon=1e-3)
    with pytest.raises(Unrepresentable, match=r"mean, channel 1: 70000\.0 does not fit float16"):
        bn.fit(dtype="float16")


def test_a_variance_that_underflows_in_float16_is_refused_only_where_it_matters():
    bn = BatchNorm(mean=[0.0], variance=[1e-8], epsilon=1e-3)
    assert bn.fit(dtype="float16").record.variance[0] == 0
    with pytest.raises(Unrepresentable, match="channel 0: values underflow in float16"):
        bn.replace(epsilon=1e-8).fit(dtype="float16")


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.sampled_from(["float16", "bfloat16"]))
@settings(max_examples=300)
def test_rounding_to_16_bits_is_what_numpy_and_ml_dtypes_do(values, dtype):
    with np.errstate(over="ignore"):
        array = np.array(values, np.float32)
        expected = array.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16).astype(np.float32)
    assert round_to(array, dtype).tobytes() == expected.tobytes()
    theirs = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert stored(round_to(array, dtype), dtype) == expected.astype(theirs).tobytes()


# ---- other ways in


@given(records())
def test_a_std_and_the_variance_it_came_from_are_the_same_function(bn):
    std = np.sqrt(bn.variance.astype(np.float64) + bn.epsilon)
    same = BatchNorm.from_std(gamma=bn.gamma, beta=bn.beta, mean=bn.mean, std=std)
    assert_same_function(bn, same, ulps=4)


@given(records())
def test_an_inverse_std_is_the_same_function_with_epsilon_kept_where_possible(bn):
    inverse = 1 / np.sqrt(bn.variance.astype(np.float64) + bn.epsilon)
    same = BatchNorm.from_inverse_std(
        gamma=bn.gamma, beta=bn.beta, mean=bn.mean, inverse_std=inverse, epsilon=bn.epsilon
    )
    assert same.epsilon in (bn.epsilon, 0.0)
    assert_same_function(bn, same, ulps=6)


def test_epsilon_outside_the_root_is_squared_with_the_std():
    bn = BatchNorm.from_std(mean=[0.0], std=[0.5], epsilon=1e-2)
    assert bn.variance[0] == 0.51**2
    assert bn.epsilon == 0


@given(st.floats(1e-3, 1e4), st.floats(1e-6, 1e3))
def test_caffes_sums_are_divided_by_the_factor(factor, variance):
    bn = BatchNorm.from_scaled_sums(
        mean_sum=[3 * factor], variance_sum=[variance * factor], factor=factor, epsilon=1e-5
    )
    assert bn.mean[0] == pytest.approx(3, rel=1e-15)
    assert bn.variance[0] == pytest.approx(variance, rel=1e-15)


def test_a_zero_factor_is_refused_unless_allowed():
    sums = {"mean_sum": [1.0], "variance_sum": [2.0], "epsilon": 1e-5}
    with pytest.raises(InvalidValue, match="never saw data"):
        BatchNorm.from_scaled_sums(**sums, factor=0)
    bn = BatchNorm.from_scaled_sums(**sums, factor=0, allow_zero_factor=True)
    assert bn.mean[0] == bn.variance[0] == 0
    with pytest.raises(InvalidValue, match="scale factor"):
        BatchNorm.from_scaled_sums(**sums, factor=-1)


@given(st.lists(signed, min_size=1, max_size=5), st.sampled_from([0.0, 1e-5, 1e-3, 0.5, 1.0, 2.0]))
def test_a_folded_affine_comes_back_as_the_same_affine(slopes, epsilon):
    intercepts = np.float32(slopes[::-1])
    bn = BatchNorm.from_affine(slope=np.float32(slopes), intercept=intercepts, epsilon=epsilon)
    a, b = bn.affine()
    if epsilon == 0:
        assert a.tolist() == np.float32(slopes).tolist()
    np.testing.assert_allclose(a, np.float32(slopes), rtol=4 * 2.0**-53)
    assert b.tolist() == intercepts.tolist()
