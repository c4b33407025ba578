"""Where images come from: class folders, tar files of them (ImageNet's own, WebDataset shards), parquet or arrow files.

A source lists its images in one fixed order and reads any of them in any process, from this machine's disks or from
behind a URL (:mod:`moe_dit.store`). It holds a few numbers an image.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.classes import check_splits, split_of, splits_in
from data_prep.images import EXTENSIONS, LOOSE, OTHERS, images_by_class, is_image, named_as_image
from data_prep.source import BrokenImage, Source
from data_prep.tables import Tables
from data_prep.tars import Tars
from moe_dit.classes import listed
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say
from moe_dit.store import RemoteFolder, RemotePath, is_remote

_TABLES = (".parquet", ".arrow")
_TARS = (".tar",)
_FILES = _TABLES + _TARS
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_NO_IMAGES = (".txt", ".json", ".jsonl", ".csv", ".md", ".html", ".xml", ".npy", ".npz", ".tar")  # behind a URL


class ClassFolders(Source):
    """One folder of images a class."""

    def __init__(self, folder: str, names: Sequence[str] | None = None):
        self.folder = folder
        paths, kinds, self.left_out = images_by_class(folder)
        below = {os.path.relpath(os.path.dirname(path), folder) for path in paths}
        if names is None:
            _check_level(folder, sorted(set(kinds)), below)
        order = self._number(kinds, "a class folder", folder, names, paths)
        self.paths = [paths[i] for i in order]

    def name(self, i: int) -> str:
        return os.path.relpath(self.paths[i], self.folder)

    def read(self, i: int) -> str:
        return self.paths[i]


class RemoteClassFolders(Source):
    """One folder of images a class, behind a URL; listed and named as the same folder here."""

    def __init__(self, folder: RemoteFolder, there: list[str], names: Sequence[str] | None = None):
        self.folder = folder
        self.left_out = Counter()
        classes = sorted({name.partition("/")[0] for name in there if "/" in name})
        if not classes:
            raise InputError(
                f"{folder.url} has no class folders; expected one folder of images a class, e.g. {folder.url}/cat/*.png"
            )
        paths = []
        for name in there:
            if name.endswith("/"):
                continue
            if not self._is_image(name):
                self.left_out[OTHERS] += 1
            elif "/" in name:
                paths.append(name)
            else:
                self.left_out[LOOSE] += 1
        for name in sorted(set(classes) - {image.partition("/")[0] for image in paths}):
            raise InputError(f"{folder.url}: the class folder {name} holds no images ({' '.join(EXTENSIONS)})")
        kinds = [image.partition("/")[0] for image in paths]
        if names is None:
            _check_level(folder.url, classes, {image.rpartition("/")[0] for image in paths})
        order = self._number(kinds, "a class folder", folder.url, names, paths)
        self.paths = [paths[i] for i in order]

    def _is_image(self, name: str) -> bool:
        return named_as_image(name) or (not name.lower().endswith(_NO_IMAGES) and is_image(self.folder.begins(name)))

    def name(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        try:
            return self.folder.read(self.paths[i])
        except FileNotFoundError:
            raise BrokenImage("missing on the server") from None


def _check_level(folder: str, classes: list[str], below: set[str]) -> None:
    """Refuse, or say, that what stands where classes do may be something else: splits, or a level too high.

    Args:
        folder: the source.
        classes: the names of its class folders.
        below: the folders in it that hold images, by their names from there.
    """
    check_splits(folder, classes)
    if len(below) > 2 * len(classes) and not below & set(classes):
        say(
            f"{folder} has {len(classes)} class folders ({', '.join(classes[:3])}), whose images lie in "
            f"{len(below)} folders below; if those are the classes, give one of {folder}'s folders as --images"
        )


def _chosen(files: Sequence[Path | RemotePath], where: str, split: str | None) -> Sequence[Path | RemotePath]:
    """The files of one split, where their names tell of several."""
    splits = splits_in([file.name for file in files])
    # A class may be called as a split is; a tar file of no split beside says that they are classes.
    mixed = len(splits) > 1 and (files[0].suffix not in _TARS or all(split_of(file.name) for file in files))
    if split is None:
        if mixed:
            raise InputError(
                f"{where} holds the splits {', '.join(splits)} (e.g. {files[0].name} and {files[-1].name}), which are "
                f"not to be mixed; choose with --split {'train' if 'train' in splits else splits[0]}"
            )
        return files
    wanted = split_of(split)
    chosen = [file for file in files if split_of(file.name) == wanted]
    if wanted is None or not chosen:
        there = f"holds the splits {', '.join(splits)}" if splits else "names no splits in its files' names"
        raise InputError(f"--split {split}: {where} {there}")
    return chosen


def open_source(images: str, names: Sequence[str] | None = None, split: str | None = None) -> Source:
    """The source of images at a path or URL: a folder, or a .tar, .parquet or .arrow file.

    Args:
        images: path or URL.
        names: the classes in the order of their labels; None: the source's own order (:mod:`data_prep.classes`).
        split: which files of a folder of .tar, .parquet or .arrow files are meant, by what their names say.

    Raises:
        InputError: there are no images, they cannot be listed, or it is ambiguous what a class or its label is.
    """
    there: list[str] = []
    files: Sequence[Path | RemotePath]
    if is_remote(images):
        parent, _, last = images.rstrip("/").rpartition("/")
        is_file = last.endswith(_FILES)
        folder = RemoteFolder(parent if is_file else images)
        there = [last] if is_file else folder.names()
        files = [RemotePath(folder, name) for name in there if "/" not in name]
        folders = sorted({name.partition("/")[0] for name in there if "/" in name})
    else:
        path = Path(images)
        is_file = os.path.isfile(path)
        files, folders = ([path], []) if is_file else _entries(path)
    packed = [file.name for file in files if file.name.lower().endswith(_PACKED)]
    if packed:
        raise InputError(f"{images} holds {listed(packed)}, which cannot be read in parts; unpack or decompress them")
    tables, tars = ([file for file in files if file.suffix in suffixes] for suffixes in (_TABLES, _TARS))
    if tables and tars:
        raise InputError(f"{images} holds {tables[0].name} and {tars[0].name}; give one kind of files as --images")
    chosen = tables or tars
    if not chosen:
        if is_file:
            raise InputError(f"--images {images}: expected a folder, or a .tar, .parquet or .arrow file")
        if split is not None:
            raise InputError(f"--split {split}: {images} is a folder of folders; give the split's own as --images")
        return RemoteClassFolders(folder, there, names) if is_remote(images) else ClassFolders(images, names)
    source = (Tables if tables else Tars)(_chosen(chosen, images, split), names)
    beside = [name for name in folders if not name.startswith(".")]
    if beside:
        source.left_out[f"folders beside the {chosen[0].suffix} files"] += len(beside)
    loose = sum(named_as_image(file.name) for file in files)
    if loose:
        source.left_out[f"images beside the {chosen[0].suffix} files"] += loose
    return source


def _entries(folder: Path) -> tuple[list[Path], list[str]]:
    """The files and folders in a folder; none of one that cannot be listed, which is said by who looks for classes."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        files = [entry for entry in entries if os.path.isfile(entry)]
        return files, [entry.name for entry in entries if os.path.isdir(entry)]
    except OSError:
        return [], []
