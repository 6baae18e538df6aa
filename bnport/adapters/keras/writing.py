"""Changes written into a copy of a Keras file: arrays overwritten where they lie, epsilon put into the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.adapters.keras import config
from bnport.adapters.keras.entry import renorm_arrays
from bnport.containers.patch import Patch, copy_patched, crc_patches, joined, replace_members
from bnport.containers.zip import STORED
from bnport.errors import FormatError, InvalidValue, listed, printable
from bnport.record import FIELDS
from bnport.rounding import round_to, stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.keras.entry import Contents, Entry
    from bnport.containers.hdf5 import H5Tensor
    from bnport.layer import Change
    from bnport.record import Array

REWRITE_LIMIT = 2 << 30  # bytes of a weights member that is rewritten in memory because it cannot be patched


class _Plan:
    """What is to be done: (tensor, new bytes) and the config's node, by number -> {"epsilon": value, "momentum": value}."""

    def __init__(self) -> None:
        self.arrays: list[tuple[H5Tensor, bytes]] = []
        self.settings: dict[int, dict[str, float]] = {}


def write(contents: Contents, changes: Mapping[str, Change], out: str) -> None:
    """Fill the new empty file `out` with a copy of the contents' file and the changes."""
    plan = _planned(contents, changes)
    if contents.kind == "keras":
        _write_archive(contents, plan, out)
    else:
        _write_hdf5(contents, plan, out)


def patches(contents: Contents, changes: Mapping[str, Change]) -> list[Patch]:
    """The changes as bytes at offsets of the contents' file, which keeps its length; InvalidValue if they are more."""
    plan = _planned(contents, changes)
    shown = printable(contents.path)
    found = _patches(plan)
    if found is None or (plan.settings and contents.kind != "keras"):
        what = "its arrays are compressed or in headers" if found is None else "epsilon is inside an attribute"
        raise InvalidValue(f"{shown}: cannot be changed in place ({what}); make a new file (-o)")
    if contents.kind != "keras":
        return found
    from bnport.adapters.keras.archive import CONFIG, WEIGHTS

    archive = contents.extra["archive"]
    if found:
        member = archive.member(WEIGHTS)
        if member.method != STORED:
            raise InvalidValue(
                f"{shown}: cannot be changed in place (its weights are compressed); make a new file (-o)"
            )
        found += crc_patches(archive, member, found)
    if plan.settings:
        member = archive.member(CONFIG)
        text = _new_config(contents.extra["text"], plan, f"{shown}: {CONFIG}", same_length=True).encode("utf-8")
        if member.method != STORED or len(text) != member.size:
            raise InvalidValue(
                f"{shown}: cannot be changed in place (no room for epsilon in {CONFIG}); make a new file (-o)"
            )
        inside = [Patch(member.data_offset, text)]
        found += inside + crc_patches(archive, member, inside)
    return joined(found)


def _planned(contents: Contents, changes: Mapping[str, Change]) -> _Plan:
    if contents.read_only:
        raise FormatError(contents.read_only)
    plan = _Plan()
    for name, change in changes.items():
        _add(plan, contents, contents.entry(name), change)
    return plan


def _add(plan: _Plan, contents: Contents, entry: Entry, change: Change) -> None:
    """Check one change and add it to the plan."""
    where, record = entry.where, change.record
    if entry.form != "variance" and change.fields & {"variance", "epsilon"}:
        raise FormatError(f"{where}: this file keeps a standard deviation (Keras 1); it is read, not written")
    lacking = change.fields - entry.stores(holds_epsilon=contents.holds_epsilon)
    if lacking:
        raise InvalidValue(f"{where}: the file has no place for {listed(sorted(lacking))} of this layer")
    tensors = entry.tensors()
    for field in FIELDS:
        if field in change.fields:
            plan.arrays.append((tensors[field], _encoded(getattr(record, field), tensors[field], f"{where}: {field}")))
    new: dict[str, float] = {}
    if "epsilon" in change.fields and record.epsilon != entry.epsilon:
        new["epsilon"] = record.epsilon
    if "momentum" in change.fields and change.momentum is not None and change.momentum != entry.momentum:
        new["momentum"] = change.momentum
    if new and entry.node is not None:
        plan.settings[_number(contents, entry.node)] = new
    if "moving_stddev" in tensors:
        epsilon = new.get("epsilon", entry.applied_epsilon)
        for field, array in renorm_arrays(record, epsilon, change.fields).items():
            plan.arrays.append((tensors[field], _encoded(array, tensors[field], f"{where}: {field}")))


def _number(contents: Contents, node: config.Node) -> int:
    """The how-many-eth node of the config it is: inside custom layers names may occur twice."""
    numbers = contents.extra.get("numbers")
    if numbers is None:
        numbers = contents.extra["numbers"] = {id(each): at for at, each in enumerate(contents.extra["root"].walk())}
    number: int = numbers[id(node)]
    return number


def _encoded(array: Array, tensor: H5Tensor, where: str) -> bytes:
    """The array in the tensor's dtype, little-endian."""
    if array.shape != tensor.shape:
        raise InvalidValue(f"{where}: shape {tensor.shape} expected, got {array.shape}")
    rounded = round_to(array, tensor.dtype)
    if not np.isfinite(rounded).all():
        raise InvalidValue(f"{where}: a value does not fit {tensor.dtype}")
    return stored(rounded, tensor.dtype)


def _patches(plan: _Plan) -> list[Patch] | None:
    """The arrays as bytes at offsets of the file; None if one of them does not lie there plainly."""
    patches = []
    for tensor, data in plan.arrays:
        if tensor.offset is None or tensor.nbytes != len(data):
            return None
        patches.append(Patch(tensor.offset, data))
    return joined(patches)


def _new_config(text: bytes | str, plan: _Plan, where: str, *, same_length: bool = False) -> str:
    """The config's text with the new epsilons and momenta, every other character kept (and its place, if that is asked)."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    numbers: dict[int, float] = {}
    for number, node in enumerate(config.tree(config.parse(text, where, positions=True), where).walk()):
        for key, value in plan.settings.get(number, {}).items():
            old = node.config[key]
            if not isinstance(old, config.Real | config.Whole):
                raise FormatError(f"{where}: {printable(node.path)}: {key} is not a number")
            numbers[old.at] = value
    return config.replaced(text, numbers, same_length=same_length)


def _write_archive(contents: Contents, plan: _Plan, out: str) -> None:
    from bnport.adapters.keras.archive import CONFIG, WEIGHTS

    archive = contents.extra["archive"]
    members: dict[str, bytes] = {}
    if plan.settings:
        text = _new_config(contents.extra["text"], plan, f"{printable(contents.path)}: {CONFIG}")
        members[CONFIG] = text.encode("utf-8")
    patches = _patches(plan) if WEIGHTS in archive and archive.member(WEIGHTS).method == STORED else None
    if patches is None and plan.arrays:
        plain = archive.read(WEIGHTS, REWRITE_LIMIT)
        members[WEIGHTS] = _rewritten(plain, plan)
    patches = patches or []
    if patches:
        patches += crc_patches(archive, archive.member(WEIGHTS), patches)
    if members:
        replace_members(archive, out, members, patches)
    else:
        copy_patched(archive.file, out, patches)


def _write_hdf5(contents: Contents, plan: _Plan, out: str) -> None:
    from bnport.containers.files import ReadFile

    patches = _patches(plan)
    copy_patched(ReadFile(contents.path), out, patches or [])
    text = None
    if plan.settings:
        where = f"{printable(contents.path)}: model_config"
        text = _new_config(contents.extra["text"], plan, where)
    if patches is None or text is not None:
        _edit(out, plan if patches is None else None, text)


def _rewritten(plain: bytes, plan: _Plan) -> bytes:
    """An HDF5 file in memory with the arrays set by h5py, for arrays that are compressed or lie in a header."""
    import io

    memory = io.BytesIO(plain)
    _edit(memory, plan, None)
    return memory.getvalue()


def _edit(file: Any, plan: _Plan | None, text: str | None) -> None:
    """Set arrays and model_config with h5py. The links on the way were seen to be hard ones when the file was read."""
    import h5py

    try:
        with h5py.File(file, "r+", **({} if plan is None or not isinstance(file, str) else {"locking": False})) as h5:
            for tensor, data in plan.arrays if plan is not None else ():
                dataset = h5[tensor.name]
                little = np.dtype("V2" if tensor.dtype == "bfloat16" else tensor.dtype).newbyteorder("<")
                dataset[...] = np.frombuffer(data, little).reshape(tensor.shape)
            if text is not None:
                _set_text(h5, "model_config", text)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise FormatError(f"the copy cannot be changed through h5py ({printable(error, 120)})") from None


def _set_text(h5: Any, name: str, text: str) -> None:
    """Replace a text attribute, keeping whether its length is fixed."""
    import h5py

    kind = h5.attrs.get_id(name).get_type()
    value: Any = text if kind.is_variable_str() else np.bytes_(text.encode("utf-8"))
    dtype = h5py.string_dtype("ascii" if text.isascii() else "utf-8") if kind.is_variable_str() else None
    h5.attrs.create(name, value, dtype=dtype)
