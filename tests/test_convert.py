"""The conductor: a live target is written whole or left as it was, options of the target reach its reader and writer."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.utils.prune

import bnport
from bnport.cli import main
from bnport.containers.files import Digest, sha256
from bnport.errors import InvalidValue, MatchError, NotFound, Unrepresentable
from bnport.testing import assert_equivalent

from .match.making import layer, layers
from .test_cli import DIGITS, PTH, TWIN

OUTCOME = "bnport.outcome"


def network(seed: int, eps: float = 1e-5) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4, eps=eps), torch.nn.BatchNorm2d(6, eps=eps)
    )
    for norm in net[1:]:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 1e-6, 1)
    return net


def numbers(net: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in net.state_dict().items()}


def test_a_live_torch_module_is_written_and_run():
    source, target = network(1), network(2, eps=1e-3)
    report = bnport.convert(source, target)
    assert report.ok
    assert {norm.eps for norm in target[1:]} == {1e-5}
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(source[1].eval()(x), target[1].eval()(x))


@pytest.mark.parametrize("failure", ["raises", "different"])
def test_a_live_target_whose_check_fails_is_put_back_bit_for_bit(monkeypatch, failure):
    source, target = network(1), network(2, eps=1e-3)
    before, epsilons = numbers(target), [norm.eps for norm in target[1:]]
    real = import_module(OUTCOME).check_bits

    def failing(*arguments):
        if failure == "raises":
            raise MatchError("made to fail")
        return {n: (check._replace(ratio=2.0), notes) for n, (check, notes) in real(*arguments).items()}

    monkeypatch.setattr(import_module(OUTCOME), "check_bits", failing)
    if failure == "raises":
        with pytest.raises(MatchError, match="made to fail"):
            bnport.convert(source, target)
    else:
        assert not bnport.convert(source, target).ok
    assert numbers(target) == before
    assert [norm.eps for norm in target[1:]] == epsilons


def test_one_layer_that_does_not_fit_leaves_every_layer_as_it_was():
    source, target = network(1), network(2).half()
    source[2].running_mean.fill_(1e5)
    before = numbers(target)
    with pytest.raises(Unrepresentable, match=r"2 <- 2: mean, channels 0, 1, 2, 3, 4 and 1 more.*float16"):
        bnport.convert(source, target)
    assert numbers(target) == before


def test_the_epsilon_of_a_live_state_dict_is_the_one_that_was_given():
    source, net = network(1), network(2)
    target = copy.deepcopy(net.state_dict())
    report = bnport.convert(source, target, target_epsilon=1e-3)
    assert report.ok
    held = bnport.read(target, epsilon=1e-3)
    assert bnport.verify(source, held).ok
    assert not bnport.verify(source, target).ok  # read with torch's default it is another function


def test_an_output_that_fails_its_check_never_takes_its_name(monkeypatch, tmp_path, capsys):
    real = import_module(OUTCOME).check_bits
    monkeypatch.setattr(
        import_module(OUTCOME),
        "check_bits",
        lambda *a: {n: (check._replace(ratio=2.0), notes) for n, (check, notes) in real(*a).items()},
    )
    out = tmp_path / "out.keras"
    assert main(["convert", PTH, TWIN, "-o", str(out)]) == 1
    assert "NOT written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_format_of_the_target_can_be_given(tmp_path):
    out = tmp_path / "out.keras"
    assert main(["convert", PTH, TWIN, "-o", str(out), "--target-option", "format=keras"]) == 0
    assert main(["convert", PTH, TWIN, "-o", str(tmp_path / "x"), "--target-option", "format=torch"]) == 2
    assert (DIGITS / "twin.keras").exists()


def test_a_digest_is_sha256_and_stops_when_nobody_wants_it_any_more(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 5000)
    assert Digest(str(path)).result() == sha256(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    endless = tmp_path / "endless"
    with open(endless, "wb") as file:
        file.truncate(1 << 42)
    digest = Digest(str(endless))
    thread = digest._thread
    del digest
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(FileNotFoundError):
        Digest(str(tmp_path / "nix")).result()


def test_a_source_that_is_not_hashed_is_read_only_where_batchnorm_lies(tmp_path, capsys):
    source = tmp_path / "large.safetensors"
    with open(DIGITS / "digits.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, tensors = json.loads(file.read(size)), file.read()
    header["large"] = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [len(tensors), len(tensors) + (1 << 42)]}
    text = json.dumps(header).encode()
    with open(source, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + tensors)
        file.truncate(8 + len(text) + len(tensors) + (1 << 42))  # 4 TB of zeros that no disk holds: days to hash
    out = str(tmp_path / "out.keras")
    report = bnport.convert(source, TWIN, out, sha256=False)
    assert report.ok
    assert report.sha256 == {}
    assert main(["verify", str(source), out, "--no-sha256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == {}
    assert main(["convert", str(source), str(tmp_path / "records.safetensors"), "--no-sha256"]) == 0
    assert main(["convert", str(source), TWIN, "-o", out, "--force", "--no-sha256"]) == 0
    assert "sha256" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["out.pth", "out.h5", "out.weights.h5", "OUT.ONNX", "out.safetensors"])
def test_an_output_named_as_another_kind_of_file_is_refused(tmp_path, name, capsys):
    assert main(["convert", PTH, TWIN, "-o", str(tmp_path / name)]) == 2
    assert "let its name end in .keras" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "name"), [(TWIN, "out.new"), (TWIN, "out"), (TWIN, "OUT.KERAS"), (PTH, "out.pt")])
def test_an_output_of_the_same_kind_or_of_no_known_one_is_written(tmp_path, target, name):
    assert main(["convert", PTH, target, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("form", ["live", "file"])
def test_a_target_without_gamma_gets_a_smaller_epsilon_where_slopes_are_too_steep_for_the_sources(tmp_path, form):
    """(variance + epsilon) / gamma**2 is 2.5e-4 for the first channel, less than the source's epsilon."""
    import keras

    source = torch.nn.Sequential(torch.nn.BatchNorm1d(3, eps=1e-3)).eval()
    with torch.no_grad():
        source[0].weight.copy_(torch.tensor([2.0, 1.0, 0.5]))
        source[0].bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
        source[0].running_mean.copy_(torch.tensor([1.0, -1.0, 0.5]))
        source[0].running_var.copy_(torch.tensor([0.0, 1e-5, 2.0]))
    target = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(scale=False, name="bn")])
    if form == "file":
        target.save(tmp_path / "target.keras")
        report = bnport.convert(source, tmp_path / "target.keras", tmp_path / "out.keras", map={"bn": "0"})
        target = keras.saving.load_model(tmp_path / "out.keras")
    else:
        report = bnport.convert(source, target, map={"bn": "0"})
    assert report.ok
    assert "epsilon 0.001 of the target becomes 0.0001" in str(report)
    assert target.get_layer("bn").epsilon == 1e-4
    x = torch.tensor([[0.0, 1.0, 2.0], [1.5, -1.0, 0.0]])
    with torch.no_grad():
        expected = source(x).numpy()
    np.testing.assert_allclose(np.asarray(target(x.numpy())), expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_epsilon_that_went_through_float32_is_said_where_the_engine_can_tell(dtype):
    single = float(np.float32(1e-5))
    source, target = network(1, eps=single).to(dtype).eval(), network(2).to(dtype).eval()
    report = bnport.convert(source, target)
    assert report.ok
    assert target[1].eps == 1e-5
    x = torch.randn(3, 4, 5, 5, dtype=dtype)
    apart = ((source[1](x) - target[1](x)).abs() / source[1](x).abs()).max().item()
    assert apart < 1e-6
    assert (apart > 0) == ("is taken for 1e-05" in str(report)) == (dtype is torch.float64)


@pytest.mark.parametrize("side", [0, 1])
def test_hooks_that_run_with_a_live_layer_are_said_and_torchs_own_are_not(side):
    """A hook may change what comes in or out, as this one does; the numbers do not show it."""
    both = network(1).eval(), network(2).eval()
    torch.nn.utils.prune.l1_unstructured(both[0][2], "weight", 0.5)
    both[side][1].register_forward_hook(lambda module, given, made: 2 * made)
    report = bnport.convert(*both)
    x = torch.randn(3, 4, 5, 5)
    assert not torch.allclose(both[0][1](x), both[1][1](x))
    assert [any("a hook runs with it" in note for note in layer.notes) for layer in report.layers] == [True, False]


def test_tensors_that_torch_does_not_write_into_are_refused_and_no_layer_is_changed():
    target = network(2)
    target[2].running_mean = torch.zeros(1).expand(6)
    before = numbers(target)
    with pytest.raises(InvalidValue, match="torch does not write into its tensors"):
        bnport.convert(network(1), target)
    assert numbers(target) == before


def test_a_keras_source_whose_call_was_replaced_is_run_and_not_called_the_same():
    import keras

    source = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="0")])
    target = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
    assert bnport.convert(source, target).ok
    layer = source.get_layer("0")
    usual = layer.call
    layer.call = lambda x, **more: 2 * usual(x, **more)
    report = bnport.convert(source, target)
    assert not report.ok
    assert "its call() was replaced" in str(report)


def test_a_program_that_ends_waits_for_no_digest_but_for_its_thread(tmp_path):
    endless = tmp_path / "endless"
    with open(endless, "wb") as file:
        file.truncate(1 << 42)
    code = (
        f"from bnport.containers.files import Digest; kept = Digest({str(endless)!r}); assert not kept._thread.daemon"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("count", [1, 5])
def test_that_kernels_differ_where_names_are_equal_is_said(count):
    def net(kernel):
        return layers(
            *(layer(f"stem{n}", 8, kernel, mean=n) for n in range(count)), layer("bn", 8, (8, 8, 3, 3), mean=9)
        )

    report = bnport.verify(net((8, 12, 2, 2)), net((8, 3, 4, 4)))
    assert report.ok
    note = "stem0: equal names, but kernels differ: 8x12x2x2 in the source, 8x3x4x4 in the target"
    assert [note for note in report.notes if "kernels" in note] == [
        note + ("; so it is for 4 more layers" if count == 5 else "")
    ]
    assert bnport.verify(net((8, 3, 4, 4)), net((8, 3, 4, 4))).notes == ()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("only_under", 5, "only_under: expected the beginning of names, got 5"),
        ("only_under", b"x", "only_under: expected the beginning of names, got b'x'"),
        ("map", {1: 2}, r"map: expected target names to source names, got \{1: 2\}"),
        ("map", {"bn1": 2}, "map: expected target names to source names"),
        ("source_options", "x", "source_options: expected a mapping of names to values, got 'x'"),
        ("target_options", 5, "target_options: expected a mapping of names to values, got 5"),
        ("source_options", {1: 2}, "source_options: expected a mapping of names to values"),
        ("source_options", {"epsilon": 1e-3}, "source_options: epsilon is none of them; say epsilon="),
        ("target_options", {"epsilon": 1e-3}, "target_options: epsilon is none of them; say target_epsilon="),
        ("only", 5, "only: expected some of gamma, beta, mean, variance, epsilon, got 5"),
    ],
)
def test_an_argument_of_another_kind_is_refused_in_words(argument, value, message):
    with pytest.raises(InvalidValue, match=message):
        bnport.convert(PTH, TWIN, dry_run=True, **{argument: value})
    if argument != "only":
        for function in (bnport.verify, bnport.explain, assert_equivalent):
            with pytest.raises(InvalidValue, match=message):
                function(PTH, TWIN, **{argument: value})


def test_a_name_that_no_file_can_have_is_not_found_though_the_output_exists(tmp_path):
    from bnport.calibrated import convert_calibrated

    out = tmp_path / "out.keras"
    out.write_bytes(b"old")
    for source, target in ((PTH, "\0"), ("\0", TWIN)):
        with pytest.raises(NotFound, match="no such file"):
            bnport.convert(source, target, out, force=True)
        with pytest.raises(NotFound, match="no such file"):
            convert_calibrated(source, target, out, np.zeros((64, 8, 8, 1), np.float32), force=True)
    with pytest.raises(NotFound, match="no such file"):
        bnport.convert(PTH, "\0", in_place=True)
    assert out.read_bytes() == b"old"
