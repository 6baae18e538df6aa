"""Which kernels a torch file's order of definition gives to which BatchNorm, and which shapes refute the order."""

from __future__ import annotations

import pytest

from bnport.adapters.torch.layers import Definition, feeding
from bnport.layer import Kernel

pytestmark = pytest.mark.core


def kernel(name, *shape):
    return Definition(name, shape[0], Kernel("conv", shape, name))


def norm(name, channels):
    return Definition(name, channels)


def test_a_kernel_is_guessed_to_feed_the_layer_defined_after_it():
    found = feeding([kernel("conv1", 8, 3, 3, 3), norm("bn1", 8), kernel("conv2", 8, 8, 1, 1), norm("bn2", 8)])
    assert {name: (each.name, each.guessed, each.refuted) for name, each in found.items()} == {
        "bn1": ("conv1", True, False),
        "bn2": ("conv2", True, False),
    }


@pytest.mark.parametrize(
    "definitions",
    [
        # conv2 takes what bn2 gives and gives what bn3 does not: conv, bn defined, bn, conv called
        [kernel("conv1", 8, 8, 3, 3), norm("bn1", 8), kernel("conv2", 6, 8, 3, 3), norm("bn2", 8)],
        # conv2 gives what bn2 before it takes, and takes what it does not: bn, conv defined, conv, bn called
        [norm("bn1", 8), kernel("conv1", 8, 8, 3, 3), norm("bn2", 6), kernel("conv2", 6, 8, 3, 3), norm("bn3", 6)],
    ],
)
def test_one_kernel_that_fits_only_another_order_refutes_all_guesses(definitions):
    found = feeding(definitions)
    assert found
    assert all(each.refuted for each in found.values())


def test_the_kernel_that_begins_the_next_branch_refutes_nothing():
    found = feeding([kernel("a", 8, 8, 3, 3), norm("bn_a", 8), kernel("b", 8, 4, 1, 1), norm("bn_b", 8)])
    assert [each.refuted for each in found.values()] == [False, False]


def test_a_sequential_calls_its_children_in_their_order_whatever_their_shapes():
    found = feeding([kernel("0", 8, 8, 3, 3), norm("1", 8), kernel("2", 6, 8, 3, 3), norm("4", 8)])
    assert [each.refuted for each in found.values()] == [False]
