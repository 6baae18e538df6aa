"""From two models to an Explanation: read both, pair them, and search the known mistakes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.convert import pair
from bnport.explain import explain as explain_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.explain import Explanation


def explain(
    source: Any,
    ported: Any,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    epsilon: float | None = None,
    target_epsilon: float | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    command_options: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Explanation:
    """Why a port does not give the source's outputs: which known mistake turns its numbers into the ported ones.

    Both may be files or live objects of any readable format; arguments are those of `convert`, and nothing is written.
    A mistake is named only if its formula gives every channel to within the rounding of the port's dtype
    (bnport.explain.fields has the formulas). command_options: what a repair command must repeat of the arguments; progress:
    called as progress(done, total, layer).

    Returns an Explanation: `same` says that nothing differs; `print(explanation)` names mistakes, evidence and repairs.
    Raises NotFound or MatchError where the two cannot be compared, FormatError for a file that is not understood.
    """
    sources = adapters.read_some(source, epsilon=epsilon, **adapters.checked(source_options, "source_options"))
    targets = adapters.read_target(ported, epsilon=target_epsilon, **adapters.checked(target_options, "target_options"))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    live = not isinstance(ported, str | os.PathLike)
    return explain_layers(sources, targets, match.pairs, live=live, command_options=command_options, progress=progress)
