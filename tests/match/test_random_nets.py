"""Random networks against themselves under other names: what is paired is paired truly, or it is asked for.

In a pairing that is refused, a pair or a list of candidates may still be wrong: then it is said to be a guess.
"""

from __future__ import annotations

import collections
import random
import sys

import pytest
import torch
from safetensors.torch import save_file

from bnport import mapfile
from bnport.adapters import read
from bnport.errors import MatchError
from bnport.match import match, patterns
from tests.match import nets


def case(seed, safetensors=None):
    """(sources, targets, target -> source as it is by construction, in words how it was made) of one random network.

    safetensors: a path under which a source that is a state dict is saved, sorted by name, and read from.
    """
    chance = random.Random(seed)
    plan = nets.planned(chance)
    own, style = nets.named(chance, plan, 0)
    theirs, other = nets.named(
        chance, plan, 1, [s for s in nets.STYLES if s is not nets.automatic or style != s.__name__]
    )
    torch.manual_seed(seed)
    source, target = nets.Net(plan, own).eval(), nets.Net(plan, theirs).eval()
    ported = chance.random() < 0.15
    if ported:
        for key in own:
            if key[0] == "conv":
                target.get_submodule(theirs[key]).load_state_dict(source.get_submodule(own[key]).state_dict())
    form = chance.choice(("state dict", "state dict", "state dict", "live"))
    there = chance.choice(("live", "live", "live", "state dict", "without kernels", "without graph", "bare"))
    if form == "state dict" and safetensors:
        save_file(source.state_dict(), safetensors)
        sources = read(safetensors)
    else:
        sources = read(source.state_dict() if form == "state dict" else source)
    targets = read(target.state_dict() if there == "state dict" else target)
    changes = {}
    if there in ("without kernels", "bare"):
        changes["kernel"] = None
    if there in ("without graph", "bare"):
        changes["inputs"] = None
    if changes:
        targets = {name: each.but(**changes) for name, each in targets.items()}
    truth = {theirs[key]: own[key] for key in own if key[0] == "norm"}
    return sources, targets, truth, f"{style} {form} -> {other} {there}{' ported' if ported else ''}"


def outcome(seed, safetensors=None):
    """("true", "asked" or "wrong", how the case was made, the wrong pairs with their evidence).

    "asked, others wrong": a pair that is called certain is wrong, or candidates without the true one are called all.
    """
    sources, targets, truth, made = case(seed, safetensors)
    assert set(sources) == set(truth.values())
    assert set(targets) == set(truth)
    found = match(sources, targets)
    wrong = {t: (s, truth[t], found.evidence[t]) for t, s in found.pairs.items() if truth[t] != s}
    try:
        found.raise_if_bad()
    except MatchError:
        certain = {t: v for t, v in wrong.items() if t not in found.guessed}
        certain |= {
            t: g for g in found.ambiguous for t in g.targets if truth[t] not in g.sources and "guess" not in g.why
        }
        return "asked, others wrong" if certain else "asked", made, certain
    return "wrong" if wrong else "true", made, wrong


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_a_random_network_is_paired_truly_or_not_at_all(start):
    found = {seed: outcome(seed) for seed in range(start, start + 100)}
    assert {seed: each for seed, each in found.items() if "wrong" in each[0]} == {}
    counts = collections.Counter(each[0] for each in found.values())
    assert min(counts["true"], counts["asked"]) > 10  # neither is the only thing that happens


def test_a_random_network_in_a_file_that_is_sorted_by_name_is_paired_truly_or_not_at_all(tmp_path):
    path = str(tmp_path / "model.safetensors")
    hard = (101654, 106519)  # found by searching: names that are sorted show no order of the layers
    found = {seed: outcome(seed, path) for seed in (*range(400, 500), *hard)}
    assert {seed: each for seed, each in found.items() if "wrong" in each[0]} == {}
    assert sum(" state dict " in f" {each[1]}" and each[0] == "true" for each in found.values()) > 10


def test_a_kernel_whose_number_comes_after_the_layers_own_does_not_feed_it():
    assert "wrong" not in outcome(206023)[0]


@pytest.mark.parametrize(
    "seed", [429635, 433875]
)  # found by searching: a stem that is not pre-activation before blocks that are
def test_equal_kernels_that_only_a_stem_speaks_for_do_not_decide_where_a_layer_has_none(seed):
    assert "wrong" not in outcome(seed)[0]


# found by searching: their pairings are refused, and some pair or candidate in them is wrong
HARD = (414, 13084, 17086, 19040)


@pytest.mark.parametrize("seed", HARD)
def test_what_is_wrong_in_a_refused_pairing_is_called_a_guess(seed):
    sources, targets, truth, _ = case(seed)
    found = match(sources, targets)
    wrong = {t for t, s in found.pairs.items() if truth[t] != s}
    narrow = [g for g in found.ambiguous if any(truth[t] not in g.sources for t in g.targets)]
    assert wrong or narrow, "this network shows nothing any more"
    assert wrong <= set(found.guessed)
    assert all("guess" in g.why for g in narrow)


@pytest.mark.parametrize("seed", HARD)
def test_who_answers_the_open_questions_of_a_map_file_keeps_no_wrong_pair(seed, tmp_path):
    sources, targets, truth, _ = case(seed)
    path = tmp_path / "names.toml"
    path.write_text(mapfile.text(match(sources, targets), sources, targets))
    settled = {t: s for t, (s, _) in patterns.expand(mapfile.read_map(str(path)).pairs, targets, sources).items()}
    open_questions = [t for g in match(sources, targets).ambiguous for t in g.targets]
    found = match(sources, targets, map={**settled, **{t: truth[t] for t in open_questions}})
    wrong = {t for t, s in found.pairs.items() if truth[t] != s}
    assert wrong == set() or (not found.ok and wrong <= set(found.guessed))


@pytest.mark.parametrize(
    "seed",
    [
        14038,  # a word that one candidate has only because a kernel was guessed for it
        23239,  # a stem that shows for the pre-activation units beside it what it is not
        *(202, 2896, 3174, 3863, 4284, 10979, 14303, 16297, 16706, 18935),  # were wrong in part
    ],
)
def test_networks_that_were_paired_wrongly_are_not(seed):
    found, _, wrong = outcome(seed)
    assert (found, wrong) in (("asked", {}), ("true", {}))


if __name__ == "__main__":  # python -m tests.match.test_random_nets FIRST LAST: any number of cases
    first, last = map(int, sys.argv[1:])
    total = collections.Counter()
    for number in range(first, last):
        result, how, pairs = outcome(number)
        total[result] += 1
        if "wrong" in result:
            print(number, result, how, pairs)
    print(total)
