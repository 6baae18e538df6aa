"""The known mistakes by name: how each reads, and what repairs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bnport.errors import listed, printable

if TYPE_CHECKING:
    from typing import Any

    from bnport.explain import Explanation, Verdict


class Known(NamedTuple):
    """A mistake that people make: its title, and what else than converting again may be the answer."""

    title: str
    instead: str = ""


MISTAKES: dict[str, Known] = {
    "order": Known("the arrays were written in the wrong order"),
    "std": Known("the standard deviation was written where the variance belongs"),
    "inverse-std": Known("an inverse was written where the variance belongs"),
    "squared": Known(
        "the variance was squared, as if it were a standard deviation",
        "if the source really holds standard deviations, the port is right: read the source with --stat std",
    ),
    "root-twice": Known("the square root was taken twice"),
    "epsilon": Known("the epsilon of another framework"),
    "outside": Known("epsilon was added outside the root on one side and under it on the other"),
    "factor": Known(
        "the statistics carry a constant factor, as when Caffe's scale factor is not applied, or applied twice"
    ),
    "ignored": Known("gamma was left out"),
    "kept": Known(
        "gamma differs where the source's is 1, as when a stored gamma is used that MXNet's fix_gamma ignores"
    ),
    "bessel": Known("the variance was corrected by n / (n - 1), which the stored value must not be"),
    "absolute": Known(
        "gamma was taken as |gamma| + epsilon on one side only, the convention of InPlaceABN",
        "if the source is an InPlaceABN model, read it with --inplace-abn",
    ),
    "folded": Known("the statistics were folded into gamma and beta, and kept as well"),
    "sign": Known("the mean was negated"),
    "partial": Known("only some of the arrays were copied; the others are still at their initial values"),
    "untouched": Known("nothing was written: the layer is still at its initial values"),
    "steps": Known(
        "mean and variance moved from their initial values by another momentum (Keras' momentum is 1 - PyTorch's)"
    ),
    "momentum": Known(
        "the momentum was taken over as it is, although Keras' is 1 - PyTorch's (matters in training only)"
    ),
    "channels": Known("the channels are in another order"),
    "half": Known("the numbers went through 16-bit floats"),
    "swapped": Known(
        "layers hold the numbers of other layers", "if it is the pairing that is wrong, say which is which with --map"
    ),
    "scattered": Known("arrays come from other layers, as when a flat list of weights is read in another order"),
}


class Repair(NamedTuple):
    """What a repair needs to know of the two models."""

    source: str
    ported: str
    live: bool = False  # the port is a model in memory
    options: str = ""  # what the command line must repeat

    def of(self, kind: str, assumed: float | None, found: float | None) -> str:
        """The command that repairs a mistake, and on a second line what else the answer may be.

        assumed: the source's epsilon if it is only assumed; found: the constant that was found in the port.
        """
        if self.live:
            more = ', momentum="port"' if kind == "momentum" else ""
            command = f"bnport.convert(source, model{more})"
        else:
            command = (
                f"bnport convert {_argument(self.source)} {_argument(self.ported)} -o {_argument(_fixed(self.ported))}"
            )
            command += f" {self.options}" if self.options else ""
            command += " --momentum port" if kind == "momentum" else ""
        instead = MISTAKES[kind].instead
        if kind == "epsilon" and assumed is not None:
            option = f"epsilon={found!r}" if self.live else f"--epsilon {found!r}"
            instead = (
                f"the source does not store its epsilon, {assumed!r} is assumed: if the model was built with {found!r}, the"
                f" port is right, and {option} says so"
            )
        return f"{command}\n{instead}" if instead else command


def _argument(model: str) -> str:
    """A path as an argument on a command line."""
    import shlex

    return shlex.quote(printable(model))


def _fixed(path: str) -> str:
    """A name beside it: model.fixed.weights.h5 for model.weights.h5."""
    import os

    folder, name = os.path.split(path)
    stem, dot, suffix = name.partition(".")
    return os.path.join(folder, f"{stem}.fixed{dot}{suffix}")


def as_text(explanation: Explanation) -> str:
    """The explanation for a terminal; one short line where nothing is wrong."""
    e = explanation
    head = f"{printable(e.source)} -> {printable(e.ported)}: "
    if not e.differing:
        head += f"all {e.compared} layers are the same functions"
    else:
        head += f"{len(e.differing)} of {e.compared} layers differ"
    lines = [head]
    for number, verdict in enumerate(e.verdicts, 1):
        lines += ["", f"{number}. {verdict.title}", *_body(verdict, e.compared)]
    if e.unexplained:
        lines += [
            "",
            f"{len(e.unexplained)} {_layers(e.unexplained)}: no known mistake turns the source's numbers into these.",
        ]
        lines += [f"   {line}" for line in e.leads]
    return "\n".join(lines)


def _layers(names: object) -> str:
    return "layer" if len(names) == 1 else "layers"  # type: ignore[arg-type]


def _body(verdict: Verdict, compared: int) -> list[str]:
    count = len(verdict.layers)
    where = f"all {count} layers" if count == compared > 1 else listed(verdict.layers, 4)
    lines = [f"   where:    {where}", f"   evidence: {verdict.evidence}"]
    first, *rest = verdict.repair.split("\n")
    return [*lines, f"   repair:   {first}", *(f"             {line}" for line in rest)]


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """The explanation as plain JSON values."""
    e = explanation
    return {
        "source": e.source,
        "ported": e.ported,
        "layers": e.compared,
        "differing": list(e.differing),
        "verdicts": [{**verdict._asdict(), "layers": list(verdict.layers)} for verdict in e.verdicts],
        "unexplained": list(e.unexplained),
        "leads": list(e.leads),
    }
