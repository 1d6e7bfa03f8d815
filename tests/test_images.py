"""Image files become RGB as a viewer shows them: depth, palettes, transparency, orientation, frames."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sparsecore.images import DataError, ImageFiles, read_header, read_rgb

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)


def read(path: Path, **whites: int) -> np.ndarray:
    return np.asarray(read_rgb(path, {"I": 255, "F": 255} | whites))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_whatever_was_read_right_is_read_as_before(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as file:
        assert file.mode == mode
        expected = np.asarray(file.convert("RGB"))
    assert np.array_equal(read(tmp_path / "x.tif"), expected)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big-endian.tif", "x.pgm"])
def test_sixteen_bits_are_divided_by_257(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.pgm":
        path.write_bytes(b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP.astype(">u2") if name.startswith("big") else DEEP).save(path)
    expected = np.rint(DEEP / 257)
    assert np.array_equal(read(path), np.repeat(expected[..., None], 3, axis=2))


def test_twelve_bits_of_a_tiff_are_divided_by_their_own_largest_value(tmp_path: Path) -> None:
    values = np.array([0, 2048, 4095, 1000], dtype=np.uint16)  # packed, two pixels in three bytes
    packed = bytes([0, 0x08, 0x00, 0xFF, 0xF3, 0xE8])
    tags = [  # width, height, bits, compression, black is zero, offset, samples, rows, bytes
        (256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6),
    ]  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags
    )
    start = (14).to_bytes(4, "little")
    count = len(tags).to_bytes(2, "little")
    (tmp_path / "x.tif").write_bytes(b"II*\0" + start + packed + count + entries + bytes(4))
    expected = np.rint(values / 4095 * 255)
    assert np.array_equal(read(tmp_path / "x.tif")[0, :, 0], expected)


def test_floating_point_and_integers_by_the_white_that_is_named(tmp_path: Path) -> None:
    part = RNG.random((6, 9), dtype=np.float32)
    Image.fromarray(part).save(tmp_path / "f.tif")
    assert np.array_equal(read(tmp_path / "f.tif", F=1)[..., 0], np.rint(part * 255))
    Image.fromarray((part * 65535).astype(np.int32)).save(tmp_path / "i.tif")
    found = read(tmp_path / "i.tif", I=65535)[..., 0]
    assert np.abs(found - part * 255).max() < 0.51
    # Values of 0 to 255 are what Pillow's own conversion makes of them.
    for name, values in (("f", part * 255), ("i", (part * 255).astype(np.int32))):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with Image.open(tmp_path / f"{name}.tif") as file:
            assert np.array_equal(read(tmp_path / f"{name}.tif"), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan"), float("inf")])
def test_values_without_a_colour_are_refused(value: float, tmp_path: Path) -> None:
    values = np.zeros((6, 9), np.float32)
    values[2, 3] = value
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: .*its values should lie in 0 to 255"):
        read_rgb(tmp_path / "x.tif")


def transparent(mode: str) -> Image.Image:
    colour = {"RGBA": (255, 0, 0, 0), "LA": (9, 0), "P": 3, "L": 9, "RGB": (9, 8, 7), "1": 0}
    image = Image.new(mode, (4, 4), colour[mode])
    if mode == "P":
        image.putpalette([9] * 768)
    if mode not in ("RGBA", "LA"):
        image.info["transparency"] = colour[mode]
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    transparent(mode).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png").min() == 255


def test_transparency_by_half_and_none(tmp_path: Path) -> None:
    for alpha in (255, 128):
        pixels = np.dstack([RGB, np.full(RGB.shape[:2], alpha, np.uint8)])
        Image.fromarray(pixels).save(tmp_path / "x.png")
        expected = 255 + (RGB.astype(float) - 255) * alpha / 255
        error = np.abs(read(tmp_path / "x.png") - expected).max()
        assert error == 0 if alpha == 255 else error <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_images_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    Image.fromarray(RGB).save(path, exif=exif, **options)
    with Image.open(path) as file:
        if suffix == "tif":
            file.load()  # which turns it
        expected = ImageOps.exif_transpose(file)
    assert np.array_equal(read(path), np.asarray(expected))
    assert expected.size == ((6, 9) if orientation in (5, 6, 8) else (9, 6))


def test_damaged_exif_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=b"Exif\0\0XX*\0nonsense")
    assert np.array_equal(read(tmp_path / "x.png"), RGB)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first(suffix: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (5, 5), colour) for colour in ("red", "blue"))
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second], **options)
    assert read(tmp_path / f"x.{suffix}")[2, 2].tolist() == [255, 0, 0]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def not_an_image(path: Path) -> None:
    path.write_bytes(b"no image")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def broken_chunk(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT")
    data[at : at + 4] = b"\0\1\2\3"
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, not_an_image, empty, broken_link, broken_chunk])
def test_all_damaged_images_are_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(RGB).save(path)
    for i in (1, 4):
        damage(paths[i])
    files = ImageFiles(paths, 6)
    with pytest.raises(DataError, match=r"1\.png: expected a readable image .* 1 more, .*4\.png$"):
        files[torch.arange(6)]
    assert files[torch.tensor([0, 2])].shape == (2, 3, 6, 6)


def test_a_header_tells_mode_and_shorter_side_of_images_alone(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    assert read_header(tmp_path / "x.png") == ("RGB", 6)
    not_an_image(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected a readable image"):
        read_header(tmp_path / "x.png")
