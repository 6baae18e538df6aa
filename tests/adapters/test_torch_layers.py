"""The kinds of BatchNorm that torch, torchvision, timm and others have, live and saved, against their own output."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from bnport import adapters
from bnport.errors import BnportError, FormatError, InvalidValue
from bnport.layer import Change
from bnport.record import FIELDS
from tests.adapters.contract import assert_same_bits, assert_within_bound, telling_record
from tests.adapters.torch_models import fill, norm_of, output
from tests.zoo import timm, torchvision

RECORD = telling_record(6, epsilon=2.5e-3)


def saved(value, tmp_path, name="model.pt"):
    path = str(tmp_path / name)
    torch.save(value, path)
    return path


def only(source, **options):
    (layer,) = adapters.read(source, **options).values()
    return layer


def spatial(x, rank):
    return x.reshape(*x.shape, *(1,) * rank)


def check_everywhere(norm, tmp_path, record=RECORD, rank=2, run=None):
    """Read live and from a whole-module file; both are the record, and the module's own output is within its bound."""
    x = record.probes().astype(np.float32)
    y = output(run or norm.eval(), spatial(x, rank)).reshape(x.shape)
    for source in (norm, saved(norm, tmp_path)):
        layer = only(source)
        assert_same_bits(layer.record, record)
        assert layer.assumed == frozenset()
        assert_within_bound(y, layer.record, x)
    return layer


@pytest.mark.parametrize(
    ("kind", "rank"),
    [(torch.nn.BatchNorm1d, 0), (torch.nn.BatchNorm2d, 2), (torch.nn.BatchNorm3d, 3), (torch.nn.SyncBatchNorm, 2)],
)
def test_every_rank_and_the_synchronised_one(tmp_path, kind, rank):
    norm = norm_of(RECORD, kind=kind).eval()
    layer = check_everywhere(norm, tmp_path, rank=rank)
    assert layer.momentum == 0.7  # ours is the fraction kept, torch's 0.3 the fraction replaced
    x = RECORD.probes().astype(np.float32)
    (y,) = adapters.load("torch").run(norm, layer.name, x).values()
    assert_within_bound(y, RECORD, x)


def test_a_cumulative_average_has_no_momentum(tmp_path):
    norm = torch.nn.BatchNorm1d(6, momentum=None)
    assert only(norm).momentum is None
    assert only(saved(norm, tmp_path)).momentum is None


def test_a_lazy_layer_is_read_once_it_has_seen_a_batch_and_refused_before(tmp_path):
    lazy = torch.nn.LazyBatchNorm2d(eps=RECORD.epsilon)
    for source in (lazy, saved(lazy, tmp_path)):
        with pytest.raises(FormatError, match="has not seen a batch"):
            adapters.read(source)
    lazy(torch.randn(2, 6, 3, 3))
    fill(lazy, RECORD)
    check_everywhere(lazy, tmp_path)


@pytest.mark.parametrize("affine", [True, False])
def test_without_running_statistics_it_is_listed_and_refused_with_what_to_do(tmp_path, affine):
    norm = torch.nn.BatchNorm2d(6, track_running_stats=False, affine=affine, eps=3e-4)
    if affine:
        torch.nn.init.normal_(norm.weight)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), norm)
    for source in (model, saved(model, tmp_path)):
        (layer,) = adapters.read(source).values()
        assert (layer.name, layer.channels, layer.epsilon) == ("1", 6, 3e-4)
        assert layer.stores >= ({"gamma", "beta"} if affine else set())
        assert not layer.stores & {"mean", "variance"}
        if affine:
            assert layer.arrays()["gamma"].tobytes() == norm.weight.detach().numpy().tobytes()
        with pytest.raises(InvalidValue, match=r"1: holds no running statistics .*bnport convert --calibrate DATA"):
            layer.record  # noqa: B018


@pytest.mark.parametrize("affine", [True, False])
def test_other_normalisations_are_not_taken_for_batchnorm(tmp_path, affine):
    others = torch.nn.Sequential(
        torch.nn.LayerNorm(6, elementwise_affine=affine),
        torch.nn.GroupNorm(2, 6, affine=affine),
        torch.nn.InstanceNorm1d(6, affine=affine),
        torch.nn.InstanceNorm2d(6, affine=affine, track_running_stats=True),
        torch.nn.LocalResponseNorm(2),
    )
    for source in (others, saved(others, tmp_path), _scripted(others, tmp_path)):
        layers = adapters.read(source)
        assert not layers
        assert any("InstanceNorm layers are not BatchNorm" in note for note in layers.notes)
    plain = torch.nn.Sequential(*list(others)[:3])
    layers = adapters.read(saved(plain.state_dict(), tmp_path))
    assert not layers
    assert any("No running statistics" in note for note in layers.notes)


def _scripted(model, tmp_path):
    path = str(tmp_path / "scripted.pt")
    torch.jit.script(model).save(path)
    return path


def test_torchvisions_frozen_batchnorm(tmp_path):
    frozen = torchvision.ops.FrozenBatchNorm2d(6, eps=RECORD.epsilon)
    fill(frozen, RECORD)
    check_everywhere(frozen, tmp_path)
    state = only(saved(frozen.state_dict(), tmp_path))
    assert_same_bits(state.record, RECORD.replace(epsilon=1e-5))
    assert state.assumed == {"epsilon"}


class Detectron2Frozen(torch.nn.Module):
    """detectron2's FrozenBatchNorm2d by its documented behaviour: buffers, version 3, affine of frozen statistics."""

    _version = 3

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


@pytest.mark.parametrize(("version", "epsilon"), [(2, 0.0), (3, 1e-5)])
def test_detectron2s_frozen_batchnorm_by_its_version(tmp_path, version, epsilon):
    frozen = Detectron2Frozen(6)
    frozen._version = version
    fill(frozen, RECORD)
    for state in (saved({"model": frozen.state_dict()}, tmp_path), frozen.state_dict()):
        layer = only(state)
        assert layer.epsilon == epsilon
        assert layer.assumed == {"epsilon"}
        assert any("version 2" in note for note in layer.notes) is (version == 2)
        assert adapters.read(state, epsilon=1e-3)[layer.name].epsilon == 1e-3


@pytest.mark.parametrize("name", ["BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"])
def test_timms_batchnorms_with_an_activation_say_that_it_is_not_in_the_record(tmp_path, name):
    norm = getattr(timm.layers, name)(6, eps=RECORD.epsilon)
    if name == "SyncBatchNormAct":  # it has none of its own: timm's converter gives it one
        norm.act, norm.drop = torch.nn.ReLU(), torch.nn.Identity()
    fill(norm, RECORD)
    x = RECORD.probes().astype(np.float32)
    expected = np.maximum(RECORD(x), 0)
    y = output(norm.eval(), spatial(x, 2)).reshape(x.shape)
    assert (np.abs(y - expected) <= RECORD.error_bound(x)).all()  # the activation is really there
    for source in (norm, saved(norm, tmp_path)):
        layer = only(source)
        assert_same_bits(layer.record, RECORD)
        assert any("applies ReLU after it" in note for note in layer.notes)
    (ran,) = adapters.load("torch").run(norm, layer.name, x).values()
    assert_within_bound(ran, RECORD, x)
    assert isinstance(norm.act, torch.nn.ReLU)


class InPlaceABN(torch.nn.Module):
    """InPlaceABN by its published code: gamma is |weight| + eps, then a leaky ReLU."""

    def __init__(self, channels, eps):
        super().__init__()
        self.eps, self.momentum, self.activation = eps, 0.1, "leaky_relu"
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return torch.nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.abs() + self.eps,
            self.bias,
            training=False,
            eps=self.eps,
        )


def test_inplace_abn_is_told_by_its_class_and_asked_for_in_a_state_dict(tmp_path):
    norm = InPlaceABN(6, RECORD.epsilon)
    fill(norm, RECORD)  # weights of both signs
    x = RECORD.probes().astype(np.float32)
    y = output(norm, x)
    for source in (norm, saved(norm, tmp_path)):
        layer = only(source)
        gamma = np.abs(RECORD.gamma.astype(np.float64)) + RECORD.epsilon
        assert_same_bits(layer.record, RECORD.replace(gamma=gamma))
        assert_within_bound(y, layer.record, x)
        assert_same_bits(only(source, inplace_abn=False).record, RECORD)
    state = saved(norm.state_dict(), tmp_path)
    assert_same_bits(only(state).record, RECORD.replace(epsilon=1e-5))
    asked = only(state, inplace_abn=True, epsilon=RECORD.epsilon)
    assert (asked.record.gamma > 0).all()
    new = layer.record.replace(gamma=layer.record.gamma * 2)
    adapters.load("torch").apply(norm, {layer.name: Change(new, frozenset({"gamma"}))})
    np.testing.assert_allclose(only(norm).record.gamma, new.gamma, rtol=1e-6)


def test_epsilon_given_for_a_state_dict_reaches_inplace_abns_gamma(tmp_path):
    norm = InPlaceABN(6, 0.5)
    fill(norm, RECORD)
    x = RECORD.probes().astype(np.float32)
    state = saved(norm.state_dict(), tmp_path)
    layer = only(state, inplace_abn=True, epsilon=0.5)
    assert_within_bound(output(norm, x), layer.record, x)
    (ran,) = adapters.load("torch").run(state, layer.name, x, inplace_abn=True, epsilon=0.5).values()
    assert_within_bound(ran, layer.record, x)


def test_quantisation_aware_layouts(tmp_path):
    conv_bn = torch.ao.nn.intrinsic.qat.ConvBn2d(
        3, 6, 1, eps=RECORD.epsilon, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    fill(conv_bn.bn, RECORD)
    state = conv_bn.state_dict()
    layer = only(saved(state, tmp_path))
    assert layer.name == "bn"
    assert_same_bits(layer.record, RECORD.replace(epsilon=1e-5))
    assert_same_bits(only(saved(torch.nn.Sequential(conv_bn), tmp_path)).record, RECORD)
    # version 1 held gamma, beta and the statistics on the module itself; torch still loads it, which is the oracle
    old = {
        name.replace("bn.weight", "gamma").replace("bn.bias", "beta").replace("bn.", ""): v for name, v in state.items()
    }
    layer = only(saved({f"conv.{name}": v for name, v in old.items()}, tmp_path))
    assert layer.name == "conv"
    assert_same_bits(layer.record, RECORD.replace(epsilon=1e-5))
    assert layer.kernel.shape == (6, 3, 1, 1)


def test_an_untrained_layer_is_noted_and_a_trained_one_is_not(tmp_path):
    norm = torch.nn.BatchNorm2d(6)
    for source in (norm, saved(norm, tmp_path), saved(norm.state_dict(), tmp_path), norm.half(), norm.double()):
        assert any("never saw a batch" in note for note in only(source).notes)
        assert only(source).untrained
    norm = norm.float().train()
    norm(torch.randn(4, 6, 2, 2))
    assert not any("never saw a batch" in note for note in only(norm).notes)
    ported = torch.nn.BatchNorm2d(6)
    ported.running_var.fill_(2.0)  # the counter is 0, but somebody put numbers in
    assert not any("never saw a batch" in note for note in only(ported).notes)
    assert not only(ported).untrained


def test_mixed_precision_storage_is_noted(tmp_path):
    norm = norm_of(RECORD)
    with torch.no_grad():
        norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    layer = only(saved(norm.state_dict(), tmp_path))
    assert "stored as float32 and bfloat16" in layer.notes
    assert layer.record.mean.tobytes() == RECORD.mean.tobytes()
    assert (layer.record.gamma == norm.weight.detach().float().numpy()).all()


def test_a_shared_layer_is_read_once(tmp_path):
    norm = norm_of(RECORD)
    model = torch.nn.Sequential(norm, torch.nn.ReLU(), norm)
    for source in (model, saved(model, tmp_path)):
        assert list(adapters.read(source)) == ["0"]


def test_a_traced_module_in_training_mode_is_refused(tmp_path):
    path = str(tmp_path / "training.pt")
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), norm_of(RECORD)).train()
    torch.jit.trace(model, torch.randn(4, 6), check_trace=False).save(path)
    for source in (path, torch.jit.load(path)):
        with pytest.raises(FormatError, match=r"1 was traced in training mode"):
            adapters.read(source)


def test_live_script_modules_give_their_epsilon(tmp_path):
    model = torch.nn.Sequential(norm_of(RECORD)).eval()
    for script in (torch.jit.script(model), torch.jit.trace(model, torch.zeros(2, 6))):
        layer = only(script)
        assert_same_bits(layer.record, RECORD)
        assert layer.assumed == frozenset()


def test_torchscript_gives_momentum_and_none_for_a_cumulative_average(tmp_path):
    path = str(tmp_path / "model.pt")
    for given, expected in ((0.3, 0.7), (None, None)):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(6, momentum=given)).eval()
        for script in (torch.jit.script(model), torch.jit.trace(model, torch.zeros(2, 6))):
            script.save(path)
            assert only(path).momentum == expected


def test_frozen_torchscript_holds_no_batchnorm_and_says_why(tmp_path):
    path = str(tmp_path / "frozen.pt")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), norm_of(RECORD, kind=torch.nn.BatchNorm2d)).eval()
    torch.jit.freeze(torch.jit.script(model)).save(path)
    layers = adapters.read(path)
    assert not layers
    assert any("fold it away" in note for note in layers.notes)


def test_a_trace_does_not_know_the_epsilon_of_what_it_never_called(tmp_path):
    class WithAuxiliary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = norm_of(RECORD), norm_of(RECORD)

        def forward(self, x):
            return self.main(x)

    path = str(tmp_path / "traced.pt")
    torch.jit.trace(WithAuxiliary().eval(), torch.zeros(2, 6)).save(path)
    layers = adapters.read(path)
    assert layers["main"].assumed == frozenset()
    assert layers["auxiliary"].assumed == {"epsilon"}


def test_reading_and_running_leave_modes_hooks_and_gradients_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), norm_of(RECORD, kind=torch.nn.BatchNorm2d)).train()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters.read(model)
    adapters.load("torch").run(model, "1", RECORD.probes().astype(np.float32))
    assert not calls
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].weight.requires_grad


class Remembering(torch.nn.Module):
    """A forward that leaves traces of itself, as many do."""

    def __init__(self, fails):
        super().__init__()
        self.norm, self.fails = norm_of(RECORD), fails
        self.register_buffer("steps", torch.tensor(0))
        self.history, self.by_name, self.last, self.calls = [], {}, None, 0

    def forward(self, x):
        self.calls += 1
        self.steps.add_(1)
        self.last = self.norm(x) + torch.rand(())
        self.history.append(self.last)
        self.by_name["x"] = x
        if self.fails and x.sum() > 0:
            return x
        return self.last


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_whose_forward_leaves_traces_is_read_without_any(fails):
    model = Remembering(fails)
    state, attributes = torch.random.get_rng_state(), set(vars(model))
    layers = adapters.read(model)
    assert (layers["norm"].inputs == ()) is not fails  # a path that depends on the data cannot be traced
    assert (model.history, model.by_name, model.last, model.calls, model.steps.item()) == ([], {}, None, 0, 0)
    assert set(vars(model)) == attributes
    assert torch.equal(torch.random.get_rng_state(), state)
    model(torch.zeros(2, 6))
    assert model.steps == 1


def test_a_write_that_fails_half_way_is_undone():
    records = [telling_record(6, seed=s, epsilon=1e-3) for s in (1, 2)]
    model = torch.nn.Sequential(*(norm_of(r) for r in records))
    model[1].weight.data = model[1].weight.data[:1].expand(6)  # cannot be written into: elements share memory
    new = Change(telling_record(6, seed=3, epsilon=5e-3), frozenset({*FIELDS, "epsilon"}))
    with pytest.raises(InvalidValue, match="torch does not write into its tensors"):
        adapters.load("torch").apply(model, {"0": new, "1": new})
    assert_same_bits(adapters.read(model)["0"].record, records[0])
    assert model[0].eps == 1e-3


def test_momentum_and_epsilon_are_written_as_torch_means_them():
    norm = norm_of(RECORD)
    change = Change(RECORD.replace(epsilon=1e-4), frozenset({"epsilon", "momentum"}), momentum=0.99)
    adapters.load("torch").apply(norm, {only(norm).name: change})
    assert (norm.eps, norm.momentum) == (1e-4, 0.01)


def test_what_a_live_target_cannot_hold_is_refused():
    module = adapters.load("torch")
    norm = norm_of(RECORD, absent=("gamma", "beta"))
    name = only(norm).name
    for target, fields, match in (
        (norm, {"gamma"}, "the layer has none"),
        (norm.state_dict(), {"epsilon"}, "a state dict holds none"),
        (norm_of(RECORD).half(), {"mean"}, "does not fit torch.float16"),
    ):
        with pytest.raises(InvalidValue, match=match):
            module.apply(target, {name: Change(RECORD.replace(mean=RECORD.mean * 1e6), frozenset(fields))})


def test_a_meta_model_has_no_numbers():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(6))
    with pytest.raises(BnportError, match="meta"):
        _ = only(model).record


def test_a_live_object_that_is_no_model_is_refused():
    for thing in (torch.zeros(3), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)):
        with pytest.raises(BnportError):
            adapters.read(thing)


def test_running_a_file_is_torchs_own_batch_norm(tmp_path):
    x = RECORD.probes().astype(np.float32)
    path = saved(torch.nn.Sequential(norm_of(RECORD)), tmp_path)
    outputs = adapters.load("torch").run(path, "0", x)
    assert list(outputs) == ["torch.nn.functional.batch_norm"]
    assert (
        outputs["torch.nn.functional.batch_norm"].astype(np.float64).tobytes()
        == output(norm_of(RECORD).eval(), x).tobytes()
    )


def test_a_loaded_checkpoint_reads_like_its_file(tmp_path):
    checkpoint = {"state_dict": torch.nn.Sequential(norm_of(RECORD)).state_dict(), "epoch": 3}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    live, file = only(checkpoint), only(str(tmp_path / "x.pth"))
    assert live.name == file.name == "0"
    assert_same_bits(live.record, file.record)
