"""`bnport trace`."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from bnport.cli import common

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

HELP = "Run two whole networks on one input and say where they part: a BatchNorm layer, or something before it?"

EPILOG = """examples:
  bnport trace model.onnx ported.keras --input image.npy
  bnport trace models.py:original models.py:ported --input batch.npy --layout NCHW
  bnport trace mypackage.nets:resnet50 ported.keras --input image.npy --map pairs.toml

A and B are networks that can run:
  model.onnx        run by onnxruntime
  model.keras       loaded by keras.saving.load_model in safe mode (a Lambda layer is refused)
  file.py:function  or package.module:function: your own code is imported, and the function, called without arguments,
                    returns a torch or Keras model. This is the one place where bnport runs code, and it is yours.
                    What it prints goes to standard error.
Weights alone (.pth, .weights.h5) are no network: load them in such a function. TorchScript takes no hooks: let the
function return the Python module that it was made from.

x.npy is an array (N, ...); each network gets its channels where it wants them. Exit code 0 the networks agree, 1 they
part, 2 could not run."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("a", metavar="A", help="the original network")
    parser.add_argument("b", metavar="B", help="the port")
    parser.add_argument("--input", metavar="X.NPY", required=True, help="the input, an array saved by numpy.save")
    parser.add_argument(
        "--layout", metavar="LAYOUT", help="where its channels are, if its shape does not say: NCHW, NHWC"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="relative difference that counts, 0 or more (default: measured, 32 times what rounding the input once does to A)",
    )
    common.add_json(parser)
    common.add_pairing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Trace, print, and say whether the networks agree."""
    from bnport.errors import InvalidValue, printable
    from bnport.trace import trace

    x = _array(args.input)
    options = common.pairing_options(args)
    if options.pop("target_epsilon") is not None or options.pop("target_options"):
        raise InvalidValue("--target-epsilon, --target-option: live networks hold their own numbers")
    try:
        with common.Progress(args.json) as progress, _printing_to_stderr():
            result = trace(
                _model(args.a),
                _model(args.b),
                x,
                layout=args.layout,
                tolerance=args.tolerance,
                progress=progress,
                **options,
            )
    except SystemExit as error:
        models = f"{printable(args.a)} or {printable(args.b)}"
        raise InvalidValue(
            f"the network of {models} ends the program when it runs: SystemExit: {printable(error)}"
        ) from error
    if args.json:
        common.print_json(result.to_dict())
    else:
        common.say(result)
    return 0 if result.ok else 1


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Standard output is the report's: what the user's code prints meanwhile, or a program it starts, goes to stderr."""
    common.flush_output()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        try:
            common.flush_output()  # what found its way into it all the same
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _array(path: str) -> Any:
    import numpy as np

    from bnport.containers.files import ReadFile
    from bnport.errors import FormatError, printable

    ReadFile(path).close()  # refuses what is no regular file: of a pipe np.load waits for ever
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{printable(path)}: not an array of numpy.save: {printable(error)}") from None
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu" or x.ndim < 2:
        raise FormatError(f"{printable(path)}: one array of numbers of shape (N, ...) is expected")
    return x.astype(np.float32) if x.dtype.kind in "iu" else x


def _model(text: str) -> Any:
    """The network that a command-line argument names: a live model, or the path of one that can run."""
    from bnport import adapters
    from bnport.errors import InvalidValue, NotFound, printable

    place, colon, function = text.rpartition(":")
    if colon and function.isidentifier() and not os.path.exists(text):
        return _called(text, place, function)
    adapter = adapters.find(text)
    if hasattr(adapter, "load_model"):
        if not text.endswith(".keras"):
            raise InvalidValue(
                f"{printable(text)}: weights are no network; give FILE.py:FUNCTION that loads them into one"
            )
        return adapter.load_model(text)
    if not hasattr(adapter, "tap"):
        raise NotFound(f"{printable(text)}: no network that bnport can run; see 'bnport trace --help'")
    return text


def _called(text: str, place: str, function: str) -> Any:
    """Import the user's own module or file, and call the function they named."""
    import importlib
    import importlib.util

    from bnport import adapters
    from bnport.errors import BnportError, InvalidValue, NotFound, printable

    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
            if spec is None or spec.loader is None or not os.path.exists(place):
                raise NotFound(f"{printable(place)}: no such file")
            folder = os.path.dirname(os.path.abspath(place))
            if folder not in sys.path:
                sys.path.insert(0, folder)  # what it imports from beside itself
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
        model = getattr(module, function)()
    except BnportError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidValue(f"{printable(text)}: {type(error).__name__}: {printable(error)}") from error
    try:
        adapters.find(model)
    except BnportError as error:
        raise type(error)(f"what {printable(text)} returns: {error}") from None
    return model
