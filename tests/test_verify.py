"""Equality is decided on (a, b): healthy roundings pass, every known mistake fails, at any scale of the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnport.layer import Change, Layers
from bnport.record import FIELDS, BatchNorm
from bnport.report import as_text
from bnport.verify import BOUNDED, DIFFERENT, EXACT, INVALID, Report, check_bits, check_outputs, compare, with_checks

from .making import layer_of, layers_of, telling

MISTAKES = {
    "order beta, gamma": lambda bn: bn.replace(gamma=bn.beta, beta=bn.gamma),
    "mean and variance swapped": lambda bn: bn.replace(mean=bn.variance, variance=np.abs(bn.mean) + 1e-9),
    "std written as variance": lambda bn: bn.replace(variance=np.sqrt(bn.variance)),
    "inverse std written as variance": lambda bn: bn.replace(variance=1 / bn.std),
    "epsilon of another framework": lambda bn: bn.replace(epsilon=1e-3),
    "epsilon 1.001e-5 for 1e-5": lambda bn: bn.replace(epsilon=1.001e-5),
    "n / (n - 1)": lambda bn: bn.replace(variance=bn.variance * (1000 / 999)),
    "|gamma| + epsilon": lambda bn: bn.replace(gamma=np.abs(bn.gamma) + bn.epsilon),
    "stale statistics": lambda bn: bn.replace(mean=np.zeros(bn.channels), variance=np.ones(bn.channels)),
    "float16": lambda bn: bn.replace(**{f: getattr(bn, f).astype(np.float16) for f in FIELDS}),
    "one channel one part in a million": lambda bn: bn.replace(
        gamma=np.where(np.arange(bn.channels) == 3, bn.gamma * np.float32(1.000001), bn.gamma)
    ),
}


def compared(one: BatchNorm, other: BatchNorm):
    return compare(layers_of({"a": one}), layers_of({"b": other}), {"b": "a"})["b"]


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_known_mistake_is_different(mistake):
    bn = telling()
    result = compared(bn, MISTAKES[mistake](bn))
    assert result.status == DIFFERENT
    assert not result.ok
    assert result.worst.ratio > 1


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1]), st.sampled_from([1e-7, 1e-5, 1e-3, 0.1]))
@settings(max_examples=100)
def test_an_absorbed_epsilon_rounded_to_float32_is_bounded_not_different(seed, source_epsilon, epsilon):
    bn = telling(seed=seed, epsilon=source_epsilon)
    fitted = bn.fit(epsilon=epsilon).record
    assert compared(bn, fitted).status == (EXACT if fitted == bn else BOUNDED)


def test_the_same_bits_are_exact():
    assert compared(telling(), telling()).status == EXACT


def test_the_worst_channel_is_named():
    bn = telling()
    gamma = bn.gamma.copy()
    gamma[11] *= 1.01
    result = compared(bn, bn.replace(gamma=gamma))
    assert result.worst.channel == 11


def test_one_wrong_layer_among_a_thousand_is_the_only_one_reported():
    records = {f"l{n}": telling(1 + n % 7, seed=n) for n in range(1000)}
    wrong = {**records, "l500": records["l500"].replace(epsilon=1e-3)}
    results = compare(layers_of(records), layers_of(wrong), {name: name for name in records})
    assert [name for name, result in results.items() if not result.ok] == ["l500"]


def test_layers_that_are_checked_together_are_checked_as_each_alone():
    widths = (1, 700, 3000, 5, 2048, 1, 1999, 64)
    records = {f"l{n}": telling(width, seed=n, epsilon=1e-3 if n % 2 else 1e-5) for n, width in enumerate(widths)}
    held = {
        name: bn.replace(gamma=np.nextafter(bn.gamma, np.float32(9))) if name != "l3" else bn
        for name, bn in records.items()
    }
    held["l6"] = held["l6"].replace(epsilon=1.01e-5)
    together = compare(layers_of(records), layers_of(held), {name: name for name in reversed(records)})
    assert list(together) == list(reversed(records))
    for name, bn in records.items():
        alone = compare(layers_of({name: bn}), layers_of({name: held[name]}), {name: name})[name]
        assert together[name][:5] == alone[:5]
    assert [report.status for report in together.values()] == [
        BOUNDED,
        DIFFERENT,
        *[BOUNDED] * 2,
        EXACT,
        *[BOUNDED] * 3,
    ]


def test_numbers_that_are_no_batchnorm_are_invalid_not_a_crash():
    broken = layers_of({"b": telling()})
    arrays = {**broken["b"].arrays(), "variance": np.full(16, np.nan, np.float32)}
    broken["b"] = broken["b"].but(load=lambda: arrays)
    result = compare(layers_of({"a": telling()}), broken, {"b": "a"})["b"]
    assert result.status == INVALID
    assert "variance: channel 0 is nan" in result.notes[0]


def test_a_16_bit_target_is_judged_by_its_own_rounding():
    bn = telling()
    stored = bn.rounded("float16")
    half = layers_of({"b": stored})
    half["b"] = half["b"].but(dtype="float16")
    assert compare(layers_of({"a": bn}), half, {"b": "a"})["b"].status == BOUNDED
    assert compared(bn, stored).status == DIFFERENT


def test_check_bits_sees_a_value_that_was_not_written_and_one_that_should_not_have_been():
    old, new = telling(seed=1), telling(seed=2)
    before = layers_of({"bn": old, "other": old})
    change = {"bn": Change(new, frozenset({"gamma", "beta"}))}
    right = layers_of({"bn": old.replace(gamma=new.gamma, beta=new.beta), "other": old})
    assert all(check.ok for check, _ in check_bits(before, right, change).values())
    for name, wrong in {
        "bn": old.replace(gamma=new.gamma),  # beta was not written
        "other": old.replace(mean=new.mean),  # nobody asked for this
    }.items():
        after = layers_of({**{n: layer.record for n, layer in right.items()}, name: wrong})
        checks = check_bits(before, after, change)
        assert [n for n, (check, _) in checks.items() if not check.ok] == [name]


def test_check_bits_sees_a_single_flipped_bit():
    old = telling()
    flipped = old.variance.copy()
    flipped.view(np.uint32)[5] ^= 1
    checks = check_bits(layers_of({"bn": old}), layers_of({"bn": old.replace(variance=flipped)}), {})
    check, notes = checks["bn"]
    assert not check.ok
    assert check.channel == 5
    assert "variance" in notes[0]


def ran(reference, held, engine, dtype="float32"):
    """The checks of what `engine` (x -> {way: y}) gives at the probes."""
    x = held.probes("float32")
    return check_outputs(reference, held, x, engine(x.astype(np.float32)), dtype=dtype)


@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_outputs_in_float64_beyond_float32_are_still_told_apart(stored):
    bn = BatchNorm(gamma=[1e20], beta=[0.0], mean=[0.0], variance=[1.0], epsilon=1e-3)
    x = np.full((2, 1), 1e25)
    ways = {"right": bn(x), "wrong": 3 * bn(x), "overflown": np.full((2, 1), np.inf, np.float32)}
    assert [check.ok for check in check_outputs(bn, bn, x, ways, dtype=stored)] == [True, False, True]


def test_a_run_is_judged_per_way_of_calling():
    bn = telling()

    def engine(x):
        right = bn(x).astype(np.float32)
        return {"model(x)": right, "predict": bn.replace(epsilon=1e-3)(x).astype(np.float32)}

    good, stale = ran(bn, bn, engine)
    assert good.ok
    assert not stale.ok
    assert stale.name == "predict"
    assert stale.probe is not None
    report = with_checks(compared(bn, bn), [good, stale])
    assert report.status == DIFFERENT


def test_a_run_that_gives_nan_or_another_shape_is_different():
    bn = telling()
    assert not ran(bn, bn, lambda x: {"nan": np.full(x.shape, np.nan, np.float32)})[0].ok
    assert not ran(bn, bn, lambda x: {"shape": np.zeros((1, 1), np.float32)})[0].ok


def test_a_report_prints_itself_and_is_plain_json():
    bn = telling()
    layers = compare(
        layers_of({"a": bn, "c": bn}), layers_of({"b": bn, "d": bn.replace(epsilon=1e-3)}), {"b": "a", "d": "c"}
    )
    report = Report(source="x.pth", target="y.keras", layers=layers.values(), notes=["something assumed"])
    assert not report.ok
    text = as_text(report)
    assert "something assumed" in text
    assert "1 exact, 1 different" in text.splitlines()[-1]
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [layer["status"] for layer in again["layers"]] == ["exact", "different"]


def test_a_report_of_nothing_is_not_ok():
    assert not Report(source="x", target="y", layers=()).ok


def test_a_name_cannot_drive_the_terminal():
    evil = "\x1b[2Jbn\n"
    report = Report(
        source=evil,
        target="y",
        layers=compare({evil: layer_of(telling(), evil)}, {evil: layer_of(telling(), evil)}, {evil: evil}).values(),
    )
    assert "\x1b" not in str(report)


def _keras_layer(bn: BatchNorm, dtype: str, epsilon: float):
    import keras

    layer = keras.layers.BatchNormalization(epsilon=epsilon, dtype=dtype)
    layer.build((None, bn.channels))
    layer.set_weights([bn.gamma, bn.beta, bn.mean, bn.variance])
    return layer


def test_an_epsilon_absorbed_for_a_float64_layer_is_the_same_function_as_the_real_layer_says():
    bn = telling()
    fitted = bn.fit(epsilon=1e-3, dtype="float64").record
    x = bn.probes("float64")
    found = np.asarray(_keras_layer(fitted, "float64", 1e-3)(x))
    np.testing.assert_allclose(found, bn(x), rtol=1e-13, atol=1e-13 * np.abs(bn(x)).max())
    held = Layers([layer_of(fitted, "b").but(dtype="float64")], source="made", format="made")
    assert compare(layers_of({"a": bn}), held, {"b": "a"})["b"].status == BOUNDED
    # and what an engine in float64 can tell apart is not called the same
    wrong = fitted.replace(epsilon=float(np.nextafter(np.float32(1e-3), 1)) + 1e-12)
    held = Layers([layer_of(wrong, "b").but(dtype="float64")], source="made", format="made")
    assert compare(layers_of({"a": bn}), held, {"b": "a"})["b"].status == DIFFERENT


def test_a_mean_too_small_for_float16_is_bounded_and_within_the_real_layers_bound():
    bn = BatchNorm(
        gamma=[1.0, -1.0, 2.0, 0.5], mean=np.float32([0.5, -3.7e-9, 1, -1]), variance=[0.5, 0.25, 1, 2], epsilon=1e-3
    )
    fitted = bn.fit(dtype="float16").record
    assert fitted.mean[1] == 0
    held = Layers([layer_of(fitted, "b").but(dtype="float16")], source="made", format="made")
    assert compare(layers_of({"a": bn}), held, {"b": "a"})["b"].status == BOUNDED
    layer = _keras_layer(fitted, "float16", 1e-3)
    checks = ran(bn, fitted, lambda x: {"call": np.asarray(layer(x.astype(np.float16), training=False))}, "float16")
    assert all(check.ok for check in checks)
    # the same distance is a mistake where the dtype could have held the mean
    held = Layers([layer_of(fitted, "b")], source="made", format="made")
    assert compare(layers_of({"a": bn}), held, {"b": "a"})["b"].status == DIFFERENT
