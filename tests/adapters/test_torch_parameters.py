"""Scale and shift that are not called weight and bias, or are computed: read as torch computes them, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import bnport
from bnport import adapters, convert, set_weights, verify
from bnport.errors import BnportError, FormatError, InvalidValue, Question
from tests.adapters.contract import telling_record
from tests.adapters.torch_models import norm_of, output

RECORD = telling_record(6, epsilon=2.5e-3)
X = torch.zeros(2, 6, 3, 3)


def norm(kind=torch.nn.BatchNorm2d):
    return norm_of(RECORD, kind=kind).eval()


def forms(model, tmp_path):
    for name, save in (
        ("sd", lambda p: torch.save(model.state_dict(), p)),
        ("module", lambda p: torch.save(model, p)),
        ("traced", lambda p: torch.jit.trace(model, X).save(p)),
        ("pt2", lambda p: torch.export.save(torch.export.export(model, (X,)), p)),
    ):
        path = str(tmp_path / f"{name}.pt2")
        save(path)
        yield path


def test_a_pruned_layer_is_read_as_torch_computes_it_in_every_form(tmp_path):
    layer = norm()
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.3)
    model = torch.nn.Sequential(layer).eval()
    model(X)
    for source in (*forms(model, tmp_path), model, model.state_dict()):
        record = adapters.read(source)["0"].record
        assert record.gamma.tobytes() == layer.weight.detach().numpy().tobytes()
        assert record.beta.tobytes() == layer.bias.detach().numpy().tobytes()
    with pytest.raises(InvalidValue, match=r"prune\.remove"):
        set_weights(model, gamma=np.ones(6))


FRACTIONS = [0.0, 1.0, 0.3, 0.7, -0.1, 1 / 3]  # of a mask: the products need rounding


@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_pruned_layer_of_another_dtype_is_rounded_as_torch_rounds_the_product(tmp_path, dtype, mask_dtype):
    layer = norm()
    fractions = torch.tensor(FRACTIONS, dtype=dtype)
    prune.custom_from_mask(layer.to(dtype), "weight", fractions)
    prune.custom_from_mask(layer, "bias", fractions.flip(0))
    if mask_dtype is not None:  # a mask in more digits than its weight has: torch rounds it before it multiplies
        layer.weight_mask = torch.tensor(FRACTIONS, dtype=mask_dtype)
    with torch.no_grad():
        layer.weight_orig.copy_(torch.tensor([1.7, -0.33, 0.4321, 3.07, 1e-3, 5.9]))
        layer.bias_orig.copy_(torch.tensor([0.1, -7.3, 6e-5, 0.9, -2.2, 1e-7]))
        hooks = {hook._tensor_name: hook for hook in layer._forward_pre_hooks.values()}
        expected = {role: hook.apply_mask(layer).double().numpy() for role, hook in hooks.items()}
        plain = (layer.weight_orig.float() * torch.tensor(FRACTIONS)).double().numpy()
    assert (expected["weight"] != plain).any()
    model = torch.nn.Sequential(layer).eval()
    torch.save(model.state_dict(), tmp_path / "sd.pth")
    torch.save(model, tmp_path / "module.pth")
    for source in (str(tmp_path / "sd.pth"), str(tmp_path / "module.pth"), model, model.state_dict()):
        found = adapters.read(source)["0"]
        assert found.dtype == str(dtype).removeprefix("torch.")
        assert found.record.gamma.astype(np.float64).tolist() == expected["weight"].tolist()
        assert found.record.beta.astype(np.float64).tolist() == expected["bias"].tolist()


def test_a_weight_under_spectral_norm_is_refused_in_a_state_dict_and_computed_by_its_own_hook_live(tmp_path):
    model = torch.nn.Sequential(spectral_norm(norm())).eval()
    with torch.no_grad():
        model[0].weight_orig.mul_(3)  # the weight of the last forward pass is stale now
        stale = model[0].weight.clone().numpy()
    bare, file, whole = model.state_dict(), str(tmp_path / "sd.pth"), str(tmp_path / "module.pth")
    torch.save(bare, file)
    torch.save(model, whole)
    for saved in (bare, file, whole):
        with pytest.raises(FormatError, match=r"by spectral_norm each time .*remove_spectral_norm\(layer, 'weight'\)"):
            adapters.read(saved)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read = adapters.read(model)["0"]
    assert any("computed by spectral_norm" in note for note in read.notes)
    gamma = read.record.gamma
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # no power iteration
    x = np.random.default_rng(2).normal(size=(2, 6, 3, 3)).astype(np.float32)
    y = np.moveaxis(output(model, x), 1, -1)  # the hook computes the weight anew
    assert gamma.tobytes() == model[0].weight.detach().numpy().tobytes()
    assert (gamma != stale).any()
    seen = np.moveaxis(x, 1, -1)
    assert (np.abs(read.record(seen) - y) <= read.record.error_bound(seen)).all()
    with pytest.raises(InvalidValue, match="remove_spectral_norm"):
        set_weights(model, gamma=np.ones(6))


def test_a_normed_weight_is_refused_in_files_and_read_live(tmp_path):
    for wrap, remedy in (
        (parametrizations.weight_norm, "remove_parametrizations"),
        (lambda m: weight_norm(m, "weight", dim=None), "remove_weight_norm"),
    ):
        model = torch.nn.Sequential(wrap(norm())).eval()
        assert (adapters.read(model)["0"].record.gamma == model[0].weight.detach().numpy()).all()
        path = str(tmp_path / "x.pth")
        torch.save(model.state_dict(), path)
        with pytest.raises(FormatError, match=remedy):
            adapters.read(path)
        with pytest.raises(InvalidValue, match=remedy):
            set_weights(model, gamma=np.ones(6))


def test_a_tensor_of_unknown_role_is_refused_by_name():
    state = torch.nn.Sequential(norm()).state_dict()
    state["0.shift"] = torch.ones(6)
    with pytest.raises(FormatError, match="holds shift"):
        adapters.read(state)


class OnePlus(torch.nn.BatchNorm2d):
    def forward(self, x):
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, False, 0.0, self.eps
        )


def test_an_own_forward_is_noted_run_by_convert_and_refused_where_code_shows_it(tmp_path):
    model = torch.nn.Sequential(norm(OnePlus)).eval()
    assert any("own forward()" in note for note in adapters.read(model)["0"].notes)
    assert not any("own forward()" in note for note in adapters.read(torch.nn.Sequential(norm()))["0"].notes)
    assert not convert(model, torch.nn.Sequential(torch.nn.BatchNorm2d(6)).eval()).ok
    paths = list(forms(model, tmp_path))
    assert any("is none that bnport knows" in note for note in adapters.read(paths[1])["0"].notes)
    for path in paths[2:]:
        with pytest.raises(FormatError, match="weight"):
            adapters.read(path)


def test_code_of_ones_own_is_a_fact_of_the_layer_that_no_note_can_stand_for():
    twin = torch.nn.Sequential(torch.nn.BatchNorm2d(6)).eval()
    plain = torch.nn.Sequential(norm())
    replaced = torch.nn.Sequential(norm())
    replaced[0].forward = plain[0].forward
    facts = {kind: adapters.read(m)["0"] for kind, m in (("own", torch.nn.Sequential(norm(OnePlus))), ("plain", plain))}
    assert facts["own"].own_code
    assert facts["own"].but(notes=()).own_code
    assert not facts["plain"].own_code
    assert adapters.read(replaced)["0"].own_code
    talks = torch.nn.Sequential(norm())
    talks[0].act = type("what it computes is not known", (torch.nn.Module,), {})()  # a class's name gets into a note
    assert any("what it computes is not known" in note for note in adapters.read(talks)["0"].notes)
    assert not [c.name for layer in convert(talks, twin).layers for c in layer.checks if c.name.startswith("source")]
    own = convert(replaced, twin)
    assert [c.name for layer in own.layers for c in layer.checks if c.name.startswith("source")]


def test_a_compiled_module_is_read(tmp_path):
    path = str(tmp_path / "c.pth")
    torch.save(torch.compile(torch.nn.Sequential(norm())), path)
    assert adapters.read(path)["0"].record == RECORD


def test_traced_scripted_and_exported_live_modules_are_right_or_say_what_was_not_run():
    twin = torch.nn.Sequential(norm()).eval()
    new = torch.nn.Sequential(norm_of(telling_record(6, seed=5, epsilon=1e-4), kind=torch.nn.BatchNorm2d)).eval()
    for form in (
        lambda model: torch.jit.trace(model, X),
        torch.jit.script,
        lambda model: torch.export.export(model, (X,)).module(),
    ):
        other = form(torch.nn.Sequential(norm()).eval())
        report = verify(other, twin, run=True)
        assert report.ok
        assert adapters.read(other)["0"].epsilon == RECORD.epsilon
        assert convert(new, other).ok
        x = np.random.default_rng(1).normal(size=(2, 6, 3, 3)).astype(np.float32)
        np.testing.assert_allclose(output(other, x), output(new, x), rtol=1e-4, atol=1e-4)


def test_a_lazy_state_dict_and_an_ambiguous_key_are_refused_well(tmp_path):
    lazy = torch.nn.Sequential(torch.nn.LazyBatchNorm2d()).state_dict()
    path = str(tmp_path / "x.pth")
    torch.save(lazy, path)
    for source in (lazy, path):
        with pytest.raises(BnportError, match="has not seen a batch"):
            adapters.read(source)
    state = torch.nn.Sequential(norm()).state_dict()
    torch.save({"x.y": state, "x": {"y": dict(state)}}, path)
    with pytest.raises(Question, match="key within a"):
        adapters.read(path, key="x.y")


@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_torchscript_without_affine_has_ones_and_zeros(compiler, tmp_path):
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3, affine=False)).eval()
    module[0].running_var.copy_(torch.tensor([1e-6, 0.5, 3.0]))
    x = torch.randn(4, 3, 2, 2)
    compiled = torch.jit.script(module) if compiler == "script" else torch.jit.trace(module, x)
    compiled.save(str(tmp_path / "m.pt"))
    for source in (compiled, str(tmp_path / "m.pt")):
        (layer,) = bnport.read(source).values()
        assert layer.record.gamma.tolist() == [1, 1, 1]
        y = np.moveaxis(compiled(x).detach().numpy(), 1, -1)
        seen = np.moveaxis(x.numpy(), 1, -1)
        assert (np.abs(layer.record(seen) - y) <= layer.record.error_bound(seen)).all()
