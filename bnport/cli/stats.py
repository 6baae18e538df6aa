"""`bnport stats`."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

    from bnport.calibrate.images import ImageStatistics

HELP = "Mean and standard deviation per channel of a folder of images or of uint8 arrays, exactly."

EPILOG = """examples:
  bnport stats train/                          all images below train/, pixels scaled to 0 ... 1
  bnport stats train/ --size 224x224           resized first (bilinear), as the network will see them
  bnport stats images.npy --scale 1            unscaled pixels of an array (images, height, width, channels)
  bnport stats train/ --json -o stats.json

Pixels are summed as integers: the result is exact for any number of images. float32 sums, as in
(imgs.astype("float32") / 255).mean((0, 1, 2)), give 0.418 on 800 images and 0.209 on 1600 where 0.500 is right."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("path", metavar="PATH", help="a folder of images, one image, or an .npy or .npz file")
    parser.add_argument("--size", metavar="HxW", help="resize every image file to this height and width first")
    parser.add_argument("--resample", metavar="NAME", help="of --size (default bilinear)")
    parser.add_argument(
        "--scale",
        metavar="S",
        help="multiply pixels by this number or fraction (default 1/255 for uint8, 1/65535 for uint16, 1 for bool; other"
        " integers need it)",
    )
    parser.add_argument("--mode", metavar="MODE", help="of image files: RGB (default), L (grey) or I;16 (16-bit grey)")
    parser.add_argument("--axis", type=int, metavar="N", help="the channel axis of an array (default the last)")
    parser.add_argument("--key", metavar="NAME", help="the array of an .npz that holds several")
    parser.add_argument("--no-recursive", action="store_true", help="do not enter folders in the folder")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out files that cannot be decoded, and say so"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--engine", metavar="NAME", help="local (default), serial, dask or ray")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the JSON document to this new file")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the statistics, ready to paste, or JSON."""
    from bnport.calibrate.images import image_statistics
    from bnport.containers.files import check_output

    inputs: list[str] = []
    if args.out is not None:
        from bnport.calibrate.file import data_files

        inputs = data_files(args.path, args.out)
        check_output(args.out, force=args.force, inputs=inputs)
    _check_kind(args.path)
    with common.Progress(args.json) as progress:
        found = image_statistics(
            args.path,
            None if args.size is None else common.size_of(args.size),
            _fraction(args.scale),
            mode=args.mode,
            resample=args.resample,
            recursive=not args.no_recursive,
            damaged="skip" if args.skip_damaged else "refuse",
            axis=args.axis,
            key=args.key,
            engine=args.engine,
            workers=args.workers,
            progress=progress,
        )
    if args.out is not None:
        _write(found, args.out, inputs, args.force)
        args.written = [args.out]
    if args.json:
        common.print_json(found.to_dict())
    else:
        _print(found)
    return 0


def _check_kind(path: str) -> None:
    """Refuse a file that is neither image nor array by its first bytes: only of images Pillow need be asked."""
    import os

    from bnport.adapters import read_head
    from bnport.containers import ARRAY, ARRAYS, TEXT, looks_like
    from bnport.errors import FormatError, printable

    what = looks_like(read_head(path)) if os.path.isfile(path) else ""
    if what not in ("", ARRAY, ARRAYS, TEXT):  # there are images that are texts
        raise FormatError(f"{printable(path)}: expected images or an array of them, it is {what}")


def _fraction(text: str | None) -> Fraction | None:
    from bnport.errors import InvalidValue, printable

    if text is None:
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InvalidValue(f"--scale: expected a number or a fraction such as 1/255, got {printable(text)!r}") from None


def _write(found: ImageStatistics, out: str, inputs: list[str], force: bool) -> None:
    import json

    from bnport.containers.files import replace_file

    def build(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found.to_dict(), file, indent=1, allow_nan=False)
            file.write("\n")

    replace_file(out, build, force=force, inputs=inputs)


def _print(found: ImageStatistics) -> None:
    from bnport.errors import listed, printable
    from bnport.report import table

    rows = [
        [name, repr(float(mean)), repr(float(std)), repr(float(variance))]
        for name, mean, std, variance in zip(found.channels, found.mean, found.std, found.variance, strict=True)
    ]
    common.say(table(("channel", "mean", "std", "variance"), rows, right=()))
    common.say()
    common.say(f"keras{_after(found, 'keras.layers.Rescaling')}:")
    common.say(f"  keras.layers.Normalization(mean={_listed(found.mean)}, variance={_listed(found.variance)})")
    common.say(f"torchvision{_after(found, 'ToTensor')}:")
    common.say(f"  transforms.Normalize(mean={_listed(found.mean)}, std={_listed(found.std)})")
    constant = [name for name, std in zip(found.channels, found.std, strict=True) if not std]
    if constant:
        # torchvision.transforms.functional.normalize raises; keras.layers.Normalization takes at least backend.epsilon()
        common.say(
            f"note: channel {listed(constant)}: one value in all pixels, so std and variance are 0. torchvision refuses a std"
            " of 0, and Keras divides by 1e-07; with 1 in its place the channel becomes 0"
        )
    for note in found.notes:
        common.say(f"note: {printable(note, 600)}")
    common.say(
        f"{found.images} images, {found.exact.n} pixels per channel, {found.dtype} scaled by {found.scale}; exact"
    )


def _after(found: ImageStatistics, scaling: str) -> str:
    if found.scale == 1:
        return ""
    argument = "" if scaling == "ToTensor" and found.scale == Fraction(1, 255) else found.scale
    return f", after {scaling if argument == '' or 'keras' in scaling else 'scaling'}({argument})"


def _listed(values: Any) -> str:
    return "[" + ", ".join(repr(float(value)) for value in values) + "]"
