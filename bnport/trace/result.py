"""What was seen at one call of one layer, the whole of it, and how it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bnport.errors import listed, printable
from bnport.report import finite

if TYPE_CHECKING:
    from bnport.explain import Explanation


class Own(NamedTuple):
    """A layer's output against a formula, where it is worst: error over bound, channel, expected and got."""

    ratio: float
    channel: int
    expected: float
    got: float


class Step(NamedTuple):
    """One call of one paired layer in both networks, in the order in which B runs."""

    a: str
    b: str
    call: int  # 0 for the first, more for a shared layer
    input_difference: float  # relative; inf for different shapes
    output_difference: float
    own: Own  # B's output for B's input, against A's formula
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of the inputs, channel last
    tolerance: float

    @property
    def layer_differs(self) -> bool:
        """Whether B's layer is another function than A's."""
        return not self.own.ratio <= 1

    @property
    def input_differs(self) -> bool:
        """Whether what goes in is already different."""
        return not self.input_difference <= self.tolerance

    @property
    def output_differs(self) -> bool:
        """Whether what comes out is different."""
        return not self.output_difference <= self.tolerance


class Trace(NamedTuple):
    """Everything that was seen, and the verdict. Prints itself."""

    a: str
    b: str
    steps: tuple[Step, ...]
    output_difference: float  # of the networks' outputs, the worst of them
    tolerance: float
    faults: tuple[str, ...]  # what is wrong, the first place first
    notes: tuple[str, ...]
    explanation: Explanation | None
    not_compared: str = ""  # why nothing is known of the outputs; "" where they were compared

    @property
    def ok(self) -> bool:
        """Whether no layer differs and the networks' outputs agree."""
        return not self.faults

    @property
    def first(self) -> Step | None:
        """The first call at which the networks part."""
        return next((s for s in self.steps if s.layer_differs or s.input_differs), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN and infinity become null."""
        steps = []
        for step in self.steps:
            own = {key: finite(value) for key, value in step.own._asdict().items()}
            entry = {**step._asdict(), "own": own, "layer_differs": step.layer_differs}
            entry["input_difference"] = finite(step.input_difference)
            entry["output_difference"] = finite(step.output_difference)
            steps.append({**entry, "shapes": [list(shape) for shape in step.shapes]})
        return {
            "a": self.a, "b": self.b, "ok": self.ok, "tolerance": self.tolerance, "faults": list(self.faults),
            "output_difference": finite(self.output_difference), "notes": self._notes(), "steps": steps,
            "explanation": self.explanation.to_dict() if self.explanation else None,
        }  # fmt: skip

    def _notes(self) -> list[str]:
        return [*([self.not_compared] if self.not_compared else []), *self.notes]

    def __str__(self) -> str:
        return _as_text(self)


def _as_text(t: Trace) -> str:
    count = f"{len(t.steps)} BatchNorm calls compared"
    outputs = f"outputs differ by {t.output_difference:.2g}" if t.output_difference else "outputs are equal"
    lines = [
        f"{printable(t.a)} and {printable(t.b)}: {count}, {outputs} (relative; {t.tolerance:.2g} counts as different)"
    ]
    if t.ok:
        worst = max((step.own.ratio for step in t.steps), default=0.0)
        said = "Of the outputs nothing is known" if t.not_compared else "The networks agree"
        lines.append(f"{said}: every layer is within its bound (at most {worst:.2g} of it).")
    else:
        lines += [
            ("The networks part here: " if number == 0 else "  then: ") + fault
            for number, fault in enumerate(t.faults[:8])
        ]
        if len(t.faults) > 8:
            lines.append(f"  and {len(t.faults) - 8} more")
        agree = [step for step in t.steps if not (step.layer_differs or step.input_differs)]
        lines.append(f"{len(agree)} of {len(t.steps)} calls agree.")
    if t.explanation is not None:
        for verdict in t.explanation.verdicts:
            lines += [
                f"likely mistake: {verdict.title} ({listed(verdict.layers, 4)})",
                f"  evidence: {verdict.evidence}",
            ]
        if t.explanation.unexplained:
            lines.append(f"no known mistake explains {listed(t.explanation.unexplained, 4)}")
    return "\n".join([*lines, *(f"note: {note}" for note in t._notes())])
