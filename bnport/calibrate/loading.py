"""A live Keras model from a file, without running code of the file's own.

Unlike everything else that reads files here, this builds the model, with Keras, in safe mode. Before that its config is
looked through: Lambda layers and anything that is not Keras' own are refused, so that no code from a file runs (older
Keras versions do not keep to safe mode for .h5 files).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.errors import FormatError, InvalidValue, MissingDependency, first_line, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where the parts of a model come from. Not keras.utils or keras.saving: they download, unpack and load.
_KERAS = re.compile(
    r"(tf_)?keras(\.src)?(\.(layers|models|engine|activations|initializers|regularizers|constraints|ops|random"
    r"|optimizers|losses|metrics|dtype_policies|quantizers|distribution)(\.\w+)*)?"
)
# Operations that Keras 2 wrote as layers. Not tf.io, tf.py_function, tf.load_op_library and the like.
_TENSORFLOW = re.compile(
    r"(compat\.v1\.)?(math|nn|image|linalg|signal|random|bitwise|strings|__operators__)\.[\w.]+|\w*(add|sub|mul|div|pow|max|min)\w*"
    r"|cast|reshape|concat|stack|unstack|squeeze|expand_dims|transpose|pad|shape|split|slice|strided_slice|where|tile|gather"
    r"|one_hot|identity|clip_by_value|zeros|ones|fill|range|rank|size|convert_to_tensor|zeros_like|ones_like|abs|exp|sqrt"
    r"|square|tanh|sigmoid|round|sign|cos|sin|reverse|roll|repeat|meshgrid|cumsum|matmul|tensordot|einsum|norm|argsort|sort"
    r"|reduce_\w+|broadcast_to|stop_gradient|equal|not_equal|greater\w*|less\w*|logical_\w+|boolean_mask|ensure_shape"
)
_LARGEST_CONFIG = 64 << 20


def check_config(path: str) -> str:
    """The Keras version that wrote the file. FormatError unless it holds a whole model made of Keras' own parts only."""
    adapters.read_head(path)  # says what is wrong with a path
    config, version = _config(path)
    refused = sorted(set(_foreign(config)))
    if refused:
        raise FormatError(
            f"{printable(path)}: holds {listed(refused, 4)}, which this command does not run from a file; load the model"
            " yourself and call bnport.calibrate(model, data)"
        )
    return version


def load(path: str, version: str) -> Any:
    """The live model in a file, built by Keras 3, or by tf_keras where Keras 2 wrote it. Nothing is compiled."""
    keras = _import("tf_keras" if version.startswith("2.") else "keras", path, version)
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a builder of arbitrary configs raises
        raise FormatError(
            f"{printable(path)}: {keras.__name__} {keras.__version__} does not load it: {printable(first_line(error), 200)}"
        ) from error


def _import(package: str, path: str, version: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"{printable(path)}: was written by Keras {printable(version or 'of unknown version')}; running it needs the"
            f" package {package} ({printable(error, 80)}): pip install"
            f" {'tf_keras' if package == 'tf_keras' else repr('bnport[tensorflow]')}"
        ) from None


def _config(path: str) -> tuple[Any, str]:
    """The model's config and the Keras version that wrote it."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        return _zip_config(path) if is_zip else _h5_config(path)
    except (OSError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidValue | FormatError):
            raise
        raise FormatError(
            f"{printable(path)}: not a model that can be run here ({printable(error, 120)}); this takes a .keras file, or an"
            " .h5 file that holds a whole Keras model. Any other live Keras model: bnport.calibrate(model, data)"
        ) from None


def _zip_config(path: str) -> tuple[Any, str]:
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(path) as archive:
            texts = []
            for name in ("config.json", "metadata.json"):
                if archive.getinfo(name).file_size > _LARGEST_CONFIG:
                    raise FormatError(f"{printable(path)}: its {name} declares more than {_LARGEST_CONFIG} bytes")
                texts.append(json.loads(archive.read(name)))
    except BadZipFile as error:
        raise FormatError(f"{printable(path)}: {printable(error, 120)}") from None
    return texts[0], str(texts[1].get("keras_version", ""))


def _h5_config(path: str) -> tuple[Any, str]:
    import h5py

    with h5py.File(path, "r") as file:
        text = file.attrs.get("model_config")
        version = file.attrs.get("keras_version", "")
    if text is None:
        raise FormatError(
            f"{printable(path)}: holds weights but no model; build the model, load them, and call bnport.calibrate"
        )
    version = version.decode() if isinstance(version, bytes) else str(version)
    return json.loads(text), version


def _foreign(config: Any) -> Iterator[str]:
    """What in a config is code, reaches beyond computing, or needs classes that are not Keras' own."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        name, module = value.get("class_name"), value.get("module")
        if name in ("Lambda", "__lambda__") or value.get("function_type") == "lambda":
            yield "a Lambda layer"
        elif isinstance(name, str) and value.get("registered_name") and module is None:
            yield f"the custom class {printable(value['registered_name'])}"
        elif isinstance(name, str) and name.endswith("OpLambda"):
            inner = value.get("config")
            function = inner.get("function") if isinstance(inner, dict) else None
            if function is not None and not _TENSORFLOW.fullmatch(str(function)):
                yield f"a call of tf.{printable(function)}"
        if module is not None and not _KERAS.fullmatch(str(module)):
            yield f"{printable(name)} of the module {printable(module)}"
        waiting += [inner for key, inner in value.items() if key != "compile_config"]  # nothing is compiled
