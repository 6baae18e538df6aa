"""What decides a pair, what does not, and how it is said."""

from __future__ import annotations

import numpy as np
import pytest

from bnport.errors import InvalidValue, MatchError
from bnport.match import match
from tests.match.making import chain, layer, layers

pytestmark = pytest.mark.core


def test_equal_names_pair_whatever_their_order():
    found = match(layers(layer("a"), layer("b")), layers(layer("b"), layer("a")))
    assert found.pairs == {"b": "b", "a": "a"}
    assert found.ok
    assert list(found.pairs) == ["b", "a"]


def test_equal_names_under_a_prefix_pair():
    sources = layers(layer("backbone.bn.one"), layer("backbone.bn.two"))
    found = match(sources, layers(layer("bn.one"), layer("bn.two")))
    assert found.pairs == {"bn.one": "backbone.bn.one", "bn.two": "backbone.bn.two"}


def test_an_equal_name_with_other_channels_is_a_mismatch():
    found = match(
        layers(layer("a", 4), layer("b", 8), layer("c", 3)), layers(layer("a", 4), layer("b", 9), layer("c", 3))
    )
    assert [tuple(m) for m in found.mismatched] == [("b", "b", 9, 8)]
    assert found.pairs == {"a": "a", "c": "c"}
    with pytest.raises(MatchError, match=r"b: 8 channels in model \(layer 'b'\), 9 in model.*--map.*--skip 'b'"):
        found.raise_if_bad()


def test_automatic_names_that_do_not_fit_are_no_evidence():
    sources = layers(layer("batch_normalization", 8), layer("batch_normalization_1", 16))
    targets = layers(layer("batch_normalization_1", 8), layer("batch_normalization_2", 16))
    found = match(sources, targets)
    assert found.pairs == {
        "batch_normalization_1": "batch_normalization",
        "batch_normalization_2": "batch_normalization_1",
    }


def test_a_few_names_that_happen_to_be_equal_are_no_evidence():
    sources = chain(["bn1", "a", "b", "c", "d"])
    targets = chain(["x", "bn1", "y", "z", "w"])
    assert match(sources, targets).pairs == {"x": "bn1", "bn1": "a", "y": "b", "z": "c", "w": "d"}


def test_unique_channel_counts_decide():
    found = match(layers(layer("s", 3), layer("r", 5)), layers(layer("x", 5), layer("y", 3)))
    assert found.pairs == {"x": "r", "y": "s"}


def test_two_layers_of_one_width_and_nothing_else_are_ambiguous_and_listed():
    found = match(layers(layer("s"), layer("r")), layers(layer("x"), layer("y")))
    assert found.pairs == {}
    assert [(g.targets, g.sources) for g in found.ambiguous] == [(("x", "y"), ("s", "r"))]
    assert not found.ok
    with pytest.raises(MatchError, match=r"x, y of model could be s, r of model \(each is a 8-channel layer\).*--map"):
        found.raise_if_bad()


def test_candidates_that_hold_the_same_numbers_are_interchangeable():
    found = match(layers(layer("s", mean=1.0), layer("r", mean=1.0)), layers(layer("x"), layer("y")))
    found.raise_if_bad()
    assert "same numbers" in found.evidence["x"][0]


def test_numbers_in_names_that_agree_with_the_order_of_definition_decide():
    found = match(
        layers(layer("f.1.bn"), layer("f.4.bn")), layers(layer("batch_normalization"), layer("batch_normalization_1"))
    )
    assert found.pairs == {"batch_normalization": "f.1.bn", "batch_normalization_1": "f.4.bn"}


def test_numbers_in_names_against_the_order_of_definition_decide_nothing():
    found = match(
        layers(layer("f.4.bn"), layer("f.1.bn")), layers(layer("batch_normalization"), layer("batch_normalization_1"))
    )
    assert len(found.ambiguous) == 1


def test_a_map_entry_for_a_layer_that_is_left_out_is_refused_and_says_so():
    both = layers(layer("a"), layer("b"))
    for options in ({"skip": ["b"]}, {"only_under": "a"}):
        for entry in ({"b": "a"}, {"a": "b"}):
            with pytest.raises(MatchError, match="map: b: left out by skip or only-under"):
                match(both, both, map=entry, **options)


def test_kernel_shapes_tell_layers_of_one_width_apart():
    sources = layers(layer("s", 8, (8, 3, 3, 3)), layer("r", 8, (8, 8, 1, 1)))
    targets = layers(layer("x", 8, (8, 8)), layer("y", 8, (8, 3, 3, 3)))
    found = match(sources, targets)
    assert found.pairs == {"x": "r", "y": "s"}
    assert "3x3 kernel over 3 inputs" in found.evidence["y"][0]


def test_the_depthwise_kernel_before_a_pointwise_one_tells_separable_convolutions_apart():
    sources = layers(layer("s", 8, (8, 8, 1, 1), before=(3, 3)), layer("r", 8, (8, 8, 1, 1), before=(5, 5)))
    targets = layers(layer("x", 8, (8, 8, 1, 1), before=(5, 5)), layer("y", 8, (8, 8, 1, 1), before=(3, 3)))
    assert match(sources, targets).pairs == {"x": "r", "y": "s"}


def test_a_kernel_known_on_one_side_only_does_not_forbid_a_pair():
    found = match(layers(layer("s", 8, (8, 3, 3, 3))), layers(layer("x", 8)))
    assert found.pairs == {"x": "s"}


def ported(values, at):
    return lambda: values[at]


def test_equal_contents_of_kernels_decide_beyond_doubt():
    values = np.random.default_rng(0).normal(size=(3, 8, 8, 1, 1))
    shape = (8, 8, 1, 1)
    sources = layers(*(layer(f"f.{i}.bn", 8, shape, values=ported(values, i)) for i in range(3)))
    targets = layers(*(layer(f"g.{i}.bn", 8, shape, values=ported(values, (i + 1) % 3)) for i in range(3)))
    found = match(sources, targets)
    assert found.pairs == {f"g.{i}.bn": f"f.{(i + 1) % 3}.bn" for i in range(3)}
    assert found.evidence["g.0.bn"][0] == "equal kernels"


def test_kernels_of_one_value_tell_nothing():
    ones = np.ones((2, 8, 8, 1, 1))
    sources = layers(*(layer(n, 8, (8, 8, 1, 1), values=ported(ones, 0)) for n in ("s", "r")))
    targets = layers(*(layer(n, 8, (8, 8, 1, 1), values=ported(ones, 1)) for n in ("x", "y")))
    assert len(match(sources, targets).ambiguous) == 1


def test_kernels_that_were_not_ported_change_nothing():
    values = np.random.default_rng(0).normal(size=(4, 8, 8, 1, 1))
    sources = layers(*(layer(f"f.{i}.bn", 8, (8, 8, 1, 1), values=ported(values, i)) for i in range(2)))
    targets = layers(*(layer(f"g.{i}.bn", 8, (8, 8, 1, 1), values=ported(values, i + 2)) for i in range(2)))
    assert match(sources, targets).pairs == {"g.0.bn": "f.0.bn", "g.1.bn": "f.1.bn"}


def test_a_chain_is_decided_by_its_graph_whatever_the_names_and_the_order():
    sources = chain([f"s{i}" for i in range(9)])
    backwards = chain([f"t{9 - i}" for i in range(9)])
    targets = layers(*reversed(backwards.values()))
    assert match(sources, targets).pairs == {f"t{9 - i}": f"s{i}" for i in range(9)}


def test_the_graph_tells_a_shortcut_from_the_branch_beside_it():
    def block(stem, one, short, end):
        return [layer(stem, 8, None, ()), layer(one, 8, None, [stem]), layer(short, 8, None, [stem]),
                layer(end, 8, None, [one, short]), layer(end + "b", 8, None, [one])]  # fmt: skip

    found = match(layers(*block("a", "b", "c", "d")), layers(*block("w", "x", "y", "z")))
    assert found.pairs == {"w": "a", "x": "b", "y": "c", "z": "d", "zb": "db"}


def test_names_that_correspond_elsewhere_decide_where_nothing_else_does():
    sources, targets = [], []
    for i, inside in enumerate((4, 8, 16)):
        for kind, shape in (("bn3", (8, inside)), ("downsample.1", (8, 8 if i == 1 else inside + 1))):
            sources.append(layer(f"layer{i}.{kind}", 8 + (i == 0), (8, 99) if i == 0 else shape))
        targets.append(
            layer(f"conv{i + 2}_0_bn", 8 + (i == 0), (8, 99) if i == 0 else (8, 8 if i == 1 else inside + 1))
        )
        targets.append(layer(f"conv{i + 2}_3_bn", 8 + (i == 0), (8, 99) if i == 0 else (8, inside)))
    sources[2] = layer("layer1.bn3", 8, (8, 77))
    targets[3] = layer("conv3_3_bn", 8, (8, 77))
    found = match(layers(*sources), layers(*targets))
    assert found.pairs["conv2_0_bn"] == "layer0.downsample.1"
    assert found.pairs["conv2_3_bn"] == "layer0.bn3"
    assert "names correspond as elsewhere" in found.evidence["conv2_0_bn"][0]


def test_words_of_one_meaning_pair():
    found = match(
        layers(layer("block.bn3"), layer("block.downsample.1")), layers(layer("b_shortcut_bn"), layer("b_3_bn"))
    )
    assert found.pairs == {"b_shortcut_bn": "block.downsample.1", "b_3_bn": "block.bn3"}


def test_cycles_and_shared_layers_end_and_pair():
    def loop(names):
        return layers(*(layer(n, 8 + (i == 0), None, [names[i - 1]]) for i, n in enumerate(names)))

    found = match(loop(["a", "b", "c"]), loop(["x", "y", "z"]))
    assert found.pairs == {"x": "a", "y": "b", "z": "c"}
    itself = layers(layer("a", 8, None, ["a"]), layer("b", 8, None, ["a", "b"]))
    assert match(itself, layers(layer("x", 8, None, ["x"]), layer("y", 8, None, ["x", "y"]))).pairs == {
        "x": "a",
        "y": "b",
    }


def test_inputs_that_name_no_layer_are_ignored():
    assert match(layers(layer("a", 8, None, ["ghost"])), layers(layer("x", 8, None, []))).pairs == {"x": "a"}


@pytest.mark.parametrize(("extra", "attribute"), [("source", "unexpected"), ("target", "missing")])
def test_a_layer_of_its_own_width_on_one_side_is_said_and_nothing_else_suffers(extra, attribute):
    sources, targets = chain(["a", "b", "c"]), chain(["x", "y", "z"])
    (sources if extra == "source" else targets)["head"] = layer("head", 10, None, ["c" if extra == "source" else "z"])
    found = match(sources, targets)
    assert getattr(found, attribute) == ("head",)
    assert found.pairs == {"x": "a", "y": "b", "z": "c"}
    assert not found.complete
    with pytest.raises(MatchError, match="--skip"):
        found.raise_if_bad()
    left_out = match(sources, targets, skip=["head"])
    left_out.raise_if_bad()
    assert (left_out.left_sources, left_out.left_targets) == ((("head",), ()) if extra == "source" else ((), ("head",)))


def test_one_more_layer_of_the_same_width_makes_the_group_ambiguous_until_it_is_skipped():
    sources, targets = chain(["a", "b", "c"]), chain(["x", "y"])
    found = match(sources, targets)
    assert found.pairs == {}
    assert "3 in the source, 2 in the target" in found.problems()
    assert match(sources, targets, skip="b").pairs == {"x": "a", "y": "c"}  # a skipped layer is bridged in the graph


def test_only_under_takes_the_part_of_the_side_that_has_it():
    sources = chain(["a", "b"])
    targets = layers(*chain(["backbone/x", "backbone/y"]).values(), layer("head/z"), layer("backbones"))
    found = match(sources, targets, only_under="backbone")
    found.raise_if_bad()
    assert found.pairs == {"backbone/x": "a", "backbone/y": "b"}
    assert found.left_targets == ("head/z", "backbones")


@pytest.mark.parametrize("options", [{"skip": ["nothing*"]}, {"only_under": "nothing"}])
def test_an_option_that_names_no_layer_is_an_error(options):
    with pytest.raises(MatchError, match="no layer of either side"):
        match(chain(["a"]), chain(["x"]), **options)


@pytest.mark.parametrize("options", [{"map": "names.toml"}, {"map": [("a", "a")]}, {"skip": None}, {"skip": [b"a"]}])
def test_arguments_of_another_kind_are_refused_in_words(options):
    with pytest.raises(InvalidValue, match=r"map: expected a mapping .*read_map|skip: expected names"):
        match(layers(layer("a")), layers(layer("a")), **options)
    assert match(layers(layer("a")), layers(layer("a"), layer("b")), skip=iter(["b"])).left_targets == ("b",)


def test_a_map_overrules_names_and_the_rest_is_paired_by_evidence():
    sources, targets = layers(layer("a"), layer("b"), layer("c", 3)), layers(layer("a"), layer("b"), layer("z", 3))
    found = match(sources, targets, map={"a": "b"})
    assert found.pairs == {"a": "b", "b": "a", "z": "c"}
    assert found.evidence["a"] == ("the map says so",)


def test_a_pair_by_name_whose_kernels_differ_says_so():
    found = match(layers(layer("stem", 8, (8, 3, 7, 7))), layers(layer("stem", 8, (8, 1, 7, 7))))
    assert found.evidence["stem"] == ("equal names", "kernels differ: 8x3x7x7 in the source, 8x1x7x7 in the target")


def test_a_map_that_asks_for_other_channels_is_a_mismatch():
    found = match(layers(layer("a", 4)), layers(layer("x", 5)), map={"x": "a"})
    assert found.mismatched[0] == ("x", "a", 5, 4)


def test_empty_sides_pair_to_nothing():
    assert match({}, {}).ok
    assert match(layers(), chain(["x"])).missing == ("x",)


def test_control_characters_in_names_are_escaped_in_messages():
    found = match(layers(layer("a\x1b[31m")), layers(layer("x", 9)))
    assert "\x1b" not in found.problems()
    assert r"\x1b[31m" in found.problems()


def guessed(name, channels, shape, **changes):
    """A layer whose kernel is only defined before it, as in a state dict."""
    each = layer(name, channels, shape)
    return each.but(kernel=each.kernel._replace(guessed=True, **changes))


def test_guessed_kernels_that_contradict_the_order_they_come_from_do_not_decide():
    stem = ("stem", 4, (4, 3, 3, 3))
    sources = layers(guessed(*stem), guessed("a_bn", 8, (8, 8, 3, 3)), guessed("b_bn", 8, (8, 8, 1, 1)))
    targets = layers(
        layer("s", 4, (4, 3, 3, 3), ()), layer("x", 8, (8, 8, 1, 1), ["s"]), layer("y", 8, (8, 8, 3, 3), ["x"])
    )
    found = match(sources, targets)
    assert [(g.targets, g.sources) for g in found.ambiguous] == [(("x", "y"), ("a_bn", "b_bn"))]
    facts = layers(*(each.but(kernel=each.kernel._replace(guessed=False)) for each in sources.values()))
    assert match(facts, targets).pairs == {"s": "stem", "x": "b_bn", "y": "a_bn"}


def test_in_a_refused_pairing_guesses_are_named_and_certain_pairs_are_not():
    target = [layer(f"x{i}", 4, (4, 4, 3, 3)) for i in range(2)]
    target += [layer("y", 4, (4, 3, 3, 3)), layer("z", 4, (4, 6, 1, 1)), layer("own", 5)]
    source = [guessed(f"s{i}", 4, (4, 4, 3, 3)) for i in (1, 0)]
    source += [guessed("s2", 4, (4, 3, 3, 3)), guessed("s3", 4, (4, 6, 1, 1)), layer("other", 5)]
    found = match(layers(*source), layers(*target))
    assert found.pairs == {"y": "s2", "z": "s3", "own": "other"}
    assert found.guessed == ("y", "z")  # not `own`: no other layer is as wide
    assert "of the 3 other pairs 2 are no more than likely (y = s2, z = s3)" in found.problems()
    assert "each is a 4-channel layer fed by a 3x3 kernel over 4 inputs; what rules out others" in found.problems()
    assert [pair["guessed"] for pair in found.to_dict()["pairs"]] == [True, True, False]


def test_pairs_by_equal_names_and_by_two_graphs_are_not_called_guesses():
    names = [f"a.{i}" for i in range(5)]
    found = match(chain(names), layers(*chain(names).values(), layer("more", 3, inputs=())))
    assert (len(found.pairs), found.guessed, found.missing) == (5, (), ("more",))
    found = match(chain(names), layers(*chain([f"x{i}" for i in "abcde"]).values(), layer("more", 3, inputs=())))
    assert (len(found.pairs), found.guessed, found.missing) == (5, (), ("more",))


def test_equal_names_counted_from_0_on_one_side_are_a_guess_where_a_layer_is_missing():
    source, target = [layer(f"bn{i}") for i in range(6)], [layer(f"bn{i}") for i in range(1, 6)]
    found = match(layers(*source), layers(*target))
    assert found.unexpected == ("bn0",)
    assert found.guessed == tuple(f"bn{i}" for i in range(1, 6))  # or bn0 is the first of both, and the last is missing
    assert match(layers(*source[1:], layer("more", 3)), layers(*target)).guessed == ()


@pytest.mark.parametrize("changes", [{}, {"refuted": True}])
def test_guessed_kernels_that_nothing_confirms_or_something_refutes_do_not_decide(changes):
    stem = [guessed("stem", 4, (4, 3, 3, 3), **changes)] if changes else []
    sources = layers(*stem, *(guessed(n, 8, (8, 8, k, k), **changes) for n, k in (("a_bn", 3), ("b_bn", 1))))
    targets = layers(*([layer("s", 4)] if stem else []), layer("x", 8, (8, 8, 3, 3)), layer("y", 8, (8, 8, 1, 1)))
    assert len(match(sources, targets).ambiguous) == 1


def test_names_that_fit_under_two_prefixes_are_asked_for_and_the_option_is_named():
    for order in (["student.bn", "teacher.bn"], ["teacher.bn", "student.bn"]):
        found = match(layers(*map(layer, order)), layers(layer("bn"), layer("bn_1")))
        assert found.pairs == {}
        with pytest.raises(MatchError, match=r"names fit under .*--map.*--only-under \(for example"):
            found.raise_if_bad()


def test_of_two_prefixes_the_one_counts_under_which_all_layers_fit():
    sources = layers(layer("a.bn1", 8), layer("a.bn2", 9), layer("b.bn1", 8), layer("b.bn2", 7))
    found = match(sources, layers(layer("bn1", 8), layer("bn2", 7)), skip="a.*")
    assert found.pairs == {"bn1": "b.bn1", "bn2": "b.bn2"}
    assert match(sources, layers(layer("bn1", 8), layer("bn2", 7))).pairs == {"bn1": "b.bn1", "bn2": "b.bn2"}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("ends", [(0, 1), (1, 0), (4, 2)])
def test_names_counted_from_0_and_from_1_are_not_taken_for_equal(prefix, ends):
    first, second = ([f"bn{i + start}" for i in range(5)] for start in ends)
    sources, targets = chain([prefix + n for n in first]), chain(second)
    assert match(sources, targets).pairs == dict(zip(targets, sources, strict=True))
    unordered = [{n: each.but(inputs=None) for n, each in side.items()} for side in (sources, targets)]
    assert match(*unordered).pairs == dict(zip(targets, sources, strict=True))


def test_names_that_are_equal_stay_so_where_one_side_has_more_of_them():
    found = match(layers(*(layer(f"bn{i}") for i in (1, 2, 3))), layers(*(layer(f"bn{i}") for i in (2, 3))))
    assert found.pairs == {"bn2": "bn2", "bn3": "bn3"}


def test_a_stem_does_not_prove_the_guesses_of_blocks_of_another_kind():
    blocks = [guessed(f"blocks.{b}.{n}", 8, (8, 8, k, k)) for b in "ab" for n, k in (("bn1", 3), ("bn2", 1))]
    targets = layers(
        layer("s", 8, (8, 3, 3, 3)), *(layer(n, 8, (8, 8, k, k)) for n, k in (("x", 3), ("y", 1), ("z", 3), ("w", 1)))
    )
    targets = layers(*targets.values(), layer("e", 4, (4, 8, 1, 1)))
    found = match(layers(guessed("bn", 8, (8, 3, 3, 3)), *blocks, guessed("end.bn", 4, (4, 8, 1, 1))), targets)
    assert set(found.pairs) == {"e"}  # all of 8 channels are alike: of some no kernel is known
    shown = [each.but(kernel=each.kernel._replace(guessed=False)) for each in blocks]
    found = match(layers(guessed("bn", 8, (8, 3, 3, 3)), *shown, guessed("end.bn", 4, (4, 8, 1, 1))), targets)
    assert found.pairs["s"] == "bn"


def test_a_stem_in_the_module_of_all_others_shows_nothing_for_them():
    square = [(4, (4, 3, 3, 3)), (4, (4, 4, 3, 3)), (4, (4, 4, 5, 5))]
    wider = [*square[:2], (6, (6, 4, 3, 3)), (6, (6, 6, 3, 3))]
    for shapes, decided in ((square, False), (wider, True)):
        source = [guessed(f"s{a}", *each) for a, each in zip("klmn", shapes, strict=False)]
        target = [layer(f"x{a}", *each) for a, each in zip("wvut", shapes, strict=False)]
        found = match(layers(*source), layers(*target))
        assert found.ok == decided  # square kernels beside the stem may feed what is defined after them
        if decided:
            assert found.pairs == {"xw": "sk", "xv": "sl", "xu": "sm", "xt": "sn"}


def test_guesses_in_a_sequential_need_no_proof():
    sources = layers(guessed("1", 8, (8, 8, 3, 3)), guessed("4", 8, (8, 8, 1, 1)))
    for n, conv in (("1", "0"), ("4", "3")):
        sources[n] = sources[n].but(kernel=sources[n].kernel._replace(name=conv))
    assert match(sources, layers(layer("x", 8, (8, 8, 3, 3)), layer("y", 8, (8, 8, 1, 1)))).pairs == {
        "x": "1",
        "y": "4",
    }


def test_guessed_kernels_of_equal_contents_do_not_decide_where_one_end_of_the_row_is_on_one_side_only():
    rng = np.random.default_rng(0)
    stem, *rest = (rng.normal(size=(8, 4 if i == 0 else 8, 3, 3)) for i in range(5))

    def fed(name, value, *, guess):
        each = layer(name, 8, None if value is None else value.shape, values=None if value is None else lambda: value)
        return each.but(kernel=each.kernel._replace(guessed=True)) if guess else each

    first = fed("bn0", stem, guess=True)
    sources = [first, *(fed(f"bn{c}", k, guess=True) for c, k in zip("abcd", rest, strict=True))]
    called = [stem, None, *rest[:3]]  # bn, conv in each block: each is fed by the kernel of the block before
    targets = [fed(n, k, guess=False) for n, k in zip("vwxyz", called, strict=True)]
    found = match(layers(*sources, layer("bne")), layers(*targets, layer("u")))
    assert found.pairs.keys() <= {"v"}
    right = layers(*(fed(n, k, guess=False) for n, k in zip("vwxyz", [stem, *rest], strict=True)))
    assert match(layers(*sources), right).pairs == dict(zip("vwxyz", layers(*sources), strict=True))


def test_the_order_of_definition_does_not_decide_what_is_numbered_the_other_way_round():
    ends = [layer(f"e{c}", 10 + i) for i, c in enumerate("abcdef")]
    sources = layers(*ends, layer("block.1.bn"), layer("block.0.bn"))
    names = [f"t{c}" for c in "abcdefgh"]
    targets = layers(
        *(layer(n, (*range(10, 16), 8, 8)[i], None, names[i - 1 : i] if i else ()) for i, n in enumerate(names))
    )
    assert len(match(sources, targets).ambiguous) == 1
    renamed = layers(*ends, layer("block.one.bn"), layer("block.two.bn"))
    assert match(renamed, targets).pairs["tg"] == "block.one.bn"


def test_names_counted_from_1_are_not_equal_to_those_from_0_where_both_sides_have_others_too():
    sources = layers(layer("layer1.downsample.1"), layer("layer1.bn1"), layer("layer1.bn2"))
    targets = layers(layer("bn0", 8, None, ()), layer("bn1", 8, None, ["bn0"]), layer("bn2", 8, None, ()))
    assert match(sources, targets).pairs == {}


@pytest.mark.parametrize(("before", "decided"), [(4, False), (5, True)])
def test_a_short_row_defined_as_executed_says_nothing_about_the_rest(before, decided):
    widths = [*range(10, 10 + before), 8, 8, 7]
    sources = layers(*(layer(f"bn_{n}", c) for n, c in zip("hgfedcba"[-len(widths) :], widths, strict=True)))
    names = [f"t{n}" for n in "qrstuvwx"[: len(widths)]]
    edges = [names[i - 1 : i] for i in range(len(names))]
    targets = layers(*(layer(n, c, None, e) for n, c, e in zip(names, widths, edges, strict=True)))
    found = match(sources, targets)
    assert found.ok == decided
    assert not decided or found.pairs == dict(zip(targets, sources, strict=True))


def test_guessed_kernels_count_only_where_both_sides_have_the_same_ones():
    sources = layers(guessed("stem", 4, (4, 3, 3, 3)), guessed("a", 8, (8, 8, 3, 3)), guessed("b", 8, (8, 8, 1, 1)))
    targets = layers(layer("s", 4), layer("x", 8, (8, 8, 3, 3)), layer("y", 8, (8, 8, 5, 5)))
    assert [group.targets for group in match(sources, targets).ambiguous] == [("x", "y")]


def test_a_guess_for_all_but_one_layer_does_not_place_that_one_without_a_graph():
    sources = layers(guessed("stem", 4, (4, 3, 3, 3)), layer("a"), guessed("b", 8, (8, 8, 3, 3)))
    sources["b"] = sources["b"].but(kernel=sources["b"].kernel._replace(name="conv"))
    targets = layers(layer("s", 4), layer("x"), layer("y", 8, (8, 8, 3, 3)))
    assert [group.targets for group in match(sources, targets).ambiguous] == [("x", "y")]


def test_a_word_that_stands_for_another_layer_on_the_other_side_shows_that_words_mislead():
    sources = layers(layer("a.pool"), layer("b"), layer("c.left", 9))
    assert match(sources, layers(layer("x.pool"), layer("y"), layer("z", 9))).pairs["x.pool"] == "a.pool"
    assert len(match(sources, layers(layer("x.pool"), layer("y.left"), layer("z", 9))).ambiguous) == 1


def test_known_kernels_of_equal_contents_decide_though_others_were_not_ported():
    one, two, three = (np.random.default_rng(i).normal(size=(8, 8, 3, 3)) for i in range(3))
    sources = layers(*(layer(n, 8, v.shape, values=lambda v=v: v) for n, v in (("a", two), ("b", one))))
    targets = layers(*(layer(n, 8, v.shape, values=lambda v=v: v) for n, v in (("x", one), ("y", three))))
    assert match(sources, targets).pairs == {"x": "b", "y": "a"}


def test_refuted_guesses_and_their_order_decide_nothing_whatever_the_contents():
    value = [np.random.default_rng(i).normal(size=(8, 8, 3, 3)) for i in range(2)]
    widths = (10, 11, 8, 12, 8, 13)

    def side(names, **changes):
        found, left = [], iter(value)
        for name, width in zip(names, widths, strict=True):
            held = next(left) if width == 8 else None
            each = layer(name, width, (8, 8, 3, 3) if width == 8 else None, values=lambda held=held: held)
            found.append(each.but(kernel=each.kernel._replace(**changes)) if width == 8 else each)
        return layers(*found)

    targets = side([f"t{c}" for c in "abcdef"])
    assert match(side([f"s{c}" for c in "abcdef"]), targets).ok
    found = match(side([f"s{c}" for c in "abcdef"], guessed=True, refuted=True), targets)
    assert [group.targets for group in found.ambiguous] == [("tc", "te")]
    bare = layers(*(each.but(kernel=None) for each in targets.values()))
    assert match(layers(*(each.but(kernel=None) for each in side([f"s{c}" for c in "abcdef"]).values())), bare).ok
    found = match(side([f"s{c}" for c in "abcdef"], guessed=True, refuted=True), bare)
    assert [group.targets for group in found.ambiguous] == [("tc", "te")]


def test_a_kernel_that_may_be_grouped_proves_no_guess():
    sources = layers(*(guessed(n, 24, (24, 8, k, k)) for n, k in (("a", 3), ("b", 5))))
    targets = layers(*(layer(n, 24, (24, 8, k, k)) for n, k in (("x", 3), ("y", 5))))
    assert len(match(sources, targets).ambiguous) == 1


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("names", ["batch_normalization_{}", "block{}_bn", "bn_{}"])
def test_a_number_that_runs_through_all_layers_does_not_tell_two_equal_heads_apart(names, graph):
    def net(name, first):
        found = [layer(name(n), 8 * n, inputs=[name(n - 1)] if n > 1 else []) for n in range(1, 5)]
        for at in (5, 7):  # the heads, equal but for who was made first
            found += [layer(name(at), 48, inputs=[name(4)]), layer(name(at + 1), 48, inputs=[name(at)])]
        return layers(*(each if graph or first else each.but(inputs=None) for each in found))

    found = match(net(lambda n: f"bn{n}", False), net(lambda n: names.format(n - 1), True))
    assert not found.ok
    assert set(found.pairs.values()) == {"bn1", "bn2", "bn3", "bn4"}


def test_a_norm_that_is_defined_first_and_called_last_is_not_shifted_into_the_last_stage():
    widths = [8, 12, 16, 20, 24, 28, 32, 32, 32]
    target = chain([f"t{n}" for n in range(len(widths))])
    target = layers(*(layer(t, w, inputs=each.inputs) for w, (t, each) in zip(widths, target.items(), strict=True)))
    called = [f"blocks.{n}.norm" for n in range(len(widths) - 1)]
    defined = layers(layer("norm", 32), *(layer(name, w) for name, w in zip(called, widths, strict=False)))
    found = match(defined, target)
    assert not found.ok
    assert {t for group in found.ambiguous for t in group.targets} == {"t6", "t7", "t8"}
    in_order = layers(*list(defined.values())[1:], layer("norm", 32))
    found = match(in_order, target)  # defined where it is called: the order holds everywhere
    found.raise_if_bad()
    assert list(found.pairs.values()) == [*called, "norm"]


def test_equal_names_that_known_kernels_contradict_are_asked_about():
    source = layers(layer("bn2", 8, (8, 3, 3, 3), []), layer("bn1", 8, (8, 8, 3, 3), ["bn2"]), layer("c", 9))
    target = layers(layer("bn1", 8, (8, 3, 3, 3), []), layer("bn2", 8, (8, 8, 3, 3), ["bn1"]), layer("c", 9))
    found = match(source, target)
    assert found.pairs == {"c": "c"}
    (group,) = found.ambiguous
    assert group.targets == group.sources == ("bn1", "bn2")
    with pytest.raises(MatchError, match="names are equal, but the kernels"):
        found.raise_if_bad()
    match(source, target, map={"bn1": "bn1", "bn2": "bn2"}).raise_if_bad()  # the user knows better


@pytest.mark.parametrize("graph", [True, False])
def test_equal_names_that_two_graphs_contradict_are_asked_about_and_without_a_graph_they_decide(graph):
    """A U-Net of one width: `up1` is the deepest on one side and the highest on the other."""
    names = ["down1", "down2", "down3", "up3", "up2", "up1"]

    def net(names, drawn):
        skips = {3: 2, 4: 1, 5: 0}
        inputs = [[names[i - 1], *([names[skips[i]]] if i in skips else [])] if i else [] for i in range(len(names))]
        return layers(*(layer(n, 8, None, i if drawn else None) for n, i in zip(names, inputs, strict=True)))

    source, target = net([*names[:3], *reversed(names[3:])], graph), net(names, True)
    found = match(source, target)
    if not graph:  # names are all there is
        assert all(t == s for t, s in found.pairs.items())
        return
    assert {t for group in found.ambiguous for t in group.targets} == {"up1", "up3"}
    other = match(
        source, layers(*(each.but(name=f"x{n}", inputs=[f"x{i}" for i in each.inputs]) for n, each in target.items()))
    )
    assert other.pairs["xup3"] == "up1"
    assert other.pairs["xup1"] == "up3"


def test_equal_names_whose_kernels_differ_from_all_others_too_stay():
    found = match(
        layers(layer("stem", 8, (8, 12, 2, 2)), layer("bn", 8, (8, 8, 3, 3))),
        layers(layer("stem", 8, (8, 3, 4, 4)), layer("bn", 8, (8, 8, 3, 3))),
    )
    found.raise_if_bad()
    assert found.pairs == {"stem": "stem", "bn": "bn"}


def test_contradicted_names_are_no_certain_pairs_of_a_refused_pairing():
    """Counted from 0 on one side and from 1 on the other, perhaps, too: the message names no pair that there is not."""
    one, two, three = (8, 3, 3, 3), (8, 8, 3, 3), (8, 5, 3, 3)
    source = layers(layer("bn0", 8, three), layer("bn1", 8, two), layer("bn2", 8, one))
    found = match(source, layers(layer("bn1", 8, one), layer("bn2", 8, two)))
    assert (found.pairs, found.guessed, found.unexpected) == ({}, (), ("bn0",))
    with pytest.raises(MatchError, match="ambiguous: bn1, bn2"):
        found.raise_if_bad()


def test_what_follows_from_contradicted_names_is_marked_as_likely_only():
    one, two = (8, 3, 3, 3), (8, 5, 3, 3)
    source = layers(
        layer("bn1", 8, one, []),
        layer("bn2", 8, two, []),
        layer("alpha", 9, None, ["bn1"]),
        layer("beta", 9, None, ["bn2"]),
    )
    target = layers(
        layer("bn1", 8, two, []), layer("bn2", 8, one, []), layer("u", 9, None, ["bn1"]), layer("v", 9, None, ["bn2"])
    )
    found = match(source, target)
    assert {group.targets for group in found.ambiguous} == {("bn1", "bn2")}
    assert found.pairs == {"u": "alpha", "v": "beta"}  # by the names: by the kernels it is the other way round
    assert set(found.guessed) == {"u", "v"}


def test_equal_names_stay_where_what_contradicts_them_contradicts_itself():
    source = layers(layer("x", 8, (8, 3, 3, 3), []), layer("y", 8, (8, 5, 3, 3), ["x"]))
    target = layers(layer("x", 8, (8, 5, 3, 3), []), layer("y", 8, (8, 3, 3, 3), ["x"]))
    found = match(source, target)  # the kernels say that the two are swapped, the graphs that they are not
    assert found.pairs == {"x": "x", "y": "y"}
    assert all("kernels differ" in words[1] for words in found.evidence.values())


@pytest.mark.parametrize(("numbers", "told"), [((0, 1), True), ((1, 5), True), ((7, 8), False)])
def test_a_number_counts_where_all_but_one_were_seen(numbers, told):
    """Two equal branches: that 0, 1, 2 are 1, 2, 3 elsewhere says of 1 and 2 which is which, and nothing of 7 and 8."""
    words = ["stem", "mid", "tail"]
    source = [layer(f"{word}_{n}.bn_1", 8 * (n + 1), None, []) for n, word in enumerate(words)]
    target = [layer(f"{word[0]}_{n + 1}_n_1", 8 * (n + 1), None, []) for n, word in enumerate(words)]
    source += [layer(f"branch_{n}.bn_1", 40, None, []) for n in numbers]
    target += [layer(f"b_{n + 1}_n_1", 40, None, []) for n in reversed(numbers)]
    found = match(layers(*source), layers(*target))
    assert found.ok is told
    if told:
        assert all(found.pairs[f"b_{n + 1}_n_1"] == f"branch_{n}.bn_1" for n in numbers)
