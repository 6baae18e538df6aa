"""Functions that workers import in the tests of executors: they must lie at the top of a module."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from bnport.calibrate.moments import moments


def variable(name):
    """The process' environment variable."""
    return os.environ.get(name)


def die_once(path):
    """Kills this process by SIGKILL, unless the file is there; makes it first, with the process' number in it."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(file, str(os.getpid()).encode())
    os.close(file)
    os.kill(os.getpid(), signal.SIGKILL)


def block_moments(block):
    """Moments of made-up data for a (seed, rows, folder, number that dies) block; dies once by SIGKILL if told to."""
    seed, rows, folder, deadly = block
    if seed == deadly:
        die_once(os.path.join(folder, f"died-{seed}"))
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


def times_out(block):
    """Raises TimeoutError, as a slow disk does."""
    raise TimeoutError("the disk is slow")


def slow_unless_first(block):
    """Returns 0 at once for block 0, and does not end for the others while anybody waits."""
    if block:
        time.sleep(600)
    return block


def where(block):
    """The process."""
    return block, os.getpid()


def shard_whose_worker_dies(task):
    """shards.work, but in the second round the worker of shard 1 kills itself, once."""
    from bnport.calibrate import shards

    if isinstance(task, shards.Task) and task.shard == 1 and task.known is None:
        die_once(f"{os.environ['CANARY']}-{task.plan.method}")
    return shards.work(task)


def part_whose_worker_dies(part):
    """shards.work_once, but the worker of the shard from batch 8 on kills itself, once."""
    from bnport.calibrate import shards

    if part.first == 8:
        die_once(f"{os.environ['CANARY']}-{part.plan.method}")
    return shards.work_once(part)


_calls = []


def counted(block):
    """(process, how often it was called), and the process ends if told so and the canary is new."""
    number, canary = block
    if canary is not None and number == 1:
        die_once(canary)
    _calls.append(number)
    return os.getpid(), _calls.count(number)


def remembered(block):
    """What this process was told for a number, None if nothing; ("tell", number, what) tells it."""
    if block[0] == "tell":
        _told[block[1]] = block[2]
    elif block[1] == 1 and block[2] is not None:
        die_once(block[2])
    return _told.get(block[1])


_told = {}


def waits_for_the_other(block):
    """Block 1 kills its process, and makes a file when it is done again; block 0 ends when that file is there."""
    number, folder = block
    if number == 1:
        die_once(os.path.join(folder, "died"))
        with open(os.path.join(folder, "redone"), "w"):
            pass
    deadline = time.monotonic() + 60
    while not os.path.exists(os.path.join(folder, "redone")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.path.exists(os.path.join(folder, "redone"))


def first_waits_for_the_thirtieth(block):
    """Block 0 kills its process; when it is done again, it ends when block 30 has been done, or with False."""
    number, folder = block
    file = os.path.join(folder, "thirty")
    if number == 0:
        die_once(os.path.join(folder, "died"))
        deadline = time.monotonic() + 60
        while not os.path.exists(file) and time.monotonic() < deadline:
            time.sleep(0.02)
        return os.path.exists(file)
    if number == 30:
        with open(file, "w"):
            pass
    return True
