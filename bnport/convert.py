"""The one path through the house: read both sides, pair them, fit every record, write, read back, prove.

Nothing is written until the plan is complete; `out` appears whole or not at all; source and target stay as they are
(a live model as target is written in place: all layers or none).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.containers.files import check_output, replace_file, sha256
from bnport.engines import engine_of, run_layers
from bnport.errors import InvalidValue, MatchError, listed, printable
from bnport.layer import Change, Layers
from bnport.plan import WRITABLE, chosen, plan
from bnport.record import FIELDS, BatchNorm
from bnport.verify import Report, check_bits, compare, with_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.engines import Engine
    from bnport.layer import Layer
    from bnport.match import Match
    from bnport.verify import LayerReport


def convert(
    source: Any,
    target: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    only: Iterable[str] | None = None,
    epsilon: float | None = None,
    target_epsilon: float | None = None,
    momentum: str = "keep",
    dry_run: bool = False,
    force: bool = False,
    run: bool | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Write the BatchNorm parameters of `source` into `target`, and prove the result.

    source: a file or a live object of any readable format, or Layers that were read from one.
    target: a file (then the result is the new file `out`; `target` itself is not touched) or a live model, which is
        written in place.
    map: target layer -> source layer, patterns allowed; skip: patterns of layers to leave out, on either side;
        only_under: pair only target layers below this name.
    only: write just these of gamma, beta, mean, variance, epsilon; the target keeps its own for the rest.
    epsilon: of a source that does not hold it (a PyTorch state dict); target_epsilon: the same for the target.
    momentum: "keep" the target's, or "port" the source's.
    run: also run the real layers of target and source (default: only those of a live target, as its framework is imported
        then).
    source_options, target_options: for the adapters (key=, prototxt=, stat=, ...).

    An epsilon that the target can hold is written as it is, so gamma, beta, mean and variance stay bit for bit; one that
    it cannot hold (`.weights.h5`) is absorbed into variance or gamma. Returns the Report of what was written, read back
    and checked. Raises NotFound without BatchNorm on either side, MatchError unless the layers pair completely and
    unambiguously, Unrepresentable where the target cannot hold a record, OutputError, FormatError; nothing is written
    then.
    """
    if momentum not in ("keep", "port"):
        raise InvalidValue(f"momentum: expected 'keep' or 'port', got {momentum!r:.60}")
    fields = chosen(only)
    path = _path(target)
    if path is None and out is not None:
        raise InvalidValue("out: a live target is written in place; leave out away, and save the model yourself")
    if path is not None and out is None and not dry_run:
        raise InvalidValue("out: name the file to make; the target file itself is never changed")
    destination = None if out is None else os.fspath(out)
    inputs = [p for p in (_path(source), path) if p is not None]
    if destination is not None and not dry_run:
        check_output(destination, force=force, inputs=inputs)

    sources = adapters.read_some(source, epsilon=epsilon, **(source_options or {}))
    targets = adapters.read_some(target, epsilon=target_epsilon, **(target_options or {}))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    match.raise_if_bad()
    changes, notes = plan(sources, targets, match.pairs, fields=fields, momentum=momentum)

    report = _Reporter(sources, targets, match, changes, notes, partial=fields != set(WRITABLE))
    if dry_run:
        return report.planned(_path(source))
    adapter = adapters.load(targets.format)
    reading = {**(target_options or {}), "format": targets.format, "epsilon": target_epsilon}
    original = _source_engine(source, epsilon, source_options) if run else None
    if path is None:
        if not hasattr(adapter, "apply"):
            raise InvalidValue(f"{targets.source}: bnport cannot write into a live {targets.format} object")
        report.targets = targets = _frozen(targets)
        engine = None if run is False else engine_of(adapter, target, epsilon=target_epsilon, options=target_options)
        adapter.apply(target, changes)
        try:
            result = report.written(adapters.read(target, **reading), None, _path(source), engine, progress, original)
        except BaseException:
            adapter.apply(target, _as_they_were(targets, changes))
            raise
        if not result.ok:
            adapter.apply(target, _as_they_were(targets, changes))
        return result
    if not hasattr(adapter, "write"):
        raise InvalidValue(f"{printable(path)}: bnport reads {targets.format} files but does not write them")
    assert destination is not None
    results: list[Report] = []

    def check(temporary: str) -> None:
        after = adapters.read(temporary, **reading)
        engine = engine_of(adapter, temporary, epsilon=target_epsilon, options=target_options) if run else None
        results.append(report.written(after, destination, _path(source), engine, progress, original))
        if not results[0].ok:
            raise _NotTheSame

    known = adapter.write.__kwdefaults__ or {}
    writing = {name: value for name, value in (target_options or {}).items() if name in known}

    def build(new: str) -> None:
        adapter.write(path, changes, new, **writing)

    with contextlib.suppress(_NotTheSame):
        replace_file(destination, build, check, force=force, inputs=inputs)
    return results[0]


class _NotTheSame(Exception):
    """Leaves replace_file without the output taking its name; the report says why."""


def verify(
    source: Any,
    target: Any,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    epsilon: float | None = None,
    target_epsilon: float | None = None,
    run: bool | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Whether the BatchNorm layers of `target` are the same functions as those of `source`, layer by layer.

    Both may be files or live objects of any readable format; nothing is written. Arguments are those of `convert`.
    Raises NotFound or MatchError where the two cannot be compared; a difference is not an error but `report.ok == False`.
    """
    sources = adapters.read_some(source, epsilon=epsilon, **(source_options or {}))
    targets = adapters.read_some(target, epsilon=target_epsilon, **(target_options or {}))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    match.raise_if_bad()
    layers = compare(sources, targets, match.pairs)
    not_run: list[str] = []
    explicit = run is True
    if run is None:
        run = _path(target) is None
    if run:
        engine = engine_of(adapters.find(target), target, epsilon=target_epsilon, options=target_options)
        alive = explicit or _path(source) is None  # otherwise a framework would be imported that nobody asked for
        original = _source_engine(source, epsilon, source_options) if alive else None
        if original is None and explicit:
            not_run.append(f"the source's own layers: no engine for {sources.format}")
        layers = run_layers(layers, sources, targets, engine, not_run, progress, source_engine=original)
    else:
        not_run.append("the real layers (--run does)")
    notes = _said(sources, targets, match.pairs)
    digests = {p: sha256(p) for p in map_paths(source, target)}
    return Report(
        source=sources.source,
        target=targets.source,
        layers=_with_evidence(layers, match),
        notes=notes,
        not_run=not_run,
        left=_left(match),
        sha256=digests,
    )


def save_records(
    source: Any,
    out: str | os.PathLike[str],
    *,
    epsilon: float | None = None,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Save the source's BatchNorm layers as a neutral record file (safetensors with metadata), and prove the result."""
    sources = adapters.read_some(source, epsilon=epsilon, **(options or {}))
    destination = os.fspath(out)
    records: Any = adapters.load("records")
    inputs = map_paths(source)
    check_output(destination, force=force, inputs=inputs)
    layers: list[dict[str, LayerReport]] = []

    def check(temporary: str) -> None:
        after = adapters.read(temporary, format="records")
        layers.append(compare(sources, after, {name: name for name in sources}))
        if not all(layer.ok for layer in layers[0].values()):
            raise _NotTheSame

    digests = {path: sha256(path) for path in inputs}
    with contextlib.suppress(_NotTheSame):
        replace_file(destination, lambda new: records.save(sources, new), check, force=force, inputs=inputs)
    return Report(
        action="convert",
        source=sources.source,
        target=destination,
        out=destination,
        layers=layers[0].values(),
        notes=[*_assumed(sources, sources, "--epsilon"), *sources.notes],
        sha256=digests,
    )


def map_paths(*models: Any) -> list[str]:
    """Those of the arguments that are regular files, as paths."""
    return [p for p in (_path(model) for model in models) if p is not None and os.path.isfile(p)]


def pair(
    sources: Layers,
    targets: Layers,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
) -> Match:
    """Which source layer belongs to which target layer: bnport.match.match with both sides' names in its errors."""
    from bnport.match import match

    return match(sources, targets, map=map, skip=skip, only_under=only_under)


def _source_engine(source: Any, epsilon: float | None, options: Mapping[str, Any] | None) -> Engine | None:
    if isinstance(source, Layers):
        return None
    name = (options or {}).get("format")
    adapter = adapters.load(name) if name else adapters.find(source)
    return engine_of(adapter, source, epsilon=epsilon, options=options)


def _path(model: Any) -> str | None:
    if isinstance(model, Layers):
        return model.source if os.path.isfile(model.source) else None
    return os.fspath(model) if isinstance(model, str | os.PathLike) else None


def _said(sources: Layers, targets: Layers, pairs: Mapping[str, str]) -> list[str]:
    """What was assumed of either side, and what their readers noted, once each."""
    return [
        *_assumed(sources, pairs.values(), "--epsilon"),
        *sources.notes,
        *_assumed(targets, pairs, "--target-epsilon"),
        *targets.notes,
    ]


def _assumed(layers: Layers, names: Iterable[str], flag: str) -> list[str]:
    guessed = [layers[name].epsilon for name in names if "epsilon" in layers[name].assumed]
    return [
        f"epsilon {value!r} assumed for {guessed.count(value)} layers: {layers.source} does not store it; set it with {flag}"
        for value in sorted(set(guessed))
    ]


def _left(match: Match) -> dict[str, tuple[str, ...]]:
    return {"left in the target": match.left_targets, "left in the source": match.left_sources}


def _with_evidence(layers: Mapping[str, LayerReport], match: Match) -> list[LayerReport]:
    return [layer._replace(evidence=_words(match.evidence.get(name, ""))) for name, layer in layers.items()]


def _words(evidence: object) -> str:
    return evidence if isinstance(evidence, str) else "; ".join(str(e) for e in evidence)  # type: ignore[attr-defined]


class _Reporter:
    """Builds the Report of a conversion from what was planned and what is read back."""

    def __init__(
        self,
        sources: Layers,
        targets: Layers,
        match: Match,
        changes: Mapping[str, Change],
        notes: Mapping[str, tuple[str, ...]],
        *,
        partial: bool,
    ) -> None:
        self.sources, self.targets, self.match, self.changes, self.notes = sources, targets, match, changes, notes
        # with --only the target is not meant to become the source's function, so each layer is its own reference
        self.references = {name: change.record for name, change in changes.items()} if partial else None

    def _compare(self, after: Layers) -> dict[str, LayerReport]:
        if self.references is None:
            layers = compare(self.sources, after, self.match.pairs)
        else:
            planned = {name: _as_layer(after[name], record) for name, record in self.references.items()}
            layers = compare(planned, after, {name: name for name in planned})
            layers = {name: layer._replace(source=self.match.pairs[name]) for name, layer in layers.items()}
        return {
            name: layer._replace(
                written=tuple(f for f in (*WRITABLE, "momentum") if f in self.changes[name].fields),
                notes=(*layer.notes, *self.sources[self.match.pairs[name]].notes, *self.notes[name]),
            )
            for name, layer in layers.items()
        }

    def planned(self, source_path: str | None) -> Report:
        """The report of a dry run: the planned records, compared as if they had been read back."""
        held = Layers(
            (_as_layer(self.targets[name], change.record) for name, change in self.changes.items()),
            source=self.targets.source,
            format=self.targets.format,
        )
        return self._report("dry run", self._compare(held), None, source_path, ["nothing was written (dry run)"])

    def written(
        self,
        after: Layers,
        out: str | None,
        source_path: str | None,
        engine: Engine | None,
        progress: Callable[[int, int, str], None] | None,
        source_engine: Engine | None = None,
    ) -> Report:
        """The report of what `after`, read back, holds."""
        bits = check_bits(self.targets, after, self.changes)
        if any(name not in after for name in self.changes):
            raise MatchError(f"{after.source}: layers are gone from what was written")
        layers = {
            name: with_checks(layer, [bits[name][0]], bits[name][1]) for name, layer in self._compare(after).items()
        }
        others = [name for name, (check, _) in bits.items() if not check.ok and name not in self.changes]
        not_run: list[str] = []
        if engine is None:
            not_run.append("the real layers (--run does)")
        else:
            layers = run_layers(
                layers, self.sources, after, engine, not_run, progress, self.references,
                source_engine=None if self.references else source_engine,
            )  # fmt: skip
        report = self._report("convert", layers, out, source_path, not_run)
        if others:
            raise MatchError(f"{after.source}: layers that were not to be written changed: {listed(others)}")
        return report

    def _report(
        self,
        action: str,
        layers: Mapping[str, LayerReport],
        out: str | None,
        source_path: str | None,
        not_run: list[str],
    ) -> Report:
        return Report(
            action=action,
            source=self.sources.source,
            target=self.targets.source,
            out=out,
            layers=_with_evidence(layers, self.match),
            notes=_said(self.sources, self.targets, self.match.pairs),
            not_run=not_run,
            left=_left(self.match),
            sha256={p: sha256(p) for p in map_paths(source_path)},
        )


def _frozen(layers: Layers) -> Layers:
    """The layers of a live object with their numbers as they are now, before anything is written into it."""

    def kept(layer: Layer) -> Layer:
        arrays = {field: array.copy() for field, array in layer.arrays().items()}
        return layer.but(load=lambda: arrays)

    return Layers(
        (kept(layer) for layer in layers.values()), source=layers.source, format=layers.format, notes=layers.notes
    )


def _as_they_were(before: Layers, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The changes that put a live object back."""
    return {name: Change(before[name].record, change.fields, before[name].momentum) for name, change in changes.items()}


def _as_layer(layer: Layer, record: BatchNorm) -> Layer:
    """`layer` as if it held `record`."""
    return layer.but(epsilon=record.epsilon, load=lambda: {field: getattr(record, field) for field in FIELDS})
