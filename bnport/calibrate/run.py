"""calibrate(): the one path from a live model and data to new statistics in its BatchNorm layers."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport._lazy import np
from bnport.calibrate import data as data_module
from bnport.calibrate import identity
from bnport.calibrate.checkpoint import Checkpoint, delete, packed, unpacked
from bnport.calibrate.folder import ImageFolder, rescales_bytes
from bnport.calibrate.frontier import Frontier
from bnport.calibrate.models import LiveModel
from bnport.calibrate.moments import Moments
from bnport.calibrate.onepass import METHODS as ONE_PASS
from bnport.calibrate.onepass import OnePass
from bnport.calibrate.options import check_options, select
from bnport.calibrate.result import Calibration, LayerStatistics
from bnport.calibrate.store import Store, Workspace, memory_bytes
from bnport.errors import FormatError, InvalidValue, NotFound, first_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bnport.calibrate.data import Batch, Batches
    from bnport.calibrate.models import Norm
    from bnport.calibrate.worker import Plan
    from bnport.record import Array

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
    keep_checkpoint: bool = False,
) -> Calibration:
    """Compute the mean and variance that a live Keras model's BatchNorm layers should hold, from data, and store them.

    model:   Keras 3 (TensorFlow, torch or JAX) or Keras 2 (tf_keras): functional, Sequential, nested or subclassed.
    data:    arrays, .npy/.npz files, folders of images, tf.data, a DataLoader, ...: see bnport.calibrate.data.
    method:  "population": mean_l = E[x_l], variance_l = E[(x_l - mean_l)**2] over all the data, x_l computed at inference
             with the new statistics of all earlier layers in place: see bnport.calibrate.frontier.
             "precise", "average", "moving": one pass with batch statistics: see bnport.calibrate.onepass.
    unbiased: divide by n - 1 where the formula divides by n.
    batch_size: samples per batch of arrays and of folders (default 32); other data come in batches already.
    key:     the array of an .npz file with several.
    layers:  names or patterns ("conv1_*"); the other BatchNorm layers keep, and use, the statistics they hold.
    frozen:  also layers with trainable=False; they are left alone otherwise.
    memory:  how much may be kept of activations between rounds ("8GB", bytes; default half of what is free); beyond
             it they go to files in the folder `spill` (default the system's). Only "population" keeps any.
    resume:  a file for checkpoints; if it is there, the run it belongs to is continued, with or without an engine, to the
             same bits. Written after every round ("population"), else every 30 s. Deleted at the end, unless
             keep_checkpoint. Other data, another order of batches (shuffling) or another model are refused: .identity.
    minimum: fewer samples are refused. limit: stop after so many.
    images:  how a folder of images is decoded and scaled: size, scale, preprocessing, ...: see bnport.calibrate.folder.
    engine:  "local", "dask" or "ray": many processes or machines, for every method, to the same bits as without: see
             bnport.calibrate.shards and .executors. data must then be a path, or an object that has len() and gives
             batches by their number (a PyDataset) and pickles into at most 1 MiB, so one that opens its files by itself;
             `spill` a folder that all workers reach. workers, address: of the engine.
    progress: called as progress(done, total, what); total is 0 while unknown. `with
             bnport.cli.common.Progress() as progress:` gives the command's own display.

    Only moving mean and variance change (with renorm also the three arrays that mirror them): all of them or, on any
    error or interruption, none; the result's undo() puts them back. The model runs eagerly, at inference.

    Raises InvalidValue (data or arguments that do not fit, NaN), NotFound (no layer), Unrepresentable (statistics that
    do not fit the layer's dtype; with "population" a shared layer that feeds itself, or that inference also calls in
    training), FormatError (a damaged checkpoint).
    """
    if method not in METHODS:
        raise InvalidValue(f"method: expected one of {', '.join(METHODS)}, got {printable(method)!r}")
    check_options(data, images, engine, workers, address, spill, unbiased=unbiased, frozen=frozen)
    live = LiveModel(model)
    selected, left = select(live, layers, frozen)
    budget = memory_bytes(memory)
    notes: list[str] = []

    def open_images(path: str) -> ImageFolder:
        folder = ImageFolder(live, path, batch_size=batch_size, **(images or {}))
        notes.extend(folder.notes)
        return folder

    batches = data_module.read(
        data, inputs=live.inputs(), batch_size=batch_size, key=key, minimum=minimum, limit=limit, images=open_images
    )
    if batches.bytes and not rescales_bytes(live):
        notes.append(
            f"{batches.name}: uint8, which reaches the model as 0 ... 255; right if that is how it was trained, else scale"
            " the data first"
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
    if not keep_checkpoint:
        delete(resume)
    changed = [norm for norm in selected if norm not in run.unused]
    if not changed:
        raise NotFound(
            f"{live.what}: none of the {len(selected)} layers is called at inference, or a mask hides all that reaches it;"
            " nothing was changed"
        )
    left["never called at inference"] = [norm.name for norm in run.unused]

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
        notes=[*notes, *batches.notes, *run.notes, *filter(None, (norm.rounding() for norm in changed))],
        figures={**run.figures, "seconds": time.monotonic() - started},
        undo=undo,
    )


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
        self.order: identity.Order | None = None
        self.engine: _Engine | None = None

    def __call__(self) -> None:
        if self.resume is not None:
            self._open_checkpoint(self.resume)
        if self.method != "population":
            self._one_pass()
        elif self.engine is None:
            self._population()
        else:
            self._sharded()

    def _source(self, skip: int = 0) -> Iterator[Batch]:
        """The batches, counted; of a run that can be resumed each is held against the checkpoint's."""
        number = skip
        for batch in self.batches.iterate(skip) if skip else self.batches:
            if self.order is not None:
                self.order.check(number, identity.of_batch(self.live, batch))
            self.figures["samples"] += len(self.live.tree.flatten(batch)[0])
            number += 1
            yield batch
        if self.order is not None:
            self.order.ended(number)

    def _open_checkpoint(self, path: str) -> None:
        run = identity.of_run(self.live, self.selected, self.batches, self.method, self.unbiased)
        self.checkpoint = Checkpoint(path, run)
        state = self.checkpoint.state
        try:
            stored = None if state is None else state["digests"]
        except KeyError:
            raise FormatError(f"{printable(path)}: has no digests of batches") from None
        self.order = identity.Order(path, stored, whole=self.method == "population")

    def _save(self, state: dict[str, Array], batches: int) -> None:
        if self.checkpoint is not None and self.order is not None:
            counts = {"batches": batches, "samples": self.figures["samples"]}
            arrays = {name: np.array(int(count)) for name, count in counts.items()}
            self.checkpoint.save({**state, **arrays, "digests": self.order.to_array()[:batches]})

    def _nothing_to_do(self) -> None:
        """All layers were known. Files are those that were read; anything else is read once more, to tell."""
        if self.checkpoint is None or self.checkpoint.state is None:
            return
        if not self.batches.by_position:
            for _ in self._source():
                pass
        samples, batches = (int(self.checkpoint.state[key]) for key in ("samples", "batches"))
        self.figures.update(samples=samples, batches=batches, rounds=0)

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
            moments = frontier.run(self._source(), self.batches.length or 0)
            self.figures.update(
                batches=frontier.batches, rounds=frontier.rounds, resident=store.peak, spilled=store.spilled
            )
        if not frontier.rounds:
            self._nothing_to_do()
        self.unused = frontier.unused
        self.counts = {name: value.n for name, value in moments.items()}

    @contextlib.contextmanager
    def _plan(self) -> Iterator[Plan]:
        """What workers are told, with the model in a file, while this is open."""
        from bnport.calibrate import shards
        from bnport.calibrate.loading import check_config
        from bnport.calibrate.worker import Plan

        assert self.engine is not None
        data, settings = self.engine.data, self.engine.settings
        if not shards.can_travel(data):
            raise InvalidValue(
                f"{self.batches.name}: with an engine, data must be a path that every worker can open, or an object that"
                " gives batches by their number (a PyDataset), pickled into less than 1 MiB"
            )
        with Workspace(self.spill) as folder:
            path = os.path.join(folder.path, "model.keras")
            try:
                self.live.model.save(path)
            except (NotImplementedError, TypeError, ValueError) as error:  # a class without get_config()
                raise InvalidValue(
                    f"{self.live.what}: workers of an engine load the model from a file, and it cannot be saved:"
                    f" {printable(first_line(error), 300)}; leave engine out"
                ) from error
            try:
                check_config(path)
            except FormatError as error:
                raise InvalidValue(
                    f"workers of an engine load the model from a file; they refuse this one: {error}"
                ) from None
            yield Plan(
                os.path.basename(folder.path), path, self.live.backend, data, settings, self.method,
                tuple(norm.name for norm in self.selected), self.unbiased, self.budget, self.spill,
                self.order is not None,
            )  # fmt: skip

    def _enough(self, samples: int, minimum: int) -> None:
        if samples < minimum:
            raise InvalidValue(f"{self.batches.name}: {samples} samples, at least {minimum} needed")

    def _sharded(self) -> None:
        from bnport.calibrate import pinned, shards

        assert self.engine is not None
        with self._plan() as plan:
            known = self._known()
            length = self.batches.length or 0
            pool = pinned.open_workers(self.engine.name, self.engine.workers, self.engine.address)
            try:
                sharded = shards.Sharded(
                    plan, length, pool, known=known, order=self.order,
                    progress=self.progress, after_round=self._save_moments,
                )  # fmt: skip
                moments = sharded.run()
                sharded.forget()
            finally:
                pool.close()
        if sharded.rounds:
            self._enough(sharded.samples, self.engine.minimum)
        for norm in self.selected:
            if norm.name in moments:
                norm.take(moments[norm.name], self.unbiased)
        self.unused = [norm for norm in self.selected if norm.name not in moments]
        self.counts = {name: value.n for name, value in moments.items()}
        self.figures.update(samples=sharded.samples, batches=length, rounds=sharded.rounds)
        if not sharded.rounds:
            self._nothing_to_do()
        if sharded.restarted:
            self.notes.append(f"{sharded.restarted} shards were done again because their worker had died")

    def _save_moments(self, moments: dict[str, Moments]) -> None:
        if self.checkpoint is not None:
            parts = {name: {"moments": np.frombuffer(m.to_bytes(), np.uint8)} for name, m in moments.items()}
            self._save(packed(parts), len(self.order.digests) if self.order is not None else 0)

    def _one_pass(self) -> None:
        run = OnePass(self.live, self.selected, self.method, unbiased=self.unbiased)
        samples = self._resumed(run)
        if self.batches.by_position:
            self.figures["samples"] = samples
            source = self._source(run.batches)
        else:  # those that were seen are read again, to tell that they are the same
            source = itertools.islice(self._source(), run.batches, None)
        saved = time.monotonic()

        def save(every: float | None = None) -> None:
            nonlocal saved
            if time.monotonic() - saved >= (SAVE_EVERY if every is None else every):
                self._save(packed({name: kept.to_arrays() for name, kept in run.kept.items()}), run.batches)
                saved = time.monotonic()

        if self.engine is None:
            run.run(source, hint=self.batches.length or 0, progress=self.progress, after_batch=save)
        else:
            if run.batches and not self.batches.by_position:
                for _ in itertools.islice(self._source(), run.batches):
                    pass
            self.figures["samples"] = samples
            self._one_pass_sharded(run, save)
        save(0)  # what becomes of the result is not known yet
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
            for samples in shards.one_pass(run, plan, length, engine.name, engine.workers, engine.address, self.order):
                self.figures["samples"] += samples
                if self.progress is not None:
                    self.progress(run.batches, length, f"batch {run.batches}")
                save()
        self._enough(int(self.figures["samples"]), engine.minimum)
