"""Pairing two networks of 250 to 4000 BatchNorm layers: seconds, and how they grow. Run me: nothing is asserted."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bnport.match import match
from tests.match.making import chain, layer, layers

SIZES = (250, 500, 1000, 2000, 4000)
RUNS = 3


def numbered(count, form, graph):
    names = [form.format(i) for i in range(count)]
    if graph:
        return chain(names, 64, (64, 64, 3, 3))
    return layers(*(layer(n, 64, (64, 64, 3, 3)) for n in names))


def residual(count, form):
    """Blocks of three layers and a shortcut, all of one width."""
    found, before = [], ()
    for i in range(count // 4):
        a, b, c, short = (form.format(f"{i}_{k}") for k in range(4))
        found += [layer(a, 64, (64, 64), before), layer(b, 64, (64, 64, 3, 3), [a]), layer(c, 64, (64, 64), [b])]
        found.append(layer(short, 64, (64, 64), before))
        before = (c, short)
    return layers(*found)


CASES = {
    "chain, graph on both sides": lambda n: (numbered(n, "s{}", True), numbered(n, "t{}x", True)),
    "chain, state dict to graph": lambda n: (
        numbered(n, "f.{}.bn", False),
        numbered(n, "batch_normalization_{}", True),
    ),
    "residual, graph on both sides": lambda n: (residual(n, "s{}"), residual(n, "t{}x")),
}

for name, make in CASES.items():
    print(name)
    sides = {n: make(n) for n in SIZES}
    times = {n: [] for n in SIZES}
    for _ in range(RUNS):
        for n, (sources, targets) in sides.items():
            started = time.perf_counter()
            found = match(sources, targets)
            times[n].append(time.perf_counter() - started)
    before = None
    for n, each in times.items():
        median = statistics.median(each)
        growth = f", {median / before:.1f} times for twice the layers" if before else ""
        print(f"  {n:5d} layers  {median:7.3f} s{growth}")
        before = median
    print(f"  {len(found.pairs)} pairs, {len(found.ambiguous)} ambiguous groups at {SIZES[-1]}")
