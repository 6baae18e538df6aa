"""Workers that keep what they computed: call after call, block number i goes to the same process while that lives.

executors.map_blocks gives a block to whoever is free; work that goes on from what an earlier call left in the process
(shards.py) needs the opposite. A process that dies takes its state along, and nobody else: its blocks are given to its
successor as soon as that lives, while the others go on. The function must notice that it starts from nothing, and say so
by returning None; it is then given `again(block)` instead.

    engine     a death is noticed                             its successor
    "local"    at once (the process' handle)                  spawned at once
    "dask"     within POLL seconds                            its nanny's new worker; after PATIENCE seconds any other
    "ray"      at once                                        the actor, restarted by Ray
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from bnport.calibrate.clusters import Vigil, Waiting, dask_client, dask_result, ray_cluster
from bnport.calibrate.executors import ENGINES, RETRIES, Process, cores
from bnport.errors import InvalidValue, WorkerLost, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


POLL = 0.25  # seconds between two looks at which of Dask's workers live, while none of their blocks is done
PATIENCE = 20.0  # seconds that a restarted Dask worker is waited for before its shards go to others
LOST: Any = object()  # the outcome of a block whose worker died


class Pinned(Protocol):
    """What `open_workers` returns."""

    count: int

    def map(
        self, function: Callable[[Any], Any], blocks: Sequence[Any], again: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        """function(block) for every block, in order; block i in worker i % count. Raises what it raises, WorkerLost.

        again: what the same worker is given, at once, where the answer is None: a block that needs no earlier call.
        """
        ...

    def close(self) -> None:
        """Stop the workers that were started here."""
        ...


def open_workers(engine: str, workers: int | None = None, address: Any = None, retries: int = RETRIES) -> Pinned:
    """Workers of an engine (see executors): "serial", "local", "dask" or "ray"."""
    if engine not in ENGINES:
        raise InvalidValue(f"engine: expected one of {', '.join(ENGINES)}, got {printable(engine)!r}")
    if engine == "serial":
        return _Serial()
    if engine == "local":
        return _Local(workers or cores(), retries)
    return _Dask(workers, address, retries) if engine == "dask" else _Ray(workers, address, retries)


class _Serial:
    count = 1

    def map(
        self, function: Callable[[Any], Any], blocks: Sequence[Any], again: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        found = []
        for block in blocks:
            result = function(block)
            found.append(function(again(block)) if result is None and again is not None else result)
        return found

    def close(self) -> None:
        pass


class _Workers:
    """The part that all engines share: who gets what again."""

    count: int
    retries: int

    def map(
        self, function: Callable[[Any], Any], blocks: Sequence[Any], again: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        found: dict[int, Any] = {}
        lost = [0] * len(blocks)
        running = {self._submit(i % self.count, function, block): i for i, block in enumerate(blocks)}
        try:
            while running:
                for future, outcome in self._outcomes(running):
                    i = running.pop(future)
                    block = blocks[i]
                    if outcome is LOST:
                        lost[i] += 1
                        if lost[i] > self.retries:
                            raise WorkerLost(
                                f"block {i}: its worker process died {lost[i]} times (killed, or out of memory?); use fewer"
                                " workers or less memory"
                            )
                    elif outcome is None and again is not None:
                        block = again(block)
                    else:
                        found[i] = outcome
                        continue
                    running[self._submit(i % self.count, function, block)] = i
        finally:
            self._cancel(running)
        return [found[i] for i in range(len(blocks))]

    def _submit(self, place: int, function: Callable[[Any], Any], block: Any) -> Any:
        """A future, hashable, of a block at the worker in this place."""
        raise NotImplementedError

    def _outcomes(self, running: dict[Any, int]) -> list[tuple[Any, Any]]:
        """Waits; some futures that are done, with what they returned, or LOST. Raises what the function raised."""
        raise NotImplementedError

    def _cancel(self, running: Iterable[Any]) -> None:
        """Nobody waits for these any more."""


class _Local(_Workers):
    """One spawned process per worker, so that a death takes nobody else along."""

    def __init__(self, count: int, retries: int) -> None:
        self.count, self.retries = count, retries
        self.processes = [Process() for _ in range(count)]

    def _submit(self, place: int, function: Callable[[Any], Any], block: Any) -> Any:
        return self.processes[place].submit(function, block)

    def _outcomes(self, running: dict[Any, int]) -> list[tuple[Any, Any]]:
        from concurrent.futures import FIRST_COMPLETED, wait
        from concurrent.futures.process import BrokenProcessPool

        done = wait(running, return_when=FIRST_COMPLETED).done
        return [(f, LOST if isinstance(f.exception(), BrokenProcessPool) else f.result()) for f in done]

    def _cancel(self, running: Iterable[Any]) -> None:
        for future in running:
            future.cancel()

    def close(self) -> None:
        for process in self.processes:
            process.close()


class _Dask(_Workers):
    """Tasks bound to a worker by its address. Dask itself would move them: to balance the load, or never, if it is gone."""

    def __init__(self, workers: int | None, address: Any, retries: int) -> None:
        self.client, self._close = dask_client(workers, address, retries)
        self.retries = retries
        self.vigil = Vigil(self.client)
        self.homes = self._first_workers()
        self.count = len(self.homes)
        self.missed: dict[int, float] = {}  # place -> since when its worker is gone

    def _first_workers(self) -> list[str]:
        """Those of a cluster that has none yet are waited for."""
        try:
            while not (homes := self.vigil.workers()):
                time.sleep(POLL)
        except BaseException:
            self._close()
            raise
        return homes

    def map(
        self, function: Callable[[Any], Any], blocks: Sequence[Any], again: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        self._rehome()
        return super().map(function, blocks, again)

    def _submit(self, place: int, function: Callable[[Any], Any], block: Any) -> Any:
        return self.client.submit(function, block, pure=False, workers=[self.homes[place]])

    def _outcomes(self, running: dict[Any, int]) -> list[tuple[Any, Any]]:
        import distributed

        try:
            with self.client.as_current():
                done = distributed.wait(list(running), timeout=POLL, return_when="FIRST_COMPLETED").done
        except distributed.TimeoutError:  # Python 3.10 has several of this name
            done = set()
        outcomes = []
        for future in done:
            try:
                outcomes.append((future, dask_result(future, PATIENCE)))
            except Waiting:  # its worker has died since, and the result with it
                continue
        if outcomes:
            return outcomes
        moved = self._rehome()
        gone = [f for f, i in running.items() if i % self.count in moved and (f in done or not f.done())]
        self.client.cancel(gone)
        return [(future, LOST) for future in gone]

    def _rehome(self) -> set[int]:
        """Give the places of workers that are gone to new ones, or after PATIENCE seconds to others; which places."""
        alive, now, moved = self.vigil.workers(), time.monotonic(), set()
        spare = [home for home in alive if home not in self.homes]  # a restarted worker has a new address
        for place, home in enumerate(self.homes):
            if home in alive:
                continue
            waited = now - self.missed.setdefault(place, now)
            if spare or (alive and waited > PATIENCE):
                self.homes[place] = spare.pop() if spare else alive[place % len(alive)]
                moved.add(place)
                del self.missed[place]
        return moved

    def _cancel(self, running: Iterable[Any]) -> None:
        self.client.cancel(list(running))

    def close(self) -> None:
        self._close()


class _Ray(_Workers):
    """One actor per worker, restarted by Ray when its process dies."""

    def __init__(self, workers: int | None, address: Any, retries: int) -> None:
        self.ray, self.owned = ray_cluster(workers, address)
        self.retries = retries

        class Worker:
            def call(self, function: Any, block: Any) -> Any:
                return function(block)

        self.count = int(self.ray.cluster_resources().get("CPU", 0)) or workers or cores()
        actor = self.ray.remote(Worker).options(num_cpus=1, max_restarts=-1, max_task_retries=retries)
        self.actors = [actor.remote() for _ in range(self.count)]

    def _submit(self, place: int, function: Callable[[Any], Any], block: Any) -> Any:
        return self.actors[place].call.remote(function, block)

    def _outcomes(self, running: dict[Any, int]) -> list[tuple[Any, Any]]:
        done, _ = self.ray.wait(list(running), num_returns=1)
        try:
            return [(reference, self.ray.get(reference)) for reference in done]
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError) as error:
            raise WorkerLost(f"Ray lost the worker of a shard again and again: {printable(error)}") from None

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.owned:
            self.ray.shutdown()
