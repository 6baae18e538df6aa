"""Keras files: list, read and port BatchNorm, against the scripts that users write with Keras.

    python tests/benchmarks/bench_keras_files.py [--rounds 5] [--large 1] [--quadratic] [--folder DIR]

ResNet-50 (98 MB, 53 BN) by keras.applications. Every run is a process of its own, all ways of a table in turn; wall time,
CPU and peak resident memory are the process's, medians of the rounds after a warm-up. --large GB adds a .keras of that
size (300 BN of 608 channels); --quadratic shows zipfile.open() under h5py on 70 MB once (a minute). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START = f"import os, sys; sys.path.insert(0, {ROOT!r}); os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'\n"

MAKE = """
import keras, torch
model = keras.applications.ResNet50(weights=None)
model.save({keras!r}); model.save_weights({weights!r})
state = {{}}
for layer in model.layers:
    values = [torch.from_numpy(w.copy()) for w in layer.get_weights()]
    if isinstance(layer, keras.layers.BatchNormalization):
        g = torch.Generator().manual_seed(len(state))
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), values):
            state[f"{{layer.name}}.{{name}}"] = value + torch.rand(value.shape, generator=g)
    elif values:
        state[f"{{layer.name}}.weight"] = values[0]
torch.save(state, {pth!r})
"""
LOAD = """
import keras
model = keras.models.load_model({keras!r}, compile=False)
got = {{l.name: l.get_weights() for l in model.layers if isinstance(l, keras.layers.BatchNormalization)}}
"""
BYTES = """
import io, json, zipfile, h5py
archive = zipfile.ZipFile({keras!r})
names = [l["config"]["name"] for l in json.loads(archive.read("config.json"))["config"]["layers"]]
file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
got = [[file[f"layers/{{n}}/vars/{{i}}"][()] for i in range(4)] for n in file["layers"] if n.startswith("batch_norm")]
"""
OPEN = BYTES.replace('io.BytesIO(archive.read("model.weights.h5"))', 'archive.open("model.weights.h5")')
READ = """
import bnport
got = {{name: layer.record for name, layer in bnport.read({keras!r}).items()}}
"""
COMMAND = """
sys.argv = ["bnport", *{arguments!r}]
from bnport.cli import entry
sys.exit(entry())
"""
USUAL_PORT = """
import keras, torch
state = torch.load({pth!r})
model = keras.models.load_model({keras!r}, compile=False)
for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.epsilon = 1e-5
        layer.set_weights([state[f"{{layer.name}}.{{n}}"].numpy() for n in ("weight", "bias", "running_mean", "running_var")])
model.save({out!r})
"""


def measured(code: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MiB) of a child process running `code`."""
    # an installed package is not compiled at each start
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", START + code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(said.decode()[-2000:])
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(title: str, ways: dict[str, str], ours: str, rounds: int) -> None:
    """Print the medians of all ways, run in turn, and how much each takes of what `ours` does."""
    runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, code in ways.items():
            result = measured(code)
            if turn:
                runs[way].append(result)
    medians = {way: [statistics.median(r[i] for r in results) for i in range(3)] for way, results in runs.items()}
    print(
        f"\n{title}, {rounds} rounds\n{'':32}{'wall s':>9}{'CPU s':>9}{'MiB':>9}{'x wall':>9}{'x CPU':>9}{'x MiB':>9}"
    )
    base = medians[ours]
    for way, numbers in medians.items():
        ratios = "".join(f"{a / b:9.2f}" for a, b in zip(numbers, base, strict=True))
        print(f"{way:32}{numbers[0]:9.3f}{numbers[1]:9.3f}{numbers[2]:9.1f}{ratios}", flush=True)


def large(path: str, layers: int, width: int) -> None:
    """A .keras of `layers` convolutions (width x width x 3 x 3) with as many BN, written by h5py without Keras."""
    import h5py
    import numpy as np

    kernel = np.ones((3, 3, width, width), "float32")
    entries, weights = [], path + ".h5"
    with h5py.File(weights, "w") as file:
        for number in range(layers):
            suffix = f"_{number}" if number else ""
            file[f"layers/conv2d{suffix}/vars/0"] = kernel
            for k in range(4):
                file[f"layers/batch_normalization{suffix}/vars/{k}"] = np.full(width, 1.0 + k, "float32")
            config = {
                "name": f"bn{number}",
                "axis": -1,
                "momentum": 0.99,
                "epsilon": 1e-3,
                "center": True,
                "scale": True,
            }
            for kind, settings in (("Conv2D", {"name": f"conv{number}"}), ("BatchNormalization", config)):
                build = {"input_shape": [None, 8, 8, width]}
                entries.append(
                    {"module": "keras.layers", "class_name": kind, "config": settings, "build_config": build}
                )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        model = {"module": "keras", "class_name": "Sequential", "config": {"name": "large", "layers": entries}}
        archive.writestr("config.json", json.dumps(model))
        archive.write(weights, "model.weights.h5")
    os.unlink(weights)


def records(path: str, out: str) -> None:
    """The target's own records, as a source for a port."""
    subprocess.run(
        [sys.executable, "-c", START + f"import bnport; bnport.save_records(bnport.read({path!r}), {out!r})"],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=float, default=0, metavar="GB")
    parser.add_argument("--quadratic", action="store_true")
    parser.add_argument("--folder", help="where to put the files (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        names = {"keras": "r50.keras", "weights": "r50.weights.h5", "pth": "r50.pth", "out": "out.keras"}
        paths = {name: os.path.join(folder, value) for name, value in names.items()}
        measured(MAKE.format(**paths))
        port = ["convert", paths["pth"], paths["keras"], "-o", paths["out"], "--force"]
        compare(
            "1. list the BN layers of a ResNet-50 .keras",
            {"import argparse": "import argparse", "load_model": LOAD.format(**paths),
             "bnport show": COMMAND.format(arguments=["show", paths["keras"]]),
             "bnport show --no-values": COMMAND.format(arguments=["show", "--no-values", paths["keras"]])},
            "bnport show --no-values", arguments.rounds,
        )  # fmt: skip
        compare(
            "5. its BN as numpy",
            {"import h5py": "import h5py", "load_model": LOAD.format(**paths),
             "zip.read, BytesIO, h5py": BYTES.format(**paths),
             "bnport": READ.format(**paths), "bnport, .weights.h5": READ.format(keras=paths["weights"])},
            "bnport", arguments.rounds,
        )  # fmt: skip
        compare(
            "8. port a .pth into a new .keras",
            {"torch.load, load_model, save": USUAL_PORT.format(**paths),
             "bnport convert (verified)": COMMAND.format(arguments=port)},
            "bnport convert (verified)", min(3, arguments.rounds),
        )  # fmt: skip
        if arguments.quadratic:
            path = os.path.join(folder, "small.keras")
            large(path, 300, 80)
            compare(
                f"5. {os.path.getsize(path) / 1e6:.0f} MB, 300 BN",
                {"zipfile.open under h5py": OPEN.format(keras=path), "bnport": READ.format(keras=path)}, "bnport", 1,
            )  # fmt: skip
        if arguments.large:
            path, source = os.path.join(folder, "large.keras"), os.path.join(folder, "records.safetensors")
            large(path, max(2, round(arguments.large * 1e9 / (9 * 608 * 608 * 4))), 608)
            compare(
                f"5. {os.path.getsize(path) / 1e9:.1f} GB .keras",
                {"zip.read, BytesIO, h5py": BYTES.format(keras=path), "bnport": READ.format(keras=path)}, "bnport",
                min(3, arguments.rounds),
            )  # fmt: skip
            records(path, source)
            port = ["convert", source, path, "-o", os.path.join(folder, "out.keras"), "--force"]
            compare(
                "9. port into it", {"cp": f"import shutil; shutil.copyfile({path!r}, {path + '.copy'!r})",
                                    "bnport convert (verified)": COMMAND.format(arguments=port)},
                "bnport convert (verified)", min(3, arguments.rounds),
            )  # fmt: skip


if __name__ == "__main__":
    main()
