"""Kernels that are only guessed to feed their layer (`Kernel.guessed`), and how far the guess may be used.

A state dict has no graph: a kernel is taken to feed the BatchNorm that is defined right after it. A pre-activation
network may be defined the same way and called the other way round (conv1, bn1, conv2, bn2 called as bn1, conv1, bn2,
conv2), and with square kernels nothing in the file shows it. So a guess counts only

0. if no shape in the file refutes it (`Kernel.refuted`, found by the adapter);
1. if a guessed kernel of a module of the same kind fits no other way: what feeds another layer than it follows has as
   many inputs as that layer has channels, so one that has more or fewer inputs than outputs shows that such a module
   defines the kernel before the layer it feeds (modules of other kinds may not: a stem is often conv, bn where the
   pre-activation blocks after it are not, so the kernels of the fewest inputs show it for their own layer only, also where
   a flat module holds them all); and in a torch.nn.Sequential, which calls its children in their order;
2. for the channel counts of which both sides have the same kernels, each equally often;
3. if the pairs that follow keep the order of definition, which is where the guess comes from: no layer is paired with
   one before the pair of a layer that is defined earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.match import names

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from bnport.layer import Kernel, Layer
    from bnport.match.engine import Alignment


def refuted(layers: Iterable[Layer]) -> bool:
    """Whether this side is known not to define things in the order in which it calls them."""
    return any(layer.kernel is not None and layer.kernel.refuted for layer in layers)


def proved(layers: Sequence[Layer], *, stem_shows: bool = False) -> list[Layer]:
    """The layers, without the guessed kernels of modules of which none shows that the guess is right there.

    Modules are of one kind if their BatchNorm layers and kernels have the same names in them, and they lie under the same
    child of the model, or under children that differ in numbers only (`layer1` and `layer2`). Where guesses are refuted
    none counts, and all are kept, so that it is known. `stem_shows`: whether the kernels of the fewest inputs show it for
    others too, which is enough where the contents of all kernels are the same on both sides.
    """
    if refuted(layers) or not any(layer.kernel is not None and layer.kernel.guessed for layer in layers):
        return list(layers)
    held: dict[str, list[Layer]] = {}
    for layer in layers:
        held.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    stem = 0 if stem_shows else min((n for each in layers if (n := _inputs(each.kernel))), default=0)
    kinds = {parent: _kind(parent, inside) for parent, inside in held.items()}
    shown = {
        kinds[parent]
        for parent, inside in held.items()
        if any(_fits_only_here(each.kernel) and _inputs(each.kernel) > stem for each in inside)
    }
    return [
        layer
        if _counts(layer) or _fits_only_here(layer.kernel) or kinds[layer.name.rpartition(".")[0]] in shown
        else layer.but(kernel=None)
        for layer in layers
    ]


def _kind(parent: str, inside: Sequence[Layer]) -> Hashable:
    """What modules of one kind share: where they lie, but for numbers, and the names in them."""
    top = names.tokens(parent.partition(".")[0])
    own = len(parent) + 1 if parent else 0
    within = tuple((each.name[own:], each.kernel and each.kernel.name[own:]) for each in inside)
    return tuple((kind, "" if kind else value) for kind, value in top), within


def _counts(layer: Layer) -> bool:
    """Whether a layer's kernel needs no proof: not guessed, or in a torch.nn.Sequential, whose children are numbers."""
    kernel = layer.kernel
    if kernel is None or not kernel.guessed:
        return True
    parent, _, own = layer.name.rpartition(".")
    above = f"{parent}." if parent else ""
    beside = kernel.name.removeprefix(above).partition(".")[0]  # the kernel itself, or a module that ends with it
    return own.isdecimal() and kernel.name.startswith(above) and beside.isdecimal() and int(beside) < int(own)


def _inputs(kernel: Kernel | None) -> int:
    """How many inputs a guessed kernel has; 0 for what is none, or depthwise."""
    plain = kernel is not None and kernel.guessed and kernel.kind != "depthwise" and len(kernel.shape) > 1
    return kernel.shape[1] if kernel is not None and plain else 0


def _fits_only_here(kernel: Kernel | None) -> bool:
    """Whether a guessed kernel has not as many inputs as outputs, however many groups a file that tells none may mean."""
    if kernel is None or not kernel.guessed:
        return False
    if kernel.kind in ("depthwise", "grouped") or len(kernel.shape) < 2 or kernel.shape[1] == 1:
        return False
    outputs, inputs, *space = kernel.shape
    grouped = outputs % inputs == 0 and outputs // inputs > 2 and any(length > 1 for length in space)
    return outputs != inputs and not grouped


def contradicted(state: Alignment) -> bool:
    """Whether two pairs of one channel count are in another order than the one of definition that a guess relied on."""
    return _against(state, sources_guessed=True) or _against(state, sources_guessed=False)


def _against(state: Alignment, *, sources_guessed: bool) -> bool:
    """Of a side with guessed kernels: whether a layer defined later is paired with one that is executed earlier."""
    side, other = (state.source, state.target) if sources_guessed else (state.target, state.source)
    if not any(layer.kernel is not None and layer.kernel.guessed for layer in side.layers):
        return False
    pairs = state.pairs if sources_guessed else state.back
    ancestors = other.graph.reach()[0] if other.graph is not None else None
    later: dict[int, int] = {}  # by channels: the partners of the layers that are defined later, as a bit set
    for node in range(len(side.layers) - 1, -1, -1):
        if node in pairs:
            partner, channels = pairs[node], side.layers[node].channels
            mask = later.get(channels, 0)
            before = (1 << partner) - 1 if ancestors is None else ancestors[partner]  # no graph: as it is defined
            if mask & before:
                return True
            later[channels] = mask | 1 << partner
    return False
