"""The wire reader against Google's own parser, splicing against Google's own serialiser, and damage of every kind."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from google.protobuf import empty_pb2, unknown_fields
from google.protobuf.internal import decoder, encoder
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from bnport.containers import protobuf as wire
from bnport.containers.files import ReadFile
from bnport.errors import FormatError

UNSIGNED = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 127, 128, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
NUMBER = st.integers(1, 15) | st.integers(16, 2047) | st.integers(2048, 2**29 - 1)


@st.composite
def messages(draw):
    """Bytes of a message, made by Google's encoders."""
    out = bytearray()
    for _ in range(draw(st.integers(0, 8))):
        number, kind = draw(NUMBER), draw(st.sampled_from([0, 1, 2, 5]))
        out += encoder.TagBytes(number, kind)
        if kind == 0:
            out += encoder._VarintBytes(draw(UNSIGNED))
        elif kind == 2:
            data = draw(st.binary(max_size=300))
            out += encoder._VarintBytes(len(data)) + data
        else:
            size = 8 if kind == 1 else 4
            out += draw(st.binary(min_size=size, max_size=size))
    return bytes(out)


def google(data):
    """(number, wire type, value) as Google's parser sees them; None where it refuses the message."""
    empty = empty_pb2.Empty()
    try:
        empty.ParseFromString(data)
    except DecodeError:
        return None
    found = []
    for field in unknown_fields.UnknownFieldSet(empty):
        value = field.data
        if field.wire_type in (1, 5):
            value = int(value).to_bytes(8 if field.wire_type == 1 else 4, "little")
        found.append((field.field_number, field.wire_type, value))
    return found


def ours(buffer):
    return [
        (number, kind, value if isinstance(value, int) else buffer.read(value))
        for number, kind, value in wire.fields(buffer)
    ]


@given(messages())
@settings(max_examples=200)
def test_every_field_is_what_googles_parser_sees(data):
    assert ours(wire.Buffer(data)) == google(data)


@given(messages())
@settings(max_examples=60)
def test_a_file_reads_like_its_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("wire") / "message"
    path.write_bytes(data)
    assert ours(wire.Buffer(ReadFile(str(path)))) == ours(wire.Buffer(data))


@given(messages(), st.data())
@settings(max_examples=300)
def test_damage_is_refused_or_read_exactly_as_google_reads_it(data, draw):
    mutant = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        if mutant:
            mutant[draw.draw(st.integers(0, len(mutant) - 1))] = draw.draw(st.integers(0, 255))
    mutant = bytes(mutant[: draw.draw(st.integers(0, len(mutant)))])
    try:
        found = ours(wire.Buffer(mutant))
    except FormatError as error:
        assert str(error).startswith("message: byte ")
    else:
        assert found == google(mutant)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08" + b"\xff" * 10 + b"\x01", "more than ten bytes"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08\x80", "ends inside"),
        (b"\x08", "ends inside"),
        (b"\x0b\x0c", "wire type 3, a group"),
        (b"\x0c", "wire type 4, a group"),
        (b"\x0e", "wire type 6, no wire type"),
        (b"\x00\x01", "field number 0"),
        (b"\x0a\x05abcd", "should be 5 bytes, its message has 4 left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "its message has 0 left"),
        (b"\x0d\x00\x00\x00", "past the end"),
        (b"\x09\x00\x00\x00\x00\x00\x00\x00", "past the end"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "field number"),
    ],
)
def test_bad_wire_data_is_refused_with_the_byte_and_the_reason(data, why):
    with pytest.raises(FormatError, match=why) as caught:
        list(wire.fields(wire.Buffer(data, "model.onnx")))
    assert "model.onnx: byte " in str(caught.value)
    strict = ("group", "field number 0", "64 bits")  # which Google's parser lets through in one form or another
    assert google(data) is None or any(each in why for each in strict)


def test_messages_nested_deeper_than_protobufs_own_limit_are_refused():
    data = b""
    for _ in range(300):
        data = wire.encoded(1, data)
    buffer = wire.Buffer(data)
    span = (0, len(data))
    for depth in range(wire.MAX_DEPTH + 1):
        ((_, _, span),) = wire.fields(buffer, span[0], sum(span), depth)
    with pytest.raises(FormatError, match="nested more than 100 deep"):
        list(wire.fields(buffer, span[0], sum(span), wire.MAX_DEPTH + 1))


def test_a_message_that_should_end_past_the_end_is_refused():
    with pytest.raises(FormatError, match="should end at 9"):
        list(wire.fields(wire.Buffer(b"abc"), 0, 9))


@given(st.integers(-(2**63), 2**64 - 1))
def test_varints_are_those_of_googles_encoder_and_signs_come_back(value):
    data = wire.encoded_varint(value)
    assert data == encoder._VarintBytes(value & (2**64 - 1))
    ((_, _, read),) = wire.fields(wire.Buffer(b"\x08" + data))
    assert wire.signed(read) == decoder._DecodeSignedVarint(data, 0)[0]
    assert wire.signed(read, 32) == np.uint64(value & (2**64 - 1)).astype(np.uint32).astype(np.int32)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_repeated_integers_are_read_packed_and_one_by_one(values):
    for packed in (True, False):
        tensor = onnx.AttributeProto(ints=values).SerializeToString()
        if packed:
            tensor = wire.encoded(8, b"".join(wire.encoded_varint(v) for v in values))
            assert list(onnx.AttributeProto.FromString(tensor).ints) == values
        buffer = wire.Buffer(tensor)
        found = []
        for _, kind, value in wire.fields(buffer):
            found += wire.varints(buffer, kind, value)
        assert found == values


def test_more_integers_than_the_limit_are_refused_before_they_are_read():
    data = wire.encoded(1, bytes(1000))
    ((_, kind, value),) = wire.fields(wire.Buffer(data))
    with pytest.raises(FormatError, match="limit is 10"):
        wire.varints(wire.Buffer(data), kind, value, 10)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=6), st.integers(0, 30))
def test_repeated_floats_are_read_packed_one_by_one_and_mixed(runs, gap):
    """As Google reads them into float_data; other fields may lie between."""
    random, data = np.random.default_rng(0), b""
    for packed, count in runs:
        values = random.normal(size=count).astype("<f4")
        if packed:
            data += wire.encoded(4, values.tobytes())
        else:
            data += b"".join(wire.encoded(4, float(v)) for v in values)
        data += wire.encoded(12, "x" * gap)
    buffer = wire.Buffer(data)
    numbers = wire.Numbers(buffer, 4)
    for number, kind, value in wire.fields(buffer):
        if number == 4:
            numbers.add(kind, value)
    expected = np.array(onnx.TensorProto.FromString(data).float_data, "<f4")
    assert numbers.count == len(expected)
    assert numbers.read() == expected.tobytes()


def test_numbers_of_another_width_are_refused():
    for data in (wire.encoded(4, b"12345"), wire.encoded(4, 7), b"\x21" + bytes(8)):
        buffer = wire.Buffer(data)
        ((_, kind, value),) = wire.fields(buffer)
        with pytest.raises(FormatError):
            wire.Numbers(buffer, 4).add(kind, value)


def test_a_4_gb_message_is_walked_by_reading_a_few_kilobytes(tmp_path, monkeypatch):
    """A sparse file: 40 tensors of 100 MB that are holes; only tags and lengths are read."""
    path = tmp_path / "big"
    with open(path, "wb") as file:
        for _ in range(40):
            file.write(wire.encoded_varint(5 << 3 | 2) + wire.encoded_varint(100 << 20))
            file.seek(100 << 20, os.SEEK_CUR)
        file.write(wire.encoded(8, "the end"))
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda d, n, o: read.append(n) or pread(d, n, o))
    buffer = wire.Buffer(ReadFile(str(path)))
    found = list(wire.fields(buffer))
    assert len(found) == 41
    assert buffer.text(found[-1][2]) == "the end"
    assert sum(read) < 100_000


def test_names_that_are_no_utf8_or_too_long_do_not_get_through_as_they_are():
    buffer = wire.Buffer(wire.encoded(1, b"bn\xff\x1b[2J"))
    ((_, _, span),) = wire.fields(buffer)
    assert buffer.text(span) == "bn\\xff\x1b[2J"
    with pytest.raises(FormatError, match="limit is 4"):
        buffer.text(span, limit=4)


# ---- splicing


def sample():
    """A model with a tensor three messages deep and unknown fields."""
    nodes = [helper.make_node("Relu", ["x"], ["y"], name=f"n{k}", alpha=float(k)) for k in range(4)]
    tensors = [helper.make_tensor(f"t{k}", 1, [3], [1.0, 2.0, float(k)]) for k in range(4)]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors))
    return model.SerializeToString() + wire.encoded(999, b"no schema knows this")


def inner(buffer, number, span=None, path=()):
    """The messages in one field of a message."""
    start, end = (0, buffer.size) if span is None else (span[0], sum(span))
    return [v for n, _, v in wire.fields(buffer, start, end, len(path)) if n == number]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["node", "initializer", "attribute", "graph"]),
                          st.integers(0, 40_000)), max_size=6))  # fmt: skip
@settings(max_examples=60)
def test_a_splice_is_what_google_makes_of_the_same_change(tmp_path_factory, changes):
    data = sample()
    buffer = wire.Buffer(data)
    expected = onnx.ModelProto.FromString(data)
    (graph,) = inner(buffer, 7)
    edits = []
    for k, where, length in changes:
        text = "z" * length
        if where == "graph":
            path, target, field = (graph,), expected.graph, 10
        elif where == "initializer":
            path, target, field = (graph, inner(buffer, 5, graph)[k]), expected.graph.initializer[k], 12
        else:
            node = inner(buffer, 1, graph)[k]
            path, target, field = (graph, node), expected.graph.node[k], 6
            if where == "attribute":
                path, target, field = (*path, inner(buffer, 5, node)[0]), target.attribute[0], 13
        target.doc_string = text
        edits.append(wire.Edit(sum(path[-1]), sum(path[-1]), wire.encoded(field, text), path))
    got = wire.spliced(buffer, edits)
    assert onnx.ModelProto.FromString(got) == expected
    folder = tmp_path_factory.mktemp("splice")
    (folder / "in").write_bytes(data)
    wire.splice(wire.Buffer(ReadFile(str(folder / "in"))), edits, str(folder / "out"))
    assert (folder / "out").read_bytes() == got


def test_a_splice_that_changes_no_length_changes_only_those_bytes():
    data = sample()
    buffer = wire.Buffer(data)
    (graph,) = inner(buffer, 7)
    tensor = inner(buffer, 5, graph)[2]
    (numbers,) = inner(buffer, 4, tensor)
    new = np.float32([7, 8, 9]).tobytes()
    got = wire.spliced(buffer, [wire.Edit(numbers[0], sum(numbers), new, (graph, tensor))])
    assert got == data[: numbers[0]] + new + data[sum(numbers) :]


def test_a_length_that_grows_by_a_byte_grows_every_length_around_it():
    """127 -> 128 bytes at each of three depths at once."""
    innermost = wire.encoded(3, "a" * (127 - 2 - 2 - 2))
    data = wire.encoded(1, wire.encoded(2, innermost))
    buffer = wire.Buffer(data)
    first = inner(buffer, 1)[0]
    second = inner(buffer, 2, first)[0]
    third = inner(buffer, 3, second)[0]
    got = wire.spliced(buffer, [wire.Edit(third[0], sum(third), b"b" * 200, (first, second, third))])
    assert got == wire.encoded(1, wire.encoded(2, wire.encoded(3, "b" * 200)))


def test_fields_are_cut_out_whole():
    data = sample()
    buffer = wire.Buffer(data)
    (graph,) = inner(buffer, 7)
    spans = [(first, last) for number, first, last in wire.extents(buffer, graph[0], sum(graph)) if number == 5]
    got = wire.spliced(buffer, [wire.Edit(first, last, b"", (graph,)) for first, last in spans])
    expected = onnx.ModelProto.FromString(data)
    del expected.graph.initializer[:]
    assert onnx.ModelProto.FromString(got) == expected
    assert [first for _, first, _ in wire.extents(buffer, *(0, buffer.size))][1:] == [
        last for _, _, last in wire.extents(buffer, 0, buffer.size)
    ][:-1]
    for value in inner(buffer, 5, graph):
        assert wire.field_start(buffer, value, 5) in [first for first, _ in spans]


def test_overlapping_edits_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="overlap"):
        wire.spliced(wire.Buffer(bytes(10)), [wire.Edit(0, 5, b""), wire.Edit(4, 6, b"")])
