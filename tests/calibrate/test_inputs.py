"""Inputs by name, in a list and in structures: what a message names works for every method, live and from a file."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.calibrate.data import read
from bnport.calibrate.inputs import Inputs
from bnport.calibrate.models import LiveModel
from bnport.calibrate.run import calibrate
from bnport.errors import InvalidValue
from tests.calibrate import forms
from tests.calibrate.backends import on_others, run_on


@pytest.mark.parametrize("kind", forms.FORMS)
def test_each_input_by_name_reaches_its_own_layer_whatever_carries_it(kind, tmp_path):
    forms.live(kind, lambda names: forms.by_name(names, tmp_path))


@pytest.mark.parametrize("kind", forms.FORMS)
def test_each_input_reaches_its_own_layer_from_the_batches_of_other_libraries(kind):
    forms.live(kind, forms.by_name_in_batches, methods=("population", "precise"))


@pytest.mark.parametrize("kind", forms.FORMS)
def test_data_in_the_structure_that_the_model_was_built_with_are_taken(kind):
    forms.live(kind, lambda names: forms.as_built(kind))


@pytest.mark.parametrize("kind", forms.FORMS)
def test_a_model_in_a_file_takes_the_names_and_structures_that_the_live_one_takes(kind, tmp_path):
    forms.from_file(kind, str(tmp_path))


@on_others
def test_every_other_keras_takes_most_of_them_too(where):
    run_on(where, "-m", "tests.calibrate.forms")


@pytest.mark.parametrize("kind", forms.FORMS)
@pytest.mark.parametrize("method", ["population", "precise"])
def test_a_dict_of_other_names_is_refused_with_names_that_work(kind, method, tmp_path):
    model, called = forms.built(kind)
    wrong = dict(zip("uvw", forms.X, strict=True))
    np.savez(tmp_path / "x.npz", **wrong)
    for data in (wrong, tmp_path / "x.npz"):
        with pytest.raises(InvalidValue, match="u, v, w; the model takes") as error:
            calibrate(model, data, method=method)
        assert all(name in str(error.value) for name in called[0])


@pytest.mark.parametrize("kind", ["unsorted dict", "dict in a dict", "dict in a list"])
def test_a_list_for_a_model_that_has_names_and_no_order_is_refused(kind):
    model, called = forms.built(kind)
    for method in ("population", "precise"):
        with pytest.raises(
            InvalidValue, match="a list, and the model takes its inputs by name: pass a dict of"
        ) as error:
            calibrate(model, list(forms.X), method=method)
        assert all(name in str(error.value) for name in called[0])


@pytest.mark.parametrize("form", [lambda i: i, lambda i: [i], lambda i: {"z": i}])
@pytest.mark.filterwarnings("ignore:When providing", "ignore:The structure of")
def test_one_input_is_taken_by_any_name_and_without(form):
    i = forms.keras.Input((6,))
    model = forms.keras.Model(form(i), forms.L.BatchNormalization(name="bn0")(i))
    names = ["z"] if isinstance(form(i), dict) else [i._keras_history[0].name, i.name]
    for data in ([{name: forms.X[0], "label": forms.X[1]} for name in names], [forms.X[0]], [iter([forms.X[0]])]):
        for each in data:
            calibrate(model, each, method="precise")
            assert np.asarray(model.get_layer("bn0").moving_mean) == pytest.approx(forms.X[0].mean(0, float), rel=1e-6)


def test_names_of_layers_win_over_names_of_tensors():
    inputs = Inputs({"a": (None, 2), "b": (None, 2)}, ["b", "c"], ["a", "b"])
    one, two, three = np.ones((4, 2)), np.full((4, 2), 2.0), np.full((4, 2), 3.0)
    batches = read({"a": one, "b": two, "c": three}, inputs=inputs)
    ((first, second),) = batches
    assert (first[0, 0], second[0, 0]) == (1, 2)
    assert batches.notes == ["left out, not inputs of the model: c"]
    ((first, second),) = read({"b": two, "c": three}, inputs=inputs)
    assert (first[0, 0], second[0, 0]) == (2, 3)


def test_a_limit_cuts_batches_in_a_structure_too():
    model, _ = forms.built("list in a dict")
    found = list(read(forms.FORMS["list in a dict"](*forms.X), inputs=LiveModel(model).inputs(), limit=40))
    assert [(len(batch["p"]), *map(len, batch["q"])) for batch in found] == [(32, 32, 32), (8, 8, 8)]
    assert (found[1]["q"][0] == forms.X[1][32:40]).all()
