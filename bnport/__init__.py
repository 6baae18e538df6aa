"""bnport: move BatchNorm parameters between deep-learning frameworks, and prove the result.

    import bnport

    report = bnport.convert("resnet50.pth", "resnet50.keras", "ported.keras")
    print(report)                                    # layer by layer: exact, or within a bound that is shown

    bnport.set_weights(layer, gamma=..., beta=..., mean=..., variance=...)      # any subset, on one live layer

Importing this imports no framework, and no numpy before it is needed.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # as typing.TYPE_CHECKING is, without importing it

if TYPE_CHECKING:
    from bnport.adapters import read
    from bnport.assign import set_weights
    from bnport.calibrate.images import image_statistics
    from bnport.calibrate.run import calibrate
    from bnport.convert import convert, save_records, verify
    from bnport.diagnosis import explain
    from bnport.layer import Layer, Layers
    from bnport.record import BatchNorm
    from bnport.trace import trace

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Layer",
    "Layers",
    "calibrate",
    "convert",
    "explain",
    "image_statistics",
    "read",
    "save_records",
    "set_weights",
    "trace",
    "verify",
]

_HOMES = {
    "BatchNorm": "record",
    "Layer": "layer",
    "Layers": "layer",
    "calibrate": "calibrate",
    "convert": "convert",
    "explain": "diagnosis",
    "image_statistics": "calibrate",
    "read": "adapters",
    "save_records": "convert",
    "set_weights": "assign",
    "trace": "trace",
    "verify": "convert",
}


class _Package(ModuleType):
    """Brings a public name in at its first use (eager imports would double the time of `bnport show`).

    Some functions are called as the module they live in (`bnport.convert`): the import system then binds the module
    under that name, and that is ignored.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'bnport' has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(f"bnport.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
