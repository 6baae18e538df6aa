"""BatchNorm that is no longer there: which convolutions it was folded into, and the export call that keeps it.

Exporters fold by default and say nothing. What gives them away, measured with torch 2.13, tf2onnx 1.17, onnxruntime 1.32:
torch's dynamo exporter notes the rewrite rule on the node, and calls the bias that it adds `<weight>_bias`; its
TorchScript exporter gives both tensors of the convolution new names (`onnx::Conv_49`); tf2onnx calls the weights
`..._weights_fused_bn` or the bias `.../batchnorm/sub`; onnxruntime's optimiser calls them `ConvBnFusion_...`.
"""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.onnx.layers import scope_path
from bnport.errors import listed

if TYPE_CHECKING:
    from bnport.adapters.onnx.model import Node
    from bnport.adapters.onnx.scope import Scope
    from bnport.adapters.onnx.walk import Walk

TORCH_CALL = 'torch.onnx.export(model.eval(), args, "model.onnx", dynamo=True, optimize=False)'
_RULE = "pkg.onnxscript.rewriter.rule_name"
_SCOPES = "pkg.torch.onnx.name_scopes"
_ANONYMOUS = re.compile(r"onnx::(Conv|ConvTranspose|Gemm|MatMul)_\d+")
_OF_BATCHNORM = re.compile(r"batch_?norm|(^|[/._])bn\d*([/._]|$)|ConvBnFusion", re.IGNORECASE)
_ADVICE = {
    "pytorch": f"To keep it, export again with {TORCH_CALL}, or give bnport the PyTorch checkpoint itself.",
    "tf2onnx": "Give bnport the .keras or .h5 file itself, which holds them.",
    "onnxruntime": "Give bnport the model as it was before onnxruntime's optimiser, or export it again.",
    "": f"Export again without optimisation (with PyTorch: {TORCH_CALL}), or give bnport the checkpoint itself.",
}


def notes(walk: Walk) -> list[str]:
    """One note about what was folded, if anything shows it, or about a model that has no BatchNorm at all."""
    sure: list[str] = []
    likely: list[str] = []
    optimiser = ""
    kept = {(found.scope, found.node.inputs[0]) for found in walk.found if found.node.inputs}
    for scope, node in walk.weighted:
        certain, what = _signs(scope, node)
        if any((scope, output) in kept for output in node.outputs):
            continue  # its BatchNorm is still there, whatever the names say
        if what:
            (sure if certain else likely).append(what)
            if "ConvBnFusion" in " ".join(node.inputs):
                optimiser = "onnxruntime"
    advice = _ADVICE[optimiser or _family(walk.model.producer)]
    found: list[str] = []
    if sure:
        found.append(f"BatchNorm was folded into {len(sure)} {_layers(sure)} ({listed(sure)}).")
    if likely:
        found.append(f"BatchNorm was probably folded into {len(likely)} {_layers(likely)} ({listed(likely)}).")
    if found:
        return [f"{' '.join(found)} Its parameters cannot be told apart from theirs any more. {advice}"]
    if walk.found:
        return []
    if walk.weighted:
        return [
            f"None of its {len(walk.weighted)} convolutions and dense layers shows that BatchNorm was folded into it, but"
            f" exporters fold it by default. If the model had BatchNorm: {advice[0].lower()}{advice[1:]}"
        ]
    return []


def _layers(names: list[str]) -> str:
    return "layer" if len(names) == 1 else "layers"


def _family(producer: str) -> str:
    lowered = producer.lower()
    if "torch" in lowered:
        return "pytorch"
    return "tf2onnx" if "tf2onnx" in lowered or "keras" in lowered else ""


def _signs(scope: Scope, node: Node) -> tuple[bool, str]:
    """(whether it is certain, which layer) for a node that shows that BatchNorm went into it; ("" if it does not)."""
    names = node.inputs[1:3]
    weight = names[0] if names else ""
    bias = names[1] if len(names) > 1 else ""
    metadata = node.metadata
    label = scope.label + _layer_name(node, weight)
    if "FuseBatchNorm" in metadata.get(_RULE, ""):
        lost = scope_path(metadata.get(_SCOPES, ""))
        return True, f"{label} (was {lost})" if lost else label
    if weight.endswith("_weights_fused_bn"):
        before, fused, _ = (node.outputs or [""])[0].partition("/FusedBatchNorm")
        return True, f"{label} (was {before})" if fused else label
    if "ConvBnFusion" in f"{weight} {bias}" or "/batchnorm/" in bias:
        lost = bias.split("/batchnorm/")[0] if "/batchnorm/" in bias else ""
        return True, f"{label} (was {lost})" if lost else label
    if node.op != "MatMul" and _ANONYMOUS.fullmatch(weight) and _ANONYMOUS.fullmatch(bias):
        return True, label
    if bias and bias == f"{weight}_bias":
        return False, label
    if _OF_BATCHNORM.search(f"{bias} {' '.join(node.outputs)}") and node.op != "MatMul":
        return False, label
    return False, ""


def _layer_name(node: Node, weight: str) -> str:
    """What a person calls the layer: PyTorch's module, or the node."""
    weight = weight.removeprefix("ConvBnFusion_W_")
    if weight.endswith(".weight"):
        return weight[: -len(".weight")]
    return node.shown
