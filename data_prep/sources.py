"""Where images come from: class folders, tar files of them (ImageNet's own, WebDataset shards), parquet or arrow files.

A source lists its images in one fixed order and reads any of them in any process, from this machine's disks or from
behind a URL (:mod:`moe_dit.store`). It holds a few numbers an image.
"""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.images import EXTENSIONS, list_images
from moe_dit import randomness
from moe_dit.data.order import WindowOrder
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say
from moe_dit.store import RemoteFolder, RemotePath, is_remote

GROUPS = 16  # row groups of a parquet file whose images are shuffled together, and kept by a process that reads
_TABLES = (".parquet", ".arrow")
_TARS = (".tar",)
_FILES = _TABLES + _TARS
_TAR_HELP = "expected ImageNet's tar of class tars, a folder of class tars, or WebDataset shards of images and .cls"


class BrokenImage(Exception):
    """An image that a source has and cannot give; others can still be read."""


class Source:
    """Images with their classes.

    Attributes:
        labels: the class of each image.
        classes: the classes' names.
    """

    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What image ``i`` is called, for people."""
        raise NotImplementedError

    def read(self, i: int) -> str | bytes:
        """Image ``i``: its path, or the bytes of its file.

        Raises:
            BrokenImage: it cannot be given, and others can.
            InputError: the source cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Tells this listing from another."""
        listing = "\n".join(self.name(i) for i in range(len(self)))
        return hashlib.sha256(os.fsencode(listing)).hexdigest()

    def order(self) -> np.ndarray:
        """The order in which images go into shards, int64 [N]."""
        return randomness.permutation(0, 0, len(self))


class ClassFolders(Source):
    """One folder of images a class."""

    def __init__(self, folder: str):
        self.folder = folder
        self.paths, self.labels, self.classes = list_images(folder)
        parents = {os.path.relpath(os.path.dirname(path), folder) for path in self.paths}
        if len(parents) > 2 * len(self.classes) and not parents & set(self.classes):
            say(
                f"{folder} has {len(self.classes)} class folders ({', '.join(self.classes[:3])}), whose images lie in "
                f"{len(parents)} folders below; if those are the classes, give one of {folder}'s folders as --images"
            )

    def name(self, i: int) -> str:
        return os.path.relpath(self.paths[i], self.folder)

    def read(self, i: int) -> str:
        return self.paths[i]


class RemoteClassFolders(Source):
    """One folder of images a class, behind a URL; listed and named as the same folder here."""

    def __init__(self, folder: RemoteFolder, names: list[str]):
        self.folder = folder
        self.classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        if not self.classes:
            raise InputError(
                f"{folder.url} has no class folders; expected one folder of images a class, e.g. {folder.url}/cat/*.png"
            )
        images = [name for name in names if "/" in name and name.lower().endswith(EXTENSIONS)]
        for name in sorted(set(self.classes) - {image.partition("/")[0] for image in images}):
            raise InputError(f"{folder.url}: the class folder {name} holds no images ({' '.join(EXTENSIONS)})")
        place = {name: i for i, name in enumerate(self.classes)}
        self.paths = sorted(images, key=lambda name: (place[name.partition("/")[0]], name))
        self.labels = [place[name.partition("/")[0]] for name in self.paths]

    def name(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        try:
            return self.folder.read(self.paths[i])
        except FileNotFoundError:
            raise BrokenImage("missing on the server") from None


class Tars(Source):
    """Images inside tar files, uncompressed ones, which any process reads at their offsets."""

    def __init__(self, paths: Sequence[Path | RemotePath]):
        self.paths = paths
        found: list[tuple[str, str, int, int, int]] = []  # class, name, file, offset, size
        for number, path in enumerate(paths):
            found += [(kind, name, number, offset, size) for kind, name, offset, size in _listed(path)]
        if not found:
            raise InputError(f"{paths[0]} holds no images ({' '.join(EXTENSIONS)}); {_TAR_HELP}")
        numbers = all(kind.isdigit() for kind, *_ in found)
        self.classes = sorted({kind for kind, *_ in found}, key=int if numbers else str)
        if numbers:
            self.classes = [str(n) for n in range(int(self.classes[-1]) + 1)]
        place = {kind: i for i, kind in enumerate(self.classes)}
        found.sort(key=lambda image: (place[image[0]], image[2], image[1]))
        self.labels = [place[image[0]] for image in found]
        self._names = [f"{paths[image[2]].name}/{image[1]}" for image in found]
        self._places = np.array([image[2:] for image in found], np.int64)

    def name(self, i: int) -> str:
        return self._names[i]

    def read(self, i: int) -> bytes:
        number, offset, size = self._places[i].tolist()
        try:
            with self.paths[number].open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise InputError(f"{self.paths[number]} cannot be read: {error.strerror or error}") from None


def _listed(path: Path | RemotePath) -> list[tuple[str, str, int, int]]:
    """A tar file's images: class, name, offset and size."""
    images: list[tuple[str, str, int, int]] = []  # by sample: key, name, offset, size
    labels: dict[str, str] = {}
    inner: list[tuple[str, int]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                key = member.name[: len(member.name) - len(extension) - 1]
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                if member.name.endswith(".tar"):
                    inner.append((member.name, member.offset_data))
                elif extension == "cls":
                    content = tar.extractfile(member)
                    labels[key] = content.read().decode("ascii", "replace").strip() if content else ""
                elif member.name.lower().endswith(EXTENSIONS):
                    images.append((key, member.name, member.offset_data, member.size))
        if inner:
            return [image for name, offset in sorted(inner) for image in _inside(path, name, offset)]
    except InputError:
        raise
    except Exception as error:  # tarfile raises whatever a damaged header leads it to
        raise InputError(f"{path} cannot be read as a tar file: {error}") from None
    if not labels:  # a class's own tar
        return [(path.stem, name, offset, size) for _, name, offset, size in images]
    for key, name, _, _ in images:
        if not labels.get(key, "").isdigit():
            raise InputError(f"{path}: {name} has no .cls with a class number; {_TAR_HELP}")
    return [(str(int(labels[key])), name, offset, size) for key, name, offset, size in images]


def _inside(path: Path | RemotePath, name: str, start: int) -> list[tuple[str, str, int, int]]:
    """Images of a tar file inside another, offsets in the outer one."""
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            kind = Path(name).stem
            return [
                (kind, f"{name}/{member.name}", member.offset_data, member.size)
                for member in tar
                if member.isfile() and member.name.lower().endswith(EXTENSIONS)
            ]


class Tables(Source):
    """Parquet or arrow files with columns ``image`` (a struct of bytes and path) and ``label``, as the hub's datasets.

    A parquet file gives a row by decoding its whole row group, so images are shuffled in windows of GROUPS of them.
    """

    def __init__(self, paths: Sequence[Path | RemotePath]):
        self.paths = paths
        self.labels, self.classes = [], []
        self._groups: list[tuple[int, int]] = []  # file, row group
        sizes: list[int] = []
        for number, path in enumerate(paths):
            try:
                table = _open_table(path)
                for group in range(table.num_row_groups):
                    labels = table.read_row_group(group, columns=["label"])["label"].to_pylist()
                    self.labels += labels
                    self._groups.append((number, group))
                    sizes.append(len(labels))
                self.classes = self.classes or _class_names(table.schema_arrow)
            except InputError:
                raise
            except Exception as error:  # pyarrow raises whatever it meets
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(
                    f"{path} cannot be read as a table with columns image (bytes, path) and label: {reason}"
                ) from None
        if not self.labels or not all(isinstance(label, int) and label >= 0 for label in self.labels):
            raise InputError(f"{paths[0]}: labels should be class numbers, and there should be some")
        self.classes = self.classes or [str(n) for n in range(max(self.labels) + 1)]
        self._sizes = sizes
        self._starts = np.cumsum([0, *sizes])
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def name(self, i: int) -> str:
        group, row = self._row(i)
        number, part = self._groups[group]
        return f"{self.paths[number].name}/{part}/{row}"

    def read(self, i: int) -> bytes:
        group, row = self._row(i)
        if group not in self._kept:
            number, part = self._groups[group]
            try:
                self._kept[group] = _open_table(self.paths[number]).read_row_group(part, columns=["image"])["image"]
            except InputError:
                raise
            except Exception as error:  # pyarrow raises whatever it meets
                raise BrokenImage(f"row group {part} cannot be read: {str(error).partition(chr(10))[0]}") from None
            if len(self._kept) > GROUPS:
                self._kept.popitem(last=False)
        return self._kept[group][row].as_py()["bytes"] or b""

    def order(self) -> np.ndarray:
        return WindowOrder(0, self._sizes, GROUPS).samples(np.arange(len(self)))

    def _row(self, i: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        return group, i - int(self._starts[group])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


class _ArrowFile:
    """An arrow file with the part of pyarrow's ParquetFile that is used here."""

    def __init__(self, path: Path):
        import pyarrow as pa

        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid:  # the datasets library writes streams
            self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.schema_arrow = self.table.schema
        self.num_row_groups = 1

    def read_row_group(self, _: int, columns: list[str]) -> Any:
        return self.table.select(columns)


def _open_table(path: Path | RemotePath) -> Any:
    import pyarrow.parquet

    if isinstance(path, RemotePath):
        if path.suffix == ".arrow":
            raise InputError(f"{path}: arrow files are read from this machine's disks; copy them first")
        return pyarrow.parquet.ParquetFile(path.open())
    return _ArrowFile(path) if path.suffix == ".arrow" else pyarrow.parquet.ParquetFile(path)


def _class_names(schema: Any) -> list[str]:
    """Those of the label, where the datasets library left them in the file."""
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder; none of one that cannot be listed, which is said where class folders are looked for."""
    try:
        return sorted(entry for entry in folder.iterdir() if os.path.isfile(entry))
    except OSError:
        return []


def open_source(images: str) -> Source:
    """The source of images at a path or URL: a folder, or a .tar, .parquet or .arrow file.

    Raises:
        InputError: there are no images, or they cannot be listed.
    """
    names: list[str] = []
    files: Sequence[Path | RemotePath]
    if is_remote(images):
        parent, _, last = images.rstrip("/").rpartition("/")
        is_file = last.endswith(_FILES)
        folder = RemoteFolder(parent if is_file else images)
        names = [last] if is_file else folder.names()
        files = [RemotePath(folder, name) for name in names if "/" not in name]
    else:
        path = Path(images)
        is_file = os.path.isfile(path)
        files = [path] if is_file else _files_in(path)
    for suffixes, kind in ((_TABLES, Tables), (_TARS, Tars)):
        chosen = [file for file in files if file.suffix in suffixes]
        if chosen:
            return kind(chosen)
    if is_file:
        raise InputError(f"--images {images}: expected a folder, or a .tar, .parquet or .arrow file")
    return RemoteClassFolders(folder, names) if is_remote(images) else ClassFolders(images)
