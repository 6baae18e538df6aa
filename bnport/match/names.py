"""Layer names as evidence: their words, their numbers, and what a correspondence of names says elsewhere."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from bnport.layer import Layer

    Token: TypeAlias = tuple[
        str, int | str
    ]  # ("#", 3) a number, ("@", 1) a letter that counts (5b), ("", "conv") a word

_TOKEN = re.compile(r"\d+x\d+|[a-z]+|\d+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# One word for what frameworks' model code calls differently. "proj" and "project" are left out: a shortcut in
# Inception-ResNets and others, the last convolution of a block in MobileNets.
_SYNONYMS = {
    word: meant
    for meant, words in {
        "shortcut": "downsample shortcut skip identity residual",
        "depthwise": "depthwise dw dwconv",
        "expand": "expand expansion exp",
        "pool": "pool pooling avgpool maxpool",
        "head": "head top classifier logits",
        "reduce": "reduce reduction",
        "transition": "transition trans",
        "pointwise": "pointwise pw sepconv separable sep",
    }.items()
    for word in words.split()
}


END: Token = ("#", -1)  # a name that ends where others count: batch_normalization before batch_normalization_1


def tokens(name: str) -> tuple[Token, ...]:
    """`name` as words, numbers and counting letters; separators carry no meaning, `3x3` is a word."""
    out: list[Token] = []
    for text in _TOKEN.findall(_CAMEL.sub(" ", name).lower()):
        if text.isdigit():
            out.append(("#", int(text[:18])))
        elif len(text) == 1 and out and out[-1][0] == "#":
            out.append(("@", ord(text) - ord("a")))
        else:
            out.append(("", text))
    return tuple(out)


def words(name_tokens: Sequence[Token]) -> frozenset[str]:
    """The words of a name, each replaced by what it stands for."""
    return frozenset(_SYNONYMS.get(str(v), str(v)) for kind, v in name_tokens if kind == "")


def intervals(names: Sequence[Sequence[Token]]) -> tuple[list[int], list[int]]:
    """How early and how late each name can rank among all of them, by the numbers in the names.

    `names` are in the order of definition. Two names are ordered if they first differ in a number (or a counting
    letter) and the order of definition agrees; if they first differ in a word they are not. Returns (lowest, highest)
    rank per name; the highest is inclusive.
    """
    count = len(names)
    low, high = [0] * count, [count - 1] * count
    for ordered, agrees in _partings(names):
        if not agrees:
            continue  # defined in another order than numbered: neither counts
        before, after = 0, sum(len(group) for group in ordered)
        for group in ordered:
            after -= len(group)
            for i in group:
                low[i] += before
                high[i] -= after
            before += len(group)
    return low, high


def counted_otherwise(names: Sequence[Sequence[Token]]) -> bool:
    """Whether two of the names, which are in the order of definition, are numbered in the other order."""
    return any(not agrees for _, agrees in _partings(names))


def _partings(names: Sequence[Sequence[Token]]) -> Iterator[tuple[list[list[int]], bool]]:
    """Wherever names part by a number or a counting letter: who goes which way, and whether the definition's order agrees.

    The groups of positions are in counting order.
    """
    work = [(list(range(len(names))), 0)]
    while work:
        members, depth = work.pop()
        children: dict[Token, list[int]] = {}
        for i in members:
            children.setdefault(names[i][depth] if depth < len(names[i]) else END, []).append(i)
        for kind in ("#", "@"):
            ordered = [group for _, group in sorted((k, v) for k, v in children.items() if k[0] == kind)]
            yield ordered, all(a[-1] < b[0] for a, b in itertools.pairwise(ordered))
        work += [(child, depth + 1) for key, child in children.items() if key != END and len(child) > 1]


def numbering(names: Sequence[str]) -> list[int | None]:
    """The number a framework gave to each automatically named layer (`batch_normalization_7`), else None.

    None for all unless most names have one and the same base, because only then the numbers count one thing.
    """
    split = [re.fullmatch(r"(?:.*/)?([A-Za-z]\w*?)(?:_(\d{1,9}))?", n) for n in names]
    bases: dict[str, int] = {}
    for found in split:
        if found:
            bases[found[1]] = bases.get(found[1], 0) + 1
    base = max(bases, key=lambda b: bases[b], default="")
    if not names or bases.get(base, 0) * 2 < len(names):
        return [None] * len(names)
    numbers = [int(f[2] or 0) if f and f[1] == base else None for f in split]
    given = [n for n in numbers if n is not None]
    return numbers if len(set(given)) == len(given) else [None] * len(names)


def keys(group: Sequence[Sequence[Token]]) -> list[tuple[Token, ...]]:
    """For each name, what distinguishes it within the group: numbers that all share become `#`.

    Of `layer1.0.bn3` and `layer1.0.downsample.1` the keys are (layer, #, #, bn, 3) and (layer, #, #, downsample, 1), so
    that what is learnt in layer2 is found again in layer1.
    """
    shared = 0
    while all(len(n) > shared for n in group) and len({n[shared] for n in group}) == 1:
        shared += 1
    return [tuple((k, "") if i < shared and k else (k, v) for i, (k, v) in enumerate(n)) for n in group]


def shape(name_tokens: Sequence[Token]) -> tuple[str, ...]:
    """Where a name has words, where numbers and where letters that count."""
    return tuple(kind for kind, _ in name_tokens)


def common(first: Sequence[Token], second: Sequence[Token]) -> int:
    """How many tokens two names share from the beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def fits(name: Sequence[Token], key: Sequence[Token]) -> bool:
    """Whether `name` has the shape of `key`."""
    return len(name) == len(key) and all(
        a[0] == b[0] and (b[1] == a[1] or (b[1] == "" and b[0] != "")) for a, b in zip(name, key, strict=True)
    )


def equal(
    sources: Mapping[str, Layer], free_s: Sequence[str], targets: Mapping[str, Layer], free_t: Sequence[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(target -> source for layers of one name, also if one side puts a prefix before all its names; rivals).

    No names count if less than half of the smaller side's have an equal (a `bn1` on both sides may be chance), or if most
    of the layers that share a name do not fit each other. Automatic names (`batch_normalization_7`) count
    only if every one of them has its equal and they all fit: they say in which order layers were made, not what for.
    Names that both sides count, but one from 0 and the other from 1, do not count: what has one name is not one layer.
    rivals: where names fit under several prefixes (`student.bn` and `teacher.bn` to `bn`) and none of them stands out,
    each prefix with the names of the targets that it would have given.
    """
    common, rivals = _same(sources, free_s, targets, free_t)
    shifted = counted_from_elsewhere(free_s, free_t, common)
    common = {t: s for t, s in common.items() if t not in shifted}
    if 2 * len(common) < min(len(free_s), len(free_t)) or not common:
        return {}, rivals
    automatic = {t for t in common if re.fullmatch(r"(?:.*/)?batch_?norm(?:alization)?\w*?(?:_?\d+)?", t.lower())}
    fit = sum(_fit(sources[s], targets[t], kernels=t in automatic) for t, s in common.items())
    if 2 * fit <= len(common):
        return {}, rivals
    if len(automatic) * 2 > len(common) and (fit < len(common) or len(common) < max(len(free_s), len(free_t))):
        return {}, rivals
    if len(automatic) * 2 > len(common) and not _same_graph(sources, targets, common):
        return {}, rivals
    return common, rivals


def _same(
    sources: Mapping[str, Layer], free_s: Sequence[str], targets: Mapping[str, Layer], free_t: Sequence[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(target -> source for equal names, also under one prefix of one side; the prefixes if several fit as well)."""
    known = set(free_s)
    common = {t: t for t in free_t if t in known}
    if common:
        return common, {}
    found: dict[str, dict[str, str]] = {}  # prefix -> target -> source
    for longer, shorter in ((free_s, free_t), (free_t, free_s)):
        short = set(shorter)
        for name in longer:
            for at in re.finditer(r"[./]", name):
                rest = name[at.end() :]
                if rest in short:
                    t, s = (rest, name) if longer is free_s else (name, rest)
                    found.setdefault(name[: at.end()], {})[t] = s
        if found:
            break
    whole = [
        pairs
        for pairs in found.values()
        if len(pairs) == len(short) and all(_fit(sources[s], targets[t], kernels=True) for t, s in pairs.items())
    ]
    if len(found) == 1 or len(whole) == 1:
        return (whole or list(found.values()))[0], {}
    return {}, {prefix: list(pairs) for prefix, pairs in found.items()}


def counted_from_elsewhere(
    free_s: Sequence[str], free_t: Sequence[str], common: Mapping[str, str], *, perhaps: bool = False
) -> set[str]:
    """The targets of `common` in rows of names (`bn0`, `bn1` and `bn1`, `bn2`) that are the same but for where they begin.

    `perhaps`: also where a name of the row may be missing, so that it may be the same and may be not.
    """
    if not common:
        return set()
    t, s = next(iter(common.items()))
    rows: tuple[dict[Hashable, dict[int, str]], dict[Hashable, dict[int, str]]] = ({}, {})
    for row, free, prefix in zip(rows, (free_s, free_t), (s[: -len(t)], t[: -len(s)]), strict=True):
        for name in free:
            found = tokens(name[len(prefix) :]) if name.startswith(prefix) else ()
            for at, (kind, value) in enumerate(found):
                if kind == "#":
                    row.setdefault((found[:at], found[at + 1 :]), {})[int(value)] = name
    out: set[str] = set()
    both_left = len(common) < min(len(free_s), len(free_t))
    for key, targets in rows[1].items():
        sources = rows[0].get(key)
        if sources is None or min(sources) == min(targets):
            continue
        offset = min(sources) - min(targets)
        if {number + offset for number in targets} == set(sources) or (
            (both_left or perhaps) and {min(sources), min(targets)} == {0, 1}
        ):
            out.update(targets.values())
    return out


def _fit(source: Layer, target: Layer, *, kernels: bool) -> bool:
    if source.channels != target.channels:
        return False
    if not kernels or source.kernel is None or target.kernel is None or source.kernel.guessed or target.kernel.guessed:
        return True
    return source.kernel.shape == target.kernel.shape


def _same_graph(sources: Mapping[str, Layer], targets: Mapping[str, Layer], common: Mapping[str, str]) -> bool:
    for t, s in common.items():
        before_s, before_t = sources[s].inputs, targets[t].inputs
        if before_s is not None and before_t is not None and {common.get(n) for n in before_t} != set(before_s):
            return False
    return True
