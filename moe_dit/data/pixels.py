"""Reading images as people see them, and the field's usual centre crop.

What reads images for shards, for scores and in training calls :func:`read_picture`, so that the same files give the
same pixels, or none, in all of them.
"""

import ctypes
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import open_file

MOST_PIXELS = 2**26  # of an image, 67 million, which Pillow holds in 4 bytes each; ImageNet's largest has 61 million
MOST_OF = {"WEBP": 24_000_000, "AVIF": 24_000_000}  # pixels of formats whose decoders take 16 bytes for each
MOST_BYTES = 2**30  # of an image's file: twice what MOST_PIXELS of four 16-bit numbers take
STRIP = 2**20  # pixels of a large image that are converted at a time
LARGE = 2**24  # pixels of an image after which freed memory is given back, which takes milliseconds
FAR_LARGER = 2**24  # pixels to which an image is not resized whole if most are then cut off

# How EXIF's orientations are undone.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # check_pixels allows less


class UnfitImage(ValueError):
    """An image that is not read, whether or not it is whole; the message says why in one line."""


# --- pixels -----------------------------------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut the middle square out.

    Halves with a box filter while it can, then resizes once with a bicubic one: sharper and less aliased than one
    large bicubic step. Source: ADM (Dhariwal and Nichol, 2021), guided_diffusion/image_datasets.py, as DiT, SiT and
    the FID reference batches use it; the roundings are theirs. An image so thin that it would become FAR_LARGER is cut
    before it is resized, which gives the same pixels but for roundings of one level.

    Args:
        image: any PIL image with smooth modes (RGB, L, ...); smaller ones are enlarged.
        size: side of the result in pixels.

    Returns:
        A ``size`` x ``size`` image of the same mode.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left = (width - size) // 2
    top = (height - size) // 2
    if width * height > max(FAR_LARGER, 4 * size * size):
        return _resized_middle(image, (width, height), (left, top), size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def _resized_middle(image: Image.Image, whole: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """The ``size`` x ``size`` pixels at ``corner`` of an image resized to ``whole``, without the others."""
    cut: list[int] = []  # left, top, right and bottom of the pixels that these are made of
    box: list[float] = []  # and of what they cover
    for length, resized, first in zip(image.size, whole, corner, strict=True):
        step = length / resized
        margin = 2 * max(1.0, step) + 2  # how far the bicubic filter reaches, and what is cut off by roundings
        cut.append(max(0, int(first * step - margin)))
        cut.append(min(length, int((first + size) * step + margin)))
        # Pillow keeps these in float32, which is exact enough only near 0.
        box += [first * step - cut[-2], (first + size) * step - cut[-2]]
    middle = image.crop((cut[0], cut[2], cut[1], cut[3]))
    limits = (box[0], box[2], min(box[1], middle.width), min(box[3], middle.height))
    return middle.resize((size, size), resample=Image.Resampling.BICUBIC, box=limits)


def as_seen(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: turned as its EXIF data says, transparency on white, deep greys scaled to 8 bits.

    Args:
        image: as Pillow opened it; it is decoded, and may be the result itself.

    Raises:
        UnfitImage: its numbers have no range of their own.
    """
    return _seen(image)[0]


def _seen(image: Image.Image, size: int | None = None) -> tuple[Image.Image, bool]:
    """:func:`as_seen`, and whether the width is halved already, with the box filter of :func:`center_crop`.

    A large image is turned, converted and halved strip by strip, so that the memory holds it once.

    Args:
        image: as Pillow opened it.
        size: to which it will be cropped; None: its width is not halved.
    """
    convert = _conversion(image)  # before it is decoded: Pillow then forgets how its file kept the numbers
    image.load()
    orientation = exif_orientation(image)
    if image.width * image.height <= STRIP:
        return convert(image if orientation == 1 else image.transpose(_TURNS[orientation])), False
    width, height = image.size if orientation < 5 else image.size[::-1]
    halved = size is not None and min(width, height) >= 2 * size
    if image.mode == "RGB" and convert is _to_rgb and orientation == 1 and not halved:
        return image, False
    picture = Image.new("RGB", (width // 2 if halved else width, height))
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = (height - bottom, height - top) if orientation in (3, 4, 7, 8) else (top, bottom)
        strip = image.crop((0, first, width, last) if orientation < 5 else (first, 0, last, width))
        strip = convert(strip if orientation == 1 else strip.transpose(_TURNS[orientation]))
        if halved:
            strip = strip.resize((width // 2, strip.height), resample=Image.Resampling.BOX)
        picture.paste(strip, (0, top))
    return picture, halved


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of an opened image or of a part of it; UnfitImage where nothing can."""
    mode, key = image.mode, image.info.get("transparency")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # of a TIFF file
        bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
        dark_is_high = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        return lambda part: _deep_grey(part, 2**bits - 1, key, dark_is_high)
    if mode == "F":
        raise UnfitImage("its pixels are floating-point numbers, which have no range of their own")
    if mode == "I":
        raise UnfitImage("its pixels are integers of 32 bits or with a sign, which have no range of their own")
    if image.format == "PNG" and isinstance(key, int | tuple) and getattr(image, "tile", None):
        key = _scaled_key(key, image.tile[0][3])  # type: ignore[attr-defined]
        image.info["transparency"] = key
    return _on_white if image.has_transparency_data else _to_rgb


def _scaled_key(key: int | tuple[int, ...], kept_as: str) -> int | tuple[int, ...]:
    """A PNG file's transparent colour in the 8 bits that its pixels are scaled to; Pillow leaves it in the file's."""
    if isinstance(key, int):
        return key * {"L;2": 85, "L;4": 17}.get(kept_as, 1)
    return tuple(value >> 8 for value in key) if kept_as == "RGB;16B" else key


def _deep_grey(image: Image.Image, highest: int, key: int | None, dark_is_high: bool) -> Image.Image:
    """Grey of more than 8 bits as RGB: ``highest`` becomes 255, and what equals ``key`` white."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)  # no value lies between two, so this rounds
    if dark_is_high:
        grey = 255 - grey
    if key is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")  # of La, Pillow makes nothing else
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


# --- files ------------------------------------------------------------------------------------------------------------


def read_picture(file: BinaryIO, size: int | None = None) -> Image.Image:
    """Read an image file as RGB, as people see it.

    Args:
        file: opened at any place; its first image is read.
        size: of the centre crop, ``size`` x ``size``; None: the whole image.

    Raises:
        UnfitImage: it is too large, or its numbers have no range of their own.
        Exception: decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error, ...
    """
    image = open_image(file)
    with decoding(*image.size):
        picture, halved = _seen(image, size)
        del image  # its pixels, which are as many
        if halved:  # the other half of a resize by Pillow, which does the rows and then the columns
            picture = picture.resize((picture.width, picture.height // 2), resample=Image.Resampling.BOX)
        picture = picture if size is None else center_crop(picture, size)
    return picture


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image file without decoding it.

    Raises:
        UnfitImage: it has too many bytes, or more than MOST_PIXELS.
        Exception: as :func:`read_picture`.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MOST_BYTES:  # some decoders read the whole file at once
        raise UnfitImage(f"it has {size} bytes, more than the {MOST_BYTES} that are read")
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:  # which does not tell width and height
        image = _open_unchecked(file)
    check_pixels(*image.size, MOST_OF.get(image.format or "", MOST_PIXELS))
    return image


def check_pixels(width: int, height: int, most: int = MOST_PIXELS) -> None:
    """Raise UnfitImage where an image has more than ``most`` pixels."""
    if width * height > most:
        raise UnfitImage(f"it has {width} x {height} pixels, more than the {most} that are read")


_unchecked = threading.Lock()


def _open_unchecked(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image whatever its size; Pillow's limit is the whole process's, so one at a time."""
    with _unchecked:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def exif_orientation(image: Image.Image) -> int:
    """How an image is to be turned, 1 to 8; 1 (not at all) where its EXIF data do not say so or are damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises what the damage leads it to
        return 1
    return orientation if orientation in _TURNS else 1


class _SideBySide:
    """Lets threads decode images side by side that have no more than MOST_PIXELS together, as many as one may have."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # who waits is not overtaken by smaller ones
        self._changed = threading.Condition()
        self._left = MOST_PIXELS

    def take(self, pixels: int) -> None:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: pixels <= self._left)
            self._left -= pixels

    def give(self, pixels: int) -> None:
        with self._changed:
            self._left += pixels
            self._changed.notify()


_side_by_side = _SideBySide()
# glibc keeps what was freed, for each thread anew; this gives it back to the system.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


@contextmanager
def decoding(width: int, height: int) -> Iterator[None]:
    """Within it an image of so many pixels may be in memory; waits for those of other threads to go.

    Raises:
        UnfitImage: it has more than MOST_PIXELS.
    """
    check_pixels(width, height)
    pixels = width * height
    _side_by_side.take(pixels)
    try:
        yield
    finally:
        if pixels > LARGE and _malloc_trim is not None:
            _malloc_trim(0)
        _side_by_side.give(pixels)


def load_image(file: str | Path | bytes, size: int) -> Image.Image:
    """Read an image file, or its bytes, as RGB and centre-crop it to ``size`` x ``size``.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as opened:
            return read_picture(opened, size)
    except Exception as error:  # decoders raise whatever they meet
        what = "an image" if isinstance(file, bytes) else f"the image {file}"
        raise InputError(f"cannot read {what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line that does not change from run to run."""
    if isinstance(error, UnidentifiedImageError):  # it names an object's address
        return "not an image of a known format"
    return ((getattr(error, "strerror", None) or str(error)).splitlines() or [type(error).__name__])[0]
