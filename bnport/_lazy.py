"""numpy, imported at its first use: `bnport --help` and a listing of layers never pay its 0.1 s."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
else:

    class _Numpy:
        def __getattr__(self, name):
            import numpy

            value = getattr(numpy, name)
            setattr(self, name, value)  # the next use finds it at once
            return value

    np = _Numpy()

__all__ = ["np"]
