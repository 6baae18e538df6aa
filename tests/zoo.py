"""torchvision and timm beside a CPU-only torch: their compiled operators are declared, and never called.

`from tests.zoo import torchvision, timm`
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import torch

try:
    import torchvision
except RuntimeError:  # its operators were built for another torch; importing it needs only that they have a schema
    _file = os.path.join(os.path.dirname(importlib.util.find_spec("torchvision").origin), "_meta_registrations.py")
    with open(_file, encoding="utf-8") as _source:
        _names = re.findall(r'register_fake\("torchvision::(\w+)"\)', _source.read())
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in _names:
        _declared.define(f"{_name}() -> ()")
    for _name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[_name]
    import torchvision

import timm

__all__ = ["timm", "torchvision"]
