"""Exact population statistics by carrying the frontier forward: every operation runs once over all the data.

Population statistics: for every BatchNorm layer l and channel c, over all N inputs x_l that reach it (samples, and
positions within them)::

    mean_l = (1 / N) sum x_l        variance_l = (1 / N) sum (x_l - mean_l)**2      (1 / (N - 1) if unbiased)

where x_l is computed at inference, with the population statistics of all layers before l already in place. That is what
an inference run will really see. The plain way runs the model up to l once per layer: K layers, about K / 2 forward
passes. Here the activations that a layer is waiting on (the frontier) are kept, and work goes on from them::

    round 1    every batch: all operations up to the first BatchNorm layers; their inputs are kept, and their moments
    ...        these layers get their statistics
    round r    every batch: on from what was kept, up to the next BatchNorm layers

Layers that do not depend on each other share a round (49 rounds for the 53 layers of a ResNet-50). The same operations
run on the same tensors in the same order as in the plain way, so the result is the same bit for bit.

A layer that is used several times is measured at all its uses, pooled. If one use feeds another, no statistics satisfy
the definition without a fixed point, and the layer is refused; so is one that inference calls with training=True at one
use only, because there it changes what the others normalise by. A step without a graph (a subclassed model or a custom
layer with BatchNorm inside) falls back to prefix passes of that step alone, one per layer in it: slower, the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport.calibrate.graph import DATA, needed, steps_of
from bnport.calibrate.looking import Looking, run, same_name
from bnport.calibrate.models import below
from bnport.calibrate.moments import Moments, merge_all
from bnport.errors import InvalidValue, Unrepresentable, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bnport.calibrate.graph import Step
    from bnport.calibrate.models import LiveModel, Norm
    from bnport.calibrate.states import Held
    from bnport.calibrate.store import Store

    Progress = Callable[[int, int, str], None]


class Frontier:
    """One run of the population method; `run` does it. Statistics are written into the layers as they become known.

    known:       moments of layers that an interrupted run had finished, by name; their rounds are passed over.
    after_round: called with all moments known so far, after every round.
    moments:     the result so far, by layer name.
    unused:      selected layers that inference never calls.
    """

    def __init__(
        self,
        live: LiveModel,
        selected: list[Norm],
        store: Store,
        *,
        unbiased: bool = False,
        known: dict[str, Moments] | None = None,
        progress: Progress | None = None,
        after_round: Callable[[dict[str, Moments]], None] | None = None,
    ) -> None:
        self.live, self.store, self.unbiased = live, store, unbiased
        self.progress, self.after_round = progress, after_round
        self.moments: dict[str, Moments] = {}
        self.unused: list[Norm] = []
        self._given: list[Norm] = []  # the layers that have their statistics
        self.open = {id(norm): norm for norm in selected}
        for norm in selected:
            if known and norm.name in known:
                self._finish(norm, known[norm.name])
        steps, self.taken_apart = steps_of(live)
        self.steps = needed(steps, set(self.open))
        self.executed: set[int] = set()  # ids of steps
        self._used = {key for step in self.steps for key in step.inputs}
        self.looking = {
            id(step): Looking(live, step, norms) for step in self.steps if (norms := self._open_in(step, self.open))
        }
        self._places: dict[int, list[Looking]] = {key: [] for key in self.open}  # where each layer is called, by its id
        for looking in self.looking.values():
            for norm in looking.norms:
                self._places[id(norm)].append(looking)
        for key in [key for key, places in self._places.items() if not places]:  # a part of the model, not of its graph
            self.unused.append(self.open.pop(key))
        for norm in self.open.values():
            self._refuse_both(norm)
        self.rounds = self.batches = 0
        self.expected_rounds = self._count_rounds()
        self._work = self._hint = 0

    @staticmethod
    def _open_in(step: Step, unknown: dict[int, Norm]) -> list[Norm]:
        return [norm for norm in step.norms if id(norm) in unknown]

    def _finish(self, norm: Norm, moments: Moments) -> None:
        norm.take(moments, self.unbiased)
        self.moments[norm.name] = moments
        self._given.append(norm)
        del self.open[id(norm)]

    def _count_rounds(self) -> int:
        """How many rounds there will be. A shared layer of which one use feeds another is refused here, before any data."""
        unknown, have, executed, rounds = dict(self.open), {DATA}, set[int](), 0
        while unknown:
            for step in self.steps:
                if id(step) not in executed and have.issuperset(step.inputs) and not self._open_in(step, unknown):
                    executed.add(id(step))
                    have.update(step.outputs)
            reached = [step for step in self.steps if have.issuperset(step.inputs)]
            waiting = {id(norm) for step in self.steps if not have.issuperset(step.inputs) for norm in step.norms}
            ready = [key for key in unknown if key not in waiting]
            if not ready:
                raise self._loop()
            rounds += max([1, *(len(self._open_in(step, unknown)) for step in reached if not step.whole)])
            for key in ready:
                del unknown[key]
        looks = sum(1 if looking.step.whole else len(looking.norms) for looking in self.looking.values())
        self._work_per_batch = len(executed) + looks
        return rounds

    def _loop(self) -> Unrepresentable:
        norms = list(self.open.values())
        shared = [norm for norm in norms if sum(norm in step.norms for step in self.steps) > 1]
        return Unrepresentable(
            f"{same_name(shared or norms)}: used several times, and one use feeds another, so that its population"
            " statistics would depend on themselves; use method='precise', or leave the layer out with layers="
        )

    def _refuse_both(self, norm: Norm) -> None:
        """Refuse a layer that inference calls both ways: one call moves what the other normalises by, with every batch."""
        uses = [use for looking in self._places[id(norm)] for use in looking.uses or () if use.norm is norm]
        if len({use.training for use in uses}) > 1:
            raise Unrepresentable(
                f"{printable(norm.name)}: inference calls it with training=True and without, and the former changes the"
                " statistics that the latter normalises by, with every batch; leave the layer out with layers=, or freeze"
                " it (trainable=False, and frozen=True here)"
            )

    # ---- rounds

    def run(self, batches: Iterable[Any], hint: int = 0) -> dict[str, Moments]:
        """Moments per layer name. `batches` is read once; `hint` is their number if known (0: not), for progress."""
        from concurrent.futures import ThreadPoolExecutor

        self._hint = hint
        source: Iterator[Any] | None = iter(batches)
        have = {DATA}
        with ThreadPoolExecutor(1) as pool:
            for looking in self.looking.values():
                looking.pool = pool
            while self.open:
                have = self._round(have, source)
                source = None
        for norm in self._given:  # Keras updates what a model itself calls with training=True
            norm.take(self.moments[norm.name], self.unbiased)
        return self.moments

    def _plan(self, have: set[int]) -> list[tuple[Step, Looking | None]]:
        """This round's steps in order; a step with a Looking is only looked into, the others are executed."""
        plan: list[tuple[Step, Looking | None]] = []
        have = set(have)
        for step in self.steps:
            if id(step) in self.executed or not have.issuperset(step.inputs):
                continue
            if not self._open_in(step, self.open):
                plan.append((step, None))
                have.update(step.outputs)
                continue
            looking = self.looking[id(step)]
            if looking.uses is None or looking.targets(self.open):
                plan.append((step, looking))
        return plan

    def _round(self, have: set[int], source: Iterator[Any] | None) -> set[int]:
        """One pass over all batches, from the values in `have` to those that are returned, which the store now holds."""
        plan = self._plan(have)
        carried = self._carried()
        for held, users in carried:
            if not self.executed.intersection(users):  # it begins to go over the data, perhaps once more
                held.restore()
        if not any(looking for _, looking in plan):
            raise self._loop()
        run_now = {id(step) for step, looking in plan if looking is None}
        gone = self.executed | run_now
        later = [step for step in self.steps if id(step) not in gone and not self._finished(step, plan)]
        keep = {key for step in later for key in step.inputs}
        made = {key for step, looking in plan if looking is None for key in step.outputs}
        last_use = {key: index for index, (step, _) in enumerate(plan) for key in step.inputs}
        targets: dict[int, list[int]] = {
            id(step): looking.targets(self.open)
            for step, looking in plan
            if looking is not None and looking.uses is not None
        }
        what = self._what(plan)
        for number, batch in self._batches(source):
            values: dict[int, Any] = {DATA: batch} if source is not None else {}
            for index, (step, looking) in enumerate(plan):
                for key in step.inputs:
                    if key not in values:
                        values[key] = self.store.get(key, number)
                inputs = [values[key] for key in step.inputs]
                if looking is None:
                    values.update(zip(step.outputs, run(step, inputs), strict=True))
                else:
                    if looking.uses is None:
                        looking.trace(inputs)
                        for norm in looking.norms:
                            self._refuse_both(norm)
                    if id(step) not in targets:
                        targets[id(step)] = looking.targets(self.open)
                    if targets[id(step)]:
                        looking.measure(inputs, targets[id(step)])
                if step.written:
                    self._only_before(step, values)
                del inputs
                for key in (*step.inputs, *step.outputs):
                    if last_use.get(key, -1) <= index and key not in keep:
                        values.pop(key, None)
            for key in have - keep:
                self.store.drop(key, number)
            for key in keep & values.keys():
                if (key, number) not in self.store:
                    self.store.put(key, number, values[key])
            self._advance(len(plan), what)
        self.executed |= run_now
        for held, users in carried:
            if held.kind == "state" and users & self.executed and users - self.executed and not held.same():
                raise InvalidValue(
                    f"{printable(held.name)}: keeps a state from call to call, and is called at several places of the model,"
                    " which this method does not run in the order of inference; use method='precise'"
                )
        self.rounds += 1
        for step, looking in plan:
            if looking is not None:
                looking.collect()
            for k in targets[id(step)] if looking is not None else ():
                self.looking[id(step)].uses[k].done = True  # type: ignore[index]
        self._conclude()
        return (have | made) & keep

    def _carried(self) -> list[tuple[Held, set[int]]]:
        """What a batch may leave behind for the next, and the ids of the steps that may use it."""
        held = [] if self.live.states is None else self.live.states.carried()
        if not held:
            return []
        users = {id(step): {id(layer) for layer in below(step.layer)} for step in self.steps if step.layer is not None}
        return [(h, {key for key, layers in users.items() if not h.owners or h.owners & layers}) for h in held]

    def _only_before(self, step: Step, values: dict[int, Any]) -> None:
        """Refuse a step that works in place on what a later one reads; the earlier ones have been given the original."""
        flatten = self.live.tree.flatten
        places = {_place(leaf) for key in step.written for leaf in flatten(values[key])} - {None}
        shared = {key for key, value in values.items() if any(_place(leaf) in places for leaf in flatten(value))}
        for later in self.steps[self.steps.index(step) + 1 :]:
            if shared.intersection(later.inputs):
                raise InvalidValue(
                    f"{printable(step.name)}: writes to the tensor that it is given, which {printable(later.name)} reads"
                    " afterwards, so that its value depends on the order of the two; let it work on a copy"
                )

    def _finished(self, step: Step, plan: list[tuple[Step, Looking | None]]) -> bool:
        """Whether a BatchNorm layer's input is not wanted after this round: measured, and its output leads nowhere."""
        return step.whole and not self._used.intersection(step.outputs) and any(step is other for other, _ in plan)

    def _batches(self, source: Iterator[Any] | None) -> Iterator[tuple[int, Any]]:
        if source is None:
            yield from ((number, None) for number in range(self.batches))
            return
        for number, batch in enumerate(source):
            yield number, batch
            self.batches = number + 1
        if not self.batches:
            raise InvalidValue("no data: there was not a single batch")

    def _conclude(self) -> None:
        """Give their statistics to the layers that have been measured at every use."""
        for norm in list(self.open.values()):
            places = self._places[id(norm)]
            if any(looking.uses is None for looking in places):
                continue
            uses = [use for looking in places for use in looking.uses or () if use.norm is norm]
            if not uses:  # a layer inside a custom one that inference passes by
                self.unused.append(norm)
                del self.open[id(norm)]
            elif all(use.done for use in uses):
                self._measured(norm, [use.tree.result() for use in uses])
        if self.after_round is not None:
            self.after_round(self.moments)

    def _measured(self, norm: Norm, uses: list[Moments]) -> None:
        """A layer's moments are complete, one value per use."""
        self._finish(norm, merge_all(uses))

    def _advance(self, work: int, what: str) -> None:
        self._work += work
        if self.progress is not None:
            total = max(self.batches, self._hint) * self._work_per_batch
            self.progress(self._work, max(total, self._work), what)

    def _what(self, plan: list[tuple[Step, Looking | None]]) -> str:
        norms = [norm for _, looking in plan if looking is not None for norm in looking.norms if id(norm) in self.open]
        return f"round {self.rounds + 1} of {self.expected_rounds} ({same_name(norms)})"


def _place(tensor: Any) -> int | None:
    """Where the memory begins that a tensor of torch lies in, whatever part of it; None where there is none."""
    return tensor.untyped_storage().data_ptr() if hasattr(tensor, "untyped_storage") else None
