"""Mean and std of images: arrays in memory against numpy, torch and bincount; JPEG files against decoding alone.

    python tests/benchmarks/bench_images.py [--images 400] [--files 400] [--rounds 5] [--wrong 800,1600]

--wrong N,...: also run the usual expression on N images of 224 x 224, as it stands (1.3 MB per image and temporary), to
show what it returns; 0 leaves it out. One interleaved run, medians. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

from loops import use_numba, with_numba

from bnport._lazy import np  # as `bnport stats` has it: a worker imports its script anew, and starts without numpy
from bnport.calibrate.executors import cores, map_blocks
from bnport.calibrate.images import image_statistics


def interleaved(methods, rounds, argument, clock=time.perf_counter):
    taken = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            started = clock()
            method(argument)
            taken[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def by_numpy(x):
    y = x.astype("float32") / 255
    return y.mean((0, 1, 2)), y.std((0, 1, 2))


def by_torch(x):
    import torch

    y = torch.from_numpy(x).float() / 255
    return torch.var_mean(y, (0, 1, 2), correction=0)


def by_bincount(x):
    return [np.bincount(x[..., c].ravel(), minlength=256) for c in range(x.shape[-1])]


def arrays(count, rounds):
    x = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    methods = {"bnport, numba (exact)": with_numba(True, image_statistics),
               "bnport, numpy alone (exact)": with_numba(False, image_statistics),
               "numpy float32": by_numpy, "torch float32": by_torch, "numpy.bincount (exact)": by_bincount}  # fmt: skip
    use_numba(True)
    taken = interleaved(methods, rounds, x)
    print(f"uint8 array of {count} images, 224 x 224 x 3")
    for name, seconds in taken.items():
        fast, plain = seconds / taken["bnport, numba (exact)"], seconds / taken["bnport, numpy alone (exact)"]
        print(
            f"  {name:28} {count / seconds:8.0f} images/s   ours is {fast:5.1f} times as fast, without numba {plain:5.1f}"
        )


def make_files(folder, count):
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(smooth) + rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f"{k:05}.jpg"), quality=90)
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def decode(paths):
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            image.load()


def decode_and_resize(paths):
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            image.load()
            image.resize((224, 224), Image.Resampling.BILINEAR)


def files(count, rounds):
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(folder, count)
        size = sum(map(os.path.getsize, paths)) / count
        print(f"\n{count} JPEG files, 500 x 375, quality 90, {size / 1e3:.0f} kB each; one process, CPU time")
        one = {
            "decode": decode,
            "bnport": lambda p: image_statistics(p, engine="serial"),
            "decode + resize to 224": decode_and_resize,
            "bnport, size=224": lambda p: image_statistics(p, 224, engine="serial"),
        }
        taken = interleaved(one, rounds, paths, time.process_time)
        for name, seconds in taken.items():
            base = taken["decode + resize to 224" if "224" in name else "decode"]
            print(f"  {name:28} {seconds / count * 1e3:6.3f} ms/image   {seconds / base:5.2f} of decoding")
        print(f"processes, wall time ({cores()} cores here; starting the pool included)")
        many = {f"{n} processes": lambda p, n=n: image_statistics(p * 4, workers=n) for n in (1, 2)}
        list(map_blocks(len, [[1]], workers=1))  # warm
        taken = interleaved(many, rounds, paths)
        for name, seconds in taken.items():
            speedup = taken["1 processes"] / seconds
            print(f"  {name:28} {4 * count / seconds:6.0f} images/s      {speedup:5.2f} times one process")


def wrong(counts):
    base = np.random.default_rng(0).integers(0, 256, (50, 224, 224, 3), dtype=np.uint8)
    print('\n(imgs.astype("float32") / 255).mean((0, 1, 2)) on uniformly random bytes; the truth is 0.500, std 0.290')
    for count in counts:
        imgs = np.resize(base, (count, 224, 224, 3))
        usual = (imgs.astype("float32") / 255).mean((0, 1, 2))
        ours = image_statistics(imgs)
        print(
            f"  {count:5} images: {', '.join(f'{m:.4f}' for m in usual)}; bnport {', '.join(f'{m:.4f}' for m in ours.mean)}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wrong", default="800,1600")
    options = parser.parse_args()
    arrays(options.images, options.rounds)
    files(options.files, options.rounds)
    wrong([int(n) for n in options.wrong.split(",") if int(n)])


if __name__ == "__main__":
    main()
