"""A model file in, a copy with new statistics out: what `bnport calibrate` and `bnport convert --calibrate` do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport._lazy import np
from bnport.calibrate.checkpoint import delete
from bnport.calibrate.loading import check_config, load
from bnport.containers.files import check_output, replace_file
from bnport.errors import FormatError, MatchError, OutputError, listed, printable
from bnport.layer import Change
from bnport.record import BatchNorm

if TYPE_CHECKING:
    from bnport.calibrate.result import Calibration, LayerStatistics
    from bnport.layer import Layer


def calibrate_file(
    path: str | os.PathLike[str],
    data: Any,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    resume: str | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Calibration:
    """Calibrate the model in the file `path` (.keras, or an .h5 that holds a whole model) on `data`; write `out`.

    `out` is a copy of `path` in which only the selected layers' mean and variance (and, with renorm, what mirrors them)
    differ; it is read back and compared before it takes its name. `path` is never changed. `options` are those of
    calibrate(); the checkpoint is deleted when `out` stands. Raises what calibrate() and the Keras adapter raise,
    FormatError for a file that is not a whole model or holds code, MissingDependency without Keras, OutputError (also for
    an `out` or a checkpoint that is the model, one of the data files, or of another format than the model).
    """
    path, out = os.fspath(path), os.fspath(out)
    inputs = [path, *data_files(data, out)]
    check_files(out, force, inputs, resume)
    from bnport.calibrate.run import calibrate

    version = check_config(path)
    adapters.check_suffix(out, path, strict=True)  # Keras opens it, and goes by the suffix
    held = adapters.read(path, format="keras")  # strict about the file, before Keras reads it its own way
    model = load(path, version)
    result = calibrate(model, data, resume=resume, keep_checkpoint=True, **options)
    gone = [layer.name for layer in result.layers if layer.name not in held]
    if gone:
        raise MatchError(
            f"{printable(path)}: the loaded model calls a layer {listed(gone, 3)}; the file has {listed(held, 3)}"
        )
    changes = {layer.name: _change(held[layer.name], layer) for layer in result.layers}
    adapter = adapters.load("keras")

    def check(temporary: str) -> None:
        after = adapters.read(temporary, format="keras")
        for name, change in changes.items():
            for field in ("mean", "variance"):
                if not np.array_equal(after[name].arrays()[field], getattr(change.record, field)):
                    raise FormatError(
                        f"{printable(out)}: the {field} of {printable(name)} did not read back as written"
                    )

    replace_file(out, lambda new: adapter.write(path, changes, new), check, force=force, inputs=inputs)
    if not keep_checkpoint:
        delete(resume)
    return result


def data_files(data: Any, out: str) -> list[str]:
    """The files that data are read from, as far as `out` could be one of them: it is there, or they are few."""
    if not isinstance(data, str | os.PathLike):
        mapped = getattr(data, "filename", None)  # of a numpy.memmap
        return [os.fspath(mapped)] if isinstance(mapped, str | os.PathLike) else []
    path = os.fspath(data)
    if not os.path.isdir(path):
        return [path]
    if not os.path.lexists(out):  # a new file in a folder of data replaces none
        return []
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


def check_files(out: str, force: bool, inputs: list[str], resume: str | None) -> None:
    """Refuse an output or a checkpoint that would replace a file that is read, or each other."""
    check_output(out, force=force, inputs=inputs)
    if resume is not None:
        check_output(resume, force=True, inputs=inputs)
        if os.path.realpath(resume) == os.path.realpath(out):
            raise OutputError(f"{printable(out)}: is the file for checkpoints as well; choose another output")


def _change(layer: Layer, new: LayerStatistics) -> Change:
    arrays = {field: array for field, array in layer.arrays().items() if field in ("gamma", "beta")}
    record = BatchNorm(**arrays, mean=new.mean, variance=new.variance, epsilon=layer.epsilon).rounded(layer.dtype)
    return Change(record, frozenset({"mean", "variance"}))
