"""The real layers, run by their own frameworks at the same probes: each against the formula, and one against the other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import BnportError, MissingDependency, printable
from bnport.rounding import LARGEST, round_to
from bnport.verify import INVALID, check_between, check_outputs, output_dtype, with_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeAlias

    from bnport.adapters import Adapter
    from bnport.layer import Layers
    from bnport.record import Array, BatchNorm
    from bnport.verify import LayerReport

    Outputs: TypeAlias = Mapping[str, Array]  # how the engine was called -> y
    Progress: TypeAlias = Callable[[int, int, str], None]

_TAKES_ANY_KEYWORD = 0x08  # of a function's code flags


class Engine:
    """Puts x of shape (N, C) through layers of one path or live object, in its own framework."""

    def __init__(self, adapter: Adapter, model: Any, options: Mapping[str, Any]) -> None:
        self.adapter = adapter
        self.model = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.options = {name: value for name, value in options.items() if value is not None and _takes(adapter, name)}

    def run(
        self, inputs: Mapping[str, Array], not_run: list[str], progress: Progress | None, what: str
    ) -> dict[str, Outputs]:
        """The outputs of every layer that could be run; why the others could not goes to `not_run`."""
        together = getattr(self.adapter, "run_all", None)
        if together is not None:
            if progress:
                progress(0, len(inputs), f"running {what}")
            try:
                outputs: dict[str, Outputs] = together(self.model, inputs, **self.options)
            except MissingDependency as error:
                not_run.append(f"{what}: {error}")
                return {}
            except BnportError:
                pass  # some layer: find out which, one at a time
            else:
                return outputs
        outputs = {}
        for done, (name, x) in enumerate(inputs.items()):
            if progress:
                progress(done, len(inputs), f"running {what}: {name}")
            try:
                outputs[name] = self.adapter.run(self.model, name, x, **self.options)
            except MissingDependency as error:
                not_run.append(f"{what}: {error}")
                return outputs
            except BnportError as error:
                not_run.append(f"{what}: {printable(name)}: {error}")
        return outputs


def _takes(adapter: Adapter, option: str) -> bool:
    """Whether the adapter's run knows an option; one that takes any keyword knows those of its read."""
    run, read = adapter.run, adapter.read
    known = set(run.__kwdefaults__ or {})
    if run.__code__.co_flags & _TAKES_ANY_KEYWORD:
        known |= set(read.__kwdefaults__ or {})
    return option in known


def engine_of(
    adapter: Adapter, model: Any, *, epsilon: float | None = None, options: Mapping[str, Any] | None = None
) -> Engine | None:
    """The engine of a path or live object; None where the format has none.

    epsilon and options: as the layers were read with, so that the engine computes the same function.
    """
    if not hasattr(adapter, "run"):
        return None
    return Engine(adapter, model, {**(options or {}), "epsilon": epsilon})


def run_layers(
    layers: Mapping[str, LayerReport],
    sources: Layers,
    held: Layers,
    engine: Engine | None,
    not_run: list[str],
    progress: Progress | None = None,
    references: Mapping[str, BatchNorm] | None = None,
    source_engine: Engine | None = None,
    unasked: str = "",
) -> dict[str, LayerReport]:
    """Add the `run` rung: real layers at the probes of `held`.

    The target's layers are held against the source's records (or `references`). With a `source_engine`, the source's own
    layers run on the same probes: each against its own record, and the target's against it, within the sum of the bounds.
    `unasked`: what to say of the target's where it is not for want of an engine that they are not run.
    Where one side computes in 16 bits, both get probes of that type, none beyond its largest number.
    """
    runnable = {name: layer for name, layer in layers.items() if layer.status != INVALID}
    results = dict(layers)
    records = {
        name: references[name] if references else sources[layer.source].record for name, layer in runnable.items()
    }
    x = {name: held[name].record.probes("float32") for name in runnable}
    whose = f"the real layers of the {held.format} side"
    if engine is None:
        not_run.append(unasked or f"the real layers: no engine for {held.format}")
    outputs, originals = _both(runnable, x, engine, source_engine, not_run, progress, whose, sources.format)
    narrow = _narrow(outputs, held, None) | _narrow(originals, sources, runnable)
    if narrow and (source_engine is not None or any(_overflows(values, narrow) for values in x.values())):
        x = {name: _rounded(values, narrow) for name, values in x.items()}
        outputs, originals = _both(runnable, x, engine, source_engine, [], progress, whose, sources.format)
    for name, layer in runnable.items():
        checks = check_outputs(records[name], held[name].record, x[name], outputs.get(name, {}), dtype=held[name].dtype)
        original = originals.get(name)
        if original:
            source = sources[layer.source]
            own = check_outputs(source.record, source.record, x[name], original, dtype=source.dtype)
            checks += tuple(check._replace(name=f"source {check.name}") for check in own)
            if outputs.get(name):
                checks += check_between(
                    (source.record, source.dtype, original),
                    (held[name].record, held[name].dtype, outputs[name]),
                    x[name],
                )
        results[name] = with_checks(layer, checks)
    if progress:
        progress(len(layers), len(layers), "running")
    return results


def _both(
    layers: Mapping[str, LayerReport],
    x: Mapping[str, Array],
    engine: Engine | None,
    source_engine: Engine | None,
    not_run: list[str],
    progress: Progress | None,
    whose: str,
    source_format: str,
) -> tuple[dict[str, Outputs], dict[str, Outputs]]:
    """What the target's layers and the source's give for the same x; both by target name."""
    given = {name: values.astype(np.float32) for name, values in x.items()}
    outputs = engine.run(given, not_run, progress, whose) if engine is not None and given else {}
    originals: dict[str, Outputs] = {}
    if source_engine is not None:
        for names in _rounds(layers):
            inputs = {layers[name].source: given[name] for name in names}
            found = source_engine.run(inputs, not_run, progress, f"the source's own {source_format} layers")
            originals |= {name: found[layers[name].source] for name in names if layers[name].source in found}
    return outputs, originals


def _rounds(layers: Mapping[str, LayerReport]) -> Iterable[list[str]]:
    """Target names in groups within which every source layer occurs once: a shared one gets other probes each time."""
    waiting = list(layers)
    while waiting:
        seen: set[str] = set()
        group = [name for name in waiting if layers[name].source not in seen and not seen.add(layers[name].source)]  # type: ignore[func-returns-value]
        yield group
        waiting = [name for name in waiting if name not in group]


def _narrow(outputs: Mapping[str, Outputs], side: Layers, layers: Mapping[str, LayerReport] | None) -> set[str]:
    """The 16-bit types in which a side answered."""
    found = set()
    for name, ways in outputs.items():
        stored = side[layers[name].source if layers else name].dtype
        found |= {output_dtype(y, stored) for y in ways.values()}
    return found - {"float32"}


def _overflows(x: Array, narrow: set[str]) -> bool:
    return bool((np.abs(x) > min(LARGEST[dtype] for dtype in narrow)).any())


def _rounded(x: Array, narrow: set[str]) -> Array:
    """x rounded so that every type of `narrow` holds it exactly; what is beyond one's largest number becomes that."""
    for dtype in sorted(narrow):  # bfloat16 first: float16 then keeps its eight bits wherever it reaches
        x = round_to(np.clip(x, -LARGEST[dtype], LARGEST[dtype]), dtype)
    return x.astype(np.float64)
