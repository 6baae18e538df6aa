"""The likely order of definition of a state dict that was sorted by name, as safetensors files are.

It tells which kernel may belong to which layer, which has to prove itself (bnport.match); that one layer comes before
another it does not tell: `Layers.ordered` is False then.
"""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from bnport.containers.tensor import Tensor

_NUMBER = re.compile(r"\d{1,9}")


def is_sorted(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names ascend within each dtype: the reference library writes larger items first, then by name."""
    last: dict[str, str] = {}
    for name, tensor in tensors.items():
        if last.get(tensor.dtype, "") > name:
            return False
        last[tensor.dtype] = name
    return True


def as_defined(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The tensors in the order in which their modules were defined, and whether it is that: else it is the likely one.

    If they are sorted by name, children of a module go by the numbers in their names (conv1, bn1, layer1, conv2; those
    without numbers last), then kernels, BatchNorms, others, then by name.
    """
    if not is_sorted(tensors):
        return dict(tensors), True
    kinds: dict[str, int] = {}
    held: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        held.setdefault(module, []).append(name)
        if last == "running_mean":
            kinds[module] = 1
        elif last == "weight" and len(tensor.shape) > 1:
            kinds[module] = 0
    keys: dict[str, tuple[Hashable, ...]] = {"": ()}

    def key(path: str) -> tuple[Hashable, ...]:
        if path not in keys:
            parent, _, own = path.rpartition(".")
            numbers = tuple(int(number) for number in _NUMBER.findall(own))
            keys[path] = (*key(parent), (not numbers, numbers, kinds.get(path, 2), own))
        return keys[path]

    return {name: tensors[name] for module in sorted(held, key=key) for name in held[module]}, False
