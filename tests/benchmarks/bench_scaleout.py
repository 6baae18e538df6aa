"""The same blocks in one process, on two workers, and with one of the two killed by SIGKILL on the way, engine by engine.

    python tests/benchmarks/bench_scaleout.py [--engines local,dask,ray] [--blocks 60] [--rounds 5] [--work 0.12] [--rows 512]

A block is `--work` seconds of moments() over `--rows` x 256 made-up features, in one thread: half a megabyte, which a
core's own cache holds. With more (8192) the cores wait for the memory that they share, with or without an engine. Every
run checks that the merged result has the bits of the serial run; each engine once with one worker too. "bare" is what
two cores give without any engine: two processes that do every second block each and send back nothing, their start
counted. Dask and Ray run on clusters of two processes of their own, started once and not counted; "local" starts its
processes in every run, and that is counted. One engine after the other, as a cluster that has nothing to do takes time
too; each with rounds of its own. In between, what a kill left behind is waited for. Then what the engine itself costs
per block (empty blocks), and the bytes of a block's result. Times are medians over the rounds, ratios are medians of
each round's ratio. Nothing is asserted on time.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
os.environ.update(
    dict.fromkeys(THREADS, "1")
)  # as Dask and Ray do in their workers; otherwise one process uses all cores

import numpy as np  # noqa: E402

from bnport.calibrate import compiled  # noqa: E402
from bnport.calibrate.executors import cores, map_blocks  # noqa: E402
from bnport.calibrate.moments import merge_all, moments  # noqa: E402

_features = []  # and a buffer of the same shape: temporaries above 128 kB are slow in Dask's workers


def work(block):
    """Moments of `repeat` passes over made-up features; kills its process the first time if `canary` is a new file."""
    seed, repeat, canary = block
    if canary is not None:
        try:
            os.close(os.open(canary, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    compiled.use(False)  # every process would come to the compiled loops at another block
    if not _features:
        rows = int(os.environ["BENCH_ROWS"])
        _features.append(np.random.default_rng(0).standard_normal((rows, 256), dtype=np.float32))
        _features.append(np.empty_like(_features[0]))
    np.add(_features[0], np.float32(seed % 7), out=_features[1])
    return merge_all(moments(_features[1]) for _ in range(repeat))


def works(blocks):
    """Several blocks, for a process without an engine."""
    for block in blocks:
        work(block)


def empty(block):
    """Nothing."""
    return block


class Cluster:
    """A cluster of `workers` processes for one engine; `address` is what map_blocks takes."""

    def __init__(self, engine, workers, functions):
        self.engine, self.workers, self.address, self.functions = engine, workers, None, functions
        if engine == "dask":
            import distributed

            self.address = distributed.Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        elif engine == "ray":
            import ray

            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def map(self, function, blocks):
        return map_blocks(function, blocks, engine=self.engine, workers=self.workers, address=self.address)

    def time(self, blocks, expected, what):
        """Seconds for these blocks, once all workers are there."""
        if self.engine == "dask":
            self.address.wait_for_workers(self.workers)
        if self.engine != "local":
            list(self.map(self.functions.work, [(k, 1, None) for k in range(4 * self.workers)]))
        started = time.perf_counter()
        merged = merge_all(self.map(self.functions.work, blocks))
        seconds = time.perf_counter() - started
        if not merged.same_bits(expected):
            raise SystemExit(f"{self.engine}, {what}: other bits than the serial run")
        return seconds

    def overhead(self, count=1000):
        """Seconds per empty block."""
        started = time.perf_counter()
        for _ in self.map(self.functions.empty, range(count)):
            pass
        return (time.perf_counter() - started) / count

    def close(self):
        if self.engine == "dask":
            self.address.close()
        elif self.engine == "ray":
            import ray

            ray.shutdown()


def bare(functions, blocks, workers=2):
    """Seconds for the blocks dealt out to processes that nobody watches."""
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    processes = [context.Process(target=functions.works, args=(blocks[k::workers],)) for k in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - started


def one_round(cluster, functions, plain, expected, repeat, taken):
    """Everything once; seconds into `taken`."""
    started = time.perf_counter()
    merge_all(map(functions.work, plain))
    taken["serial"].append(time.perf_counter() - started)
    taken["bare"].append(bare(functions, plain))
    taken["two"].append(cluster.time(plain, expected, "2 workers"))
    with tempfile.TemporaryDirectory() as folder:
        canary = os.path.join(folder, "died")
        killed = [(k, repeat, canary if k == len(plain) // 2 else None) for k in range(len(plain))]
        taken["killed"].append(cluster.time(killed, expected, "one killed"))
        if not os.path.exists(canary):
            raise SystemExit(f"{cluster.engine}: nobody was killed")


def ratio(above, below):
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="local,dask,ray")
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=float, default=0.12)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    os.environ["BENCH_ROWS"] = str(options.rows)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import bench_scaleout as functions  # by its name: of __main__, engines would send the features along with every block

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it reports the kill
    functions.work((0, 1, None))
    started = time.process_time()
    functions.work((0, 20, None))
    repeat = max(1, round(options.work / (time.process_time() - started) * 20))
    plain = [(k, repeat, None) for k in range(options.blocks)]
    started = time.perf_counter()
    expected = merge_all(map(functions.work, plain))
    serial = time.perf_counter() - started
    print(f"{options.blocks} blocks of {serial / options.blocks:.3f} s; serial {serial:.2f} s; {cores()} cores")
    print(f"load {os.getloadavg()[0]:.1f}; a result of 256 channels is {len(expected.to_bytes())} bytes", flush=True)
    heads = ("serial", "bare", "2 workers", "1 of 2 killed", "to undisturbed", "ms per block")
    print("        ", *(f"{head:>15}" for head in heads), flush=True)
    for engine in options.engines.split(","):
        single = Cluster(engine, 1, functions)
        single.time(plain, expected, "1 worker")
        single.close()
        cluster = Cluster(engine, 2, functions)
        taken = {what: [] for what in ("serial", "bare", "two", "killed")}
        for _ in range(options.rounds):
            one_round(cluster, functions, plain, expected, repeat, taken)
        alone, two = taken["serial"], taken["two"]
        cells = (f"{statistics.median(alone):.2f} s", f"{ratio(alone, taken['bare']):.2f}x", f"{ratio(alone, two):.2f}x",
                 f"{statistics.median(taken['killed']):.2f} s", f"{ratio(taken['killed'], two):.2f}x",
                 f"{1e3 * cluster.overhead():.2f}")  # fmt: skip
        print(f"{engine:8}", *(f"{cell:>15}" for cell in cells), flush=True)
        cluster.close()
    print("all bits as in the serial run: one worker, two, one of two killed")


if __name__ == "__main__":
    main()
