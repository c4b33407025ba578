"""Files of images: which of a folder's are, and of which class; their pixels are :mod:`moe_dit.data.pixels`'."""

import io
import os
from collections import Counter
from pathlib import Path

from PIL import Image

from data_prep.classes import check_splits, label
from moe_dit.data.index import IMAGE_EXTENSIONS
from moe_dit.data.pixels import center_crop
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import open_file

__all__ = ["center_crop", "images_by_class", "is_image", "list_images", "named_as_image"]

EXTENSIONS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # Pillow's names, of files of other names
PACKED = (".parquet", ".arrow", ".tar")
LOOSE = "images beside the class folders"
OTHERS = "files that are no images of a known format"
LOST = "links that lead nowhere"


def is_image(file: str | Path | bytes) -> bool:
    """Whether a file, or its bytes, begins as an image does, whatever its name; False where it cannot be read."""
    try:
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as opened,
            Image.open(opened, formats=FORMATS),
        ):
            return True
    except Image.DecompressionBombError:  # which is said where it is read
        return True
    except Exception:  # decoders raise whatever they meet
        return False


def named_as_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return name.lower().endswith(EXTENSIONS)


def list_images(folder: str | Path) -> tuple[list[str], list[int], list[str]]:
    """List a folder of class folders, e.g. ImageNet's ``train/n01440764/*.JPEG``.

    A class folder may hold further folders. Names that start with a dot are passed over.

    Args:
        folder: holds one folder a class.

    Returns:
        (paths, labels, classes): files in order of class and path, the label of each, and the classes' names (index =
        label), as :func:`data_prep.classes.label` orders them.

    Raises:
        InputError: the folder is missing, has no class folders, or one of them has no images.
    """
    paths, kinds, _ = images_by_class(folder)
    check_splits(os.fspath(folder), set(kinds))
    found = label(kinds, os.fspath(folder), strict=False)
    order = sorted(range(len(paths)), key=lambda i: (found.labels[i], paths[i]))
    return [paths[i] for i in order], [found.labels[i] for i in order], found.classes


def images_by_class(folder: str | Path) -> tuple[list[str], list[str], Counter[str]]:
    """The files of a folder of class folders.

    Returns:
        (paths, kinds, left_out): files, the name of each one's class folder, and how many files are none of them, by
        what they are.

    Raises:
        InputError: the folder is missing, has no class folders, or one of them has no images.
    """
    folder = os.fspath(folder)
    left_out: Counter[str] = Counter()
    if not os.path.isdir(folder):
        raise InputError(f"no such folder of images: {folder}")
    try:
        with os.scandir(folder) as entries:
            there = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        classes = [name for name, is_folder in there if is_folder]
        paths: list[str] = []
        kinds: list[str] = []
        for name in classes:
            found = _images_below(os.path.join(folder, name), left_out)
            if not found:
                packed = [file for file in sorted(os.listdir(os.path.join(folder, name))) if file.endswith(PACKED)]
                instead = f"but {packed[0]}; give {folder}/{name} instead" if packed else f"({' '.join(EXTENSIONS)})"
                raise InputError(f"{folder}: the class folder {name} holds no images {instead}")
            paths += found
            kinds += [name] * len(found)
    except OSError as error:
        raise InputError(f"cannot list {error.filename or folder}: {error.strerror}") from error
    if not classes:
        raise InputError(
            f"{folder} has no class folders; expected one folder of images a class, e.g. {folder}/cat/*.png"
        )
    for name, is_folder in there:
        if not is_folder and not os.path.exists(os.path.join(folder, name)):
            left_out[LOST] += 1
        elif not is_folder and (named_as_image(name) or is_image(os.path.join(folder, name))):
            left_out[LOOSE] += 1
    return paths, kinds, left_out


def _images_below(folder: str, left_out: Counter[str]) -> list[str]:
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
        for name in files:
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            if named_as_image(name) or is_image(path):
                found.append(path)
            else:
                left_out[OTHERS] += 1
    return sorted(found)
