"""What came of a conversion: the Report, from what was planned and what is read back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport.containers.files import Digest, sha256
from bnport.engines import run_layers
from bnport.errors import MatchError, listed, printable
from bnport.layer import Layers
from bnport.plan import WRITABLE
from bnport.record import FIELDS
from bnport.verify import Report, check_bits, compare, with_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.engines import Engine
    from bnport.layer import Change, Layer
    from bnport.match import Match
    from bnport.record import BatchNorm
    from bnport.verify import LayerReport


class Outcome:
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
        digests: Mapping[str, Digest] | None,
    ) -> None:
        self.sources, self.targets, self.match, self.changes, self.notes = sources, targets, match, changes, notes
        self.digests = digests
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
                notes=(*layer.notes, *self._known(name, after[name]), *self.notes[name]),
            )
            for name, layer in layers.items()
        }

    def _known(self, name: str, after: Layer) -> Iterable[str]:
        """What the readers of both sides noted about a layer; of an untrained target that is about to be written, nothing."""
        return dict.fromkeys((*self.sources[self.match.pairs[name]].notes, *(() if after.untrained else after.notes)))

    def planned(self) -> Report:
        """The report of a dry run: the planned records, compared as if they had been read back."""
        held = self.targets.but(_as_layer(self.targets[name], change.record) for name, change in self.changes.items())
        return self._report("dry run", self._compare(held), None, ["nothing was written (dry run)"])

    def written(
        self,
        after: Layers,
        out: str | None,
        engine: Engine | None,
        progress: Callable[[int, int, str], None] | None,
        source_engine: Engine | None = None,
        asked: bool = False,
    ) -> Report:
        """The report of what `after`, read back, holds; `asked`: whether the real layers were to run."""
        bits = check_bits(self.targets, after, self.changes)
        if any(name not in after for name in self.changes):
            raise MatchError(f"{after.source}: layers are gone from what was written")
        layers = {
            name: with_checks(layer, [bits[name][0]], bits[name][1]) for name, layer in self._compare(after).items()
        }
        others = [name for name, (check, _) in bits.items() if not check.ok and name not in self.changes]
        not_run: list[str] = []
        if engine is None and source_engine is None and not asked:
            not_run.append("the real layers (--run does)")
        else:
            layers = run_layers(
                layers, self.sources, after, engine, not_run, progress, self.references,
                source_engine=None if self.references else source_engine,
            )  # fmt: skip
            if engine is None and not asked:
                not_run[0] = "the target's real layers (--run does)"
        report = self._report("convert", layers, out, not_run)
        if others:
            raise MatchError(f"{after.source}: layers that were not to be written changed: {listed(others)}")
        return report

    def _report(
        self,
        action: str,
        layers: Mapping[str, LayerReport],
        out: str | None,
        not_run: list[str],
    ) -> Report:
        return Report(
            action=action,
            source=self.sources.source,
            target=self.targets.source,
            out=out,
            layers=with_evidence(layers, self.match),
            notes=said(self.sources, self.targets, self.match),
            not_run=not_run,
            left=left(self.match),
            sha256=hashed(self.digests, self.sources.files),
        )


def hashing(*models: Any, wanted: bool = True) -> dict[str, Digest] | None:
    """path -> sha256 of those of the arguments that are files, from now on computed while other work goes on.

    None where it is not `wanted`: a file is then read only where a BatchNorm lies in it.
    """
    return {path: Digest(path) for path in paths(*models)} if wanted else None


def hashed(digests: Mapping[str, Digest] | None, files: Iterable[str]) -> dict[str, str]:
    """path -> sha256, waited for, and that of the other `files` of a model; nothing where `digests` is None."""
    if digests is None:
        return {}
    return {
        **{path: digest.result() for path, digest in digests.items()},
        **{path: sha256(path) for path in files},  # one after another: there may be thousands
    }


def path_of(model: Any) -> str | None:
    """The path of a file given as such, or of the file that Layers were read from; None for a live object."""
    if isinstance(model, Layers):
        return model.source if os.path.isfile(model.source) else None
    return os.fspath(model) if isinstance(model, str | os.PathLike) else None


def paths(*models: Any) -> list[str]:
    """Those of the arguments that are regular files, as paths."""
    return [p for p in (path_of(model) for model in models) if p is not None and os.path.isfile(p)]


def said(sources: Layers, targets: Layers, match: Match) -> list[str]:
    """What was assumed of either side, what their readers noted, and what speaks against pairs by name, once each."""
    return [
        *assumed(sources, match.pairs.values(), "--epsilon"),
        *sources.notes,
        *assumed(targets, match.pairs, "--target-epsilon"),
        *targets.notes,
        *_against_names(match),
    ]


def _against_names(match: Match) -> list[str]:
    found = [
        f"{printable(t)}: {match.evidence[t][0]}, but {words}"
        for t in match.by_name
        for words in match.evidence[t]
        if words.startswith("kernels differ")
    ]
    return found if len(found) < 4 else [f"{found[0]}; so it is for {len(found) - 1} more layers"]


def assumed(layers: Layers, names: Iterable[str], flag: str) -> list[str]:
    """What to say of the epsilons that these layers' source does not hold; `flag` is the option that sets them."""
    guessed = [layers[name].epsilon for name in names if "epsilon" in layers[name].assumed]
    return [
        f"epsilon {value!r} assumed for {guessed.count(value)} layers: {layers.source} does not store it; set it with {flag}"
        for value in sorted(set(guessed))
    ]


def left(match: Match) -> dict[str, tuple[str, ...]]:
    """The layers of either side that were left out as asked."""
    return {"left in the target": match.left_targets, "left in the source": match.left_sources}


def with_evidence(layers: Mapping[str, LayerReport], match: Match) -> list[LayerReport]:
    """The reports, each with why its source layer belongs to its target layer."""
    return [layer._replace(evidence="; ".join(match.evidence.get(name, ()))) for name, layer in layers.items()]


def _as_layer(layer: Layer, record: BatchNorm) -> Layer:
    """`layer` as if it held `record`."""
    return layer.but(epsilon=record.epsilon, load=lambda: {field: getattr(record, field) for field in FIELDS})
