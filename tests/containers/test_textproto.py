"""Protocol buffers' text format: what google.protobuf's own parser makes of it is what we make of it, or we refuse."""

from __future__ import annotations

import random
import time

import pytest
from google.protobuf import text_format

from bnport.containers import textproto
from bnport.containers.textproto import Message, Word, parse, read
from bnport.errors import FormatError
from tests.adapters.caffe_files import T


def plain(message):
    return [(name, plain(value) if isinstance(value, Message) else value) for name, value in message.pairs]


GOOD = [
    'name: "net" # comment "with" {\n layer { name: "a" type: "b" }',
    "layer { name: 'a' bottom: 'x' bottom: 'y' top: 'z' phase: 1 }",
    'layer: { name: "a" } layer < name: "b" > layer: < name: "c" >; layer { name: "d" },',
    'layer { bottom: ["x", "y"] convolution_param { kernel_size: [3, 5], num_output: 7; group: -2 } }',
    'layer { name: "one" \' two\' "three" }',
    'layer { name: "tab\\t quote\\" octal \\344\\270\\255 hex \\x41 slash\\\\" }',
    "layer { batch_norm_param { eps: 1e-5 use_global_stats: true moving_average_fraction: .5 } }",
    "layer { batch_norm_param { eps: 2.5E-3f use_global_stats: False moving_average_fraction: -0.25 } }",
    "#only a comment",
    "",
    "layer{name:'a'type:'b'}layer{}",
    'input: "data"\ninput_shape { dim: 1 dim: 3 }',
]


@pytest.mark.parametrize("text", GOOD)
def test_text_that_googles_parser_reads_is_read_to_the_same_values(text):
    theirs = text_format.Parse(text, T["NetParameter"]())
    ours = parse(text)
    assert [m.text("name") or "" for m in ours.messages("layer")] == [one.name for one in theirs.layer]
    assert ours.texts("input") == list(theirs.input)
    for mine, yours in zip(ours.messages("layer"), theirs.layer, strict=True):
        assert mine.texts("bottom") == list(yours.bottom)
        assert (mine.integer("phase") or 0) == yours.phase
        for inner in mine.messages("batch_norm_param"):
            assert T["BatchNormParameter"](eps=inner.number("eps")).eps == yours.batch_norm_param.eps
            assert inner.truth("use_global_stats") == yours.batch_norm_param.use_global_stats
            assert inner.number("moving_average_fraction") == yours.batch_norm_param.moving_average_fraction
        for inner in mine.messages("convolution_param"):
            assert [int(n) for n in inner.texts("kernel_size")] == list(yours.convolution_param.kernel_size)
            assert inner.integer("group") == yours.convolution_param.group


BAD = [
    "layer {", "layer }", "layer { name: }", 'layer { name "a" }', 'layer { name: "a }', "layer { < }", "layer: [", "a: b c",
    'layer { bottom: ["x" "y" }', "{ }", ": 1", 'layer { name: "a" > }', "layer { [a.b]: 1 }", "layer @",
    "layer { name: 'a\n' }", 'layer { bottom: ["x",] }', "1: 2", "a: - ", "layer",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_text_that_googles_parser_refuses_is_refused_with_file_and_line(text):
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, T["NetParameter"]())
    with pytest.raises(FormatError, match=r"^some\.prototxt: line [12]: "):
        parse(text, "some.prototxt")


def test_messages_name_the_line_of_what_is_wrong():
    text = 'name: "x"\n\n# one\nlayer {\n  batch_norm_param {\n    eps: maybe\n  }\n}\n'
    inner = parse(text, "net.prototxt").messages("layer")[0].messages("batch_norm_param")[0]
    with pytest.raises(FormatError, match=r"net\.prototxt: line 5: eps should be a finite number, it is 'maybe'"):
        inner.number("eps")


@pytest.mark.parametrize(
    ("text", "reader"),
    [
        ("a: 1 a: 2", "text"), ("a { }", "text"), ("a: 1", "messages"), ("a: '1'", "integer"), ("a: 1.5", "integer"),
        ("a: nan", "number"), ("a: inf", "number"), ("a: '1'", "number"), ("a: 0x10", "number"), ("a: TRUE", "truth"),
        ("a: 2", "truth"), (f"a: {'9' * 5000}", "integer"), (f"a: {'9' * 5000}", "number"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(text, reader):
    with pytest.raises(FormatError, match="line 1: a "):
        getattr(parse(text), reader)("a")


def test_nesting_and_size_are_bounded_and_hostile_text_costs_linear_time(tmp_path, monkeypatch):
    started = time.process_time()
    for text in (
        "a{" * 101, "a{" * 100_000, "#" * 300_000, "# #" * 100_000 + '"', " " * 1_000_000 + "@", '"' + "\\" * 300_001,
        "a: '" + "\\x" * 150_000, "- " * 200_000, "a:" * 100_000, "a: - " + " " * 300_000 + "@", "a" * 1_000_000,
        "[" * 100_000, "a: [" + "1," * 100_000, "<" * 100_000,
    ):  # fmt: skip
        try:
            parse(text)
        except FormatError as error:
            assert len(str(error)) < 300
    assert time.process_time() - started < 5
    assert parse("a{" * 99 + "}" * 99).messages("a")
    path = tmp_path / "big.prototxt"
    path.write_text("#" * 101)
    monkeypatch.setattr(textproto, "LARGEST_FILE", 100)
    with pytest.raises(FormatError, match=r"big\.prototxt: 101 bytes of prototxt; the limit is 100"):
        read(str(path))


def test_files_with_a_byte_order_mark_and_comments_in_any_encoding_are_read(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_bytes(b'\xef\xbb\xbfname: "n" # \xd6\xd0\xce\xc4\r\nlayer { name: "\xd6\xd0\\326" }')
    message = read(str(path))
    assert message.text("name") == "n"
    assert message.messages("layer")[0].text("name") == "\\xd6\\xd0\\xd6"


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08\x03\x12\x04", r"line 1: '\x08\x03\x12\x04' is not text format; by its first bytes it is no text"),
        (b"<html></html>", "; by its first bytes it is a web page: the download failed"),
        (b"PK\x03\x04" + bytes(40), "; by its first bytes it is a zip archive"),
    ],
)
def test_a_file_that_is_no_text_format_is_called_what_it_is(data, message, tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        textproto.read(str(path))
    assert message in str(caught.value)


def test_mutated_text_is_read_or_refused_and_nothing_else():
    random_ = random.Random(5)
    pieces = [
        "{",
        "}",
        "<",
        ">",
        ":",
        "[",
        "]",
        ",",
        ";",
        '"',
        "'",
        "\\",
        "#",
        "\n",
        " ",
        "-",
        "a",
        "1e5",
        "\x00",
        "é",
        "name",
    ]
    whole = "\n".join(GOOD)
    for _ in range(2000):
        text = list(random_.choice((whole, random_.choice(GOOD))))
        for _ in range(random_.randrange(1, 6)):
            at = random_.randrange(len(text) + 1)
            text[at : at + random_.randrange(3)] = random_.choice(pieces)
        try:
            message = parse("".join(text))
        except FormatError as error:
            assert str(error).isprintable()
        else:
            assert isinstance(plain(message), list)
            assert all(isinstance(value, str | Word | Message) for _, value in message.pairs)
