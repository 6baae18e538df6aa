"""Workers that keep what they computed: call after call, block number i goes to the same process while that lives.

executors.map_blocks gives a block to whoever is free; work that goes on from what an earlier call left in the process
(shards.py) needs the opposite. A process that dies takes its state along: its blocks are done again elsewhere or in its
successor, and the function must notice that it starts from nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from bnport.calibrate.executors import ENGINES, RETRIES, cores, dask_client, ray_cluster, single_pool
from bnport.errors import InvalidValue, WorkerLost, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


PATIENCE = 20.0  # seconds that a restarted Dask worker is waited for before its shards go to others


class Pinned(Protocol):
    """What `open_workers` returns."""

    count: int

    def map(self, function: Callable[[Any], Any], blocks: Sequence[Any]) -> list[Any]:
        """function(block) for every block, in order; block i in worker i % count. Raises what it raises, WorkerLost."""
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

    def map(self, function: Callable[[Any], Any], blocks: Sequence[Any]) -> list[Any]:
        return [function(block) for block in blocks]

    def close(self) -> None:
        pass


class _Local:
    """One spawn pool of one process per worker, so that a death takes nobody else along."""

    def __init__(self, count: int, retries: int) -> None:
        self.count, self.retries = count, retries
        self.pools = [single_pool() for _ in range(count)]

    def map(self, function: Callable[[Any], Any], blocks: Sequence[Any]) -> list[Any]:
        from concurrent.futures.process import BrokenProcessPool

        results: dict[int, Any] = {}
        for _ in range(self.retries + 1):
            futures = {}
            for i in range(len(blocks)):
                if i not in results:
                    try:
                        futures[i] = self.pools[i % self.count].submit(function, blocks[i])
                    except BrokenProcessPool:  # died between two calls, or just now
                        self._replace(i % self.count)
                        futures[i] = self.pools[i % self.count].submit(function, blocks[i])
            broken = set()
            for i, future in futures.items():
                try:
                    results[i] = future.result()
                except BrokenProcessPool:
                    broken.add(i % self.count)
                except BaseException:
                    for other in futures.values():
                        other.cancel()
                    raise
            if len(results) == len(blocks):
                return [results[i] for i in range(len(blocks))]
            for worker in broken:
                self._replace(worker)
        missing = next(i for i in range(len(blocks)) if i not in results)
        raise WorkerLost(
            f"block {missing}: its worker process died {self.retries + 1} times (killed, or out of memory?);"
            " use fewer workers or less memory"
        )

    def _replace(self, worker: int) -> None:
        self.pools[worker].shutdown(wait=True, cancel_futures=True)
        self.pools[worker] = single_pool()

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown(wait=True, cancel_futures=True)


class _Dask:
    """Tasks bound to a worker by its address. Dask itself would move them: to balance the load, or never, if it is gone."""

    def __init__(self, workers: int | None, address: Any, retries: int) -> None:
        self.client, self.owned = dask_client(workers, address, retries)
        self.retries = retries
        self.homes = self._alive()
        self.count = max(1, len(self.homes))

    def _alive(self) -> list[str]:
        return sorted(self.client.nthreads())

    def map(self, function: Callable[[Any], Any], blocks: Sequence[Any]) -> list[Any]:
        import distributed

        def submit(i: int) -> Any:
            return self.client.submit(function, blocks[i], pure=False, workers=[self.homes[i % self.count]])

        self._rehome(patience=0)
        futures = [submit(i) for i in range(len(blocks))]
        moves = 0
        try:
            while True:
                try:
                    with self.client.as_current():
                        distributed.wait(futures, timeout=2)
                    break
                except TimeoutError:
                    moved = self._rehome(PATIENCE)
                moves += bool(moved)
                if moves > self.retries:
                    raise WorkerLost(f"Dask lost workers {moves} times during one round; is there enough memory?")
                for i, future in enumerate(futures):
                    if i % self.count in moved and not future.done():
                        future.cancel()
                        futures[i] = submit(i)
            found: list[Any] = self.client.gather(futures)
        except distributed.KilledWorker as error:
            raise WorkerLost(f"Dask lost the worker of a shard again and again: {printable(error)}") from None
        finally:
            self.client.cancel(futures)
        return found

    def _rehome(self, patience: float) -> set[int]:
        """Give the places of workers that are gone to new ones, or after `patience` seconds to others; which places."""
        import time

        deadline = time.monotonic() + patience
        while True:
            alive = self._alive()
            gone = [place for place, home in enumerate(self.homes) if home not in alive]
            spare = [home for home in alive if home not in self.homes]  # a restarted worker has a new address
            if len(spare) >= len(gone) or (time.monotonic() >= deadline and alive):
                break
            if time.monotonic() >= deadline + PATIENCE:
                raise WorkerLost("Dask has no workers left")
            time.sleep(0.2)
        for place in gone:
            self.homes[place] = spare.pop() if spare else alive[place % len(alive)]
        return set(gone)

    def close(self) -> None:
        if self.owned:
            self.client.close()


class _Ray:
    """One actor per worker, restarted by Ray when its process dies."""

    def __init__(self, workers: int | None, address: Any, retries: int) -> None:
        self.ray, self.owned = ray_cluster(workers, address)

        class Worker:
            def call(self, function: Any, block: Any) -> Any:
                return function(block)

        self.count = int(self.ray.cluster_resources().get("CPU", 0)) or workers or cores()
        actor = self.ray.remote(Worker).options(num_cpus=1, max_restarts=-1, max_task_retries=retries)
        self.actors = [actor.remote() for _ in range(self.count)]

    def map(self, function: Callable[[Any], Any], blocks: Sequence[Any]) -> list[Any]:
        references = [self.actors[i % self.count].call.remote(function, block) for i, block in enumerate(blocks)]
        try:
            found: list[Any] = self.ray.get(references)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError) as error:
            raise WorkerLost(f"Ray lost the worker of a shard again and again: {printable(error)}") from None
        return found

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.owned:
            self.ray.shutdown()
