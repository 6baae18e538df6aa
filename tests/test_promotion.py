"""numpy 1 (1.23 to 1.26 are supported) computes float32 array * np.float64 scalar in float32, numpy 2 in float64.

With numpy 2 no other test could see that bnport combines the two, so here every array that numpy makes for bnport refuses
to meet a wider numpy scalar. Python's own numbers are no such scalars: both versions compute with them in the array's type.
"""

from __future__ import annotations

import numpy as np
import pytest

from bnport import _lazy
from bnport.algebra import fit
from bnport.calibrate.moments import merge, moments
from bnport.explain import explain
from bnport.record import FIELDS, BatchNorm
from bnport.verify import BOUNDED, compare

from .making import layers_of, telling

pytestmark = pytest.mark.core

CATEGORIES = {"b": 0, "i": 1, "u": 1, "f": 2}


def refuse_promotion(values):
    """AssertionError where numpy 1 would give these the arrays' own type and numpy 2 the scalars' wider one."""
    numbers = [v for v in values if isinstance(v, (np.ndarray, np.generic)) and v.dtype.kind in CATEGORIES]
    arrays, scalars = [v.dtype for v in numbers if v.ndim], [v.dtype for v in numbers if not v.ndim]
    if not arrays or not scalars:
        return
    highest = [max(CATEGORIES[d.kind] for d in side) for side in (arrays, scalars)]
    if highest[1] <= highest[0]:
        own, wider = np.result_type(*arrays), np.result_type(*arrays, *scalars)
        assert own == wider, f"an array of {own} meets a numpy scalar: {own} in numpy 1, {wider} in numpy 2"


def bare(value):
    return value.view(np.ndarray) if isinstance(value, Watched) else value


def watched(value):
    return value.view(Watched) if type(value) is np.ndarray and value.dtype.kind in CATEGORIES else value


class Watched(np.ndarray):
    """An array that hands on what it is to all that is computed from it."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        refuse_promotion(inputs)
        if out is not None:
            kwargs["out"] = tuple(map(bare, out))
        if "where" in kwargs:
            kwargs["where"] = bare(kwargs["where"])
        result = getattr(ufunc, method)(*map(bare, inputs), **kwargs)
        return tuple(map(watched, result)) if isinstance(result, tuple) else watched(result)


def watching(function):
    def call(*args, **kwargs):
        refuse_promotion(args)
        return watched(function(*args, **kwargs))

    return call


@pytest.fixture(autouse=True)
def _every_array_is_watched(monkeypatch):
    for name, value in vars(np).items():
        if name[0] != "_" and callable(value) and not isinstance(value, (type, np.ufunc)):
            monkeypatch.setattr(_lazy.np, name, watching(value))


RECORDS = [telling(), telling(1), telling(5, epsilon=1e-3), telling(epsilon=0.0), telling(dtype="float64")]


def anew(record, **changes):
    """The record made again, now that arrays are watched."""
    made = BatchNorm(**{**{name: getattr(record, name) for name in (*FIELDS, "epsilon")}, **changes})
    assert type(made.gamma) is Watched
    return made


@pytest.mark.parametrize("record", RECORDS, ids=repr)
def test_all_of_a_records_algebra_is_float64(record):
    record = anew(record, variance=np.abs(record.variance) + np.float32(0.01))
    positive = record.replace(gamma=np.abs(record.gamma) * np.float32(0.1))
    x = np.linspace(-3, 3, 4 * record.channels, dtype=np.float32).reshape(4, -1)
    computed = [*record.affine(), record.std, record(x), record.error_bound(x), record.storage_bound(x)]
    computed += [record.error_bound(x, output_dtype="float16"), record.storage_bound(x, dtype="bfloat16")]
    computed += [record.with_epsilon(0.02).values, record.without_beta().values, positive.without_gamma().values]
    assert {array.dtype for array in computed} == {np.dtype(np.float64)}
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        for scale in (False, True):
            fitted = fit(positive, scale=scale, center=not scale, epsilon=1e-3 if scale else None, dtype=dtype)
            assert fitted.record.channels == record.channels
        assert record.probes(dtype).shape == (10, record.channels)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1.5])
def test_records_from_other_forms_keep_what_float64_holds(epsilon):
    """1 - epsilon was rounded to float32 by numpy 1."""
    slope, intercept = np.array([0.5, -2.0], "f4"), np.array([0.1, 3.0], "f4")
    record = BatchNorm.from_affine(slope=slope, intercept=intercept, epsilon=epsilon)
    assert (record.variance == (1 - epsilon if epsilon < 1 else 1)).all()
    a, b = record.affine()
    assert np.abs(a - slope.astype(np.float64)).max() < 1e-15
    assert np.abs(b - intercept.astype(np.float64)).max() < 1e-15
    std = np.array([0.3, 4.0], "f4")
    for made in (
        BatchNorm.from_std(mean=intercept, std=std, epsilon=epsilon),
        BatchNorm.from_inverse_std(mean=intercept, inverse_std=1 / std, epsilon=epsilon),
        BatchNorm.from_scaled_sums(mean_sum=intercept, variance_sum=std, factor=999.98, epsilon=epsilon),
    ):
        assert made.variance.dtype == np.float64


def test_verification_and_explanation_compute_in_float64():
    record = anew(telling(epsilon=1e-5))
    changed = record.with_epsilon(1e-3).rounded("float32")
    pairs = {"b": "a"}
    assert compare(layers_of({"a": record}), layers_of({"b": changed}), pairs)["b"].status == BOUNDED
    held = record.replace(variance=np.sqrt(record.variance))
    found = explain(layers_of({"a": record}), layers_of({"b": held}), pairs)
    assert [verdict.mistake for verdict in found.verdicts] == ["std"]


def test_moments_of_float32_and_of_bytes_are_those_of_float64():
    x = np.random.default_rng(0).normal(1e3, 1, (5000, 3)).astype("f4")
    both = merge(moments(x[:70]), moments(x[70:]))
    assert np.abs(both.mean - x.astype(np.float64).mean(0)).max() < 1e-11
    assert np.abs(both.variance() - x.astype(np.float64).var(0)).max() < 1e-11
    pixels = np.random.default_rng(0).integers(0, 256, (100, 40, 3), "u1")
    assert moments(pixels).m2.tobytes() == moments(pixels.astype(np.int64)).m2.tobytes()


@pytest.mark.parametrize(
    ("array", "scalar"), [("f4", np.float64(0.5)), ("f4", np.array(0.5)), ("f4", np.int64(3)), ("u1", np.int64(300))]
)
def test_what_the_versions_compute_differently_is_noticed_here(array, scalar):
    mixed = _lazy.np.zeros(3, array)
    for compute in (lambda: mixed + scalar, lambda: mixed < scalar, lambda: _lazy.np.where(mixed == 0, mixed, scalar)):
        with pytest.raises(AssertionError, match="in numpy 1"):
            compute()
    assert (mixed + _lazy.np.full(3, scalar)).dtype == (mixed + 0 + np.zeros(3, scalar.dtype)).dtype
