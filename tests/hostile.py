"""Read a hostile file in a child process, within the limits that HOSTILE files must be refused in."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 5.0
MEBIBYTES = 512

_CHILD = """
import json, resource, sys, time
import numpy
from bnport import adapters
import bnport.containers.zip, bnport.containers.pickle_opcodes
from bnport.errors import BnportError
arguments = json.loads(sys.argv[1])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clock = time.process_time()
{body}
print(json.dumps([said, time.process_time() - clock,
                  (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024]))
"""
_READ = """
path, options = arguments["path"], arguments["options"]
try:
    adapter = adapters.load(options.pop("format")) if "format" in options else adapters.find(path)
    layers = adapter.read(path, **options)
    [layer.record for layer in layers.values()]
    said = "read", f"{len(layers)} layers"
except BnportError as error:
    said = type(error).__name__, str(error)
"""


def measured(body: str, **arguments: object) -> tuple[Any, float, float]:
    """(what the code puts into `said`, its seconds of processor time, the MiB of memory that it took).

    In a child process: the largest memory of one that ran other tests before says nothing. The code finds `arguments`.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.replace("{body}", body), json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, seconds, mebibytes = json.loads(done.stdout)
    return said, seconds, mebibytes


def outcome(path: str, **options: object) -> tuple[str, str]:
    """("read" or the name of the error, what was said), after asserting the limits on time and memory."""
    (kind, said), seconds, mebibytes = measured(_READ, path=path, options=options)
    assert seconds < SECONDS, f"{seconds} s: {said}"
    assert mebibytes < MEBIBYTES, f"{mebibytes} MiB: {said}"
    assert "\n" not in said
    return kind, said
