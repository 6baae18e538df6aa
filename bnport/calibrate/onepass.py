"""Statistics in one pass, every selected layer normalising by the batch it sees, as in training.

With n_b, m_b and v_b the number, mean and variance (1 / n_b) of a channel's inputs in batch b of B, N = sum n_b:

    precise   mean = sum (n_b / N) m_b           variance = sum (n_b / N) (v_b + (m_b - mean)**2)
              the moments of all inputs pooled; unbiased: times N / (N - 1). What fvcore's PreciseBN intends
    average   mean = sum (n_b / N) m_b           variance = sum (n_b / N) v_b
              the average of batch statistics; unbiased: v_b times n_b / (n_b - 1). torch's update_bn with batches of
              one size (unbiased, as torch's BatchNorm is); it counts a short last batch like a full one, this does not
    moving    s = momentum * s + (1 - momentum) * (m_b, v_b), b = 1 ... B, from the stored values on, with the layer's
              own momentum; unbiased: v_b times n_b / (n_b - 1). What calling the model with training=True leaves behind.
              Computed as momentum**B * s + (1 - momentum) * sum momentum**(B - b) (m_b, v_b)

A layer that is called several times in a batch counts every call, in order. A batch in which it sees nothing (a mask that
leaves no position) has n_b = 0 and is left out; there the layer normalises by what was stored before the run.

Only BatchNorm is put into training: dropout and the like stay at inference, so that nothing random enters. Batch
statistics are computed in float64; Keras' own training call computes them in float32, and is off by 500 times the variance
at mean / std = 1e4 on TensorFlow. Nor is what a selected layer hands on left to Keras, which rounds the mean to float32
first, by up to 3e-4 standard deviations there. With h = float32(m_b), l = float32(m_b - h), s = float32(gamma /
sqrt(v_b + epsilon)), and all in float32 (float64 for a layer of float64)::

    y = ((x - h) - l) * s + beta        every element within 3 * 2**-23 * (|y - beta| + |y|) of exact

masked positions too, as Keras has it; then cast to the layer's compute dtype.

No batch's statistics depend on another batch. All three sums are therefore taken of values that merge (moments.Moments,
averages.Updates), in the fixed tree over the batches' numbers: runs of 2**k batches may be measured by different processes,
in any order, and the result has the same bits (see shards.py).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Generic

from bnport._lazy import np
from bnport.calibrate.averages import Updates, UpdatesTree
from bnport.calibrate.graph import steps_of, whole_model
from bnport.calibrate.hooks import hooked
from bnport.calibrate.looking import Looking, run
from bnport.calibrate.models import Stop
from bnport.calibrate.moments import Moments, Tree
from bnport.calibrate.tree import Value
from bnport.errors import BnportError, FormatError, InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bnport.calibrate.frontier import Progress
    from bnport.calibrate.graph import Step
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.tree import FixedTree
    from bnport.record import Array

METHODS = ("precise", "average", "moving")


class Kept(Generic[Value]):
    """What one layer has seen: the tree over the batches that are complete, and the batch under way."""

    def __init__(self, norm: Norm, unbiased: bool, tree: FixedTree[Value], nothing: Value) -> None:
        self.norm, self.unbiased = norm, unbiased
        self.tree: FixedTree[Value] = tree
        self._batch: Value = nothing
        self._nothing: Value = nothing

    def value(self, call: Moments) -> Value:
        """One call's moments as a value of the tree."""
        raise NotImplementedError

    def result(self) -> tuple[Array, Array]:
        """(mean, variance) of all complete batches."""
        raise NotImplementedError

    def add(self, call: Moments) -> None:
        """The next call in this batch."""
        if call.n:
            self._batch = self._batch.merge(self.value(call))

    def end_batch(self) -> None:
        """The batch is complete; one value for every batch, so that the tree has the same shape for every layer."""
        self.tree.add(self._batch)
        self._batch = self._nothing

    def add_run(self, stored: bytes, level: int) -> None:
        """The next 2**level batches as another process has stored them: to_bytes() of its tree's result."""
        value = self.tree.kind.from_bytes(stored)
        self._check(value)
        self.tree.add(value, level)

    def _check(self, value: Value) -> None:
        if value.channels != self.norm.channels:
            raise FormatError(
                f"{printable(self.norm.name)}: {value.channels} channels stored, it has {self.norm.channels}"
            )

    def to_arrays(self) -> dict[str, Array]:
        """For a checkpoint, between two batches."""
        return self.tree.to_arrays()

    def from_arrays(self, arrays: Any, batches: int) -> None:
        """From a checkpoint that was made after so many batches."""
        tree = type(self.tree).from_arrays(arrays)
        if tree.blocks != batches:
            raise FormatError(f"{printable(self.norm.name)}: {tree.blocks} batches stored, of {batches}")
        if batches:
            self._check(tree.result())
        self.tree = tree


class Pooled(Kept[Moments]):
    """Moments of all inputs together."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        super().__init__(norm, unbiased, Tree(), Moments(0, *np.zeros((2, norm.channels))))

    def value(self, call: Moments) -> Moments:
        """The moments as they are."""
        return call

    def result(self) -> tuple[Array, Array]:
        """(mean, variance)."""
        moments = self.tree.result()
        return moments.mean, self.norm.variance(moments, self.unbiased)


class Averaged(Kept[Updates]):
    """The average of batch statistics, weighted by how many numbers each was taken from."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        super().__init__(norm, unbiased, UpdatesTree(), Updates(0, 1.0, *np.zeros((2, norm.channels))))

    def value(self, call: Moments) -> Updates:
        """A call as an update of the statistics."""
        if call.n <= self.unbiased:
            raise InvalidValue(
                "a batch with one number per channel has no unbiased variance; make every batch larger, also the last"
            )
        keep, weight = self.weights(call.n)
        return Updates(call.n, keep, weight * call.mean, weight * call.variance(self.unbiased))

    def weights(self, n: int) -> tuple[float, float]:
        """(of what came before, of this call), for a call with n numbers per channel."""
        return 1.0, float(n)

    def result(self) -> tuple[Array, Array]:
        """(mean, variance)."""
        updates = self.tree.result()
        return updates.mean / updates.n, updates.variance / updates.n


class Moving(Averaged):
    """The exponential average, from the statistics that the layer held before the run."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        super().__init__(norm, unbiased)
        self.momentum = norm.momentum
        self.mean, self.variance = norm.read()
        if not 0 <= self.momentum <= 1:
            raise InvalidValue(f"{printable(norm.name)}: momentum {self.momentum} is not between 0 and 1")
        if not (
            np.isfinite(self.mean).all()
            and np.isfinite(self.variance).all()
            and (self.variance + norm.epsilon > 0).all()
        ):
            raise InvalidValue(
                f"{printable(norm.name)}: method 'moving' starts from the stored statistics, and these are not usable; use"
                " 'population', 'precise' or 'average'"
            )

    def weights(self, n: int) -> tuple[float, float]:
        """The same for every call."""
        del n
        return self.momentum, 1.0 - self.momentum

    def result(self) -> tuple[Array, Array]:
        """(mean, variance)."""
        updates = self.tree.result()
        return updates.keep * self.mean + updates.mean, updates.keep * self.variance + updates.variance


_KINDS: dict[str, Callable[[Norm, bool], Pooled | Averaged]] = {
    "precise": Pooled,
    "average": Averaged,
    "moving": Moving,
}


class OnePass:
    """One run of `method`; `run` does it. The layers hold what they held until `finish`.

    batches: how many have been seen, this run's and those of the run it resumes.
    """

    def __init__(self, live: LiveModel, selected: list[Norm], method: str, *, unbiased: bool = False) -> None:
        self.live, self.selected = live, selected
        self.kept = {norm.name: _KINDS[method](norm, unbiased) for norm in selected}
        self.batches = 0

    def _hook(self, norm: Norm, original: Callable[..., Any], x: Any, mask: Any, args: Any, kwargs: Any) -> Any:
        try:
            call = self.live.moments(norm, x, mask)
        except BnportError as error:  # it names the layer
            raise Stop(error) from None
        try:
            self.kept[norm.name].add(call)
            if call.n:
                return self._normalised(norm, x, call)
        except BnportError as error:
            raise Stop(type(error)(f"{printable(norm.name)}: {error}")) from None
        norm.restore()  # Keras updates what a model itself calls with training=True
        return original(x, *args, **kwargs)

    def _normalised(self, norm: Norm, x: Any, call: Moments) -> Any:
        """The layer's output for one batch, normalised by its moments: the formula of the module."""
        live = self.live
        dtype = np.dtype("float64" if "float64" in str(x.dtype) else "float32")
        gamma, beta = norm.affine()
        high = call.mean.astype(dtype)
        low = (call.mean - high + call.mean_low).astype(dtype)
        with np.errstate(divide="ignore"):  # a constant channel without epsilon: not finite, as Keras has it
            scale = (gamma / np.sqrt(call.variance() + norm.epsilon)).astype(dtype)
        shape = [1] * len(x.shape)
        shape[norm.axis] = norm.channels
        h, rest, s, b = (live.tensor(array.reshape(shape)) for array in (high, low, scale, beta.astype(dtype)))
        return live.cast(((live.cast(x, dtype.name) - h) - rest) * s + b, live.output_dtype(norm, x))

    def run(
        self,
        batches: Iterable[Any],
        *,
        hint: int = 0,
        progress: Progress | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Put all batches through the model. `hint` is their number if known (0: not), for progress."""
        step = whole_model(self.live)
        resumed = self.batches > 0
        steps, _ = steps_of(self.live)
        if any(step.norms and not step.whole for step in steps):
            batches = self._looked_into(step, iter(batches))  # before the hooks below are in place
        with hooked(self.selected, self._hook):
            for batch in batches:
                try:
                    run(step, [batch])
                except Stop as stop:
                    raise (stop.error or InvalidValue(f"{self.live.what}: interrupted")) from None
                for kept in self.kept.values():
                    kept.end_batch()
                self.batches += 1
                if resumed:
                    self._independent()
                if progress is not None:
                    progress(self.batches, max(hint, self.batches) if hint else 0, f"batch {self.batches}")
                if after_batch is not None:
                    after_batch()
        if not self.batches:
            raise InvalidValue("no data: there was not a single batch")

    def _independent(self) -> None:
        """Refuse to go on in the middle of the data where a batch depends on those before it."""
        moved = [] if self.live.states is None else self.live.states.moved()
        changed = [held.name for held in moved if held.kind == "state"]
        if changed:
            raise InvalidValue(
                f"{printable(changed[0])}: keeps a state from batch to batch, which the checkpoint does not hold; delete the"
                " checkpoint and start anew"
            )

    def _looked_into(self, step: Step, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; on the first it was seen whether every layer can be reached: if not, tf.functions run eagerly."""
        first = list(itertools.islice(batches, 1))
        for batch in first:
            Looking(self.live, step, self.selected).calls([batch])
        return itertools.chain(first, batches)

    def add_run(self, stored: dict[str, bytes], level: int) -> None:
        """The next 2**level batches as another process has seen them: `results` of its OnePass, after just these."""
        if set(stored) != set(self.kept):
            raise InvalidValue(f"{self.live.what}: another process has measured other layers than these")
        for name, kept in self.kept.items():
            kept.add_run(stored[name], level)
        self.batches += 1 << level

    def results(self) -> dict[str, bytes]:
        """Per layer, what all batches so far have come to."""
        return {name: kept.tree.result().to_bytes() for name, kept in self.kept.items()}

    def count(self, norm: Norm) -> int:
        """How many numbers per channel a layer has seen."""
        return self.kept[norm.name].tree.n

    def finish(self) -> list[Norm]:
        """Write the results into the layers; returns those that inference never called, which hold what they held."""
        unused = []
        for norm in self.selected:
            if self.count(norm):
                norm.write(*self.kept[norm.name].result())
            else:
                unused.append(norm)
        return unused
