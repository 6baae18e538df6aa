"""Which layer feeds which in a Caffe net, and which Scale and Bias layers belong to a BatchNorm layer.

A blob name means whatever wrote it last (in-place layers write the name they read), and Caffe's own Split layers, which it
inserts where a blob is read twice and keeps in what it saves, are looked through: src/caffe/util/insert_splits.cpp.
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING, np
from bnport.layer import Kernel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.caffe.net import Net, Node
    from bnport.record import Array

_MOST_REACHING = 1 << 20  # names in all `inputs` together; DenseNet-201 has 5 000
_FARTHEST = 64  # layers looked back for a convolution, to know how many axes an input has

# outputs of these have as many axes as their first input
_KEEPS_RANK = {
    "BatchNorm", "Scale", "Bias", "BN", "ReLU", "PReLU", "ELU", "Sigmoid", "TanH", "Dropout", "Pooling", "LRN", "Eltwise",
    "Concat", "Power", "Exp", "Log", "AbsVal", "Softmax", "Slice",
}  # fmt: skip
_CONVOLUTIONS = {"Convolution", "ConvolutionDepthwise", "DepthwiseConvolution"}  # the last two: forks for MobileNet


class Wiring:
    """sources[i]: for each input of node i the node that made it, or None.  consumers[i]: the nodes that read node i.

    Split layers are looked through and are nobody's source or consumer.
    """

    def __init__(self, net: Net) -> None:
        self.net, self.nodes = net, net.nodes
        self.sources: list[list[int | None]] = []
        self.consumers: list[list[int]] = [[] for _ in self.nodes]
        writer: dict[str, int | None] = {}
        for index, node in enumerate(self.nodes):
            sources = [writer.get(name) for name in node.bottoms]
            self.sources.append(sources)
            if node.type == "Split":
                for top in node.tops:
                    writer[top] = sources[0] if sources else None
                continue
            for source in dict.fromkeys(sources):
                if source is not None:
                    self.consumers[source].append(index)
            for top in node.tops:
                writer[top] = index

    def tails(self, index: int) -> list[tuple[int, ...]]:
        """What follows a normalisation that has no gamma and beta of its own: (), (Scale), (Scale, Bias) or (Bias).

        One entry for each different way in which its output is used: several, if one reader is a Scale and another is
        not, or two Scales read it. A ReLU between ends the chain.
        """
        found: list[tuple[int, ...]] = []
        for reader in self.consumers[index] or [-1]:
            node = self.nodes[reader] if reader >= 0 else None
            if node is not None and _is_parameter_layer(node, "Scale"):
                if self.has_bias(node):
                    found.append((reader,))
                else:
                    for after in self.consumers[reader] or [-1]:
                        bias = after >= 0 and _is_parameter_layer(self.nodes[after], "Bias")
                        found.append((reader, after) if bias else (reader,))
            elif node is not None and _is_parameter_layer(node, "Bias"):
                found.append((reader,))
            else:
                found.append(())
        return list(dict.fromkeys(found))

    def has_bias(self, node: Node) -> bool:
        """Whether a Scale layer adds a bias: as it says, or, in a file that keeps no settings, as its blobs show."""
        stated = node.settings.get("bias_term")
        return bool(stated) or (stated is None and not self.net.described and node.blob_count == 2)

    def rank(self, index: int) -> int | None:
        """How many axes the input of a node has, where the net says so."""
        for _ in range(_FARTHEST):
            source = self.sources[index][0] if self.sources[index] else None
            if source is None:
                return self.net.input_rank
            node = self.nodes[source]
            if node.type in _CONVOLUTIONS or node.type == "Deconvolution":
                shape = node.kernel_shape()
                return len(shape) if shape and len(shape) > 2 else None
            if node.type == "InnerProduct":
                return 2
            if node.type not in _KEEPS_RANK:
                return None
            index = source
        return None

    def kernel(self, index: int) -> Kernel | None:
        """The weights of the convolution or inner product that directly feeds a node."""
        source = self.sources[index][0] if self.sources[index] else None
        if source is None:
            return None
        node = self.nodes[source]
        known = node.type in _CONVOLUTIONS or node.type in ("Deconvolution", "InnerProduct")
        shape = node.kernel_shape() if known else None
        if not shape:
            return None
        if node.type == "InnerProduct":
            return _dense(node, shape)
        group = node.settings.get("group", 1)
        if node.type in ("ConvolutionDepthwise", "DepthwiseConvolution"):
            group = shape[0]
        if len(shape) < 3 or 0 in shape:
            return None
        if not isinstance(group, int) or group < 1 or shape[0] % group:
            raise self.net.error(node, f"group {group} does not divide its {shape[0]} channels")
        if node.type == "Deconvolution":
            return _transposed(node, shape, group)
        kind = "conv" if group == 1 else "depthwise" if shape[1] == 1 else "grouped"
        return Kernel(kind, shape, node.name, lambda: node.blob(0).tensor.array().reshape(shape))

    def reaching(self, records: Mapping[int, str | None]) -> dict[int, tuple[str, ...]] | None:
        """For each BatchNorm node the names whose outputs reach it with no BatchNorm between; None if too many to list.

        records: node -> the name that stands for its output, for every node that ends a BatchNorm layer; None where
        nothing but the Scale layers behind it uses the output.
        """
        out: list[frozenset[str]] = []
        found: dict[int, tuple[str, ...]] = {}
        order = {name: i for i, name in enumerate(n for n in records.values() if n is not None)}
        total = 0
        for index, node in enumerate(self.nodes):
            arriving = [out[source] for source in dict.fromkeys(self.sources[index]) if source is not None]
            if len(arriving) != 1 or index in records:
                total += sum(map(len, arriving))
                if total > _MOST_REACHING:
                    return None
            reach = arriving[0] if len(arriving) == 1 else frozenset().union(*arriving)
            if index in records:
                if node.type in ("BatchNorm", "BN"):
                    found[index] = tuple(sorted(reach, key=order.__getitem__))
                name = records[index]
                reach = frozenset() if name is None else frozenset((name,))
            out.append(reach)
        return found


def _is_parameter_layer(node: Node, kind: str) -> bool:
    """A Scale or Bias layer with one input; with two, the second input is the scale and nothing is stored."""
    return node.type == kind and len(node.bottoms) == 1


def _dense(node: Node, shape: tuple[int, ...]) -> Kernel | None:
    shape = tuple(shape[-2:]) if len(shape) == 4 and shape[:2] == (1, 1) else shape  # 1x1xOutxIn before 2014
    if len(shape) != 2:
        return None
    flipped = bool(node.settings.get("transpose"))

    def values() -> Array:
        array = node.blob(0).tensor.array().reshape(shape)
        return np.ascontiguousarray(array.T) if flipped else array

    return Kernel("dense", shape[::-1] if flipped else shape, node.name, values)


def _transposed(node: Node, shape: tuple[int, ...], group: int) -> Kernel:
    """Deconvolution stores (in, out/group, *k)."""
    inner, outer, space = shape[0] // group, shape[1], shape[2:]

    def values() -> Array:
        array = node.blob(0).tensor.array().reshape(group, inner, outer, *space)
        return np.ascontiguousarray(np.swapaxes(array, 1, 2)).reshape(group * outer, inner, *space)

    return Kernel("transposed", (group * outer, inner, *space), node.name, values)
