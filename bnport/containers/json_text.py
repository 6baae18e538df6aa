"""JSON of strangers: what json.loads takes in silence (a key twice in one object), or answers otherwise, is refused."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.errors import FormatError, printable, repeated

if TYPE_CHECKING:
    from typing import Any


def loads(text: bytes | str, where: str, **hooks: Any) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes; `hooks` are those of json.loads.

    Raises FormatError, naming `where`, for what is not UTF-8 or not JSON, a key that is twice in one object, and nesting
    that is too deep.
    """
    import json

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, **hooks)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # JSON and UTF-8 errors are its children
        raise FormatError(f"{where}: not JSON ({printable(error, 120)})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise FormatError(f"{printable(repeated(key for key, _ in pairs))} is twice in one JSON object")
    return value
