"""A model file in, a copy with new statistics out: what `bnport calibrate` and `bnport convert --calibrate` do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport._lazy import np
from bnport.calibrate.loading import check_config, load
from bnport.containers.files import check_output, replace_file
from bnport.errors import FormatError, MatchError, listed, printable
from bnport.layer import Change
from bnport.record import BatchNorm

if TYPE_CHECKING:
    from bnport.calibrate.result import Calibration, LayerStatistics
    from bnport.layer import Layer


def calibrate_file(
    path: str | os.PathLike[str], data: Any, out: str | os.PathLike[str], *, force: bool = False, **options: Any
) -> Calibration:
    """Calibrate the model in the file `path` (.keras, or an .h5 that holds a whole model) on `data`; write `out`.

    `out` is a copy of `path` in which only the selected layers' mean and variance (and, with renorm, what mirrors them)
    differ; it is read back and compared before it takes its name. `path` is never changed. `options` are those of
    calibrate(). Raises what calibrate() and the Keras adapter raise, FormatError for a file that is not a whole model
    or holds code, MissingDependency without Keras, OutputError.
    """
    path, out = os.fspath(path), os.fspath(out)
    check_output(out, force=force, inputs=[path])
    from bnport.calibrate.run import calibrate

    version = check_config(path)
    held = adapters.read(path, format="keras")  # strict about the file, before Keras reads it its own way
    model = load(path, version)
    result = calibrate(model, data, **options)
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

    replace_file(out, lambda new: adapter.write(path, changes, new), check, force=force, inputs=[path])
    return result


def _change(layer: Layer, new: LayerStatistics) -> Change:
    arrays = {field: array for field, array in layer.arrays().items() if field in ("gamma", "beta")}
    record = BatchNorm(**arrays, mean=new.mean, variance=new.variance, epsilon=layer.epsilon).rounded(layer.dtype)
    return Change(record, frozenset({"mean", "variance"}))
