"""BatchNorm layers of a torch.export archive (.pt2): epsilon, kernels and graph are all in its models/model.json."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.adapters.torch.layers import kernel_of, make_layer
from bnport.adapters.torch.modules import kernel_kind
from bnport.adapters.torch.parameters import Product
from bnport.adapters.torch.state import norm_name
from bnport.adapters.torch.tensors import located
from bnport.containers.tensor import ITEM_SIZE
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from bnport.adapters.torch.tensors import Storage
    from bnport.containers.tensor import Tensor
    from bnport.containers.zip import Archive
    from bnport.layer import Kernel, Layer

MODEL = "models/model.json"
JSON_LIMIT = 10_000_000  # bytes; parsed JSON takes up to thirty times as much

# torch._export.serde.schema.ScalarType
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool",
           13: "bfloat16"}  # fmt: skip
NORMS = ("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
_KERNELS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "conv_transpose1d", "conv_transpose2d",
            "conv_transpose3d")  # fmt: skip
_CHANNELWISE = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "elu", "silu", "silu_", "gelu",
                "hardswish", "hardswish_", "sigmoid", "tanh", "dropout", "max_pool1d", "max_pool2d", "max_pool3d",
                "avg_pool1d", "avg_pool2d", "avg_pool3d", "pad", "clone", "contiguous", "constant_pad_nd")  # fmt: skip


def layers_of_export(archive: Archive, root: str, where: str) -> tuple[list[Layer], list[str]]:
    """The BatchNorm layers of an exported program, in the order in which it runs, and notes."""
    try:
        program = _json(archive, root + MODEL, where)["graph_module"]
        nodes = [_Node(node) for node in program["graph"]["nodes"]]
        names = dict(_parameters(program["signature"]["input_specs"]))
        tensors = _tensors(archive, root, where)
        return list(_layers(nodes, names, tensors, where)), []
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{where}: {MODEL} is not as torch.export writes it ({printable(error)})") from None


def _json(archive: Archive, member: str, where: str) -> Any:
    from bnport.containers.json_text import loads

    return loads(archive.read(member, JSON_LIMIT), f"{where}: {printable(member)}")


def _parameters(specs: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """name in the graph -> name in the module, of parameters and buffers."""
    for spec in specs:
        for kind in ("parameter", "buffer"):
            if kind in spec:
                yield spec[kind]["arg"]["name"], spec[kind][f"{kind}_name"]


def _tensors(archive: Archive, root: str, where: str) -> dict[str, Tensor]:
    found = {}
    for folder, config in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
        member = f"{root}data/{folder}/{config}.json"
        if member not in archive:
            continue
        for name, entry in _json(archive, member, where)["config"].items():
            meta = entry.get("tensor_meta")
            if not meta or entry.get("use_pickle"):
                continue
            path, dtype = f"{root}data/{folder}/{entry['path_name']}", _DTYPES.get(meta["dtype"], "unknown")
            shape, strides = (tuple(n["as_int"] for n in meta[key]) for key in ("sizes", "strides"))
            storage = _storage(archive, path, dtype, where)
            found[name] = located(storage, meta["storage_offset"]["as_int"], shape, strides, name, where)
    return found


def _storage(archive: Archive, member: str, dtype: str, where: str) -> Storage:
    from bnport.adapters.torch.checkpoint import MemberStorage

    if member not in archive:
        raise FormatError(f"{where}: storage {printable(member)!r} is missing")
    count = archive.member(member).size // ITEM_SIZE.get(dtype, 1)
    return MemberStorage(archive, member, dtype, count)


class _Node:
    """One operation: its name without the namespace, its arguments by name, the tensors it takes and makes."""

    __slots__ = ("arguments", "makes", "operation", "takes")

    def __init__(self, node: dict[str, Any]) -> None:
        self.operation: str = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]
        self.arguments: dict[str, Any] = {i["name"]: i["arg"] for i in node["inputs"]}
        self.takes = [name for i in node["inputs"] for name in _names(i["arg"])]
        self.makes = [name for output in node["outputs"] for name in _names(output)]

    def tensor(self, argument: str) -> str:
        """The name of the tensor given as an argument; "" if none is."""
        given = self.arguments.get(argument, {})
        return str(given["as_tensor"]["name"]) if "as_tensor" in given else ""


def _names(argument: dict[str, Any]) -> list[str]:
    if "as_tensor" in argument:
        return [argument["as_tensor"]["name"]]
    for kind in ("as_tensors", "as_optional_tensors"):
        if kind in argument:
            values = [item.get("as_tensor", item) for item in argument[kind]]
            return [item["name"] for item in values if isinstance(item, dict) and "name" in item]
    return []


def _layers(nodes: list[_Node], names: dict[str, str], tensors: dict[str, Tensor], where: str) -> Iterator[Layer]:
    before: dict[str, dict[str, None]] = {}  # the BatchNorms that reach a tensor with none between, in order
    feeds: dict[str, Kernel] = {}  # the kernel that a tensor's channels come from
    seen: set[str] = set()
    for node in nodes:
        reached: dict[str, None] = {}
        for taken in node.takes:
            reached.update(before.get(taken, {}))
        fed_by = feeds.get(node.takes[0]) if node.takes else None
        if node.operation in NORMS:
            name = norm_name(names.get(node.tensor("running_mean"), ""))
            if name not in seen:
                yield _layer(name, node, nodes, names, tensors, where, fed_by, tuple(reached))
            seen.add(name)
            reached, fed_by = {name: None}, None
        elif node.operation in _KERNELS:
            fed_by = _kernel(node, names, tensors)
        elif node.operation not in _CHANNELWISE:
            fed_by = None
        for made in node.makes:
            before[made] = reached
            if fed_by is not None:
                feeds[made] = fed_by


def _layer(
    name: str,
    node: _Node,
    nodes: list[_Node],
    names: dict[str, str],
    tensors: dict[str, Tensor],
    where: str,
    kernel: Kernel | None,
    inputs: tuple[str, ...],
) -> Layer:
    given = node.arguments
    if given.get("training", {}).get("as_bool") or not node.tensor("running_mean"):
        raise FormatError(
            f"{where}: {printable(name)} was exported in training mode or without running statistics, so it uses those"
            " of each batch; call eval() before torch.export.export"
        )
    shown, notes = f"{where}: {printable(name)}", []
    found: dict[str, Tensor | None] = {}
    for theirs in ("weight", "bias", "running_mean", "running_var"):
        used = node.tensor(theirs)
        found[theirs] = tensors.get(names.get(used, used)) if used else None
        if used and found[theirs] is None:
            found[theirs] = _pruned(used, nodes, names, tensors, shown, theirs)
            notes.append(f"pruned: {theirs} is {theirs}_orig * {theirs}_mask")
    epsilon = given.get("eps", given.get("epsilon", {})).get("as_float")
    return make_layer(name, found, where, epsilon=epsilon, kernel=kernel, inputs=inputs, notes=notes)


def _pruned(
    made: str, nodes: list[_Node], names: dict[str, str], tensors: dict[str, Tensor], shown: str, theirs: str
) -> Tensor:
    """The product of a stored parameter and its mask that the graph computes; any other computation is refused."""
    makers = {name: node for node in nodes for name in node.makes}
    maker = makers.get(made)
    if maker is None:
        raise FormatError(f"{shown}: no tensor {printable(names.get(made, made))!r} in the archive")
    parts = {}
    for taken in maker.takes:
        cast = makers.get(taken)  # prune multiplies with mask.to(orig.dtype)
        stored = names.get(cast.takes[0] if cast is not None and cast.operation == "to" and cast.takes else taken, "")
        parts[stored.rpartition(".")[2]] = tensors.get(stored)
    orig, mask = parts.get(f"{theirs}_orig"), parts.get(f"{theirs}_mask")
    if maker.operation != "mul" or orig is None or mask is None or orig.shape != mask.shape:
        raise FormatError(
            f"{shown}: its {theirs} is not stored: the graph computes it by {printable(maker.operation)!r}. Make it a plain"
            " parameter before torch.export.export (torch.nn.utils.remove_weight_norm, parametrize.remove_parametrizations,"
            " prune.remove), or give bnport the live module"
        )
    return Product(f"{shown}.{theirs}", orig, mask)


def _kernel(node: _Node, names: dict[str, str], tensors: dict[str, Tensor]) -> Kernel | None:
    parameter = names.get(node.tensor("weight"), "")
    tensor = tensors.get(parameter)
    if tensor is None or len(tensor.shape) < 2:
        return None
    transposed = "transpose" in node.operation or node.arguments.get("transposed", {}).get("as_bool")
    groups = node.arguments.get("groups", {}).get("as_int", 1)
    kind = kernel_kind("ConvTranspose" if transposed else "", tensor.shape, groups)
    return kernel_of(parameter.removesuffix(".weight"), tensor, kind=kind)
