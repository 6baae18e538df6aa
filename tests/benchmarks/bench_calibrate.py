"""Population statistics of a Keras ResNet: carrying the frontier forward against one prefix pass per layer.

    python tests/benchmarks/bench_calibrate.py [--model ResNet50] [--images 256] [--size 64] [--batch 64]
                                               [--rounds 5] [--naive-layers 0] [--memory 8GB] [--without-numba]

Printed: seconds of one eager forward pass, of the frontier, and of the plain way; their ratios; whether both gave the
same bits. The plain way takes minutes: --naive-layers K times that many layers, spread evenly over the depth, and
scales up (0: all layers, once). Nothing is asserted on time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def plain_way(keras, model, batches, every, numpy):
    """One prefix pass per layer (of `every`): moments by name, seconds for each."""
    from bnport.calibrate.moments import merge_all, moments

    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    found, seconds = {}, []
    for index, layer in enumerate(norms):
        if every and index % every and index != len(norms) - 1:
            continue
        started, worked = time.perf_counter(), time.process_time()
        prefix = keras.Model(model.inputs, layer.input)
        merged = merge_all(moments(numpy(prefix([batch], training=False))) for batch in batches)
        seconds.append((time.perf_counter() - started, time.process_time() - worked))
        if not every:
            layer.moving_mean.assign(merged.mean.astype("float32"))
            layer.moving_variance.assign(merged.variance().astype("float32"))
        found[layer.name] = merged
    return found, seconds, len(norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ResNet50")
    for name, default in (("images", 256), ("size", 64), ("batch", 64), ("rounds", 5), ("naive-layers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--without-numba", action="store_true")
    options = parser.parse_args()

    import keras
    import numpy as np
    from loops import use_numba

    from bnport.calibrate.run import calibrate

    use_numba(not options.without_numba)
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, options.model)(weights=None, input_shape=(options.size, options.size, 3))
    images = np.random.default_rng(0).normal(size=(options.images, options.size, options.size, 3)).astype("float32")
    batches = [images[k : k + options.batch] for k in range(0, len(images), options.batch)]

    def numpy(x):
        return keras.ops.convert_to_numpy(x)

    def forward():
        for batch in batches:
            model(batch, training=False)

    def frontier():
        return calibrate(model, images, batch_size=options.batch, memory=options.memory)

    forward()
    frontier().undo()
    times: dict[str, list[float]] = {"forward": [], "frontier": []}
    cpu: dict[str, list[float]] = {"forward": [], "frontier": []}
    for _ in range(options.rounds):
        for name, work in (("forward", forward), ("frontier", frontier)):
            started, worked = time.perf_counter(), time.process_time()
            result = work()
            times[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - worked)
        kept = {layer.name: (layer.mean, layer.variance) for layer in result.layers}
        result.undo()
    one, ours = (statistics.median(times[name]) for name in ("forward", "frontier"))
    print(f"{options.model}, {len(kept)} BatchNorm layers, {options.images} images of {options.size} px,"
          f" {keras.backend.backend()}")  # fmt: skip
    print(f"eager forward pass   {one:8.2f} s")
    wall, work = (
        statistics.median(b / a for a, b in zip(t["forward"], t["frontier"], strict=True)) for t in (times, cpu)
    )
    print(f"frontier             {ours:8.2f} s   {wall:.2f} forward passes, {work:.2f} in CPU time ({result.rounds} rounds,"
          f" {result.resident / 1e6:.0f} MB held, {result.spilled / 1e6:.0f} MB through the disk)")  # fmt: skip
    every = len(kept) // options.naive_layers if options.naive_layers else 0
    found, seconds, count = plain_way(keras, model, batches, every, numpy)
    total, worked = (sum(times) * count / len(times) for times in zip(*seconds, strict=True))
    said = "measured" if not every else f"scaled up from {len(seconds)} layers"
    print(
        f"one pass per layer   {total:8.2f} s   {said}; {total / ours:.1f} times the frontier,"
        f" {worked / statistics.median(cpu['frontier']):.1f} in CPU time"
    )
    if not every:
        same = all(
            np.array_equal(found[name].mean.astype("float32"), mean.astype("float32"))
            and np.array_equal(found[name].variance().astype("float32"), variance.astype("float32"))
            for name, (mean, variance) in kept.items()
        )
        print("bit-identical" if same else "NOT bit-identical")


if __name__ == "__main__":
    main()
