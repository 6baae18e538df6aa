"""The one path through the house: read both sides, pair them, fit every record, write, read back, prove.

Nothing is written until the plan is complete; `out` appears whole or not at all; source and target stay as they are
(a live model as target is written in place: all layers or none).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.containers.files import check_output, replace_file
from bnport.containers.in_place import change, check_changeable
from bnport.engines import engine_of, run_layers
from bnport.errors import FormatError, InvalidValue, Question, printable
from bnport.layer import Change, Layers
from bnport.outcome import Outcome, assumed, hashed, hashing, left, path_of, paths, said, with_evidence
from bnport.plan import WRITABLE, chosen, plan
from bnport.verify import Report, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.adapters import Adapter
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
    in_place: bool = False,
    dry_run: bool = False,
    force: bool = False,
    run: bool | None = None,
    sha256: bool = True,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Write the BatchNorm parameters of `source` into `target`, and prove the result.

    source: a file or a live object of any readable format, or Layers that were read from one.
    target: a file (then the result is the new file `out`; `target` itself is not touched) or a live model, which is
        written in place.
    in_place: change the file `target` itself instead: bnport.containers.in_place says how it stays old, new or unreadable.
    map: target layer -> source layer, patterns allowed; skip: patterns of layers to leave out, on either side;
        only_under: pair only layers below this name, on the side or sides that have such names.
    only: write just these of gamma, beta, mean, variance, epsilon; the target keeps its own for the rest.
    epsilon: of a source that does not hold it (a PyTorch state dict); target_epsilon: the same for the target.
    momentum: "keep" the target's, or "port" the source's.
    dry_run: write nothing; the Report says what would be written. force: replace an `out` that exists.
    run: also run the real layers of target and source (default: only those of a live target, as its framework is imported
        then, and those of a live source that has layers of a class with its own code).
    sha256: hash the source's files, for the report; False: they are read only where a BatchNorm lies in them.
    source_options, target_options: for the adapters (key=, prototxt=, stat=, ...; `bnport formats`).
    progress: called as progress(done, total, what).

    An epsilon that the target can hold is written as it is, so gamma, beta, mean and variance stay bit for bit; one that
    it cannot hold (`.weights.h5`) is absorbed into variance or gamma. Returns the Report of what was written, read back
    and checked. Raises NotFound without BatchNorm on either side, MatchError unless the layers pair completely and
    unambiguously, Unrepresentable where the target cannot hold a record, OutputError, FormatError; nothing is written
    then.
    """
    if momentum not in ("keep", "port"):
        raise InvalidValue(f"momentum: expected 'keep' or 'port', got {momentum!r:.60}")
    fields = chosen(only)
    path = path_of(target)
    inputs = [p for p in (path_of(source), path) if p is not None]
    destination = _destination(source, target, out, in_place=in_place, dry_run=dry_run, force=force)

    digests = hashing(source, wanted=sha256)
    sources = adapters.read_some(source, epsilon=epsilon, **adapters.checked(source_options, "source_options"))
    targets = adapters.read_target(target, epsilon=target_epsilon, **adapters.checked(target_options, "target_options"))
    if targets.read_only:
        raise FormatError(targets.read_only)
    if destination is not None and not in_place:
        check_output(destination, force=force, inputs=[*sources.files, *targets.files])
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    changes, notes = plan(sources, targets, match.pairs, fields=fields, momentum=momentum)

    report = Outcome(sources, targets, match, changes, notes, partial=fields != set(WRITABLE), digests=digests)
    if dry_run:
        return report.planned()
    adapter = adapters.load(targets.format)
    reading = {**(target_options or {}), "format": targets.format, "epsilon": target_epsilon}
    own_code = run is None and any(layer.own_code for layer in sources.values())
    original = _engine(source, epsilon, source_options) if run or own_code else None
    if path is None:
        if not hasattr(adapter, "apply"):
            raise InvalidValue(f"{targets.source}: bnport cannot write into a live {targets.format} object")
        report.targets = frozen(targets)
        engine = None if run is False else engine_of(adapter, target, epsilon=target_epsilon, options=target_options)

        def check_live() -> Report:
            again = adapter.read_back(target) if hasattr(adapter, "read_back") else adapters.read(target, **reading)
            return report.written(frozen(again), None, engine, progress, original, run is not False)

        return _into_live(adapter, target, changes, report.targets, check_live)
    if not hasattr(adapter, "patches" if in_place else "write"):
        what = "change them in place" if in_place else "write them"
        raise InvalidValue(f"{printable(path)}: bnport reads {targets.format} files but does not {what}")
    assert destination is not None
    results: list[Report] = []

    def check(temporary: str) -> None:
        after = adapters.read(temporary, **reading)
        engine = engine_of(adapter, temporary, epsilon=target_epsilon, options=target_options) if run else None
        results.append(report.written(after, destination, engine, progress, original, bool(run)))
        if not results[0].ok:
            raise _NotTheSame

    known = (adapter.patches if in_place else adapter.write).__kwdefaults__ or {}
    options = {**(target_options or {}), "opened": targets.opened}
    writing = {name: value for name, value in options.items() if name in known}

    def build(new: str) -> None:
        adapter.write(path, changes, new, **writing)

    with contextlib.suppress(_NotTheSame):
        if in_place:
            report.targets = frozen(targets)
            change(path, adapter.patches(path, changes, **writing), lambda: check(path))
        else:
            replace_file(destination, build, check, force=force, inputs=inputs)
    return results[0]


def _destination(
    source: Any, target: Any, out: str | os.PathLike[str] | None, *, in_place: bool, dry_run: bool, force: bool
) -> str | None:
    """The path that will be written to, checked before any work is done; None for a live target or a dry run."""
    path, source_path = path_of(target), path_of(source)
    if path is None and out is not None:
        raise InvalidValue("out: a live target is written in place; leave out away, and save the model yourself")
    if path is not None and out is None and not (dry_run or in_place):
        raise InvalidValue("out: name the file to make; the target file itself is not changed without in_place")
    if in_place and (path is None or out is not None):
        raise InvalidValue("in_place: is for a target that is a file, without out")
    if path is None or dry_run:
        return None
    sources = [] if source_path is None else [source_path]
    for given in (*sources, path):
        adapters.read_head(given)  # says what is wrong with a path
    if in_place:
        check_changeable(path, sources)
        return path
    assert out is not None
    check_output(os.fspath(out), force=force, inputs=[*sources, path])
    adapters.check_suffix(os.fspath(out), path, source=source_path or "")
    return os.fspath(out)


def _into_live(
    adapter: Adapter, model: Any, changes: Mapping[str, Change], before: Layers, check: Callable[[], Report]
) -> Report:
    """Write the changes, and what `check` reports then; the model holds what it held `before` unless that is well."""

    def put_back() -> None:
        adapter.apply(model, {n: Change(before[n].record, c.fields, before[n].momentum) for n, c in changes.items()})

    adapter.apply(model, changes)
    try:
        report = check()
    except BaseException:
        put_back()
        raise
    if not report.ok:
        put_back()
    return report


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
    sha256: bool = True,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Whether the BatchNorm layers of `target` are the same functions as those of `source`, layer by layer.

    Decided for every input on a = gamma / sqrt(variance + epsilon) and b = beta - mean * a of both, in float64, against the
    bound of rounding to the dtype that `target` stores (bnport.verify has it). Both may be files or live objects of any
    readable format; nothing is written. Arguments are those of `convert`, sha256 of both sides; run: also run the real
    layers (default: only those of a live target, and those of a live source that has layers of a class with its own
    code). Returns the Report: `report.ok`, and per layer the largest error with its bound, and what is not known of its
    class.

    Raises NotFound or MatchError where the two cannot be compared, FormatError for a file that is not understood; a
    difference is not an error but `report.ok == False`.
    """
    digests = hashing(source, target, wanted=sha256)
    sources = adapters.read_some(source, epsilon=epsilon, **adapters.checked(source_options, "source_options"))
    targets = adapters.read_target(target, epsilon=target_epsilon, **adapters.checked(target_options, "target_options"))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    layers = {
        name: layer._replace(notes=(*layer.notes, *dict.fromkeys((*sources[layer.source].notes, *targets[name].notes))))
        for name, layer in compare(sources, targets, match.pairs).items()
    }
    not_run: list[str] = []
    explicit = run is True
    own_code = run is None and any(layer.own_code for layer in sources.values())
    if run is None:
        run = path_of(target) is None
    if run or own_code:
        engine = _engine(target, target_epsilon, target_options) if run else None
        alive = explicit or path_of(source) is None  # otherwise a framework would be imported that nobody asked for
        original = _engine(source, epsilon, source_options) if alive else None
        if original is None and explicit:
            not_run.append(f"the source's own layers: no engine for {sources.format}")
        unasked = "" if run else "the target's real layers (--run does)"
        layers = run_layers(
            layers, sources, targets, engine, not_run, progress, source_engine=original, unasked=unasked
        )
    else:
        not_run.append("the real layers (--run does)")
    notes = said(sources, targets, match)
    return Report(
        source=sources.source,
        target=targets.source,
        layers=with_evidence(layers, match),
        notes=notes,
        not_run=not_run,
        left=left(match),
        sha256=hashed(digests, [*sources.files, *targets.files]),
    )


def save_records(
    source: Any,
    out: str | os.PathLike[str],
    *,
    epsilon: float | None = None,
    force: bool = False,
    sha256: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Save the source's BatchNorm layers as a neutral record file, and prove the result.

    source: a file or live object of any readable format. out: a .safetensors file of bnport's own (bnport formats records):
    gamma, beta, mean, variance of shape (C,) in the dtype of the source, bit for bit, and each layer's epsilon as a decimal;
    `convert` takes it as a source. epsilon: of a source that does not hold it. force: replace an `out` that exists.
    sha256: as of `convert`; the file names it too. options: for the source's adapter (key=, prototxt=, stat=, ...).

    Returns the Report of what was read back. Raises NotFound without BatchNorm, InvalidValue for numbers that are no
    BatchNorm, FormatError, OutputError; `out` appears whole or not at all.
    """
    digests = hashing(source, wanted=sha256)
    sources = adapters.read_some(source, epsilon=epsilon, **adapters.checked(options, "options"))
    destination = os.fspath(out)
    records: Any = adapters.load("records")
    inputs = [*paths(source), *sources.files]
    check_output(destination, force=force, inputs=inputs)
    layers: list[dict[str, LayerReport]] = []

    def check(temporary: str) -> None:
        after = adapters.read(temporary, format="records")
        layers.append(compare(sources, after, {name: name for name in sources}))
        if not all(layer.ok for layer in layers[0].values()):
            raise _NotTheSame

    known = hashed(digests, sources.files)
    with contextlib.suppress(_NotTheSame):
        replace_file(
            destination,
            lambda new: records.save(sources, new, known.get(sources.source, "")),
            check,
            force=force,
            inputs=inputs,
        )
    return Report(
        action="convert",
        source=sources.source,
        target=destination,
        out=destination,
        layers=layers[0].values(),
        notes=[*assumed(sources, sources, "--epsilon"), *sources.notes],
        sha256=known,
    )


def pair(
    sources: Layers,
    targets: Layers,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
) -> Match:
    """Which source layer belongs to which target layer, by bnport.match.match.

    Raises MatchError unless every layer has its pair, Question where the epsilon of one of them has to be asked for, and
    InvalidValue for a map or only_under that holds other things than names.
    """
    from collections.abc import Mapping

    from bnport.match import match

    if only_under is not None and not isinstance(only_under, str):
        raise InvalidValue(f"only_under: expected the beginning of names, got {printable(repr(only_under), 60)}")
    if isinstance(map, Mapping) and not all(isinstance(name, str) for entry in map.items() for name in entry):
        raise InvalidValue(f"map: expected target names to source names, got {printable(repr(map), 60)}")
    found = match(sources, targets, map=map, skip=skip, only_under=only_under)
    found.raise_if_bad()
    for layers, names in ((sources, found.pairs.values()), (targets, found.pairs)):
        asked = [name for name in names if layers[name].question]
        if asked:
            more = f" (and {len(asked) - 1} more layers)" if len(asked) > 1 else ""
            raise Question(f"{printable(layers.source)}: {printable(asked[0])}{more}: {layers[asked[0]].question}")
    return found


def _engine(source: Any, epsilon: float | None, options: Mapping[str, Any] | None) -> Engine | None:
    if isinstance(source, Layers):
        return None
    name = (options or {}).get("format")
    adapter = adapters.load(name) if name else adapters.find(source)
    return engine_of(adapter, source, epsilon=epsilon, options=options)


def frozen(layers: Layers) -> Layers:
    """The layers of a live object with their numbers as they are now, before anything is written into it."""

    def kept(layer: Layer) -> Layer:
        arrays = {field: array.copy() for field, array in layer.arrays().items()}
        return layer.but(load=lambda: arrays)

    return layers.but(kept(layer) for layer in layers.values())
