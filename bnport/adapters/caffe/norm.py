"""The BatchNorm layers of a Caffe net: which blob is which, and what belongs together.

Sources: BVLC/caffe src/caffe/layers/batch_norm_layer.cpp and scale_layer.cpp; NVIDIA/caffe src/caffe/net.cpp (the order
of legacy DIGITS files); yjxiong/caffe python/bn_convert_style.py (1/std in files of December 2015 to April 2016).
"""

from __future__ import annotations

import math

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.caffe.values import Choices, Held, listed_tensors, load, narrowest
from bnport.adapters.caffe.wiring import Wiring
from bnport.errors import FormatError, InvalidValue, Question, listed, printable, repeated
from bnport.layer import Layer
from bnport.rounding import meant_epsilon

if TYPE_CHECKING:
    from bnport.adapters.caffe.blob import Blob
    from bnport.adapters.caffe.net import Net, Node

EPSILON = 1e-5  # BatchNormParameter.eps and BNParameter.eps
FRACTION = {"BatchNorm": 0.999, "BN": 0.9}  # moving_average_fraction; BNParameter.momentum: of the old value kept
CUDNN_EPSILON = 1e-5  # CUDNN_BN_MIN_EPSILON: NVIDIA's and PSPNet's layers use max(eps, this)
SEGNET_EPSILON = 1e-9  # var_eps_ in caffe-segnet bn_layer.cpp; nothing in a file can change it

STATS = ("variance", "inverse-std")
BLOB_ORDERS = ("mean-first", "scale-first")


def held_layers(net: Net, choices: Choices) -> tuple[list[tuple[Held, Layer]], list[str]]:
    """Every BatchNorm record of a net with its Layer, in file order, and notes on the whole."""
    if not net.typed:
        return _untyped(net, choices)
    _refuse_unconnected(net)
    wiring = Wiring(net)
    ends: dict[int, str | None] = {}
    parts: list[tuple[int, tuple[int, ...], str, bool]] = []
    used: set[int] = set()
    for index, node in enumerate(net.nodes):
        if node.type not in ("BatchNorm", "BN"):
            continue
        if not node.blob_count:
            raise _missing(net, node)
        own = node.type == "BN" or node.blob_count >= 4
        tails: list[tuple[int, ...]] = [()] if own else wiring.tails(index)
        ends[index] = node.name if len(tails) == 1 else None
        for tail in tails:
            used.update(tail)
            name = node.name
            if len(tails) > 1:
                name = "+".join([node.name, *(net.nodes[i].name for i in tail)])
                if tail:
                    ends.setdefault(tail[0], None)
                ends[tail[-1] if tail else index] = name
            parts.append((index, tail, name, len(tails) > 1))
    if (twice := repeated(name for _, _, name, _ in parts)) is not None:
        raise FormatError(f"{printable(net.path)}: several BatchNorm layers are called {printable(twice)}")
    inputs = wiring.reaching(ends)
    found = []
    for index, tail, name, shared in parts:
        held = _held(net, wiring, index, tail, name, choices)
        shown = printable(net.nodes[index].name, 80)
        notes = [f"the output of {shown!r} is read in several ways; this is one of them"] if shared else []
        layer = _layer(net, held, choices, notes)
        layer.kernel = wiring.kernel(index)
        layer.inputs = None if inputs is None else inputs[index]
        found.append((held, layer))
    return found, _notes(net, used, len(found))


def _refuse_unconnected(net: Net) -> None:
    """Some tools write layers without what they read and make; a Scale must not be overlooked for that."""
    loose = [node for node in net.nodes if node.type == "BatchNorm" and not node.tops and 0 < node.blob_count < 4]
    scales = [node.name for node in net.nodes if node.type in ("Scale", "Bias") and not node.bottoms]
    if loose and scales:
        raise Question(
            f"{printable(net.path)}: which of {listed(scales, 5)} belongs to {printable(loose[0].name, 80)!r}, if any? Its"
            " layers do not say what they read; give the net's --prototxt"
        )


# ---- which blob is which


def _held(net: Net, wiring: Wiring, index: int, tail: tuple[int, ...], name: str, choices: Choices) -> Held:
    node = net.nodes[index]
    blobs = [node.blob(i) for i in range(min(node.blob_count, 6))]
    roles, form = _bn_roles(net, node, blobs, choices) if node.type == "BN" else _roles(net, node, blobs, choices)
    fields = dict(zip(roles, blobs, strict=True))
    channels = fields["mean" if "mean" in fields else "gamma"].count
    for field, blob in fields.items():
        count = 1 if field == "factor" else channels
        if blob.count != count or not blob.is_vector or not count:
            raise net.error(
                node, f"{field} (blob {roles.index(field)}) has shape {blob.shape}, {count} numbers expected"
            )
    nodes = tuple(net.nodes[i] for i in tail)
    for position, after in zip(tail, nodes, strict=True):
        wanted = ("beta",) if after.type == "Bias" else ("gamma", "beta") if wiring.has_bias(after) else ("gamma",)
        if not after.blob_count:
            raise _missing(net, after)
        if after.blob_count != len(wanted):
            raise net.error(after, f"{after.blob_count} blobs, {len(wanted)} expected ({', '.join(wanted)})")
        for i, field in enumerate(wanted):
            fields[field] = _broadcastable(net, wiring, position, after.blob(i), field, channels)
    return Held(name, node, nodes, fields, form, channels)


def _roles(net: Net, node: Node, blobs: list[Blob], choices: Choices) -> tuple[tuple[str, ...], str]:
    """The fields in blob order of a layer of type BatchNorm, by their number and sizes."""
    count = len(blobs)
    if count == 2:  # ncnn and OpenCV take them; no Caffe writes them
        return ("mean", "variance"), "plain"
    if count == 3:  # BVLC
        return ("mean", "variance", "factor"), "scaled"
    if count == 4:  # Intel with bias_term: false
        return ("mean", "variance", "factor", "gamma"), "scaled"
    if count == 5:
        sizes = [blob.count for blob in blobs]
        new, legacy = sizes[2] == 1, sizes[4] == 1
        if new and legacy:
            if choices.blob_order is None:
                raise Question(
                    f"{printable(net.path)}: layer {printable(node.name, 80)!r} has five blobs of one number each:"
                    " mean, variance, factor, scale, bias (NVIDIA, Intel) or scale, bias, mean, variance, factor (legacy"
                    " DIGITS)? Say which with --blob-order mean-first or --blob-order scale-first"
                )
            new = choices.blob_order == "mean-first"
        if new:  # Intel divides by the factor, NVIDIA always writes 1
            return ("mean", "variance", "factor", "gamma", "beta"), "scaled"
        if legacy:
            return ("gamma", "beta", "mean", "variance", "factor"), "scaled"
        raise net.error(node, f"five blobs of {listed(sizes)} numbers; none of the third and the fifth is a single one")
    raise net.error(node, f"{node.blob_count} blobs; a BatchNorm layer has 2 to 5")


def _bn_roles(net: Net, node: Node, blobs: list[Blob], choices: Choices) -> tuple[tuple[str, ...], str]:
    """The same for a layer of type BN, which several forks have."""
    if len(blobs) == 4:  # yjxiong, PSPNet
        form = "inverse-std" if choices.stat == "inverse-std" else "plain"
        return ("gamma", "beta", "mean", "variance"), form
    if len(blobs) != 2:
        raise net.error(node, f"{node.blob_count} blobs; a BN layer has 4 (yjxiong, PSPNet) or 2 (SegNet)")
    learning = node.settings.get("bn_mode", "LEARN") != "INFERENCE"
    return ("gamma", "beta"), "learning" if learning else "affine"


def _broadcastable(net: Net, wiring: Wiring, index: int, blob: Blob, field: str, channels: int) -> Blob:
    """A blob of a Scale or Bias layer that gives one number per channel, or one for all (num_axes: 0)."""
    node = net.nodes[index]
    axis, axes = node.settings.get("axis", 1), node.settings.get("num_axes", 1)
    if axes == 0:
        if blob.count == 1:
            return blob
    elif blob.count == channels and blob.is_vector:
        if isinstance(axis, int) and axis < 0:
            rank = wiring.rank(index)
            if rank is None:
                raise net.error(node, f"axis {axis} counts from the end, and nothing says how many axes its input has")
            axis += rank
        if axis == 1:
            return blob
        raise net.error(node, f"its {field} lies along axis {axis}; channels are axis 1")
    raise net.error(
        node,
        f"its {field} has shape {blob.shape} (num_axes {axes}) after a BatchNorm of {channels} channels; one number for"
        " each channel was expected, so it cannot be part of that BatchNorm",
    )


def _missing(net: Net, node: Node) -> FormatError:
    if net.described and not node.has_blobs:
        return FormatError(
            f"{printable(net.prototxt)}: layer {printable(node.name, 80)!r} ({node.type}) is not in {printable(net.path)};"
            " is it the prototxt of this net?"
        )
    return net.error(node, "holds no blobs: a net that was never initialised, or one that shares another layer's")


# ---- the layer

_LEARNING = (
    "SegNet's BN in mode LEARN holds scale and shift but no statistics: it normalises by each batch. Compute them from data"
    " (bnport convert --calibrate DATA, or bnport calibrate), or give the prototxt of the inference net (bn_mode: INFERENCE)"
    " if the blobs are already folded"
)


def _layer(net: Net, held: Held, choices: Choices, notes: list[str]) -> Layer:
    node, fields = held.node, held.fields
    assumed, stores = set(), set(fields) - {"factor"}
    given = {"BatchNorm": "moving_average_fraction", "BN": "momentum"}
    momentum = node.settings.get(given.get(node.type, ""))
    epsilon = node.settings.get("eps")
    certain = net.described  # proto2 leaves a default out, but what runs the net is a prototxt, and it decides
    if momentum is None and not certain:
        assumed.add("momentum")
    if epsilon is None and not certain:
        assumed.add("epsilon")
    epsilon = EPSILON if epsilon is None else epsilon
    if held.form == "affine":
        epsilon, momentum = 0.0, None
        assumed.clear()
        notes.append("a folded affine (SegNet, bn_mode INFERENCE): its statistics are not recoverable")
    elif held.form == "inverse-std":
        epsilon = 0.0
        assumed.discard("epsilon")
        notes.append("stores 1/sqrt(variance + epsilon); read as that squared, with epsilon 0")
    elif node.type == "BN" and choices.stat is None and held.form != "learning":
        notes.append("variance assumed: BN files of Dec 2015 to Apr 2016 hold 1/std in its place (--stat inverse-std)")
    elif held.form == "learning":
        epsilon, momentum = SEGNET_EPSILON, None
        assumed.clear()
    if held.form not in ("affine", "learning"):
        momentum = FRACTION.get(node.type, 0.999) if momentum is None else meant_epsilon(float(momentum))
        if not 0 <= float(momentum) <= 1:
            raise net.error(node, f"{given[node.type]} is {momentum}; a fraction was expected")
        if (node.type == "BN" or len(fields) == 5) and 0 < float(epsilon) < CUDNN_EPSILON and not held.tail:
            notes.append(f"cuDNN builds of Caffe raise its epsilon {float(epsilon):g} to {CUDNN_EPSILON:g}")
    if node.settings.get("use_global_stats") is False:
        notes.append("use_global_stats: false: " + (
            "Caffe would normalise by each batch, not by the stored statistics" if certain else "saved from a training net"
        ))  # fmt: skip
    broadcast = [f for f in ("gamma", "beta") if f in fields and fields[f].count != held.channels]
    notes += [f"{field} is one number for all channels" for field in broadcast]
    try:
        return Layer(
            held.name,
            channels=held.channels,
            epsilon=float(epsilon),
            momentum=None if momentum is None else float(momentum),
            load=lambda: load(net.path, held, choices),
            stores=stores,
            assumed=assumed,
            dtype=narrowest(held),
            tensors=listed_tensors(net.path, held, choices),
            notes=notes,
            without=_LEARNING if held.form == "learning" else "",
        )
    except InvalidValue as error:
        raise FormatError(f"{printable(net.path)}: {error}") from None


# ---- the whole


def _notes(net: Net, used: set[int], found: int) -> list[str]:
    notes = []
    own = [n.name for i, n in enumerate(net.nodes) if n.type == "Scale" and len(n.bottoms) == 1 and i not in used]
    if own and found:
        notes.append(f"Scale layers that belong to no BatchNorm, left out: {listed(own, 5)}")
    if net.described:
        known = {node.name for node in net.nodes}
        ignored = [n.name for n in net.held if n.name not in known and (n.type in ("BatchNorm", "BN"))]
        if ignored:
            notes.append(f"not in the prototxt, so left out as Caffe does: BatchNorm {listed(ignored, 5)}")
    odd = sorted({node.type for node in net.nodes if _looks_like_norm(node)})
    if odd:
        notes.append(f"layer types that are not read, though they may normalise: {listed(odd, 5)}")
    if found:
        return notes
    kinds: dict[str, int] = {}
    for node in net.nodes:
        kinds[node.type] = kinds.get(node.type, 0) + bool(node.blob_count)
    holds = listed([f"{count} {kind or 'untyped'}" for kind, count in kinds.items() if count], 6) or "no parameters"
    if any(node.old for node in net.nodes):
        notes.append(
            f"layers in Caffe's V1 form (before 2015), which is older than its BatchNorm; it holds {holds}."
            " If a fork put BN there, give its prototxt"
        )
    else:
        merged = "; the Scale layers may be BatchNorm merged by a tool, whose statistics are gone" if own else ""
        notes.append(f"no BatchNorm or BN layer; it holds {holds}{merged}")
    return notes


def _looks_like_norm(node: Node) -> bool:
    kind = node.type.lower()
    return node.blob_count > 1 and node.type not in ("BatchNorm", "BN") and ("batchnorm" in kind or kind.endswith("bn"))


def _untyped(net: Net, choices: Choices) -> tuple[list[tuple[Held, Layer]], list[str]]:
    """An HDF5 file on its own names no types and no connections: only what the blobs' shapes prove is read."""
    found, vectors, bare = [], [], []
    for node in net.nodes:
        shapes = [node.blob(i).shape for i in range(min(node.blob_count, 6))]
        counts = [math.prod(shape) for shape in shapes]
        if shapes and len(shapes) < 3 and all(sum(n != 1 for n in shape) <= 1 for shape in shapes):
            vectors.append((node, set(counts)))
        if not _is_batch_norm(counts, shapes):
            continue
        node.type = "BatchNorm"
        blobs = [node.blob(i) for i in range(len(shapes))]
        roles, form = _roles(net, node, blobs, choices)
        held = Held(node.name, node, (), dict(zip(roles, blobs, strict=True)), form, max(counts))
        if "beta" not in held.fields:
            bare.append(held)
        found.append((held, _layer(net, held, choices, [])))
    for held in bare:
        near = [node.name for node, counts in vectors if counts == {held.channels} or counts == {1}]
        if near:
            raise Question(
                f"{printable(net.path)}: which of {listed(near, 5)} is the Scale of {printable(held.name, 80)!r}, if any? An"
                " HDF5 caffemodel holds no layer types and no connections; give the net's (--prototxt deploy.prototxt)"
            )
    return found, [] if found else [
        "no layer has the blobs of a BatchNorm (an HDF5 file names no types; give its --prototxt)"
    ]


def _is_batch_norm(counts: list[int], shapes: list[tuple[int, ...]]) -> bool:
    """[C], [C], [1] and no other layer of Caffe looks so; with scale, and bias, after them or before them."""
    if not 3 <= len(counts) <= 5 or 0 in counts or any(sum(n != 1 for n in shape) > 1 for shape in shapes):
        return False
    c = max(counts)
    return counts in ([c, c, 1], [c, c, 1, c], [c, c, 1, c, c], [c, c, c, c, 1])
