"""The pairing as a file that a person reviews, edits and commits: written by `bnport map`, read by `--map`.

TOML: `[pairs]` holds target = source, by name or by pattern (`bnport.match.patterns`); `[skip]` holds `layers`, names or
shell patterns to leave out on either side. Evidence and open questions are comments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.containers.files import ReadFile
from bnport.errors import FormatError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.layer import Layer
    from bnport.match import Match

MOST_BYTES = 16 << 20

_HEAD = """\
# Which layer of {source} ({s_count} BatchNorm layers)
# belongs to which layer of {target} ({t_count}): target = source.
# Review it, edit it, keep it; then: bnport convert SRC TARGET -o OUT --map {file}
# {{i}} stands for a number, {{j:a}} for a letter counted from a = 0, {{rest:any}} for any text; the source side may add
# and multiply: {{i-1}}, {{3*i+1}}. The most specific entry wins. An entry that names nothing is an error.
"""


class MapFile(NamedTuple):
    """What a map file says: target -> source (names or patterns), and what to leave out."""

    pairs: dict[str, str]
    skip: list[str]


def read_map(path: str) -> MapFile:
    """Read a map file. Raises FormatError that names the file and the entry; NotFound if there is no such file.

    Only a regular file is read: a pipe could be waited for without end.
    """
    tomllib = _tomllib()
    shown = printable(path)
    file = ReadFile(path)
    if file.size > MOST_BYTES:
        raise FormatError(f"{shown}: larger than {MOST_BYTES >> 20} MiB; a map is a page")
    data = file.pread(0, file.size)
    try:
        content = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{shown}: not a map file: {printable(error)}") from None
    unknown = sorted(set(content) - {"pairs", "skip"})
    if unknown:
        raise FormatError(
            f"{shown}: unknown part {printable(unknown[0])!r}; a map has a line [pairs], the pairs below it, and [skip]"
        )
    pairs, skip = content.get("pairs", {}), content.get("skip", {})
    if not isinstance(pairs, dict) or not isinstance(skip, dict):
        raise FormatError(f"{shown}: [pairs] and [skip] are tables")
    for name, value in pairs.items():
        if not isinstance(value, str):
            raise FormatError(
                f'{shown}: {printable(name)!r} must be "target" = "source", both quoted (an unquoted dot starts a table)'
            )
    layers = skip.get("layers", [])
    unknown = sorted(set(skip) - {"layers"})
    if unknown or not isinstance(layers, list) or not all(isinstance(n, str) for n in layers):
        raise FormatError(f'{shown}: [skip] holds layers = ["name or pattern", ...] and nothing else')
    return MapFile(dict(pairs), list(layers))


def _tomllib() -> Any:
    import importlib
    import sys

    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def text(match: Match, sources: Mapping[str, Layer], targets: Mapping[str, Layer], file: str = "names.toml") -> str:
    """The map file of a Match: its pairs, compressed into patterns, with evidence, and its open questions."""
    lines = [
        _HEAD.format(
            source=_comment(match.source),
            target=_comment(match.target),
            s_count=len(sources),
            t_count=len(targets),
            file=_comment(file),
        ),
        "[pairs]",
    ]
    guessed = set(match.guessed)
    lines += _entries(match, {t: s for t, s in match.pairs.items() if t not in guessed}, targets)
    left = [*match.left_targets, *match.left_sources]
    if left:
        lines += ["", "[skip]", "layers = [", *(f"    {quoted(n)}," for n in dict.fromkeys(left)), "]"]
    lines += _questions(match)
    if guessed:
        lines += [
            "",
            "# LIKELY, but not proved as long as the pairing is not complete. Uncomment into [pairs] what is right:",
        ]
        likely = _entries(match, {t: s for t, s in match.pairs.items() if t in guessed}, targets)
        lines += [f"# {_comment(line)}" for line in likely]
    return "\n".join(lines) + "\n"


def _entries(match: Match, pairs: Mapping[str, str], targets: Mapping[str, Layer]) -> list[str]:
    """Lines for some pairs of a Match, as patterns where several can be said as one, with the evidence."""
    from bnport.match.compress import compress
    from bnport.match.patterns import is_pattern

    entries = compress(pairs, [t for t in targets if t not in match.left_targets])
    reasons: dict[str, list[str]] = {}
    for target, by in _entries_of(entries, pairs).items():
        words = match.evidence.get(target, ())
        shown = words if by == target else [*words[:1], *(word for word in words[1:] if " differ" in word)]
        reasons.setdefault(by, []).append(", ".join(shown))
    lines = []
    for key, value in entries.items():
        count = f"{len(reasons[key])} layers: " if is_pattern(key) and key not in pairs else ""
        lines.append(f"{quoted(key)} = {quoted(value)}  # {count}{_summary(reasons[key])}")
    return lines


def _entries_of(entries: Mapping[str, str], pairs: Mapping[str, str]) -> dict[str, str]:
    from bnport.match.patterns import expand

    return {target: entry for target, (_, entry) in expand(entries, pairs, pairs.values()).items()}


def _summary(reasons: list[str]) -> str:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    most = sorted(counts, key=lambda r: -counts[r])
    more = f" (and {len(most) - 1} similar)" if len(most) > 1 else ""
    return _comment(most[0]) + more


def _questions(match: Match) -> list[str]:
    lines: list[str] = []
    for group in match.ambiguous:
        lines += ["", f"# OPEN: {_comment(group.why)}. Uncomment into [pairs], one source each:"]
        either = " or ".join(_comment(quoted(s)) for s in group.sources)
        lines += [f"# {_comment(quoted(t))} = {either}" for t in group.targets]
    for wrong in match.mismatched:
        lines += [
            "",
            f"# OPEN: {_comment(quoted(wrong.target))} has {wrong.target_channels} channels,"
            f" {_comment(quoted(wrong.source))} has {wrong.source_channels}",
        ]
    for what, names in (("target without a source", match.missing), ("source without a target", match.unexpected)):
        if names:
            lines += ["", f"# OPEN: {what}; pair it above, or leave it out under [skip] layers:"]
            lines += [f"#     {_comment(quoted(n))}," for n in names]
    return lines


def _comment(value: str) -> str:
    return printable(value, 400)


def quoted(name: str) -> str:
    """`name` as a TOML basic string."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _unicode(c)) for c in name) + '"'


def _unicode(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
