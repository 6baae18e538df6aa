"""Where the channels of an input are, and how each network wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from bnport._lazy import np
from bnport.errors import InvalidValue, Question, printable

if TYPE_CHECKING:
    from bnport.record import Array

Form: TypeAlias = "tuple[bool, tuple[int | None, ...] | None]"  # channels first?, the declared shape if there is one


def channels_first(x: Array, layout: str | None, forms: list[Form]) -> bool:
    """Whether x is (N, C, ...), from `layout`, from its shape, or from what a model declares."""
    if layout is not None:
        word = layout.upper()
        if len(word) != x.ndim or word[0] != "N" or word.count("C") != 1 or "C" not in (word[1], word[-1]):
            raise InvalidValue(
                f"layout {printable(layout)!r} does not fit an input of shape {x.shape}; e.g. NCHW, NHWC"
            )
        return bool(word[1] == "C")
    if x.ndim < 3:
        return False
    few = [x.shape[1] <= 4, x.shape[-1] <= 4]
    if few[0] != few[1]:
        return bool(few[0])
    for wants_first, declared in forms:
        if declared is not None and _fits(x.shape, declared) != _fits(_moved(x, wants_first).shape, declared):
            fits = _fits(x.shape, declared)
            return wants_first == fits
    raise Question(
        f"input of shape {x.shape}: its channels may come first or last; say which with layout (--layout): NCHW or NHWC"
    )


def _moved(x: Array, was_first: bool) -> Array:
    """The channels moved from the front to the end, or back."""
    return np.moveaxis(x, 1, -1) if was_first else np.moveaxis(x, -1, 1)


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    sides = zip(shape[1:], declared[1:], strict=False)
    return len(shape) == len(declared) and all(side == wanted or wanted is None for side, wanted in sides)


def oriented(x: Array, first: bool, wants_first: bool, declared: tuple[int | None, ...] | None) -> Array:
    """x as a model takes it: as its declared shape says, otherwise by its framework's convention."""
    if x.ndim < 3:
        return x
    moved = _moved(x, first)
    if declared is not None and _fits(x.shape, declared) != _fits(moved.shape, declared):
        return x if _fits(x.shape, declared) else np.ascontiguousarray(moved)
    return x if first == wants_first else np.ascontiguousarray(moved)
