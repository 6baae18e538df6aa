"""What a model takes: its inputs' names, shapes, and the structure that it was built with.

Keras 3 names an input that was given no name twice, its layer input_layer and its tensor keras_tensor; asks for both in a
dict when a functional model of a list is called; and keeps only the first in a file. Data may use either name here, and the
model is handed the structure that it was built with, which it takes by every name and in every version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.errors import listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, TypeAlias

    Shape: TypeAlias = tuple[int | None, ...]


class Inputs(dict[str, "Shape"]):
    """The inputs of a model: name -> shape with None for what is free, (None, 224, 224, 3), in the model's order.

    others: other names for the same, in the same order; or none.
    form:   what the model is called with, with names in place of arrays; None: not known, and data stay as they come.
    """

    def __init__(self, shapes: Mapping[str, Shape], others: Iterable[str] = (), form: Any = None) -> None:
        super().__init__(shapes)
        self.others, self.form = list(others), form

    @property
    def shown(self) -> str:
        """What the model takes, for a message."""
        return printable(repr(self.form), 300) if self._deep else listed(self)

    @property
    def _deep(self) -> bool:
        """Whether there are inputs within inputs."""
        parts = self.form.values() if isinstance(self.form, dict) else self.form
        return isinstance(self.form, dict | list | tuple) and not all(isinstance(part, str) for part in parts)

    @property
    def in_order(self) -> bool:
        """Whether a plain list can mean one thing only: Keras sorts the names of a dict, whoever built it may not have."""
        return _sorted(self.form)

    def names_in(self, found: Iterable[str]) -> list[str] | None:
        """What these inputs are called among the names `found`, in their order; None if they are not all there."""
        there = set(found)
        return next((names for names in (list(self), self.others) if names and there.issuperset(names)), None)

    def flat(self, values: Any) -> dict[str, Any] | None:
        """name -> value of values in a structure with inputs within inputs, the model's own; None for any other."""
        found: dict[str, Any] = {}
        return found if self._deep and _take(self.form, values, found) else None

    def packed(self, batch: Any) -> Any:
        """A batch (a dict by name, a list in order, or the array of a single input) in the structure that the model takes."""
        one = not isinstance(batch, dict | list)
        if self.form is None or (one and not isinstance(self.form, dict)):
            return batch
        named = batch if isinstance(batch, dict) else dict(zip(self, [batch] if one else batch, strict=True))
        return _filled(self.form, named)


def _sorted(form: Any) -> bool:
    if isinstance(form, dict):
        return list(form) == sorted(form) and all(map(_sorted, form.values()))
    return not isinstance(form, list | tuple) or all(map(_sorted, form))


def _take(form: Any, values: Any, found: dict[str, Any]) -> bool:
    """Put values into `found` by name; whether they are in the structure of `form`."""
    if isinstance(form, dict):
        return (
            isinstance(values, dict)
            and set(values) == set(form)
            and all(_take(form[k], values[k], found) for k in form)
        )
    if isinstance(form, list | tuple):
        if not isinstance(values, list | tuple) or len(values) != len(form):
            return False
        return all(_take(part, value, found) for part, value in zip(form, values, strict=True))
    found[form] = values
    return not isinstance(values, dict | list | tuple)


def _filled(form: Any, values: dict[str, Any]) -> Any:
    if isinstance(form, dict):
        return {key: _filled(part, values) for key, part in form.items()}
    if isinstance(form, list):
        return [_filled(part, values) for part in form]
    return tuple(_filled(part, values) for part in form) if isinstance(form, tuple) else values[form]
