"""Mean and variance from data: what a model's BatchNorm layers should hold, and what a folder of images has.

The package is also the function: bnport.calibrate(model, data, ...) is bnport.calibrate.run.calibrate.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnport.calibrate.result import Calibration

_HOMES = {  # name -> module of this package, imported at the first use
    "calibrate": "run",
    "calibrate_file": "file",
    "Calibration": "result",
    "LayerStatistics": "result",
    "Moments": "moments",
    "image_statistics": "images",
    "map_blocks": "executors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Callable(types.ModuleType):
    def __call__(self, model: Any, data: Any, **options: Any) -> Calibration:
        """See bnport.calibrate.run.calibrate."""
        from bnport.calibrate.run import calibrate

        return calibrate(model, data, **options)


sys.modules[__name__].__class__ = _Callable
