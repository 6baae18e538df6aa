"""The weights that feed a layer, as evidence of which layer it is: kind, neutral shape, values when somebody compares."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.onnx.scope import Known
from bnport.adapters.onnx.tensors import FLOATS
from bnport.layer import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.adapters.onnx.model import Node
    from bnport.adapters.onnx.scope import Scope
    from bnport.record import Array

# what may lie between a convolution and its BatchNorm without making it another layer's
_BETWEEN = {"Identity", "Cast", "CastLike", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Dropout", "Pad"}
_FEWEST_DIMENSIONS = {"Conv": 3, "ConvTranspose": 3, "Gemm": 2, "MatMul": 2}
_MOST_STEPS = 16


def kernel_of(scope: Scope, name: str) -> Kernel | None:
    """The weights of the convolution or dense layer whose output, but for a bias and its layout, is `name`."""
    for _ in range(_MOST_STEPS):
        scope, name = scope.origin(name)
        node = scope.producers.get(name)
        if node is None or node.domain or not node.inputs:
            return None
        if node.op in _FEWEST_DIMENSIONS:
            found = _kernel(scope, node)
            return found if found is None else found._replace(before=_depthwise_before(scope, node, found))
        if node.op in _BETWEEN:
            name = node.inputs[0]
        elif node.op == "Add" and len(node.inputs) == 2:  # a bias
            constant = [isinstance(scope.constant(each), Known) for each in node.inputs]
            if sum(constant) != 1:
                return None
            name = node.inputs[constant.index(False)]
        else:
            return None
    return None


def _depthwise_before(scope: Scope, node: Node, kernel: Kernel) -> tuple[int, ...] | None:
    """The spatial shape of the depthwise kernel that a pointwise convolution takes its input from, if it does."""
    if node.op != "Conv" or any(n != 1 for n in kernel.shape[2:]):
        return None
    scope, name = scope.origin(node.inputs[0])
    producer = scope.producers.get(name)
    if producer is None or producer.domain or producer.op != "Conv":
        return None
    first = _kernel(scope, producer)
    return first.shape[2:] if first is not None and first.kind == "depthwise" else None


def weight_of(scope: Scope, node: Node) -> tuple[str, Known] | None:
    """(name, constant) of the weights of a Conv, ConvTranspose, Gemm or MatMul; None where they are computed."""
    positions = (1, 0) if node.op == "MatMul" else (1,)
    for position in positions:
        if position < len(node.inputs) and node.inputs[position]:
            found = scope.constant(node.inputs[position])
            if isinstance(found, Known):
                _, name = scope.origin(node.inputs[position])
                return name, found
    return None


def _kernel(scope: Scope, node: Node) -> Kernel | None:
    weight = weight_of(scope, node)
    if weight is None:
        return None
    name, found = weight
    shape = found.shape
    if shape is None or len(shape) < _FEWEST_DIMENSIONS[node.op] or found.dtype not in FLOATS or not all(shape):
        return None
    if node.op in ("Gemm", "MatMul"):
        return _dense(scope, node, name, found, shape)
    attribute = scope.attribute(node, "group")
    groups = 1 if attribute is None or attribute.i is None else attribute.i
    if groups < 1 or shape[0] % groups:
        return None
    if node.op == "Conv":  # (out, in / groups, *k) already
        kind = "conv" if groups == 1 else "depthwise" if shape[1] == 1 else "grouped"
        return Kernel(kind, shape, name, found.array)
    inside, outside = shape[0] // groups, shape[1]
    neutral = (groups * outside, inside, *shape[2:])

    def transposed() -> Array:  # theirs is (in, out / groups, *k)
        parts = found.array().reshape(groups, inside, outside, *shape[2:])
        turned: Array = parts.swapaxes(1, 2).reshape(neutral)
        return turned

    return Kernel("transposed", neutral, name, transposed)


def _dense(scope: Scope, node: Node, name: str, found: Known, shape: tuple[int, ...]) -> Kernel | None:
    if len(shape) != 2:
        return None
    attribute = scope.attribute(node, "transB")
    first = node.op == "MatMul" and scope.origin(node.inputs[0])[1] == name  # weights @ x: (out, in)
    if first or (node.op == "Gemm" and attribute is not None and attribute.i):
        return Kernel("dense", shape, name, found.array)
    turned: Callable[[], Array] = lambda: found.array().T  # noqa: E731
    return Kernel("dense", shape[::-1], name, turned)
