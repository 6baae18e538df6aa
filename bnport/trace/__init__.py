"""Two whole networks, one input: where do they part, and is it a BatchNorm layer or something before it?

Both networks run in their own frameworks. At every call of every paired BatchNorm layer two questions are asked:

- does this layer differ: is what came out of B's layer, for what went into it, within the derived bound of A's formula?
- did its input already differ: root-mean-square of the difference over that of A's input. Between BatchNorm layers lie
  convolutions, whose rounding has no bound that is derived here; how much it matters is measured instead: A runs once
  more on an input that is rounded once more, and 32 times what that changes, at this layer, counts as a difference.
"""

from __future__ import annotations

import os
from numbers import Real
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport._lazy import np
from bnport.convert import pair
from bnport.errors import BnportError, InvalidValue, first_line, printable
from bnport.trace.comparison import Comparison
from bnport.trace.layout import channels_first, oriented
from bnport.trace.result import Own, Step, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.record import Array
    from bnport.trace.layout import Form

__all__ = ["Own", "Step", "Trace", "trace"]


def trace(
    a: Any,
    b: Any,
    x: Any,
    *,
    layout: str | None = None,
    tolerance: float | None = None,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trace:
    """Run two whole networks on one input and say where they part.

    a is the original, b the port: live torch or Keras models, ONNX models or .onnx paths. x: an array (N, ...); layout,
    such as "NCHW" or "NHWC", says where its channels are if its shape does not, and each network gets it as it needs it.
    tolerance: the relative difference of a layer's inputs, or of the outputs, that counts; without it, 32 times (8 times
    where 16-bit floats are involved) what one rounding of the input does to A there. map, skip, only_under: as for
    `bnport.convert`. progress: called as progress(done, total, what). The models are left as they were.

    Raises InvalidValue for a tolerance that is no finite number >= 0, an input or a model that cannot be run, NaN, infinity
    or no values at all in the input or in what A makes of it, and where no tolerance can be measured; Question where the
    layout decides and is not given.
    """
    tolerance = _checked(tolerance)
    x = np.asarray(x)
    if not x.size:
        what = "samples without values" if x.shape[0] else "no samples at all"
        raise InvalidValue(f"the input has shape {x.shape}: {what}, nothing that could differ")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InvalidValue("the input holds NaN or infinity, which no comparison survives")
    sides = [(model, adapters.find(model)) for model in (a, b)]
    for model, adapter in sides:
        if not hasattr(adapter, "tap"):
            kind = adapter.__name__.rsplit(".", 1)[-1]
            raise InvalidValue(f"a whole {kind} model cannot be run here; torch, Keras and ONNX models can")
        if isinstance(model, str | os.PathLike) and "onnx" not in adapter.PACKAGES:
            why = "no network is run from a file of this kind"
            if hasattr(adapter, "is_script") and adapter.is_script(os.fspath(model)):
                why = "this file is TorchScript, which takes no hooks, so give the Python module that it was made from"
            raise InvalidValue(
                f"{printable(model)}: give the live model (on the command line, FILE.py:FUNCTION that returns it); {why}"
            )
    forms: list[Form] = [adapter.input_form(m) for m, adapter in sides]  # type: ignore[attr-defined]
    first = channels_first(x, layout, forms)
    layers_a, layers_b = (adapters.read_some(model) for model, _ in sides)
    match = pair(layers_a, layers_b, map=map, skip=skip, only_under=only_under)
    comparison = Comparison(layers_a, layers_b, match.pairs, tolerance, progress)
    (_, adapter_a), (_, adapter_b) = sides
    xs = [oriented(x, first, *form) for form in forms]
    outputs_a = _tapped(adapter_a, a, xs[0], comparison.of_a, layers_a.source)
    comparison.check_a(outputs_a)
    outputs_b = _tapped(adapter_b, b, xs[1], comparison.of_b, layers_b.source)
    for (model, adapter), own, outputs in zip(sides, xs, (outputs_a, outputs_b), strict=True):
        if hasattr(adapter, "compiled_outputs"):
            comparison.compiled(model is b, outputs, adapter.compiled_outputs(model, own))
    shaken = []
    if tolerance is None:
        shaken = _tapped(adapter_a, a, _shaken(xs[0], comparison.ulp), comparison.of_shaken_a, layers_a.source)
    return comparison.result(outputs_a, outputs_b, shaken)


def _checked(tolerance: object) -> float | None:
    """`tolerance` as a finite float >= 0, or None; of anything else every difference or none would pass."""
    if tolerance is None:
        return None
    try:
        value = float(tolerance) if isinstance(tolerance, Real) and not isinstance(tolerance, bool) else -1.0
    except OverflowError:  # an integer
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidValue(f"tolerance: expected a finite number >= 0, got {printable(repr(tolerance), 60)}")
    return value


def _tapped(
    adapter: Any, model: Any, x: Array, each: Callable[[str, Array, Array, str], None], name: str
) -> list[Array]:
    """The adapter's tap; whatever a framework raises becomes one line."""
    try:
        outputs: list[Array] = adapter.tap(model, x, each)
    except BnportError:
        raise
    except Exception as error:
        said = printable(first_line(error))
        raise InvalidValue(
            f"{printable(name)}: cannot run on an input of shape {x.shape}: {type(error).__name__}: {said}"
        ) from error
    return outputs


def _shaken(x: Array, ulp: float) -> Array:
    """x with every value moved by one unit in the last place of the networks' type, up or down."""
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), x.shape)
    return (x * (1 + ulp * signs)).astype(x.dtype)
