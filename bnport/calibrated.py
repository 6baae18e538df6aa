"""A source that stores no statistics: gamma, beta and epsilon come from it, mean and variance from data.

Some layers normalise each batch by itself (track_running_stats=False, SegNet's LEARN nets, exports in training mode), so
their source holds no fixed function to port. Given data, the target gets the source's gamma, beta and epsilon first, then
its own mean and variance are computed on the data with those in place, and the whole is converted and checked as usual.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.calibrate.checkpoint import delete
from bnport.calibrate.file import check_files, data_files
from bnport.containers.files import TEMPORARY
from bnport.convert import convert, frozen, pair
from bnport.errors import BnportError, InvalidValue, NotFound, Unrepresentable, listed, printable
from bnport.match.contents import digest
from bnport.outcome import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bnport.calibrate.result import Calibration
    from bnport.layer import Layer, Layers
    from bnport.record import Array
    from bnport.verify import Report


def convert_calibrated(
    source: Any,
    target: Any,
    out: str | os.PathLike[str] | None,
    data: Any,
    *,
    calibration: Mapping[str, Any] | None = None,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    epsilon: float | None = None,
    target_epsilon: float | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Report:
    """`convert`, with mean and variance computed from `data` for the layers whose source stores none.

    If every layer of the source has statistics, all are computed anew: that is what was asked for, and a note says so.
    target: a whole Keras model, as a file or live. data, calibration: as for bnport.calibrate (method=, batch_size=,
    images=, ...), but for layers=, which the source decides, and frozen=: like `convert`, this writes into layers with
    trainable=False too. The other arguments are those of `convert`. Note that the model is run for this, with Keras.

    Raises what `convert` and `calibrate` raise; Unrepresentable if a target layer without gamma or beta would have to
    absorb one into statistics that are not known yet. Nothing is written then, and a live target is as it was.
    """
    if (calibration or {}).get("layers") is not None:
        raise InvalidValue(
            "layers: the source decides for which layers statistics are computed; leave pairs out with skip (--skip)"
        )
    live = not isinstance(target, str | os.PathLike)
    if not live:
        if out is None:
            raise InvalidValue("out: name the file to make; the target file itself is never changed")
        out = os.fspath(out)
        adapters.check_suffix(out, os.fspath(target))
        if isinstance(data, str | os.PathLike) and not os.path.exists(data):
            raise NotFound(f"{printable(data)}: no such file or folder")
        check_files(out, force, [*paths(source, target), *data_files(data, out)], (calibration or {}).get("resume"))
    sources = adapters.read_some(source, epsilon=epsilon, **adapters.checked(source_options, "source_options"))
    targets = adapters.read_target(target, epsilon=target_epsilon, **adapters.checked(target_options, "target_options"))
    if out is not None and not live:
        check_files(os.fspath(out), force, [*sources.files, *targets.files], (calibration or {}).get("resume"))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    without = {t: s for t, s in match.pairs.items() if sources[s].without}
    chosen = without or dict(match.pairs)
    _check_held(sources, targets, chosen)
    arrays = {s: targets[t].arrays() for t, s in chosen.items()}
    stand_ins = {s: (held["mean"].copy(), held["variance"].copy()) for s, held in arrays.items()}
    # paired once: numbers are evidence too, and the stand-ins below have others than the source
    pairing: dict[str, Any] = {
        "map": dict(match.pairs), "skip": skip, "only_under": only_under,
        "target_epsilon": target_epsilon, "target_options": target_options,
    }  # fmt: skip
    calibration = {
        "progress": progress, **(calibration or {}), "layers": list(chosen), "frozen": True, "keep_checkpoint": True
    }  # fmt: skip
    said = _other_weights(sources, targets, chosen)
    if not without:
        said.append(
            f"mean and variance of {len(chosen)} layers computed from data, though {sources.source} stores them: its own were"
            " not taken"
        )
    started = _with_statistics(sources, stand_ins, "")

    def finish(result: Calibration) -> Report:
        found = {chosen[layer.name]: (layer.mean, layer.variance) for layer in result.layers}
        completed = _with_statistics(sources, found, _said(result, data), (*result.notes, *said))
        report = convert(completed, target, out, **pairing, force=force, progress=progress, **options)
        if report.ok:
            delete(calibration.get("resume"))
        return report

    if live:
        from bnport.calibrate.run import calibrate

        before = frozen(targets)
        try:
            convert(started, target, **pairing, run=False, sha256=False)
            result = calibrate(target, data, **calibration)
            return finish(result)
        except BaseException:
            convert(before, target, map={name: name for name in before}, run=False, sha256=False)
            raise
    else:
        from bnport.calibrate.file import calibrate_file

        folder = os.path.dirname(os.path.abspath(os.fspath(out or "")))
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
            staged, done = (os.path.join(temporary, f"{n}-{os.path.basename(os.fspath(target))}") for n in "12")
            convert(started, target, staged, **pairing, sha256=False)
            with _named({staged: os.fspath(target), done: os.fspath(out or "")}):
                result = calibrate_file(staged, data, done, **calibration)
    return finish(result)


@contextlib.contextmanager
def _named(files: Mapping[str, str]) -> Iterator[None]:
    """An error that names a temporary file, which is gone then, names the file that it stood for."""
    try:
        yield
    except BnportError as error:
        said = str(error)
        for temporary, meant in files.items():
            said = said.replace(printable(temporary), printable(meant))
        if said == str(error):
            raise
        raise type(error)(said) from error


def _check_held(sources: Layers, targets: Layers, pairs: Mapping[str, str]) -> None:
    for target, source in pairs.items():
        held = sources[source].arrays()
        for field, neutral in (("gamma", 1), ("beta", 0)):
            if field not in targets[target].stores and field in held and (held[field] != neutral).any():
                raise Unrepresentable(
                    f"{printable(target)}: has no {field}, and the source's {field} is not {neutral}; with statistics from"
                    f" data it cannot be absorbed. Use a target whose layer has a {field}"
                )


def _other_weights(sources: Layers, targets: Layers, pairs: Mapping[str, str]) -> list[str]:
    """What to say where the weights before a target's layer are not, or may not be, the source's.

    Only BatchNorm is ported, and the statistics are those of what the target's own weights make of the data. Which weights
    are before a layer may be a guess; then they count only where none on one side is found on the other.
    """
    seen: dict[str, tuple[bytes, bytes, bool]] = {}
    for target, source in pairs.items():
        ours, theirs = sources[source].kernel, targets[target].kernel
        if ours is None or theirs is None or ours.shape != theirs.shape:
            continue
        a, b = (digest(sources[source].channels, kernel) for kernel in (ours, theirs))
        if a is not None and b is not None:
            seen[target] = a, b, ours.guessed or theirs.guessed
    none = {a for a, _, _ in seen.values()}.isdisjoint(b for _, b, _ in seen.values())
    others = [name for name, (a, b, guessed) in seen.items() if a != b and (none or not guessed)]
    unknown = [name for name in pairs if name not in seen]
    end = "mean and variance are right for the target's own; if it is to compute what the source does, port them first"
    return [
        f"the weights before {listed(names, 3)} {what} the source's: {end}"
        for names, what in ((others, "are not"), (unknown, "were not compared with"))
        if names
    ]


def _with_statistics(
    sources: Layers, statistics: Mapping[str, tuple[Array, Array]], note: str, more: Iterable[str] = ()
) -> Layers:
    """The source's layers, those of `statistics` with these (mean, variance) in place of their own, and notes on all."""

    def filled(layer: Layer) -> Layer:
        if layer.name not in statistics:
            return layer
        mean, variance = statistics[layer.name]
        held = {field: array for field, array in layer.arrays().items() if field in ("gamma", "beta")}
        notes = (*layer.notes, note) if note else layer.notes
        return layer.but(
            load=lambda: {**held, "mean": mean, "variance": variance},
            without="",
            tensors=None,
            stores=layer.stores | {"mean", "variance"},
            notes=notes,
        )

    return sources.but((filled(layer) for layer in sources.values()), notes=more)


def _said(result: Calibration, data: Any) -> str:
    where = printable(data) if isinstance(data, str | os.PathLike) else "the data given"
    return f"mean and variance computed from {where} ({result.method}, {result.samples} samples)"
