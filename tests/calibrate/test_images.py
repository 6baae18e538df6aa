"""Mean and std of images: exact against Python integers, right where the usual float32 mean is wrong."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from bnport.calibrate.images import image_statistics
from bnport.cli import common, main
from bnport.errors import BnportError, FormatError, InvalidValue, NotFound, Question

RNG = np.random.default_rng(1)


def exact_truth(arrays, scale=Fraction(1, 255)):
    """(mean, variance) per channel by Python integers, from a list of (..., C) arrays."""
    columns = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays]).astype(object)
    n = len(columns)
    total, squares = columns.sum(axis=0), (columns * columns).sum(axis=0)
    mean = [float(scale * Fraction(int(s), n)) for s in total]
    variance = [
        float(scale**2 * Fraction(n * int(q) - int(s) ** 2, n * n)) for s, q in zip(total, squares, strict=True)
    ]
    return mean, variance


def picture(height=13, width=17, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes and kinds, two of them in a folder, and a file that is none."""
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for k, suffix in enumerate((".png", ".bmp", ".ppm", ".jpg", ".tif", ".webp", ".gif")):
        where = tmp_path / "in" / ("deeper" if k > 4 else "") / f"{k}{suffix}"
        Image.fromarray(picture(9 + k, 20 - k)).save(where)
    (tmp_path / "in" / "notes.txt").write_text("none")
    return tmp_path / "in"


def decoded(folder):
    return [np.asarray(Image.open(p).convert("RGB")) for p in folder.rglob("*") if p.suffix not in (".txt", "")]


def test_a_folder_of_images_gives_the_correctly_rounded_exact_mean_and_variance(folder):
    found = image_statistics(folder)
    mean, variance = exact_truth(decoded(folder))
    assert found.images == 7
    assert found.mean.tolist() == mean
    assert found.variance.tolist() == variance
    assert found.std.tolist() == np.sqrt(variance).tolist()
    assert found.channels == ("red", "green", "blue")
    assert found.notes == ("1 other files left alone", "converted: 1 from P")
    assert image_statistics(folder, recursive=False).images == 5


@pytest.mark.parametrize("engine", ["serial", "local"])
def test_the_engine_does_not_change_a_bit(folder, engine, monkeypatch):
    from bnport.calibrate import decoding

    monkeypatch.setattr(decoding, "BLOCK_FILES", 2)
    told = []
    found = image_statistics(folder, engine=engine, workers=2, progress=lambda *a: told.append(a))
    assert (found.mean.tolist(), found.variance.tolist()) == exact_truth(decoded(folder))
    assert told[-1] == (7, 7, "images")


def test_a_list_of_folders_and_files_is_the_same_with_each_folder_one_block(folder):
    found = image_statistics([folder / "deeper", *sorted(p for p in folder.iterdir() if p.suffix not in (".txt", ""))])
    assert found.images == 7
    assert (found.mean.tolist(), found.variance.tolist()) == exact_truth(decoded(folder))


def test_images_are_resized_before_they_are_counted(folder):
    found = image_statistics(folder, (8, 6), resample="bicubic")
    resized = [
        np.asarray(Image.open(p).convert("RGB").resize((6, 8), Image.Resampling.BICUBIC))
        for p in folder.rglob("*")
        if p.suffix not in (".txt", "")
    ]
    assert found.exact.n == 7 * 48
    assert (found.mean.tolist(), found.variance.tolist()) == exact_truth(resized)


def test_grey_and_sixteen_bit_images_are_counted_in_their_own_range(tmp_path):
    wide = RNG.integers(0, 65536, (11, 12), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = image_statistics(tmp_path, mode="I;16")
    assert found.scale == Fraction(1, 65535)
    assert (found.mean.tolist(), found.variance.tolist()) == exact_truth([wide[..., None]], Fraction(1, 65535))
    with pytest.raises(InvalidValue, match=r"wide\.png.*clipping.*I;16"):
        image_statistics(tmp_path)
    (tmp_path / "wide.png").unlink()
    grey = picture(5, 5, 1)
    Image.fromarray(grey[..., 0]).save(tmp_path / "grey.png")
    assert image_statistics(tmp_path, mode="L").mean.tolist() == exact_truth([grey])[0]
    three = image_statistics(tmp_path)
    assert three.mean.tolist() == exact_truth([grey])[0] * 3
    assert three.notes == ("converted: 1 from L",)


def test_arrays_in_memory_in_files_and_one_by_one_are_the_same(tmp_path):
    x = RNG.integers(0, 256, (10, 8, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(10))
    truth = exact_truth([x])
    sources = [x, str(tmp_path / "x.npy"), iter(x), np.moveaxis(x, -1, 1)]
    for source, axis in zip(sources, (None, None, None, 1), strict=True):
        found = image_statistics(source, axis=axis)
        assert (found.mean.tolist(), found.variance.tolist()) == truth
        assert found.images == 10
    assert image_statistics(tmp_path / "x.npz", key="x").mean.tolist() == truth[0]
    assert image_statistics(x, scale=1).mean.tolist() == exact_truth([x], 1)[0]
    with pytest.raises(Question, match="holds 2 arrays"):
        image_statistics(tmp_path / "x.npz")


def stuck_float32_mean(images, repeats):
    """(images.astype("float32") / 255).mean((0, 1, 2)) after `repeats` copies of `images`, without holding them all.

    numpy adds the pixels of channels-last images one after the other to a float32, so the sum can be carried on.
    """
    x = (images.astype("float32") / 255).reshape(-1, images.shape[-1])
    total = np.zeros(x.shape[-1], np.float32)
    for count in range(1, repeats + 1):
        total = np.add.reduce(np.concatenate([total[None], x]), axis=0)
        yield total / np.float32(count * len(x))


def test_the_usual_float32_mean_is_0_418_on_800_images_and_0_209_on_1600_and_ours_is_right():
    images = np.random.default_rng(0).integers(0, 256, (50, 224, 224, 3), dtype=np.uint8)
    usual = list(stuck_float32_mean(images, 32))
    assert (usual[0] == (images.astype("float32") / 255).mean((0, 1, 2))).all()  # carrying the sum on changes nothing
    assert usual[15] == pytest.approx(0.418, abs=5e-4)
    assert usual[31] == pytest.approx(0.209, abs=5e-4)
    ours = image_statistics(images[k % 50] for k in range(1600))
    assert ours.mean == pytest.approx(0.5, abs=1e-3)
    assert ours.mean.tolist() == [
        float(Fraction(int(s), 50 * 224 * 224 * 255)) for s in images.sum((0, 1, 2), dtype=int)
    ]
    assert ours.std == pytest.approx(0.2898, abs=1e-3)  # a uniform byte: sqrt((256**2 - 1) / 12) / 255


@pytest.mark.slow
def test_the_usual_expression_itself_gives_0_418_on_800_images():
    images = np.random.default_rng(0).integers(0, 256, (800, 224, 224, 3), dtype=np.uint8)  # 1.1 GB in all
    x = images.astype("float32")
    x /= 255
    assert x.mean((0, 1, 2)) == pytest.approx(0.418, abs=5e-4)
    assert image_statistics(images).mean == pytest.approx(0.5, abs=1e-3)


def test_blocks_are_small_while_files_are_few_and_hold_every_file_once_in_order(tmp_path, monkeypatch):
    from bnport.calibrate import decoding

    paths = [str(tmp_path / f"{k:03}.png") for k in range(200)]
    for k, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(bytes(100 * (k % 7)))
    how = decoding.How(None, "RGB", "bilinear", False, True)
    assert [block.paths for block in decoding.blocks_of(paths, how)] == [paths]  # all of it below LEAST_BYTES
    monkeypatch.setattr(decoding, "LEAST_BYTES", 1)
    blocks = [block.paths for block in decoding.blocks_of(paths, how)]
    assert [path for block in blocks for path in block] == paths
    assert decoding.BLOCKS / 2 <= len(blocks) <= decoding.BLOCKS + 1
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 150)
    assert max(len(block.paths) for block in decoding.blocks_of(paths, how)) <= 3


def test_a_worker_that_counts_bytes_starts_without_numpy(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    code = (
        "import sys\nfrom bnport.calibrate import decoding\nhow = decoding.How(None, 'RGB', 'bilinear', False, True)\n"
        f"counted = decoding.count_block(decoding.Block([{str(tmp_path / 'x.png')!r}], how))\n"
        "print(counted.images, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


# What is refused.


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg(cut=None):
    file = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(file, "JPEG")
    return file.getvalue()[:cut]


DAMAGED = {
    "empty": b"",
    "text": b"this is no image",
    "truncated jpeg": jpeg(900),
    "jpeg header only": jpeg(20),
    "bomb": png(60_000, 60_000),
    "large": png(10_001, 10_000),
    "terabytes": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(0, 0),
    "too little data": png(100, 100, b"\x00" * 50),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/canary) (w) file\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_cannot_be_decoded_is_named_in_one_line_or_skipped_and_noted(kind, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(DAMAGED[kind])
    Image.fromarray(picture()).save(tmp_path / "good.png")
    with pytest.raises(FormatError, match=r"bad\.jpg") as error:
        image_statistics(tmp_path)
    assert "\n" not in str(error.value)
    found = image_statistics(tmp_path, damaged="skip")
    assert found.images == 1
    assert "1 files could not be decoded" in found.notes[-1]
    assert "bad.jpg" in found.notes[-1]


def test_nothing_to_count_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no images in this folder"):
        image_statistics(tmp_path)
    with pytest.raises(NotFound, match="no such"):
        image_statistics(tmp_path / "missing")
    with pytest.raises(NotFound, match="No such file"):
        image_statistics([tmp_path / "missing.jpg"])
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(InvalidValue, match="no image could be decoded"):
        image_statistics(tmp_path, damaged="skip")
    with pytest.raises(InvalidValue, match="no images"):
        image_statistics(iter([]))


def test_a_pipe_that_is_called_an_image_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(FormatError, match="not a regular file"):
        image_statistics(tmp_path)


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        (np.zeros((2, 3, 3, 3), np.float32), {}, InvalidValue, "expected pixels as integers"),
        (np.zeros((9, 9, 3), np.uint8), {}, Question, "which axis"),
        (np.zeros((2, 3, 9, 9), np.uint8), {}, Question, "which axis"),
        (np.zeros((2, 3, 9, 3), np.uint8), {"axis": 4}, InvalidValue, "no axis 4"),
        (np.zeros((0, 3, 9, 3), np.uint8), {}, InvalidValue, "no pixels"),
        (iter([np.zeros((3, 3), np.uint8)]), {}, InvalidValue, "image 0: expected integers"),
        (iter([picture(), picture(channels=1)]), {}, InvalidValue, "image 1: 1 channels"),
        (5, {}, InvalidValue, "not images"),
        ([], {}, InvalidValue, "no images"),
        ("x", {"mode": "CMYK"}, InvalidValue, "mode: expected"),
        ("x", {"resample": "best"}, InvalidValue, "resample: expected"),
        ("x", {"damaged": "ignore"}, InvalidValue, "damaged: expected"),
        (picture()[None], {"scale": float("nan")}, InvalidValue, "scale: expected a finite"),
        (picture()[None], {"scale": 0}, InvalidValue, "other than 0"),
    ],
)  # fmt: skip
def test_what_is_not_images_or_makes_no_sense_is_refused(source, settings, error, message):
    with pytest.raises(error, match=message):
        image_statistics(source, **settings)


@pytest.mark.parametrize("size", [0, (3, 0), (1, 2, 3), 10**6, "12", 2.5])
def test_a_size_that_is_no_size_is_refused(size, folder):
    with pytest.raises(InvalidValue, match="size: expected"):
        image_statistics(folder, size)


# The command.


def test_the_command_prints_what_can_be_pasted(folder, capsys):
    assert main(["stats", str(folder), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    mean, variance = exact_truth(decoded(folder))
    assert f"keras.layers.Normalization(mean={mean!r}, variance={variance!r})" in out
    assert f"transforms.Normalize(mean={mean!r}, std={np.sqrt(variance).tolist()!r})" in out
    assert "after keras.layers.Rescaling(1/255)" in out
    assert out.rstrip().endswith("scaled by 1/255; exact")


@pytest.mark.parametrize("pillow", [True, False])
def test_a_file_that_is_no_image_is_called_what_it_is_with_and_without_pillow(pillow, tmp_path, capsys, monkeypatch):
    if not pillow:
        monkeypatch.setitem(sys.modules, "PIL", None)
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
    assert main(["stats", str(path)]) == 2
    assert "model.keras: expected images or an array of them, it is a .keras file" in capsys.readouterr().err
    np.save(tmp_path / "images.npy", np.zeros((1, 2, 2, 3), np.uint8))
    assert main(["stats", str(tmp_path / "images.npy")]) == 0


def test_a_constant_channel_is_noted_beside_what_can_be_pasted(tmp_path, capsys):
    images = np.random.default_rng(1).integers(0, 256, (4, 5, 5, 3), np.uint8)
    for constant in (False, True):
        if constant:
            images[..., 1] = 7
        np.save(tmp_path / "images.npy", images)
        assert main(["stats", str(tmp_path / "images.npy")]) == 0
        out = capsys.readouterr().out
        assert ("note: channel 1: one value in all pixels, so std and variance are 0" in out) is constant


def test_what_the_command_prints_normalises_images_in_keras(folder, capsys):
    import keras

    main(["stats", str(folder), "--size", "8x8"])
    line = next(text for text in capsys.readouterr().out.splitlines() if "keras.layers.Normalization" in text)
    layer = eval(line.strip(), {"keras": keras})
    x = np.stack([np.asarray(Image.fromarray(a).resize((8, 8), Image.Resampling.BILINEAR)) for a in decoded(folder)])
    y = np.asarray(layer(x.astype("float32") / 255))
    assert y.mean((0, 1, 2)) == pytest.approx(0, abs=1e-5)
    assert y.std((0, 1, 2)) == pytest.approx(1, abs=1e-5)


def test_the_command_writes_json_whole_or_not_at_all(folder, tmp_path, capsys):
    out = tmp_path / "stats.json"
    assert main(["stats", str(folder), "--json", "-o", str(out), "--scale", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == printed
    assert printed["mean"] == exact_truth(decoded(folder), 1)[0]
    assert printed["sum"] == [int(v) for v in sum(a.reshape(-1, 3).sum(0, dtype=int) for a in decoded(folder))]
    assert main(["stats", str(folder), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    image = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg"))
    held = image.read_bytes()
    assert main(["stats", str(folder), "-o", str(image), "--force"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert image.read_bytes() == held


@pytest.mark.parametrize(
    "wrong",
    [
        ["--size", "8x8x8"], ["--size", "big"], ["--size", "0x8"], ["--size", "-8"], ["--scale", "1/0"], ["--scale", "x"],
        ["--axis", "9"], ["-o", ""], ["--size", "9" * 5000],
    ],
)  # fmt: skip
def test_the_command_refuses_wrong_settings_in_one_line(wrong, tmp_path, capsys):
    np.save(tmp_path / "x.npy", picture()[None])
    assert main(["stats", str(tmp_path / "x.npy"), *wrong]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bnport: ")
    assert err.count("\n") == 1


def test_a_size_is_read_alike_by_every_command():
    assert {common.size_of(text) for text in ("24x32", "24X32", "24,32", "24, 32")} == {(24, 32)}
    assert common.size_of("24") == (24, 24)


def test_an_error_in_a_worker_process_arrives_as_itself(tmp_path, monkeypatch):
    from bnport.calibrate import decoding

    monkeypatch.setattr(decoding, "BLOCK_FILES", 1)
    for k in range(3):
        Image.fromarray(picture()).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(BnportError, match=r"3\.png"):
        image_statistics(tmp_path, workers=2)
