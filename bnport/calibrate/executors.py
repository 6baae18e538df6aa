"""The same function over many blocks, in this process, on this machine's cores, or on a cluster that exists already.

`map_blocks(function, blocks)` yields function(block) for every block, in the order of the blocks, whatever the engine:
merged in a fixed tree (moments.Tree), the result has the same bits with one worker, with many, and after one was lost.

    engine      runs in                                           a worker that dies
    "serial"    this process                                      -
    "local"     a pool of spawned processes (the default)         a new pool; only the blocks in flight are done again
    "dask"      dask.distributed: a Client, or its address;       rescheduled by Dask, results of the dead worker too
                neither: processes of its own on this machine
    "ray"       Ray: the cluster that ray.init() joined, or an    retried by Ray
                address; neither: one of its own on this machine

Dask's own setting MALLOC_TRIM_THRESHOLD_ slows everything down that takes and frees large blocks of memory, torch's layers
2.3 times. It is left out in a cluster started here; in one that exists already set
`distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_` to null. And a LocalCluster gives a worker that died up for ever
if it is not back within `distributed.deploy.lost-worker-timeout`, 15 seconds; here that is an hour.

Blocks are descriptions of work (paths, ranges of rows), small and picklable; the function reads the data itself. Make a
block worth 100 ms or more: an engine adds 0.5 to 3 ms to each. `function` must be importable in another process (defined
at the top of a module); with "local", a script needs its `if __name__ == "__main__":`.

A function that raises ends the run with that exception. A block whose worker dies `retries` times more ends it with
WorkerLost: it is the block, then, not chance. So does a Dask cluster that has no worker at all for two minutes.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

from bnport.errors import InvalidValue, WorkerLost, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from typing import Any

    Progress = Callable[[int, int, str], None]

Block = TypeVar("Block")
Result = TypeVar("Result")

ENGINES = ("local", "serial", "dask", "ray")
RETRIES = 3
AHEAD = 4  # blocks per worker that are handed out and not done: nobody waits for the next one
HELD = 64  # results that may wait for an earlier block, which is done again because its worker died
QUEUED = 2  # of these, blocks that a local process has: one that it is at, one to go on with


def map_blocks(
    function: Callable[[Block], Result],
    blocks: Iterable[Block],
    *,
    engine: str = "local",
    workers: int | None = None,
    address: Any = None,
    retries: int = RETRIES,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """function(block) for every block, in order, computed elsewhere and up to AHEAD * workers blocks ahead.

    blocks:   may be a generator; it is read as needed. At most AHEAD * workers are handed out and not done, and at most
              so many, or HELD if that is more, wait for an earlier one (which is done again) or for you.
    workers:  processes; default: the cores that this process may use. A cluster that exists has its own number.
    address:  for "dask" a Client or the scheduler's address, for "ray" the cluster's address.
    retries:  how often a block is done again after its worker died; a Dask cluster that exists has its own number
              (distributed.scheduler.allowed-failures, 3).
    progress: called as progress(done, total, what); total is 0 where `blocks` has no length.

    Raises InvalidValue for an unknown engine, MissingDependency without it, WorkerLost, and what `function` raises.
    Stop early by closing the iterator: blocks in flight are cancelled where the engine can.
    """
    if engine not in ENGINES:
        raise InvalidValue(f"engine: expected one of {', '.join(ENGINES)}, got {printable(engine)!r}")
    if workers is not None and workers < 1:
        raise InvalidValue(f"workers: expected 1 or more, got {workers}")
    if address is not None and engine not in ("dask", "ray"):
        raise InvalidValue(f"engine {engine!r} has no address; expected engine 'dask' or 'ray'")
    total = len(blocks) if isinstance(blocks, Sized) else 0
    count = workers or cores()
    if engine == "serial":
        results: Iterator[Result] = map(function, blocks)
    elif engine == "local":
        results = _local(function, iter(blocks), count, retries)
    else:
        from bnport.calibrate.clusters import dask_blocks, ray_blocks

        on_cluster = dask_blocks if engine == "dask" else ray_blocks
        results = on_cluster(function, iter(blocks), workers, address, retries)
    return _reported(results, total, progress) if progress else results


def cores() -> int:
    """The processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _reported(results: Iterator[Result], total: int, progress: Progress) -> Iterator[Result]:
    for done, result in enumerate(results, 1):
        progress(done, total, "blocks")
        yield result


# This machine.


class Process:
    """A spawned process that does one block after the other, and is replaced when it dies. It starts at the first block."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # spawn: a forked child of a process with threads (BLAS, TensorFlow, a notebook) may hang
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)

    def submit(self, function: Callable[[Any], Any], block: Any) -> Future[Any]:
        """The future of function(block); BrokenProcessPool is its exception if the process dies before it is done."""
        from concurrent.futures.process import BrokenProcessPool

        try:
            return self._pool.submit(function, block)
        except BrokenProcessPool:
            self.close()
            self._start()
            return self._pool.submit(function, block)

    def close(self) -> None:
        """Wait for the block that is being done; drop the others; end the process."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """In a worker: a thread that ends the process when its parent is gone, killed too; it would wait for work for ever."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _local(
    function: Callable[[Block], Result], blocks: Iterator[Block], workers: int, retries: int
) -> Iterator[Result]:
    """One spawned process per worker, each with a block that it is at and one to go on with."""
    from concurrent.futures import FIRST_COMPLETED, wait

    teams = [_Worker(function) for _ in range(workers)]
    window: deque[_Pending] = deque()  # handed out and not yielded yet, in order
    todo: deque[_Pending] = deque()  # of these, the ones that no worker has
    numbered = enumerate(blocks)
    try:
        while True:
            room = max(AHEAD * workers, HELD) - len(window)
            not_done = len(todo) + sum(len(team.queue) for team in teams)
            for number, block in itertools.islice(numbered, max(0, min(room, AHEAD * workers - not_done))):
                window.append(_Pending(number, block))
                todo.append(window[-1])
            if not window:
                return
            while todo and len((idle := min(teams, key=_Worker.load)).queue) < QUEUED:
                idle.give(todo.popleft())
            head = window[0]
            if head.done:
                window.popleft()
                assert head.future is not None
                result: Result = head.future.result()
                yield result
                continue
            wait(
                [pending.future for team in teams for pending in team.queue if pending.future],
                return_when=FIRST_COMPLETED,
            )
            for team in teams:
                lost = team.collect()
                if not lost:
                    continue
                _blame(lost[0], retries)
                # a worker that lives has its imports and its model, a new one has not
                min((other for other in teams if other is not team), key=_Worker.load, default=team).give(lost[0])
                todo.extendleft(reversed(lost[1:]))
    finally:
        for team in teams:
            team.process.close()


class _Pending:
    """A block that was handed out: its number, the block, the future of its result, and how often it was lost."""

    __slots__ = ("block", "done", "future", "lost", "number")

    def __init__(self, number: int, block: Any) -> None:
        self.number, self.block = number, block
        self.future: Future[Any] | None = None
        self.done = False
        self.lost = 0


class _Worker:
    """A process and the blocks that it was given, in order."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.process = function, Process()
        self.queue: deque[_Pending] = deque()
        self.cold = False  # started after a death, and nothing done yet

    def load(self) -> tuple[int, bool]:
        """Who should be given the next block: the smallest."""
        return len(self.queue), self.cold

    def give(self, pending: _Pending) -> None:
        """The next block."""
        pending.future = self.process.submit(self.function, pending.block)
        self.queue.append(pending)

    def collect(self) -> list[_Pending]:
        """Mark what is done; if the process has died, everything else that it had: first the block that it was at."""
        from concurrent.futures.process import BrokenProcessPool

        while self.queue and (future := self.queue[0].future) is not None and future.done():
            if isinstance(future.exception(), BrokenProcessPool):
                lost = list(self.queue)
                self.queue.clear()
                self.cold = True
                return lost
            self.queue.popleft().done = True
            self.cold = False
        return []


def _blame(pending: _Pending, retries: int) -> None:
    """Give up on a block that was lost too often."""
    pending.lost += 1
    if pending.lost > retries:
        raise WorkerLost(
            f"block {pending.number}: its worker process died {pending.lost} times (killed, or out of memory?);"
            ' use fewer workers or smaller blocks. A script must call this below if __name__ == "__main__":'
        )
