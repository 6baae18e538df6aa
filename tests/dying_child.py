"""A file written, changed in place or put back in a process that dies before its n-th system call.

python -m tests.dying_child STEP write FILE OUT | change FILE | restore FILE

STEP 0: lives, and prints how many calls there were. Imports as little as it can, as it runs often.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np

from bnport import adapters
from bnport.containers.files import replace_file
from bnport.containers.in_place import change, restore
from bnport.layer import Change
from bnport.record import FIELDS, BatchNorm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEW = BatchNorm(
    gamma=np.float32([1.5, -0.25, 3]),
    beta=np.float32([0.1, -7, 0]),
    mean=np.float32([-0.5, 2.5, 1e-3]),
    variance=np.float32([1e-6, 0.3, 40]),
    epsilon=0.5,
)
WRITING = ("open", "copy_file_range", "write", "pwrite", "fsync", "replace")  # of the module os, all that a write uses
STEPS = (*WRITING, "unlink")  # and a change in place


def killed(step, *what):
    """What a child that dies before its step-th system call did; step 0 for one that lives."""
    return subprocess.run(
        [sys.executable, "-m", "tests.dying_child", str(step), *what],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def _changes(adapter, path):
    (layer,) = adapter.read(path).values()
    return {layer.name: Change(NEW, layer.stores & {*FIELDS, "epsilon"})}


def write(path, out):
    """What convert does with a file target: NEW for the one layer of a Keras file, in the new file `out`."""
    adapter = adapters.load("keras")
    changes = _changes(adapter, path)
    replace_file(out, lambda new: adapter.write(path, changes, new), adapter.read, force=True, inputs=[path])


def patches_of(path):
    """NEW for the one layer of a Keras file, in place."""
    adapter = adapters.load("keras")
    return adapter.patches(path, _changes(adapter, path))


def main(step, what, *paths):
    import h5py  # noqa: F401  # what is imported later would be counted

    import bnport.adapters.keras.archive
    import bnport.adapters.keras.files
    import bnport.adapters.keras.writing
    import bnport.containers.patch  # noqa: F401

    patches = patches_of(*paths) if what == "change" else None
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
    if what == "change":
        change(*paths, patches, lambda: None)
    else:
        {"write": write, "restore": restore}[what](*paths)
    print(count)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
