"""Check 1000 converted BatchNorm layers without a live model: bnport.verify.compare against running a Keras layer each.

    python tests/benchmarks/bench_verify.py [--layers 1000] [--rounds 5]

PERFORMANCE row 11: at least 50 times one call per layer, at least 300 times building the layers for it. The ways are run in
turn in every round (bnport five times, as it takes milliseconds); medians are compared. Building is timed on fewer layers
and scaled, as it takes seconds. `bnport_rounded` compares targets whose epsilon was absorbed: every channel needs its bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from bnport.layer import Layer, Layers
from bnport.record import FIELDS, BatchNorm
from bnport.verify import compare

WIDTHS = (64, 128, 256, 512, 1024)
BUILT = 50


def record(seed: int) -> BatchNorm:
    rng, channels = np.random.default_rng(seed), WIDTHS[seed % len(WIDTHS)]
    values = {field: rng.normal(size=channels).astype(np.float32) for field in ("gamma", "beta", "mean")}
    return BatchNorm(**values, variance=rng.uniform(1e-6, 1, channels).astype(np.float32), epsilon=1e-5)


def layers_of(records: dict[str, BatchNorm]) -> Layers:
    def layer(name: str, bn: BatchNorm) -> Layer:
        return Layer(
            name, channels=bn.channels, epsilon=bn.epsilon, load=lambda: {field: getattr(bn, field) for field in FIELDS}
        )

    return Layers((layer(name, bn) for name, bn in records.items()), source="made", format="made")


def built(bn: BatchNorm) -> keras.layers.BatchNormalization:
    layer = keras.layers.BatchNormalization(epsilon=bn.epsilon)
    layer.build((None, bn.channels))
    layer.set_weights([bn.gamma, bn.beta, bn.mean, bn.variance])
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    records = {f"bn{n}": record(n) for n in range(args.layers)}
    probes = {name: bn.probes().astype(np.float32)[:8] for name, bn in records.items()}
    live = {name: built(bn) for name, bn in records.items()}
    pairs = {name: name for name in records}

    sources = layers_of(records)
    for layer in sources.values():
        assert layer.record  # a conversion has read and validated its source by then

    def bnport_compare() -> None:
        targets = layers_of(records)  # read back: validated afresh
        assert all(layer.ok for layer in compare(sources, targets, pairs).values())

    rounded = {name: bn.fit(epsilon=1e-3).record for name, bn in records.items()}

    def bnport_rounded() -> None:
        targets = layers_of(rounded)
        assert all(layer.ok for layer in compare(sources, targets, pairs).values())

    def call_each_layer() -> None:
        for name, layer in live.items():
            np.testing.assert_allclose(np.asarray(layer(probes[name])), records[name](probes[name]), atol=1e-2)

    def build_each_layer() -> None:
        for name in list(records)[:BUILT]:
            np.asarray(built(records[name])(probes[name]))

    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for way in (*[bnport_compare, bnport_rounded] * 5, call_each_layer, build_each_layer):
            start = time.perf_counter()
            way()
            times.setdefault(way.__name__, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["build_each_layer"] *= args.layers / BUILT
    for name, seconds in medians.items():
        print(f"{name:18} {seconds * 1e3:10.1f} ms   {seconds / medians['bnport_compare']:8.1f} x bnport")


if __name__ == "__main__":
    main()
