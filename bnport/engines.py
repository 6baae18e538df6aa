"""The real layers, run by their own framework at the probes of each record."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bnport.errors import BnportError, MissingDependency
from bnport.verify import INVALID, check_run, with_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    from bnport.adapters import Adapter
    from bnport.layer import Layers
    from bnport.record import Array, BatchNorm
    from bnport.verify import LayerReport

    Engine: TypeAlias = Callable[[str, Array], Mapping[str, Array]]


def engine_of(adapter: Adapter, model: Any) -> Engine | None:
    """How to put x of shape (N, C) through one layer of a path or live object; None where the format has no engine."""
    if not hasattr(adapter, "run"):
        return None
    return lambda layer, x: adapter.run(model, layer, x)


def run_layers(
    layers: Mapping[str, LayerReport],
    sources: Layers,
    held: Layers,
    engine: Engine | None,
    not_run: list[str],
    progress: Callable[[int, int, str], None] | None = None,
    references: Mapping[str, BatchNorm] | None = None,
) -> dict[str, LayerReport]:
    """Add the `run` rung: the real layers of `held` at the probes, against the source's records (or `references`)."""
    results = dict(layers)
    if engine is None:
        not_run.append(f"the real layers: no engine for {held.format}")
        return results
    for done, (name, layer) in enumerate(layers.items()):
        if progress:
            progress(done, len(layers), f"running {name}")
        if layer.status == INVALID:
            continue
        reference = references[name] if references else sources[layer.source].record
        try:
            checks = check_run(reference, held[name].record, partial(engine, name), dtype=held[name].dtype)
        except MissingDependency as error:
            not_run.append(f"the real layers: {error}")
            return results
        except BnportError as error:
            not_run.append(f"{name}: {error}")
            continue
        results[name] = with_checks(layer, checks)
    if progress:
        progress(len(layers), len(layers), "running")
    return results
