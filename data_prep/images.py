"""Reading images as people see them: class folders, and the field's usual centre crop."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import open_file

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut the middle square out.

    Halves with a box filter while it can, then resizes once with a bicubic one: sharper and less aliased than one
    large bicubic step. Source: ADM (Dhariwal and Nichol, 2021), guided_diffusion/image_datasets.py, as DiT, SiT and
    the FID reference batches use it; the roundings are theirs.

    Args:
        image: any PIL image with smooth modes (RGB, L, ...); smaller ones are enlarged.
        size: side of the result in pixels.

    Returns:
        A ``size`` x ``size`` image of the same mode.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def as_seen(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: turned as its EXIF data says, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image, np.float64)  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((grey / 257 if grey.max() > 255 else grey).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_image(file: str | Path | bytes, size: int) -> Image.Image:
    """Read an image file, or its bytes, as RGB and centre-crop it to ``size`` x ``size``.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as opened, Image.open(opened) as image:
            return center_crop(as_seen(image), size)
    # Decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        what = "an image" if isinstance(file, bytes) else f"the image {file}"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"cannot read {what}: {reason}") from error


def is_image(path: str | Path) -> bool:
    """Whether a file is an image by its content, whatever its name."""
    try:
        with open_file(path) as opened, Image.open(opened, formats=FORMATS):
            return True
    except Exception:  # decoders raise whatever they meet
        return False


def list_images(folder: str | Path) -> tuple[list[str], list[int], list[str]]:
    """List a folder of class folders, e.g. ImageNet's ``train/n01440764/*.JPEG``.

    A class folder may hold further folders. Names that start with a dot are passed over.

    Args:
        folder: holds one folder a class.

    Returns:
        (paths, labels, classes): files in order of class and path, the class index of each, and the sorted names of
        the class folders (index = label).

    Raises:
        InputError: the folder is missing, has no class folders, or one of them has no images.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise InputError(f"no such folder of images: {folder}")
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images_below(os.path.join(folder, name))
            if not found:
                raise InputError(f"{folder}: the class folder {name} holds no images ({' '.join(EXTENSIONS)})")
            paths += found
            labels += [label] * len(found)
    except OSError as error:
        raise InputError(f"cannot list {error.filename or folder}: {error.strerror}") from error
    if not classes:
        raise InputError(
            f"{folder} has no class folders; expected one folder of images a class, e.g. {folder}/cat/*.png"
        )
    return paths, labels, classes


def _images_below(folder: str) -> list[str]:
    def fail(error: OSError):
        raise error

    found = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in list(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if real in seen:  # a loop of links would multiply files
                folders.remove(name)
            seen.add(real)
        images = (name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in images]
    return sorted(found)
