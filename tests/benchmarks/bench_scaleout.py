"""The same blocks on one worker, on two, and with one of two killed by SIGKILL on the way, engine by engine.

    python tests/benchmarks/bench_scaleout.py [--engines local,dask,ray] [--blocks 80] [--rounds 5] [--work 0.15]

A block is `--work` seconds of moments() over made-up features. Every run checks that the merged result has the bits of
the serial run. Dask and Ray run on clusters of two processes of their own, started once per round and not counted; the
spawn pool's start is counted (it starts one per run). Then what the engine itself costs per block (empty blocks), and
the bytes that a block's result takes. Nothing is asserted on time.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time

import numpy as np

from bnport.calibrate.executors import cores, map_blocks
from bnport.calibrate.moments import merge_all, moments

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
    if not _features:
        _features.append(np.random.default_rng(0).standard_normal((8192, 256), dtype=np.float32))
        _features.append(np.empty_like(_features[0]))
    np.add(_features[0], np.float32(seed % 7), out=_features[1])
    return merge_all(moments(_features[1]) for _ in range(repeat))


def empty(block):
    """Nothing."""
    return block


class Cluster:
    """A cluster of two processes for one engine; `address` is what map_blocks takes."""

    def __init__(self, engine, workers):
        self.engine, self.address = engine, None
        if engine == "dask":
            import distributed

            self.address = distributed.Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        elif engine == "ray":
            import ray

            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def close(self):
        if self.engine == "dask":
            self.address.close()
        elif self.engine == "ray":
            import ray

            ray.shutdown()


def run(engine, workers, blocks):
    cluster = Cluster(engine, workers)
    try:
        list(map_blocks(empty, range(2 * workers), engine=engine, workers=workers, address=cluster.address))
        started = time.perf_counter()
        merged = merge_all(map_blocks(work, blocks, engine=engine, workers=workers, address=cluster.address))
        return time.perf_counter() - started, merged
    finally:
        cluster.close()


def overhead(engine, count=1000):
    cluster = Cluster(engine, 2)
    try:
        list(map_blocks(empty, range(8), engine=engine, workers=2, address=cluster.address))
        started = time.perf_counter()
        for _ in map_blocks(empty, range(count), engine=engine, workers=2, address=cluster.address):
            pass
        return (time.perf_counter() - started) / count
    finally:
        cluster.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="local,dask,ray")
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=float, default=0.15)
    options = parser.parse_args()
    work((0, 1, None))
    started = time.perf_counter()
    work((0, 20, None))
    repeat = max(1, round(options.work / (time.perf_counter() - started) * 20))
    plain = [(k, repeat, None) for k in range(options.blocks)]
    started = time.perf_counter()
    expected = merge_all(map(work, plain))
    serial = time.perf_counter() - started
    print(f"{options.blocks} blocks of {serial / options.blocks:.3f} s; serial {serial:.2f} s; {cores()} cores")
    print(f"load {os.getloadavg()[0]:.1f}; a result of 256 channels is {len(expected.to_bytes())} bytes")
    engines = options.engines.split(",")
    taken = {}
    for number in range(options.rounds):
        for engine in engines:
            with tempfile.TemporaryDirectory() as folder:
                canary = os.path.join(folder, "died")
                killed = [(k, repeat, canary if k == options.blocks // 2 else None) for k in range(options.blocks)]
                for what, workers, blocks in (("one", 1, plain), ("two", 2, plain), ("killed", 2, killed)):
                    seconds, merged = run(engine, workers, blocks)
                    if not merged.same_bits(expected):
                        raise SystemExit(f"{engine}, {what}: other bits than the serial run")
                    taken.setdefault((engine, what), []).append(seconds)
                if not os.path.exists(canary):
                    raise SystemExit(f"{engine}: nobody was killed")
        print(f"round {number + 1}: all bits as in the serial run", flush=True)
    heads = ("1 worker", "2 workers", "speed-up", "1 of 2 killed", "to undisturbed", "ms per block")
    print("engine  ", *(f"{head:>15}" for head in heads))
    for engine in engines:
        one, two, killed = (statistics.median(taken[engine, what]) for what in ("one", "two", "killed"))
        cells = (f"{one:.2f} s", f"{two:.2f} s", f"{one / two:.2f}x", f"{killed:.2f} s", f"{killed / two:.2f}x",
                 f"{1e3 * overhead(engine):.2f}")  # fmt: skip
        print(f"{engine:8}", *(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
