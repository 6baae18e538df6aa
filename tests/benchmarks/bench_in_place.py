"""A port of a `.pth` into a Keras file, as a copy and in place, against the script that users write with both frameworks.

    python tests/benchmarks/bench_in_place.py [--rounds 3] [--gigabytes 1] [--folder DIR]

PERFORMANCE row 9: a ResNet-50 (98 MB, 53 BN), and a model of so many gigabytes (300 convolutions with BN, in ten chains).
Every run is a process of its own, the ways in turn; wall time, CPU, peak resident memory and bytes written (wchar of
/proc/self/io) are the process's, medians after a warm-up round. In place goes into a fresh copy of the target every time:
as its framework made it (ones and zeros, which the undo file deflates), and with other values (twice as much is written).
"Not hashed": with --no-sha256, the source is read only where a BatchNorm lies. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from bench_keras_files import COMMAND, MAKE, START, USUAL_PORT

MAKE_LARGE = MAKE.replace(
    "model = keras.applications.ResNet50(weights=None)",
    """
inputs = x = keras.Input((8, 8, {width}))
ends = []
for chain in range(10):
    x = inputs
    for link in range(30):
        x = keras.layers.Conv2D({width}, 3, padding="same", use_bias=False, name=f"c{{chain}}_{{link}}")(x)
        x = keras.layers.BatchNormalization(name=f"b{{chain}}_{{link}}")(x)
    ends.append(x)
model = keras.Model(inputs, keras.layers.Add()(ends))
""",
)
OTHER = """
import numpy as np, bnport
from bnport.record import FIELDS
rng, source = np.random.default_rng(1), bnport.read({pth!r})
layers = []
for layer in source.values():
    values = dict(zip(FIELDS, rng.uniform(0.5, 2, (4, layer.channels)).astype("float32")))
    layers.append(layer.but(load=lambda v=values: v))
bnport.convert(source.but(layers), {keras!r}, {other!r})
"""
METER = """
def meter():
    with open("/proc/self/io") as io:
        os.write(2, ("WCHAR " + io.read().split("wchar: ")[1].split()[0]).encode())
import atexit
atexit.register(meter)
"""


def measured(code: str) -> tuple[float, float, float, float]:
    """(wall seconds, CPU seconds, peak MiB, MB written) of a child process running `code`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", START + METER + code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise RuntimeError(said[-2000:])
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, int(said.split("WCHAR ")[1]) / 1e6


def compare(title: str, paths: dict[str, str], rounds: int) -> None:
    copy = ["convert", paths["pth"], paths["keras"], "-o", paths["out"]]
    place = ["convert", paths["pth"], paths["place"], "--in-place"]
    measured(OTHER.format(**paths))
    targets = {"bnport --in-place, fresh": paths["keras"], "bnport --in-place, other values": paths["other"],
               "bnport --in-place, not hashed": paths["keras"]}  # fmt: skip
    ways = {
        "torch.load, load_model, save": USUAL_PORT.format(**paths),
        "bnport convert -o": COMMAND.format(arguments=copy),
        "bnport convert -o, not hashed": COMMAND.format(arguments=[*copy, "--no-sha256"]),
        **dict.fromkeys(targets, COMMAND.format(arguments=place)),
        "bnport --in-place, not hashed": COMMAND.format(arguments=[*place, "--no-sha256"]),
    }
    runs: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, code in ways.items():
            if os.path.exists(paths["out"]):
                os.unlink(paths["out"])  # everybody makes a new file: freeing an old one of 1 GB takes 0.2 s
            if way in targets:
                shutil.copyfile(targets[way], paths["place"])
            os.sync()  # what is still to be written of the copy, or of the one before, is not this one's
            result = measured(code)
            if turn:
                runs[way].append(result)
    medians = {way: [statistics.median(r[i] for r in results) for i in range(4)] for way, results in runs.items()}
    print(f"\n{title}, {os.path.getsize(paths['keras']) / 1e6:.0f} MB, {rounds} rounds")
    print(f"{'':32}{'wall s':>9}{'CPU s':>9}{'MiB':>9}{'MB written':>12}{'usual/it':>10}{'memory':>8}")
    usual = next(iter(medians.values()))
    for way, (wall, cpu, peak, wrote) in medians.items():
        print(f"{way:32}{wall:9.3f}{cpu:9.3f}{peak:9.1f}{wrote:12.2f}{usual[0] / wall:10.1f}{usual[2] / peak:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="0: the ResNet-50 only")
    parser.add_argument("--folder", help="where to put the files (default: a temporary folder)")
    arguments = parser.parse_args()
    for title, code, width in (
        ("ResNet-50", MAKE, 0),
        ("300 BN", MAKE_LARGE, round((arguments.gigabytes * 1e9 / (300 * 9 * 4)) ** 0.5)),
    ):
        if code is MAKE_LARGE and not arguments.gigabytes:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            names = {"keras": "m.keras", "weights": "m.weights.h5", "pth": "m.pth", "out": "out.keras",
                     "place": "place.keras", "other": "other.keras"}  # fmt: skip
            paths = {name: os.path.join(folder, value) for name, value in names.items()}
            measured(code.format(width=width, **paths))
            compare(title, paths, arguments.rounds)


if __name__ == "__main__":
    main()
