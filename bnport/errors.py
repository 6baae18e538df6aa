"""Everything bnport raises on purpose, and how it writes a stranger's text into a message.

One root, few children; each is also the builtin that a caller would expect to catch.
A message says what, where, expected and got, and what to do next, in one line.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing.TYPE_CHECKING is, without importing it

if TYPE_CHECKING:
    from collections.abc import Iterable


class BnportError(Exception):
    """The root. The command line prints it as one line and exits with 2."""


class InvalidValue(BnportError, ValueError):
    """Numbers or arguments that cannot be BatchNorm parameters (shape, NaN, variance + epsilon <= 0, ...)."""


class FormatError(BnportError, ValueError):
    """A file that is damaged, hostile or not fully understood. Nothing was written."""


class Unrepresentable(BnportError, ValueError):
    """A record that the target layer cannot hold without changing the function it computes."""


class Question(BnportError, LookupError):
    """Several answers fit and nothing in the source decides: the user is asked, never guessed for."""


class NotFound(BnportError, LookupError):
    """What was asked for is not there: no BatchNorm in a file, an unknown layer, key or format."""


class MatchError(BnportError, LookupError):
    """Source and target layers do not pair completely and unambiguously.

    match: the bnport.match.Match with what was found and what is open, where there is one.
    """

    match: object = None


class MissingDependency(BnportError, ImportError):
    """A package is needed for this and is not installed; the message names the extra that brings it."""


class WorkerLost(BnportError, RuntimeError):
    """A worker process or machine died again and again on the same piece of work."""


class OutputError(BnportError, OSError):
    """The output cannot be written as asked; whatever was there before is still there, whole."""


def printable(text: object, limit: int = 200) -> str:
    """`text` on one line with control characters escaped, so that a name in a file cannot drive a terminal.

    Longer than `limit` characters is cut in the middle.
    """
    shown = str(text)
    if not shown.isprintable():
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in shown
        )
    if len(shown) > limit:
        half = limit // 2 - 2
        shown = f"{shown[:half]}...{shown[-half:]}"
    return shown


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its class's name if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, None if all differ; in time that grows with their number, not its square."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names joined for a message: at most `limit` of them, then how many more."""
    all_names = [printable(n) for n in names]
    more = len(all_names) - limit
    return ", ".join(all_names[:limit]) + (f" and {more} more" if more > 0 else "")
