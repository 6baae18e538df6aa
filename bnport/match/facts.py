"""What else speaks for a pair, or against it: said beside the reason that decided, so that a person can judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.match import names

if TYPE_CHECKING:
    from bnport.match.engine import Alignment


def facts(state: Alignment, t: int) -> list[str]:
    """In words: kernel shapes, neighbours in the graph and words in the names of the pair of target `t`."""
    from bnport.match.engine import kernel_key

    s = state.back[t]
    out = []
    source, target = state.kernel(state.source.layers[s]), state.kernel(state.target.layers[t])
    if source is not None and target is not None:
        ours, theirs = ("x".join(map(str, k.shape)) for k in (source, target))
        alike = kernel_key(source) == kernel_key(target)
        out.append(
            f"kernels alike ({theirs})" if alike else f"kernels differ: {ours} in the source, {theirs} in the target"
        )
    if state.source.graph is not None and state.target.graph is not None:
        near_s, near_t = state.source.graph.inputs[s], state.target.graph.inputs[t]
        if {state.pairs.get(n) for n in near_s} == set(near_t):
            out.append("inputs paired alike" if near_t else "first of both")
        else:
            out.append("inputs differ")
    words = names.words(state.source.tokens[s]) & names.words(state.target.tokens[t])
    if words and state.source.names[s] != state.target.names[t]:
        out.append(f"names share {', '.join(sorted(words))}")
    return out
