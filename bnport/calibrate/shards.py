"""One calibration over many workers: each measures its own shard of the batches, and the merged result has the same bits.

Population: each worker carries the frontier of its shards.

    coordinator                                   worker, for each of its shards
    the model and the data as paths         →     opens both; keeps the model and the shard's activations
    round r: moments of the layers that     →     writes them into its layers, goes on to the next BatchNorm layers
    were measured in round r - 1            ←     and returns the moments of their inputs over its shard
    merges them in the tree of the shards

The methods that make one pass (precise, average, moving): a shard is done once, by whoever is free; shards already merged
are what a checkpoint holds.

    the model and the data as paths         →     opens both; keeps the model
    a shard                                 →     one pass of onepass.py over its batches
    merges it in the tree of the batches    ←     per layer, what its batches have come to

A shard is a run of 2**k batches, so that the tree over shards is the upper part of the tree over batches that one
process would build: the merged values have the same bits, for any number of workers and shards (population: where a layer
is used several times, use by use). A worker that died is replaced, and only its shards are done again: those of the
population method catch up in one go from the data and the moments known by then, which is one partial forward pass.

What travels, per shard: population 24 bytes per channel, each way, over all rounds; precise 24, average and moving 16
bytes per channel, up. The data never do. Every worker must be able to read the model file (put it on storage that they
share, with `spill`) and the data.

Each batch must be computed alike everywhere for "the same bits" to hold for activations too: the same versions, the same
kind of processor, the same number of threads. Dask and Ray set OMP_NUM_THREADS=1 in their workers, and the last bits of
torch's convolutions depend on it: set it in this process too to compare with a run without an engine. A model that carries
anything from batch to batch (a stateful recurrent layer, random numbers drawn at inference) cannot be taken in shards: it
is refused.

A cluster that exists already is left as it was, but for one thing: idle Ray workers of a session that this process had
joined before keep the model of a one-pass method until that session ends or they work for another run.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.calibrate.frontier import Frontier
from bnport.calibrate.graph import DATA
from bnport.calibrate.moments import Moments, merge_all
from bnport.calibrate.onepass import OnePass
from bnport.errors import InvalidValue, WorkerLost, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnport.calibrate.data import Batch, Batches
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.pinned import Pinned

LARGEST = 64  # batches per shard of a one-pass method: what is lost with a worker, and between two checkpoints


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


class Part(NamedTuple):
    """One shard of a one-pass method: 2**level batches."""

    plan: Plan
    first: int
    level: int


class Seen(NamedTuple):
    """What a Part has come to: layer -> a stored Moments or Updates."""

    results: dict[str, bytes]
    samples: int


# In a worker.

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
        with _independent(live):
            done: Done = _run["sessions"][task.shard].round(
                {name: Moments.from_bytes(data) for name, data in task.new.items()}
            )
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
        with _independent(live):
            one_pass.run(batches)
        batches.check()
        return Seen(one_pass.results(), batches.samples)


def _model(plan: Plan) -> LiveModel:
    """The run's model, opened when this process first works for the run; what it holds for another run is freed."""
    if _run.get("name") != plan.run:
        _forget()
        _run.update(name=plan.run, live=_opened(plan), sessions={})
    live: LiveModel = _run["live"]
    return live


@contextlib.contextmanager
def _independent(live: LiveModel) -> Iterator[None]:
    """Inference that must not leave anything behind for the next batch."""
    with live.running():
        states = live._states()
        yield
        if any((variable.numpy() != value).any() for variable, value in states):
            raise InvalidValue(
                f"{live.what}: what a batch gives depends on the batches before it (a stateful recurrent layer, or random"
                " numbers drawn at inference), so it cannot be divided among workers; leave engine out"
            )


class _Counted:
    """Batches of a shard, counted."""

    def __init__(self, live: LiveModel, plan: Plan, first: int, batches: int) -> None:
        self.live, self.plan, self.first, self.batches = live, plan, first, batches
        self.samples = self.seen = 0

    def __iter__(self) -> Iterator[Batch]:
        import itertools

        batches = read(self.live, self.plan.data, self.plan.settings)
        for batch in itertools.islice(batches.iterate(self.first), self.batches):
            self.samples += len(self.live.tree.flatten(batch)[0])
            self.seen += 1
            yield batch

    def check(self) -> None:
        """All of them were there."""
        if self.seen != self.batches:
            raise InvalidValue(
                f"{printable(str(self.plan.data))}: ends after {self.first + self.seen} batches; there were more"
            )


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
    """A shard of the population method in this process."""

    def __init__(self, task: Task, live: LiveModel) -> None:
        from bnport.calibrate.store import Store

        selected = [norm for norm in live.norms if norm.name in task.plan.names]
        known = {name: Moments.from_bytes(data) for name, data in (task.known or {}).items()}
        self.batches = _Counted(live, task.plan, task.first, task.batches)
        self.store = Store(live, task.plan.memory, task.plan.spill).__enter__()
        self.frontier = _ShardFrontier(live, selected, self.store, unbiased=task.plan.unbiased, known=known)
        self.have: set[int] | None = None

    def round(self, new: dict[str, Moments]) -> Done:
        """Goes on to the next layers, once those that were measured have the moments of all shards."""
        frontier = self.frontier
        frontier.give(new)
        self.have = frontier._round(self.have or {DATA}, iter(self.batches) if self.have is None else None)
        self.batches.check()
        moments = {name: [value.to_bytes() for value in uses] for name, uses in frontier.ready.items()}
        return Done(moments, tuple(norm.name for norm in frontier.unused), self.batches.samples)

    def close(self) -> None:
        """Free what is kept."""
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


def can_travel(data: Any) -> bool:
    """Whether workers can open the data, from any batch on: a path, or a small object that gives batches by number."""
    import pickle

    if isinstance(data, str | os.PathLike):
        return True
    if isinstance(data, list | tuple | dict) or hasattr(data, "shape"):  # data themselves: they do not travel
        return False
    try:
        size = len(pickle.dumps(data))
    except Exception:  # whatever the object's own code raises
        return False
    return size <= 1 << 20 and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def shard_size(batches: int, workers: int) -> int:
    """Batches per shard: the largest power of two that gives every worker at least two shards, or 1."""
    size = 1
    while size * 2 * workers * 2 <= batches:
        size *= 2
    return size


def parts(plan: Plan, first: int, length: int, largest: int) -> Iterator[Part]:
    """Batches `first` to `length` as shards of a one-pass method, of at most `largest` batches.

    Each is a power of two and starts at a multiple of itself: a whole branch of the tree over all batches.
    """
    while first < length:
        level = min(largest, length - first).bit_length() - 1
        while first % (1 << level):
            level -= 1
        yield Part(plan, first, level)
        first += 1 << level


def one_pass(
    run: OnePass, plan: Plan, length: int, engine: str, workers: int | None = None, address: Any = None
) -> Iterator[int]:
    """Give `run` the batches that it has not seen yet, out of `length`, from an engine; samples, shard after shard."""
    from bnport.calibrate.executors import cores, dask_client, map_blocks

    size = shard_size(length, 2 * (workers or cores()))  # twice as many as they need, so that they end together
    todo = list(parts(plan, run.batches, length, min(size, LARGEST)))
    results = map_blocks(work_once, todo, engine=engine, workers=workers, address=address)
    try:
        for part, seen in zip(todo, results, strict=True):
            run.add_run(seen.results, part.level)
            yield seen.samples
    finally:
        if engine == "serial":
            _forget()
        else:
            results.close()  # type: ignore[attr-defined]
        if engine == "dask" and address is not None:  # its workers live on
            client, owned = dask_client(None, address, 0)
            client.run(_forget)
            if owned:
                client.close()


class Sharded:
    """The coordinator of one run of the population method; `run` does it.

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
        """One round of all shards; one whose state is gone is started again, at once, with everything that is known."""
        stored = {name: value.to_bytes() for name, value in new.items()}
        known = {name: value.to_bytes() for name, value in self.moments.items()}
        first = self.rounds == 0
        tasks = [
            Task(self.plan, shard, start, count, {} if first else stored, known if first else None)
            for shard, (start, count) in enumerate(self.ranges)
        ]

        def again(task: Task) -> Task:
            self.restarted += 1
            return task._replace(new={}, known=known)

        found: list[Done] = self.workers.map(self.function, tasks, again)
        return found

    def forget(self) -> None:
        """Let the workers, which may go on living, free what they hold for this run."""
        with contextlib.suppress(WorkerLost):
            self.workers.map(_forget, [None] * self.workers.count)


def _merged(shards: list[list[bytes]]) -> Moments:
    """Per use over the shards, in the tree of the shards; then over the uses."""
    uses = zip(*shards, strict=True)
    return merge_all(merge_all(map(Moments.from_bytes, use)) for use in uses)
