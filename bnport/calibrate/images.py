"""Mean and standard deviation of a large number of images, exactly.

Pixels are integers, so their sums are taken as integers: nothing rounds until the last division, one image or a billion,
one process or many, in any order. The usual way does not survive large numbers:
`(imgs.astype("float32") / 255).mean((0, 1, 2))` adds one pixel after the other to a float32, which stops growing at
2**24: 0.418 on 800 images of 224 x 224 and 0.209 on 1600, where the truth is 0.500, without a warning.

Files are decoded by Pillow (the extra `images`) in a pool of processes; a histogram per channel, taken where the decoder
left the pixels, adds about a fifth to the cost of decoding a 500 x 375 JPEG and 3 % to decoding and resizing it.
"""

from __future__ import annotations

import os
import stat
from fractions import Fraction
from operator import add
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.calibrate.executors import map_blocks
from bnport.calibrate.moments import ExactMoments, exact_moments
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, Question, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any

    from bnport.record import Array

    Progress = Callable[[int, int, str], None]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # decoders that run nothing and open no other file
MODES = {"RGB": ("red", "green", "blue"), "L": ("grey",), "I;16": ("grey",)}
RESAMPLE = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
PIXELS_LIMIT = 100_000_000  # of one image: 300 MB decoded; a larger one in a folder of images is a bomb
BLOCK_BYTES = 8 << 20  # of files: 0.1 s or more of decoding
BLOCK_FILES = 512
BLOCKS = 64  # of smaller blocks down to LEAST_BYTES each, if the files are few: so that all workers end together
LEAST_BYTES = 1 << 20


class ImageStatistics:
    """What `image_statistics` found.

    images:   how many images were counted.
    exact:    the integer sums of the unscaled pixels (ExactMoments), channel by channel.
    scale:    the fraction that pixels are multiplied by.
    mean, std, variance: of scaled pixels, float64 of shape (C,), each correctly rounded from the exact value
              (std: from the correctly rounded variance). The variance is the population's: divided by n.
    channels: names, where the files say (("red", "green", "blue")), else numbers.
    notes:    what was converted or skipped.
    """

    __slots__ = ("channels", "exact", "images", "mean", "notes", "scale", "std", "variance")

    def __init__(
        self, images: int, exact: ExactMoments, scale: Fraction, channels: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        if not exact.n:
            raise InvalidValue("no pixels: there is nothing to take a mean of")
        self.images, self.exact, self.scale = images, exact, scale
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
        return f"ImageStatistics(images={self.images}, mean={self.mean.tolist()}, std={self.std.tolist()})"


def image_statistics(
    source: Any,
    size: int | tuple[int, int] | None = None,
    scale: Fraction | float | None = None,
    *,
    mode: str = "RGB",
    resample: str = "bilinear",
    recursive: bool = True,
    damaged: str = "refuse",
    axis: int | None = None,
    key: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageStatistics:
    """Mean and standard deviation per channel over all pixels of all images, exactly.

    source:   a folder of images; one image; a list of images and folders (each folder is then one block of work, listed
              by its worker: for more files than one process should list); an `.npy` or `.npz` file or integer array of
              shape (N, H, W, C), or another with `axis`; or an iterable of integer arrays (H, W, C), of any H and W.
    size:     height and width (or one number for both) that every image file is first resized to; default: as it is.
    scale:    pixels are multiplied by it; default 1/255, and 1/65535 for 16-bit pixels. Fraction(1, 255) is exact.
    mode:     what image files are converted to: RGB (alpha is dropped), L (grey, ITU-R 601), or I;16 (16-bit grey).
    resample: of `size`: nearest, bilinear, bicubic, lanczos, box or hamming, as Pillow defines them.
    recursive: whether folders in the folder are entered (links to folders never are).
    damaged:  "refuse", or "skip" files that cannot be decoded and name them in `notes`.
    axis:     the channel axis of an array; default the last, if its length is 1 to 4.
    key:      the array of an `.npz` that holds several.
    engine, workers, progress: as in executors.map_blocks, for files.

    Raises InvalidValue (no images, not integers, image too large), FormatError (a file that cannot be decoded, named),
    NotFound, Question (an array whose channel axis is not plain), MissingDependency without Pillow.
    """
    if mode not in MODES:
        raise InvalidValue(f"mode: expected one of {', '.join(MODES)}, got {printable(mode)!r}")
    if resample not in RESAMPLE:
        raise InvalidValue(f"resample: expected one of {', '.join(RESAMPLE)}, got {printable(resample)!r}")
    if damaged not in ("refuse", "skip"):
        raise InvalidValue(f"damaged: expected 'refuse' or 'skip', got {printable(damaged)!r}")
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if path.lower().endswith((".npy", ".npz")):
            from bnport.calibrate.sources import rows_of_file

            return _of_rows(rows_of_file(path, key), axis, scale, printable(path))
        paths, notes = find_images(path, recursive)
    elif hasattr(source, "dtype") and hasattr(source, "shape"):
        return _of_rows(source, axis, scale, "the array")
    elif isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
        paths, notes = [os.fspath(path) for path in source], []
    elif hasattr(source, "__iter__"):
        return _of_arrays(source, scale)
    else:
        raise InvalidValue(f"a {printable(type(source).__name__)} is not images: expected a folder, paths or arrays")
    how = _How(_checked_size(size), mode, resample, damaged == "skip", recursive)
    blocks = list(_blocks(paths, how))
    done = map_blocks(count_block, blocks, engine="serial" if len(blocks) < 2 else engine, workers=workers)
    total, known = None, not any(block.folder for block in blocks)
    for counted in done:
        total = counted if total is None else total.merge(counted)
        if progress:
            progress(total.images + len(total.skipped), len(paths) if known else 0, "images")
    if total is None or not total.images:
        raise InvalidValue(f"no image could be decoded; tried {listed(paths, 3)}")
    return ImageStatistics(
        total.images, total.exact, _scale(scale, 65535 if mode == "I;16" else 255), MODES[mode], notes + total.notes()
    )


def find_images(path: str, recursive: bool = True) -> tuple[list[str], list[str]]:
    """The image files in a folder, by suffix, in the order of their paths; and notes on what was left out."""
    if not os.path.exists(path):
        raise NotFound(f"{printable(path)}: no such file or folder")
    if not os.path.isdir(path):
        return [path], []
    found, others = [], 0

    def unreadable(error: OSError) -> None:
        raise NotFound(f"{printable(error.filename)}: cannot be listed: {error.strerror}")

    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders.sort()
        if not recursive:
            folders.clear()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.join(folder, name))
            else:
                others += 1
    if not found:
        raise NotFound(f"{printable(path)}: no images in this folder; looked for {', '.join(SUFFIXES)}")
    return found, [f"{others} other files left alone"] if others else []


# Arrays.


def _of_rows(rows: Any, axis: int | None, scale: Fraction | float | None, name: str) -> ImageStatistics:
    shape, dtype = tuple(rows.shape), np.dtype(str(rows.dtype).removeprefix("torch."))
    if dtype.kind not in "iub":
        raise InvalidValue(
            f"{name}: expected pixels as integers (uint8), got {dtype}; for floats there is calibrate.moments.moments"
        )
    if axis is None:
        if len(shape) != 4 or not 1 <= shape[-1] <= 4:
            raise Question(
                f"{name}: shape {shape}: which axis are the channels? Give axis, or reshape to (images, height, width,"
                " channels): x[..., None] for grey images, x[None] for a single one"
            )
        axis = 3
    if not -len(shape) <= axis < len(shape):
        raise InvalidValue(f"{name}: shape {shape} has no axis {axis}")
    axis %= len(shape)
    total = ExactMoments(0, [0] * shape[axis], [0] * shape[axis]) if shape[axis] else None
    if total is None or 0 in shape:
        raise InvalidValue(f"{name}: shape {shape} holds no pixels")
    step = max(1, (64 << 20) // max(1, dtype.itemsize * int(np.prod(shape[1:], dtype=object)))) if axis else shape[0]
    for start in range(0, shape[0], step):
        total = total.merge(exact_moments(np.asarray(rows[start : start + step]), axis))
    images = shape[0] if axis else 1
    most = 65535 if dtype == np.uint16 else 255
    return ImageStatistics(images, total, _scale(scale, most), [str(c) for c in range(shape[axis])])


def _of_arrays(arrays: Iterable[Any], scale: Fraction | float | None) -> ImageStatistics:
    total, images, most = None, 0, 255
    for image in arrays:
        array = np.asarray(image)
        if array.ndim != 3 or array.dtype.kind not in "iub":
            raise InvalidValue(
                f"image {images}: expected integers (height, width, channels), got {array.dtype} {array.shape}"
            )
        exact = exact_moments(array)
        if total is not None and total.channels != exact.channels:
            raise InvalidValue(f"image {images}: {exact.channels} channels, those before it have {total.channels}")
        most = 65535 if array.dtype == np.uint16 else most
        total = exact if total is None else total.merge(exact)
        images += 1
    if total is None:
        raise InvalidValue("no images: there is nothing to take a mean of")
    return ImageStatistics(images, total, _scale(scale, most), [str(c) for c in range(total.channels)])


def _scale(scale: Fraction | float | None, most: int) -> Fraction:
    if scale is None:
        return Fraction(1, most)
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


# Files.


class _How(NamedTuple):
    size: tuple[int, int] | None
    mode: str
    resample: str
    skip: bool
    recursive: bool


class _Block(NamedTuple):
    paths: list[str]
    how: _How
    folder: bool = False  # paths is one folder, not yet listed


class Counted(NamedTuple):
    """The sums of some image files: merges exactly, in any order."""

    images: int
    exact: ExactMoments
    converted: dict[str, int]  # mode of the file -> how many were converted from it
    skipped: list[str]

    def merge(self, other: Counted) -> Counted:
        """Both together."""
        converted = dict(self.converted)
        for mode, count in other.converted.items():
            converted[mode] = converted.get(mode, 0) + count
        return Counted(
            self.images + other.images, self.exact.merge(other.exact), converted, self.skipped + other.skipped
        )

    def notes(self) -> list[str]:
        """What a user should know about how the pixels came about."""
        found = []
        if self.converted:
            found.append("converted: " + ", ".join(f"{n} from {mode}" for mode, n in sorted(self.converted.items())))
        if self.skipped:
            found.append(f"{len(self.skipped)} files could not be decoded and are not counted: {listed(self.skipped)}")
        return found


def _blocks(paths: list[str], how: _How) -> Iterator[_Block]:
    """Files that are worth about the same work each, in order; a folder among the paths is a block of its own."""
    sizes = [_size(path) for path in paths]
    enough = min(BLOCK_BYTES, max(LEAST_BYTES, sum(size or 0 for size in sizes) // BLOCKS))
    block: list[str] = []
    taken = 0
    for path, size in zip(paths, sizes, strict=True):
        if size is None:
            yield _Block([path], how, folder=True)
            continue
        block.append(path)
        taken += size
        if taken >= enough or len(block) >= BLOCK_FILES:
            yield _Block(block, how)
            block, taken = [], 0
    if block:
        yield _Block(block, how)


def _size(path: str) -> int | None:
    """Bytes of a file; None for a folder."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise NotFound(f"{printable(path)}: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{printable(path)}: not a regular file")
    return status.st_size


def count_block(block: _Block) -> Counted:
    """Decode the files of one block and sum their pixels. Runs in a worker."""
    import warnings

    how = block.how
    paths = block.paths
    if block.folder:
        paths = [p for part in _blocks(find_images(paths[0], how.recursive)[0], how) for p in part.paths]
    channels = len(MODES[how.mode])
    counts = [0] * (channels * 256)  # a list, so that a worker starts without numpy
    wide = ExactMoments(0, [0] * channels, [0] * channels)
    converted: dict[str, int] = {}
    skipped: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own size warning; PIXELS_LIMIT is stricter. EXIF complaints
        for path in paths:
            try:
                image = _decoded(path, how, converted)
            except FormatError:
                if not how.skip:
                    raise
                skipped.append(path)
                continue
            if how.mode == "I;16":
                wide = wide.merge(exact_moments(np.asarray(image, np.uint16)[..., None]))
            else:
                counts = list(map(add, counts, image.histogram()))
    return Counted(len(paths) - len(skipped), wide if how.mode == "I;16" else _sums(counts), converted, skipped)


def _sums(counts: list[int]) -> ExactMoments:
    """Exact moments from 256 counts per channel."""
    rows = [counts[k : k + 256] for k in range(0, len(counts), 256)]
    total = [sum(value * count for value, count in enumerate(row)) for row in rows]
    squares = [sum(value * value * count for value, count in enumerate(row)) for row in rows]
    return ExactMoments(sum(rows[0]), total, squares)


def _decoded(path: str, how: _How, converted: dict[str, int]) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency("decoding image files needs Pillow: pip install 'bnport[images]'") from None
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_LIMIT:
                raise FormatError(
                    f"{printable(path)}: {image.width} x {image.height} pixels; images of more than {PIXELS_LIMIT} are"
                    " not decoded"
                )
            image.load()
            mode = image.mode
            if getattr(image, "is_animated", False):
                converted["an animation (its first frame)"] = converted.get("an animation (its first frame)", 0) + 1
            if mode != how.mode:
                if mode in ("I", "F") or mode.startswith("I;16") or how.mode == "I;16":
                    raise InvalidValue(
                        f"{printable(path)}: its pixels are of the kind {mode}, which does not convert to {how.mode} without"
                        " clipping; 16-bit grey images are read with mode I;16"
                    )
                converted[mode] = converted.get(mode, 0) + 1
                image = image.convert(how.mode)
            if how.size is not None and image.size != how.size[::-1]:
                image = image.resize(how.size[::-1], getattr(Image.Resampling, how.resample.upper()))
            return image
    except (FormatError, InvalidValue):
        raise
    except Exception as error:  # on damaged files decoders raise whatever their parsing ran into
        raise FormatError(f"{printable(path)}: cannot be decoded as an image ({printable(error, 120)})") from None
