"""BatchNorm parameters of an ONNX model with its weights inside: bnport against onnx.load, at 98 MB and 1.7 GB.

    python tests/benchmarks/bench_onnx_read.py [--rounds 5] [--large 1.7] [--folder DIR]

The usual way is onnx.load and onnx.numpy_helper for the initializers of the BatchNormalization nodes. Each run is a process
of its own, the ways interleaved; wall time and peak resident memory are the process's. Files are written as a stream into
a temporary folder and removed. Nothing is asserted.
"""

from __future__ import annotations

import os
import struct

from large_files import compare, field, varint

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


if __name__ == "__main__":
    compare(__doc__, "onnx.load", USUAL, OURS, write_net, "net.onnx")
