"""What start-up does without: numpy until it is used (0.1 s), and the typing module (0.004 s of a listing's 0.025).

`TYPE_CHECKING`, `NamedTuple` and `Protocol` are typing's own to a type checker; the modules that `bnport show` runs
through take them from here.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
    from typing import Protocol as Protocol

    import numpy as np
else:

    class _Numpy:
        def __getattr__(self, name):
            import numpy

            value = getattr(numpy, name)
            setattr(self, name, value)  # the next use finds it at once
            return value

    np = _Numpy()

    class _NamedTupleMaker(type):
        """Turns a class body of annotated fields, defaults and methods into a collections.namedtuple with them."""

        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            from collections import namedtuple

            fields = body["__annotations__"]
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            for key, value in body.items():
                setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_NamedTupleMaker):
        pass

    class Protocol:
        pass


__all__ = ["TYPE_CHECKING", "NamedTuple", "Protocol", "np"]
