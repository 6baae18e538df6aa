"""BatchNorm parameters of a .caffemodel: bnport against parsing the file with protobuf, at 98 MB and 1.7 GB.

    python tests/benchmarks/bench_caffe_read.py [--rounds 5] [--large 1.7] [--folder DIR]

The usual way is what every converter does: ParseFromString into a message class (declared at run time, so that no generated
code is needed), then numpy arrays of the BatchNorm and Scale blobs. Each run is a process of its own, the two ways
interleaved; wall time and peak resident memory are the process's. Files are written as a stream into a temporary folder
and removed. Nothing is asserted.
"""

from __future__ import annotations

import os
import struct

from large_files import compare, field, varint

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


if __name__ == "__main__":
    compare(__doc__, "protobuf", USUAL, OURS, write_net, "net.caffemodel")
