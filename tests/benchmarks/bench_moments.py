"""Mean and variance per channel of float32 features: moments() against torch, TensorFlow and numpy; speed and error.

    python tests/benchmarks/bench_moments.py [--megabytes 268] [--rounds 7] [--channels 3,64,256] [--no-errors]

One interleaved run: every method in turn, round after round; medians. GB/s of input. Everybody uses the threads that they
use by default (OMP_NUM_THREADS limits all but numpy). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
from loops import use_numba, with_numba

from bnport.calibrate.moments import merge_all, moments


def methods():
    import tensorflow as tf
    import torch

    return {
        "bnport moments, numba": with_numba(True, moments),
        "bnport moments, numpy alone": with_numba(False, moments),
        "torch.var_mean float32": lambda x: torch.var_mean(torch.from_numpy(x), 0, correction=0),
        "torch.var_mean float64": lambda x: torch.var_mean(torch.from_numpy(x).double(), 0, correction=0),
        "tf.nn.moments float32": lambda x: [t.numpy() for t in tf.nn.moments(tf.constant(x), [0])],
        "numpy mean, var float32": lambda x: (x.mean(0), x.var(0)),
        "numpy mean, var float64": lambda x: (x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)),
    }


def speed(megabytes, rounds, channels):
    for c in channels:
        x = np.random.default_rng(0).standard_normal((megabytes * 10**6 // 4 // c, c), dtype=np.float32)
        taken = {name: [] for name in methods()}
        use_numba(True)
        for _ in range(rounds):
            for name, method in methods().items():
                started = time.perf_counter()
                method(x)
                taken[name].append(time.perf_counter() - started)
        fast, plain = (statistics.median(taken[f"bnport moments, {how}"]) for how in ("numba", "numpy alone"))
        print(f"\nC = {c}, {x.nbytes / 1e6:.0f} MB")
        for name, seconds in taken.items():
            middle = statistics.median(seconds)
            print(
                f"  {name:28} {x.nbytes / middle / 1e9:6.2f} GB/s   ours is {middle / fast:5.1f} times as fast,"
                f" without numba {middle / plain:5.1f}"
            )


def errors():
    print("\nlargest relative error of the variance, 1 000 000 x 16 float32, against an 80-bit two-pass")
    for mean, std in ((1e4, 1e-2), (1e4, 1.0), (0.5, 0.25), (1e2, 1e-2)):
        x = (mean + std * np.random.default_rng(1).standard_normal((1_000_000, 16))).astype(np.float32)
        wide = x.astype(np.longdouble)
        true = ((wide - wide.mean(axis=0)) ** 2).mean(axis=0)
        line = []
        found = {"bnport": moments(x).variance()}
        found["bnport, 1287 blocks"] = merge_all(moments(x[k : k + 777]) for k in range(0, len(x), 777)).variance()
        for name, method in list(methods().items())[2:]:
            result = method(x)
            torch_like = name.startswith("torch")
            found[name] = np.asarray(result[0] if torch_like else result[1])
        for name, variance in found.items():
            line.append(f"    {name:28} {float(np.max(np.abs(variance / true - 1))):.1e}")
        print(f"  mean {mean:g}, std {std:g}", *line, sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=268)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels", default="3,64,256")
    parser.add_argument("--no-errors", action="store_true")
    options = parser.parse_args()
    speed(options.megabytes, options.rounds, [int(c) for c in options.channels.split(",")])
    if not options.no_errors:
        errors()


if __name__ == "__main__":
    main()
