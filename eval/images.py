"""Images to score, wherever they are: folders of any names, class folders, pixel shards, .npz files of samples.

They are listed in one order, and read one by one or as batches. An image is a file of its own or a piece of one.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from data_prep.images import (
    EXTENSIONS,
    UnfitImage,
    center_crop,
    check_pixels,
    decoding,
    exif_orientation,
    list_images,
    open_image,
    read_picture,
)
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import open_file

BATCH = 64
WORKERS = min(8, os.cpu_count() or 1)  # image coding releases Python's lock, so threads are enough
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # its last chunk, which is empty
KINDS = "a folder of images or of class folders, pixel shards, or a .npz file with images as arr_0"


@dataclass(frozen=True)
class ImageFile:
    """Where one image's bytes are; label None where there is none.

    Attributes:
        file: of its own, or of which it is a piece.
        label: its class.
        offset, length: of the piece in bytes; length -1: the rest of the file.
        raw: height and width of uint8 [H, W, 3] that no format holds; None: an image file's bytes.
    """

    file: Path
    label: int | None
    offset: int = 0
    length: int = -1
    raw: tuple[int, int] | None = None


# --- lists ------------------------------------------------------------------------------------------------------------


def any_images(path: Path) -> list[ImageFile]:
    """List the images at a path, in one fixed order; none where there are none.

    Raises:
        InputError: it cannot be listed, or holds something else.
    """
    if path.suffix == ".npz":
        return _array_images(path)
    if os.path.exists(path / "manifest.json"):
        return _shard_images(path)
    return _folder_images(path)


def reference_images(path: Path) -> list[ImageFile]:
    """List real images: :func:`any_images`, at least one.

    Raises:
        InputError: nothing there, no images in it, or shards of latents.
    """
    if not os.path.exists(path):
        raise InputError(f"no reference {path}; it should be a .npz file of statistics, or {KINDS}")
    images = any_images(path)
    if not images:
        raise InputError(f"the reference {path} holds no images; it should be {KINDS}")
    return images


def sample_images(folder: Path) -> list[ImageFile]:
    """List a sample folder's images by index: files named 000123_7.png (index, label)."""
    found = []
    for file in folder.iterdir() if os.path.isdir(folder) else ():
        if match := re.fullmatch(r"(\d+)_(\d+)\.png", file.name):
            found.append((int(match[1]), ImageFile(file, int(match[2]))))
    return [image for _, image in sorted(found, key=lambda pair: pair[0])]


def _folder_images(folder: Path) -> list[ImageFile]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from None
    if any(os.path.isdir(entry) and not entry.name.startswith(".") for entry in entries):
        paths, labels, _ = list_images(folder)
        return [ImageFile(Path(path), label) for path, label in zip(paths, labels, strict=True)]
    return [
        ImageFile(file, None)
        for file in entries
        if file.name.lower().endswith(EXTENSIONS) and not file.name.startswith(".")
    ]


def _shard_images(folder: Path) -> list[ImageFile]:
    manifest = read_manifest(folder)
    if manifest.kind != "pixels":
        raise InputError(
            f"{folder} holds {manifest.kind}; scores need images: give the folder of images itself, or pack it with "
            "data_prep.pack_pixels"
        )
    reader = ShardReader(manifest)
    images = []
    for index in range(len(reader)):
        members = reader.members(index)
        offset, length = members.place("image")
        images.append(ImageFile(members.path, members.label(), offset, length))
    return images


def _array_images(file: Path) -> list[ImageFile]:
    """Of arr_0, uint8 [N, H, W, 3], and labels arr_1 where there are some, as ADM's sampler writes them."""
    try:
        with open_file(file) as opened, zipfile.ZipFile(opened) as members:
            names = set(members.namelist())
            if "arr_0.npy" not in names:
                return []
            info = members.getinfo("arr_0.npy")
            with members.open(info) as array:
                old = np.lib.format.read_magic(array) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(array)
                header = array.tell()
        labels = np.load(file)["arr_1"] if "arr_1.npy" in names else None
    except FileNotFoundError:
        raise InputError(f"no file {file}") from None
    except Exception as error:  # a damaged byte makes zipfile and numpy raise errors of many kinds
        raise InputError(f"{file} is damaged, or no .npz file: {str(error) or type(error).__name__}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise InputError(f"{file}: arr_0 is {dtype} {list(shape)}; images are uint8 [N, H, W, 3]")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{file}: arr_0 is compressed and cannot be read in parts; save it with numpy.savez")
    if labels is not None and (labels.shape != (shape[0],) or labels.dtype.kind not in "iu"):
        labels = None
    with open(file, "rb") as opened:  # a member's data stand behind a header of its own
        opened.seek(info.header_offset + 26)
        name, extra = np.frombuffer(opened.read(4), "<u2").tolist()
    start, size = info.header_offset + 30 + name + extra + header, shape[1] * shape[2] * 3
    return [
        ImageFile(file, None if labels is None else int(labels[i]), start + i * size, size, shape[1:3])
        for i in range(shape[0])
    ]


def fingerprint(images: Sequence[ImageFile]) -> str:
    """Tells one list of images from another by names, labels and sizes, without reading them."""
    described = [(image.file.name, image.label, image.offset, image.file.stat().st_size) for image in images]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def labels_of(images: Sequence[ImageFile]) -> torch.Tensor | None:
    """Labels, int64 [N], or None where an image has none."""
    labels = [image.label for image in images if image.label is not None]
    return torch.tensor(labels) if len(labels) == len(images) else None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_image(image: ImageFile, size: int | None = None) -> torch.Tensor:
    """Read one image as uint8 [3, H, W]; one that is not size x size is scaled and cropped as the training data was."""
    try:
        with open_file(image.file) as file:
            if image.raw is not None:
                with decoding(image.raw[1], image.raw[0]):
                    file.seek(image.offset)
                    picture = Image.frombytes("RGB", image.raw[::-1], file.read(image.length))
                    if size is not None and picture.size != (size, size):
                        picture = center_crop(picture, size)
            elif image.length < 0:
                picture = read_picture(file, size)
            else:
                file.seek(image.offset)
                picture = read_picture(io.BytesIO(file.read(image.length)), size)
    except UnfitImage as error:
        raise InputError(f"{image.file} holds an image that is not read: {error}") from None
    except Exception:  # decoders raise whatever they meet
        raise _unreadable(image.file) from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def image_size(image: ImageFile) -> tuple[int, int]:
    """Width and height, by an image's first bytes; InputError where those, or a file's last, are no image's."""
    try:
        if image.raw is not None:
            check_pixels(image.raw[1], image.raw[0])
            return image.raw[1], image.raw[0]
        with open_file(image.file) as opened:
            opened.seek(image.offset)
            piece: BinaryIO = opened if image.length < 0 else io.BytesIO(opened.read(image.length))
            picture = open_image(piece)
            if picture.format == "PNG" and not ends_as_png(piece):
                raise _unreadable(image.file)
            width, height = picture.size
            if picture.format == "TIFF":  # whose size Pillow tells as it will be turned
                return width, height
            with decoding(width, height):  # a PNG file's EXIF data may stand behind its pixels
                return (height, width) if exif_orientation(picture) > 4 else (width, height)
    except UnfitImage as error:
        raise InputError(f"{image.file} holds an image that is not read: {error}") from None
    except InputError:
        raise
    except Exception:  # decoders raise whatever they meet
        raise _unreadable(image.file) from None


def check_sizes(folder: Path, images: Sequence[ImageFile]) -> int:
    """The side that all images have.

    Raises:
        InputError: they are not all of one size, not square, or one is no whole image, so far as the ends of a file
            tell.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        sizes = list(pool.map(image_size, images))
    for image, size in zip(images, sizes, strict=True):
        if size != sizes[0]:
            first, other = (f"{width}x{height}" for width, height in (sizes[0], size))
            raise InputError(
                f"{folder} mixes images of {first} ({images[0].file.name}) and of {other} ({image.file.name}); "
                "the samples of a folder should be of one size"
            )
    width, height = sizes[0]
    if width != height:
        raise InputError(f"{folder} holds images of {width}x{height}; samples should be square")
    return width


def ends_as_png(file: BinaryIO) -> bool:
    """Whether the end of a PNG file is there."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))  # a program may have put something behind it
    return PNG_END in file.read()


def _unreadable(file: Path) -> InputError:
    return InputError(f"{file} holds an image that cannot be read; remove or replace it")


def read_batches(batches: Sequence[Sequence[ImageFile]], size: int) -> Iterator[torch.Tensor]:
    """Read batches of images as uint8 [N, 3, size, size], in order; the next one is read while one is used."""
    with ThreadPoolExecutor(WORKERS) as pool:

        def submit(k: int):
            return [pool.submit(read_image, image, size) for image in batches[k]] if k < len(batches) else []

        coming = submit(0)
        for k in range(len(batches)):
            batch = coming
            coming = submit(k + 1)
            yield torch.stack([future.result() for future in batch])
