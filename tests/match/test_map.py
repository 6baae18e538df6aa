"""The map file: written, reviewed, read again; and what it refuses."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from bnport import mapfile
from bnport.cli import main
from bnport.errors import FormatError, MatchError, NotFound
from bnport.layer import Kernel
from bnport.match import match
from bnport.match.compress import compress
from bnport.match.patterns import expand
from tests.match.making import chain, layer, layers

pytestmark = pytest.mark.core

DIGITS = pathlib.Path(__file__).parents[2] / "fixtures" / "digits"


def resnet50():
    """(target -> source) of keras.applications' ResNet50 and torchvision's resnet50."""
    pairs = {"conv1_bn": "bn1"}
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            for k in (1, 2, 0, 3) if block == 0 else (1, 2, 3):
                last = f"bn{k}" if k else "downsample.1"
                pairs[f"conv{stage + 2}_block{block + 1}_{k}_bn"] = f"layer{stage + 1}.{block}.{last}"
    return pairs


def test_a_resnet50_is_a_few_lines_that_say_the_same_53_pairs():
    pairs = resnet50()
    written = compress(pairs, list(pairs))
    assert len(pairs) == 53
    assert len(written) == 3
    assert {t: s for t, (s, _) in expand(written, pairs, pairs.values()).items()} == pairs


def test_letters_factors_and_any_text_are_understood():
    assert expand({"block{i}{j:a}_bn": "blocks.{i-1}.{j}.bn2"}, ["block2c_bn"], ["blocks.1.2.bn2"])
    assert expand({"bn_{i}": "f.{3*i+1}.bn"}, ["bn_2"], ["f.7.bn"])
    assert expand({"backbone/{rest:any}": "{rest}.x"}, ["backbone/a/b"], ["a/b.x"])
    assert expand({"b{{{i}": "{{{i}}}"}, ["b{4"], ["{4}"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"nobody": "a"}, "no target layer is called nobody"),
        ({"nobody{i}": "a{i}"}, r"no target layer is left for nobody\{i\}"),
        ({"x1": "ghost"}, "no such layer: x1 = ghost"),
        ({"x{i}": "ghost{i}"}, "no such layer: x1 = ghost1"),
        ({"x1": "a1", "x2": "a1"}, "'a1' is asked for twice, by x1 and x2"),
        ({"x{i}": "a1"}, "asked for twice"),
        ({"x{i}": "a{j}"}, r"uses \{j\}"),
        ({"x{i+1}": "a{i}"}, "arithmetic belongs on the source side"),
        ({"x{": "a"}, "brace that is no variable"),
        ({"x{i}": "a}"}, "brace that is no variable"),
        ({"{i:a}{j}": "a{j}", "{i:a}{k}": "b{k}"}, "equally well"),
        ({"x1": "a1", "x2": "a2", "x{i}": "a{i}"}, r"no target layer is left for x\{i\}"),
    ],
)
def test_a_map_that_names_nothing_or_one_layer_twice_is_refused(entries, message):
    with pytest.raises(MatchError, match=message):
        expand(entries, ["x1", "x2"], ["a1", "a2", "b1", "b2"])


def test_what_is_written_is_read_back_as_the_same_pairs():
    sources, targets = chain([f"a.{i}" for i in range(5)]), chain([f'x"{i}\\' for i in range(5)])
    found = match(sources, targets)
    text = mapfile.text(found, sources, targets)
    assert "5 layers: " in text
    assert "same place in the graph" in text


def test_open_questions_are_written_as_comments(tmp_path):
    sources = layers(layer("s"), layer("r"), layer("extra\x1b", 3))
    targets = layers(layer("x"), layer("y"), layer("other", 4))
    path = tmp_path / "names.toml"
    path.write_text(mapfile.text(match(sources, targets), sources, targets))
    text = path.read_text()
    assert '# "x" = "s" or "r"' in text
    assert '#     "other",' in text
    assert "\x1b" not in text
    assert mapfile.read_map(str(path)) == ({}, [])


def test_guesses_are_comments_and_certain_pairs_are_entries(tmp_path):
    def guessed(name, *shape):
        return layer(name, shape[0]).but(kernel=Kernel("conv", shape, f"{name}.conv", guessed=True))

    sources = layers(
        *(guessed(f"s{i}", 4, 4, 3, 3) for i in (1, 0)), guessed("s2\x1b", 4, 3, 3, 3), guessed("w", 5, 4, 3, 3)
    )
    targets = layers(
        *(layer(f"x{i}", 4, (4, 4, 3, 3)) for i in range(2)), layer("y", 4, (4, 3, 3, 3)), layer("own", 5, (5, 4, 3, 3))
    )
    path = tmp_path / "names.toml"
    path.write_text(mapfile.text(match(sources, targets), sources, targets))
    assert mapfile.read_map(str(path)).pairs == {"own": "w"}
    likely = path.read_text().partition("# LIKELY")[2].splitlines()
    assert [line for line in likely if line.startswith('# "y" = "s2\\u001b"  # the only 4-channel layer fed by a 3x3 ')]
    confirmed = path.read_text().replace('# "y"', '"y"').replace("[pairs]", "").replace("# LIKELY", "[pairs]\n# LIKELY")
    path.write_text(confirmed.replace('"own"', '# "own"'))
    assert mapfile.read_map(str(path)).pairs == {"y": "s2\x1b"}


def test_layers_that_were_left_out_are_in_the_file(tmp_path):
    sources, targets = layers(layer("a"), layer("head", 3)), layers(layer("x"))
    path = tmp_path / "names.toml"
    path.write_text(mapfile.text(match(sources, targets, skip=["head"]), sources, targets))
    pairs, skip = mapfile.read_map(str(path))
    match(sources, targets, map=pairs, skip=skip).raise_if_bad()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pairs", "not a map file"),
        ("pairs = 1", r"\[pairs\] and \[skip\] are tables"),
        ("[pairs]\na.b = 'c'", "both quoted"),
        ("[pairs]\na = 1", "both quoted"),
        ("[skip]\nlayers = 'a'", r"layers = \["),
        ("[skip]\nnames = []", r"layers = \["),
        ("[paris]\n", "unknown part 'paris'"),
        ("[pairs]\na = 'b'\na = 'c'", "not a map file"),
        ("a = " + "[" * 100000, "not a map file"),
        ("\x00", "not a map file"),
    ],
)
def test_a_file_that_is_no_map_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "names.toml"
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        mapfile.read_map(str(path))
    assert "names.toml" in str(caught.value)


def test_a_map_that_is_not_utf8_or_not_there_is_refused(tmp_path):
    path = tmp_path / "names.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not a map file"):
        mapfile.read_map(str(path))
    with pytest.raises(NotFound, match="no such file"):
        mapfile.read_map(str(tmp_path / "none.toml"))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (os.devnull, str(tmp_path), str(tmp_path / "pipe")):
        with pytest.raises(FormatError, match="not a regular file"):
            mapfile.read_map(path)


def test_the_command_writes_a_file_that_convert_takes(tmp_path, capsys):
    names, out = str(tmp_path / "names.toml"), str(tmp_path / "out.keras")
    source, target = str(DIGITS / "digits.pth"), str(DIGITS / "twin.keras")
    assert main(["map", source, target, "-o", names]) == 0
    assert mapfile.read_map(names).pairs == {"bn{i}": "bn{i}"}
    assert main(["convert", source, target, "-o", out, "--map", names]) == 0
    assert main(["map", source, target, "-o", names]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["map", source, target, "-o", source, "--force"]) == 2


def test_the_command_ends_with_1_if_questions_are_open(tmp_path, capsys):
    names = tmp_path / "names.toml"
    names.write_text('[pairs]\n"bn2" = "bn3"\n"bn3" = "bn2"\n')
    source, target = str(DIGITS / "digits.pth"), str(DIGITS / "twin.keras")
    assert main(["map", source, target, "--map", str(names)]) == 0
    assert '"bn3" = "bn2"' in capsys.readouterr().out
    assert main(["map", source, target, "--skip", "bn1", "--map", str(names)]) == 0
    names.write_text('[pairs]\n"bn1" = "bn2"\n')
    assert main(["map", source, target, "--map", str(names)]) == 1
    assert "# OPEN" in capsys.readouterr().out


def test_json_of_the_command_holds_the_pairs_their_evidence_and_what_is_open(tmp_path, capsys):
    source, target, names = str(DIGITS / "digits.pth"), str(DIGITS / "twin.keras"), str(tmp_path / "names.toml")
    assert main(["map", source, target, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(p["target"], p["source"], p["guessed"]) for p in said["pairs"]] == [
        (n, n, False) for n in ("bn1", "bn2", "bn3")
    ]
    assert said["map"].startswith("# Which layer of")
    (tmp_path / "some.toml").write_text('[pairs]\n"bn1" = "bn2"\n')
    assert main(["map", source, target, "--json", "-o", names, "--map", str(tmp_path / "some.toml")]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["out"]) == (False, names)
    assert said["mismatched"] == [{"target": "bn1", "source": "bn2", "target_channels": 16, "source_channels": 32}]
