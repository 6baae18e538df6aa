"""One calibration over many workers: each carries the frontier of its own shard of the batches.

    coordinator                                   worker, for each of its shards
    the model and the data as paths         →     opens both; keeps the model and the shard's activations
    round r: moments of the layers that     →     writes them into its layers, goes on to the next BatchNorm layers
    were measured in round r - 1            ←     and returns the moments of their inputs over its shard
    merges them in the tree of the shards

A shard is a run of 2**k batches, so that the tree over shards is the upper part of the tree over batches that one
process would build: the merged moments have the same bits, for any number of workers and shards (where a layer is used
several times, use by use). A worker that died is replaced, and its shards catch up in one go from the data and the
moments known by then: one partial forward pass over those shards, again the same bits.

What travels: per round and shard, 24 bytes per channel measured, each way; the data never do. Every worker must be able
to read the model file (put it on storage that they share, with `spill`) and the data.

Each batch must be computed alike everywhere for "the same bits" to hold for activations too: the same versions, the same
kind of processor, the same number of threads. Dask and Ray set OMP_NUM_THREADS=1 in their workers, and the last bits of
torch's convolutions depend on it: set it in this process too to compare with a run without an engine.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.calibrate.frontier import Frontier
from bnport.calibrate.graph import DATA
from bnport.calibrate.moments import Moments, merge_all
from bnport.calibrate.onepass import OnePass, Pooled
from bnport.errors import InvalidValue, WorkerLost, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnport.calibrate.data import Batch, Batches
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.pinned import Pinned

METHODS = ("population", "precise")  # the others depend on the order of all batches, or on each batch's own variance


class Plan(NamedTuple):
    """What every worker needs to know about a run; the same for all shards and rounds, picklable."""

    run: str  # a name that no other run has
    model: str  # path of a .keras file
    backend: str  # of Keras
    data: Any  # a path, or a function that returns batches anew
    settings: dict[str, Any]  # of data.read: batch_size, key, limit; images: of ImageFolder
    method: str
    names: tuple[str, ...]  # of the layers to measure
    unbiased: bool
    memory: int  # bytes of activations that one shard may keep in memory
    spill: str | None


class Task(NamedTuple):
    """One shard in one round."""

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


# In a worker.

_lock = threading.Lock()  # layers are hooked while they run: one shard at a time in a process
_run: dict[str, Any] = {}  # the run that this process works for: its name, model and sessions


def work(task: Task) -> Done | None:
    """Do one round of one shard; None if this process holds no state for it and was given no `known`."""
    with _lock:
        if _run.get("name") != task.plan.run:
            _forget()
            if task.known is None:
                return None
            _run.update(name=task.plan.run, live=_opened(task.plan), sessions={})
        session = _run["sessions"].get(task.shard)
        if session is None or task.known is not None:
            if task.known is None:
                return None
            if session is not None:
                session.close()
            session = _run["sessions"][task.shard] = _Session(task, _run["live"])
        with _run["live"].running():
            done: Done = session.round({name: Moments.from_bytes(data) for name, data in task.new.items()})
        return done


def _forget(_: object = None) -> None:
    for session in _run.get("sessions", {}).values():
        session.close()
    _run.clear()


def _opened(plan: Plan) -> LiveModel:
    import sys

    from bnport.calibrate.loading import check_config, load
    from bnport.calibrate.models import LiveModel

    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = plan.backend
    live = LiveModel(load(plan.model, check_config(plan.model)))
    if live.backend != plan.backend:
        raise InvalidValue(
            f"a worker runs Keras on {live.backend}, the model is on {plan.backend}; set KERAS_BACKEND there"
        )
    return live


class _Session:
    """A shard in this process."""

    def __init__(self, task: Task, live: LiveModel) -> None:
        from bnport.calibrate.store import Store

        self.task, self.live, self.samples = task, live, 0
        selected = [norm for norm in live.norms if norm.name in task.plan.names]
        known = {name: Moments.from_bytes(data) for name, data in (task.known or {}).items()}
        self.store = Store(live, task.plan.memory, task.plan.spill).__enter__()
        self.frontier: _ShardFrontier | None = None
        self.one_pass: OnePass | None = None
        if task.plan.method == "population":
            self.frontier = _ShardFrontier(live, selected, self.store, unbiased=task.plan.unbiased, known=known)
        else:
            self.one_pass = OnePass(live, selected, task.plan.method, unbiased=task.plan.unbiased)
        self.have: set[int] | None = None

    def _batches(self) -> Iterator[Batch]:
        import itertools

        batches = read(self.live, self.task.plan.data, self.task.plan.settings)
        for batch in itertools.islice(batches.iterate(self.task.first), self.task.batches):
            self.samples += len(self.live.tree.flatten(batch)[0])
            yield batch

    def round(self, new: dict[str, Moments]) -> Done:
        if self.one_pass is not None:
            self.one_pass.run(self._batches())
            trees = {name: kept.tree for name, kept in self.one_pass.kept.items() if isinstance(kept, Pooled)}
            moments = {name: [tree.result().to_bytes()] for name, tree in trees.items() if tree.n}
            return Done(moments, tuple(name for name in trees if name not in moments), self.samples)
        frontier = self.frontier
        assert frontier is not None
        frontier.give(new)
        self.have = frontier._round(self.have or {DATA}, self._batches() if self.have is None else None)
        moments = {name: [value.to_bytes() for value in uses] for name, uses in frontier.ready.items()}
        return Done(moments, tuple(norm.name for norm in frontier.unused), self.samples)

    def close(self) -> None:
        self.store.__exit__(None, None, None)


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


# The coordinator.


def read(live: LiveModel, data: Any, settings: dict[str, Any]) -> Batches:
    """The data as a worker, or the coordinator, opens them."""
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


def shard_size(batches: int, workers: int) -> int:
    """Batches per shard: the largest power of two that gives every worker at least two shards, or 1."""
    size = 1
    while size * 2 * workers * 2 <= batches:
        size *= 2
    return size


class Sharded:
    """The coordinator of one run; `run` does it.

    moments:    the result so far, by layer name; unused: layers that inference never calls.
    after_round: called with all moments known so far.
    function:   what workers do with a Task; default `work`.
    rounds, samples, restarted: how many there were (restarted: shards whose state was lost with a worker).
    """

    def __init__(
        self,
        plan: Plan,
        length: int,
        workers: Pinned,
        *,
        known: dict[str, Moments] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        after_round: Callable[[dict[str, Moments]], None] | None = None,
        function: Callable[[Task], Done | None] | None = None,
    ) -> None:
        if plan.method not in METHODS:
            raise InvalidValue(
                f"method {plan.method!r} depends on the order of the batches and runs in one process; with an engine there"
                f" are {listed(METHODS)}"
            )
        size = shard_size(length, workers.count)
        shards = -(-length // size)
        share = max(1, -(-shards // workers.count))
        self.plan = plan._replace(memory=plan.memory // share)
        self.ranges = [(first, min(size, length - first)) for first in range(0, length, size)]
        self.workers, self.function, self.progress, self.after_round = workers, function or work, progress, after_round
        self.moments: dict[str, Moments] = dict(known or {})
        self.unused: set[str] = set()
        self.rounds = self.samples = self.restarted = 0

    def run(self) -> dict[str, Moments]:
        """Moments by layer name."""
        new: dict[str, Moments] = {}
        while waiting := [n for n in self.plan.names if n not in self.moments and n not in self.unused]:
            done = self._round(new)
            names = set(done[0].moments)
            if any(set(shard.moments) != names for shard in done) or not (names or done[0].unused):
                raise InvalidValue(f"the shards do not reach the same layers: {listed(sorted(waiting), 3)} are left")
            new = {name: _merged([shard.moments[name] for shard in done]) for name in sorted(names)}
            self.moments.update(new)
            self.unused.update(*(shard.unused for shard in done))
            self.samples = sum(shard.samples for shard in done)
            self.rounds += 1
            if self.after_round is not None:
                self.after_round(self.moments)
            if self.progress is not None:
                self.progress(len(self.moments), len(self.plan.names), f"layers, round {self.rounds}")
        return self.moments

    def _round(self, new: dict[str, Moments]) -> list[Done]:
        """One round of all shards; those whose state is gone are started again with everything that is known."""
        stored = {name: value.to_bytes() for name, value in new.items()}
        known = {name: value.to_bytes() for name, value in self.moments.items()}
        first = self.rounds == 0
        tasks = [
            Task(self.plan, shard, start, count, {} if first else stored, known if first else None)
            for shard, (start, count) in enumerate(self.ranges)
        ]
        found = self.workers.map(self.function, tasks)
        lost = [shard for shard, done in enumerate(found) if done is None]
        while lost:
            self.restarted += len(lost)
            # each in the place that it had, so that it meets the same worker in the next round
            again = [task._replace(new={}, known=known) if task.shard in lost else None for task in tasks]
            for shard, done in enumerate(self.workers.map(_Only(self.function), again)):
                found[shard] = done if shard in lost else found[shard]
            lost = [shard for shard in lost if found[shard] is None]
        return found

    def forget(self) -> None:
        """Let the workers, which may go on living, free what they hold for this run."""
        with contextlib.suppress(WorkerLost):
            self.workers.map(_forget, [None] * self.workers.count)


class _Only:
    """Calls the function for tasks, not for the empty places between them. A class, so that it can be pickled."""

    def __init__(self, function: Callable[[Task], Done | None]) -> None:
        self.function = function

    def __call__(self, task: Task | None) -> Done | None:
        return None if task is None else self.function(task)


def _merged(shards: list[list[bytes]]) -> Moments:
    """Per use over the shards, in the tree of the shards; then over the uses."""
    uses = zip(*shards, strict=True)
    return merge_all(merge_all(map(Moments.from_bytes, use)) for use in uses)
