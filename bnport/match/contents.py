"""The contents of kernels as evidence: where the target's kernels are already ported, equal kernels decide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnport._lazy import np

if TYPE_CHECKING:
    from bnport.layer import Kernel, Layer
    from bnport.match.engine import Alignment

PROBES = 2  # shapes whose kernels are compared to find out whether the target's kernels were ported at all


def pairs(state: Alignment) -> dict[int, int]:
    """source -> target for every kernel that is found exactly once on each side; empty if none was ported.

    A kernel that is only guessed to feed its layer does not count where guesses do not, or where one side has kernels for
    as many channels that the other has not: which kernel it is would be certain, but not whose. Only the kernels of the
    least shapes are read first; the others only if one of those is equal. Kernels of a single value (an initialiser of
    zeros or ones) tell nothing.
    """
    sides = state.source.by_contents, state.target.by_contents
    by_shape: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for at, layers in enumerate(sides):
        for node, layer in enumerate(layers):
            kernel = state.kernel(layer)
            if kernel is not None and kernel.values is not None:
                by_shape.setdefault(kernel.shape, ([], []))[at].append(node)
    cost = sorted((math.prod(shape) * (len(s) + len(t)), s, t) for shape, (s, t) in by_shape.items() if s and t)
    seen: list[dict[int, bytes | None]] = [{}, {}]
    for _, s, t in cost[:PROBES]:
        ours = {_digest(sides[0], node, seen[0]) for node in s} - {None}
        if ours & {_digest(sides[1], node, seen[1]) for node in t}:
            break
    else:
        return {}
    found: list[dict[bytes, list[int]]] = [{}, {}]
    for at, layers in enumerate(sides):
        for node, layer in enumerate(layers):
            digest = _digest(layers, node, seen[at]) if state.kernel(layer) is not None else None
            if digest is not None:
                found[at].setdefault(digest, []).append(node)
    doubted = _doubted(sides, found) | _unfed(state)
    return {
        nodes[0]: found[1][digest][0]
        for digest, nodes in found[0].items()
        if len(nodes) == 1 and len(found[1].get(digest, ())) == 1 and sides[0][nodes[0]].channels not in doubted
    }


def _doubted(sides: tuple[list[Layer], list[Layer]], found: list[dict[bytes, list[int]]]) -> set[int]:
    """The channel counts of which some kernel is guessed and not all kernels are on both sides.

    Where a guess is off by one layer, the kernel at one end of the row feeds none of them.
    """
    out: set[int] = set()
    for here, there, layers in ((found[0], found[1], sides[0]), (found[1], found[0], sides[1])):
        out.update(
            layers[node].channels
            for digest, nodes in here.items()
            for node in nodes
            if len(there.get(digest, ())) != len(nodes)
        )
    guessed = {layer.channels for side in sides for layer in side if layer.kernel and layer.kernel.guessed}
    return out & guessed


def _unfed(state: Alignment) -> set[int]:
    """The channel counts of which some kernel has only a stem for its proof, and some layer has no kernel.

    The row may begin with that layer, on whose side the guess is then off by one all along.
    """
    sides = state.source, state.target
    weak = {
        each.channels
        for side in sides
        for each, proved in zip(side.by_contents, side.layers, strict=True)
        if each.kernel is not None and proved.kernel is None
    }
    return weak & {each.channels for side in sides for each in side.by_contents if each.kernel is None}


def _digest(layers: list[Layer], node: int, seen: dict[int, bytes | None]) -> bytes | None:
    if node not in seen:
        kernel = layers[node].kernel
        seen[node] = digest(layers[node].channels, kernel) if kernel is not None else None
    return seen[node]


def digest(channels: int, kernel: Kernel) -> bytes | None:
    """Of the values as float32, and of their number per channel; None if they cannot be read or are all the same."""
    import hashlib

    if kernel.values is None:
        return None
    try:
        values = np.ascontiguousarray(kernel.values(), dtype=np.float32)
    except (ValueError, OSError):  # FormatError too: a damaged kernel is no evidence, and not what is being ported
        return None
    if values.size < 2 or (values == values.flat[0]).all():
        return None
    return hashlib.blake2b(values.tobytes(), digest_size=16, person=channels.to_bytes(8, "little")).digest()
