"""bnport: move BatchNorm parameters between deep-learning frameworks, and prove the result.

    import bnport

    report = bnport.convert("resnet50.pth", "resnet50.keras", "ported.keras")
    print(report)                                    # layer by layer: exact, or within a bound that is shown

    bnport.set_weights(layer, gamma=..., beta=..., mean=..., variance=...)      # any subset, on one live layer

Importing this imports no framework, and no numpy before it is needed.
"""

from __future__ import annotations

from bnport.adapters import read
from bnport.convert import convert, save_records, verify
from bnport.layer import Layer, Layers
from bnport.record import BatchNorm

__version__ = "0.1.0"

__all__ = ["BatchNorm", "Layer", "Layers", "convert", "read", "save_records", "verify"]
