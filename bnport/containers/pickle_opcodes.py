"""What each pickle instruction does to the machine of pickle.py: pickletools' opcode table, protocols 0 to 5.

Extension codes (EXT1, EXT2, EXT4) and out-of-band buffers are refused: what they mean lies outside the file.
"""

from __future__ import annotations

from struct import Struct

from bnport._lazy import TYPE_CHECKING
from bnport.containers.pickle import Machine, Node

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_DOUBLE, _INT32, _U32, _U64 = Struct(">d"), Struct("<i"), Struct("<I"), Struct("<Q")

TABLE: list[Callable[[Machine], None]] = []


def _unknown(m: Machine) -> None:
    m.refuse(f"has an instruction {m.data[m.position - 1]:#04x} that is not understood")


TABLE.extend([_unknown] * 256)


def _opcode(*codes: bytes) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        for code in codes:
            TABLE[code[0]] = function
        return function

    return register


def _constant(code: bytes, value: object) -> None:
    TABLE[code[0]] = lambda m: m.stack.append(value)


for _code, _value in ((b"N", None), (b"\x88", True), (b"\x89", False), (b")", ())):
    _constant(_code, _value)


# ---- stack and memo


@_opcode(b"(")
def _mark(m: Machine) -> None:
    m.count(1)
    m.marks.append(m.stack)
    m.stack = []


@_opcode(b"0")
def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.popped_mark()


@_opcode(b"1")
def _pop_mark(m: Machine) -> None:
    m.popped_mark()


@_opcode(b"2")
def _dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])


@_opcode(b"q")
def _binput(m: Machine) -> None:
    _put(m, m.data[m.position])
    m.position += 1


@_opcode(b"r")
def _long_binput(m: Machine) -> None:
    _put(m, _U32.unpack(m.take(4))[0])


@_opcode(b"p")
def _text_put(m: Machine) -> None:
    _put(m, int(m.line()))


@_opcode(b"\x94")
def _memoize(m: Machine) -> None:
    _put(m, len(m.memo))


def _put(m: Machine, index: int) -> None:
    m.count(1)
    m.memo[index] = m.stack[-1]


@_opcode(b"h")
def _binget(m: Machine) -> None:
    m.stack.append(m.memo[m.data[m.position]])
    m.position += 1


@_opcode(b"j")
def _long_binget(m: Machine) -> None:
    m.stack.append(m.memo[_U32.unpack(m.take(4))[0]])


@_opcode(b"g")
def _text_get(m: Machine) -> None:
    m.stack.append(m.memo[int(m.line())])


@_opcode(b"\x80")
def _proto(m: Machine) -> None:
    if m.take(1)[0] > 5:
        m.refuse(f"is of protocol {m.data[m.position - 1]}; 0 to 5 are read")


@_opcode(b"\x95")
def _frame(m: Machine) -> None:
    m.take(8)


# ---- numbers


@_opcode(b"K")
def _binint1(m: Machine) -> None:
    m.stack.append(m.data[m.position])
    m.position += 1


@_opcode(b"M")
def _binint2(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(2), "little"))


@_opcode(b"J")
def _binint(m: Machine) -> None:
    m.stack.append(_INT32.unpack(m.take(4))[0])


@_opcode(b"\x8a")
def _long1(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(m.take(1)[0]), "little", signed=True))


@_opcode(b"\x8b")
def _long4(m: Machine) -> None:
    length = _INT32.unpack(m.take(4))[0]
    if not 0 <= length <= 4096:
        m.refuse(f"holds a number of {length} bytes")
    m.stack.append(int.from_bytes(m.take(length), "little", signed=True))


@_opcode(b"I")
def _text_int(m: Machine) -> None:
    text = m.line()
    m.stack.append({b"00": False, b"01": True}.get(text) if text in (b"00", b"01") else _number(m, text))


@_opcode(b"L")
def _text_long(m: Machine) -> None:
    m.stack.append(_number(m, m.line().removesuffix(b"L")))


def _number(m: Machine, text: bytes) -> int:
    if len(text) > 4000:
        m.refuse(f"holds a number of {len(text)} digits")
    return int(text)


@_opcode(b"F")
def _text_float(m: Machine) -> None:
    m.stack.append(float(m.line()))


@_opcode(b"G")
def _binfloat(m: Machine) -> None:
    m.stack.append(_DOUBLE.unpack(m.take(8))[0])


# ---- text and bytes


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


@_opcode(b"X")
def _binunicode(m: Machine) -> None:
    m.stack.append(_text(m.take(_U32.unpack(m.take(4))[0])))


@_opcode(b"\x8c")
def _short_binunicode(m: Machine) -> None:
    m.stack.append(_text(m.take(m.take(1)[0])))


@_opcode(b"\x8d")
def _binunicode8(m: Machine) -> None:
    m.stack.append(_text(m.take(_U64.unpack(m.take(8))[0])))


@_opcode(b"V")
def _text_unicode(m: Machine) -> None:
    m.stack.append(str(m.line(), "raw-unicode-escape"))


def _py2_string(data: bytes) -> str | bytes:
    """A Python 2 str: text where it is UTF-8, as torch.load reads it; otherwise bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


@_opcode(b"T")
def _binstring(m: Machine) -> None:
    m.stack.append(_py2_string(m.take(_U32.unpack(m.take(4))[0])))


@_opcode(b"U")
def _short_binstring(m: Machine) -> None:
    m.stack.append(_py2_string(m.take(m.take(1)[0])))


@_opcode(b"S")
def _text_string(m: Machine) -> None:
    text = m.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        m.refuse("holds a string without quotes")
    inner = text[1:-1]
    m.stack.append(_py2_string(inner.decode("unicode-escape").encode("latin-1") if b"\\" in inner else inner))


@_opcode(b"B")
def _binbytes(m: Machine) -> None:
    m.stack.append(m.take(_U32.unpack(m.take(4))[0]))


@_opcode(b"C")
def _short_binbytes(m: Machine) -> None:
    m.stack.append(m.take(m.take(1)[0]))


@_opcode(b"\x8e")
def _binbytes8(m: Machine) -> None:
    m.stack.append(m.take(_U64.unpack(m.take(8))[0]))


@_opcode(b"\x96")
def _bytearray8(m: Machine) -> None:
    m.stack.append(bytearray(m.take(_U64.unpack(m.take(8))[0])))


# ---- containers


@_opcode(b"]")
def _empty_list(m: Machine) -> None:
    m.count(1)
    m.stack.append([])


@_opcode(b"}")
def _empty_dict(m: Machine) -> None:
    m.count(1)
    m.stack.append({})


@_opcode(b"\x8f")
def _empty_set(m: Machine) -> None:
    m.count(3)
    m.stack.append(set())


@_opcode(b"l")
def _list(m: Machine) -> None:
    m.count(1)
    values = m.popped_mark()
    m.stack.append(values)


@_opcode(b"t")
def _tuple(m: Machine) -> None:
    values = m.popped_mark()
    m.count(1)
    m.stack.append(tuple(values))


@_opcode(b"\x85", b"\x86", b"\x87")
def _tuple123(m: Machine) -> None:
    length = m.data[m.position - 1] - 0x84
    stack = m.stack
    if len(stack) < length:
        m.refuse("takes more from its stack than is there")
    m.count(1)
    stack[-length:] = [tuple(stack[-length:])]


@_opcode(b"d")
def _dict(m: Machine) -> None:
    pairs = m.popped_mark()
    m.count(1)
    made: dict[Any, Any] = {}
    m.set_items(made, pairs)
    m.stack.append(made)


@_opcode(b"\x91")
def _frozenset(m: Machine) -> None:
    values = m.popped_mark()
    m.count(3 + len(values))
    m.stack.append(frozenset([m.key(v) for v in values]))


@_opcode(b"a")
def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.append(m.stack[-1], [value])


@_opcode(b"e")
def _appends(m: Machine) -> None:
    values = m.popped_mark()
    m.append(m.stack[-1], values)


@_opcode(b"s")
def _setitem(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


@_opcode(b"u")
def _setitems(m: Machine) -> None:
    pairs = m.popped_mark()
    m.set_items(m.stack[-1], pairs)


@_opcode(b"\x90")
def _additems(m: Machine) -> None:
    values = m.popped_mark()
    target = m.stack[-1]
    m.count(len(values))
    if type(target) is set:
        target.update([m.key(v) for v in values])
    else:
        m.append(target if type(target) is Node else None, values)


# ---- what would have run code


@_opcode(b"c")
def _global(m: Machine) -> None:
    module, name = m.line(), m.line()
    m.global_(_text(module), _text(name))


@_opcode(b"\x93")
def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.global_(module, name)


@_opcode(b"R", b"\x81")
def _reduce(m: Machine) -> None:
    args, callable = m.stack.pop(), m.stack.pop()
    m.node(callable, args)


@_opcode(b"\x92")
def _newobj_ex(m: Machine) -> None:
    named, args, callable = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if type(args) is not tuple or type(named) is not dict:
        m.refuse("constructs an object without arguments")
    m.node(callable, (*args, named) if named else args)


@_opcode(b"o")
def _obj(m: Machine) -> None:
    values = m.popped_mark()
    m.node(values[0], tuple(values[1:]))


@_opcode(b"i")
def _inst(m: Machine) -> None:
    module, name = m.line(), m.line()
    values = m.popped_mark()
    m.global_(_text(module), _text(name))
    m.node(m.stack.pop(), tuple(values))


@_opcode(b"b")
def _build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if type(target) is not Node or target.state is not None:
        m.refuse(f"sets the state of a {type(target).__name__}" + (" twice" if type(target) is Node else ""))
    target.state = state


@_opcode(b"Q")
def _binpersid(m: Machine) -> None:
    m.count(1)
    m.stack.append(m.persistent(m.stack.pop()))


@_opcode(b"P")
def _persid(m: Machine) -> None:
    m.count(1)
    m.stack.append(m.persistent(_text(m.line())))
