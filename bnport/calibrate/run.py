"""calibrate(): the one path from a live model and data to new statistics in its BatchNorm layers."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.calibrate import data as data_module
from bnport.calibrate.checkpoint import Checkpoint, fingerprint, packed, unpacked
from bnport.calibrate.folder import ImageFolder
from bnport.calibrate.frontier import Frontier
from bnport.calibrate.models import LiveModel
from bnport.calibrate.moments import Moments
from bnport.calibrate.onepass import METHODS as ONE_PASS
from bnport.calibrate.onepass import OnePass
from bnport.calibrate.result import Calibration, LayerStatistics
from bnport.calibrate.store import Store, memory_bytes
from bnport.errors import FormatError, InvalidValue, NotFound, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bnport.calibrate import shards
    from bnport.calibrate.data import Batch, Batches
    from bnport.calibrate.models import Norm

METHODS = ("population", *ONE_PASS)
SAVE_EVERY = 30.0  # seconds between checkpoints of a one-pass method


def calibrate(
    model: Any,
    data: Any,
    *,
    method: str = "population",
    unbiased: bool = False,
    batch_size: int | None = None,
    layers: str | Iterable[str] | None = None,
    frozen: bool = False,
    memory: str | float | None = None,
    spill: str | None = None,
    resume: str | None = None,
    minimum: int = 32,
    limit: int | None = None,
    key: str | None = None,
    images: Mapping[str, Any] | None = None,
    engine: str | None = None,
    workers: int | None = None,
    address: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Compute the mean and variance that a live Keras model's BatchNorm layers should hold, from data, and store them.

    model:   Keras 3 (TensorFlow, torch or JAX) or Keras 2 (tf_keras): functional, Sequential, nested or subclassed.
    data:    arrays, .npy/.npz files, folders of images, tf.data, a DataLoader, ...: see bnport.calibrate.data.
    method:  "population": mean_l = E[x_l], variance_l = E[(x_l - mean_l)**2] over all the data, x_l computed at inference
             with the new statistics of all earlier layers in place: see bnport.calibrate.frontier.
             "precise", "average", "moving": one pass with batch statistics: see bnport.calibrate.onepass.
    unbiased: divide by n - 1 where the formula divides by n.
    layers:  names or patterns ("conv1_*"); the other BatchNorm layers keep, and use, the statistics they hold.
    frozen:  also layers with trainable=False; they are left alone otherwise.
    memory:  how much may be kept of activations between rounds ("8GB", bytes; default half of what is free); beyond
             it they go to files in the folder `spill` (default the system's). Only "population" keeps any.
    resume:  a file for checkpoints; if it is there, the run it belongs to is continued, with or without an engine, to the
             same bits. Written after every round ("population"), else every 30 s. Deleted at the end.
    minimum: fewer samples are refused. limit: stop after so many.
    images:  how a folder of images is decoded and scaled: size, scale, preprocessing, ...: see bnport.calibrate.folder.
    engine:  "local", "dask" or "ray": many processes or machines, for every method, to the same bits as without: see
             bnport.calibrate.shards and .executors. data must then be a path or a PyDataset that opens its
             files by itself, and `spill` a folder that all workers reach. workers, address: of the engine.
    progress: called as progress(done, total, what); total is 0 while unknown.

    Only moving mean and variance change (with renorm also the three arrays that mirror them): all of them or, on any
    error or interruption, none; the result's undo() puts them back. The model runs eagerly, at inference.

    Raises InvalidValue (data or arguments that do not fit, NaN), NotFound (no layer), Unrepresentable (statistics that
    do not fit the layer's dtype, a shared layer that feeds itself with "population"), FormatError (a damaged checkpoint).
    """
    if method not in METHODS:
        raise InvalidValue(f"method: expected one of {', '.join(METHODS)}, got {printable(method)!r}")
    live = LiveModel(model)
    selected, left = _select(live, layers, frozen)
    budget = memory_bytes(memory)
    notes: list[str] = []

    def open_images(path: str) -> ImageFolder:
        folder = ImageFolder(live, path, batch_size=batch_size, **(images or {}))
        notes.extend(folder.notes)
        return folder

    if images and not (isinstance(data, str | os.PathLike) and os.path.isdir(data)):
        raise InvalidValue(f"{listed(images)}: options for a folder of images, which the data are not")
    batches = data_module.read(
        data, inputs=live.inputs(), batch_size=batch_size, key=key, minimum=minimum, limit=limit, images=open_images
    )
    run = _Run(live, selected, batches, method, unbiased, budget, spill, resume, progress)
    if engine is not None:
        settings = {"batch_size": batch_size, "key": key, "limit": limit, "images": dict(images) if images else None}
        run.engine = _Engine(engine, workers, address, data, settings, minimum)
    started = time.monotonic()
    try:
        with live.running():
            run()
        for norm in live.norms:
            if norm not in selected or norm in run.unused:
                norm.restore()  # Keras 2 updates a layer that the model itself calls with training=True
    except BaseException:
        for norm in live.norms:
            norm.restore()
        raise
    if not [norm for norm in selected if norm not in run.unused]:
        raise NotFound(f"{live.what}: none of the {len(selected)} layers is called at inference; nothing was changed")
    left["never called at inference"] = [norm.name for norm in run.unused]
    changed = [norm for norm in selected if norm not in run.unused]

    def undo() -> None:
        for norm in changed:
            norm.restore()

    return Calibration(
        model=live.what,
        data=batches.name,
        method=method,
        unbiased=unbiased,
        layers=[_statistics(norm, run.counts[norm.name]) for norm in changed],
        left=left,
        notes=[*notes, *batches.notes, *run.notes],
        figures={**run.figures, "seconds": time.monotonic() - started},
        undo=undo,
    )


def _select(
    live: LiveModel, layers: str | Iterable[str] | None, frozen: bool
) -> tuple[list[Norm], dict[str, list[str]]]:
    patterns = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    names = [norm.name for norm in live.norms]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern) and pattern not in names:
            raise NotFound(
                f"{live.what}: no BatchNorm layer is called {printable(pattern)!r}; there are {listed(names)}"
            )
    asked = [
        norm
        for norm in live.norms
        if patterns is None or any(norm.name == p or fnmatch.fnmatchcase(norm.name, p) for p in patterns)
    ]
    left = {
        "not asked for": [norm.name for norm in live.norms if norm not in asked],
        "frozen (trainable=False; frozen=True includes them)": [n.name for n in asked if n.frozen and not frozen],
    }
    selected = [norm for norm in asked if frozen or not norm.frozen]
    if not selected:
        raise NotFound(
            f"{live.what}: all of its {len(asked)} BatchNorm layers are frozen (trainable=False); frozen=True includes them"
        )
    return selected, left


def _statistics(norm: Norm, n: int) -> LayerStatistics:
    old_mean, old_variance = (array.astype("float64") for array in norm.before[:2])
    mean, variance = norm.read()
    return LayerStatistics(norm.name, n, norm.epsilon, old_mean, old_variance, mean, variance)


class _Engine(NamedTuple):
    """Where the work is done, and what workers need to open the data."""

    name: str
    workers: int | None
    address: Any
    data: Any
    settings: dict[str, Any]
    minimum: int


class _Run:
    """One calibration under way."""

    def __init__(
        self, live: LiveModel, selected: list[Norm], batches: Batches, method: str, unbiased: bool, budget: int,
        spill: str | None, resume: str | None, progress: Callable[[int, int, str], None] | None,
    ) -> None:  # fmt: skip
        self.live, self.selected, self.batches, self.method, self.unbiased = live, selected, batches, method, unbiased
        self.budget, self.spill, self.resume, self.progress = budget, spill, resume, progress
        self.unused: list[Norm] = []
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []
        self.figures: dict[str, int | float] = {"samples": 0, "batches": 0, "rounds": 1}
        self.checkpoint: Checkpoint | None = None
        self.engine: _Engine | None = None

    def __call__(self) -> None:
        if self.method != "population":
            self._one_pass()
        elif self.engine is None:
            self._population()
        else:
            self._sharded()
        if self.checkpoint is not None:
            self.checkpoint.delete()

    def _source(self, skip: int = 0) -> Iterator[Batch]:
        for batch in self.batches.iterate(skip) if skip else self.batches:
            self.figures["samples"] += len(self.live.tree.flatten(batch)[0])
            yield batch

    def _open_checkpoint(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """Read one batch, for the fingerprint, and give it back in front of the others."""
        if self.resume is None:
            return source
        first = next(source, None)
        settings = (self.method, self.unbiased, [norm.name for norm in self.selected], self.batches.fingerprint)
        self.checkpoint = Checkpoint(self.resume, fingerprint(self.live, first, settings))
        return source if first is None else itertools.chain([first], source)

    def _known(self) -> dict[str, Moments]:
        """What the checkpoint of an interrupted population run holds."""
        known = {}
        if self.checkpoint is not None and self.checkpoint.state is not None:
            for name, part in unpacked(self.checkpoint.state).items():
                try:
                    known[name] = Moments.from_bytes(part["moments"].tobytes())
                except KeyError:
                    raise FormatError(f"{printable(self.resume)}: has no moments of {printable(name)}") from None
            self.notes.append(f"resumed: {len(known)} of {len(self.selected)} layers were known")
        return known

    def _population(self) -> None:
        source = self._open_checkpoint(self._source())
        known = self._known()
        with Store(self.live, self.budget, self.spill) as store:
            frontier = Frontier(
                self.live, self.selected, store,
                unbiased=self.unbiased, known=known, progress=self.progress, after_round=self._save_moments,
            )  # fmt: skip
            if not frontier.taken_apart:
                self.notes.append(
                    "the model has no graph of layers (subclassed): one prefix pass per BatchNorm layer, which is slower"
                )
            moments = frontier.run(source, self.batches.length or 0)
            self.figures.update(
                batches=frontier.batches, rounds=frontier.rounds, resident=store.peak, spilled=store.spilled
            )
        self.unused = frontier.unused
        self.counts = {name: value.n for name, value in moments.items()}

    @contextlib.contextmanager
    def _plan(self) -> Iterator[shards.Plan]:
        """What workers are told, with the model in a file, while this is open."""
        import tempfile

        from bnport.calibrate import shards
        from bnport.calibrate.loading import check_config

        assert self.engine is not None
        data, settings = self.engine.data, self.engine.settings
        if not shards.can_travel(data):
            raise InvalidValue(
                f"{self.batches.name}: with an engine, data must be a path that every worker can open, or an object that"
                " gives batches by their number (a PyDataset), pickled into less than 1 MiB"
            )
        with tempfile.TemporaryDirectory(prefix="bnport-", dir=self.spill) as folder:
            path = os.path.join(folder, "model.keras")
            self.live.model.save(path)
            try:
                check_config(path)
            except FormatError as error:
                raise InvalidValue(
                    f"workers of an engine load the model from a file; they refuse this one: {error}"
                ) from None
            yield shards.Plan(
                os.path.basename(folder), path, self.live.backend, data, settings, self.method,
                tuple(norm.name for norm in self.selected), self.unbiased, self.budget, self.spill,
            )  # fmt: skip

    def _enough(self, samples: int, minimum: int) -> None:
        if samples < minimum:
            raise InvalidValue(f"{self.batches.name}: {samples} samples, at least {minimum} needed")

    def _sharded(self) -> None:
        from bnport.calibrate import pinned, shards

        assert self.engine is not None
        with self._plan() as plan:
            if self.resume is not None:
                next(self._open_checkpoint(self._source()), None)
            known = self._known()
            length = self.batches.length or 0
            pool = pinned.open_workers(self.engine.name, self.engine.workers, self.engine.address)
            try:
                sharded = shards.Sharded(
                    plan, length, pool, known=known, progress=self.progress, after_round=self._save_moments
                )
                moments = sharded.run()
                sharded.forget()
            finally:
                pool.close()
        if sharded.rounds:  # or all was known: the run that is resumed had read the data
            self._enough(sharded.samples, self.engine.minimum)
        for norm in self.selected:
            if norm.name in moments:
                norm.write(moments[norm.name].mean, moments[norm.name].variance(self.unbiased))
        self.unused = [norm for norm in self.selected if norm.name not in moments]
        self.counts = {name: value.n for name, value in moments.items()}
        self.figures.update(samples=sharded.samples, batches=length, rounds=sharded.rounds)
        if sharded.restarted:
            self.notes.append(f"{sharded.restarted} shards were done again because their worker had died")

    def _save_moments(self, moments: dict[str, Moments]) -> None:
        if self.checkpoint is not None:
            from bnport._lazy import np

            parts = {name: {"moments": np.frombuffer(m.to_bytes(), np.uint8)} for name, m in moments.items()}
            self.checkpoint.save(packed(parts))

    def _one_pass(self) -> None:
        run = OnePass(self.live, self.selected, self.method, unbiased=self.unbiased)
        source = self._open_checkpoint(self._source())
        samples = self._resumed(run)
        if run.batches and not self.batches.repeatable:
            source = itertools.islice(source, run.batches, None)
        elif run.batches:
            self.figures["samples"] = samples
            source = self._source(run.batches)
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if self.checkpoint is not None and time.monotonic() - saved >= SAVE_EVERY:
                from bnport._lazy import np

                state = packed({name: kept.to_arrays() for name, kept in run.kept.items()})
                counts = {"batches": run.batches, "samples": self.figures["samples"]}
                self.checkpoint.save({**state, **{name: np.array(count) for name, count in counts.items()}})
                saved = time.monotonic()

        if self.engine is None:
            run.run(source, hint=self.batches.length or 0, progress=self.progress, after_batch=save)
        else:
            self.figures["samples"] = samples
            self._one_pass_sharded(run, save)
        self.unused = run.finish()
        self.figures["batches"] = run.batches
        self.counts = {norm.name: run.count(norm) for norm in self.selected}

    def _resumed(self, run: OnePass) -> int:
        """Give `run` what the checkpoint holds; the number of samples in that."""
        if self.checkpoint is None or self.checkpoint.state is None:
            return 0
        parts = unpacked(self.checkpoint.state)
        try:
            run.batches, samples = (int(self.checkpoint.state[key]) for key in ("batches", "samples"))
            for norm in self.selected:
                run.kept[norm.name].from_arrays(parts[norm.name], run.batches)
        except KeyError as error:
            raise FormatError(f"{printable(self.resume)}: has no {printable(error.args[0])}") from None
        self.notes.append(f"resumed after {run.batches} batches")
        return samples

    def _one_pass_sharded(self, run: OnePass, save: Callable[[], None]) -> None:
        from bnport.calibrate import shards

        assert self.engine is not None
        engine, length = self.engine, self.batches.length or 0
        with self._plan() as plan:
            for samples in shards.one_pass(run, plan, length, engine.name, engine.workers, engine.address):
                self.figures["samples"] += samples
                if self.progress is not None:
                    self.progress(run.batches, length, f"batch {run.batches}")
                save()
        self._enough(int(self.figures["samples"]), engine.minimum)
