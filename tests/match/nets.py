"""Random small networks as torch modules that can be run, under names and in an order of definition of one's choice.

A plan says what is called, in which order and on what. `Net` is the plan as a module: its forward follows the plan, so
that torch.fx and the state dict see a real network. Two modules of one plan are the same network, whatever their names.

What plainly says the wrong thing on both sides is left out, for nothing else could be believed then: words that both sides
use for different layers, and the automatic names of one framework for two networks made in different orders.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

WIDTHS = (4, 6)
WORDS = (
    tuple(f"{a}{b}" for a in ("al", "be", "ga", "de", "zu") for b in ("pha", "ta", "mma", "lta", "kki", "rra")),
    tuple(f"{a}{b}" for a in ("om", "ro", "si", "ka", "lu") for b in ("ega", "nno", "ppa", "gu", "vvi", "sto")),
)  # of the sources and of the targets: a word on both sides is evidence
BRANCHES = (("left", "right", "middle"), ("up", "down", "straight"))


class Unit(NamedTuple):
    """A convolution and the BatchNorm after it (or before it, in a pre-activation net), and where they are.

    net, block, branch, place count from 0, in the order in which units are called; number counts in the whole net.
    pre: whether the BatchNorm comes before the convolution.
    """

    net: int
    block: int
    branch: int
    place: int
    number: int
    of_block: int  # how many branches its block has
    shortcut: bool
    pre: bool = False


class Plan(NamedTuple):
    """The calls of a network: ("conv", from, unit, inputs, outputs, size), ("norm", from, unit, channels), ..."""

    calls: list[tuple[object, ...]]
    ends: list[int]
    units: list[Unit]


def planned(chance):
    """A random plan."""
    plan = Plan([], [], [])
    nets = chance.choice((1, 1, 1, 2, 3))
    alike = chance.random() < 0.5 and nets > 1
    seed = chance.random()
    for net in range(nets):
        if alike:
            _planned(random.Random(seed), plan, net)
        else:
            _planned(chance, plan, net)
    return plan


def _planned(chance, plan, net):
    calls, units = plan.calls, plan.units
    pre = chance.random() < 0.45
    same = chance.random() < 0.5
    sizes = chance.choice(((1, 3), (1, 3, 5), (3,)))
    kind = chance.choice(("chain", "chain", "residual", "residual", "branches", "mixed"))
    width, value, number = WIDTHS[0], -1, 0

    def call(*what):
        calls.append(what)
        return len(calls) - 1

    def unit(value, inputs, outputs, block, branch, place, branches, size, shortcut=False, pre=pre):
        nonlocal number
        made = Unit(net, block, branch, place, number, branches, shortcut, pre)
        number += 1
        units.append(made)
        if pre:
            value = call("relu", call("norm", value, made, inputs))
            return call("conv", value, made, inputs, outputs, size)
        value = call("norm", call("conv", value, made, inputs, outputs, size), made, outputs)
        return call("relu", value)

    stem = chance.choice(("conv", "unit", "unit", None))
    if stem == "unit":  # after which blocks may be pre-activation
        value = unit(value, chance.choice((3, width)), width, 0, 0, 0, 1, 3, pre=False)
    elif stem:
        value = call("conv", value, None, width, width, 3)
    for block in range(1, chance.randint(2, 5)):
        form = chance.choice(("chain", "residual", "branches")) if kind == "mixed" else kind
        out = width if same else chance.choice(WIDTHS)
        if form == "chain":
            value = unit(value, width, out, block, 0, 0, 1, chance.choice(sizes))
        elif form == "residual":
            short = width != out or chance.random() < 0.3
            inner = unit(value, width, out, block, 0, 0, 1 + short, chance.choice(sizes))
            inner = unit(inner, out, out, block, 0, 1, 1 + short, chance.choice(sizes))
            other = unit(value, width, out, block, 1, 0, 2, 1, True) if short else value
            value = call("add", inner, other)
        else:
            count = chance.randint(2, 3)
            ends = []
            for branch in range(count):
                end = value
                for place in range(chance.randint(1, 2)):
                    end = unit(end, out if place else width, out, block, branch, place, count, chance.choice(sizes))
                ends.append(end)
            value = call("add", *ends)
        width = out
    if pre and chance.random() < 0.5:
        value = call("norm", value, Unit(net, 99, 0, 0, number, 1, False), width)
        units.append(calls[-1][2])
    plan.ends.append(value)


class Net(torch.nn.Module):
    """A plan as a module; `names` are those of its modules by ("conv" or "norm", unit), in the order of definition."""

    def __init__(self, plan, names):
        super().__init__()
        shapes = {(what, more[1]): more[2:] for what, *more in plan.calls if what in ("conv", "norm") and more[1]}
        for (what, unit), name in names.items():
            numbers = shapes.get((what, unit))
            if numbers is None:
                continue
            if what == "conv":
                module = torch.nn.Conv2d(*numbers, padding="same", bias=False)
            else:
                module = torch.nn.BatchNorm2d(*numbers)
                torch.nn.init.normal_(module.running_mean)
            *path, last = name.split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, module)
        self.names, self.plan = names, plan

    def forward(self, x):
        values = []
        for what, *more in self.plan.calls:
            if what == "add":
                total = values[more[0]]
                for other in more[1:]:
                    total = total + values[other]
                values.append(total)
                continue
            value = x if more[0] < 0 else values[more[0]]
            if what == "relu":
                values.append(torch.relu(value))
            elif more[1] is None:
                values.append(value * 2)
            else:
                values.append(self.get_submodule(self.names[what, more[1]])(value))
        return [values[end] for end in self.plan.ends]


# ---- names and orders of definition


def flat(unit, side, words):
    """conv1, bn1, conv2, bn2 in the order of calls, counted from 0 or from 1."""
    return f"conv{unit.number + words['first']}", f"bn{unit.number + words['first']}"


def nested(unit, side, words):
    """Numbers of block, branch and place."""
    where = f"layers.{unit.block}.{unit.branch}.{unit.place}"
    return f"{where}.conv", f"{where}.bn"


def like_torchvision(unit, side, words):
    """layer1.conv1, layer1.bn1 ... and layer1.downsample.0, layer1.downsample.1, which are called in that order."""
    if unit.shortcut:
        return tuple(f"layer{unit.block}.downsample.{number}" for number in ((1, 0) if unit.pre else (0, 1)))
    branch = f"branch{unit.branch}." if unit.of_block > 1 and unit.branch else ""
    return tuple(f"layer{unit.block}.{branch}{what}{unit.place + 1}" for what in ("conv", "bn"))


def worded(unit, side, words):
    """A word for each unit that says nothing."""
    word = words[unit]
    return f"conv_{word}", f"bn_{word}"


def worded_branches(unit, side, words):
    """Words for the branches, the same in all blocks; nothing tells left and right from up and down."""
    where = f"block{unit.block}.{BRANCHES[side][unit.branch]}.{words['place'][unit.place]}"
    return f"{where}.conv", f"{where}.bn"


def automatic(unit, side, words):
    """Numbers given in the order of definition, as Keras does."""
    return "conv2d", "batch_normalization"


STYLES = (flat, nested, like_torchvision, worded, worded_branches, automatic)


def named(chance, plan, side, styles=STYLES):
    """Names in a random style, in a random order of definition."""
    style = chance.choice(styles)
    pool = list(WORDS[side])
    chance.shuffle(pool)
    words = {unit: pool[i % len(pool)] + "x" * (i // len(pool)) for i, unit in enumerate(plan.units)}
    words["place"], words["first"] = pool[-2:], chance.randrange(2)
    nets = 1 + max(unit.net for unit in plan.units)
    prefixes = [f"{word}." for word in chance.sample(pool, nets)]
    if nets == 1:
        prefixes = [chance.choice(("", "", *prefixes))]
    elif side and chance.random() < 0.3:
        prefixes[chance.randrange(nets)] = ""
    called = [(what, more[1]) for what, *more in plan.calls if what in ("conv", "norm") and more[1]]
    order = ordered(chance, plan, called, shuffled=style is not automatic)
    if order is None:
        order = sorted(called, key=lambda c: prefixes[c[1].net] + style(c[1], side, words)[c[0] == "norm"])
    names, counts = {}, {}
    for what, unit in order:
        own = style(unit, side, words)[what == "norm"]
        if style is automatic:
            count = counts[own] = counts.get(own, -1) + 1
            names[what, unit] = f"{own}_{count}" if count else own
        else:
            names[what, unit] = prefixes[unit.net] + own
    assert len(set(names.values())) == len(names)
    return names, style.__name__


def ordered(chance, plan, called, *, shuffled):
    """The order of definition: as called, unit by unit in several ways, or (shuffled) any, or that of names (None)."""
    how = chance.choice(
        ("called", "conv first", "norm first", "all conv first", "shuffled units", "shuffled", "nets", "sorted")
    )
    if how.startswith(("shuffled", "sorted")) and not shuffled:
        how = "conv first"
    if how == "sorted":
        return None
    units = list(plan.units)
    rank = {unit: i for i, unit in enumerate(units)}
    if how == "called":
        return called
    if how == "shuffled":
        order = list(called)
        chance.shuffle(order)
        return order
    if how == "shuffled units":
        chance.shuffle(units)
        rank = {unit: i for i, unit in enumerate(units)}
    if how == "nets":
        nets = [unit.net for unit in units]
        turn = {net: chance.random() for net in nets}
        return sorted(called, key=lambda c: (turn[c[1].net], rank[c[1]], c[0]))
    if how == "all conv first":
        return sorted(called, key=lambda c: (c[1].net, c[0], rank[c[1]]))
    return sorted(called, key=lambda c: (rank[c[1]], (c[0] == "norm") == (how != "norm first")))
