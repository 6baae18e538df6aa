"""With or without numba's loops, for the benchmarks of what they sum. Imports no numpy: a pool's workers import it too."""

from __future__ import annotations

from bnport.calibrate import compiled


def use_numba(wanted):
    """From now on sum with the compiled loops, or without; ends the benchmark where they are wanted and not there."""
    if compiled.use(wanted) != wanted:
        raise SystemExit("numba is not installed")


def with_numba(wanted, function):
    """The function of one argument, called with the compiled loops or without."""

    def run(x):
        use_numba(wanted)
        return function(x)

    return run
