"""Our pickle reader against the standard one where that is harmless, and against pickles made to harm."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import random
import string
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnport.containers import pickle as ours
from bnport.containers.pickle import Global, Node, Opaque, Persistent, load
from bnport.containers.pickle_opcodes import TABLE
from bnport.errors import BnportError, FormatError

pytestmark = pytest.mark.core


def read(data, **more):
    value, end = load(data, "x.pt", **more)
    assert end == len(data)
    return value


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=80)
@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_reads_as_the_standard_reader_reads_it(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet=string.printable),
        lambda inner: st.lists(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    ),
    st.sampled_from([0, 1, 2]),
)
def test_the_old_protocols_read_as_the_standard_reader_reads_them(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


def test_sets_bytes_and_large_values_of_every_length():
    value = [{1, "a"}, frozenset([2]), bytearray(b"xyz"), "t" * 300, b"b" * 300, "é" * 70_000, 2**2000, -(2**31), 65536]
    assert read(pickle.dumps(value, 5)) == value


def test_python_2_strings_are_text_where_they_are_utf8():
    assert read(b"U\x03abc.") == "abc"
    assert read(b"T\x02\0\0\0\xc3\xa9.") == "é"
    assert read(b"U\x01\xff.") == b"\xff"
    assert read(b"S'it\\'s'\n.") == "it's"
    assert read(b'S"\\x41"\n.') == "A"


def test_several_pickles_in_one_run_of_bytes_are_read_one_after_another():
    data = pickle.dumps(1) + pickle.dumps("two")
    value, at = load(data, "x")
    assert value == 1
    assert load(data, "x", at) == ("two", len(data))


def test_every_opcode_of_the_standard_table_is_known_or_refused_on_purpose():
    refused = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    unknown = {o.name for o in pickletools.opcodes if TABLE[ord(o.code)].__name__ == "_unknown"} - {"STOP"}
    assert unknown == refused


# ---- what would have run code


class Thing:
    def __init__(self):
        self.a = [1, 2]
        self.b = {"k": collections.OrderedDict(z=1)}


def test_an_object_is_a_node_with_its_state():
    for protocol in (2, 4):
        node = read(pickle.dumps(Thing(), protocol))
        assert isinstance(node, Node)
        assert node.path.endswith("test_pickle.Thing")
        assert node.state["a"] == [1, 2]
        assert node.state["b"]["k"].path == "collections.OrderedDict"
        assert node.state["b"]["k"].items == {"z": 1}
    old = read(pickle.dumps(Thing(), 0))
    assert old.path == "copy_reg._reconstructor"
    assert old.args[0].path.endswith("test_pickle.Thing")
    assert old.state["a"] == [1, 2]


def test_a_global_is_a_name_and_persistent_ids_are_asked_of_the_reader():
    assert read(pickle.dumps(os.getcwd, 2)).path == f"{os.getcwd.__module__}.getcwd"
    assert read(b"Vname\nQ.").id == "name"
    assert read(b"Pname\n.", persistent=lambda id: [id]) == ["name"]


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_called_by_any_opcode_that_could_call(tmp_path):
    canary = str(tmp_path / "canary")
    quoted = canary.encode()
    attempts = [
        *(pickle.dumps(Exploit(canary), p) for p in range(6)),
        b"(S'" + quoted + b"'\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nS'" + quoted + b"'\no.",  # OBJ
        b"\x80\x02cos\nmkdir\n(V" + quoted + b"\nt\x81.",  # NEWOBJ
        b"\x80\x04cos\nmkdir\n(V" + quoted + b"\nt}\x92.",  # NEWOBJ_EX
        b"cbuiltins\neval\n(V__import__('os').mkdir('" + quoted + b"')\ntR.",
        b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntR(V" + quoted + b"\ntR.",  # through another call's result
    ]
    for data in attempts:
        value, _ = load(data, "x")
        assert isinstance(value, Node)
    assert not os.path.exists(canary)
    pickle.loads(attempts[2])  # the canary does sing for the standard reader
    assert os.path.exists(canary)


def test_reading_a_hostile_pickle_imports_nothing():
    data = b"cantigravity\nfly\n(tR." + b"cthis\ns\n."
    code = (
        "import sys; from bnport.containers.pickle import load\n"
        f"value, at = load({data!r}, 'x'); load({data!r}, 'x', at)\n"
        "print([m for m in ('this', 'antigravity', 'pickle', '_pickle', 'copyreg.x') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_state_cannot_be_set_on_anything_but_an_object():
    for data in (b"cos\nmkdir\n}b.", b"]}b.", b"}}b.", b"Vx\n}b.", b"cos\nmkdir\n)R}b}b."):
        with pytest.raises(FormatError, match="sets the state"):
            load(data, "x.pt")


# ---- malformed


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"0.", b"1.", b"a.", b"s.", b"u.", b"t.", b"\x85.", b"\x87.", b"R.", b"b.", b"h\x05.",
        b"j\xff\xff\xff\xff.",
        b"g9\n.", b"X\xff\xff\xff\xff.", b"\x8d" + b"\xff" * 8 + b".", b"\x8e" + b"\xff" * 8 + b".", b"\x8b\xff\xff\xff\x7f.",
        b"\x80\x09.", b"\x82\x01.", b"\x97.", b"Ix\n.", b"Fabc\n.", b"L9Lz\n.", b"S'abc\n.", b"Sabc\n.", b"X\x01\0\0\0\xff.",
        b"}(K\x01u.", b"]K\x01K\x02s.", b"}]K\x01s.", b"K\x01K\x02R.", b"cos\nmkdir\nK\x01R.", b"K\x01K\x02\x93.", b"\xff.",
        b"Vabc", b"\x95\x01", b"(K\x01", b"\x8f(]\x90.", b"(]\x91.", b"L" + b"9" * 5000 + b"L\n.", b"]]a",
    ],
)  # fmt: skip
def test_malformed_pickles_are_refused_in_one_line_that_names_the_file(data):
    with pytest.raises(FormatError, match=r"x\.pt: the pickle") as caught:
        load(data, "x.pt")
    assert str(caught.value).isprintable()


def test_a_key_that_occurs_twice_is_refused():
    with pytest.raises(FormatError, match="key twice"):
        load(b"}(Va\nK\x01Va\nK\x02u.", "x.pt")


def test_keys_that_are_dear_to_hash_are_not_hashed():
    nested = b"K\x01" + b"\x85" * 100_000  # a tuple in a tuple in ...: hashing it would overflow the stack
    (key,) = read(b"}" + nested + b"K\x01s.")
    assert isinstance(key, Opaque)
    doubling = b"K\x01" + b"2\x86" * 60  # t = (t, t), 60 times: hashing it would take 2**60 steps
    (key,) = read(b"}" + doubling + b"K\x01s.")
    assert isinstance(key, Opaque)
    collide = b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"K\x01" for k in range(1, 20_000))
    started = time.process_time()
    assert len(read(b"}(" + collide + b"u.")) == 19_999
    assert time.process_time() - started < 5


# ---- bombs


def bombs():
    yield "nesting", b"]" * 100_000 + b"a" * 99_999 + b"."
    yield "marks", b"(" * 5_000_000
    yield "dicts", b"}" * 5_000_000 + b"."
    yield "sets", b"\x8f" * 5_000_000 + b"."
    yield "memo", b"K\x01" + b"\x94" * 6_000_000 + b"."
    yield "memo index", b"K\x01r\xff\xff\xff\xff."
    yield "billion laughs", b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(100)) + b"."
    yield "nodes", b"cos\nmkdir\nq\x00" + b"h\x00)R" * 2_000_000 + b"."
    yield "endless", b"NN0" * 4_000_000 + b"."
    yield "declared text", b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc"
    yield "nested nodes", b"cos\nmkdir\n" + b")R" * 500_000 + b"."
    yield (
        "wide text",
        b"X" + struct.pack("<I", 60 << 20) + b"a" * ((60 << 20) - 4) + "\U0001f600".encode() + b".",
    )
    yield "floats", b"G" + bytes(8) + b"G\x3f\xf0\0\0\0\0\0\0" * 5_900_000 + b"."


@pytest.mark.parametrize("name", [name for name, _ in bombs()])
def test_a_bomb_is_read_or_refused_within_the_limits(tmp_path, name):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(dict(bombs())[name])
    code = (
        "import resource, sys, time\n"
        "from bnport.containers.pickle import load; import bnport.containers.pickle_opcodes\n"
        "from bnport.errors import FormatError\n"
        f"data = open({str(path)!r}, 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; clock = time.process_time()\n"
        "try:\n    value = load(data, 'x'); del value\n"
        "except FormatError as error:\n    pass\n"
        "print(time.process_time() - clock, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    seconds, mebibytes = map(float, done.stdout.split())
    assert seconds < 5
    assert mebibytes < 512


@pytest.mark.fuzz
def test_a_mutant_is_read_or_refused_and_nothing_else():
    random_ = random.Random(11)
    seeds = [pickle.dumps([Thing(), {"a": (1, 2.5, None, "x", b"y")}, {1, 2}, 2**70], p) for p in range(6)]
    read_ = refused = 0
    for _ in range(20_000):
        mutant = bytearray(random_.choice(seeds))
        for _ in range(random_.choice((1, 1, 3))):
            mutant[random_.randrange(len(mutant))] = random_.randrange(256)
        try:
            load(bytes(mutant), "x")
            read_ += 1
        except BnportError:
            refused += 1
    assert read_ > 1000
    assert refused > 1000


def test_the_limits_leave_room_for_a_checkpoint_of_thirty_thousand_tensors():
    one = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storageqctorch\nFloatStorage\nX\x05\0\0\0%05dX\x03\0\0\0cpuK\x04tQ"
        b"K\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    body = b"".join(b"X\x05\0\0\0%05d" % i + one.replace(b"storageq", b"storage") % i for i in range(30_000))
    value = read(b"}(" + body + b"u.")
    assert len(value) == 30_000
    node = value["00007"]
    assert isinstance(node.args[0], Persistent)
    assert isinstance(node.callable, Global)
    assert ours.OBJECT_LIMIT > 10 * 30_000
