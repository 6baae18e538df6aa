"""Image files, decoded and summed a block at a time: what `image_statistics` hands out to processes.

A histogram per channel is taken where Pillow left the pixels, so a worker that counts bytes starts without numpy. Sums of
blocks (`Counted`) merge exactly, in any order.
"""

from __future__ import annotations

import os
import stat
from operator import add
from typing import TYPE_CHECKING, NamedTuple

from bnport._lazy import np
from bnport.calibrate.moments import ExactMoments, exact_moments
from bnport.errors import FormatError, InvalidValue, MissingDependency, NotFound, listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # decoders that run nothing and open no other file
MODES = {"RGB": ("red", "green", "blue"), "L": ("grey",), "I;16": ("grey",)}
PIXELS_LIMIT = 100_000_000  # of one image: 300 MB decoded; a larger one in a folder of images is a bomb
BLOCK_BYTES = 8 << 20  # of files: 0.1 s or more of decoding
BLOCK_FILES = 512
BLOCKS = 64  # of smaller blocks down to LEAST_BYTES each, if the files are few: so that all workers end together
LEAST_BYTES = 1 << 20


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


class How(NamedTuple):
    """What is done to each image file; the settings of `image_statistics`."""

    size: tuple[int, int] | None
    mode: str
    resample: str
    skip: bool
    recursive: bool


class Block(NamedTuple):
    """Files that one worker decodes and sums."""

    paths: list[str]
    how: How
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


def blocks_of(paths: list[str], how: How) -> Iterator[Block]:
    """Files that are worth about the same work each, in order; a folder among the paths is a block of its own."""
    sizes = [_size(path) for path in paths]
    enough = min(BLOCK_BYTES, max(LEAST_BYTES, sum(size or 0 for size in sizes) // BLOCKS))
    block: list[str] = []
    taken = 0
    for path, size in zip(paths, sizes, strict=True):
        if size is None:
            yield Block([path], how, folder=True)
            continue
        block.append(path)
        taken += size
        if taken >= enough or len(block) >= BLOCK_FILES:
            yield Block(block, how)
            block, taken = [], 0
    if block:
        yield Block(block, how)


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


def count_block(block: Block) -> Counted:
    """Decode the files of one block and sum their pixels. Runs in a worker."""
    import warnings

    how = block.how
    paths = block.paths
    if block.folder:
        paths = [p for part in blocks_of(find_images(paths[0], how.recursive)[0], how) for p in part.paths]
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


def _decoded(path: str, how: How, converted: dict[str, int]) -> Any:
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
            rounded = _rounded(image)
            if rounded:
                raise InvalidValue(f"{printable(path)}: {rounded}")
            image.load()
            mode, wide = image.mode, _is_16_bit_grey(image)
            if getattr(image, "is_animated", False):
                converted["an animation (its first frame)"] = converted.get("an animation (its first frame)", 0) + 1
            if wide and how.mode == "I;16":
                if mode not in ("I", "I;16"):
                    image = image.convert("I")  # straight to I;16 Pillow 13 takes the bytes in the wrong order
                image = image.convert("I;16")  # no value changes
            elif mode != how.mode:
                if wide or mode in ("I", "F") or how.mode == "I;16":
                    raise InvalidValue(
                        f"{printable(path)}: its pixels are of the kind {mode}{_not_as(how.mode, mode, wide)}"
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


def _rounded(image: Any) -> str:
    """What the file holds and what to do, if Pillow's decoder would round it to fit its mode; "" if it keeps every bit.

    To be asked before load(), which forgets the raw mode: a PNG of 16-bit colours is "RGB" from "RGB;16B".
    """
    held = ""
    if image.format == "PPM" and image.mode != "F":
        full = 65535 if image.mode == "I" else 255  # Pillow brings any values to 0 ... full
        most = max((tile[3][1] for tile in image.tile if isinstance(tile[3], tuple)), default=full)
        if full % most:
            return (
                f"a PPM or PGM of values up to {most}, which Pillow brings to 0 ... {full} and rounds; pass the pixels as an"
                f" array, with scale 1/{most}"
            )
    elif image.mode.startswith(("I", "F")):  # wider than 8 bits, and handled by mode
        return ""
    elif image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile):
        held = "a PNG of 16 bits per channel"
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))  # BitsPerSample
        held = f"a TIFF of {bits} bits per channel" if bits > 8 else ""
    if not held:
        return ""
    return (
        f"{held}, which Pillow cuts to 8 bits; convert it to 8 bits per channel, or pass the pixels as a uint16 array"
    )


def _is_16_bit_grey(image: Any) -> bool:
    """Whether a decoded image is grey of 0 ... 65535; Pillow opens such a PGM as "I", which has 32 bits."""
    return bool(image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"))


def _not_as(wanted: str, mode: str, wide: bool) -> str:
    """Why pixels of one mode are not read as another, and what to do if there is something; after "of the kind ..."."""
    if wide:
        return f", which does not convert to {wanted} without clipping; 16-bit grey images are read with mode I;16"
    if mode == "I":
        return ", integers of which nothing says the range; pass them as an array, with scale"
    if mode == "F":
        return "; floats are not summed exactly; for an array of them: 'from bnport.calibrate.moments import moments'"
    return ", and mode I;16 reads 16-bit grey images only"
