"""Read a hostile file in a child process, within the limits that HOSTILE files must be refused in."""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 5.0
MEBIBYTES = 512

_CHILD = """
import json, resource, sys, time
import numpy
from bnport import adapters
import bnport.containers.zip, bnport.containers.pickle_opcodes
from bnport.errors import BnportError
path, options = sys.argv[1], json.loads(sys.argv[2])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clock = time.process_time()
try:
    adapter = adapters.load(options.pop("format")) if "format" in options else adapters.find(path)
    layers = adapter.read(path, **options)
    [layer.record for layer in layers.values()]
    said, kind = f"{len(layers)} layers", "read"
except BnportError as error:
    said, kind = str(error), type(error).__name__
print(json.dumps([kind, said, time.process_time() - clock,
                  (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024]))
"""


def outcome(path: str, **options: object) -> tuple[str, str]:
    """("read" or the name of the error, what was said), after asserting the limits on time and memory."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, path, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kind, said, seconds, mebibytes = json.loads(done.stdout)
    assert seconds < SECONDS, f"{seconds} s: {said}"
    assert mebibytes < MEBIBYTES, f"{mebibytes} MiB: {said}"
    assert "\n" not in said
    return kind, said
