"""verify --run: the source's real engine and the real Keras layers at the same probes, within the sum of their bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import bnport
from tests.twins import Net, batchnorm_weights, export, keras_twin

DIGITS = Path(__file__).parent.parent / "fixtures" / "digits"


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture
def twin(net):
    return keras_twin(net)


def names(report):
    return [check.name for check in report.layers[0].checks]


def run_checks(report):
    return [c for layer in report.layers for c in layer.checks if c.name not in ("a", "b", "bits")]


def test_two_live_models_are_run_by_their_own_frameworks_and_compared(net, twin):
    report = bnport.verify(net, twin)
    assert report.ok
    assert not report.not_run
    assert {"model(x)", "predict"} <= set(names(report))
    (source,) = {name for name in names(report) if name.startswith("source ")}
    way = source.removeprefix("source ")
    assert {f"model(x) against {way}", f"predict against {way}"} <= set(names(report))
    for check in run_checks(report):
        assert 0 < check.ratio <= 1, "neither beyond the bound, nor a bound that means nothing"
        assert check.probe is not None


@pytest.mark.parametrize("kind", ["net.pth", "net.pt", "net.onnx"])
def test_a_file_is_run_by_its_own_framework(net, twin, tmp_path, kind):
    path = str(tmp_path / kind)
    if kind == "net.pth":
        torch.save(net.state_dict(), path)
    elif kind == "net.pt":
        torch.save(net, path)
    else:
        export(net, path)
    twin.save(tmp_path / "twin.keras")
    report = bnport.verify(path, tmp_path / "twin.keras", run=True)
    assert report.ok, str(report)
    assert not report.not_run
    assert any(name.startswith("predict against ") for name in names(report))
    assert any("onnxruntime" in name if kind == "net.onnx" else "torch" in name for name in names(report))


def test_a_wrong_layer_is_beyond_the_bound_in_every_way_that_it_is_called(net, twin):
    weights = batchnorm_weights(net.bn2)
    twin.get_layer("bn2").set_weights([*weights[:3], weights[3] * 1.001])
    report = bnport.verify(net, twin)
    bad = {layer.target: [c.name for c in layer.checks if not c.ok] for layer in report.layers}
    assert bad["bn1"] == bad["bn3"] == []
    assert any(name == "predict" for name in bad["bn2"])
    assert any(name.startswith("predict against") for name in bad["bn2"])
    assert not any(name.startswith("source ") for name in bad["bn2"])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_16_bit_policies_are_held_to_their_own_bound(policy):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(8))
    telling = Net().bn1
    net[0].load_state_dict(telling.state_dict())
    with torch.no_grad():
        net[0].running_var.clamp_(1e-2)
        if "mixed" not in policy:  # numbers that the 16-bit variables hold exactly
            for tensor in net.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(getattr(torch, policy)))
    net.eval()
    layer = keras.layers.BatchNormalization(epsilon=1e-5, dtype=policy, name="bn")
    model = keras.Sequential([keras.Input((8,)), layer])
    layer.set_weights(batchnorm_weights(net[0]))
    report = bnport.verify(net, model, map={"bn": "0"})
    assert report.ok, str(report)
    ratios = [check.ratio for check in run_checks(report) if not check.name.startswith("source ")]
    assert max(ratios) > 0.05, "a bound far from what happens would find nothing"
    weights = batchnorm_weights(net[0])
    layer.set_weights([*weights[:3], weights[3] * 1.2])
    assert not bnport.verify(net, model, map={"bn": "0"}).ok


def test_outputs_and_means_beyond_float16_are_no_difference_of_a_mixed_float16_layer():
    """Slopes of 2e4 and a mean of 1e5: Keras itself answers infinity at some of the probes, as it should."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4, eps=1e-8)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([2.0, -2.0, 0.0, 1.0]))
        net[0].running_mean.copy_(torch.tensor([10.0, -10.0, 1e5, 1e5]))
        net[0].running_var.copy_(torch.tensor([0.0, 1e-12, 1.0, 1.0]))
    layer = keras.layers.BatchNormalization(dtype="mixed_float16", name="bn")
    model = keras.Sequential([keras.Input((4,)), layer])
    report = bnport.convert(net, model, map={"bn": "0"})
    assert report.ok, str(report)
    found = keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor([[0.0, 0.0, 0.0, 60000.0]])))
    with torch.no_grad():
        expected = net(torch.tensor([[0.0, 0.0, 0.0, 60000.0]])).half().numpy()
    assert np.isinf(expected[0, :2]).all()
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    for field, wrong in (("gamma", [3.0, -2, 0, 1]), ("variance", [0, 1e-12, 1.0, 1.2]), ("beta", [0, 0, 1.0, 0])):
        right = bnport.read(model)["bn"].arrays()[field].copy()
        bnport.set_weights(model, "bn", **{field: wrong})
        assert not bnport.verify(net, model, map={"bn": "0"}).ok
        bnport.set_weights(model, "bn", **{field: right})


def test_a_half_precision_source_gives_both_sides_probes_that_it_can_hold(net):
    half = torch.nn.Sequential(torch.nn.BatchNorm1d(8)).eval()
    half[0].load_state_dict(net.bn1.state_dict())
    half = half.half()
    layer = keras.layers.BatchNormalization(epsilon=1e-5, name="bn")
    model = keras.Sequential([keras.Input((8,)), layer])
    layer.set_weights([t.detach().float().numpy() for t in
                       (half[0].weight, half[0].bias, half[0].running_mean, half[0].running_var)])  # fmt: skip
    report = bnport.verify(half, model, map={"bn": "0"}, run=True)
    assert report.ok, str(report)
    assert any("against" in name for name in names(report))


def test_an_epsilon_given_by_hand_reaches_both_engines(net, tmp_path):
    wide = Net()
    for bn in (wide.bn1, wide.bn2, wide.bn3):
        bn.eps = 1e-3
    torch.save(wide.state_dict(), tmp_path / "net.pth")
    model = keras_twin(wide)
    for name in ("bn1", "bn2", "bn3"):
        model.get_layer(name).epsilon = 1e-3
    model.save(tmp_path / "twin.keras")
    model.save_weights(tmp_path / "twin.weights.h5")
    assert bnport.verify(tmp_path / "net.pth", tmp_path / "twin.keras", epsilon=1e-3, run=True).ok
    mapped = {f"layers/batch_normalization{k}": f"bn{i + 1}" for i, k in enumerate(("", "_1", "_2"))}
    found = bnport.read(tmp_path / "twin.weights.h5")
    mapped = dict(zip(found, ("bn1", "bn2", "bn3"), strict=True)) if set(found) != set(mapped) else mapped
    for epsilon, same in ((1e-3, True), (1e-5, False)):
        report = bnport.verify(
            tmp_path / "net.pth",
            tmp_path / "twin.weights.h5",
            epsilon=1e-3,
            target_epsilon=epsilon,
            run=True,
            map=mapped,
        )
        assert report.ok is same
        assert not report.not_run


def test_what_is_not_run_is_said_with_the_reason(net, twin, tmp_path):
    bnport.save_records(net, tmp_path / "r.safetensors")
    report = bnport.verify(tmp_path / "r.safetensors", twin, run=True)
    assert report.ok
    assert report.not_run == ("the source's own layers: no engine for records",)
    report = bnport.verify(net, tmp_path / "r.safetensors", run=True)
    assert any("no engine for records" in reason for reason in report.not_run)
    twin.save(tmp_path / "twin.keras")
    report = bnport.verify(tmp_path / "r.safetensors", tmp_path / "twin.keras")
    assert report.not_run == ("the real layers (--run does)",)


def test_a_target_without_an_engine_is_not_said_to_need_run(net, tmp_path):
    bnport.save_records(net, tmp_path / "records.safetensors")
    again = bnport.convert(net, tmp_path / "records.safetensors", tmp_path / "again.safetensors", run=True)
    assert again.not_run == ("the real layers: no engine for records",)


def test_without_the_framework_it_says_what_was_not_run(tmp_path, net, twin):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    twin.save(tmp_path / "twin.keras")
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "keras"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import bnport, json
report = bnport.verify({str(tmp_path / "net.pth")!r}, {str(tmp_path / "twin.keras")!r}, run=True)
print(json.dumps([report.ok, report.not_run]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ok, not_run = json.loads(done.stdout)
    assert ok
    assert len(not_run) == 2
    assert "bnport[tensorflow]" in not_run[0]
    assert "bnport[torch]" in not_run[1]


def test_a_shared_source_layer_runs_at_the_probes_of_each_target():
    bn = torch.nn.Sequential(torch.nn.BatchNorm1d(4)).eval()
    model = keras.Sequential(
        [keras.Input((4,)), *(keras.layers.BatchNormalization(epsilon=1e-5, name=n) for n in "ab")]
    )
    model.layers[0].set_weights(batchnorm_weights(bn[0]))
    weights = batchnorm_weights(bn[0])
    model.layers[1].set_weights([weights[0], weights[1], weights[2], weights[3]])
    from bnport.engines import engine_of, run_layers
    from bnport.verify import compare

    sources, held = bnport.read(bn), bnport.read(model)
    adapter = __import__("bnport.adapters", fromlist=["find"])
    layers = compare(sources, held, {"a": "0", "b": "0"})
    missed = []
    found = run_layers(
        layers,
        sources,
        held,
        engine_of(adapter.find(model), model),
        missed,
        source_engine=engine_of(adapter.find(bn), bn),
    )
    assert not missed
    assert all(any("against" in c.name for c in layer.checks) and layer.ok for layer in found.values())


def test_progress_names_what_is_running(net, twin):
    seen = []
    bnport.verify(net, twin, run=True, progress=lambda done, total, what: seen.append((done, total, what)))
    assert seen[-1][:2] == (3, 3)
    assert any("torch" in what for _, _, what in seen)


def test_the_digits_network_of_the_readme_is_run_in_both_frameworks(tmp_path):
    out = tmp_path / "ported.keras"
    bnport.convert(DIGITS / "digits.pth", DIGITS / "twin.keras", out)
    command = [sys.executable, "-m", "bnport", "verify", str(DIGITS / "digits.pth"), str(out), "--run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert not report["not_run"]
    assert any("against" in check["name"] for check in report["layers"][0]["checks"])


class Doubled(torch.nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


@keras.saving.register_keras_serializable("tests_run")
class DoubledLayer(keras.layers.BatchNormalization):
    def call(self, x, training=None, mask=None):
        return 2 * super().call(x, training=training, mask=mask)


def test_a_live_source_with_code_of_its_own_is_run_by_verify_too(tmp_path):
    layer = keras.layers.BatchNormalization(epsilon=1e-5, name="0")
    keras.Sequential([keras.Input((3,)), layer]).save(tmp_path / "k.keras")
    source = torch.nn.Sequential(Doubled(3)).eval()
    report = bnport.verify(source, tmp_path / "k.keras")
    assert not report.ok
    assert [c.name for c in report.layers[0].checks if not c.ok] == ["source Doubled.forward"]
    assert report.not_run == ("the target's real layers (--run does)",)
    assert bnport.verify(torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval(), tmp_path / "k.keras").ok


class Counting(torch.nn.BatchNorm1d):
    """Its forward() writes into its own buffers and draws random numbers."""

    def forward(self, x):
        self.running_mean.add_(1.0)
        self.num_batches_tracked.add_(1)
        return super().forward(x) + 0 * torch.rand(1)


class CountingLayer(keras.layers.BatchNormalization):
    def call(self, x, training=None, mask=None):
        self.moving_mean.assign(self.moving_mean + 1.0)
        return super().call(x, training=training, mask=mask)


def test_what_code_of_its_own_writes_while_a_layer_is_compared_is_put_back(tmp_path):
    module, layer = torch.nn.Sequential(Counting(3)).eval(), CountingLayer(epsilon=1e-5, name="0")
    model = keras.Sequential([keras.Input((3,)), layer])
    keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(epsilon=1e-5, name="0")]).save(
        tmp_path / "k.keras"
    )
    drawn = torch.random.get_rng_state()
    for live in (module, model):
        report = bnport.verify(live, tmp_path / "k.keras")
        assert not report.ok  # it was run: what it computes is not what its numbers say
    assert [value.tolist() for value in module.state_dict().values()] == [[1] * 3, [0] * 3, [0] * 3, [1] * 3, 0]
    assert [value.tolist() for value in layer.get_weights()] == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]
    assert torch.equal(torch.random.get_rng_state(), drawn)


def _raising(x, training=None, mask=None):
    raise KeyError("no such skip")


@pytest.mark.parametrize("call", [_raising, lambda x, skip: x + skip, lambda x, training=None, mask=None: x[:, :1]])
def test_a_replaced_call_that_does_not_run_alone_is_said(call):
    def model(own):
        layers = [keras.layers.BatchNormalization(epsilon=1e-5, name=name) for name in "ab"]
        made = keras.Sequential([keras.Input((3,)), *layers])
        if own:
            layers[1].call = call
        return made

    for source, target in ((model(True), model(False)), (model(False), model(True))):
        report = bnport.verify(source, target, run=True)
        (said,) = report.not_run
        assert "b: a call() that is not Keras' own does not run alone" in said
        assert said.isprintable()
        assert [bool(layer.checks) and layer.status for layer in report.layers] == ["exact", "exact"]


@pytest.mark.parametrize("side", ["source", "target"])
def test_what_a_class_in_a_file_computes_is_said_to_be_unknown_by_convert_and_verify(tmp_path, side):
    """The real engines differ by a factor of 2 and no number in either file shows it."""
    source, target, out = (str(tmp_path / name) for name in ("net.pt", "k.keras", "out.keras"))
    module, layer = (
        (Doubled, keras.layers.BatchNormalization) if side == "source" else (torch.nn.BatchNorm1d, DoubledLayer)
    )
    torch.save(torch.nn.Sequential(module(3)).eval(), source)
    keras.Sequential([keras.Input((3,)), layer(name="0")]).save(target)
    known = "Doubled is none that bnport knows" if side == "source" else "DoubledLayer is a subclass"
    for report in (bnport.convert(source, target, out), bnport.verify(source, out)):
        (said,) = (note for note in report.layers[0].notes if known in note)
        assert said in str(report)
