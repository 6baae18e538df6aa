"""Caffe: `.caffemodel`, binary or HDF5, on its own or with its `.prototxt`.

| theirs | ours | note |
|---|---|---|
| BatchNorm blob 0 / factor | mean | the blob is a decayed sum; factor is blob 2, near 1000 after training or 1 |
| BatchNorm blob 1 / factor | variance | unbiased, m/(m-1) |
| BatchNorm blob 2, factor | - | 0: never trained, refused unless `allow_untrained` |
| following Scale: blob 0, blob 1 | gamma, beta | beta only with bias_term; no Scale: gamma 1, beta 0 |
| following Bias: blob 0 | beta | |
| BatchNorm with 5 blobs | mean, variance, factor, gamma, beta | NVIDIA, Intel: sizes C, C, 1, C, C |
| the same, sizes C, C, C, C, 1 | gamma, beta, mean, variance, factor | NVIDIA's legacy DIGITS files |
| BatchNorm with 4 blobs | mean, variance, factor, gamma | Intel without bias |
| BN blobs 0 to 3 (yjxiong, PSPNet) | gamma, beta, mean, variance | or 1/std in place of the variance: `stat` |
| BN blobs 0, 1 (SegNet) | gamma, beta | INFERENCE: a folded affine; LEARN: no statistics |
| batch_norm_param.eps, bn_param.eps | epsilon | default 1e-5; the prototxt decides, as in Caffe |
| moving_average_fraction, bn_param.momentum | momentum | of the old value kept; default 0.999, BN 0.9 |

A net is run from its prototxt: from a caffemodel Caffe takes nothing but blobs, by layer name. Give it with `prototxt`
and its epsilon, use_global_stats and connections count (at phase TEST); without it the caffemodel's own are read and an
epsilon that it does not mention is assumed. An HDF5 file holds neither types nor connections.

Options: `prototxt` (a path); `stat` "variance" or "inverse-std": what a BN layer's fourth blob is, for BN-Inception of
December 2015 to April 2016; `blob_order` "mean-first" or "scale-first": five blobs of a layer of one channel;
`allow_untrained`: read a factor of 0 as Caffe does.

A BatchNorm that is read by a Scale and by something else, or by two Scales, gives one record for each use, called
`bn+scale`. Written: gamma, beta, mean and variance into a copy of a binary or HDF5 caffemodel, in the encoding that
each blob has, and nothing else; the factor becomes 1. Epsilon is not written, because what runs the net is its prototxt.
"""

from __future__ import annotations

import os

from bnport._lazy import TYPE_CHECKING
from bnport.containers import HDF5_SIGNATURE, TEXT, looks_like
from bnport.errors import FormatError, InvalidValue, printable
from bnport.layer import Layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.caffe.net import Net
    from bnport.adapters.caffe.values import Choices
    from bnport.containers.patch import Patch
    from bnport.layer import Change
    from bnport.record import Array

SUFFIXES = (".caffemodel", ".prototxt", ".h5", ".hdf5")
PACKAGES: tuple[str, ...] = ()


def recognise(head: bytes, path: str) -> bool:
    """By name, since neither wire format nor text has a signature (so no file that has one); or else by its first layer."""
    name = os.path.basename(path).lower()
    if head.startswith(HDF5_SIGNATURE):  # Caffe writes <prefix>_iter_<n>.caffemodel.h5
        return ".caffemodel" in name or _root_names(head) in ({b"data"}, {b"data", b"diff"})
    if name.endswith(".caffemodel"):
        return bool(head) and not looks_like(head)
    if name.endswith(".prototxt") and looks_like(head) == TEXT:
        return True
    return _starts_like_a_net(head)


def read(
    source: str,
    *,
    prototxt: str | None = None,
    stat: str | None = None,
    blob_order: str | None = None,
    allow_untrained: bool | str | None = None,
) -> Layers:
    """The BatchNorm layers of a caffemodel in file order. Options: see the module.

    Raises FormatError for a damaged file, a Scale that is no vector of channels, and SegNet layers without statistics;
    Question where five blobs can be read in two ways, or an HDF5 file does not say which Scale belongs where. A factor
    of 0 is refused when the layer's numbers are asked for.
    """
    from bnport.adapters.caffe.norm import held_layers

    net = opened(source, prototxt)
    found, notes = held_layers(net, choices(stat, blob_order, allow_untrained))
    return Layers((layer for _, layer in found), source=source, format="caffe", notes=notes)


def write(
    target: str,
    changes: Mapping[str, Change],
    out: str,
    *,
    prototxt: str | None = None,
    stat: str | None = None,
    blob_order: str | None = None,
    allow_untrained: bool | str | None = None,
) -> None:
    """Make, at `out`, a copy of a caffemodel with the changes; all other bytes are the target's. Options as for read.

    Raises NotFound for an unknown layer, Unrepresentable for what the layer cannot hold as it is; nothing is written then.
    """
    from bnport.adapters.caffe.patch import patched

    patched(opened(target, prototxt), choices(stat, blob_order, allow_untrained), changes, out)


def patches(
    target: str,
    changes: Mapping[str, Change],
    *,
    prototxt: str | None = None,
    stat: str | None = None,
    blob_order: str | None = None,
    allow_untrained: bool | str | None = None,
) -> list[Patch]:
    """The changes as bytes at offsets of the caffemodel, which keeps its length. Options as for read."""
    from bnport.adapters.caffe.patch import file_patches

    return file_patches(opened(target, prototxt), choices(stat, blob_order, allow_untrained), changes)


def run(
    source: str,
    layer: str,
    x: Array,
    *,
    prototxt: str | None = None,
    stat: str | None = None,
    blob_order: str | None = None,
    allow_untrained: bool | str | None = None,
    epsilon: float | None = None,
) -> dict[str, Array]:
    """x (N, C) through one layer by OpenCV 4's Caffe importer (cv2.dnn), in a process of its own.

    Options as for read; `epsilon` is that of layers for which the source holds none.
    """
    inputs = {layer: x}
    return run_all(
        source,
        inputs,
        prototxt=prototxt,
        stat=stat,
        blob_order=blob_order,
        allow_untrained=allow_untrained,
        epsilon=epsilon,
    )[layer]


def run_all(
    source: str,
    inputs: Mapping[str, Array],
    *,
    prototxt: str | None = None,
    stat: str | None = None,
    blob_order: str | None = None,
    allow_untrained: bool | str | None = None,
    epsilon: float | None = None,
) -> dict[str, dict[str, Array]]:
    """The same for many layers in one process: name -> x, to name -> outputs."""
    from bnport.adapters.caffe.engine import forward

    return forward(opened(source, prototxt), choices(stat, blob_order, allow_untrained), inputs, epsilon)


def opened(source: str, prototxt: str | None) -> Net:
    """The net of a caffemodel; a prototxt in its place is refused with what to do."""
    from bnport.adapters import read_head
    from bnport.adapters.caffe.net import Net

    if source.lower().endswith(".prototxt") and looks_like(read_head(source)) == TEXT:
        raise FormatError(
            f"{printable(source)}: describes a net and holds no numbers; give the .caffemodel, and this as its prototxt"
        )
    return Net(source, prototxt)


def choices(stat: str | None, blob_order: str | None, allow_untrained: bool | str | None) -> Choices:
    """The options, checked."""
    from bnport.adapters.caffe.norm import BLOB_ORDERS, STATS
    from bnport.adapters.caffe.values import Choices

    for name, given, known in (("stat", stat, STATS), ("blob_order", blob_order, BLOB_ORDERS)):
        if given is not None and given not in known:
            raise InvalidValue(f"{name}: expected {' or '.join(known)}, got {printable(given, 40)!r}")
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(allow_untrained, str):
        if allow_untrained.lower() not in words:
            raise InvalidValue(f"allow_untrained: expected true or false, got {printable(allow_untrained, 40)!r}")
        allow_untrained = words[allow_untrained.lower()]
    return Choices(stat, blob_order, bool(allow_untrained))


def _root_names(head: bytes) -> set[bytes]:
    """What lies in the root group of an HDF5 file in the first bytes, where the library puts it by default; or nothing.

    Superblock version 0: the root entry's scratch space gives the address of its local heap, which holds the names.
    """
    import struct

    if len(head) < 96 or head[8] != 0 or head[72] != 1:
        return set()
    (heap,) = struct.unpack_from("<Q", head, 88)
    if heap + 32 > len(head) or head[heap : heap + 4] != b"HEAP":
        return set()
    size, free, data = struct.unpack_from("<QQQ", head, heap + 8)
    return set(filter(None, head[data : data + min(size, free)].split(b"\0")))


def _starts_like_a_net(head: bytes) -> bool:
    """NetParameter { name: "..." layer { name: "..." type or bottom ... } }: fields 1 and 100 (or 2 with a V1 layer)."""
    from bnport.containers.protobuf import LENGTH, Buffer, fields

    try:
        for number, wire, value in fields(Buffer(head)):
            if wire != LENGTH or isinstance(value, int):
                return False
            if number != 1:
                return number == 100
    except FormatError:
        # the head ends inside the first layer: its tag must have been there
        name = head[2 : 2 + head[1]] if len(head) > 2 and head[0] == 0x0A and head[1] < 0x80 else b""
        return head[len(name) + 2 if name else 0 :][:2] == b"\xa2\x06"
    return False
