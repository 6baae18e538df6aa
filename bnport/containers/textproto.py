"""Protocol buffers' text format (`.prototxt`), read into plain messages without a schema.

Read: `field: value`, `field { }`, `field: { }`, `field < >`, lists `[a, b]`, optional separators `,` and `;`, comments,
strings in either quote with their escapes and adjacent pieces joined, numbers, enum words, negative numbers. Refused:
extensions and Any (`[name]`), which Caffe never uses. Not recursive; depth and size are bounded.

https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import re

from bnport._lazy import TYPE_CHECKING
from bnport.containers import TEXT, looks_like
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from typing import TypeAlias

LARGEST_FILE = 4 << 20  # ResNet-152's deploy.prototxt has 0.1 MB
MAX_DEPTH = 100  # protobuf's own limit

# two patterns, neither of which can backtrack into itself: a long comment costs its length, not its square
_SPACE = re.compile(r"(?:\s+|#[^\n]*)*")
_TOKEN = re.compile(
    r"""(?P<word>-?\s*[A-Za-z0-9_.][A-Za-z0-9_.+-]*)     # names, enum words, numbers
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>[{}<>\[\]:,;])
    |(?P<end>\Z)""",
    re.VERBOSE,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?\Z")
_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{1,2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_CLOSING = {"{": "}", "<": ">"}


class Word(str):
    """A value that stood without quotes: a number, a truth value or an enum's name."""

    __slots__ = ()


class Message:
    """The fields of one message in order: `pairs` of name and value, a value being a str, a Word or a Message."""

    __slots__ = ("line", "pairs", "source")

    def __init__(self, source: str, line: int) -> None:
        self.source, self.line = source, line
        self.pairs: list[tuple[str, Value]] = []

    def all(self, name: str) -> list[Value]:
        """Every value of a field."""
        return [value for key, value in self.pairs if key == name]

    def messages(self, name: str) -> list[Message]:
        """Every value of a field that holds messages."""
        found = self.all(name)
        for value in found:
            if not isinstance(value, Message):
                raise self.error(f"{name} should be a message in braces, it is {printable(value, 40)!r}")
        return found  # type: ignore[return-value]

    def texts(self, name: str) -> list[str]:
        """Every value of a field that holds strings or enum words."""
        found = self.all(name)
        if any(isinstance(value, Message) for value in found):
            raise self.error(f"{name} should be a string, it is a message")
        return found  # type: ignore[return-value]

    def text(self, name: str) -> str | None:
        """The value of a field that stands at most once, a string or an enum word."""
        found = self.texts(name)
        if len(found) > 1:
            raise self.error(f"{name} is given {len(found)} times")
        return found[0] if found else None

    def integer(self, name: str) -> int | None:
        """The value of an integer field that stands at most once."""
        text = self.text(name)
        if text is None:
            return None
        if not isinstance(text, Word) or len(text) > 20 or not _INTEGER.match(text):
            raise self.error(f"{name} should be an integer, it is {printable(text, 40)!r}")
        return int(text)

    def number(self, name: str) -> float | None:
        """The value of a float field that stands at most once."""
        text = self.text(name)
        if text is None:
            return None
        if not isinstance(text, Word) or len(text) > 60 or not _FLOAT.match(text):
            raise self.error(f"{name} should be a finite number, it is {printable(text, 40)!r}")
        return float(text.rstrip("fF"))

    def truth(self, name: str) -> bool | None:
        """The value of a bool field that stands at most once."""
        text = self.text(name)
        if text is None:
            return None
        known = {
            "true": True,
            "True": True,
            "t": True,
            "1": True,
            "false": False,
            "False": False,
            "f": False,
            "0": False,
        }
        if not isinstance(text, Word) or text not in known:
            raise self.error(f"{name} should be true or false, it is {printable(text, 40)!r}")
        return known[text]

    def error(self, why: str) -> FormatError:
        """A FormatError that names the file and the line where this message begins."""
        return FormatError(f"{printable(self.source)}: line {self.line}: {why}")


if TYPE_CHECKING:
    Value: TypeAlias = str | Message


def read(path: str) -> Message:
    """The message in a text file. Raises FormatError naming the file and the line."""
    from bnport.containers.files import ReadFile

    file = ReadFile(path)
    if file.size > LARGEST_FILE:
        raise FormatError(f"{printable(path)}: {file.size} bytes of prototxt; the limit is {LARGEST_FILE}")
    # comments come in any encoding
    data = file.pread(0, file.size)
    try:
        return parse(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"), path)
    except FormatError as error:
        what = looks_like(data[:4096])
        if what == TEXT:
            raise
        raise FormatError(f"{error}; by its first bytes it is {what or 'no text'}") from None


def parse(text: str, source: str = "prototxt") -> Message:
    """The message that `text` holds; `source` is for messages."""
    return _Parser(text, source).run()


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self.text, self.source, self.position = text, source, 0
        self.kind, self.token, self.at = "", "", 0
        self._lines = (0, 1)  # a position and its line, so that lines are counted once

    def run(self) -> Message:
        top = Message(self.source, 1)
        stack = [(top, "")]
        self.next()
        while True:
            message, closing = stack[-1]
            if self.kind == "end":
                if closing:
                    raise self.error(f"the file ends inside the message of line {message.line}")
                return top
            if self.token in ("}", ">") and self.kind == "mark":
                if self.token != closing:
                    raise self.error(f"unexpected {self.token!r}")
                stack.pop()
                self.next()
                self.skip_separator()
                continue
            name = self.name()
            if self.is_mark("{", "<"):
                stack.append(self.open(message, name))
                self.too_deep(stack)
                continue
            if not self.is_mark(":"):
                raise self.error(f"':' or '{{' was expected after {printable(name, 40)!r}")
            self.next()
            if self.is_mark("{", "<"):
                stack.append(self.open(message, name))
                self.too_deep(stack)
            elif self.is_mark("["):
                self.list_of_values(message, name)
            else:
                message.pairs.append((name, self.value()))
                self.skip_separator()

    def next(self) -> None:
        space = _SPACE.match(self.text, self.position)
        self.at = space.end() if space else self.position
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise self.error(f"'{printable(self.text[self.at : self.at + 20])}' is not text format")
        self.kind, self.token, self.position = match.lastgroup or "", match[0], match.end()

    def line(self) -> int:
        position, line = self._lines
        line += (
            self.text.count("\n", position, self.at)
            if self.at >= position
            else -self.text.count("\n", self.at, position)
        )
        self._lines = (self.at, line)
        return line

    def is_mark(self, *marks: str) -> bool:
        return self.kind == "mark" and self.token in marks

    def skip_separator(self) -> None:
        if self.is_mark(",", ";"):
            self.next()

    def name(self) -> str:
        if self.kind != "word" or not _NAME.match(self.token):
            raise self.error(f"a field name was expected, there is {printable(self.token, 40)!r}")
        name = self.token
        self.next()
        return name

    def open(self, message: Message, name: str) -> tuple[Message, str]:
        inner = Message(self.source, self.line())
        message.pairs.append((name, inner))
        closing = _CLOSING[self.token]
        self.next()
        return inner, closing

    def too_deep(self, stack: list[tuple[Message, str]]) -> None:
        if len(stack) > MAX_DEPTH:
            raise self.error(f"messages nested more than {MAX_DEPTH} deep")

    def list_of_values(self, message: Message, name: str) -> None:
        self.next()
        if self.is_mark("]"):
            self.next()
        else:
            while True:
                message.pairs.append((name, self.value()))
                if self.is_mark("]"):
                    self.next()
                    break
                if not self.is_mark(","):
                    raise self.error(f"',' or ']' was expected in the list of {printable(name, 40)!r}")
                self.next()
        self.skip_separator()

    def value(self) -> str:
        if self.kind == "word":
            word = Word("".join(self.token.split()))
            self.next()
            return word
        if self.kind != "string":
            raise self.error(f"a value was expected, there is {printable(self.token, 40) or 'the end'!r}")
        pieces = []
        while self.kind == "string":  # adjacent strings are one
            pieces.append(_unescape(self.token[1:-1]))
            self.next()
        return "".join(pieces)

    def error(self, why: str) -> FormatError:
        return FormatError(f"{printable(self.source)}: line {self.line()}: {why}")


def _unescape(text: str) -> str:
    """The bytes that a string spells, as text; what is not UTF-8 becomes \\xNN, as in names from a binary file."""
    if text.isascii() and "\\" not in text:
        return text
    return _ESCAPE.sub(_escaped, text.encode("utf-8", "surrogateescape")).decode("utf-8", "backslashreplace")


def _escaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    if escape[:1] == b"x" and len(escape) > 1:
        return bytes((int(escape[1:], 16),))
    if escape[:1] in b"01234567":
        return bytes((int(escape, 8) & 0xFF,))
    return _LETTERS.get(escape, escape)
