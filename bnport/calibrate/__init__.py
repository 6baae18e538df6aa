"""Mean and variance from data: what a model's BatchNorm layers should hold, and what a folder of images has.

`bnport.calibrate(model, data, ...)` is the function calibrate() of run.py; this package is what it is made of.

    moments.py, sums.py       count, mean and m2 per channel; how they merge; the loops under them
    compiled.py               these loops, compiled where numba is installed
    averages.py, tree.py      averages of batch statistics that merge; the fixed tree that everything is merged in
    executors.py, pinned.py   one function over many blocks: processes, Dask, Ray; workers that keep their state
    clusters.py               Dask and Ray as both use them
    data.py, sources.py, arrays.py, folder.py    data of every kind as checked batches
    inputs.py                                    a model's inputs by name, and the structure that it takes them in
    models.py, norm.py, graph.py                 a live Keras model, one BatchNorm layer of it, its steps in order
    states.py, hooks.py       what else a model holds and keeps; standing in for the calls of its layers
    frontier.py, looking.py, store.py            the population method, its activations in memory and on disk
    onepass.py                the methods that make one pass
    shards.py, worker.py      one calibration over many workers: who hands out and merges, and what a worker does
    run.py, result.py, checkpoint.py, file.py    the call, its report, resuming, model files
    images.py, pixels.py, decoding.py            mean and standard deviation of images, in arrays and in files

On 1,000 machines, over a billion images
----------------------------------------
Nothing here has run on 1,000 machines. What follows is computed from figures measured on one machine with 2 cores (AMD
EPYC, 4th generation; Python 3.11, numpy 2.4, Keras 3.15 on TensorFlow 2.21; tests/benchmarks) for a ResNet-50: 53
BatchNorm layers, 26,560 channels, a million images on each machine.

    method       rounds   per shard, whole run        what limits it
    population   49       0.64 MB up, 0.64 MB down    activations: 6.4 MB an image at 224 x 224 (computed from 0.52 MB at
                                                      64 x 64): 6.4 TB on each machine, on its disks
    precise      1        0.64 MB up                  the forward pass
    average      1        0.43 MB up                  the forward pass
    moving       1        0.43 MB up                  the forward pass
    images       1        0.2 kB up per block         decoding: 1.2 ms an image and core at 500 x 375, 10 minutes

Bytes. A channel is 24 bytes for population and precise (mean, m2, and the mean's low part), a model therefore
24 * 26,560 = 637 kB; for average and moving it is 16 (mean and variance), 425 kB; 28 to 36 bytes per layer come on top.
Population spreads them over the rounds; layers that do not depend on each other share one (49 rounds for 53 layers).
With one shard on each of 1,000 machines the coordinator takes in and sends out 637 MB in all, 13 MB in a round: 0.1 s of a
1 Gbit/s line. Shards number a few per worker, and so multiply this. The other methods have one round without a barrier:
their shards are at most 64 batches, 2,048 images, so that little is lost with a machine; that makes 490,000 shards for a
billion images, 311 GB (precise) or 208 GB (average, moving) into the coordinator over the 17 hours below: 5.1 or 3.4 MB a
second. Merging one shard's 26,560 channels takes 1.3 (precise) or 1.0 ms (average, moving) with decoding: 1 s for 1,000
shards, 8 to 11 minutes of one core for 490,000, over the whole run. Data and activations never travel.

Time. A forward pass at 64 x 64 takes 11 ms an image (eager, 2 cores), about 63 ms at 224 x 224 (estimated): 17 hours for
a million images on such a machine, and moments add 15 %. Population costs 1.2 to 1.4 passes while activations fit in
memory. Spilled, every BatchNorm input is written and read once: 42 MB an image at 224 x 224, 110 ms at 0.6 GB/s, so 2 to
3 passes. Rounds are barriers: each waits for its slowest shard, 49 times. A worker that dies costs its population shards
one partial forward pass, up to the round that it died in, begun as soon as its successor lives, while the others wait; in
the other methods the shard that it was at, 2 minutes, done by whoever is free.

Therefore: a billion images suit `precise`, `average`, `moving` and `image_statistics`. For `population` take a sample: the
statistics of the sample differ from the whole by a share that falls with the square root of its size, and 10,000 images
of 224 x 224 give the last layers 490,000 numbers per channel (correlated within an image) already. Then 64 GB hold the
frontier.

Scheduling. An engine adds 1 to 3 ms of one coordinator to each block (Dask; Ray and the local pool about 1 ms), so 2,000
cores need blocks of a minute and more to stay busy: 2,000 * 3 ms * 10 for 90 %. image_statistics makes blocks of 8 MB
of files (0.1 s): right for one machine. For many, pass a list of folders: each is one block, listed by its worker; a
billion paths would not fit into one process anyway.

The same bits: merges follow a tree over block numbers (for every method, and in one process too), integer sums are exact
in any order, and neither depends on threads or BLAS. Activations do depend on the framework's kernels: use one kind of
machine.
"""

from __future__ import annotations

from typing import Any

_HOMES = {  # name -> module of this package, imported at the first use
    "calibrate": "run",
    "calibrate_file": "file",
    "Calibration": "result",
    "LayerStatistics": "result",
    "Moments": "moments",
    "image_statistics": "images",
    "map_blocks": "executors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
