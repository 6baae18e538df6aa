"""What the benchmarks of reading large protobuf files share: ResNets as a stream of fields, and the interleaved runs."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

LISTING = """
import sys
sys.path.insert(0, {root!r})
sys.argv = ["bnport", "show", {path!r}]
import bnport.cli
bnport.cli.entry()
"""

RESNET_50, RESNET_152 = (3, 4, 6, 3), (3, 8, 36, 3)  # blocks of each stage


def convolutions(blocks, wide=1.0):
    """(in, out, kernel) of every convolution of a ResNet, all its widths times `wide`."""
    arriving = round(64 * wide)
    yield 3, arriving, 7
    for stage, count in enumerate(blocks):
        width = round(64 * 2**stage * wide)
        for block in range(count):
            if block == 0:
                yield arriving, 4 * width, 1
            yield arriving, width, 1
            yield width, width, 3
            yield width, 4 * width, 1
            arriving = 4 * width


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def measured(script, cache):
    """(wall seconds, CPU seconds, peak resident MiB) of a Python process running `script`.

    cache: where compiled modules are kept, since an installed package is not compiled at each start.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(description, usual, script, ours, write_net, name):
    """Parse the command line and print both ways beside each other; `usual` names the other way, whose code is `script`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=float, default=1.7, help="GB of the large file; 0 leaves it out")
    parser.add_argument("--folder", help="where the files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    root = os.path.abspath(os.path.join(HERE, "..", ".."))
    nets = [list(convolutions(RESNET_50))]
    if args.large:  # ResNet-152, wide enough for the size
        narrow = 4 * sum(i * o * k * k for i, o, k in convolutions(RESNET_152))
        nets.append(list(convolutions(RESNET_152, (args.large * 1e9 / narrow) ** 0.5)))
    for layers in nets:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = os.path.join(folder, name)
            size = write_net(path, layers)
            cache = os.path.join(folder, "compiled")
            ways = {usual: script, "bnport": ours, "bnport show": LISTING, "import numpy": "import numpy"}
            results = {way: [] for way in ways}
            for number in range(args.rounds + 1):
                for way, code in ways.items():
                    if way == usual and size > 2**31 - 1:
                        continue  # past the limit of a message
                    result = measured(code.format(root=root, path=path), cache)
                    if number:  # the first round fills the caches
                        results[way].append(result)
            base = results[usual]
            print(f"{size / 1e6:.0f} MB, {len(layers)} BatchNorm layers, {args.rounds} rounds, medians")
            for way, runs in results.items():
                if not runs:
                    print(f"  {way:12} (not possible)")
                    continue
                wall, cpu, memory = (statistics.median(column) for column in zip(*runs, strict=True))
                ratio = ""
                if way.startswith("bnport") and base:
                    medians = [statistics.median(column) for column in zip(*base, strict=True)]
                    times = [f"{a / b:.1f} x" for a, b in zip(medians, (wall, cpu, memory), strict=True)]
                    ratio = f"   {times[0]} faster ({times[1]} by CPU), {times[2]} leaner"
                print(f"  {way:12} {wall:7.3f} s {cpu:7.3f} s CPU {memory:8.1f} MiB{ratio}")
