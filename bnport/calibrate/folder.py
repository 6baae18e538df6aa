"""A folder of images as batches for a Keras model, decoded by Keras' own loaders.

Every image file below the folder, in the order of the paths. How the pixels reach the model is said, never guessed:

    size            (height, width) to resize to, or one number for both; default the model's input size, where that is fixed
    loader          "load_img": keras.utils.load_img (Pillow), any backend, the default
                    "dataset": keras.utils.image_dataset_from_directory (needs TensorFlow); resizing differs in detail,
                    so name the loader that the model was trained with
    interpolation   "bilinear" (default), "nearest", "bicubic", ... as the loader knows them
    crop            True: crop to the target's aspect ratio instead of distorting
    scale           pixels are multiplied by it: "1" for 0 ... 255 as they are, "1/255" for 0 ... 1
    offset          added after scaling: scale "1/127.5", offset -1 for -1 ... 1
    preprocessing   instead of scale and offset, the preprocess_input of a keras.applications module: "resnet50"

Without scale or preprocessing the model must begin by rescaling 0 ... 255 itself: with a Rescaling layer that makes no
more than -10 ... 10 of it, or with a Normalization layer whose variances are all above 1. (Pixels of 0 ... 1 have a
variance of 1/4 at most, those of -1 ... 1 one of 1 at most: such a layer was adapted to neither.)

Refused, with the file's name: what is no regular file, an image of more than decoding.PIXELS_LIMIT pixels, formats that are
not the suffixes' own, and grey images of 16 or 32 bits with load_img, which leaves them unscaled or clips them at 255.
Other modes (palette, alpha, CMYK, 1 bit) become what the loader makes of them.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from typing import TYPE_CHECKING, Any

from bnport._lazy import np
from bnport.calibrate.decoding import PIXELS_LIMIT
from bnport.calibrate.decoding import SUFFIXES as IMAGES
from bnport.errors import (
    FormatError,
    InvalidValue,
    MissingDependency,
    NotFound,
    Question,
    first_line,
    listed,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnport.calibrate.models import LiveModel
    from bnport.record import Array

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")  # what image_dataset_from_directory takes
FORMATS = ("BMP", "GIF", "JPEG", "PNG")  # the decoders for these
LOADERS = ("load_img", "dataset")


class ImageFolder:
    """Batches of decoded images, float32, by number; see the module for the options.

    Raises NotFound without images, Question where scale or size is not decided, InvalidValue for options that do not fit.
    """

    def __init__(
        self,
        live: LiveModel,
        path: str,
        *,
        batch_size: int | None = None,
        size: int | tuple[int, int] | None = None,
        loader: str = "load_img",
        interpolation: str = "bilinear",
        crop: bool = False,
        scale: str | float | None = None,
        offset: float = 0.0,
        preprocessing: str | None = None,
    ) -> None:
        if loader not in LOADERS:
            raise InvalidValue(f"loader: expected one of {', '.join(LOADERS)}, got {printable(loader)!r}")
        self.live, self.path, self.batch_size = live, path, batch_size or 32
        self.loader, self.interpolation, self.crop = loader, interpolation, crop
        self.files, others = _files(path)
        if not self.files:
            raise NotFound(
                f"{printable(path)}: no images ({', '.join(SUFFIXES)}) in this folder or below it{_left_out(others)}"
            )
        self.channels_first, (height, width, channels) = _input(live)
        if size is None:
            if height is None or width is None:
                raise Question(f"{live.what}: its input has no fixed size; say which with size (--size HEIGHTxWIDTH)")
            size = (height, width)
        self.size = _checked_size(size)
        modes = {1: "grayscale", 3: "rgb", 4: "rgba"}
        if channels not in modes:
            raise InvalidValue(f"{live.what}: its input has {channels} channels; images have 1, 3 or 4")
        self.mode = modes[channels]
        self.finish, said = _pixels(live, scale, offset, preprocessing, channels)
        decoder = "keras.utils.load_img" if loader == "load_img" else "keras.utils.image_dataset_from_directory"
        self.notes = [
            f"{len(self.files)} images decoded by {decoder}, {self.mode}, resized to {self.size[0]} x {self.size[1]}"
            f" ({interpolation}{', cropped to its shape' if crop else ''}); {said}{_left_out(others)}"
        ]
        self._dataset: Any = self._open_dataset() if loader == "dataset" else None
        self._next, self._iterator = -1, iter(())

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, number: int) -> Array:
        """Batch `number`, shape (n, height, width, channels), or channels first if the model is."""
        if self.loader == "dataset":
            pixels = self._from_dataset(number)
        else:
            part = self.files[number * self.batch_size : (number + 1) * self.batch_size]
            pixels = np.stack([self._decode(file) for file in part])
        finished: Array = np.asarray(self.finish(pixels), np.float32)
        return np.moveaxis(finished, -1, 1) if self.channels_first else finished

    def fingerprint(self) -> str:
        """sha256 over how images are read and every file's name, size and time of change."""
        digest = hashlib.sha256(self.notes[0].encode())
        for file in self.files:
            status = _regular(file)
            name = os.path.relpath(file, self.path)
            digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _decode(self, file: str) -> Array:
        utils = self.live.keras.utils
        options = {"keep_aspect_ratio": self.crop}
        mode = _checked_mode(file)
        if mode in ("I", "F") or mode.startswith("I;16"):
            raise InvalidValue(
                f"{printable(file)}: its pixels are of the kind {mode}, which keras.utils.load_img does not bring to"
                " 0 ... 255; convert the images to 8 bits, or pass the pixels as arrays"
            )
        try:
            image = utils.load_img(
                file, color_mode=self.mode, target_size=self.size, interpolation=self.interpolation, **options
            )
            array: Array = utils.img_to_array(image, data_format="channels_last", dtype="float32")
        except ImportError:
            raise MissingDependency("decoding images needs Pillow: pip install pillow") from None
        except (OSError, SyntaxError) as error:
            raise FormatError(f"{printable(file)}: not an image that Keras decodes: {printable(error, 120)}") from None
        except ValueError as error:
            raise InvalidValue(f"{printable(file)}: {printable(error, 300)}") from None
        except Exception as error:  # on damaged files decoders raise whatever their parsing ran into
            raise FormatError(f"{printable(file)}: not an image that Keras decodes: {printable(error, 120)}") from None
        return array

    def _open_dataset(self) -> Any:
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise MissingDependency(
                "loader 'dataset' needs TensorFlow: pip install 'bnport[tensorflow]', or use load_img"
            ) from None
        for file in self.files:  # now: the dataset opens them on threads of its own
            _regular(file)
        try:
            return self.live.keras.utils.image_dataset_from_directory(
                self.path, labels=None, color_mode=self.mode, batch_size=self.batch_size, image_size=self.size,
                shuffle=False, interpolation=self.interpolation, crop_to_aspect_ratio=self.crop, verbose=False,
            )  # fmt: skip
        except ValueError as error:  # an interpolation that it does not know
            raise InvalidValue(f"{printable(self.path)}: {printable(error, 300)}") from None

    def _from_dataset(self, number: int) -> Array:
        if number != self._next:
            self._iterator = iter(self._dataset.skip(number))
        self._next = number + 1
        try:
            return np.asarray(next(self._iterator))
        except StopIteration:
            raise InvalidValue(f"{printable(self.path)}: images disappeared while they were read") from None
        except Exception as error:
            if not type(error).__module__.startswith("tensorflow"):
                raise
            first = printable(first_line(error), 160)
            raise FormatError(
                f"{printable(self.path)}: an image of batch {number} is not decoded: {first}; loader load_img names it"
            ) from None


def _files(path: str) -> tuple[list[str], dict[str, int]]:
    """The images in a folder, in the order of their paths; suffix -> how many other files there are."""
    found, others = [], dict[str, int]()
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.join(folder, name))
            else:
                suffix = os.path.splitext(name)[1].lower()
                others[suffix] = others.get(suffix, 0) + 1
    return found, others


def _left_out(others: dict[str, int]) -> str:
    counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items())]
    return f"; other files left out: {listed(counts)}" if counts else ""


def first_image(path: str) -> str | None:
    """An image in a folder or below it, also of a kind that is not read here; None if there is none."""
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            if name.lower().endswith((*SUFFIXES, *IMAGES)):
                return os.path.join(folder, name)
    return None


def _regular(file: str) -> os.stat_result:
    try:
        status = os.stat(file)
    except OSError as error:
        raise NotFound(f"{printable(file)}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{printable(file)}: not a regular file")
    return status


def _checked_mode(file: str) -> str:
    """Pillow's name for an image's kind of pixels, from its header alone."""
    _regular(file)
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency("decoding images needs Pillow: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about size; PIXELS_LIMIT decides
            with Image.open(file, formats=FORMATS) as image:
                mode, pixels = str(image.mode), image.width * image.height
    except Image.DecompressionBombError:
        mode, pixels = "", PIXELS_LIMIT + 1
    except Exception as error:  # on damaged files decoders raise whatever their parsing ran into
        why = f"no {', '.join(FORMATS)} file" if isinstance(error, Image.UnidentifiedImageError) else error
        raise FormatError(f"{printable(file)}: not an image that Keras decodes: {printable(why, 120)}") from None
    if pixels > PIXELS_LIMIT:
        raise FormatError(f"{printable(file)}: images of more than {PIXELS_LIMIT} pixels are not decoded")
    return mode


def _input(live: LiveModel) -> tuple[bool, tuple[int | None, int | None, int | None]]:
    """Whether the model's one image input is channels-first, and its (height, width, channels)."""
    inputs = live.inputs()
    if inputs is None or len(inputs) != 1 or len(next(iter(inputs.values()))) != 4:
        what = "no symbolic inputs" if inputs is None else listed(f"{k} {v}" for k, v in inputs.items())
        raise InvalidValue(f"{live.what}: a folder of images fits a model with one image input; this one has {what}")
    _, a, b, c = next(iter(inputs.values()))
    if c not in (1, 3, 4) and a in (1, 3, 4):
        return True, (b, c, a)
    return False, (a, b, c)


def _checked_size(size: Any) -> tuple[int, int]:
    """(height, width) of a size as it was asked for."""
    pair = (size, size) if isinstance(size, int | np.integer) else size
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(k, int | np.integer) and not isinstance(k, bool) and k > 0 for k in pair)
    ):
        raise InvalidValue(f"size: expected (height, width), such as (224, 224), got {printable(repr(size), 60)}")
    return int(pair[0]), int(pair[1])


def _pixels(
    live: LiveModel, scale: str | float | None, offset: float, preprocessing: str | None, channels: int
) -> tuple[Callable[[Array], Any], str]:
    """What happens to decoded pixels (0 ... 255, float32), and how to say it."""
    if preprocessing is not None:
        if scale is not None or offset:
            raise InvalidValue("preprocessing: it scales by itself; leave scale and offset away")
        applications = live.keras.applications
        known = [n for n in dir(applications) if hasattr(getattr(applications, n), "preprocess_input")]
        if preprocessing not in known:
            raise NotFound(
                f"preprocessing: keras.applications has no {printable(preprocessing)!r}; there are {listed(known, 40)}"
            )
        if channels != 3:
            raise InvalidValue(
                f"preprocessing: is for images of 3 channels, {live.what} takes {channels}; say scale and offset instead"
            )
        function = getattr(applications, preprocessing).preprocess_input
        return (
            lambda pixels: function(pixels, data_format="channels_last"),
            f"keras.applications.{preprocessing}.preprocess_input",
        )
    if scale is None:
        if offset:
            raise InvalidValue(f"offset {offset}: is added after scaling; give scale too (1 for 0 ... 255 as they are)")
        layer = _scaling_layer(live)
        if not _takes_bytes(layer):
            unsure = f" Its layer {printable(layer.name)!r} does not tell:" if layer is not None else ""
            raise Question(
                f"{live.what}: how are pixels scaled for it?{unsure} scale 1 (0 ... 255), 1/255 (0 ... 1), 1/127.5 with"
                " offset -1 (-1 ... 1), or preprocessing with the name of a keras.applications module"
            )
        return (lambda pixels: pixels), "pixels 0 ... 255, which the model's own first layers rescale"
    factor = _number(scale)
    if factor == 1 and not offset:
        return (lambda pixels: pixels), "pixels 0 ... 255"
    return (
        lambda pixels: pixels * np.float32(factor) + np.float32(offset),
        f"pixels times {printable(scale)}{f' plus {offset}' if offset else ''}",
    )


def rescales_bytes(live: LiveModel) -> bool:
    """Whether a model says that it takes pixels 0 ... 255: by integers as inputs, or by the layer that it begins with."""
    tensors = getattr(live.model, "inputs", None) or ()
    dtypes = [str(getattr(x.dtype, "name", x.dtype)) for x in tensors]
    return (bool(dtypes) and not any("float" in dtype for dtype in dtypes)) or _takes_bytes(_scaling_layer(live))


def _scaling_layer(live: LiveModel) -> Any:
    """The Rescaling or Normalization layer among the first three, or None."""
    layers = getattr(live.model, "layers", ())[:3]
    return next((layer for layer in layers if type(layer).__name__ in ("Rescaling", "Normalization")), None)


def _takes_bytes(layer: Any) -> bool:
    """Whether a Rescaling or Normalization layer can only be meant for pixels 0 ... 255: see the module."""
    if layer is None:
        return False
    if type(layer).__name__ == "Rescaling":
        ends = np.asarray(layer.scale, float) * np.array([[0.0], [255.0]]) + np.asarray(layer.offset, float)
        return bool((np.abs(ends) <= 10).all())
    variance = getattr(layer, "variance", None)  # None until it is adapted
    return (
        variance is not None
        and not layer.invert
        and bool((np.asarray(variance.numpy() if hasattr(variance, "numpy") else variance) > 1).all())
    )


def _number(scale: str | float) -> float:
    top, _, bottom = str(scale).partition("/")
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise InvalidValue(f"scale: expected a number or a fraction such as 1/255, got {printable(scale)!r}") from None
    if not 0 < abs(value) < float("inf"):
        raise InvalidValue(f"scale: expected a number other than 0, got {printable(scale)!r}")
    return value
