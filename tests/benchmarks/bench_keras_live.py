"""Live Keras models: writing records into the layers and checking them, against the hand-written loop.

    python tests/benchmarks/bench_keras_live.py [--rounds 9] [--backend tensorflow]

ResNet-50 (53 BN). In one process, ways in turn, medians. "apply" checks every array, keeps what is needed to undo, and
writes all layers or none. A changed epsilon adds the search for the models that hold the layer. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", default="tensorflow")
    arguments = parser.parse_args()
    os.environ.update(KERAS_BACKEND=arguments.backend, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    sys.path.insert(0, ROOT)
    import keras
    import numpy as np

    import bnport
    from bnport import adapters
    from bnport.layer import Change
    from bnport.record import FIELDS, BatchNorm

    model = keras.applications.ResNet50(weights=None)
    layers = {layer.name: layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
    adapter, random_ = adapters.find(model), np.random.default_rng(0)
    records = {
        name: BatchNorm(
            epsilon=layer.epsilon,
            **{f: random_.uniform(0.5, 2, layer.gamma.shape[0]).astype("float32") for f in FIELDS},
        )
        for name, layer in layers.items()
    }
    probes = {name: record.probes().astype("float32").reshape(10, 1, 1, -1) for name, record in records.items()}
    epsilons = iter(np.linspace(1e-3, 1e-2, 1000).tolist())

    def by_hand() -> None:
        for name, layer in layers.items():
            layer.set_weights([getattr(records[name], f) for f in FIELDS])

    def apply() -> None:
        adapter.apply(model, {name: Change(record, frozenset(FIELDS)) for name, record in records.items()})

    def apply_epsilon() -> None:
        epsilon = next(epsilons)
        fields = frozenset({*FIELDS, "epsilon"})
        adapter.apply(model, {n: Change(r.replace(epsilon=epsilon), fields) for n, r in records.items()})

    def call_each() -> None:
        for name, layer in layers.items():
            np.asarray(keras.ops.convert_to_numpy(layer(probes[name], training=False)))

    def read() -> None:
        [layer.record for layer in bnport.read(model).values()]

    def run_all() -> None:
        adapter.run_all(model, {name: x.reshape(10, -1) for name, x in probes.items()})

    for title, ways in (
        ("10. write 53 layers", {"layer.set_weights": by_hand, "apply": apply, "apply, new epsilon": apply_epsilon}),
        (
            "12. check 53 layers",
            {"call each layer": call_each, "read the records": read, "run_all (call + predict)": run_all},
        ),
    ):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if turn:
                    times[name].append(time.perf_counter() - started)
        base = statistics.median(next(iter(times.values())))
        print(f"\n{title}, {arguments.backend}, {arguments.rounds} rounds")
        for name, values in times.items():
            print(f"{name:28}{1000 * statistics.median(values):9.1f} ms{statistics.median(values) / base:8.2f} x")


if __name__ == "__main__":
    main()
