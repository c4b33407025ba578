"""Images to score, wherever they are: folders of any names, class folders, pixel shards, .npz files of samples.

They are listed in one order, and read one by one or as batches. An image is a file of its own or a piece of one.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from data_prep.images import is_image, list_images, named_as_image
from moe_dit.data import ShardReader
from moe_dit.data.pixels import (
    UnfitImage,
    center_crop,
    check_pixels,
    decoding,
    exif_orientation,
    open_image,
    read_picture,
)
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

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return str(self.file) if self.length < 0 else f"{self.file}, at byte {self.offset}"


class Images(list[ImageFile]):
    """Images in one fixed order.

    Attributes:
        classes: the names of their classes in the order of the labels; None where nobody tells them.
    """

    def __init__(self, images: Iterable[ImageFile] = (), classes: Sequence[str] | None = None):
        super().__init__(images)
        self.classes = classes


# --- lists ------------------------------------------------------------------------------------------------------------


def any_images(path: Path) -> Images:
    """List the images at a path, in one fixed order; none where there are none.

    Raises:
        InputError: it cannot be listed, holds something else, or images of which it is not clear that all are meant.
    """
    if path.suffix == ".npz":
        return _array_images(path)
    if os.path.exists(path / "manifest.json"):
        return _shard_images(path)
    return _folder_images(path)


def reference_images(path: Path) -> Images:
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
    """List a sample folder's images by index: files named 000123_7.png (index, label).

    Raises:
        InputError: there are two of an index.
    """
    found: dict[int, ImageFile] = {}
    for file in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
        if match := re.fullmatch(r"(\d+)_(\d+)\.png", file.name):
            image = found.setdefault(int(match[1]), ImageFile(file, int(match[2])))
            if image.file != file:
                raise InputError(
                    f"{folder} holds two samples of index {int(match[1])}, {image.file.name} and {file.name}; remove "
                    "the one that is not meant"
                )
    return [found[index] for index in sorted(found)]


def listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images, told by their content where their names do not, and the folders in a folder; no hidden ones.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from None
    folders = [entry for entry in entries if os.path.isdir(entry)]
    files = sorted(set(entries) - set(folders))
    return [file for file in files if named_as_image(file.name) or is_image(file)], folders


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and of those in it; links to other folders are not followed."""
    images, folders = listed(folder)
    return images + [image for inside in folders if not inside.is_symlink() for image in images_below(inside)]


def check_alone(folder: Path, some: Sequence[Path], others: Sequence[Path], what: str) -> None:
    """Raise InputError where a folder holds images of two kinds, of which ``what`` names the first: are all meant?"""
    if some and others:
        first, other = (os.path.relpath(paths[0], folder) for paths in (some, others))
        raise InputError(
            f"{folder} holds {len(some)} image{'s' * (len(some) > 1)} {what} ({first}) and {len(others)} "
            f"other{'s' * (len(others) > 1)} ({other}); move away those that are not meant"
        )


def _folder_images(folder: Path) -> Images:
    own, folders = listed(folder)
    if not own and folders:
        paths, labels, classes = list_images(folder)
        found = (ImageFile(Path(path), label) for path, label in zip(paths, labels, strict=True))
        return Images(found, classes)
    check_alone(folder, own, [image for inside in folders for image in images_below(inside)], "of its own")
    return Images(ImageFile(file, None) for file in own)


def _shard_images(folder: Path) -> Images:
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
    return Images(images, manifest.classes)


def _array_images(file: Path) -> Images:
    """Of arr_0, uint8 [N, H, W, 3], and labels arr_1 where there are some, as ADM's sampler writes them."""
    try:
        with open_file(file) as opened, zipfile.ZipFile(opened) as members:
            names = set(members.namelist())
            if "arr_0.npy" not in names:
                return Images()
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
    return Images(
        ImageFile(file, None if labels is None else int(labels[i]), start + i * size, size, shape[1:3])
        for i in range(shape[0])
    )


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


def check_sizes(folder: Path, images: Sequence[ImageFile], strict: bool = True) -> int:
    """The side that all images have.

    Args:
        folder: for messages.
        images: at least one.
        strict: refuse those that are no whole images, so far as the ends of a file tell; else they are passed over.

    Raises:
        InputError: they are not all of one size, not square, or none can be read.
    """

    def look(image: ImageFile) -> tuple[int, int] | InputError:
        try:
            return image_size(image)
        except InputError as error:
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(zip(images, pool.map(look, images), strict=True))
    sizes = [(image, size) for image, size in found if not isinstance(size, InputError)]
    for _, error in found if strict or not sizes else ():
        if isinstance(error, InputError):
            raise error
    first, whole = sizes[0]
    for image, size in sizes:
        if size != whole:
            one, other = (f"{width}x{height}" for width, height in (whole, size))
            raise InputError(
                f"{folder} mixes images of {one} ({first.file.name}) and of {other} ({image.file.name}); "
                "the samples of a folder should be of one size"
            )
    width, height = whole
    if width != height:
        raise InputError(f"{folder} holds images of {width}x{height}; they should be square")
    return width


def ends_as_png(file: BinaryIO) -> bool:
    """Whether the end of a PNG file is there."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))  # a program may have put something behind it
    return PNG_END in file.read()


def _unreadable(file: Path) -> InputError:
    return InputError(f"{file} holds an image that cannot be read; remove or replace it")


def read_batches(
    images: Sequence[ImageFile], size: int, unread: dict[int, str] | None = None
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read images in batches of BATCH that can be read, in order; the next one is read while one is used.

    Args:
        images: to read.
        size: their side, to which they are scaled and cropped.
        unread: gets the place and the reason of each that cannot be read, and is left out; None: that is an error.

    Yields:
        places in ``images``, and uint8 [N, 3, size, size]; the last batch is smaller.
    """
    ahead = 2 * BATCH
    with ThreadPoolExecutor(WORKERS) as pool:
        coming = deque(pool.submit(read_image, image, size) for image in images[:ahead])
        places: list[int] = []
        batch: list[torch.Tensor] = []
        for place in range(len(images)):
            if place + ahead < len(images):
                coming.append(pool.submit(read_image, images[place + ahead], size))
            try:
                batch.append(coming.popleft().result())
                places.append(place)
            except InputError as error:
                if unread is None:
                    raise
                unread[place] = str(error)
            if len(batch) == BATCH or (batch and place + 1 == len(images)):
                yield places, torch.stack(batch)
                places, batch = [], []
