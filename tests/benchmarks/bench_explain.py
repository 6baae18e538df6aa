"""How often `explain` names the mistake that was made, another one, or none: a confusion table over generated cases.

    python tests/benchmarks/bench_explain.py [cases per mistake, default 1000] [seed] [widths, default 8,16,...,256]

Every case is made by the frameworks' own calls on statistics like those of trained networks (tests/explain/mistakes.py).
"""

from __future__ import annotations

import collections
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

from bnport.explain import explain
from tests.explain import mistakes
from tests.explain.mistakes import CASES


def main(count: int = 1000, seed: int = 0, widths: str = "") -> None:
    if widths:
        mistakes.WIDTHS = tuple(map(int, widths.split(",")))
    print(f"{'made':42} {'named':>7} {'missed':>7} {'wrong':>7}   what else was named")
    spent, total, wrong_total, silent_wrong = 0.0, 0, 0, 0
    for number, (name, (expected, make)) in enumerate(CASES.items()):
        right = missed = wrong = 0
        others: collections.Counter[str] = collections.Counter()
        for case in range(count):
            rng = np.random.default_rng([seed, number, case])
            sources, ported, pairs = make(rng)
            start = time.process_time()
            found = explain(sources, ported, pairs)
            spent += time.process_time() - start
            kinds = {verdict.mistake for verdict in found.verdicts}
            total += 1
            if found.same and expected not in ("", "momentum"):
                right += not kinds  # the mistake changed nothing beyond rounding: rightly silent
                wrong += bool(kinds)
                others["(no difference)"] += 1
            elif kinds == set(expected.split()):
                right += 1
            elif kinds < set(expected.split()):
                missed += 1  # none, or one of two
            else:
                wrong += 1
                others.update(kinds - set(expected.split()))
                silent_wrong += not expected
        wrong_total += wrong
        listed = ", ".join(f"{key} {value}" for key, value in others.most_common(6))
        print(f"{name:42} {right:7} {missed:7} {wrong:7}   {listed}", flush=True)
    print(f"{total} cases, {wrong_total} wrong verdicts, {silent_wrong} of them where none was due;"
          f" {1e3 * spent / total:.2f} ms of CPU per case")  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
