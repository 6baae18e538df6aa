"""Mean and standard deviation of a large number of images, exactly.

Pixels are integers, so their sums are taken as integers: nothing rounds until the last division, one image or a billion,
one process or many, in any order. The usual way does not survive large numbers:
`(imgs.astype("float32") / 255).mean((0, 1, 2))` adds one pixel after the other to a float32, which stops growing at
2**24: 0.418 on 800 images of 224 x 224 and 0.209 on 1600, where the truth is 0.500, without a warning.

Arrays are summed in pixels.py, which also says what pixels of which dtype are scaled by. Files are decoded by Pillow (the
extra `images`) in a pool of processes, in decoding.py; a histogram per channel, taken where the decoder left the pixels,
adds about a fifth to the cost of decoding a 500 x 375 JPEG and 3 % to decoding and resizing it.
"""

from __future__ import annotations

import os
from fractions import Fraction
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.calibrate import decoding, pixels
from bnport.calibrate.decoding import MODES, PIXELS_LIMIT
from bnport.calibrate.executors import ENGINES, map_blocks
from bnport.errors import InvalidValue, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from bnport.calibrate.moments import ExactMoments
    from bnport.record import Array

    Progress = Callable[[int, int, str], None]

RESAMPLE = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


class ImageStatistics:
    """What `image_statistics` found.

    images:   how many images were counted.
    exact:    the integer sums of the unscaled pixels (ExactMoments), channel by channel.
    dtype:    of the unscaled pixels: uint8, or uint16 from 16-bit files; of arrays their own.
    scale:    the fraction that pixels are multiplied by.
    mean, std, variance: of scaled pixels, float64 of shape (C,), each correctly rounded from the exact value
              (std: from the correctly rounded variance). The variance is the population's: divided by n.
    channels: names, where the files say (("red", "green", "blue")), else numbers.
    notes:    what was converted or skipped.
    """

    __slots__ = ("channels", "dtype", "exact", "images", "mean", "notes", "scale", "std", "variance")

    def __init__(self, found: pixels.Pixels, channels: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.images, self.exact, self.dtype, self.scale = found
        exact: ExactMoments = self.exact
        scale: Fraction = self.scale
        if not exact.n:
            raise InvalidValue("no pixels: there is nothing to take a mean of")
        self.channels, self.notes = tuple(channels), tuple(notes)
        self.mean = exact.moments(scale).mean
        n = exact.n
        variance = [
            float(scale * scale * Fraction(n * q - s * s, n * n))
            for s, q in zip(exact.total, exact.squares, strict=True)
        ]
        self.variance: Array = np.array(variance)
        self.std: Array = np.sqrt(self.variance)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON; `sum` and `sum_of_squares` are the exact integers."""
        return {
            "images": self.images,
            "pixels": self.exact.n,
            "dtype": self.dtype,
            "scale": str(self.scale),
            "channels": list(self.channels),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "variance": self.variance.tolist(),
            "sum": list(self.exact.total),
            "sum_of_squares": list(self.exact.squares),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return (
            f"ImageStatistics(images={self.images}, mean={self.mean.tolist()}, std={self.std.tolist()},"
            f" scale={self.scale})"
        )


def image_statistics(
    source: Any,
    size: int | tuple[int, int] | None = None,
    scale: Fraction | float | None = None,
    *,
    mode: str | None = None,
    resample: str | None = None,
    recursive: bool = True,
    damaged: str = "refuse",
    axis: int | None = None,
    key: str | None = None,
    engine: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageStatistics:
    """Mean and standard deviation per channel over all pixels of all images, exactly.

    source:   a folder of images; one image; a list of images and folders (each folder is then one block of work, listed
              by its worker: for more files than one process should list); an `.npy` or `.npz` file or integer array
              or tensor of shape (N, H, W, C), or another with `axis`; or an iterable of those (H, W, C), of any H and W.
    size:     height and width (or one number for both) that every image file is first resized to; default: as it is.
    scale:    pixels are multiplied by it; default 1/255 for uint8, 1/65535 for uint16, 1 for bool; other integers need
              it. Fraction(1, 255) is exact.
    mode:     what image files are converted to: RGB (default; alpha is dropped), L (grey, ITU-R 601), or I;16 (16-bit grey).
    resample: of `size`: nearest, bilinear (default), bicubic, lanczos, box or hamming, as Pillow defines them.
    recursive: whether folders in the folder are entered (links to folders never are).
    damaged:  "refuse", or "skip" files that cannot be decoded and name them in `notes`.
    axis:     the channel axis of an array, or of each image; default the last, if its length is 1 to 4.
    key:      the array of an `.npz` that holds several.
    engine, workers: as in executors.map_blocks, for image files.
    progress: called as progress(images done, of how many or 0, "images").

    Raises InvalidValue (no images, not integers, image too large, pixels that Pillow would round, as 16-bit colours to 8 bits,
    or clip, a setting that does not apply to such a source), FormatError (a file that cannot be decoded, named), NotFound,
    Question (an array whose channel axis or scale is not plain), MissingDependency without Pillow.
    """
    if mode not in (None, *MODES):
        raise InvalidValue(f"mode: expected one of {', '.join(MODES)}, got {printable(mode)!r}")
    if resample not in (None, *RESAMPLE):
        raise InvalidValue(f"resample: expected one of {', '.join(RESAMPLE)}, got {printable(resample)!r}")
    if damaged not in ("refuse", "skip"):
        raise InvalidValue(f"damaged: expected 'refuse' or 'skip', got {printable(damaged)!r}")
    if engine not in (None, *ENGINES):
        raise InvalidValue(f"engine: expected one of {', '.join(ENGINES)}, got {printable(engine)!r}")
    if workers is not None and workers < 1:
        raise InvalidValue(f"workers: expected 1 or more, got {workers}")
    factor, target = _checked_scale(scale), _checked_size(size)
    of_files = {
        "size": size is not None, "mode": mode is not None, "resample": resample is not None,
        "damaged (--skip-damaged)": damaged != "refuse", "recursive (--no-recursive)": not recursive,
        "engine": engine is not None, "workers": workers is not None,
    }  # fmt: skip
    of_arrays = {"axis": axis is not None, "key": key is not None}
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if path.lower().endswith((".npy", ".npz")):
            from bnport.calibrate.sources import rows_of_file

            one = "key" if path.lower().endswith(".npy") else ""
            _refuse(of_files | {one: of_arrays.get(one, False)}, printable(path), "an array in a file")
            return _of_array(pixels.of_rows(rows_of_file(path, key), axis, factor, printable(path), progress))
        _refuse(of_arrays, printable(path), "image files")
        paths, notes = decoding.find_images(path, recursive)
    elif hasattr(source, "dtype") and hasattr(source, "shape"):
        _refuse(of_files | {"key": key is not None}, "the array", "an array in memory")
        return _of_array(pixels.of_rows(source, axis, factor, "the array", progress))
    elif isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
        _refuse(of_arrays, "the list of paths", "image files")
        if not all(isinstance(path, str | os.PathLike) for path in source):
            raise InvalidValue("a list of paths and other things is not images: expected paths only, or arrays only")
        paths, notes = [os.fspath(path) for path in source], []
    elif hasattr(source, "__iter__"):
        _refuse(of_files | {"key": key is not None}, "the iterable", "images (height, width, channels) one by one")
        return _of_array(pixels.of_arrays(source, axis, factor, progress))
    else:
        raise InvalidValue(f"a {printable(type(source).__name__)} is not images: expected a folder, paths or arrays")
    if resample is not None and target is None:
        raise InvalidValue("resample: says how to resize, and no size is given; give size too, or leave it away")
    mode = mode or "RGB"
    how = decoding.How(target, mode, resample or "bilinear", damaged == "skip", recursive)
    blocks = list(decoding.blocks_of(paths, how))
    done = map_blocks(
        decoding.count_block, blocks, engine="serial" if len(blocks) < 2 else engine or "local", workers=workers
    )
    total, known = None, not any(block.folder for block in blocks)
    for counted in done:
        total = counted if total is None else total.merge(counted)
        if progress:
            progress(total.images + len(total.skipped), len(paths) if known else 0, "images")
    if total is None or not total.images:
        raise InvalidValue(f"no image could be decoded; tried {listed(paths, 3)}")
    dtype = "uint16" if mode == "I;16" else "uint8"
    found = pixels.Pixels(total.images, total.exact, dtype, factor or pixels.SCALES[dtype])
    return ImageStatistics(found, MODES[mode], notes + total.notes())


def _of_array(found: pixels.Pixels) -> ImageStatistics:
    return ImageStatistics(found, [str(channel) for channel in range(found.exact.channels)])


def _refuse(given: dict[str, bool], name: str, kind: str) -> None:
    """Refuse the first setting that was given and that has no meaning for a source of this kind."""
    for setting, is_given in given.items():
        if is_given:
            raise InvalidValue(f"{name}: {kind}, to which {setting} does not apply; leave it away")


def _checked_scale(scale: Fraction | float | None) -> Fraction | None:
    if scale is None:
        return None
    try:
        exact = Fraction(scale)
    except (ValueError, OverflowError, TypeError):
        raise InvalidValue(f"scale: expected a finite number, got {printable(scale, 60)}") from None
    if not exact:
        raise InvalidValue("scale: expected a number other than 0")
    return exact


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(k, int) and k > 0 for k in pair) or pair[0] * pair[1] > PIXELS_LIMIT:
        raise InvalidValue(f"size: expected height and width in pixels, got {printable(size, 60)}")
    return pair[0], pair[1]
