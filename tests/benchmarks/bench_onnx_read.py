"""BatchNorm parameters of an ONNX model with its weights inside: bnport against onnx.load, at 98 MB and 1.7 GB.

    python tests/benchmarks/bench_onnx_read.py [--rounds 5] [--large 1.7] [--folder DIR]

The usual way is onnx.load and onnx.numpy_helper for the initializers of the BatchNormalization nodes. Each run is a process
of its own, the ways interleaved; wall time and peak resident memory are the process's. Files are written as a stream into
a temporary folder and removed. Nothing is asserted.
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
import onnx
from onnx import numpy_helper
model = onnx.load({path!r})
tensors = {{t.name: t for t in model.graph.initializer}}
for node in model.graph.node:
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, variance = (numpy_helper.to_array(tensors[name]) for name in node.input[1:])
"""

OURS = """
import sys
sys.path.insert(0, {root!r})
from bnport import adapters
for layer in adapters.load("onnx").read({path!r}).values():
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
    """A ResNet's convolutions in a row, each with its BatchNormalization; returns the file's size.

    The length of the graph comes before it, so its parts are measured first and written, weight by weight, after.
    """
    block = os.urandom(1 << 20)
    nodes, tensors, value = [], [], b"x"
    for i, (arriving, out, kernel) in enumerate(layers):
        norm = [b"bn%d.%s" % (i, part) for part in (b"weight", b"bias", b"running_mean", b"running_var")]
        nodes.append(node([value, b"conv%d.weight" % i], b"c%d" % i, b"Conv"))
        epsilon = field(5, field(1, b"epsilon") + varint(2 << 3 | 5) + struct.pack("<f", 1e-5) + b"\xa0\x01\x01")
        nodes.append(node([b"c%d" % i, *norm], b"y%d" % i, b"BatchNormalization") + epsilon)
        value = b"y%d" % i
        dims = b"".join(b"\x08" + varint(d) for d in (out, arriving, kernel, kernel))
        count = out * arriving * kernel * kernel
        raw = varint(9 << 3 | 2) + varint(4 * count)
        tensors.append((dims + b"\x10\x01" + field(8, b"conv%d.weight" % i) + raw, 4 * count))
        data = struct.pack(f"<{out}f", *([0.5] * out))
        tensors += [(b"\x08" + varint(out) + b"\x10\x01" + field(8, name) + field(9, data), 0) for name in norm]
    heads = [varint(5 << 3 | 2) + varint(len(head) + blob) + head for head, blob in tensors]
    written = b"".join(field(1, each) for each in nodes) + field(2, b"resnet")
    ends = field(11, field(1, b"x")) + field(12, field(1, value))
    graph = len(written) + len(ends) + sum(map(len, heads)) + sum(blob for _, blob in tensors)
    with open(path, "wb") as file:
        file.write(b"\x08\x08" + varint(7 << 3 | 2) + varint(graph) + written)
        for head, (_, blob) in zip(heads, tensors, strict=True):
            file.write(head)
            while blob:
                blob -= file.write(block[: min(blob, len(block))])
        file.write(ends + field(8, b"\x10\x0f"))
        return file.tell()


def node(inputs, output, op):
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(3, output) + field(4, op)


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
            path = os.path.join(folder, "net.onnx")
            size = write_net(path, layers)
            cache = os.path.join(folder, "compiled")
            ways = {"onnx.load": USUAL, "bnport": OURS, "bnport show": LISTING, "import numpy": "import numpy"}
            results = {name: [] for name in ways}
            for number in range(args.rounds + 1):
                for name, script in ways.items():
                    if name == "onnx.load" and size > 2**31 - 1:
                        continue  # past the limit of a message
                    result = measured(script.format(root=root, path=path), cache)
                    if number:  # the first round fills the caches
                        results[name].append(result)
            base = results["onnx.load"]
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
