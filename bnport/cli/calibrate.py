"""`bnport calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

HELP = "Compute the mean and variance of a Keras model's BatchNorm layers from data, into a copy of the model."

EPILOG = """examples:
  bnport calibrate model.keras --data images.npy -o calibrated.keras
  bnport calibrate model.keras --data photos/ --preprocessing resnet50 -o calibrated.keras --memory 8GB
  bnport calibrate model.keras --data photos/ --scale 1/255 --limit 10000 --resume run.npz -o calibrated.keras
  bnport calibrate model.keras --data data.npz --method precise --layers 'conv5_*' -o calibrated.keras
  bnport calibrate model.keras --data photos/ --scale 1/255 --engine local --workers 4 -o calibrated.keras

Methods (every layer's mean and variance over all the data):
  population  exact: what inference will see, all earlier layers on their own new statistics. Every operation runs once
  precise     one pass, layers normalise by their batch as in training; moments of all batches pooled (PreciseBN)
  average     the same pass; batch means and variances averaged, weighted by batch size (update_bn)
  moving      the same pass; exponential average from the stored values on, with the layer's momentum

Every method runs with --engine too, on many processes or machines, to the same bits (with the same number of threads in
each), also if a worker is killed; and goes on from --resume FILE with or without --engine.

This command does run the model: it needs Keras and the model's backend (KERAS_BACKEND). MODEL is loaded in safe mode and
refused if it holds Lambda layers or custom classes. MODEL is not changed; only mean and variance differ in OUT."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="a .keras file, or an .h5 file that holds a whole model")
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a .npy or .npz file, a folder of images or of .npy files"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the file to make: MODEL with new statistics")
    parser.add_argument("--method", default="population", choices=("population", "precise", "average", "moving"))
    parser.add_argument("--unbiased", action="store_true", help="variance divided by n - 1 instead of n")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples per batch (default 32)")
    parser.add_argument("--layers", action="append", metavar="PATTERN", help="only these layers; repeatable")
    parser.add_argument("--frozen", action="store_true", help="also layers with trainable=False")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N samples only")
    parser.add_argument(
        "--minimum", type=int, default=32, metavar="N", help="refuse fewer samples than this (default 32)"
    )
    parser.add_argument("--key", metavar="NAME", help="the array of an .npz file to use")
    parser.add_argument(
        "--memory", metavar="SIZE", help="activations kept in memory, such as 8GB (default half of what is free)"
    )
    parser.add_argument(
        "--spill", metavar="DIR", help="where activations beyond --memory go (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="keep checkpoints in FILE (after every round of population, else every 30 s), and go on from it if it is there",
    )
    parser.add_argument("--engine", metavar="NAME", help="run in many processes: local, dask or ray (see --spill)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of --engine (default: one per core)")
    parser.add_argument("--address", metavar="URL", help="the Dask scheduler or Ray cluster that --engine joins")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    group = parser.add_argument_group("how images are read")
    group.add_argument("--size", metavar="HxW", help="resize to this (default: the model's input size)")
    group.add_argument("--scale", metavar="X", help="multiply pixels by this: 1, 1/255, ...")
    group.add_argument("--offset", type=float, metavar="X", help="added after scaling")
    group.add_argument(
        "--preprocessing", metavar="NAME", help="preprocess_input of this keras.applications module: resnet50, ..."
    )
    group.add_argument(
        "--loader", choices=("load_img", "dataset"), help="keras.utils.load_img or image_dataset_from_directory"
    )
    group.add_argument("--interpolation", metavar="NAME", help="bilinear (default), nearest, bicubic, ...")
    group.add_argument(
        "--crop", action="store_true", default=None, help="crop to the target's shape instead of distorting"
    )
    common.add_json(parser)


def images_options(args: argparse.Namespace) -> dict[str, Any]:
    """How a folder of images is read, as far as it was said."""
    names = ("scale", "offset", "preprocessing", "loader", "interpolation", "crop")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.size is not None:
        options["size"] = common.size_of(args.size)
    return options


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What configure() collected, as keyword arguments of bnport.calibrate."""
    names = (
        "method", "unbiased", "batch_size", "layers", "frozen", "limit", "minimum", "key", "memory", "spill", "resume",
        "engine", "workers", "address",
    )  # fmt: skip
    return {"images": images_options(args) or None, **{name: getattr(args, name) for name in names}}


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the copy, print old against new."""
    from bnport.calibrate.file import calibrate_file
    from bnport.errors import printable

    with common.Progress(args.json) as progress:
        result = calibrate_file(args.model, args.data, args.out, force=args.force, progress=progress, **options(args))
    args.written = [args.out]
    if args.json:
        common.print_json({**result.to_dict(), "out": args.out})
    else:
        common.say(result)
        common.say(f"written: {printable(args.out)}")
    return 0
