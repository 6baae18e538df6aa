"""Folders of images: Keras' own loaders are the oracle; nothing about pixels is guessed."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bnport.calibrate.folder import ImageFolder
from bnport.calibrate.models import LiveModel
from bnport.calibrate.run import calibrate
from bnport.errors import FormatError, InvalidValue, NotFound, Question
from tests.calibrate import nets
from tests.calibrate.nets import L, keras


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images of different sizes and kinds, in two folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(40):
        (folder / f"class{k % 2}").mkdir(exist_ok=True)
        height, width = 20 + k, 60 - k
        ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.5, 0.2]) + rng.normal(
            0, 20, (height, width, 3)
        )
        image = Image.fromarray(np.clip(ramp, 0, 255).astype("u1"))
        image.save(folder / f"class{k % 2}" / f"{k:03}{('.png', '.jpg', '.BMP')[k % 3]}")
    (folder / "notes.txt").write_text("not an image")
    return str(folder)


def model(size=(24, 32), channels=3, first=()):
    i = keras.Input((*size, channels))
    x = i
    for layer in first:
        x = layer(x)
    return keras.Model(i, L.BatchNormalization(name="bn")(x))


def dataset(photos, size=(24, 32), mode="rgb", **options):
    """All images as Keras' own dataset gives them, in the order of the paths."""
    found = keras.utils.image_dataset_from_directory(
        photos, labels=None, shuffle=False, image_size=size, color_mode=mode, verbose=False, **options
    )
    return np.concatenate([np.asarray(b) for b in found])


def by_load_img(photos, size=(24, 32), **options):
    files = sorted(os.path.join(f, n) for f, _, names in os.walk(photos) for n in names if not n.endswith(".txt"))
    images = [keras.utils.load_img(f, target_size=size, interpolation="bilinear", **options) for f in files]
    return np.stack([keras.utils.img_to_array(image) for image in images])


def test_both_loaders_give_what_keras_gives(photos):
    live = LiveModel(model())
    ours = ImageFolder(live, photos, scale=1, batch_size=16)
    assert len(ours) == 3
    np.testing.assert_array_equal(np.concatenate([ours[k] for k in range(3)]), by_load_img(photos))
    ours = ImageFolder(live, photos, scale="1/255", loader="dataset", batch_size=16, crop=True)
    expected = dataset(photos, crop_to_aspect_ratio=True) * np.float32(1 / 255)
    np.testing.assert_array_equal(np.concatenate([ours[k] for k in range(3)]), expected)
    np.testing.assert_array_equal(ours[1], expected[16:32])  # out of turn, as a resumed run asks


def test_statistics_of_a_folder_are_those_of_the_pixels_that_the_model_gets(photos):
    pixels = by_load_img(photos).astype(float)
    for options, expected in (
        ({"scale": "1"}, pixels),
        ({"scale": "1/255"}, pixels / 255),
        ({"scale": "1/127.5", "offset": -1}, pixels / 127.5 - 1),
        ({"preprocessing": "resnet50"}, keras.applications.resnet50.preprocess_input(pixels.copy())),
    ):
        result = calibrate(model(), photos, images=options, batch_size=16)
        np.testing.assert_allclose(result["bn"].mean, expected.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["bn"].variance, expected.var((0, 1, 2)), rtol=1e-4)
        assert "40 images decoded by keras.utils.load_img, rgb, resized to 24 x 32 (bilinear)" in str(result)


def test_grey_and_channels_first_models(photos):
    live = LiveModel(model(channels=1))
    grey = ImageFolder(live, photos, scale=1)
    assert grey[0].shape == (32, 24, 32, 1)
    i = keras.Input((3, 24, 32))
    first = ImageFolder(LiveModel(keras.Model(i, L.BatchNormalization(axis=1)(i))), photos, scale=1)
    np.testing.assert_array_equal(first[0], np.moveaxis(by_load_img(photos)[:32], -1, 1))


def test_how_pixels_are_scaled_is_asked_unless_the_model_does_it_itself(photos):
    with pytest.raises(Question, match="how are pixels scaled for it"):
        calibrate(model(), photos)
    result = calibrate(model(first=[L.Rescaling(1 / 255)]), photos)
    assert "which the model's own first layers rescale" in str(result)
    assert result["bn"].mean.max() < 1
    free = keras.Model(i := keras.Input((None, None, 3)), L.BatchNormalization(name="bn")(i))
    with pytest.raises(Question, match="its input has no fixed size"):
        calibrate(free, photos, images={"scale": 1})
    assert calibrate(free, photos, images={"scale": 1, "size": (10, 12)})["bn"].n == 40 * 120


SCALING = {  # a first layer, and whether only pixels of 0 ... 255 can be meant for it
    "to 0 ... 1": (lambda: L.Rescaling(1 / 255), True),
    "to -1 ... 1": (lambda: L.Rescaling(1 / 127.5, -1), True),
    "of each channel": (lambda: L.Rescaling([1 / 58, 1 / 57, 1 / 57], [-2.1, -2.0, -1.8]), True),
    "from 0 ... 1 to -1 ... 1": (lambda: L.Rescaling(2.0, -1.0), False),
    "adapted to 0 ... 255": (lambda: L.Normalization(mean=[124.0, 116.0, 104.0], variance=[3300.0] * 3), True),
    "adapted to 0 ... 1": (lambda: L.Normalization(mean=[0.49, 0.46, 0.41], variance=[0.06] * 3), False),
    "the other way round": (lambda: L.Normalization(mean=[124.0] * 3, variance=[3300.0] * 3, invert=True), False),
}


@pytest.mark.parametrize("name", SCALING)
def test_only_a_layer_that_must_be_meant_for_bytes_answers_how_pixels_are_scaled(name, photos):
    make, answers = SCALING[name]
    network = model(first=[make()])
    if answers:
        result = calibrate(network, photos)
        np.testing.assert_allclose(
            result["bn"].mean, np.asarray(network.layers[1](by_load_img(photos))).mean((0, 1, 2)), rtol=1e-4
        )
    else:
        with pytest.raises(Question, match=f"how are pixels scaled for it.* Its layer '{network.layers[1].name}'"):
            calibrate(network, photos)


@pytest.mark.parametrize("name", SCALING)
def test_an_array_of_bytes_for_a_model_that_does_not_take_them_is_said(name, photos, tmp_path):
    make, answers = SCALING[name]
    pixels = by_load_img(photos).astype("u1")
    np.save(tmp_path / "pixels.npy", pixels)
    for data in (pixels, tmp_path / "pixels.npy"):
        said = [
            note for note in calibrate(model(first=[make()]), data).notes if "uint8, which reaches the model" in note
        ]
        assert bool(said) is not answers
    assert calibrate(model(), pixels).notes
    assert not calibrate(model(), pixels / np.float32(255)).notes
    i = keras.Input((24, 32, 3), dtype="uint8")
    assert not calibrate(keras.Model(i, L.BatchNormalization()(L.Lambda(lambda x: x / 255)(i))), pixels).notes


@pytest.mark.parametrize(
    ("first", "channels", "images", "message"),
    [
        ([L.Rescaling(1 / 255)], 3, {"offset": -1}, "offset -1: is added after scaling; give scale too"),
        ([], 1, {"preprocessing": "resnet50"}, "images of 3 channels, .* takes 1"),
        ([], 4, {"preprocessing": "vgg16"}, "images of 3 channels, .* takes 4"),
        ([], 3, {"scale": 1, "size": "24x32"}, r"size: expected \(height, width\).*'24x32'"),
        ([], 3, {"scale": 1, "size": (0, 32)}, r"size: expected \(height, width\)"),
        ([], 3, {"scale": 1, "loader": "dataset", "interpolation": "foo"}, "interpolation"),
        ([], 3, {"scales": 1}, "images: no option is called scales; there are size, loader"),
        ([], 3, {"scale": 1, "batch_size": 4}, "images: no option is called batch_size"),
    ],
)
def test_options_that_would_be_ignored_or_misread_are_refused(first, channels, images, message, photos):
    with pytest.raises(InvalidValue, match=message):
        calibrate(model(channels=channels, first=first), photos, images=images)


def test_one_number_is_a_square(photos):
    network = model(size=(16, 16))
    result = calibrate(network, photos, images={"scale": 1, "size": 16})
    np.testing.assert_allclose(result["bn"].mean, by_load_img(photos, (16, 16)).mean((0, 1, 2)), rtol=1e-5)


def of_one_mode(folder, mode, count=40):
    """`count` images of 8 x 8, and their grey values scaled to 0 ... 1."""
    from PIL import Image

    rng = np.random.default_rng(1)
    if mode == "I;16":
        pixels, most = rng.integers(0, 65536, (count, 8, 8)).astype("u2"), 65535
    else:
        pixels, most = rng.integers(0, 256, (count, 8, 8)).astype("u1"), 255
    for k, image in enumerate(pixels):
        Image.fromarray(image).convert(mode).save(folder / f"{k:02}.{'jpg' if mode == 'CMYK' else 'png'}")
    return pixels / most


@pytest.mark.parametrize("mode", ["L", "I;16", "1", "P", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("loader", ["load_img", "dataset"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixels_is_decoded_as_the_framework_does_or_refused(mode, loader, channels, tmp_path):
    """The oracle for load_img is load_img; for 16 bits, which it leaves unscaled or clips, the pixels themselves."""
    truth = of_one_mode(tmp_path, mode)
    options = {"scale": "1/255", "loader": loader}
    if mode == "I;16" and loader == "load_img":
        with pytest.raises(InvalidValue, match=r"00\.png: its pixels are of the kind I;16"):
            calibrate(model((8, 8), channels), str(tmp_path), images=options)
        return
    if (mode, loader, channels) == ("CMYK", "dataset", 1):
        with pytest.raises(FormatError, match="an image of batch 0 is not decoded"):  # by TensorFlow
            calibrate(model((8, 8), channels), str(tmp_path), images=options)
        return
    mean = calibrate(model((8, 8), channels), str(tmp_path), images=options)["bn"].mean
    colour = {1: "grayscale", 3: "rgb"}[channels]
    if loader == "load_img":
        files = sorted(tmp_path.iterdir())
        expected = np.stack([np.asarray(keras.utils.load_img(f, color_mode=colour), float) for f in files]) / 255
        np.testing.assert_allclose(mean, expected.mean(axis=(0, 1, 2)), rtol=1e-5)
    if mode in ("L", "I;16"):
        np.testing.assert_allclose(mean, truth.mean(), atol=0.003)  # TensorFlow drops the lower 8 bits


def test_files_that_are_not_read_are_counted_and_said(photos, tmp_path):
    from PIL import Image

    for k in range(40):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.webp")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.tif")
    result = calibrate(model((8, 8)), str(tmp_path), images={"scale": 1})
    assert result.samples == 40
    assert "other files left out: 1 .tif, 2 .webp" in str(result)
    assert result.to_dict()["data"] == str(tmp_path)  # and not the name of a class
    np.save(tmp_path / "mean.npy", np.zeros((40, 8, 8, 3), "f4"))
    with pytest.raises(Question, match=r"holds \.npy files, and images \(.*0\.png\)"):
        calibrate(model((8, 8)), str(tmp_path), images={"scale": 1})


@pytest.mark.parametrize("loader", ["load_img", "dataset"])
def test_what_is_no_file_is_refused_before_it_is_opened(loader, tmp_path):
    of_one_mode(tmp_path, "L")
    os.mkfifo(tmp_path / "z.png")  # opening it would wait for a writer for ever
    with pytest.raises(FormatError, match=r"z\.png: not a regular file"):
        calibrate(model((8, 8)), str(tmp_path), images={"scale": 1, "loader": loader})


def test_an_image_that_is_a_bomb_and_one_of_another_format_are_named(tmp_path):
    from PIL import Image

    for side in (12000, 30000):  # more than we decode; more than Pillow would look at
        Image.new("1", (side, side)).save(tmp_path / "z.png")
        with pytest.raises(FormatError, match=r"z\.png: images of more than 100000000 pixels"):
            calibrate(model((8, 8)), str(tmp_path), images={"scale": 1}, minimum=1)
    (tmp_path / "z.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # would start Ghostscript
    with pytest.raises(FormatError, match=r"z\.png: not an image that Keras decodes: no BMP, GIF, JPEG, PNG file"):
        calibrate(model((8, 8)), str(tmp_path), images={"scale": 1}, minimum=1)


def test_images_that_are_none_are_named(photos, tmp_path):
    with pytest.raises(NotFound, match="no images"):
        calibrate(model(), str(tmp_path), images={"scale": 1})
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(FormatError, match=r"broken\.png: not an image that Keras decodes"):
        calibrate(model(), str(tmp_path), images={"scale": 1})
    with pytest.raises(FormatError, match="an image of batch 0 is not decoded"):
        calibrate(model(), str(tmp_path), images={"scale": 1, "loader": "dataset"})
    for options, message in (
        ({"scale": "one"}, "expected a number or a fraction"),
        ({"scale": "1/0"}, "expected a number or a fraction"),
        ({"scale": 1, "preprocessing": "resnet50"}, "it scales by itself"),
        ({"loader": "cv2"}, "expected one of load_img, dataset"),
        ({"scale": 1, "interpolation": "best"}, "Supported methods are nearest"),
    ):
        with pytest.raises(InvalidValue, match=message):
            calibrate(model(), photos, images=options)
    with pytest.raises(NotFound, match=r"keras\.applications has no 'resnet5000'"):
        calibrate(model(), photos, images={"preprocessing": "resnet5000"})
    with pytest.raises(InvalidValue, match="fits a model with one image input"):
        calibrate(nets.siamese(), photos, images={"scale": 1})
