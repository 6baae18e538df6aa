"""Clusters as executors.map_blocks and pinned.open_workers use them: Dask and Ray, one that exists or one started here."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from bnport.calibrate.executors import AHEAD, HELD, cores
from bnport.errors import MissingDependency, WorkerLost, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

Block = TypeVar("Block")
Result = TypeVar("Result")

LOOK = 5.0  # seconds of waiting between two looks at whether Dask has workers
NOBODY = 120.0  # seconds without any worker after which a Dask cluster is given up


def _in_order(
    submit: Callable[[Block], Any],
    finished: Callable[[set[Any]], Iterable[Any]],
    collect: Callable[[Any], Result],
    blocks: Iterator[Block],
    ahead: int,
    running: set[Any],
) -> Iterator[Result]:
    """Keep `ahead` blocks in flight and yield their results in order.

    submit gives a handle, collect its result; finished waits until some of the handles are done, and says which.
    running: an empty set; the handles that are not known to be done.
    """
    window: deque[Any] = deque()
    for block in blocks:
        window.append(submit(block))
        running.add(window[-1])
        while len(running) >= ahead or len(window) >= max(ahead, HELD):
            if window[0] in running:
                running.difference_update(finished(running))
            else:
                yield collect(window.popleft())
    while window:
        running.discard(window[0])
        yield collect(window.popleft())


def dask_client(workers: int | None, address: Any, retries: int) -> tuple[Any, Callable[[], None]]:
    """(a Dask client, what closes it if it was made here)."""
    try:
        import dask
        import distributed
    except ImportError:
        raise MissingDependency("engine 'dask' needs dask.distributed: pip install 'bnport[dask]'") from None
    if isinstance(address, distributed.Client):
        return address, lambda: None
    with contextlib.ExitStack() as held:
        if address is not None:
            client = distributed.Client(address, set_as_default=False)
        else:
            held.enter_context(dask.config.set(_local_dask(retries)))
            client = distributed.Client(
                set_as_default=False,
                n_workers=workers or cores(),
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
            )
        held.callback(client.close)
        return client, held.pop_all().close


def _local_dask(retries: int) -> dict[str, Any]:
    """Settings of Dask that hold while a cluster that was started here lives."""
    import dask

    environment = "distributed.nanny.pre-spawn-environ"
    return {
        # without one variable: any value makes glibc give back every large block at once, and a forward pass takes 1.2
        # (TensorFlow) to 2.3 (torch) times the processor's time, for the pages that it must be given anew
        environment: {k: v for k, v in dask.config.get(environment).items() if k != "MALLOC_TRIM_THRESHOLD_"},
        # a worker that is restarted is given up for ever after this, 15 s if not set: on a busy machine it is not back by then
        "distributed.deploy.lost-worker-timeout": "1 hour",
        "distributed.scheduler.allowed-failures": retries,
    }


class Vigil:
    """Notices that a Dask cluster has had no worker for too long: its futures would be waited for without end."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.since: float | None = None  # when it was first seen without any

    def workers(self) -> list[str]:
        """The addresses of the workers that there are; call this again and again while waiting. Raises WorkerLost."""
        found, now = sorted(self.client.nthreads()), time.monotonic()
        if found:
            self.since = None
        elif self.since is None:
            self.since = now
        elif now - self.since > NOBODY:
            raise WorkerLost(f"Dask has had no worker for {NOBODY:.0f} seconds: nobody is left to go on")
        return found


def dask_result(future: Any, seconds: float) -> Any:
    """What the function of a Dask future returned, or raises; Waiting after some seconds: it is computed again, or yet."""
    import distributed

    try:
        try:
            return future.result(timeout=seconds)
        except distributed.TimeoutError:  # Python 3.10 has several of this name
            if future.status != "error":
                raise Waiting from None
            return future.result()  # the function's own is of this class, or it came to its end just now
    except distributed.KilledWorker as error:
        raise WorkerLost(f"Dask lost the worker of a block again and again: {printable(error)}") from None


class Waiting(Exception):
    """A result is not there yet."""


def dask_blocks(
    function: Callable[[Block], Result], blocks: Iterator[Block], workers: int | None, address: Any, retries: int
) -> Iterator[Result]:
    """map_blocks on Dask."""
    client, close = dask_client(workers, address, retries)
    vigil = Vigil(client)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: set[Any] = set()

    def submit(block: Block) -> Any:
        future = client.submit(function, block, pure=False)  # or equal blocks would be taken for one
        future.add_done_callback(done.put)
        return future

    def finished(_: set[Any]) -> list[Any]:
        while True:
            try:
                return [done.get(timeout=LOOK)]
            except queue.Empty:
                vigil.workers()

    def collect(future: Any) -> Result:
        while True:
            try:
                result: Result = dask_result(future, LOOK)
            except Waiting:
                vigil.workers()
            else:
                return result

    try:
        threads = sum(client.nthreads().values()) or workers or cores()
        yield from _in_order(submit, finished, collect, blocks, AHEAD * threads, running)
    finally:
        client.cancel(list(running))
        close()


def ray_cluster(workers: int | None, address: Any) -> tuple[Any, bool]:
    """(the ray module, joined to a cluster; whether it was joined here and must be left)."""
    try:
        import ray
    except ImportError:
        raise MissingDependency("engine 'ray' needs Ray: pip install 'bnport[ray]'") from None
    owned = not ray.is_initialized()
    if owned:
        local = {"num_cpus": workers or cores(), "include_dashboard": False} if address is None else {}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    return ray, owned


def ray_blocks(
    function: Callable[[Block], Result], blocks: Iterator[Block], workers: int | None, address: Any, retries: int
) -> Iterator[Result]:
    """map_blocks on Ray."""
    ray, owned = ray_cluster(workers, address)
    task = ray.remote(function).options(max_retries=retries)

    def collect(reference: Any) -> Result:
        try:
            result: Result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the function's own exception, as the other engines raise it
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise WorkerLost(f"Ray lost the worker of a block {retries + 1} times: {printable(error)}") from None
        return result

    try:
        processors = int(ray.cluster_resources().get("CPU", 0)) or workers or cores()
        ahead = AHEAD * processors
        yield from _in_order(task.remote, lambda running: ray.wait(list(running))[0], collect, blocks, ahead, set())
    finally:
        if owned:
            ray.shutdown()
