"""Every model of fixtures/ shown, and ported into every other that takes it: to compare what two environments make of it.

python -m tests.every_port FOLDER

FOLDER gets the files that were written, what is in them, and what was said of each port, refusals too. Of an .h5 whose epsilon
is inside an attribute the bytes are left out: that attribute HDF5 writes, and each version lays it out in its own way. Moments
of made-up numbers are there too, bit by bit. No framework is needed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

import numpy as np

from bnport.calibrate.moments import moments
from bnport.cli import main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = (".pth", ".pt", ".safetensors", ".keras", ".h5", ".onnx", ".caffemodel")


def models():
    """Paths of the models in fixtures/, from the root of the project."""
    for folder, _, names in sorted(os.walk("fixtures")):
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(MODELS))


def said(*arguments):
    """What the command prints, on both channels, and its exit code."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(arguments))
    return f"{out.getvalue()}exit code {code}\n"


def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text.replace(folder, "FOLDER"))


def every_port(folder):
    """Fill the folder; how many ports were written."""
    paths, written = list(models()), 0
    for path in paths:
        write(folder, path.replace(os.sep, "-") + ".json", said("show", path, "--json"))
    for target in paths:
        kind = target[target.index(".") :]
        for source in paths:
            name = f"{source}-into-{target}".replace(os.sep, "-")
            out = os.path.join(folder, name + kind)
            write(folder, name + ".txt", said("convert", source, target, "-o", out))
            if os.path.exists(out):
                written += 1
                write(folder, name + kind + ".json", said("show", out, "--json"))
                if kind == ".h5":
                    os.unlink(out)
    return written


def every_moment(folder):
    """Sums of floats and of integers, as they are stored."""
    numbers = np.random.default_rng(0).integers(-1000, 1000, (40_001, 12))
    for dtype in ("float16", "float32", "float64", "int16"):
        for name, array in (("last", numbers), ("first", np.ascontiguousarray(numbers.T)[None])):
            found = moments(
                (array / 7 if dtype.startswith("f") else array).astype(dtype), axis=-1 if name == "last" else 1
            )
            write(folder, f"moments-{dtype}-{name}.txt", found.to_bytes().hex() + "\n")


if __name__ == "__main__":
    (into,) = sys.argv[1:]
    into = os.path.abspath(into)
    os.makedirs(into)
    os.chdir(ROOT)
    every_moment(into)
    count = every_port(into)
    print(f"{count} ports written, {len(os.listdir(into))} files; numpy {np.__version__}")
    if count < 50:
        sys.exit("that is too few to compare anything")
