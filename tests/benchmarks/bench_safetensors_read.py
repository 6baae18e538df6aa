"""BatchNorm parameters of a large .safetensors: bnport against the safetensors package, with a warm and a cold page cache.

    python tests/benchmarks/bench_safetensors_read.py [--rounds 5] [--large 4.0] [--folder DIR]

The file has 300 convolutions of 608 channels and their BatchNorms, in the order of their names. Each run is a process of
its own, the ways interleaved. `load_file` is safetensors.numpy's; `safe_open` takes just the four tensors of every
BatchNorm from it; bnport reads the same into records, validated. Before a cold run the file is dropped from the page
cache (posix_fadvise); "disk MB" is what the process then caused to be read (/proc/self/io), which depends on the
system's read-ahead: the package maps the file, and a fault reads a whole window. Medians; nothing is asserted.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import tempfile

from bench_torch_read import NUMPY, OURS, ROOT, measured

LOAD_FILE = """
from safetensors.numpy import load_file
tensors = load_file({path!r})
got = [tensors[name] + 0 for name in tensors if ".bn." in name]
"""
SAFE_OPEN = """
from safetensors import safe_open
with safe_open({path!r}, framework="np") as file:
    got = [file.get_tensor(name) for name in file.keys() if ".bn." in name]
"""


def write(path: str, gigabytes: float) -> int:
    """Make the file; the bytes of BatchNorm in it."""
    kernel = 608 * 608 * 9
    count = max(1, round(gigabytes * 1e9 / (4 * kernel)))
    shapes = {}
    for i in range(count):
        shapes |= {f"{i}.bn.{last}": (608,) for last in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{i}.conv.weight"] = (608, 608, 3, 3)
    header, position = {}, 0
    for name in sorted(shapes):
        end = position + 4 * (608 if ".bn." in name else kernel)
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = b"\x00\x00\x00\x3f" * kernel  # 0.5
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            file.write(block[: 4 * 608] if ".bn." in name else block)
        file.flush()
        os.fsync(file.fileno())  # dirty pages cannot be dropped
    return count * 4 * 4 * 608


def dropped(path: str) -> None:
    """Have the system forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_ahead(path: str) -> str:
    """What the system says of the read-ahead on the file's device, in kB."""
    device = os.stat(path).st_dev
    for found in (f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb",
                  *sorted(glob.glob(f"/sys/dev/block/{os.major(device)}:0/queue/read_ahead_kb"))):  # fmt: skip
        if os.path.exists(found):
            with open(found) as file:
                return file.read().strip()
    return "unknown"


def compare(path: str, norms: int, rounds: int, *, cold: bool) -> None:
    """Print the medians of every way of reading `path`, and their ratios to bnport's."""
    ways = {"import numpy": NUMPY, "load_file": LOAD_FILE, "safe_open": SAFE_OPEN, "bnport": OURS}
    runs: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, code in ways.items():
            if cold:
                dropped(path)
            result = measured(code.format(path=path, root=ROOT))
            if turn:
                runs[way].append(result)
    medians = {way: [statistics.median(column) for column in zip(*got, strict=True)] for way, got in runs.items()}
    print(f"\n{'cold' if cold else 'warm'}, {rounds} rounds; BatchNorm is {norms / 1e6:.2f} MB of it")
    print(f"{'':14}{'wall s':>9}{'CPU s':>9}{'MiB':>9}{'disk MB':>9}{'x wall':>9}{'x CPU':>9}{'x MiB':>9}{'x BN':>9}")
    ours = medians["bnport"]
    for way, (wall, cpu, rss, _, disk) in medians.items():
        ratios = f"{wall / ours[0]:9.2f}{cpu / ours[1]:9.2f}{rss / ours[2]:9.1f}{disk * 1e6 / norms:9.1f}"
        print(f"{way:14}{wall:9.3f}{cpu:9.3f}{rss:9.1f}{disk:9.1f}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=float, default=4.0, metavar="GB")
    parser.add_argument("--folder", help="where to put the file (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = os.path.join(folder, "large.safetensors")
        norms = write(path, arguments.large)
        print(f"{os.path.getsize(path) / 1e9:.2f} GB .safetensors; read-ahead of its device: {read_ahead(path)} kB")
        for cold in (False, True):
            compare(path, norms, arguments.rounds, cold=cold)


if __name__ == "__main__":
    main()
