"""The same bits whoever computed what: values merged in one fixed binary tree over the numbers of their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from bnport._lazy import np
from bnport.errors import FormatError, InvalidValue

if TYPE_CHECKING:
    from bnport.record import Array


class Mergeable(Protocol):
    """n numbers per channel, and how two of them become one: `other` follows `self` in the order of the blocks."""

    n: int

    @property
    def channels(self) -> int:
        """C."""
        ...

    def merge(self, other: Any) -> Any:
        """Both together."""
        ...

    def to_bytes(self) -> bytes:
        """Its image; the type's `from_bytes` reads it."""
        ...


Value = TypeVar("Value", bound=Mergeable)


class FixedTree(Generic[Value]):
    """Merges blocks in the order of their numbers, as one fixed binary tree, holding log2(blocks) values at a time.

    Blocks 0 and 1, 2 and 3, ... merge; then those pairs; and so on, like a binary counter; what is left over at the end
    is folded from the last to the first. The shape depends on the number of blocks only, so that the result has the same
    bits however the blocks were computed. Picklable: a checkpoint resumes to the same bits.

    kind: the type of the values, set by a subclass.
    """

    __slots__ = ("_waiting", "blocks")

    kind: Any

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Value]] = []  # (level, value), the level falling
        self.blocks = 0

    def add(self, block: Value, level: int = 0) -> None:
        """The next block in order; or the next 2**level of them, merged elsewhere, if `blocks` is a multiple of that."""
        if self.blocks % (1 << level):
            raise InvalidValue(f"{1 << level} blocks at once must start at a multiple of that, not at {self.blocks}")
        self.blocks += 1 << level
        while self._waiting and self._waiting[-1][0] == level:
            block = self._waiting.pop()[1].merge(block)
            level += 1
        self._waiting.append((level, block))

    @property
    def n(self) -> int:
        """How many numbers per channel have been added."""
        return sum(value.n for _, value in self._waiting)

    def result(self) -> Value:
        """All blocks so far, merged; more may be added afterwards. InvalidValue if there were none."""
        if not self._waiting:
            raise InvalidValue("no data: there is nothing to take a mean of")
        merged = self._waiting[-1][1]
        for _, value in reversed(self._waiting[:-1]):
            merged = value.merge(merged)
        return merged

    def to_arrays(self) -> dict[str, Array]:
        """The state as plain arrays, for a checkpoint (.npz); `from_arrays` takes them back to the same bits."""
        levels = np.array([level for level, _ in self._waiting], np.int64)
        stored = [np.frombuffer(value.to_bytes(), np.uint8) for _, value in self._waiting]
        shape = (len(stored), len(stored[0]) if stored else 0)
        return {"blocks": np.array(self.blocks), "levels": levels, "values": np.array(stored, np.uint8).reshape(shape)}

    @classmethod
    def from_arrays(cls, arrays: Any) -> Any:
        """The state that `to_arrays` gave. FormatError if it is damaged."""
        tree = cls()
        try:
            levels, values = arrays["levels"].tolist(), arrays["values"]
            tree.blocks = int(arrays["blocks"])
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"not a stored tree of moments: {error!r:.80}") from None
        fits = all(isinstance(level, int) and 0 <= level < 63 for level in levels) and len(levels) == len(values)
        if not fits or sum(1 << level for level in levels) != tree.blocks:
            raise FormatError(f"a stored tree of {tree.blocks} blocks does not have the levels {levels!r:.60}")
        tree._waiting = [(k, cls.kind.from_bytes(v.tobytes())) for k, v in zip(levels, values, strict=True)]
        return tree
