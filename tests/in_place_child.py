"""A change in place in a process that dies before its n-th system call; imports as little as it can, as it runs often.

python -m tests.in_place_child STEP FILE change|restore      STEP 0: lives, and prints how many calls there were
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from bnport import adapters
from bnport.containers.in_place import change, restore
from bnport.layer import Change
from bnport.record import FIELDS, BatchNorm

NEW = BatchNorm(
    gamma=np.float32([1.5, -0.25, 3]),
    beta=np.float32([0.1, -7, 0]),
    mean=np.float32([-0.5, 2.5, 1e-3]),
    variance=np.float32([1e-6, 0.3, 40]),
    epsilon=0.5,
)
STEPS = ("open", "write", "pwrite", "fsync", "unlink")  # of the module os, all that a change uses


def patches_of(path):
    """NEW for the one layer of a Keras file."""
    adapter = adapters.load("keras")
    (layer,) = adapter.read(path).values()
    return adapter.patches(path, {layer.name: Change(NEW, layer.stores & {*FIELDS, "epsilon"})})


def main(step, path, what):
    import bnport.containers.patch  # noqa: F401

    patches = patches_of(path) if what == "change" else None
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    change(path, patches, lambda: None) if what == "change" else restore(path)
    print(count)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
