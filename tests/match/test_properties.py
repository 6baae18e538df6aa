"""Random graphs, relabelled: a pair is never wrong, unless by a symmetry of the graph that changes nothing."""

from __future__ import annotations

import networkx
from hypothesis import given, settings
from hypothesis import strategies as st

from bnport.match import match
from bnport.match.compress import compress
from bnport.match.patterns import expand
from tests.match.making import layer, layers

WORDS = ("stem", "left", "right", "pool", "downsample", "bn", "norm", "a", "b")


@st.composite
def graphs(draw, most=9):
    """(inputs of each node, label of each node): with or without cycles, few labels, so that much looks alike."""
    count = draw(st.integers(1, most))
    acyclic = draw(st.booleans())
    inputs = [
        draw(st.sets(st.integers(0, (i if acyclic else count) - 1), max_size=3)) if i or not acyclic else set()
        for i in range(count)
    ]
    labels = draw(st.lists(st.integers(1, 2), min_size=count, max_size=count))
    return inputs, labels


@st.composite
def copies(draw, most=9):
    """A graph as sources, the same graph under other names and in another order as targets, and who is who."""
    inputs, labels = draw(graphs(most))
    nodes = range(len(inputs))
    names = [  # none is on both sides: equal names would overrule the graph
        [
            f"{draw(st.sampled_from(WORDS))}{draw(st.sampled_from(('', '.', '_')))}{n}.{end}"
            for n in draw(st.permutations(nodes))
        ]
        for end in ("s", "t")
    ]
    sides = []
    for own in names:
        order = draw(st.permutations(nodes))
        sides.append(layers(*(layer(own[n], labels[n], None, [own[m] for m in inputs[n]]) for n in order)))
    return sides[0], sides[1], dict(zip(names[1], names[0], strict=True))


def isomorphic_with(sources, targets, pairs):
    """Whether some isomorphism of the two labelled graphs contains all the pairs; networkx is the judge."""
    sides = []
    for side, mark in (
        (sources, {s: i for i, s in enumerate(pairs.values())}),
        (targets, {t: i for i, t in enumerate(pairs)}),
    ):
        graph = networkx.DiGraph()
        for name, each in side.items():
            graph.add_node(name, label=(each.channels, mark.get(name)))
        graph.add_edges_from((before, name) for name, each in side.items() for before in each.inputs)
        sides.append(graph)
    return networkx.is_isomorphic(*sides, node_match=lambda a, b: a["label"] == b["label"])


@given(copies())
@settings(max_examples=300)
def test_the_pairs_of_two_copies_of_a_graph_belong_to_an_isomorphism(copy):
    sources, targets, _ = copy
    found = match(sources, targets)
    in_groups = {t for g in found.ambiguous for t in g.targets}
    assert set(found.pairs) | in_groups == set(targets)
    assert not found.missing and not found.unexpected and not found.mismatched  # noqa: PT018
    assert isomorphic_with(sources, targets, found.pairs)


@given(copies(), st.data())
@settings(max_examples=200)
def test_the_true_pair_is_always_among_the_candidates(copy, data):
    sources, targets, truth = copy
    found = match(sources, targets)
    for group in found.ambiguous:
        assert len(group.sources) == len(group.targets) > 1
    known = data.draw(st.sets(st.sampled_from(sorted(targets))))
    told = match(sources, targets, map={t: truth[t] for t in known}) if known else found
    assert all(told.pairs[t] == truth[t] for t in known)
    assert isomorphic_with(sources, targets, told.pairs)


@given(copies(), st.data())
@settings(max_examples=200)
def test_layers_missing_on_one_side_never_end_in_an_error_or_in_a_pair_of_other_widths(copy, data):
    sources, targets, _ = copy
    for name in data.draw(st.sets(st.sampled_from(sorted(sources)))):
        del sources[name]
    found = match(sources, targets)
    assert all(sources[s].channels == targets[t].channels for t, s in found.pairs.items())
    assert len(set(found.pairs.values())) == len(found.pairs)
    said = [*found.pairs.values(), *found.unexpected, *(s for g in found.ambiguous for s in g.sources)]
    assert sorted(said) == sorted(sources)


@given(copies())
@settings(max_examples=200)
def test_without_a_graph_on_one_side_every_layer_is_still_accounted_for(copy):
    sources, targets, _ = copy
    bare = layers(*(each.but(inputs=None) for each in sources.values()))
    found = match(bare, targets)
    assert {*found.pairs, *found.missing, *(t for g in found.ambiguous for t in g.targets)} == set(targets)


NAMES = st.from_regex(r"[a-c]{1,2}[0-9]{0,2}[._{}][a-c]?[0-9]{0,2}[a-b]?", fullmatch=True)


@given(st.dictionaries(NAMES, NAMES, max_size=30), st.lists(NAMES, max_size=5))
@settings(max_examples=300)
def test_a_compressed_map_says_exactly_what_was_paired(pairs, others):
    pairs = {t: s for t, s in pairs.items() if list(pairs.values()).count(s) == 1}
    targets = list(dict.fromkeys([*pairs, *others]))
    written = compress(pairs, targets)
    assert {t: s for t, (s, _) in expand(written, targets, pairs.values()).items()} == pairs


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_a_regular_naming_becomes_one_pattern(stages, blocks, offset, factor):
    pairs = {
        f"conv{i}_block{j}_bn": f"layer{i + offset}.{factor * j}.bn"
        for i in range(stages + 1)
        for j in range(blocks + 1)
    }
    assert len(compress(pairs, list(pairs))) == 1
