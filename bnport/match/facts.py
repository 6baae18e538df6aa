"""What else speaks for a pair, or against it: said beside the reason that decided, so that a person can judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.match import names

if TYPE_CHECKING:
    from bnport.layer import Kernel
    from bnport.match.engine import Alignment


def differ(state: Alignment, t: int) -> bool:
    """Whether known kernels of the pair of target `t`, or their inputs in two known graphs, are not alike."""
    from bnport.match.engine import kernel_key

    source, target = _kernels(state, t)
    if source is not None and target is not None and kernel_key(source) != kernel_key(target):
        return True
    return _inputs_alike(state, t) is False


def _kernels(state: Alignment, t: int) -> tuple[Kernel | None, Kernel | None]:
    """What feeds the two layers of the pair, as far as it counts as evidence."""
    return state.kernel(state.source.layers[state.back[t]]), state.kernel(state.target.layers[t])


def _inputs_alike(state: Alignment, t: int) -> bool | None:
    """None where one of the two graphs is not known."""
    if state.source.graph is None or state.target.graph is None:
        return None
    near = {state.pairs.get(n) for n in state.source.graph.inputs[state.back[t]]}
    return near == set(state.target.graph.inputs[t])


def facts(state: Alignment, t: int) -> list[str]:
    """In words: kernel shapes, neighbours in the graph and words in the names of the pair of target `t`."""
    from bnport.match.engine import kernel_key

    s = state.back[t]
    out = []
    source, target = _kernels(state, t)
    if source is not None and target is not None:
        ours, theirs = ("x".join(map(str, k.shape)) for k in (source, target))
        kernels = "guessed kernels" if source.guessed or target.guessed else "kernels"
        out.append(
            f"kernels alike ({theirs})"
            if kernel_key(source) == kernel_key(target)
            else f"{kernels} differ: {ours} in the source, {theirs} in the target"
        )
    alike = _inputs_alike(state, t)
    if alike is not None and state.target.graph is not None:
        same = "inputs paired alike" if state.target.graph.inputs[t] else "first of both"
        out.append(same if alike else "inputs differ")
    words = names.words(state.source.tokens[s]) & names.words(state.target.tokens[t])
    if words and state.source.names[s] != state.target.names[t]:
        out.append(f"names share {', '.join(sorted(words))}")
    return out
