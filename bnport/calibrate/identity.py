"""Whether a resumed run is the run that its checkpoint is of: the same settings, model and data, in the same order.

A checkpoint names its run by one digest for each part of what the result depends on (`of_run`), which is held against the
new run before anything is read. What cannot be told beforehand, the data of a generator or a shuffled loader, is told
batch by batch: the checkpoint has the digest of every batch (`Order`), and the batches that the new run reads again must
be those.
"""

from __future__ import annotations

import hashlib
import types
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.errors import FormatError, InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnport.calibrate.data import Batches
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.record import Array

SIZE = 16  # bytes of sha256 that are kept of each batch


def of_run(live: LiveModel, selected: Iterable[Norm], batches: Batches, method: str, unbiased: bool) -> dict[str, str]:
    """Part of a run -> sha256; memory, workers and the like change no bit of the result and are not in it."""
    weights = hashlib.sha256()
    for variable in live.model.weights:
        _feed(weights, np.asarray(variable.numpy()))
    norms = [(norm.name, norm.axis, norm.epsilon, norm.momentum) for norm in live.norms]
    return {
        "the method": _digest((method, unbiased)),
        "the layers": _digest([norm.name for norm in selected]),
        "the model's weights": weights.hexdigest(),
        "the model's layers and their settings": _digest((norms, _architecture(live))),
        "the limit": _digest(batches.limit),
        "the data, or their batch size": _digest(batches.about()),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def of_batch(live: LiveModel, batch: Any) -> bytes:
    """16 bytes that tell a batch from others: of sha256 over its arrays, their shapes, dtypes and the structure."""
    digest = hashlib.sha256(repr(sorted(batch) if isinstance(batch, dict) else type(batch)).encode())
    for leaf in live.tree.flatten(batch):
        _feed(digest, np.asarray(leaf))
    return digest.digest()[:SIZE]


def _feed(digest: Any, array: Array) -> None:
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# A model's architecture.


def _architecture(live: LiveModel) -> object:
    """The model's config with its names numbered, as Keras numbers names anew in every process; and code of its own."""
    configs, names = [], dict[str, int]()
    for part in (live.model, *live.model._flatten_layers(include_self=False, recursive=True)):
        code = [_code(value) for value in _functions(part)]
        try:
            config: Any = _plain(part.get_config())
        except Exception:  # whatever a class without a config of its own raises
            config = None
        configs.append((type(part).__qualname__, config, code))
        names.setdefault(str(part.name), len(names))
    _collect(configs, names)
    return _numbered(configs, names)


def _plain(value: Any) -> Any:
    """A config as lists, dicts, text and numbers; of any other object its type."""
    if isinstance(value, dict):  # seeds are drawn when a layer is made
        return {
            str(k): _plain(v) for k, v in sorted(value.items(), key=str) if k != "seed" and not _is_lambda(value, k)
        }
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__


def _is_lambda(config: dict[Any, Any], key: object) -> bool:
    """Marshalled code differs between processes; `_functions` has it instead."""
    return key in ("config", "function") and "__lambda__" in (config.get("class_name"), str(config.get(key))[:60])


def _collect(value: Any, names: dict[str, int]) -> None:
    """Names in a functional model's config, of steps that are no layers."""
    if isinstance(value, dict):
        if "inbound_nodes" in value:
            names.setdefault(str(value.get("name")), len(names))
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            _collect(inner, names)


def _numbered(value: Any, names: dict[str, int]) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbered(inner, names) for inner in value]
    return f"#{names[value]}" if isinstance(value, str) and value in names else value


def _functions(part: Any) -> list[types.CodeType]:
    """The code that computes, where it is not Keras' own: of call(), and of a Lambda layer."""
    found = [getattr(type(part), "call", None), getattr(part, "function", None)]
    codes = [(f, getattr(getattr(f, "python_function", f), "__code__", None)) for f in found]
    own = [code for f, code in codes if str(getattr(f, "__module__", "")).split(".")[0] not in ("keras", "tf_keras")]
    return [code for code in own if code is not None]


def _code(code: types.CodeType) -> object:
    constants = [
        _code(value) if isinstance(value, types.CodeType) else sorted(map(repr, value)) if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]  # fmt: skip
    return [code.co_code.hex(), list(code.co_names), constants]


# The batches, in order.


class Order:
    """The digests of a run's batches, those of the run that it resumes first.

    path:    the checkpoint, for a message.
    stored:  uint8 (batches, SIZE) of the resumed run.
    whole:   `stored` are all batches that there are (a population run), not only the first ones.
    """

    def __init__(self, path: str, stored: Array | None = None, whole: bool = False) -> None:
        self.path, self.whole = path, whole
        if stored is not None and (stored.ndim != 2 or stored.shape[1] != SIZE or stored.dtype != np.uint8):
            raise FormatError(f"{printable(path)}: its digests of batches are {stored.dtype} {stored.shape}")
        self.digests = [] if stored is None else [row.tobytes() for row in stored]
        self._before = len(self.digests)

    def check(self, number: int, digest: bytes) -> None:
        """Batch `number` was read. InvalidValue if the checkpoint's run saw another one there."""
        if number < len(self.digests):
            if digest != self.digests[number]:
                raise self._refused(f"batch {number} is not the batch {number} that it has seen")
        elif self.whole and self._before:
            raise self._refused(f"there are more than the {self._before} batches that it has seen")
        elif number == len(self.digests):
            self.digests.append(digest)
        else:
            raise FormatError(f"batch {number} was read after batch {len(self.digests) - 1}")

    def ended(self, count: int) -> None:
        """There are `count` batches. InvalidValue if the checkpoint's run saw more."""
        if count < self._before:
            raise self._refused(f"the data end after {count} batches, it has seen {self._before}")

    def _refused(self, why: str) -> InvalidValue:
        return InvalidValue(
            f"{printable(self.path)}: is the checkpoint of another run: {why}. A run can be resumed only on the same data in"
            " the same order (no shuffling, or with a fixed seed); name another file, or delete it to start anew"
        )

    def to_array(self) -> Array:
        """For the checkpoint."""
        return np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, SIZE)
