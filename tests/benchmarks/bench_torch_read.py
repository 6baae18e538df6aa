"""BatchNorm parameters of a PyTorch checkpoint: bnport against torch.load and torch.load(mmap=True), ResNet-50 and 4 GB.

    python tests/benchmarks/bench_torch_read.py [--rounds 5] [--large 4.0] [--folder DIR]

The usual way is `torch.load`, then `.numpy()` of every running_mean, running_var, weight and bias of a BatchNorm; bnport
reads the same into records, validated, their checksums checked. `import numpy` alone is the floor of that, `import argparse`
of the listing: of names, channels and epsilon (`bnport show --no-values`), and with ranges (`bnport show`). Each run is a
process of its own, the ways interleaved; wall time, CPU time, peak resident memory (VmHWM) and bytes read by read() (rchar)
are the process's, medians over the rounds. The large file has 300 convolutions of 608 channels, from one sparse file: writing
it costs disk but no memory; files are removed afterwards. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

NUMPY = "import numpy"
TORCH = """
import torch
checkpoint = torch.load({path!r}{more})
state = checkpoint.get("state_dict", checkpoint)
for name in list(state):
    if name.endswith(".running_mean"):
        prefix = name[: -len("running_mean")]
        [state[prefix + last].numpy() + 0 for last in ("weight", "bias", "running_mean", "running_var")]
"""
OURS = """
import sys; sys.path.insert(0, {root!r})
from bnport import adapters
for layer in adapters.read({path!r}).values():
    layer.record
"""
SHOW = """
import sys; sys.path.insert(0, {root!r}); sys.argv = ["bnport", "show", *{more!r}, {path!r}]
import bnport.cli; bnport.cli.entry()
"""

_METER = """
import sys
try:
    exec(compile(sys.argv[1], "run", "exec"))
except SystemExit:
    pass
with open("/proc/self/io") as io, open("/proc/self/status") as status:
    found = dict(line.split()[:2] for line in [*io, *status] if line.count(":") and len(line.split()) > 1)
sys.stderr.write("FOUND " + " ".join(found[name] for name in ("VmHWM:", "rchar:", "read_bytes:")))
"""


def resnet50(path: str, form: str) -> None:
    """A ResNet-50's state dict (random numbers), as zip, legacy stream, or zip with an optimizer beside it."""
    import torch

    parts, arriving = [("conv1", 64, 3, 7)], 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            parts += [(f"{name}.conv1", width, arriving, 1), (f"{name}.conv2", width, width, 3)]
            parts += [(f"{name}.conv3", width * 4, width, 1)]
            if block == 0:
                parts.append((f"{name}.downsample.0", width * 4, arriving, 1))
            arriving = width * 4
    state = {}
    for name, out, wide, side in parts:
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        state[f"{name}.weight"] = torch.randn(out, wide, side, side)
        for last in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{last}"] = torch.rand(out) + 0.1
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    state["fc.weight"], state["fc.bias"] = torch.randn(1000, 2048), torch.randn(1000)
    value = state if form != "checkpoint" else {"epoch": 9, "state_dict": state, "optimizer": {"lr": 0.1}}
    torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")


def large(path: str, gigabytes: float, form: str) -> None:
    """`gigabytes` of 3 x 3 convolutions of 608 channels and their BatchNorms."""
    import torch

    kernel = 608 * 608 * 9 * 4
    state = {}
    with tempfile.NamedTemporaryFile() as zeros:
        zeros.truncate(kernel)
        for i in range(max(1, round(gigabytes * 1e9 / kernel))):
            storage = torch.UntypedStorage.from_file(zeros.name, shared=True, nbytes=kernel)
            state[f"{i}.conv.weight"] = torch.empty(0).set_(storage, 0, (608, 608, 3, 3))
            for last in ("weight", "bias", "running_mean", "running_var"):
                state[f"{i}.bn.{last}"] = torch.rand(608) + 0.1
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")


def measured(code: str) -> tuple[float, float, float, float, float]:
    """(wall s, CPU s, peak MiB, MB read, MB read from disk) of a process that runs `code`."""
    # an installed package is not compiled at each start
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _METER, code],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status or "FOUND" not in said:
        raise RuntimeError(said)
    memory, read, disk = map(int, said.split("FOUND ")[1].split())
    return wall, usage.ru_utime + usage.ru_stime, memory / 1024, read / 1e6, disk / 1e6


def compare(title: str, path: str, rounds: int) -> None:
    """Print the medians of every way of reading `path`, and their ratios to bnport's."""
    codes = {
        "import numpy": NUMPY,
        "torch.load": TORCH.format(path=path, more=""),
        "torch.load(mmap=True)": TORCH.format(path=path, more=", mmap=True"),
        "bnport read": OURS.format(path=path, root=ROOT),
        "import argparse": "import argparse",
        "bnport show --no-values": SHOW.format(path=path, root=ROOT, more=["--no-values"]),
        "bnport show": SHOW.format(path=path, root=ROOT, more=[]),
    }
    if "legacy" in title:
        del codes["torch.load(mmap=True)"]  # refuses legacy files
    runs: dict[str, list[tuple[float, ...]]] = {way: [] for way in codes}
    for turn in range(rounds + 1):
        for way, code in codes.items():
            result = measured(code)
            if turn:  # the first warms the page cache
                runs[way].append(result)
    medians = {way: [statistics.median(r[i] for r in results) for i in range(4)] for way, results in runs.items()}
    print(f"\n{title}: {os.path.getsize(path) / 1e6:.0f} MB, {rounds} rounds")
    for ours in ("bnport read", "bnport show --no-values", "bnport show"):
        print(f"times {ours:18}{'wall s':>9}{'CPU s':>9}{'MiB':>9}{'MB read':>9}{'x wall':>9}{'x CPU':>9}{'x MiB':>9}")
        base = medians[ours]
        for way, (wall, cpu, rss, read) in medians.items():
            if way.startswith("bnport") and way != ours:
                continue
            ratios = f"{wall / base[0]:9.2f}{cpu / base[1]:9.2f}{rss / base[2]:9.1f}"
            print(f"{way:24}{wall:9.3f}{cpu:9.3f}{rss:9.1f}{read:9.2f}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=float, default=4.0, metavar="GB", help="0: leave the large file out")
    parser.add_argument("--folder", help="where to put the files (default: a temporary folder)")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:  # in a process of its own: memory that this one ever had would count as its children's
        form, path = arguments.make
        if arguments.large:
            large(path, arguments.large, form)
        else:
            resnet50(path, form)
        return

    def make(path: str, form: str, gigabytes: float = 0) -> None:
        subprocess.run([sys.executable, __file__, "--large", str(gigabytes), "--make", form, path], check=True)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for form in ("zip", "legacy", "checkpoint"):
            path = os.path.join(folder, f"resnet50-{form}.pth")
            make(path, form)
            compare(f"ResNet-50, {form}", path, arguments.rounds)
        for form in ("zip", "legacy") if arguments.large else ():
            path = os.path.join(folder, f"large-{form}.pth")
            make(path, form, arguments.large)
            compare(f"{arguments.large:g} GB, {form}", path, min(3, arguments.rounds))
            os.unlink(path)


if __name__ == "__main__":
    main()
