"""What is common to every way that torch stores a BatchNorm: the checks, the Layer, and the kernel that feeds it."""

from __future__ import annotations

import functools

from bnport._lazy import TYPE_CHECKING, np
from bnport.adapters.torch.tensors import FLOATS
from bnport.containers.tensor import arrays_of
from bnport.errors import FormatError, InvalidValue, printable
from bnport.layer import Kernel, Layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bnport.containers.tensor import Tensor
    from bnport.record import Array

EPSILON = 1e-5  # torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm; not in state dicts
FIELD_OF = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "variance"}
_ONES = {"float64": b"\0\0\0\0\0\0\xf0?", "float32": b"\0\0\x80?", "float16": b"\0<", "bfloat16": b"\x80?"}

NO_STATISTICS = (
    "holds no running statistics (track_running_stats=False): it normalises each batch by itself, so there is no fixed"
    " function to port. Compute them from data (bnport convert --calibrate DATA, or bnport calibrate), or set"
    " track_running_stats=True, run training batches through it and save again"
)
# of torch.optim.swa_utils.AveragedModel; a state dict does not tell how it was made
AVERAGED = "an averaged model: its running statistics are not averaged{}"
INSTANCE_NORMS = "{} InstanceNorm layers are not BatchNorm and were left alone"
LAZY = "is a lazy layer that has not seen a batch yet; run one batch through the model, then save it"


def make_layer(
    name: str,
    tensors: Mapping[str, Tensor | None],
    where: str,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    counter: Tensor | None = None,
    inplace_abn: bool = False,
    holds: Iterable[str] = (),
    kernel: Kernel | None = None,
    inputs: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    channels: int | None = None,
    own_code: bool = False,
) -> Layer:
    """A Layer from torch's four tensors, checked.

    `tensors`: weight, bias, running_mean, running_var; the first two may be missing, and so may the last two together
    where `channels` is given: a layer without statistics. `epsilon`: None assumes torch's
    default. `momentum`: torch's, the fraction of the NEW value. `counter`: num_batches_tracked. `inplace_abn`: gamma is
    |weight| + epsilon. `holds`: of epsilon and momentum, what the source could hold if written to. `own_code`: as of a Layer.
    Raises FormatError, naming file and tensor, for a missing or badly shaped array.
    """
    shown = f"{where}: {printable(name)}"
    present = {theirs: tensor for theirs, tensor in tensors.items() if tensor is not None}
    missing = [theirs for theirs in ("running_mean", "running_var") if theirs not in present]
    if missing and (len(missing) == 1 or channels is None):
        raise FormatError(f"{shown}: {missing[0]} is missing")
    shape = (channels or 0,) if missing else present["running_mean"].shape
    for theirs, tensor in present.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(f"{shown}.{theirs}: expected floating-point numbers, got dtype {printable(tensor.dtype)}")
        if len(tensor.shape) != 1 or tensor.shape != shape or not tensor.size:
            raise FormatError(
                f"{shown}.{theirs}: expected shape (channels,), the same for all; got {tensor.shape}, expected {shape}"
            )
    assumed = ["epsilon"] if epsilon is None else []
    epsilon = EPSILON if epsilon is None else epsilon
    dtypes = sorted({tensor.dtype for tensor in present.values()}, key=FLOATS.index)
    notes = list(notes)
    if len(dtypes) > 1:
        notes.append(f"stored as {' and '.join(dtypes)}")
    if inplace_abn:
        notes.append("InPlaceABN: gamma is |weight| + epsilon")
    untrained = counter is not None and not missing and _untrained(present, counter)
    if untrained:
        notes.append("untrained: it never saw a batch (num_batches_tracked 0, mean 0, variance 1)")
    by_field = {FIELD_OF[theirs]: tensor for theirs, tensor in present.items()}
    try:
        return Layer(
            name,
            channels=shape[0],
            epsilon=epsilon,
            load=functools.partial(_load, by_field, epsilon if inplace_abn else None),
            momentum=None if momentum is None else round(1 - momentum, 12),
            stores=[*by_field, *holds],
            assumed=assumed,
            dtype=dtypes[-1] if dtypes else "float32",
            tensors={f: t for f, t in by_field.items() if f != "gamma"} if inplace_abn else by_field,
            kernel=kernel,
            inputs=inputs,
            notes=notes,
            without=NO_STATISTICS if missing else "",
            own_code=own_code,
            untrained=untrained,
        )
    except InvalidValue as error:
        raise FormatError(f"{where}: {error}") from None


def _load(tensors: Mapping[str, Tensor], added: float | None) -> dict[str, Array]:
    """The arrays by field; `added`: to |weight|, for InPlaceABN."""
    arrays = arrays_of(tensors)
    if added is not None and "gamma" in arrays:
        arrays["gamma"] = np.abs(arrays["gamma"].astype(np.float64)) + added
    return arrays


def _untrained(tensors: Mapping[str, Tensor], counter: Tensor) -> bool:
    """Whether the counter is 0 and mean and variance are still what they were initialised to."""
    if counter.size != 1 or counter.dtype not in ("int64", "int32", *FLOATS) or any(counter.read()):
        return False
    mean, variance = tensors["running_mean"], tensors["running_var"]
    return not any(mean.read()) and variance.read() == _ONES[variance.dtype] * variance.size


# ---- the kernel that feeds a layer


class Definition:
    """A kernel or BatchNorm in the order of definition: its module's name, and for a kernel what it is."""

    __slots__ = ("kernel", "name", "out")

    def __init__(self, name: str, out: int, kernel: Kernel | None = None) -> None:
        self.name, self.out, self.kernel = name, out, kernel

    @property
    def parent(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


def kernel_of(name: str, tensor: Tensor, *, kind: str | None = None, first: bool = False) -> Kernel:
    """A conv or linear weight in torch's layout (out, in / groups, *spatial), which is the neutral one.

    `kind` None guesses from the shape: one input channel and a spatial extent is a depthwise kernel, unless it is the
    `first` of the model (grey images). A transposed kernel (in, out / groups, *spatial) swaps its first two axes.
    """
    shape = tensor.shape
    if kind is None:
        depthwise = len(shape) > 2 and shape[1] == 1 and shape[0] > 1 and not first
        kind = "dense" if len(shape) == 2 else "depthwise" if depthwise else "conv"
    if kind == "transposed":
        shape = (shape[1], shape[0], *shape[2:])
        return Kernel(kind, shape, name, lambda: np.swapaxes(tensor.array(), 0, 1))
    return Kernel(kind, shape, name, tensor.array)


def feeding(definitions: Iterable[Definition]) -> dict[str, Kernel]:
    """BatchNorm name -> the kernel that feeds it, guessed (`Kernel.guessed`) from the order of definition.

    A kernel counts if it is the only one defined in the BatchNorm's own module since the BatchNorm before, directly
    precedes it, and has as many outputs as it has channels. A depthwise kernel with its pointwise one in one child module
    of the BatchNorm's own counts as the pointwise one. A pre-activation network that defines the BatchNorm before the
    kernel fits this too; one that defines conv1, bn1, conv2, bn2 and calls bn1, conv1, bn2, conv2 does not, nor does the
    reverse. One kernel somewhere whose shape fits only such an order shows that definitions are not called in their order
    here: then all guesses are `refuted`.
    """
    found: dict[str, Kernel] = {}
    since: list[Definition] = []
    last: Definition | None = None  # the BatchNorm before `since`
    starts: dict[str, Definition] = {}  # of each module: the first thing defined in it
    refuted = False
    for definition in definitions:
        starts.setdefault(definition.parent, definition)
        if definition.kernel is not None:
            if not since and last is not None and _feeds_the_one_before(last, definition, starts):
                refuted = True
            since.append(definition)
            continue
        beside = [d for d in since if definition.parent in (d.parent, d.name)]  # d.name: ConvBn holds its own kernel
        before = None
        if not beside and _separable(since, definition.parent):
            beside = since[-1:]
            before = since[0].kernel.shape[2:] if since[0].kernel else None
        if len(beside) == 1 and since[-1] is beside[0]:
            kernel = beside[0].kernel
            if beside[0].out == definition.out and kernel is not None:
                found[definition.name] = kernel._replace(before=before, guessed=True)
            elif _fed_by_the_one_after(definition, beside[0]):
                refuted = True
        since, last = [], definition
    return {name: kernel._replace(refuted=True) for name, kernel in found.items()} if refuted else found


def _fed_by_the_one_after(norm: Definition, before: Definition) -> bool:
    """Whether the kernel defined right before a BatchNorm in its module fits it only as the one that it feeds."""
    inputs = _inputs_beside(norm, before)
    return inputs == norm.out != before.out


def _feeds_the_one_before(norm: Definition, after: Definition, starts: Mapping[str, Definition]) -> bool:
    """Whether the kernel defined right after a BatchNorm in its module fits it only as the one that feeds it.

    Only in a module that begins with a BatchNorm: in others the kernel may begin the next branch.
    """
    inputs = _inputs_beside(norm, after)
    return inputs is not None and starts[norm.parent].kernel is None and after.out == norm.out != inputs


def _inputs_beside(norm: Definition, beside: Definition) -> int | None:
    """How many inputs a kernel has that lies in one module with a BatchNorm; None if it does not, or nobody knows.

    None too in a torch.nn.Sequential, whose children are numbers: it calls them in the order of definition.
    """
    kernel = beside.kernel
    names = [definition.name.rpartition(".")[2] for definition in (norm, beside)]
    if kernel is None or norm.parent != beside.parent or all(name.isdigit() for name in names):
        return None
    return None if kernel.kind in ("depthwise", "grouped") or len(kernel.shape) < 2 else kernel.shape[1]


def _separable(since: list[Definition], parent: str) -> bool:
    """Whether `since` is a depthwise and its pointwise kernel, in one module that lies directly in `parent`."""
    if len(since) != 2 or since[0].parent != since[1].parent or since[1].parent.rpartition(".")[0] != parent:
        return False
    depthwise, pointwise = since[0].kernel, since[1].kernel
    return (
        depthwise is not None
        and pointwise is not None
        and depthwise.kind == "depthwise"
        and pointwise.shape[1] == depthwise.shape[0]
        and all(length == 1 for length in pointwise.shape[2:])
    )
