"""Live Keras models: writing records into the layers and checking them, against the hand-written loop.

    python tests/benchmarks/bench_keras_live.py [--rounds 9] [--backend tensorflow] [--layers 53] [--objects 0] [--only 10]

53 layers are ResNet-50; any other number is that many layers of 256 channels in chains of at most 100. In one process, ways
in turn: medians of wall time with the ratio to the first way, then the same of the process' CPU time. "apply" checks every
array, keeps what is needed to undo, and writes all layers or none; with a new epsilon it also makes sure that no compiled
function keeps the old one, which takes a look at every object of the process if a layer may have been traced (`--objects`
adds some). "convert" is the whole path, from records to a report. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", default="tensorflow", choices=["tensorflow", "torch", "jax", "tf_keras"])
    parser.add_argument("--layers", type=int, default=53)
    parser.add_argument("--objects", type=int, default=0)
    parser.add_argument("--only", choices=["10", "12", "convert"], action="append")
    arguments = parser.parse_args()
    backend = "tensorflow" if arguments.backend == "tf_keras" else arguments.backend
    os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    sys.path.insert(0, ROOT)
    wanted = arguments.only or ["10", "12", "convert"]
    bench = Bench(arguments.backend, arguments.layers)
    ballast = [[number] for number in range(arguments.objects)]
    print(f"{arguments.layers} layers, {arguments.backend}, {arguments.rounds} rounds, {len(gc.get_objects())} objects")
    write = [bench.set_weights, bench.apply, bench.apply_new_epsilon]
    if "10" in wanted:
        show("10. write, never compiled", write, arguments.rounds)
    if "12" in wanted:
        ways = [bench.call_each, bench.read_records, bench.run_all_without_predict, bench.run_all]
        show("12. check", ways, arguments.rounds)
    if "convert" in wanted:
        ways = [bench.set_weights, bench.call_each, bench.convert_without_run, bench.convert]
        show("the whole path", ways, arguments.rounds)
    if "10" in wanted:
        bench.compile_one()
        show("10. write, one layer also in a compiled model", write, arguments.rounds)
    del ballast


class Bench:
    """One model, records for its layers, and the ways that are measured."""

    def __init__(self, package: str, count: int) -> None:
        import importlib

        import numpy as np

        from bnport import adapters
        from bnport.record import FIELDS, BatchNorm

        self.keras = importlib.import_module("tf_keras" if package == "tf_keras" else "keras")
        self.model = self.resnet() if count == 53 else self.chains(count)
        kind = self.keras.layers.BatchNormalization
        self.layers = {layer.name: layer for layer in self.model.layers if isinstance(layer, kind)}
        assert len(self.layers) == count
        self.adapter, self.fields, random_ = adapters.find(self.model), FIELDS, np.random.default_rng(0)
        self.records = {
            name: BatchNorm(
                epsilon=layer.epsilon,
                **{f: random_.uniform(0.5, 2, layer.gamma.shape[0]).astype("float32") for f in FIELDS},
            )
            for name, layer in self.layers.items()
        }
        self.probes = {name: record.probes().astype("float32") for name, record in self.records.items()}
        self.shaped = {name: x.reshape(10, 1, 1, -1) for name, x in self.probes.items()}
        self.same_epsilon = self.changes()
        self.new_epsilon = itertools.cycle([self.changes(1e-5), self.changes(2e-5)])
        self.epsilons = itertools.cycle([1e-5, 2e-5])

    def resnet(self):
        return self.keras.applications.ResNet50(weights=None)

    def chains(self, count: int):
        """One functional chain of 1000 layers would be too deep for Python's stack."""
        inputs, outputs = self.keras.Input((1, 1, 256)), []
        for start in range(0, count, 100):
            x = inputs
            for _ in range(min(100, count - start)):
                x = self.keras.layers.BatchNormalization()(x)
            outputs.append(x)
        return self.keras.Model(inputs, outputs)

    def compile_one(self) -> None:
        name, layer = next(iter(self.layers.items()))
        self.other = self.keras.Sequential([self.keras.Input((1, 1, self.records[name].channels)), layer])
        self.other.predict(self.shaped[name], verbose=0)

    def set_weights(self) -> None:
        for name, layer in self.layers.items():
            layer.set_weights([getattr(self.records[name], f) for f in self.fields])

    def changes(self, epsilon: float | None = None):
        from bnport.layer import Change

        fields = frozenset(self.fields) | ({"epsilon"} if epsilon else set())
        return {
            name: Change(record.replace(epsilon=epsilon) if epsilon else record, fields)
            for name, record in self.records.items()
        }

    def apply(self) -> None:
        self.adapter.apply(self.model, self.same_epsilon)

    def apply_new_epsilon(self) -> None:
        self.adapter.apply(self.model, next(self.new_epsilon))

    def call_each(self) -> None:
        import numpy as np

        for name, layer in self.layers.items():
            y = layer(self.shaped[name], training=False)
            np.asarray(self.keras.ops.convert_to_numpy(y) if hasattr(self.keras, "ops") else y)

    def read_records(self) -> None:
        import bnport

        [layer.record for layer in bnport.read(self.model).values()]

    def run_all(self) -> None:
        self.adapter.run_all(self.model, self.probes)

    def run_all_without_predict(self) -> None:
        from bnport.adapters.keras import running

        predicted, running._predicted = running._predicted, lambda package, layers, inputs: inputs
        try:
            self.run_all()
        finally:
            running._predicted = predicted

    def convert(self, run: bool | None = None) -> None:
        import bnport
        from bnport.layer import Layer, Layers

        epsilon = next(self.epsilons)
        found = [
            Layer(n, channels=r.channels, epsilon=epsilon, load=lambda r=r: {f: getattr(r, f) for f in self.fields})
            for n, r in self.records.items()
        ]
        report = bnport.convert(Layers(found, source="records", format="records"), self.model, run=run)
        assert report.ok, str(report)

    def convert_without_run(self) -> None:
        self.convert(run=False)


def show(title, ways, rounds: int) -> None:
    wall, cpu = ({way.__name__: [] for way in ways} for _ in range(2))
    for turn in range(rounds + 1):
        for way in ways:
            started, spent = time.perf_counter(), time.process_time()
            way()
            if turn:
                wall[way.__name__].append(1000 * (time.perf_counter() - started))
                cpu[way.__name__].append(1000 * (time.process_time() - spent))
    print(f"\n{title}")
    for name in wall:
        columns = [statistics.median(times[name]) for times in (wall, cpu)]
        bases = [statistics.median(times[ways[0].__name__]) for times in (wall, cpu)]
        print(f"{name:22}" + "".join(f"{c:9.1f} ms{c / b:8.2f} x" for c, b in zip(columns, bases, strict=True)))


if __name__ == "__main__":
    main()
