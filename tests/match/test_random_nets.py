"""Random networks against themselves under other names: what is paired is paired truly, or it is asked for."""

from __future__ import annotations

import collections
import random
import sys

import pytest
import torch

from bnport.adapters import read
from bnport.errors import MatchError
from bnport.match import match
from tests.match import nets


def case(seed):
    """(sources, targets, target -> source as it is by construction, in words how it was made) of one random network."""
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


def outcome(seed):
    """("true", "asked" or "wrong", how the case was made, the wrong pairs with their evidence)."""
    sources, targets, truth, made = case(seed)
    assert set(sources) == set(truth.values())
    assert set(targets) == set(truth)
    found = match(sources, targets)
    wrong = {t: (s, truth[t], found.evidence[t]) for t, s in found.pairs.items() if truth[t] != s}
    try:
        found.raise_if_bad()
    except MatchError:
        return "asked, others wrong" if wrong else "asked", made, wrong
    return "wrong" if wrong else "true", made, wrong


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_a_random_network_is_paired_truly_or_not_at_all(start):
    found = {seed: outcome(seed) for seed in range(start, start + 100)}
    assert {seed: each for seed, each in found.items() if each[0] == "wrong"} == {}
    counts = collections.Counter(each[0] for each in found.values())
    assert min(counts["true"], counts["asked"]) > 10  # neither is the only thing that happens


if __name__ == "__main__":  # python -m tests.match.test_random_nets FIRST LAST: any number of cases
    first, last = map(int, sys.argv[1:])
    total = collections.Counter()
    for number in range(first, last):
        result, how, pairs = outcome(number)
        total[result] += 1
        if "wrong" in result:
            print(number, result, how, pairs)
    print(total)
