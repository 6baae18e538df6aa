"""Functions that workers import in the tests of executors: they must lie at the top of a module."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from bnport.calibrate.moments import moments


def block_moments(block):
    """Moments of made-up data for a (seed, rows, folder, number that dies) block; dies once by SIGKILL if told to."""
    seed, rows, folder, deadly = block
    if seed == deadly:
        try:
            os.close(os.open(os.path.join(folder, f"died-{seed}"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    with open(os.path.join(folder, f"done-{seed}-{os.getpid()}-{time.monotonic_ns()}"), "w"):
        pass
    rng = np.random.default_rng(seed)
    return moments(1e4 + 1e-2 * rng.standard_normal((rows, 8)))


class Elevens:
    """Batches of eleven, by number, and a shorter last one."""

    def __init__(self, count):
        from tests.calibrate import nets

        self.x = nets.data(n=count)

    def __len__(self):
        return -(-len(self.x) // 11)

    def __getitem__(self, number):
        return self.x[11 * number : 11 * number + 11]


def always_dies(block):
    """Kills its process if block is 3, every time."""
    if block == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return block


def fails(block):
    """Raises ValueError for block 5."""
    if block == 5:
        raise ValueError("block five is odd")
    return block * block


def where(block):
    """The process."""
    return block, os.getpid()


def shard_whose_worker_dies(task):
    """shards.work, but in the second round the worker of shard 1 kills itself, once."""
    from bnport.calibrate import shards

    if isinstance(task, shards.Task) and task.shard == 1 and task.known is None:
        try:
            os.close(os.open(os.environ["CANARY"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return shards.work(task)


_calls = []


def counted(block):
    """(process, how often it was called), and the process ends if told so and the canary is new."""
    number, canary = block
    if canary is not None and number == 1:
        try:
            os.close(os.open(canary, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    _calls.append(number)
    return os.getpid(), _calls.count(number)
