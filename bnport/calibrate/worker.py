"""What a worker of a calibration does: see shards.py, which hands out the work and merges what comes back.

A process works for one run at a time. What it holds for the run (the model, and for the population method the activations
of its shards) is freed when it is given work of another run, or told to `forget`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.calibrate.frontier import Frontier
from bnport.calibrate.graph import DATA
from bnport.calibrate.identity import of_batch
from bnport.calibrate.moments import Moments
from bnport.calibrate.onepass import OnePass
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnport.calibrate.data import Batch, Batches
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.states import Held


class Plan(NamedTuple):
    """What every worker needs to know about a run; the same for all shards and rounds, picklable."""

    run: str  # a name that no other run has
    model: str  # path of a .keras file
    backend: str  # of Keras
    data: Any  # a path, or an object that gives batches by their number
    settings: dict[str, Any]  # of data.read: batch_size, key, limit; images: of ImageFolder
    method: str
    names: tuple[str, ...]  # of the layers to measure
    unbiased: bool
    memory: int  # bytes of activations that one shard may keep in memory
    spill: str | None
    digests: bool = False  # whether to tell what the batches were: see identity.py


class Task(NamedTuple):
    """One shard in one round of the population method."""

    plan: Plan
    shard: int
    first: int  # number of the first batch
    batches: int
    new: dict[str, bytes]  # moments that are known since the last round
    known: dict[str, bytes] | None  # all moments that are known, for a worker that starts from nothing; else None


class Done(NamedTuple):
    """What a shard has measured: layer -> one stored Moments per use; None as a whole if its state is gone."""

    moments: dict[str, list[bytes]]
    unused: tuple[str, ...]
    samples: int
    digests: tuple[bytes, ...] = ()  # of the batches, where they were read in this round


class Part(NamedTuple):
    """One shard of a one-pass method: 2**level batches."""

    plan: Plan
    first: int
    level: int


class Seen(NamedTuple):
    """What a Part has come to: layer -> a stored Moments or Updates."""

    results: dict[str, bytes]
    samples: int
    digests: tuple[bytes, ...] = ()


_lock = threading.Lock()  # layers are hooked while they run: one shard at a time in a process
_run: dict[str, Any] = {}  # the run that this process works for: its name, model and sessions


def work(task: Task) -> Done | None:
    """Do one round of one shard; None if this process holds no state for it and was given no `known`."""
    with _lock:
        if task.known is None and (_run.get("name") != task.plan.run or task.shard not in _run["sessions"]):
            return None
        live = _model(task.plan)
        if task.known is not None:
            if task.shard in _run["sessions"]:
                _run["sessions"].pop(task.shard).close()
            _run["sessions"][task.shard] = _Session(task, live)
        session: _Session = _run["sessions"][task.shard]
        with _independent(live, session.batches):
            done: Done = session.round({name: Moments.from_bytes(data) for name, data in task.new.items()})
        return done


def work_once(part: Part) -> Seen:
    """Do one shard of a method that makes one pass."""
    with _lock:
        live = _model(part.plan)
        for norm in live.norms:
            norm.restore()  # an earlier shard left its last batch's statistics
        selected = [norm for norm in live.norms if norm.name in part.plan.names]
        one_pass = OnePass(live, selected, part.plan.method, unbiased=part.plan.unbiased)
        batches = _Counted(live, part.plan, part.first, 1 << part.level)
        with _independent(live, batches):
            one_pass.run(batches)
        batches.check()
        return Seen(one_pass.results(), batches.samples, batches.taken())


def _model(plan: Plan) -> LiveModel:
    """The run's model, opened when this process first works for the run; what it holds for another run is freed."""
    if _run.get("name") != plan.run:
        forget()
        _run.update(name=plan.run, live=_opened(plan), sessions={})
    live: LiveModel = _run["live"]
    return live


@contextlib.contextmanager
def _independent(live: LiveModel, batches: _Counted) -> Iterator[None]:
    """Inference that must not leave anything behind for the next batch."""
    with live.running():
        yield
        moved = [] if live.states is None else live.states.moved()
        if moved and not (all(held.kind == "random" for held in moved) and _in_vain(live, moved, batches.last)):
            raise InvalidValue(
                f"{live.what}: what a batch gives depends on the batches before it (a stateful recurrent layer, or random"
                " numbers drawn at inference), so it cannot be divided among workers; leave engine out"
            )


def _in_vain(live: LiveModel, moved: list[Held], batch: Any) -> bool:
    """Whether a batch gives the same with the random states before these draws as after them.

    Recurrent layers draw the masks of their dropout at inference too, and do not use them.
    """
    statistics = [(variable, variable.numpy().copy()) for norm in live.norms for variable in norm._variables()]
    found = []
    try:
        with live.untouched():
            for restore in (False, True):
                if restore:
                    for held in moved:
                        held.restore()
                once = OnePass(live, live.norms, "precise")
                once.run([batch])
                found.append(once.results())
    finally:
        for variable, value in statistics:
            variable.assign(value)
    return found[0] == found[1]


class _Counted:
    """Batches of a shard, counted; `last` is the one that was read last."""

    def __init__(self, live: LiveModel, plan: Plan, first: int, batches: int) -> None:
        self.live, self.plan, self.first, self.batches = live, plan, first, batches
        self.samples = self.seen = 0
        self.last: Any = None
        self._digests: list[bytes] = []

    def taken(self) -> tuple[bytes, ...]:
        """The digests of the batches that were read since the last call."""
        digests, self._digests = self._digests, []
        return tuple(digests)

    def __iter__(self) -> Iterator[Batch]:
        import itertools

        batches = read(self.live, self.plan.data, self.plan.settings)
        for batch in itertools.islice(batches.iterate(self.first), self.batches):
            self.samples += len(self.live.tree.flatten(batch)[0])
            self.seen += 1
            self.last = batch
            if self.plan.digests:
                self._digests.append(of_batch(self.live, batch))
            yield batch

    def check(self) -> None:
        """All of them were there."""
        if self.seen != self.batches:
            raise InvalidValue(
                f"{printable(str(self.plan.data))}: ends after {self.first + self.seen} batches; there were more"
            )


def forget(_: object = None) -> None:
    """Free what this process holds for a run."""
    for session in _run.get("sessions", {}).values():
        session.close()
    _run.clear()


def _opened(plan: Plan) -> LiveModel:
    import random
    import sys

    from bnport.calibrate.loading import check_config, load
    from bnport.calibrate.models import LiveModel

    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = plan.backend
    drawn = random.getstate()
    try:
        live = LiveModel(load(plan.model, check_config(plan.model)))
    finally:
        random.setstate(drawn)  # layers take the seeds of new generators from there; this may be the caller's process
    if live.backend != plan.backend:
        raise InvalidValue(
            f"a worker runs Keras on {live.backend}, the model is on {plan.backend}; set KERAS_BACKEND there"
        )
    return live


class _Session:
    """A shard of the population method in this process."""

    def __init__(self, task: Task, live: LiveModel) -> None:
        from bnport.calibrate.store import Store

        selected = [norm for norm in live.norms if norm.name in task.plan.names]
        known = {name: Moments.from_bytes(data) for name, data in (task.known or {}).items()}
        self.batches = _Counted(live, task.plan, task.first, task.batches)
        self.store = Store(live, task.plan.memory, task.plan.spill)
        self.frontier = _ShardFrontier(live, selected, self.store, unbiased=task.plan.unbiased, known=known)
        self.have: set[int] | None = None

    def round(self, new: dict[str, Moments]) -> Done:
        """Goes on to the next layers, once those that were measured have the moments of all shards."""
        frontier = self.frontier
        frontier.give(new)
        self.have = frontier._round(self.have or {DATA}, iter(self.batches) if self.have is None else None)
        self.batches.check()
        moments = {name: [value.to_bytes() for value in uses] for name, uses in frontier.ready.items()}
        unused = tuple(norm.name for norm in frontier.unused)
        return Done(moments, unused, self.batches.samples, self.batches.taken())

    def close(self) -> None:
        """Free what is kept."""
        self.store.close()


class _ShardFrontier(Frontier):
    """A Frontier whose layers wait for the moments of all shards."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ready: dict[str, list[Moments]] = {}
        super().__init__(*args, **options)

    def _measured(self, norm: Norm, uses: list[Moments]) -> None:
        self.ready[norm.name] = uses

    def give(self, moments: dict[str, Moments]) -> None:
        """The merged moments of layers that were measured; they get their statistics."""
        self.ready = {}
        for norm in list(self.open.values()):
            if norm.name in moments:
                self._finish(norm, moments[norm.name])


def read(live: LiveModel, data: Any, settings: dict[str, Any]) -> Batches:
    """The data as a worker opens them."""
    from bnport.calibrate import data as data_module
    from bnport.calibrate.folder import ImageFolder

    options = dict(settings)
    images = options.pop("images", None) or {}
    batch_size = options.get("batch_size")
    return data_module.read(
        data,
        inputs=live.inputs(),
        images=lambda path: ImageFolder(live, path, batch_size=batch_size, **images),
        **options,
    )
