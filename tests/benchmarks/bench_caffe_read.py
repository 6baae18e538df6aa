"""BatchNorm parameters of a .caffemodel: bnport against parsing the file with protobuf, at 98 MB and 1.7 GB.

    python tests/benchmarks/bench_caffe_read.py [--rounds 5] [--large 1.7] [--folder DIR]

The usual way is what every converter does: ParseFromString into a message class (declared at run time, so that no generated
code is needed), then numpy arrays of the BatchNorm and Scale blobs. Each run is a process of its own, the two ways
interleaved; wall time and peak resident memory are the process's. Files are written as a stream into a temporary folder
and removed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

USUAL = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from tests.adapters.caffe_files import T
with open({path!r}, "rb") as file:
    net = T["NetParameter"].FromString(file.read())
layers = {{one.name: one for one in net.layer}}
for name, one in layers.items():
    if one.type == "BatchNorm":
        mean, variance, factor = (np.array(b.data, np.float32) for b in one.blobs)
        gamma, beta = (np.array(b.data, np.float32) for b in layers["scale_" + name].blobs)
        mean, variance = mean / factor, variance / factor
"""

OURS = """
import sys
sys.path.insert(0, {root!r})
from bnport import adapters
for layer in adapters.load("caffe").read({path!r}).values():
    layer.record
"""

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


def write_net(path, layers):
    """A ResNet as Caffe stores it, one layer at a time; returns the file's size."""
    block = os.urandom(1 << 20)

    def blob_head(shape, numbers):
        return varint(7 << 3 | 2) + varint(len(shape)) + shape, numbers * 4

    with open(path, "wb") as file:
        file.write(field(1, b"ResNet"))
        for i, (arriving, out, kernel) in enumerate(layers):
            dims = (out, arriving, kernel, kernel)
            count = out * arriving * kernel * kernel
            shape = field(1, b"".join(map(varint, dims)))
            head, nbytes = blob_head(shape, count)
            data_head = varint(5 << 3 | 2) + varint(nbytes)
            size = len(head) + len(data_head) + nbytes
            names = field(1, b"conv%d" % i) + field(2, b"Convolution") + field(3, b"t%d" % i) + field(4, b"c%d" % i)
            blob_tag = varint(7 << 3 | 2) + varint(size)
            file.write(
                varint(100 << 3 | 2) + varint(len(names) + len(blob_tag) + size) + names + blob_tag + head + data_head
            )
            left = nbytes
            while left:
                left -= file.write(block[: min(left, len(block))])
            vector = field(7, field(1, varint(out))) + field(5, struct.pack(f"<{out}f", *([0.5] * out)))
            one = field(7, field(1, varint(1))) + field(5, struct.pack("<f", 999.98236))
            name = b"bn%d" % i
            norm = field(1, name) + field(2, b"BatchNorm") + field(3, b"c%d" % i) + field(4, b"c%d" % i)
            file.write(field(100, norm + field(7, vector) * 2 + field(7, one)))
            scale = field(1, b"scale_" + name) + field(2, b"Scale") + field(3, b"c%d" % i) + field(4, b"t%d" % (i + 1))
            file.write(field(100, scale + field(7, vector) * 2 + field(142, b"\x20\x01")))
        return file.tell()


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            path = os.path.join(folder, "net.caffemodel")
            size = write_net(path, layers)
            cache = os.path.join(folder, "compiled")
            ways = {"protobuf": USUAL, "bnport": OURS, "bnport show": LISTING, "import numpy": "import numpy"}
            results = {name: [] for name in ways}
            for number in range(args.rounds + 1):
                for name, script in ways.items():
                    if name == "protobuf" and size > 2**31 - 1:
                        continue  # past the limit of a message
                    result = measured(script.format(root=root, path=path), cache)
                    if number:  # the first round fills the caches
                        results[name].append(result)
            base = results["protobuf"]
            print(f"{size / 1e6:.0f} MB, {len(layers)} BatchNorm layers, {args.rounds} rounds, medians")
            for name, runs in results.items():
                if not runs:
                    print(f"  {name:12} (not possible)")
                    continue
                wall, cpu, memory = (statistics.median(column) for column in zip(*runs, strict=True))
                ratio = ""
                if name.startswith("bnport") and base:
                    usual = [statistics.median(column) for column in zip(*base, strict=True)]
                    times = [f"{a / b:.1f} x" for a, b in zip(usual, (wall, cpu, memory), strict=True)]
                    ratio = f"   {times[0]} faster ({times[1]} by CPU), {times[2]} leaner"
                print(f"  {name:12} {wall:7.3f} s {cpu:7.3f} s CPU {memory:8.1f} MiB{ratio}")


if __name__ == "__main__":
    main()
