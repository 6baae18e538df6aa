"""Looking into one step of a model: which BatchNorm layers it calls, in which order, and the moments of their inputs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.calibrate.hooks import hooked, in_training
from bnport.calibrate.models import Stop
from bnport.calibrate.moments import Tree
from bnport.errors import BnportError, InvalidValue, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence
    from concurrent.futures import Executor, Future

    from bnport.calibrate.graph import Step
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.moments import Moments


BEHIND = 2  # batches that may wait for the pool: they are held in memory


class Use:
    """One call of a BatchNorm layer within a step.

    after:    numbers of the earlier calls in the same step that its input may depend on.
    training: whether it is called with training=True also at inference.
    tree:     the moments of its input so far.
    done:     whether all batches have been seen.
    """

    __slots__ = ("after", "done", "norm", "training", "tree")

    def __init__(self, norm: Norm, after: set[int], training: bool) -> None:
        self.norm, self.after, self.training = norm, after, training
        self.tree, self.done = Tree(), False


class Looking:
    """One step with `norms`, the layers in it whose statistics are wanted.

    A step that is a BatchNorm layer has one use. Otherwise the first batch shows the calls, in order; a call may depend
    on every earlier one. Where a layer is called more than once that is too strict, and what really depends on what is
    found by spoiling the output of one call after the other and seeing which inputs change.

    pool: one thread that takes moments while the framework goes on; None: in line. The bits are the same.
    """

    def __init__(self, live: LiveModel, step: Step, norms: Sequence[Norm]) -> None:
        self.live, self.step, self.norms = live, step, norms
        self.pool: Executor | None = None
        self._pending: deque[Future[Moments]] = deque()
        self._training: list[bool] = []  # of the calls that `calls` found
        self.uses: list[Use] | None = [Use(norms[0], set(), step.training)] if step.whole else None

    def targets(self, unknown: Container[int]) -> list[int]:
        """Calls that can be measured now; `unknown` holds the ids of the layers that have no statistics yet."""
        if self.uses is None:
            return []
        uses = self.uses
        return [
            number
            for number, use in enumerate(uses)
            if not use.done and not any(id(uses[k].norm) in unknown for k in use.after)
        ]

    def measure(self, inputs: list[Any], targets: Sequence[int]) -> None:
        """Run the step on one batch as far as the last of the `targets`, adding the moments of their inputs."""
        assert self.uses is not None  # for the type checker: trace came first
        if self.step.whole and len(inputs) == 1 and self.live.as_it_is(self.norms[0].layer, inputs[0]):
            self._measure_directly(inputs[0])  # most layers: nothing happens to the input before their call sees it
            return
        uses, wanted, last, calls = self.uses, set(targets), max(targets), -1

        def hook(norm: Norm, original: Callable[..., Any], x: Any, mask: Any, args: Any, kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= len(uses) or uses[calls].norm is not norm:
                raise Stop(self._changed())
            if calls in wanted:
                try:
                    uses[calls].tree.add(self.live.moments(norm, x, mask))
                except BnportError as error:
                    raise Stop(error) from None
            if calls == last:
                raise Stop
            return original(x, *args, **kwargs)

        try:
            with hooked([use.norm for use in uses], hook):
                run(self.step, inputs)
        except Stop as stop:
            if stop.error is not None:
                raise stop.error from None
            return
        raise self._changed()

    def _measure_directly(self, x: Any) -> None:
        try:
            array = self.live.values(self.norms[0], x)
        except Stop as stop:
            raise stop.error or self._changed() from None
        if self.pool is None:
            self._add(self.live.moments_of(self.norms[0], array))
            return
        self._pending.append(self.pool.submit(self.live.moments_of, self.norms[0], array))
        self.collect(BEHIND)

    def collect(self, behind: int = 0) -> None:
        """Add the moments that the pool has been given, in order, until at most `behind` are still to come."""
        while len(self._pending) > behind:
            self._add(self._pending.popleft().result())

    def _add(self, moments: Moments) -> None:
        for use in self.uses or ():
            use.tree.add(moments)

    def _changed(self) -> InvalidValue:
        return InvalidValue(f"{printable(self.step.name)}: does not call its BatchNorm layers alike for every batch")

    def trace(self, inputs: list[Any]) -> None:
        """Find the calls, on one batch."""
        calls, before = self.calls(inputs)
        training = self._training
        earlier = [set(range(k)) for k in range(len(calls))]
        if len({id(norm) for norm in calls}) < len(calls):
            for spoiled in range(len(calls)):
                _, now = self._calls(inputs, spoiled)
                for k in range(spoiled + 1, len(calls)):
                    if k >= len(now) or now[k] == before[k]:
                        earlier[k].discard(spoiled)
        self.uses = [Use(*use) for use in zip(calls, earlier, training, strict=True)]

    def calls(self, inputs: list[Any]) -> tuple[list[Norm], list[bytes]]:
        """The layers that one batch calls, in order, and digests of their inputs; also those inside a tf.function."""
        found = self._calls(inputs, None)
        if {id(norm) for norm in found[0]} != {id(norm) for norm in self.norms} and self.live.open_functions():
            found = self._calls(inputs, None)
        return found

    def _calls(self, inputs: list[Any], spoiled: int | None) -> tuple[list[Norm], list[bytes]]:
        """The layers called, in order, and a digest of each input, the output of call number `spoiled` made NaN.

        A layer that keeps a state sees this batch again later: the state is put back.
        """
        import hashlib

        calls: list[Norm] = []
        digests: list[bytes] = []
        self._training = []

        def hook(norm: Norm, original: Callable[..., Any], x: Any, _: Any, args: Any, kwargs: Any) -> Any:
            array = self.live.values(norm, x)
            calls.append(norm)
            self._training.append(in_training(norm, original, x, args, kwargs))
            digests.append(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())
            out = original(x, *args, **kwargs)
            return out * float("nan") if len(calls) - 1 == spoiled else out

        try:
            with self.live.untouched(), hooked(self.norms, hook):
                run(self.step, inputs)
        except Stop as stop:
            if stop.error is not None:
                raise stop.error from None
        return calls, digests


def run(step: Step, inputs: list[Any]) -> Sequence[Any]:
    """The outputs of one step. What a framework raises becomes an InvalidValue that names the step."""
    try:
        return step.run(inputs)
    except BnportError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AssertionError) as error:
        raise failed(step.name, error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("tensorflow", "jaxlib", "jax", "torch", "keras", "tf_keras"):
            raise
        raise failed(step.name, error) from error


def failed(name: str, error: Exception) -> InvalidValue:
    """A framework's exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = "; ".join(lines[:2]) or type(error).__name__
    return InvalidValue(f"{printable(name)}: does not run on this data: {printable(said, 500)}")


def same_name(norms: Sequence[Norm]) -> str:
    """The names, for a message."""
    return listed(dict.fromkeys(norm.name for norm in norms), 3)
