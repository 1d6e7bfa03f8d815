"""Image files as pixels: any depth, palette, transparency and orientation becomes uint8 [3, H, W]."""

import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# torchvision's, and what else Pillow reads of photographs.
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp", ".gif",
    ".avif", ".jp2",
)  # fmt: skip
# Theirs, whatever a file is called: Pillow knows others whose decoders run programs (EPS) or read further files.
_FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
# White in files of 32-bit integers ("I") and floating point ("F"), whose formats name no largest value.
WHITES: Mapping[str, int] = {"I": 255, "F": 255}
_ORIENTATION = 0x0112  # EXIF's tag; the turn that undoes each value
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 0x0102  # TIFF's tag
# A few bytes of a file can say that they are more: from here on Pillow, too, takes them for a bomb.
MOST_PIXELS = 89_478_485
_LARGE = 1 << 24  # pixels of an image; such are decoded one at a time
_one_large = threading.Lock()


class DataError(ValueError):
    """Data that cannot be used: what was expected, what was found, how to mend it."""


class ImageFiles:
    """Images decoded when asked for: indexing by int64 [B] gives uint8 [B, 3, size, size].

    The shorter side is scaled to `size`, and of the longer one the middle is taken.

    Args:
        whites: the value that is white in files of 32-bit integers ("I") and floating point ("F").

    Errors, of indexing: DataError, naming the images that cannot be read.
    """

    def __init__(
        self, paths: Sequence[Path], size: int, threads: int = 4, *, whites: Mapping[str, int] = WHITES
    ) -> None:  # fmt: skip
        self.paths, self.size, self.whites = paths, size, whites
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = index.tolist()
        # Threads write where the pixels stay: an image is held twice only while it is decoded.
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)

        def decode(place: int) -> DataError | None:
            try:
                image = read_rgb(self.paths[rows[place]], self.whites)
            except DataError as error:
                return error
            square = np.array(_squared(image, self.size))
            pixels[place] = torch.from_numpy(square).permute(2, 0, 1)
            return None

        failed = [error for error in self._pool.map(decode, range(len(rows))) if error is not None]
        if failed:
            others = ", ".join(str(error).split(": expected")[0] for error in failed[1:4])
            more = f"; {len(failed) - 1} more, such as {others}" if others else ""
            raise DataError(f"{failed[0]}{more}")
        return pixels

    def part(self, index: Tensor) -> "ImageFiles":
        """Some of them, int64 [B], not decoded either."""
        return ImageFiles([self.paths[i] for i in index.tolist()], self.size, whites=self.whites)


def read_rgb(path: Path, whites: Mapping[str, int] = WHITES) -> Image.Image:
    """The file's first image in mode RGB, upright.

    Grey of 16 bits is divided by 257 (a TIFF of 9 to 15 bits by its own largest value), and what is transparent lies
    on white, as on a page.

    Errors: DataError, naming the file.
    """
    try:
        with (
            _opened(path) as file,
            _one_large if _pixels(file) > _LARGE else contextlib.nullcontext(),
        ):
            file.load()
            turn = _TURNS.get(_orientation(file))
            rgb = _as_rgb(file, whites)
            return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # decoders let many kinds of error through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: expected a readable image ({reason}); mend or remove it"
        ) from None


def read_header(path: Path) -> tuple[str, int]:
    """(Pillow's mode, shorter side in pixels), without decoding.  Errors: DataError, naming the file."""
    try:
        with _opened(path) as file:
            return file.mode, min(file.size)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: expected a readable image ({reason}); mend or remove it"
        ) from None


def _opened(path: Path) -> Image.Image:
    """The file, not decoded yet.  Errors: ValueError for more pixels than an image has, and what Pillow has."""
    if not path.is_file():  # a link to a pipe would be waited for
        raise ValueError("it is no plain file" if path.exists() else "it leads to nothing")
    file = Image.open(path, formats=_formats())
    if _pixels(file) > MOST_PIXELS:
        width, height = file.size
        file.close()
        raise ValueError(f"it has {width:,} x {height:,} pixels, of at most {MOST_PIXELS:,}")
    return file


@functools.cache
def _formats() -> tuple[str, ...]:
    """Of `_FORMATS` those that this Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _pixels(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def deep_grey(image: Image.Image) -> np.ndarray | None:
    """A loaded image's own values [H, W] where a pixel is one number of more than 8 bits, otherwise None."""
    return np.asarray(image) if image.mode.startswith(("I", "F")) else None


def _as_rgb(image: Image.Image, whites: Mapping[str, int]) -> Image.Image:
    if (values := deep_grey(image)) is not None:
        white = _white(image, whites)
        # Also false for NaN.
        if not (values.min() >= 0 and values.max() <= white):
            raise ValueError(
                f"its values should lie in 0 to {white}, and reach from {values.min():g} to {values.max():g}"
            )
        scaled = values.astype(np.float32) * (255 / white) if white != 255 else values
        # Whole numbers of 0 to 255 stay as they are, and between them it is cut off, as Pillow does.
        grey = scaled if white == 255 else np.rint(scaled)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image, whites: Mapping[str, int]) -> int:
    """The value that is white in a deep grey image."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return 2 ** int(bits[0]) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535  # to which Pillow scales those
    return whites[image.mode]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, which may be whole
        return 1


def _squared(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    scale = size / min(image.size)  # shorter side, then the centre
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MOST_PIXELS:  # a thin strip: what the square does not show is never scaled
        side, (across, down) = min(image.size), image.size
        left, top = (across - side) // 2, (down - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))
