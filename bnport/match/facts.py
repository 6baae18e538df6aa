"""What else speaks for a pair, or against it: said beside the reason that decided, so that a person can judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.match import names

if TYPE_CHECKING:
    from bnport.match.engine import Alignment


def differ(state: Alignment, t: int) -> bool:
    """Whether known kernels of the pair of target `t`, or their inputs in two known graphs, are not alike."""
    kernel, inputs = _kernels_alike(state, t), _inputs_alike(state, t)
    return kernel is False or inputs is False


def _kernels_alike(state: Alignment, t: int) -> bool | None:
    """None where one of the two is not known."""
    from bnport.match.engine import kernel_key

    source, target = (state.kernel(side.layers[at]) for side, at in ((state.source, state.back[t]), (state.target, t)))
    return None if source is None or target is None else kernel_key(source) == kernel_key(target)


def _inputs_alike(state: Alignment, t: int) -> bool | None:
    """None where one of the two graphs is not known."""
    if state.source.graph is None or state.target.graph is None:
        return None
    near = {state.pairs.get(n) for n in state.source.graph.inputs[state.back[t]]}
    return near == set(state.target.graph.inputs[t])


def facts(state: Alignment, t: int) -> list[str]:
    """In words: kernel shapes, neighbours in the graph and words in the names of the pair of target `t`."""
    s = state.back[t]
    out = []
    source, target = state.kernel(state.source.layers[s]), state.kernel(state.target.layers[t])
    if source is not None and target is not None:
        ours, theirs = ("x".join(map(str, k.shape)) for k in (source, target))
        kernels = "guessed kernels" if source.guessed or target.guessed else "kernels"
        out.append(
            f"kernels alike ({theirs})"
            if _kernels_alike(state, t)
            else f"{kernels} differ: {ours} in the source, {theirs} in the target"
        )
    if state.source.graph is not None and state.target.graph is not None:
        alike = "inputs paired alike" if state.target.graph.inputs[t] else "first of both"
        out.append(alike if _inputs_alike(state, t) else "inputs differ")
    words = names.words(state.source.tokens[s]) & names.words(state.target.tokens[t])
    if words and state.source.names[s] != state.target.names[t]:
        out.append(f"names share {', '.join(sorted(words))}")
    return out
