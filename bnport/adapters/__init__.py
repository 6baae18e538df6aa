"""One module per framework: its conventions and nothing else. Adapters are discovered from this package; there is no list.

An adapter is a module (or package) `bnport.adapters.<name>` whose docstring is its mapping table (theirs, ours, note)
and that defines what `Adapter` below says. It never imports another adapter, and imports its framework only inside
functions that were handed a live object of it, or that run it.
"""

from __future__ import annotations

import gc
import os

from bnport._lazy import TYPE_CHECKING, Protocol
from bnport.containers import looks_like
from bnport.errors import BnportError, FormatError, InvalidValue, NotFound, OutputError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from bnport.containers.patch import Patch
    from bnport.layer import Change, Layers

HEAD_BYTES = 4096


class Adapter(Protocol):
    """What an adapter module defines; all but `recognise` and `read` may be missing where they make no sense."""

    __name__: str
    SUFFIXES: tuple[str, ...]  # ".pth", ...: file names it reads; several adapters may share one
    PACKAGES: tuple[str, ...]  # top-level packages of the live objects it reads: ("torch",)

    def recognise(self, head: bytes, path: str) -> bool:
        """Whether the first HEAD_BYTES of the file at `path` are this format. May open `path` again if that is cheap."""

    def read(self, source: Any, **options: Any) -> Layers:
        """The BatchNorm layers of a path (str) or live object, lazily. Options are keyword-only, with defaults.

        Raises FormatError (naming file and tensor) for what is not understood; returns empty Layers, with notes that
        say why if it is known, where there is no BatchNorm.
        """

    def write(self, target: str, changes: Mapping[str, Change], out: str, **options: Any) -> None:
        """Make, at the new path `out`, a copy of the file `target` with the changes; all else stays byte for byte.

        An adapter whose Layers carry what it has `opened` takes that as an option of this name, here and in `patches`.
        """

    def patches(self, target: str, changes: Mapping[str, Change], **options: Any) -> list[Patch]:
        """The changes as bytes at offsets of the file `target`, for changing it in place.

        Raises InvalidValue where the file would have to become longer or be rewritten.
        """

    def read_back(self, model: Any) -> Layers:
        """`read` of a live object that was just written to, without what only pairing wants."""

    def apply(self, model: Any, changes: Mapping[str, Change], **options: Any) -> None:
        """Write the changes into a live object: all, or on any error none."""

    def run(self, source: Any, layer: str, x: Any, **options: Any) -> dict[str, Any]:
        """Put x of shape (N, C) through one layer of a path or live object by the real engine, at inference.

        Returns how it was called -> output of shape (N, C): {"model(x)": ..., "predict": ...}. Raises MissingDependency
        without the framework. The source is left as it was.
        """


def names() -> list[str]:
    """The adapters that exist, by listing this package's folder."""
    found = {entry.split(".")[0] for entry in os.listdir(os.path.dirname(__file__)) if not entry.startswith("_")}
    return sorted(found)


def load(name: str) -> Adapter:
    """The adapter module called `name`. Raises NotFound that lists the formats there are."""
    import importlib

    if name not in names():
        raise NotFound(f"no format {printable(name)!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def find(source: Any) -> Adapter:
    """The adapter of a path or of a live object. Never imports a framework to find out.

    A path is asked of the adapters that share its suffix, by its first bytes; then of all others. A live object
    belongs to the adapter that names the top-level package of its class or of one of its bases.
    """
    if isinstance(source, str | os.PathLike):
        return _of_file(os.fspath(source))
    packages = {base.__module__.split(".")[0] for base in type(source).__mro__}
    for name in names():
        adapter = load(name)
        if packages & set(adapter.PACKAGES):
            return adapter
    if isinstance(source, dict):
        return load("torch")  # a state dict is a plain dict of tensors
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    raise NotFound(f"no format reads a {printable(kind)} object; there are {', '.join(names())}")


def _of_file(path: str) -> Adapter:
    head = read_head(path)
    if head.startswith(b"\xff\xff"):
        _refuse_half_changed(head, path)
    suffix = os.path.splitext(path)[1].lower()
    others = []
    for name in sorted(names(), key=lambda name: not _mentions(name, suffix)):
        adapter = load(name)
        if suffix in adapter.SUFFIXES and adapter.recognise(head, path):
            return adapter
        others.append(adapter)
    for adapter in others:
        if suffix not in adapter.SUFFIXES and adapter.recognise(head, path):
            return adapter
    known = sorted({s for a in others for s in a.SUFFIXES})
    what = looks_like(head) or f"its first bytes are {head[:8]!r}"
    if not head:
        what = "a folder" if os.path.isdir(path) else "an empty file"
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        what = "a folder, a TensorFlow SavedModel: load it and save the model as .keras"
    raise FormatError(f"{printable(path)}: not a model file that bnport reads ({what}); it reads {', '.join(known)}")


_TWO_PARTS = (".weights.h5", ".caffemodel.h5", ".weights.json")
_ALIKE = ({".pth", ".pt", ".bin", ".ckpt", ".tar", ".jit"}, {".h5", ".hdf5"})  # told apart by their contents


def check_suffix(out: str, target: str, *, source: str = "", strict: bool = False) -> None:
    """Refuse an output named as another kind of file than the target, of which it is a copy: nothing would open it.

    A suffix that no format has is the user's own business, on either side; where it is known who opens the output, and
    that this goes by the suffix, `strict` refuses an `out` without the target's. `source`: to see whether
    the two were named the wrong way round. Raises OutputError.
    """
    kind, wanted = _suffix(out), _suffix(target)
    if kind == wanted or any({kind, wanted} <= group for group in _ALIKE):
        return
    known = {*_TWO_PARTS, *(suffix for name in names() for suffix in load(name).SUFFIXES)}
    if wanted in known and (strict or kind in known):
        other = f", and what opens a {kind} file does not open that" if kind in known else ""
        turned = source and _suffix(source) == kind
        ask = f". Or are the two the wrong way round? {printable(target)} was named as the target" if turned else ""
        raise OutputError(
            f"{printable(out)}: will be a {wanted} file, as {printable(target)} is{other}; let its name end in {wanted}{ask}"
        )


def _suffix(path: str) -> str:
    name = os.path.basename(path).lower()
    return next((two for two in _TWO_PARTS if name.endswith(two)), os.path.splitext(name)[1])


def _refuse_half_changed(head: bytes, path: str) -> None:
    from bnport.containers.in_place import is_sealed

    if is_sealed(head):
        raise FormatError(
            f"{printable(path)}: was being changed in place when bnport was stopped; 'bnport restore {printable(path)}' puts"
            " its old contents back"
        )


def _mentions(name: str, suffix: str) -> bool:
    """Whether an adapter's source names a suffix: those are loaded first, so that the others often need not be."""
    folder = os.path.dirname(__file__)
    for path in (os.path.join(folder, name, "__init__.py"), os.path.join(folder, f"{name}.py")):
        try:
            with open(path, "rb") as file:
                return f'"{suffix}"'.encode() in file.read()
        except OSError:
            continue
    return True


def read_head(path: str) -> bytes:
    """The first HEAD_BYTES of a regular file (or b"" for a directory); anything else is refused."""
    import stat

    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # as in ReadFile
        raise NotFound(f"{printable(path)}: no such file" if path else "a file's name is empty") from None
    except OSError as error:
        raise FormatError(f"{printable(path)}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return b""
    if not stat.S_ISREG(mode):
        raise FormatError(f"{printable(path)}: not a regular file")
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise FormatError(f"{printable(path)}: {error.strerror}") from None


def read(source: Any, *, epsilon: float | None = None, format: str | None = None, **options: Any) -> Layers:
    """The BatchNorm layers of a file or live object.

    `epsilon` replaces one that the source does not hold (it is then no longer assumed); a source that holds its own
    refuses it. `format` names the adapter instead of finding it. Other options go to the adapter; one that it does not
    know is refused.

    Returns Layers: name -> Layer, in the source's order; empty, with notes, where there is no BatchNorm. The numbers of a
    layer are read when its `record` is asked for. Raises FormatError for a file that is not understood, NotFound where
    no adapter reads it, InvalidValue for an option or value that cannot be, Question where the source is ambiguous.
    """
    from bnport.layer import Layers

    if isinstance(source, Layers):  # read already
        return source
    try:
        return _read(source, epsilon, format, options)
    except FormatError as error:
        from bnport.containers.in_place import UNDO

        path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        if not os.path.lexists(path + UNDO) or "bnport restore" in str(error):
            raise
        raise FormatError(
            f"{error}; it was being changed in place when bnport was stopped: 'bnport restore {printable(path)}' puts its old"
            " contents back"
        ) from error


def _read(source: Any, epsilon: float | None, format: str | None, options: Mapping[str, Any]) -> Layers:
    adapter = load(format) if format else find(source)
    known = adapter.read.__kwdefaults__ or {}
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(known))
    if unknown:
        name = adapter.__name__.rsplit(".", 1)[-1]
        takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        raise InvalidValue(f"the {name} format has no option {listed(unknown)}; {takes}")
    if epsilon is not None and "epsilon" in known:
        given["epsilon"] = epsilon  # where other fields depend on it
    collecting = gc.isenabled()
    gc.disable()  # a reader only makes objects; the collector would look at each of them many times
    try:
        layers = adapter.read(os.fspath(source) if isinstance(source, os.PathLike) else source, **given)
    except FormatError as error:
        if not format or not isinstance(source, str | os.PathLike):
            raise
        head = read_head(os.fspath(source))
        what = looks_like(head)
        if not what or adapter.recognise(head, os.fspath(source)):
            raise
        raise FormatError(f"{error}; by its first bytes it is {what}") from None
    finally:
        if collecting:
            gc.enable()
    if epsilon is not None:
        held = [layer.name for layer in layers.values() if "epsilon" not in layer.assumed and not layer.question]
        if held:
            raise InvalidValue(
                f"{layers.source} holds the epsilon of {len(held)} layers itself ({listed(held, 3)}); --epsilon is for"
                " sources that do not"
            )
        for name, layer in layers.items():
            layers[name] = layer.but(epsilon=epsilon, assumed=layer.assumed - {"epsilon"}, question="")
    return layers


def checked(options: Any, name: str) -> Mapping[str, Any]:
    """Options for `read`, the argument called `name`; InvalidValue unless they are a mapping of names to values, or None."""
    from collections.abc import Mapping

    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise InvalidValue(f"{name}: expected a mapping of names to values, got {printable(repr(options), 60)}")
    if "epsilon" in options:
        raise InvalidValue(f"{name}: epsilon is none of them; say {'target_' * name.startswith('target')}epsilon=")
    return options


def read_some(source: Any, **options: Any) -> Layers:
    """`read`, but NotFound where there is no BatchNorm at all, with what the adapter knows of why."""
    layers = read(source, **options)
    if not layers:
        why = f" {' '.join(layers.notes)}" if layers.notes else ""
        raise NotFound(f"no BatchNorm found in {layers.source} ({layers.format}).{why}")
    return layers


def read_target(target: Any, **options: Any) -> Layers:
    """`read_some` of the second of two models: what an error says to answer with is said as the target's own option."""
    import re

    try:
        return read_some(target, **options)
    except BnportError as error:
        said = re.sub(r"--(absent|key|stat|blob-order|prototxt) (?=\S)", r"--target-option \1=", str(error))
        said = said.replace("--epsilon", "--target-epsilon")
        if said == str(error):
            raise
        raise type(error)(said) from None
