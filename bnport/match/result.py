"""What pairing found, in the words of `load_state_dict`, and the one message that says what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bnport.errors import MatchError, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Mismatch(NamedTuple):
    """A pair that names or a map ask for and that cannot be: the channel counts differ."""

    target: str
    source: str
    target_channels: int
    source_channels: int


class Ambiguity(NamedTuple):
    """Layers that evidence does not tell apart: every source here could belong to every target here."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    why: str


class Match:
    """Which source layer belongs to which target layer, and why.

    pairs:        target name -> source name, in the order of the targets.
    missing:      targets that have no source.
    unexpected:   sources that have no target.
    mismatched:   pairs asked for by name or map whose channel counts differ.
    ambiguous:    groups of candidates between which nothing decides; never picked from.
    evidence:     target name -> in words, what decided its pair, then what else speaks for or against it.
    guessed:      of a pairing that is not ok: targets of pairs that rest on what may hold by chance (kernels that are only
                  beside their layer in a state dict, orders, numbers and words in names); confirm them, or answer the
                  other questions and pair again.
    prefixes:     what one could say --only-under for, where names fit under several of them and nothing decides.
    left_targets, left_sources: layers left out because the user said so (skip, only_under).
    """

    __slots__ = (
        "ambiguous", "evidence", "guessed", "left_sources", "left_targets", "mismatched", "missing", "pairs", "prefixes",
        "source", "source_notes", "target", "unexpected",
    )  # fmt: skip

    def __init__(
        self,
        *,
        pairs: Mapping[str, str],
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[Mismatch] = (),
        ambiguous: Iterable[Ambiguity] = (),
        prefixes: Iterable[str] = (),
        evidence: Mapping[str, tuple[str, ...]] | None = None,
        left_targets: Iterable[str] = (),
        left_sources: Iterable[str] = (),
        source: str = "the source",
        target: str = "the target",
        source_notes: Iterable[str] = (),
    ) -> None:
        self.pairs = dict(pairs)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.ambiguous = tuple(ambiguous)
        self.prefixes = tuple(prefixes)
        self.guessed: tuple[str, ...] = ()  # asked once it is known that the pairing is not ok
        self.evidence = dict(evidence or {})
        self.left_targets = tuple(left_targets)
        self.left_sources = tuple(left_sources)
        self.source = source
        self.target = target
        self.source_notes = tuple(source_notes)  # may say why layers are missing: an exporter folded them away

    @property
    def complete(self) -> bool:
        """Nothing missing and nothing unexpected."""
        return not self.missing and not self.unexpected

    @property
    def ok(self) -> bool:
        """Complete, and nothing mismatched or ambiguous: what `raise_if_bad` lets pass."""
        return self.complete and not self.mismatched and not self.ambiguous

    @property
    def by_name(self) -> list[str]:
        """The targets whose names alone decided their pairs."""
        return [t for t, words in self.evidence.items() if words and words[0].startswith("equal names")]

    def raise_if_bad(self) -> None:
        """Raise MatchError unless every layer has its one pair, and there is one. The message lists what to do."""
        if not self.ok:
            error = MatchError(self.problems())
            error.match = self
            raise error
        if not self.pairs:
            raise MatchError(
                f"nothing to pair: --skip, --only-under or the map leave out all {len(self.left_targets)} layers of"
                f" {printable(self.target)} and all {len(self.left_sources)} of {printable(self.source)}"
            )

    def problems(self) -> str:
        """One line on what keeps the pairing from being complete and unambiguous; empty if nothing does."""
        source, target = printable(self.source), printable(self.target)
        parts = [
            f"{printable(m.target)}: {m.source_channels} channels in {source} (layer {printable(m.source)!r}),"
            f" {m.target_channels} in {target}"
            for m in self.mismatched[:8]
        ]
        if len(self.mismatched) > 8:
            parts.append(f"and {len(self.mismatched) - 8} more of other channel counts")
        if self.missing:
            parts.append(f"missing from {source}: {listed(self.missing)} of {target}")
        if self.unexpected:
            parts.append(f"unexpected, not in {target}: {listed(self.unexpected)} of {source}")
        parts += [
            f"ambiguous: {listed(g.targets)} of {target} could be {listed(g.sources)} of {source} ({g.why})"
            for g in self.ambiguous[:5]
        ]
        if len(self.ambiguous) > 5:
            parts.append(f"and {len(self.ambiguous) - 5} more ambiguous groups")
        if not parts:
            return ""
        if self.guessed:
            some = listed([f"{t} = {self.pairs[t]}" for t in self.guessed], 4)
            parts.append(f"of the {len(self.pairs)} other pairs {len(self.guessed)} are no more than likely ({some})")
        why = "".join(f"{note.rstrip('.')}. " for note in self.source_notes) if not self.complete else ""
        return "; ".join(parts) + ". " + why + self._advice()

    def _advice(self) -> str:
        advice = []
        if self.mismatched or self.ambiguous or (self.missing and self.unexpected):
            advice.append("say which belongs to which with --map (`bnport map` writes a draft)")
        if self.unexpected and self.by_name and not self.missing and not self.mismatched:
            advice.append(
                "leave what the target lacks out with --skip NAME: names alone paired the others, so it need not be"
                f" {listed(self.unexpected, 1)}"
            )
        elif not self.complete or self.mismatched:
            one = [*self.missing, *self.unexpected, *(m.target for m in self.mismatched)][0]
            advice.append(f"leave layers out with --skip (for example --skip '{printable(one)}')")
        if self.prefixes and (self.ambiguous or not self.complete):
            advice.append(
                f"pair one part of a bigger model with --only-under (for example {printable(self.prefixes[0])!r})"
            )
        elif not self.complete:
            advice.append("pair one part of a bigger model with --only-under PREFIX")
        text = ", or ".join(advice)
        return f"{text[:1].upper()}{text[1:]}."

    def to_dict(self) -> dict[str, object]:
        """The pairing as data for JSON: pairs with their evidence, and everything that keeps it from being complete."""
        guessed = set(self.guessed)
        pairs = [
            {"target": t, "source": s, "guessed": t in guessed, "evidence": list(self.evidence.get(t, ()))}
            for t, s in self.pairs.items()
        ]
        return {
            "ok": self.ok,
            "source": self.source,
            "target": self.target,
            "pairs": pairs,
            "ambiguous": [group._asdict() for group in self.ambiguous],
            "mismatched": [pair._asdict() for pair in self.mismatched],
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "left_targets": list(self.left_targets),
            "left_sources": list(self.left_sources),
        }

    def __repr__(self) -> str:
        counts = (f"{len(getattr(self, n))} {n}" for n in ("missing", "unexpected", "mismatched", "ambiguous"))
        return f"Match({len(self.pairs)} pairs, {', '.join(c for c in counts if not c.startswith('0 '))})"
