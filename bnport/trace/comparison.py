"""Two networks' calls compared as they come in: does a layer differ, or did its input already?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.errors import InvalidValue, listed, printable
from bnport.explain import explain
from bnport.trace.result import Own, Step, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnport.layer import Layers
    from bnport.record import Array, BatchNorm

# A network's own response to its input rounded once more, measured, is what another framework's rounding does to it, too:
# between 0.8 and 1.8 times that from ResNet-18 to ResNet-152, DenseNet and MobileNet, PyTorch against onnxruntime and
# against TensorFlow. Tenfold room, and more, is for engines that sum in another order.
FACTOR, FACTOR_16 = 32.0, 8.0
_ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROWS = 1 << 16  # positions that are compared at a time, so that float64 copies stay small


class Comparison:
    """Takes the calls of A, then those of B, and compares the two as B's come in."""

    def __init__(
        self,
        layers_a: Layers,
        layers_b: Layers,
        pairs: Mapping[str, str],
        tolerance: float | None,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.layers_a, self.layers_b, self.pairs = layers_a, layers_b, pairs
        self.tolerance, self.progress = tolerance, progress
        self.wanted = set(pairs.values())
        self.seen: dict[str, list[tuple[Array, Array, str]]] = {}
        self.calls: dict[str, int] = {}
        self.steps: list[Step] = []
        self.faults: list[str] = []
        self.not_finite = ""  # where A's first NaN or infinity was seen
        self.computes_in = "float32"
        self.noise: dict[tuple[str, int], float] = {}  # of an input of A: its response to one rounding of the network's
        self.noise_calls: dict[str, int] = {}
        self.predicted: list[tuple[str, float]] = []
        self.done = 0

    def _step(self, what: str) -> None:
        self.done += 1
        if self.progress:
            self.progress(min(self.done, 2 * len(self.pairs)), 2 * len(self.pairs), what)

    def of_a(self, name: str, x: Array, y: Array, dtype: str) -> None:
        """One call in A: kept, and held against A's own numbers."""
        if name not in self.wanted:
            return
        if not self.not_finite:
            word = "goes into" if not _finite(x) else "comes out of" if not _finite(y) else ""
            self.not_finite = word and f"first in what {word} {printable(name)}"
        record = self.layers_a[name].record
        own = _own(record, record, x, y, dtype, self.layers_a[name].dtype)
        if own.ratio > 1 and name not in self.seen:
            self.faults.append(
                f"{printable(name)} of {self.layers_a.source} does not compute its own formula ({_own_words(own)}): is it in"
                " training mode, or does it override what BatchNorm does?"
            )
        self.seen.setdefault(name, []).append((x, y, dtype))
        self._step(f"running {name}")

    def check_a(self, outputs: list[Array]) -> None:
        """Refuse NaN and infinity in A, which has run: no difference to them is a number, and nor is a measured tolerance.

        Refuse outputs without values, too, from which nothing can differ.
        Not refused as the calls come in, because Keras writes about the call around whatever is raised inside a layer.
        """
        where = self.not_finite
        if not where and not all(map(_finite, outputs)):
            where = "in its output, not in a BatchNorm layer that is compared"
        if where:
            raise InvalidValue(
                f"{printable(self.layers_a.source)}, the original, makes NaN or infinity, which no comparison survives:"
                f" {where}"
            )
        if not any(output.size for output in outputs):
            raise InvalidValue(f"{printable(self.layers_a.source)}, the original, gives no values that could differ")

    def of_b(self, name: str, x: Array, y: Array, dtype: str) -> None:
        """One call in B: compared with the same call in A."""
        if name not in self.pairs:
            return
        source, call = self.pairs[name], self.calls.get(name, 0)
        self.calls[name] = call + 1
        calls = self.seen.get(source, [])
        if call >= len(calls):
            self.faults.append(
                f"{printable(name)} is called {call + 1} times, {printable(source)} {len(calls)} times in the original"
            )
            return
        x_a, y_a, dtype_a = calls[call]
        own = _own(self.layers_a[source].record, self.layers_b[name].record, x, y, dtype, self.layers_b[name].dtype)
        self.computes_in = max((self.computes_in, dtype, dtype_a), key=lambda word: _ULP.get(word, 0.0))
        self.steps.append(
            Step(source, name, call, _difference(x_a, x), _difference(y_a, y), own, (x_a.shape, x.shape), float("nan"))
        )
        self._step(f"running {name}")

    @property
    def ulp(self) -> float:
        """One rounding of the narrowest type that either network computes in, relative."""
        return _ULP[self.computes_in]

    @property
    def factor(self) -> float:
        """How many times the response to that rounding counts as a difference."""
        return FACTOR if self.computes_in == "float32" else FACTOR_16

    def of_shaken_a(self, name: str, x: Array, y: Array, dtype: str) -> None:  # noqa: ARG002
        """One call in A with the input of the network rounded once more: how far that moves what comes in here."""
        call = self.noise_calls.get(name, 0)
        self.noise_calls[name] = call + 1
        if name in self.wanted and call < len(self.seen.get(name, [])):
            self.noise[name, call] = _difference(self.seen[name][call][0], x)

    def _limit(self, noise: float) -> float:
        return self.tolerance if self.tolerance is not None else self.factor * max(noise, self.ulp)

    def _check_noise(self, moved: float) -> None:
        """Refuse a tolerance that would be infinite: every difference would pass."""
        places = {f"what goes into {printable(name)}": noise for (name, _), noise in self.noise.items()}
        where = next((place for place, noise in {**places, "its output": moved}.items() if noise == float("inf")), None)
        if where is not None:
            raise InvalidValue(
                f"{printable(self.layers_a.source)}, the original: its input rounded once more changes {where} beyond measure"
                " (to NaN, infinity or another shape, or from zeros only), so no tolerance can be measured; give one"
                " (tolerance, --tolerance)"
            )

    def compiled(self, port: bool, outputs: list[Array], predicted: list[Array] | None) -> None:
        """What a network's compiled predict gives for the same input, where there is one: it may be stale."""
        if not all(map(_finite, outputs)):
            return  # of B, which differs by that already; NaN is not equal to itself
        pairs = zip(outputs, predicted or (), strict=False)
        source = (self.layers_b if port else self.layers_a).source
        self.predicted.append((source, max((_difference(u, v) for u, v in pairs), default=0.0)))

    def result(self, outputs_a: list[Array], outputs_b: list[Array], shaken: list[Array]) -> Trace:
        """The verdict, once both have run, and A again on a shaken input (`shaken`: its outputs, or none)."""
        moved = max((_difference(u, v) for u, v in zip(outputs_a, shaken, strict=False)), default=0.0)
        self._check_noise(moved)
        tolerance = self._limit(moved)
        self.steps = [s._replace(tolerance=self._limit(self.noise.get((s.a, s.call), 0.0))) for s in self.steps]
        self.seen.clear()
        notes = []
        not_compared = ""
        if self.tolerance is None and tolerance >= 1:
            not_compared = (
                f"the original's output changes by {moved:.2g} of its size when its input is rounded once more, so that any"
                " output at all would agree: only the BatchNorm layers were compared. Compare what is less sensitive (the"
                " numbers before an argmax), or give a tolerance"
            )
        called = {step.b for step in self.steps}
        uncalled = [name for name in self.pairs if name not in called]
        if uncalled:
            notes.append(f"{listed(uncalled, 4)}: not seen in both networks while they ran")
        difference = float("inf")
        if len(outputs_a) == len(outputs_b):
            difference = max((_output_difference(u, v) for u, v in zip(outputs_a, outputs_b, strict=True)), default=0.0)
        else:
            self.faults.append(f"{len(outputs_a)} outputs in the original, {len(outputs_b)} in the port")
        wrong = [step for step in self.steps if step.layer_differs]
        explanation = None
        if wrong:
            pairs = {step.b: step.a for step in wrong}
            explanation = explain(self.layers_a, self.layers_b, pairs, live=True)
        self.faults += [fault for _, fault in sorted([*self._of_layers(wrong), *self._of_inputs()])]
        self.faults += [_stale(source, apart) for source, apart in self.predicted if not apart <= tolerance]
        if not difference <= tolerance and not self.faults:
            after = f"after the last BatchNorm layer, {printable(self.steps[-1].b)}" if self.steps else "somewhere"
            self.faults.append(
                f"the networks part {after}: their outputs differ by {difference:.2g}, and every BatchNorm layer agrees; look"
                " at the layers that follow it (pooling, flattening order, dense kernels)"
            )
        if self.progress:
            self.progress(2 * len(self.pairs), 2 * len(self.pairs), "")
        return Trace(
            self.layers_a.source, self.layers_b.source, tuple(self.steps), difference, tolerance, tuple(self.faults),
            tuple(notes), explanation, not_compared,
        )  # fmt: skip

    def _of_layers(self, wrong: list[Step]) -> Iterable[tuple[int, str]]:
        for step in wrong:
            yield (
                self.steps.index(step),
                f"{printable(step.b)} is another function than {printable(step.a)}: {_own_words(step.own)}",
            )

    def _of_inputs(self) -> Iterable[tuple[int, str]]:
        """Where an input differs although everything known to lead to it agrees."""
        by_name = {step.b: step for step in self.steps if step.call == 0}
        for number, step in enumerate(self.steps):
            if not step.input_differs:
                continue
            before = self.layers_b[step.b].inputs
            known = list(self.steps[:number])  # without a graph, all that ran earlier may lead here
            if before is not None:
                known = [by_name[name] for name in before if name in by_name]
            if any(earlier.output_differs for earlier in known):
                continue
            yield number, self._input_fault(step, number, before)

    def _input_fault(self, step: Step, number: int, before: tuple[str, ...] | None) -> str:
        if before is None:
            where = f"after {printable(self.steps[number - 1].b)}" if number else "between the network's input and it"
        else:
            where = f"between {listed(before, 3)} and it" if before else "between the network's input and it"
        if step.shapes[0] != step.shapes[1]:
            what = f"its input has shape {step.shapes[1]}, in the original {step.shapes[0]} (channels last)"
            why = "padding, a stride or the size of the image"
        else:
            what = f"its input already differs by {step.input_difference:.2g}"
            why = "padding, a kernel" if number or before else "preprocessing, padding, a kernel"
        return f"before {printable(step.b)}: {what}; the fault lies {where}: {why}"


def _own(reference: BatchNorm, held: BatchNorm, x: Array, y: Array, dtype: str, stored: str) -> Own:
    """y against reference(x), for the place of the largest error over bound; in float64, some positions at a time."""
    worst = Own(0.0, 0, 0.0, 0.0)
    if x.shape != y.shape or x.shape[-1] != reference.channels:
        return Own(float("inf"), 0, float("nan"), float("nan"))
    rows_x, rows_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for start in range(0, len(rows_x), _ROWS):
        seen, got = rows_x[start : start + _ROWS].astype(np.float64), rows_y[start : start + _ROWS].astype(np.float64)
        expected = reference(seen)
        bound = held.error_bound(seen, output_dtype=dtype) + held.storage_bound(seen, dtype=stored)
        with np.errstate(invalid="ignore"):
            ratio = np.abs(got - expected) / bound
        both = np.isnan(expected) & np.isnan(got) | (expected == got)  # NaN and infinity: passed on as they were given
        ratio = np.where(both, 0.0, np.where(np.isnan(ratio), np.inf, ratio))
        at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        if ratio[at] > worst.ratio:
            worst = Own(float(ratio[at]), int(at[1]), float(expected[at]), float(got[at]))
    return worst


def _stale(source: str, difference: float) -> str:
    return (
        f"{printable(source)}: predict gives other outputs than calling the model (they differ by {difference:.2g}): its"
        " compiled function is older than the layers' epsilon; model.compile() or model.predict_function = None makes it anew"
    )


def _own_words(own: Own) -> str:
    return f"channel {own.channel}: {own.expected:.7g} expected, {own.got:.7g} got, {own.ratio:.3g} times the bound"


def _finite(a: Array) -> bool:
    return a.dtype.kind not in "fc" or bool(np.isfinite(a).all())


def _difference(a: Array, b: Array) -> float:
    """Root mean square of a - b over that of a; inf where the shapes differ or something is not finite."""
    if a.shape != b.shape:
        return float("inf")
    if not a.size:
        return 0.0
    one, other = a.reshape(-1), b.reshape(-1)
    top = bottom = 0.0
    for start in range(0, one.size, 1 << 22):
        u, v = one[start : start + (1 << 22)].astype(np.float64), other[start : start + (1 << 22)].astype(np.float64)
        top, bottom = top + float(np.sum((u - v) ** 2)), bottom + float(np.sum(u**2))
    if top == 0:
        return 0.0
    ratio = (top / bottom) ** 0.5 if 0 < bottom < float("inf") else float("inf")
    return ratio if ratio == ratio else float("inf")


def _output_difference(a: Array, b: Array) -> float:
    """The difference of two outputs, wherever each has its channels: the arrangement in which they agree best."""
    ways = [(a, b)]
    if a.ndim == b.ndim and a.ndim > 2:
        ways += [(np.moveaxis(a, 1, -1), b), (a, np.moveaxis(b, 1, -1))]
    return min(_difference(one, other) for one, other in ways)
