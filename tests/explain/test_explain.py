"""explain names the mistake that was made with the real frameworks' calls, and nothing where none was made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnport.explain import MISTAKES, explain
from bnport.layer import Layers
from tests.explain import mistakes
from tests.explain.mistakes import CASES, as_models, keras_layer, realistic, source_layer, tensors, written


def made(name, seed=0):
    return CASES[name][1](np.random.default_rng([seed, list(CASES).index(name)]))


def explained(layers, ported, pairs, source, port):
    """explain() of layers that come from these two files."""
    sources, targets = (
        Layers(each.values(), source=name, format="made") for each, name in ((layers, source), (ported, port))
    )
    return explain(sources, targets, pairs)


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_mistake_that_was_made_is_named(name):
    expected = set(CASES[name][0].split())
    for seed in range(3):
        found = explain(*made(name, seed))
        assert {verdict.mistake for verdict in found.verdicts} == expected
        assert not expected or found.same == (expected == {"momentum"})
        assert not expected or not found.unexplained


def test_every_known_mistake_has_a_case():
    assert set(MISTAKES) - {kind for expected, _ in CASES.values() for kind in expected.split()} == {"sign"}


@pytest.mark.parametrize("name", ["unrelated layers", "trained further", "other statistics"])
def test_what_nothing_explains_is_said(name):
    found = explain(*made(name))
    assert found.unexplained == ("batch_normalization",)
    assert "no known mistake" in str(found)
    if name == "other statistics":
        assert "gamma, beta are the source's, mean and variance are not" in str(found)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("healthy")])
def test_a_healthy_port_is_silent(name):
    found = explain(*made(name))
    assert found.same
    assert str(found).count("\n") == 0
    assert str(found).endswith("all 1 layers are the same functions")


def test_a_wrong_order_is_spelled_out_with_what_each_array_holds():
    text = str(explained(*made("mean and variance swapped"), "model.pth", "ported.weights.h5"))
    assert "mean holds the source's variance; variance holds the source's mean" in text
    assert "repair:   bnport convert model.pth ported.weights.h5 -o ported.fixed.weights.h5" in text


def test_a_negative_variance_from_a_wrong_order_is_explained_too():
    module = realistic(np.random.default_rng(1), 16)
    gamma, beta, mean, variance = tensors(module)
    found = explain(*written(module, [gamma, variance, mean, beta]))
    assert (beta < -1e-2).any()
    (verdict,) = found.verdicts
    assert verdict.mistake == "order"
    assert "variance holds the source's beta" in verdict.evidence


def test_two_mistakes_in_one_layer_are_both_named():
    module = realistic(np.random.default_rng(2), 32, 1e-5)
    gamma, beta, mean, variance = tensors(module)
    found = explain(*written(module, [gamma, beta, mean, torch.sqrt(variance)], epsilon=1e-3))
    assert {verdict.mistake for verdict in found.verdicts} == {"std", "epsilon"}


def test_an_epsilon_that_the_source_does_not_store_may_be_right_in_the_port():
    sources, ported, pairs = made("Keras' default epsilon")
    sources = {name: layer.but(assumed={"epsilon"}) for name, layer in sources.items()}
    (verdict,) = explained(sources, ported, pairs, "m.pth", "p.keras").verdicts
    assert "epsilon is 0.001 (the default of Keras" in verdict.evidence
    assert "1e-05 is assumed" in verdict.repair
    assert "--epsilon 0.001" in verdict.repair


def test_swapped_layers_are_named_with_each_other():
    found = explain(*made("two layers swapped"))
    (verdict,) = found.verdicts
    one, other = verdict.layers
    assert (
        f"{one}: holds the numbers of the source's {other.replace('batch_normalization_', 'bn')}, swapped with {other}"
        in (verdict.evidence)
    )


def test_a_rotation_of_three_layers_is_told_layer_by_layer():
    rng = np.random.default_rng(3)
    modules = mistakes.network(rng, 3)
    layers = [keras_layer(m.num_features, epsilon=m.eps) for m in modules]
    for layer, i in zip(layers, (1, 2, 0), strict=True):
        layer.set_weights([t.numpy() for t in tensors(modules[i])])
    (verdict,) = explain(*as_models(modules, layers)).verdicts
    assert verdict.mistake == "swapped"
    assert len(verdict.layers) == 3
    for i, j in enumerate((1, 2, 0)):
        assert f"batch_normalization_{i}: holds the numbers of the source's bn{j}" in verdict.evidence


def test_caffes_factor_is_recovered_and_said_to_be_the_same_everywhere():
    rng = np.random.default_rng(4)
    modules = mistakes.network(rng, 3)
    layers = [keras_layer(m.num_features, epsilon=m.eps) for m in modules]
    for layer, module in zip(layers, modules, strict=True):
        gamma, beta, mean, variance = tensors(module)
        layer.set_weights([gamma.numpy(), beta.numpy(), (mean * 999.98236).numpy(), (variance * 999.98236).numpy()])
    (verdict,) = explain(*as_models(modules, layers)).verdicts
    assert verdict.mistake == "factor"
    assert "mean is the source's times 999.982" in verdict.evidence
    assert "in 3 layers" in verdict.evidence


def test_the_n_of_a_bessel_correction_is_recovered():
    module = realistic(np.random.default_rng(5), 64)
    gamma, beta, mean, variance = tensors(module)
    found = explain(*written(module, [gamma, beta, mean, variance * 1000 / 999]))
    assert "n / (n - 1), n = 1000" in found.verdicts[0].evidence


@pytest.mark.parametrize(
    ("name", "words"), [("flip", "reversed"), ("roll", "(i + 3) mod 12 (shifted)"), ("shuffle", "4 x 3")]
)
def test_a_channel_permutation_is_put_in_words(name, words):
    module = realistic(np.random.default_rng(6), 12)
    index = torch.arange(12)
    index = {
        "flip": lambda: index.flip(0),
        "roll": lambda: torch.roll(index, -3),
        "shuffle": lambda: torch.nn.ChannelShuffle(4)(index.float().reshape(1, 12, 1, 1)).flatten().long(),
    }[name]()
    found = explain(*written(module, [t[index] for t in tensors(module)]))
    assert words in found.verdicts[0].evidence


def test_a_mistake_is_recognised_through_a_folded_affine():
    """The port stores slope and intercept only, computed with the wrong epsilon."""
    module = realistic(np.random.default_rng(7), 32, 1e-5)
    gamma, beta, mean, variance = (t.double() for t in tensors(module))
    a = gamma / torch.sqrt(variance + 1e-3)
    weights = [a, beta - mean * a, torch.zeros_like(a), torch.ones_like(a)]
    found = explain(*written(module, weights, epsilon=0.0))
    assert [verdict.mistake for verdict in found.verdicts] == ["epsilon"]
    assert "slope and intercept are those of the source with epsilon 0.001" in found.verdicts[0].evidence


def test_one_channel_is_too_little_for_a_constant_to_be_fitted():
    module = realistic(np.random.default_rng(8), 1)
    gamma, beta, mean, variance = tensors(module)
    found = explain(*written(module, [gamma, beta, mean * 3.7, variance * 3.7]))
    assert not found.verdicts
    assert found.unexplained


def test_arrays_of_another_length_are_not_explained():
    rng = np.random.default_rng(9)
    sources = {"bn": source_layer(realistic(rng, 8))}
    layer = keras_layer(16)
    found = explain(sources, {"x": mistakes.ported_layer(layer)}, {"x": "bn"})
    assert found.unexplained == ("x",)


def test_nan_in_the_port_is_unexplained_and_not_a_crash():
    module = realistic(np.random.default_rng(10), 8)
    gamma, beta, mean, variance = tensors(module)
    found = explain(*written(module, [gamma, beta, mean, variance * float("nan")]))
    assert found.unexplained == ("batch_normalization",)


def test_a_live_port_is_repaired_from_python():
    found = explain(*made("std as variance"), live=True)
    assert found.verdicts[0].repair == "bnport.convert(source, model)"


def test_control_characters_in_names_do_not_reach_the_terminal():
    sources, ported, _ = made("std as variance")
    evil = "a\x1b[31m\nb"
    ported = {evil: ported["batch_normalization"].but(name=evil)}
    text = str(explained(sources, ported, {evil: "bn"}, evil, evil))
    assert "\x1b" not in text
    assert "a\\x1b[31m\\nb" in text


def test_the_json_form_holds_what_the_text_says():
    import json

    found = explained(*made("two layers swapped"), "a.pth", "b.keras")
    value = json.loads(json.dumps(found.to_dict()))
    assert value["verdicts"][0]["mistake"] == "swapped"
    assert len(value["differing"]) == 2
    assert value["layers"] == 4
