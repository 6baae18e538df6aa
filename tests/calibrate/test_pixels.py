"""How pixels are scaled, by dtype, and settings that do not apply: against Python integers and fractions."""

from __future__ import annotations

import importlib
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from bnport.calibrate.images import image_statistics
from bnport.cli import main
from bnport.errors import InvalidValue, Question

RNG = np.random.default_rng(3)
BYTES = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (4, 5, 6, 3), dtype=np.uint16)


def truth(pixels, scale):
    """(mean, variance) per channel by Python integers from nested lists (images, height, width, channels)."""
    means, variances = [], []
    for c in range(len(pixels[0][0][0])):
        values = [int(pixel[c]) for image in pixels for row in image for pixel in row]
        n, s, q = len(values), sum(values), sum(v * v for v in values)
        means.append(float(scale * Fraction(s, n)))
        variances.append(float(scale**2 * Fraction(n * q - s * s, n * n)))
    return means, variances


def numbers(found):
    return found.mean.tolist(), found.variance.tolist()


@pytest.mark.parametrize("kind", ["array", "generator", "npy", "fortran npy"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_pixels_are_scaled_by_65535_in_either_byte_order(kind, order, tmp_path):
    x = WIDE.astype(order)
    source = {"array": x, "generator": iter(x)}.get(kind)
    if source is None:
        source = tmp_path / "x.npy"
        np.save(source, np.asfortranarray(x) if kind == "fortran npy" else x)
    found = image_statistics(source)
    assert (found.scale, found.dtype) == (Fraction(1, 65535), "uint16")
    assert numbers(found) == truth(WIDE.tolist(), Fraction(1, 65535))


def test_images_of_two_scales_are_refused_with_the_number_of_the_first_that_differs():
    with pytest.raises(InvalidValue, match=r"image 2: uint16 pixels, scaled by 1/65535; those before it are uint8"):
        image_statistics(iter([BYTES[0], BYTES[1], WIDE[0], BYTES[2]]))
    both = image_statistics(iter([BYTES[0], WIDE[0]]), scale=1)
    assert numbers(both) == truth([BYTES[0].tolist(), WIDE[0].tolist()], 1)
    assert both.dtype == "uint8, uint16"
    orders = image_statistics(iter([WIDE[0].astype(">u2"), WIDE[1].astype("<u2")]))
    assert numbers(orders) == truth(WIDE[:2].tolist(), Fraction(1, 65535))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32", "uint64"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_integers_of_which_nothing_says_the_range_are_asked_about(dtype, one_by_one):
    x = (BYTES // 2).astype(dtype)
    with pytest.raises(Question, match=rf"{dtype} pixels: what are they scaled by\?.*--scale"):
        image_statistics(iter(x) if one_by_one else x)
    found = image_statistics(iter(x) if one_by_one else x, scale=Fraction(1, 127))
    assert numbers(found) == truth(x.tolist(), Fraction(1, 127))


def test_booleans_are_0_and_1():
    found = image_statistics(BYTES > 99)
    assert found.scale == 1
    assert numbers(found) == truth((BYTES > 99).tolist(), 1)
    assert numbers(image_statistics(iter(BYTES > 99))) == numbers(found)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("framework", ["tensorflow", "torch", "jax.numpy"])
def test_a_frameworks_tensor_is_an_array(framework, one_by_one):
    made = importlib.import_module(framework)
    x = {"tensorflow": "constant", "torch": "tensor", "jax.numpy": "asarray"}[framework]
    tensor = getattr(made, x)(BYTES)
    found = image_statistics(iter([tensor[k] for k in range(4)]) if one_by_one else tensor)
    assert numbers(found) == truth(BYTES.tolist(), Fraction(1, 255))
    assert found.images == 4


def test_a_masked_array_or_a_tensor_without_numbers_is_refused_in_one_line():
    import tensorflow

    for source in (np.ma.array(BYTES, mask=BYTES > 9), iter([np.ma.array(BYTES[0], mask=BYTES[0] > 9)])):
        with pytest.raises(InvalidValue, match="masked"):
            image_statistics(source)
    with pytest.raises(InvalidValue, match="expected pixels as integers"):
        image_statistics(tensorflow.constant(BYTES, tensorflow.bfloat16))
    import torch

    with pytest.raises(InvalidValue, match="the array: a Tensor is not an array"):
        image_statistics(torch.tensor(BYTES).to_sparse())
    with pytest.raises(InvalidValue, match="image 0: a list as data"):
        image_statistics(iter([[[1, 2], [3]]]))


# Settings that do not apply to a source are refused, not ignored.


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *[(kind, setting, next(iter(setting)))
          for kind in ("array", "npy", "generator")
          for setting in ({"size": 4}, {"mode": "L"}, {"mode": "RGB"}, {"resample": "box"}, {"damaged": "skip"},
                          {"recursive": False}, {"engine": "ray"}, {"workers": 2}, {"key": "x"})],
        ("generator", {"axis": 3}, "axis"),
        ("folder", {"axis": 3}, "axis"),
        ("folder", {"key": "x"}, "key"),
        ("paths", {"axis": 3}, "axis"),
        ("paths", {"key": "x"}, "key"),
        ("folder", {"resample": "box"}, "resample"),
        ("folder", {"engine": "foo"}, "engine: expected one of"),
        ("array", {"engine": "foo"}, "engine: expected one of"),
        ("folder", {"workers": 0}, "workers: expected 1 or more"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_apply_to_the_source_is_refused(kind, settings, message, tmp_path):
    np.save(tmp_path / "x.npy", BYTES)
    Image.fromarray(BYTES[0]).save(tmp_path / "x.png")
    source = {"array": BYTES, "npy": tmp_path / "x.npy", "generator": iter(BYTES), "folder": tmp_path,
              "paths": [tmp_path / "x.png"]}[kind]  # fmt: skip
    with pytest.raises(InvalidValue, match=message) as error:
        image_statistics(source, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["x.npy --size 4x4", "x.npy --mode L", ". --axis 1", ". --key q", ". --engine foo"])
def test_the_command_refuses_what_does_not_apply_in_one_line(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", BYTES)
    Image.fromarray(BYTES[0]).save("x.png")
    assert main(["stats", *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words.split()[1][2:] in said.err


def test_the_command_says_the_dtype_and_its_scale_and_asks_for_one_where_there_is_none(tmp_path, capsys):
    np.save(tmp_path / "x.npy", WIDE.astype(">u2"))
    assert main(["stats", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("uint16 scaled by 1/65535; exact")
    np.save(tmp_path / "y.npy", WIDE.astype(np.int32))
    assert main(["stats", str(tmp_path / "y.npy")]) == 2
    assert "--scale" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "y.npy"), "--scale", "1/65535"]) == 0


# Files of more than 8 bits per channel, of which Pillow would drop some.


def png16(colour, channels):
    """A PNG of 5 x 4 pixels of 16 bits, written by hand: colour type 2 is RGB, 4 grey with alpha, 6 RGBA."""
    raw = b"".join(b"\0" + RNG.integers(0, 65536, 5 * channels).astype(">u2").tobytes() for _ in range(4))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 5, 4, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff16():
    """A TIFF of 2 x 1 pixels of three 16-bit channels, written by hand."""
    pixels, bits = struct.pack("<6H", 1, 256, 40000, 65535, 7, 300), struct.pack("<3H", 16, 16, 16)
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
            (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 26) + bits + pixels + directory


WIDE_FILES = {
    "rgb.png": png16(2, 3),
    "la.png": png16(4, 2),
    "rgba.png": png16(6, 4),
    "rgb.tif": tiff16(),
    "rgb.ppm": b"P6 2 1 65535\n" + struct.pack(">6H", 1, 256, 40000, 65535, 7, 300),
}


@pytest.mark.parametrize("name", WIDE_FILES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_file_whose_pixels_pillow_would_round_to_8_bits_is_refused_by_name(name, mode, tmp_path):
    (tmp_path / name).write_bytes(WIDE_FILES[name])
    with Image.open(tmp_path / name) as image:
        image.load()  # Pillow does decode it
    with pytest.raises(InvalidValue, match=rf"{name}: .*(cuts to 8 bits|and rounds)"):
        image_statistics(tmp_path, mode=mode)


def pgm(values, most, plain=False):
    """A PGM of values (height, width) up to `most`, written by hand: as text if plain, else in one or two bytes each."""
    height, width = values.shape
    data = " ".join(map(str, values.reshape(-1).tolist())).encode()
    if not plain:
        data = values.astype("u1" if most < 256 else ">u2").tobytes()
    return b"P%d %d %d %d\n" % (2 if plain else 5, width, height, most) + data


@pytest.mark.parametrize("most", [100, 256, 1023, 4095, 65534])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_pgm_that_pillow_would_round_is_refused_and_its_pixels_as_an_array_are_not(most, plain, mode, tmp_path):
    values = RNG.integers(0, most + 1, (4, 5))
    (tmp_path / "odd.pgm").write_bytes(pgm(values, most, plain))
    with pytest.raises(InvalidValue, match=rf"odd\.pgm: .*rounds; pass the pixels as an array, with scale 1/{most}$"):
        image_statistics(tmp_path, mode=mode)
    found = image_statistics(values[None, ..., None], scale=Fraction(1, most))
    assert numbers(found) == truth([values[..., None].tolist()], Fraction(1, most))


@pytest.mark.parametrize("most", [257, 771, 4369, 21845, 65535])  # 65535 is a multiple of them
@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_of_more_than_8_bits_that_pillow_reads_exactly_is_16_bit_grey(most, plain, tmp_path):
    values = RNG.integers(0, most + 1, (50, 41))
    values[0, :2] = 0, most
    (tmp_path / "x.pgm").write_bytes(pgm(values, most, plain))
    found = image_statistics(tmp_path, mode="I;16")
    assert (found.scale, found.notes) == (Fraction(1, 65535), ())
    assert numbers(found) == truth([values[..., None].tolist()], Fraction(1, most))
    with pytest.raises(InvalidValue, match=r"16-bit grey images are read with mode I;16$"):
        image_statistics(tmp_path)


def test_sixteen_bit_grey_is_the_same_from_every_kind_of_file(tmp_path):
    values = RNG.integers(0, 65536, (9, 13))
    Image.fromarray(values.astype("u2")).save(tmp_path / "a.png")
    Image.fromarray(values.astype("u2")).save(tmp_path / "b.tif")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "c.tif")
    (tmp_path / "d.pgm").write_bytes(pgm(values, 65535))
    files = sorted(tmp_path.iterdir())
    for file in files:
        assert numbers(image_statistics(file, mode="I;16")) == truth([values[..., None].tolist()], Fraction(1, 65535))
        with pytest.raises(InvalidValue, match=r"16-bit grey images are read with mode I;16$"):
            image_statistics(file, mode="L")
    assert numbers(image_statistics(tmp_path, mode="I;16")) == numbers(image_statistics(files[0], mode="I;16"))
    resized = [numbers(image_statistics(file, (30, 4), mode="I;16", resample="bicubic")) for file in files]
    assert resized == resized[:1] * 4


@pytest.mark.parametrize(
    ("kind", "modes", "message"),
    [
        *[(kind, ["I;16"], f"of the kind {kind}, and mode I;16 reads 16-bit grey images only")
          for kind in ("1", "L", "P", "RGB", "CMYK")],
        ("I", ["RGB", "L", "I;16"], "of the kind I, integers of which nothing says the range; pass them as an array, with"),
        ("F", ["RGB", "L", "I;16"], "of the kind F; floats are not summed exactly; for an array of them: 'from bnport"),
    ],
)  # fmt: skip
def test_mode_i_16_is_advised_only_where_it_helps(kind, modes, message, tmp_path):
    Image.new(kind, (5, 4)).save(tmp_path / "x.tif")
    for mode in modes:
        with pytest.raises(InvalidValue) as error:
            image_statistics(tmp_path, mode=mode)
        assert message in str(error.value)
        assert "are read with" not in str(error.value)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_images_one_by_one_that_are_channels_first_are_asked_about(kind):
    """As torchvision's datasets give them: 3 rows of pixels with 9 channels each, if nobody asks."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 9, 3)).astype("u1")
    first = np.ascontiguousarray(np.moveaxis(images, -1, 1))

    def one_by_one():
        if kind == "numpy":
            return iter(first)
        import torch

        return iter(torch.from_numpy(first))

    with pytest.raises(Question, match=r"image 0: shape \(3, 8, 9\): which axis are the channels"):
        image_statistics(one_by_one())
    with pytest.raises(InvalidValue, match="axis 3: an image has three axes"):
        image_statistics(one_by_one(), axis=3)
    found = image_statistics(one_by_one(), axis=0)
    assert found.images == 10
    assert found.mean.tolist() == [float(Fraction(int(images[..., c].sum(dtype=int)), 720 * 255)) for c in range(3)]
    wide = np.repeat(images, 3, axis=-1)
    assert list(image_statistics(iter(wide), axis=-1).exact.total) == [
        int(wide[..., c].sum(dtype=int)) for c in range(9)
    ]


def test_a_list_of_paths_and_arrays_is_refused(tmp_path):
    with pytest.raises(InvalidValue, match="a list of paths and other things"):
        image_statistics([tmp_path, np.zeros((2, 2, 3), "u1")])
