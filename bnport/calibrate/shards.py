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
from typing import TYPE_CHECKING, Any

from bnport.calibrate.moments import Moments, merge_all
from bnport.calibrate.worker import Done, Part, Plan, Task, forget, work, work_once
from bnport.errors import InvalidValue, WorkerLost, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnport.calibrate.identity import Order
    from bnport.calibrate.onepass import OnePass
    from bnport.calibrate.pinned import Pinned

LARGEST = 64  # batches per shard of a one-pass method: what is lost with a worker, and between two checkpoints


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
    run: OnePass,
    plan: Plan,
    length: int,
    engine: str,
    workers: int | None = None,
    address: Any = None,
    order: Order | None = None,
) -> Iterator[int]:
    """Give `run` the batches that it has not seen yet, out of `length`, from an engine; samples, shard after shard.

    order: is told the batches that were read, and refuses others than a resumed run's.
    """
    from bnport.calibrate.executors import cores, map_blocks

    size = shard_size(length, 2 * (workers or cores()))  # twice as many as they need, so that they end together
    todo = list(parts(plan, run.batches, length, min(size, LARGEST)))
    results = map_blocks(work_once, todo, engine=engine, workers=workers, address=address)
    try:
        for part, seen in zip(todo, results, strict=True):
            _check(order, part.first, seen.digests)
            run.add_run(seen.results, part.level)
            yield seen.samples
    finally:
        if engine == "serial":
            forget()
        else:
            results.close()  # type: ignore[attr-defined]
        if engine == "dask" and address is not None:  # its workers live on
            from bnport.calibrate.clusters import dask_client

            client, close = dask_client(None, address, 0)
            client.run(forget)
            close()


def _check(order: Order | None, first: int, digests: tuple[bytes, ...]) -> None:
    """The batches from number `first` on were read; refused if they are not those of the run that is resumed."""
    if order is not None:
        for number, digest in enumerate(digests, first):
            order.check(number, digest)


class Sharded:
    """The coordinator of one run of the population method; `run` does it.

    moments:    the result so far, by layer name; unused: layers that inference never calls.
    after_round: called with all moments known so far.
    order:      is told the batches that were read, and refuses others than a resumed run's.
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
        order: Order | None = None,
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
        self.order = order
        self.moments: dict[str, Moments] = dict(known or {})
        self.unused: set[str] = set()
        self.rounds = self.samples = self.restarted = 0

    def run(self) -> dict[str, Moments]:
        """Moments by layer name."""
        new: dict[str, Moments] = {}
        while waiting := [n for n in self.plan.names if n not in self.moments and n not in self.unused]:
            done = self._round(new)
            for (start, _), shard in zip(self.ranges, done, strict=True):
                _check(self.order, start, shard.digests)
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
            self.workers.map(forget, [None] * self.workers.count)


def _merged(shards: list[list[bytes]]) -> Moments:
    """Per use over the shards, in the tree of the shards; then over the uses."""
    uses = zip(*shards, strict=True)
    return merge_all(merge_all(map(Moments.from_bytes, use)) for use in uses)
