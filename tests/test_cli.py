"""The command line as a newcomer meets it: what it prints, its exit codes, wrong arguments, broken files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bnport import adapters
from bnport.cli import commands, common, main, parser_of

DIGITS = Path(__file__).parent.parent / "fixtures" / "digits"
PTH, TWIN = str(DIGITS / "digits.pth"), str(DIGITS / "twin.keras")


def test_every_command_has_help_with_examples(capsys):
    for command in commands():
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        said = capsys.readouterr().out
        assert "examples:" in said, command
        assert "--json" in said, command


def test_every_option_of_an_adapter_can_be_given_on_the_command_line():
    offered = set(common.ADAPTER_OPTIONS) | set(common.ADAPTER_FLAGS)
    taken = {option for name in adapters.names() for option in adapters.load(name).read.__kwdefaults__ or {}}
    # folder= is for live ONNX models, which the command line has none of; --epsilon is every command's own
    assert offered == taken - {"folder", "epsilon"}


def test_start_up_imports_neither_numpy_nor_a_framework():
    code = (
        "import sys, bnport.cli as c; c.parser_of('show');"
        "bad = {'numpy', 'h5py', 'torch', 'tensorflow', 'keras', 'onnx', 'jax', 'dataclasses', 'zipfile', 'inspect'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_listing_of_a_pth_imports_no_numpy():
    code = f"import sys, bnport.cli as c; c.main(['show', {PTH!r}]); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_listing_of_a_keras_file_without_values_imports_neither_numpy_nor_h5py():
    code = f"import sys, bnport.cli as c; c.main(['show', '--no-values', {TWIN!r}]);"
    code += "print(sorted({'numpy', 'h5py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_show_gives_the_ranges_that_torch_sees(capsys):
    assert main(["show", PTH, "--json"]) == 0
    shown = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    state = torch.load(PTH, weights_only=True)
    assert sorted(shown) == ["bn1", "bn2", "bn3"]
    for name, layer in shown.items():
        for field, key in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("mean", "running_mean"),
            ("variance", "running_var"),
        ):
            tensor = state[f"{name}.{key}"]
            assert layer["ranges"][field] == [tensor.min().item(), tensor.max().item()]
        assert layer["assumed"] == ["epsilon"]


def test_show_warns_of_untrained_dead_nan_and_tiny(tmp_path, capsys):
    net = torch.nn.Sequential(*[torch.nn.BatchNorm1d(4) for _ in range(4)])
    with torch.no_grad():
        for bn in net[1:]:
            bn.running_mean.fill_(0.5)
            bn.num_batches_tracked.fill_(3)
        net[1].weight[2] = 0
        net[2].running_var[1] = float("nan")
        net[3].running_var.fill_(1e-8)
    path = tmp_path / "sick.pth"
    torch.save(net.state_dict(), path)
    assert main(["show", str(path), "--json"]) == 0
    warnings = [" ".join(layer["warnings"]) for layer in json.loads(capsys.readouterr().out)["layers"]]
    for words, warning in zip(
        ("untrained", "1 of 4 channels are dead", "NaN", "far below epsilon"), warnings, strict=True
    ):
        assert words in warning
    assert warnings[0].count("untrained") == 1
    records = str(tmp_path / "sick.safetensors")
    torch.save(net[:1].state_dict(), path)
    assert main(["convert", str(path), records, "--json"]) == 0
    capsys.readouterr()
    assert main(["show", records, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert " ".join(layer["warnings"]).count("untrained") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nowhere.pth"], "nowhere.pth: no such file"),
        (["show", str(DIGITS)], "not a model file that bnport reads (a folder)"),
        (["show", ""], "name is empty"),
        (["show", str(DIGITS / "make.py")], "not a model file that bnport reads"),
        (["show", "/dev/null"], "not a regular file"),
        (["show", PTH, "--format", "nonsense"], "no format 'nonsense'"),
        (["show", PTH, "--prototxt", "x"], "has no option prototxt"),
        (["show", TWIN, "--epsilon", "1e-5"], "holds the epsilon"),
        (["convert", PTH, TWIN], "name the file to make"),
        (["convert", PTH, TWIN, "-o", ""], "the output's name is empty; name the file to make"),
        (["convert", PTH, TWIN, "-o", TWIN], "is the input"),
        (["convert", PTH, TWIN, "-o", "nowhere/out.keras"], "does not exist"),
        (["convert", PTH, TWIN, "-o", "/tmp"], "not a regular file"),
        (["convert", PTH, TWIN, "-o", "x.keras", "--only", "std"], "expected some of gamma, beta"),
        (["verify", PTH, TWIN, "--map", "nowhere.toml"], "nowhere.toml"),
        (["verify", PTH, TWIN, "--map", ""], "no such file"),
        (
            ["convert", PTH, TWIN, "-o", "x.keras", "--in-place"],
            "--in-place changes TARGET itself; leave out either it or -o",
        ),
        (["restore", ""], "name is empty"),
    ],
)
def test_a_wrong_call_is_one_line_that_says_why_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_saved_model_folder_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    assert main(["show", str(tmp_path)]) == 2
    assert "a folder, a TensorFlow SavedModel: load it and save the model as .keras" in capsys.readouterr().err


def test_a_source_without_batchnorm_is_not_an_empty_success(tmp_path, capsys):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.LayerNorm(4), torch.nn.InstanceNorm2d(4, affine=True))
    path = tmp_path / "none.pth"
    torch.save(net.state_dict(), path)
    out = tmp_path / "out.keras"
    for command in (["show", str(path)], ["convert", str(path), TWIN, "-o", str(out)], ["verify", str(path), TWIN]):
        assert main(command) == 2
        assert "no BatchNorm found" in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_run_writes_nothing_and_says_what_it_would(tmp_path, capsys):
    out = tmp_path / "out.keras"
    assert main(["convert", PTH, TWIN, "-o", str(out), "--dry-run"]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_only_some_fields_are_written_and_the_rest_is_the_targets(tmp_path):
    out = tmp_path / "out.keras"
    assert main(["convert", PTH, TWIN, "-o", str(out), "--only", "gamma,beta"]) == 0
    state = torch.load(PTH, weights_only=True)
    ported, twin = adapters.read(str(out)), adapters.read(TWIN)
    for name in ("bn1", "bn2", "bn3"):
        assert ported[name].record.gamma.tobytes() == state[f"{name}.weight"].numpy().tobytes()
        assert ported[name].record.mean.tobytes() == twin[name].record.mean.tobytes()
        assert ported[name].epsilon == twin[name].epsilon == 1e-3


def test_momentum_is_ported_as_one_minus_torchs(tmp_path):
    net = torch.nn.Sequential()
    for name, width in (("bn1", 16), ("bn2", 32), ("bn3", 32)):
        net.add_module(name, torch.nn.BatchNorm2d(width, momentum=0.3, eps=2e-5))
        torch.nn.init.normal_(getattr(net, name).running_mean)
    path, out = tmp_path / "module.pt", tmp_path / "out.keras"
    torch.save(net, path)
    assert main(["convert", str(path), TWIN, "-o", str(out), "--momentum", "port"]) == 0
    layer = adapters.read(str(out))["bn1"]
    assert layer.momentum == pytest.approx(0.7, abs=1e-15)
    assert layer.epsilon == 2e-5


def test_an_absorbed_epsilon_is_said_and_proved(tmp_path, capsys):
    out = tmp_path / "out.weights.h5"
    assert main(["convert", PTH, str(DIGITS / "twin.weights.h5"), "-o", str(out), "--target-epsilon", "1e-3"]) == 0
    printed = capsys.readouterr().out
    assert "absorbed into" in printed
    assert "bounded" in printed


def test_output_into_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m bnport show {PTH} | true", shell=True, capture_output=True, text=True, env={**os.environ}
    )
    assert "Traceback" not in done.stderr


def in_shell(command, **environment):
    """A command line run by a shell, `bnport` in it the command; without PYTHONUNBUFFERED, as users run it."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    command = command.replace("bnport", f"{sys.executable} -m bnport", 1)
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=plain)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [f"verify {TWIN} {TWIN}", f"show {PTH}", f"show {PTH} --json", "formats", "--version", f"map {PTH} {TWIN}"],
)
def test_a_report_that_cannot_be_printed_is_one_line_and_exit_code_2(command, unbuffered):
    done = in_shell(f"bnport {command} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "bnport: standard output cannot be written to (No space left on device)\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_help_that_cannot_be_printed_is_one_line_and_exit_code_2():
    done = in_shell("bnport show --help >/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_what_was_written_before_printing_failed_is_said(tmp_path):
    out, page, names, records = (str(tmp_path / name) for name in ("o.keras", "o.html", "o.toml", "o.safetensors"))
    done = in_shell(f"bnport convert {PTH} {TWIN} -o {out} --html {page} >/dev/full")
    assert done.returncode == 2
    assert done.stderr.endswith(f"(No space left on device); {out} is written; {page} is written\n")
    assert main(["verify", PTH, out]) == 0
    assert in_shell(f"bnport map {PTH} {TWIN} -o {names} >/dev/full").stderr.endswith(f"; {names} is written\n")
    assert in_shell(f"bnport convert {PTH} {records} >/dev/full").stderr.endswith(f"; {records} is written\n")
    shutil.copy(TWIN, out)
    assert in_shell(f"bnport convert {PTH} {out} --in-place >/dev/full").stderr.endswith(f"; {out} is written\n")
    dry = in_shell(f"bnport convert {PTH} {TWIN} --dry-run >/dev/full").stderr
    assert "is written" not in dry


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_exit_codes_are_the_same_with_closed_streams(closed):
    for command, code in ((f"verify {TWIN} {TWIN}", 0), (f"verify {PTH} {TWIN}", 1), ("show nowhere --json", 2)):
        done = in_shell(f"bnport {command} {closed}")
        assert done.returncode == code
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["show nowhere.pth --json", f"verify {TWIN} {TWIN}", "--help"])
def test_a_reader_that_went_away_is_no_exception_at_the_interpreters_end(command):
    done = in_shell(f"(sleep 0.3; bnport {command}) | true")
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_prints_by_what_notices_that_it_cannot():
    folder = Path(common.__file__).parent
    texts = {name: (folder / f"{name}.py").read_text() for name in commands()}
    assert [name for name, text in texts.items() if re.search(r"(?<!\w)print\(|sys\.stdout", text)] == []


def test_a_name_that_standard_output_cannot_show_is_no_exit_code_1(tmp_path):
    net = torch.nn.Module()
    net.add_module("b\u00e9", torch.nn.BatchNorm2d(2))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    done = in_shell(f"bnport show {tmp_path / 'net.pth'}", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith("bnport: standard output cannot be written to ('ascii' codec")


def test_json_that_cannot_be_written_is_not_begun(capsys):
    with pytest.raises(ValueError, match="JSON"):
        common.print_json({"a": 1.0, "b": float("nan")})
    assert not capsys.readouterr().out


def test_records_go_out_and_come_back(tmp_path, capsys):
    records, out = tmp_path / "records.safetensors", tmp_path / "out.keras"
    assert main(["convert", PTH, str(records)]) == 0
    assert main(["convert", str(records), TWIN, "-o", str(out)]) == 0
    assert main(["verify", PTH, str(out)]) == 0
    assert "exact" in capsys.readouterr().out


def test_one_format_as_json_is_json(capsys):
    assert main(["formats", "torch", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert ".pth" in said["files"]
    assert "running_var" in said["conventions"]


def test_formats_lists_every_adapter_and_prints_its_table(capsys):
    assert main(["formats"]) == 0
    listed = capsys.readouterr().out
    for name in adapters.names():
        assert name in listed
        assert main(["formats", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_an_unknown_command_lists_the_ones_there_are(capsys):
    with pytest.raises(SystemExit) as done:
        main(["port", "x"])
    assert done.value.code == 2
    assert "convert" in capsys.readouterr().err
    assert parser_of().prog == "bnport"


def test_damaged_files_are_one_line_each(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for original in sorted(DIGITS.glob("*.*")):
        if original.suffix in (".py", ".npz"):
            continue
        data = original.read_bytes()
        for number, damaged in enumerate((b"", data[:10], data[: len(data) // 2], rng.bytes(len(data)))):
            path = tmp_path / f"{number}-{original.name}"
            path.write_bytes(damaged)
            assert main(["show", str(path)]) == 2, path.name
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert str(path) in error


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["convert", PTH, TWIN, "-o", "out.keras"], 0),
        (["convert", PTH, TWIN, "--dry-run", "--json"], 0),
        (["verify", PTH, TWIN], 1),
        (["show", TWIN], 0),
        (["show", TWIN.replace(".keras", ".h5")], 0),
        (["show", PTH, "--no-values"], 0),
        (["show", "nix.pth"], 2),
    ],
)
def test_a_command_as_a_process_ends_with_its_exit_code(words, code, tmp_path):
    """The interpreter's own end belongs to the command: libraries that are torn down in another order can crash there."""
    done = subprocess.run(
        [sys.executable, "-m", "bnport", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_json_of_a_command_that_could_not_run_says_why_and_what_is_open(tmp_path, capsys):
    out = tmp_path / "out.keras"
    assert main(["convert", str(tmp_path / "none.pth"), TWIN, "-o", str(out), "--json"]) == 2
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["ok"] is False
    assert said["error"]["kind"] == "NotFound"
    assert printed.err == f"bnport: {said['error']['message']}\n"
    assert main(["convert", PTH, TWIN, "-o", str(out), "--json", "--skip", "bn2"]) == 0
    out.unlink()
    capsys.readouterr()
    names = tmp_path / "names.toml"
    names.write_text('[pairs]\n"bn1" = "bn3"\n')
    for command in (["convert", PTH, TWIN, "-o", str(out)], ["verify", PTH, TWIN]):
        assert main([*command, "--json", "--map", str(names)]) == 2
        said = json.loads(capsys.readouterr().out)
        assert said["error"]["kind"] == "MatchError"
        assert said["pairing"]["mismatched"][0]["target"] == "bn1"
        assert said["pairing"]["unexpected"] == ["bn1"]
        assert said["pairing"]["ok"] is False
    assert not out.exists()


def test_a_file_that_is_not_there_is_one_line_also_in_place(tmp_path, capsys):
    missing, long = str(tmp_path / "none.keras"), str(tmp_path / ("x" * 300))
    for command in (
        ["convert", PTH, missing, "--in-place"],
        ["convert", missing, TWIN, "--in-place"],
        ["convert", PTH, long, "--in-place"],
        ["restore", missing],
        ["restore", long],
    ):
        if command[2:3] == [TWIN]:
            command[2] = str(shutil.copy(TWIN, tmp_path))
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert any(words in said for words in ("no such file", "File name too long", "nothing to put back"))


def test_an_option_of_the_target_may_be_false_and_its_epsilon_has_its_own_option(capsys):
    assert main(["verify", PTH, PTH, "--target-option", "inplace-abn=false"]) == 0
    assert main(["verify", PTH, PTH, "--target-option", "inplace-abn=True"]) == 1
    assert main(["verify", PTH, PTH, "--target-option", "inplace-abn"]) == 1
    assert main(["verify", PTH, PTH, "--target-option", "epsilon=1e-3"]) == 2
    assert "--target-epsilon" in capsys.readouterr().err


def test_a_safetensors_model_is_never_replaced_by_records_and_may_be_changed_in_place(tmp_path, capsys):
    model, other = tmp_path / "model.safetensors", str(tmp_path / "other.pth")
    shutil.copy(DIGITS / "digits.safetensors", model)
    before = model.read_bytes()
    torch.save({name: value * 1.5 for name, value in torch.load(PTH).items()}, other)
    for more in ([], ["--force"]):
        assert main(["convert", other, str(model), *more]) == 2
        assert "-o OUT" in capsys.readouterr().err
        assert model.read_bytes() == before
    assert main(["convert", other, str(model), "--in-place"]) == 0
    assert main(["verify", other, str(model)]) == 0
    records = str(tmp_path / "records.safetensors")
    assert main(["convert", other, records]) == 0
    assert main(["convert", PTH, records]) == 2
    assert main(["convert", PTH, records, "--force"]) == 0  # records may be
    assert main(["verify", PTH, records]) == 0


@pytest.mark.parametrize("option", [["--only", "gamma"], ["--skip", "bn1"], ["--momentum", "port"], ["--run"]])
def test_options_that_records_do_not_know_are_refused(tmp_path, capsys, option):
    records = tmp_path / "records.safetensors"
    assert main(["convert", PTH, str(records), *option]) == 2
    assert f"{' '.join(option) if option[1:] == ['port'] else option[0]} would do nothing" in capsys.readouterr().err
    assert not records.exists()


def test_source_and_target_in_the_wrong_order_are_asked_about(tmp_path, capsys):
    out = tmp_path / "ported.keras"
    assert main(["convert", TWIN, PTH, "-o", str(out)]) == 2
    assert "are the two the wrong way round?" in capsys.readouterr().err
    assert main(["convert", PTH, TWIN, "-o", str(tmp_path / "out.onnx")]) == 2
    assert "wrong way" not in capsys.readouterr().err
    assert main(["convert", PTH, TWIN]) == 2
    assert "-o OUT" in capsys.readouterr().err


def test_what_is_asked_about_a_target_names_the_options_of_the_target(tmp_path, capsys):
    import keras

    model = keras.Sequential([keras.Input((4, 4, 16)), keras.layers.BatchNormalization(scale=False, name="bn1")])
    target, out = str(tmp_path / "target.weights.h5"), str(tmp_path / "out.weights.h5")
    model.save_weights(target)
    state = {f"bn1.{name}": torch.full((16,), value) for name, value in (("running_mean", 1.5), ("running_var", 2.0))}
    source = str(tmp_path / "source.pth")
    torch.save({**state, "bn1.bias": torch.ones(16)}, source)
    for command in (["convert", source, target, "-o", out], ["verify", source, target], ["map", source, target]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "say --target-option absent=gamma or --target-option absent=beta" in said
        assert "--absent" not in said
    assert main(["convert", source, target, "-o", out, "--target-option", "absent=bn1=gamma"]) == 0
    model.load_weights(out)
    assert model.get_layer("bn1").get_weights()[1].tolist() == [1.5] * 16
    nested, source = str(tmp_path / "two.pth"), PTH
    torch.save({"a": torch.load(PTH), "b": torch.load(PTH)}, nested)
    assert main(["verify", source, nested]) == 2
    assert "choose one with --target-option key=a" in capsys.readouterr().err
    assert main(["verify", source, nested, "--target-option", "key=b"]) == 0
    assert main(["verify", source, TWIN, "--target-epsilon", "1e-3"]) == 2
    assert "--target-epsilon is for sources" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminated_convert_leaves_nothing_behind(tmp_path, how):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from bnport import outcome\n"
        "from bnport.cli import main\n"
        "outcome.Outcome.written = lambda *_: time.sleep(600)\n"  # the copy is there, and is being checked
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["convert", PTH, TWIN, "-o", str(tmp_path / "out.keras")]
    running = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (temporary,) = tmp_path.iterdir()
    time.sleep(0.3)
    running.send_signal(how)
    _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (2, "bnport: interrupted; no file is half-written\n")
    assert not temporary.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_before_an_interruption_is_said(monkeypatch, tmp_path, capsys):
    out = str(tmp_path / "out.keras")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnport.cli.common.say", interrupted)
    assert main(["convert", PTH, TWIN, "-o", out]) == 2
    assert capsys.readouterr().err == f"bnport: interrupted; no file is half-written; {out} is written\n"


def test_a_wrong_argument_is_said_as_json_too(capsys):
    for arguments in (["show", "--json"], ["convert", PTH, TWIN, "--json", "--epsilon", "much"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert json.loads(said.out)["error"]["message"] in said.err


def test_a_fault_of_bnport_is_not_the_exit_code_of_a_difference(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr("bnport.adapters.read", broken)
    assert main(["show", PTH]) == 2
    assert capsys.readouterr().err.endswith(
        "RuntimeError: a fault\nbnport: this is a fault in bnport; please report it, with the lines above\n"
    )
