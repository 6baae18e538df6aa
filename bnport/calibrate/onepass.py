"""Statistics in one pass, every selected layer normalising by the batch it sees, as in training.

With n_b, m_b and v_b the number, mean and variance (1 / n_b) of a channel's inputs in call b of B, N = sum n_b:

    precise   mean = sum (n_b / N) m_b           variance = sum (n_b / N) (v_b + (m_b - mean)**2)
              the moments of all inputs pooled; unbiased: times N / (N - 1). What fvcore's PreciseBN intends
    average   mean = sum (n_b / N) m_b           variance = sum (n_b / N) v_b
              the average of batch statistics; unbiased: v_b times n_b / (n_b - 1). torch's update_bn with batches of
              one size (unbiased, as torch's BatchNorm is); it counts a short last batch like a full one, this does not
    moving    s = momentum * s + (1 - momentum) * (m_b, v_b), from the stored values on, with the layer's own momentum;
              unbiased: v_b times n_b / (n_b - 1). What calling the model with training=True leaves behind

Only BatchNorm is put into training: dropout and the like stay at inference, so that nothing random enters. Batch
statistics are computed in float64 and stored into the layer before it is called at inference; Keras' own training call
computes them in float32, and is off by 500 times the variance at mean / std = 1e4 on TensorFlow.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.calibrate.graph import DATA, Step, steps_of
from bnport.calibrate.looking import Looking, run
from bnport.calibrate.models import Stop, hooked
from bnport.calibrate.moments import Tree
from bnport.errors import BnportError, InvalidValue, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bnport.calibrate.frontier import Progress
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.moments import Moments
    from bnport.record import Array

METHODS = ("precise", "average", "moving")


class Pooled:
    """Moments of all inputs together."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        self.unbiased, self.tree = unbiased, Tree()
        del norm

    def add(self, batch: Moments) -> None:
        """One call's moments."""
        self.tree.add(batch)

    def result(self) -> tuple[Array, Array]:
        """(mean, variance)."""
        moments = self.tree.result()
        return moments.mean, moments.variance(self.unbiased)

    def to_arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return self.tree.to_arrays()

    def from_arrays(self, arrays: Any) -> None:
        """From a checkpoint."""
        self.tree = Tree.from_arrays(arrays)


class Averaged:
    """The average of batch statistics, weighted by how many numbers each was taken from."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        self.unbiased, self.n = unbiased, 0
        self.mean, self.variance = np.zeros((2, norm.channels))

    def _share(self, batch: Moments) -> float:
        self.n += batch.n
        return batch.n / self.n

    def add(self, batch: Moments) -> None:
        """One call's moments."""
        if batch.n <= self.unbiased:
            if batch.n:
                raise InvalidValue("a batch with one number per channel has no unbiased variance; use larger batches")
            return
        share = self._share(batch)
        self.mean = self.mean + (batch.mean - self.mean) * share
        self.variance = self.variance + (batch.variance(self.unbiased) - self.variance) * share

    def result(self) -> tuple[Array, Array]:
        """(mean, variance)."""
        return self.mean, self.variance

    def to_arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {"n": np.array(self.n), "mean": self.mean, "variance": self.variance}

    def from_arrays(self, arrays: Any) -> None:
        """From a checkpoint."""
        self.n = int(arrays["n"])
        for name in ("mean", "variance"):
            value = np.array(arrays[name], np.float64)
            if value.shape != self.mean.shape:
                raise InvalidValue(f"{self.mean.shape[0]} channels expected, {value.shape} stored")
            setattr(self, name, value)


class Moving(Averaged):
    """The exponential average, from the statistics that the layer holds."""

    def __init__(self, norm: Norm, unbiased: bool) -> None:
        super().__init__(norm, unbiased)
        self.momentum = norm.momentum
        self.mean, self.variance = norm.read()
        if not (
            np.isfinite(self.mean).all()
            and np.isfinite(self.variance).all()
            and (self.variance + norm.epsilon > 0).all()
        ):
            raise InvalidValue(
                f"{printable(norm.name)}: method 'moving' starts from the stored statistics, and these are not usable; use"
                " 'population', 'precise' or 'average'"
            )

    def _share(self, batch: Moments) -> float:
        self.n += batch.n
        return 1.0 - self.momentum


_KINDS: dict[str, Callable[[Norm, bool], Pooled | Averaged]] = {
    "precise": Pooled,
    "average": Averaged,
    "moving": Moving,
}


class OnePass:
    """One run of `method`; `run` does it. The layers hold the last batch's statistics until `finish`.

    batches: how many have been seen, this run's and those of the run it resumes.
    """

    def __init__(self, live: LiveModel, selected: list[Norm], method: str, *, unbiased: bool = False) -> None:
        self.live, self.selected = live, selected
        self.kept = {norm.name: _KINDS[method](norm, unbiased) for norm in selected}
        self.batches = 0

    def _hook(self, norm: Norm, original: Callable[..., Any], x: Any, mask: Any, args: Any, kwargs: Any) -> Any:
        try:
            batch = self.live.moments(norm, x, mask)
            self.kept[norm.name].add(batch)
            if batch.n:
                norm.write(batch.mean, batch.variance())
        except Stop:
            raise
        except BnportError as error:
            text = str(error)
            raise Stop(type(error)(text if text.startswith(norm.name) else f"{printable(norm.name)}: {text}")) from None
        return original(x, *args, **kwargs)

    def run(
        self,
        batches: Iterable[Any],
        *,
        hint: int = 0,
        progress: Progress | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Put all batches through the model. `hint` is their number if known (0: not), for progress."""
        step: Step = _whole(self.live)
        steps, _ = steps_of(self.live)
        if any(step.norms and not step.whole for step in steps):
            batches = self._looked_into(step, iter(batches))  # before the hooks below are in place
        with hooked(self.selected, self._hook):
            for batch in batches:
                try:
                    run(step, [batch])
                except Stop as stop:
                    raise (stop.error or InvalidValue(f"{self.live.what}: interrupted")) from None
                self.batches += 1
                if progress is not None:
                    progress(self.batches, max(hint, self.batches) if hint else 0, f"batch {self.batches}")
                if after_batch is not None:
                    after_batch()
        if not self.batches:
            raise InvalidValue("no data: there was not a single batch")

    def _looked_into(self, step: Step, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; on the first it was seen whether every layer can be reached: if not, tf.functions run eagerly."""
        first = list(itertools.islice(batches, 1))
        for batch in first:
            Looking(self.live, step, self.selected).calls([batch])
        return itertools.chain(first, batches)

    def count(self, norm: Norm) -> int:
        """How many numbers per channel a layer has seen."""
        kept = self.kept[norm.name]
        return kept.tree.n if isinstance(kept, Pooled) else kept.n

    def finish(self) -> list[Norm]:
        """Write the results into the layers; returns those that inference never called, which hold what they held."""
        unused = []
        for norm in self.selected:
            if self.count(norm):
                norm.write(*self.kept[norm.name].result())
            else:
                unused.append(norm)
        return unused


def _whole(live: LiveModel) -> Step:
    return Step(live.what, (DATA,), (DATA + 1,), lambda values: [live.call(values[0])], (), False)
