"""A pickle read into plain data and inert stand-ins; nothing in it is ever called, imported or looked up.

The standard Unpickler cannot be made safe enough even with find_class replaced: it grows its memo to any index that a
file names, hashes nested tuples without a limit (a crash), and offers setattr on whatever is returned to it. So the
opcodes are interpreted here. What a pickle would have imported becomes a Global, what it would have called or
constructed a Node that records callable, arguments, state and items; persistent ids become Persistent. What they mean
is for the adapter to say.

Plain values are None, bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset. Lists may contain
themselves and values may be shared many times over: whoever walks the result needs a depth limit and a memo.
A dict key or set member that is not a str, bytes, number below 2**60, None or stand-in is wrapped in Opaque, because
hashing it could take exponential time. (pickletools' opcode table, protocols 0 to 5)
"""

from __future__ import annotations

import gc

from bnport._lazy import TYPE_CHECKING
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

SIZE_LIMIT = 64 << 20  # bytes of one pickle; a checkpoint of 100 000 tensors has 20 MB
OPCODE_LIMIT = 6_000_000
OBJECT_LIMIT = 4_000_000  # in units of about 80 bytes: 1 per list, tuple, memo entry; 3 per dict, set, stand-in

_STOP = ord(".")


class Truncated(FormatError):
    """The bytes ended within the pickle; with more of them it might be whole."""


class Global:
    """A class or function that the pickle names; the stand-in knows its module and name and nothing else."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def path(self) -> str:
        """ "module.name"."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"Global({self.path!r})"


class Node:
    """An object that the pickle would have made, by a call (REDUCE) or as an instance of a class (NEWOBJ, OBJ, INST).

    callable: the Global (or another stand-in) that would have been called; args: its arguments; state: what BUILD would
    have set, or None; items: what SETITEMS would have put into it; elements: what APPENDS or ADDITEMS would have.
    """

    __slots__ = ("args", "callable", "elements", "items", "state")

    def __init__(self, callable: Global | Node | Persistent, args: tuple[Any, ...]) -> None:
        self.callable, self.args = callable, args
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []

    @property
    def path(self) -> str:
        """ "module.name" of what would have been called; "" if that is no Global."""
        return self.callable.path if isinstance(self.callable, Global) else ""

    def __repr__(self) -> str:
        return f"Node({self.path!r}, {len(self.args)} arguments)"


class Persistent:
    """A persistent id: what the pickle refers to outside itself."""

    __slots__ = ("id",)

    def __init__(self, id: Any) -> None:
        self.id = id

    def __repr__(self) -> str:
        return "Persistent()"


class Opaque:
    """A dict key or set member that is not hashed."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Opaque()"


def load(data: bytes, where: str, offset: int = 0, persistent: Callable[[Any], Any] = Persistent) -> tuple[Any, int]:
    """(the value, offset after it) of the pickle at `offset` of `data`; `where` names it in messages.

    `persistent` is the reader's own function from a persistent id (data from the file) to the value that stands for it.
    Raises Truncated if the bytes end within the pickle, FormatError for anything malformed or beyond the limits.
    """
    if len(data) - offset > SIZE_LIMIT:
        data = data[: offset + SIZE_LIMIT]
    from bnport.containers.pickle_opcodes import TABLE

    collecting = gc.isenabled()
    gc.disable()  # nothing is freed while objects are only made; the collector would look at each of them many times
    try:
        return Machine(data, where, offset, persistent).run(TABLE)
    finally:
        if collecting:
            gc.enable()


class Machine:
    """The state of one reading: stack, marks, memo. What the instructions do with it is in pickle_opcodes.py."""

    __slots__ = ("data", "globals", "marks", "memo", "objects", "persistent", "position", "stack", "where")

    def __init__(self, data: bytes, where: str, offset: int, persistent: Callable[[Any], Any]) -> None:
        self.data, self.where, self.position, self.persistent = data, where, offset, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks that lie below each MARK
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.objects = 0

    def run(self, table: list[Callable[[Machine], None]]) -> tuple[Any, int]:
        """Carry out instructions until STOP; (the value, offset after it)."""
        data = self.data
        try:
            for _ in range(OPCODE_LIMIT):
                code = data[self.position]
                self.position += 1
                if code == _STOP:
                    return self.stack.pop(), self.position
                table[code](self)
        except IndexError:
            if self.position >= len(data):
                raise Truncated(f"{self.where}: the pickle ends in the middle") from None
            self.refuse("takes more from its stack than is there")
        except KeyError as error:
            self.refuse(f"refers to {error.args[0]!r}, which it never stored")
        except (ValueError, OverflowError) as error:
            if isinstance(error, FormatError):
                raise
            self.refuse(f"holds a malformed value ({error})")
        return self.refuse(f"has more than {OPCODE_LIMIT} instructions")

    # ---- reading

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        start = self.position
        end = start + length
        if end > len(self.data):
            raise Truncated(f"{self.where}: the pickle ends in the middle")
        self.position = end
        return self.data[start:end]

    def line(self) -> bytes:
        """The bytes up to the next line feed."""
        end = self.data.find(b"\n", self.position, self.position + 70_000)
        if end < 0:
            if len(self.data) - self.position < 70_000:
                raise Truncated(f"{self.where}: the pickle ends in the middle")
            self.refuse("has a line of more than 70000 bytes")
        text = self.data[self.position : end]
        self.position = end + 1
        return text

    def refuse(self, why: str) -> NoReturn:
        """Raise FormatError."""
        raise FormatError(f"{self.where}: the pickle {printable(why)} (at byte {self.position})")

    # ---- making

    def count(self, units: int) -> None:
        """Account for objects about to be made."""
        self.objects += units
        if self.objects > OBJECT_LIMIT:
            self.refuse("makes too many objects")

    def popped_mark(self) -> list[Any]:
        """What lies above the last MARK, which is removed."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def key(self, value: Any) -> Any:
        """`value` if hashing it is cheap, else wrapped in Opaque."""
        kind = type(value)
        if kind is str or value is None or kind in _KEYS:
            return value
        if kind is int:
            return value if -(1 << 60) < value < 1 << 60 else Opaque(value)
        if kind is tuple or kind is frozenset:
            self.count(1)
            return Opaque(value)
        return self.refuse(f"uses a {kind.__name__} as a key")

    def set_items(self, target: Any, pairs: list[Any]) -> None:
        """target[key] = value for a flat list of keys and values; no key twice."""
        items = target.items if type(target) is Node else target
        if type(items) is not dict or len(pairs) % 2:
            self.refuse(f"puts items into a {type(target).__name__}")
        self.count(len(pairs) >> 1)
        expected = len(items) + len(pairs) // 2
        for i in range(0, len(pairs), 2):
            items[self.key(pairs[i])] = pairs[i + 1]
        if len(items) != expected:
            self.refuse("holds a key twice in one dict")

    def append(self, target: Any, values: list[Any]) -> None:
        """target.extend(values) for a list or stand-in."""
        elements = target.elements if type(target) is Node else target
        if type(elements) is not list:
            self.refuse(f"appends to a {type(target).__name__}")
        elements.extend(values)

    def global_(self, module: Any, name: Any) -> None:
        """Push the stand-in of module.name."""
        if type(module) is not str or type(name) is not str:
            self.refuse("names a class by something that is no text")
        found = self.globals.get((module, name))
        if found is None:
            self.count(1)
            found = self.globals[module, name] = Global(module, name)
        self.stack.append(found)

    def node(self, callable: Any, args: Any) -> None:
        """Push the stand-in of callable(*args)."""
        if type(callable) not in (Global, Node, Persistent) or type(args) is not tuple:
            self.refuse(f"calls a {type(callable).__name__} with a {type(args).__name__}")
        self.count(4)
        self.stack.append(Node(callable, args))


_KEYS = frozenset((bytes, bool, float, Global, Node, Persistent, Opaque))
