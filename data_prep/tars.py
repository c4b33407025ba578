"""Images inside tar files: class tars, a tar of them, a tar of class folders, or WebDataset shards with .cls files."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data_prep.classes import check_splits, is_split
from data_prep.images import OTHERS, is_image, named_as_image
from data_prep.source import Source
from moe_dit.data import tar
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemotePath

BEGINNING = 1 << 16  # bytes of a file that are looked at first ...
WHOLE = 1 << 24  # ... and the most of one that is looked at whole, to tell whether it is an image
_HELP = "expected class tars, a tar of them or of class folders, or WebDataset shards of images and .cls"
_NO_IMAGES = (".cls", ".json", ".txt", ".npy", ".tar")  # are not looked into


# Images with what tells their class, and what that is in words.
_Found = tuple[list[tuple[Any, Path | RemotePath, tar.Member]], str]


@dataclass
class _Listing:
    """What a tar file holds."""

    path: Path | RemotePath
    images: list[tar.Member] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # of .cls files, by their names without that
    companions: dict[str, str] = field(default_factory=dict)  # keys that other files have, with one of them
    inner: list[tar.Member] = field(default_factory=list)  # tar files
    left_out: Counter[str] = field(default_factory=Counter)


class Tars(Source):
    """Images inside tar files, uncompressed ones, which any process reads at their offsets."""

    def __init__(self, paths: Sequence[Path | RemotePath], names: Sequence[str] | None = None):
        self.paths = paths
        self.left_out = Counter()
        where = str(paths[0]) if len(paths) == 1 else f"the {len(paths)} tar files from {paths[0]} on"
        listings = [_listed(path) for path in paths]
        filled = [listing for listing in listings if listing.images or listing.inner]
        if not filled:
            raise InputError(f"{paths[0]} holds no images; {_HELP}")
        kinds = {_kind(listing): listing.path for listing in filled}
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise InputError(f"{first} holds {one}, {second} {other}; give them one by one")
        kind = next(iter(kinds))
        self._given = names is not None
        give: Callable[[list[_Listing]], _Found] = {_LABELLED: _by_cls, _INNER: _by_inner, _PLAIN: self._by_place}[kind]
        found, what = give(filled)
        if not found:
            raise InputError(f"{paths[0]} holds no images; {_HELP}")
        for listing in listings:
            self.left_out.update(listing.left_out)
        number = {str(path): i for i, path in enumerate(paths)}
        told = [kind for kind, *_ in found]
        places = [(number[str(path)], member.name) for _, path, member in found]
        order = self._number(told, what, where, names, places)
        self._names = [f"{found[i][1].name}/{found[i][2].name}" for i in order]
        self._places = np.array([(places[i][0], found[i][2].offset, found[i][2].size) for i in order], np.int64)

    def _by_place(self, listings: list[_Listing]) -> _Found:
        """The class of images that say nothing of it: the tar they are in, or their folder in it."""
        parts = [
            (listing, member, PurePosixPath(member.name).parts[:-1])
            for listing in listings
            for member in listing.images
        ]
        common = _common([folders for *_, folders in parts])
        stems = {listing.path.stem for listing in listings if listing.images}
        if all(len(folders) == common for *_, folders in parts) or (
            len(stems) > 1 and all(listing.path.stem in folders for listing, _, folders in parts)
        ):
            if not self._given:
                _check_classes(listings[0].path, sorted(stems))
            return [(listing.path.stem, listing.path, member) for listing, member, _ in parts], "a tar file"
        loose = [(listing, member) for listing, member, folders in parts if len(folders) == common]
        tops: dict[str, set[str]] = {}
        for listing, _, folders in parts:
            if len(folders) > common:
                tops.setdefault(listing.path.stem, set()).add(folders[common])
        # Parts of one set differ in their numbers alone.
        if len({_without_number(stem) for stem in stems}) > 1:
            one = min(tops)
            raise InputError(
                f"the images of {one}.tar lie in folders ({', '.join(sorted(tops[one])[:3])}), and those of "
                f"{max(stems)}.tar are of another tar file: a class may be either; unpack them, a folder a class"
            )
        if not self._given:
            check_splits(str(listings[0].path), set().union(*tops.values()))
        self.left_out["images beside the class folders of a tar file"] += len(loose)
        return [
            (folders[common], listing.path, member) for listing, member, folders in parts if len(folders) > common
        ], "a folder in the tar files" if len(listings) > 1 else "a folder in the tar file"

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


def _without_number(stem: str) -> str:
    return stem.rstrip("0123456789").rstrip("-_.")


def _is_part(stem: str) -> bool:
    """Whether a tar file is called as parts of a data set are: shard-000000, or img2dataset's 00000."""
    name = stem.rstrip("0123456789")
    if name in (stem, ""):
        return name == "" and len(stem) > 4 and stem[0] == "0"  # one of thousands of classes has four digits
    return name[-1] in "-_."


def _check_classes(path: Path | RemotePath, stems: list[str]) -> None:
    """Refuse tar files of images alone that are called as parts or splits of a data set are, not as classes."""
    as_parts = all(map(_is_part, stems)) and len({_without_number(stem) for stem in stems}) == 1
    if as_parts or (len(stems) == 1 and is_split(stems[0])):
        raise InputError(
            f"{path} holds images alone, and is called as a part of a data set is, so nothing says their classes; "
            f"{_HELP}; where each tar file is a class, give --classes FILE with their names"
        )


def _common(paths: Sequence[tuple[str, ...]]) -> int:
    """How many folders all paths have in common, from the first on."""
    first, last = min(paths), max(paths)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


_LABELLED, _INNER, _PLAIN = "images with .cls files", "tar files", "images alone"


def _kind(listing: _Listing) -> str:
    return _LABELLED if listing.labels else _INNER if listing.inner else _PLAIN


def _listed(path: Path | RemotePath) -> _Listing:
    """A tar file's content; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            found = _look(file, _Listing(path))
            if not found.labels and not found.inner:
                _check_unlabelled(found)
            return found
    except (OSError, ValueError, OverflowError, MemoryError) as error:  # sizes of a damaged header are any numbers
        raise InputError(f"{path} cannot be read as a tar file: {error}") from None


def _look(file: BinaryIO, found: _Listing) -> _Listing:
    for member in tar.members(file, found.left_out):
        if member.name.lower().endswith(".cls"):
            file.seek(member.offset)
            found.labels[member.name[: -len(".cls")]] = (
                file.read(min(member.size, 100)).decode("ascii", "replace").strip()
            )
        elif member.extension.endswith("tar"):
            found.inner.append(member)
        elif named_as_image(member.name) or _is_image(file, member):
            found.images.append(member)
        else:
            found.companions[member.key] = member.name
            if not member.name.lower().endswith(_NO_IMAGES):
                found.left_out[OTHERS] += 1
    return found


def _is_image(file: BinaryIO, member: tar.Member) -> bool:
    if member.name.lower().endswith(_NO_IMAGES):
        return False
    file.seek(member.offset)
    content = file.read(min(member.size, BEGINNING))
    if is_image(content):
        return True
    # What describes an image may stand at its end, as TIFF has it.
    return BEGINNING < member.size <= WHOLE and is_image(content + file.read(member.size - BEGINNING))


def _check_unlabelled(found: _Listing) -> None:
    """Refuse samples that have other files and no class: they are no class's own tar."""
    for member in found.images:
        other = found.companions.get(member.key)
        if other is not None:
            raise InputError(
                f"{found.path}: {member.name} has {other} beside it and no .cls, so nothing says its class; {_HELP}"
            )


def _by_cls(listings: list[_Listing]) -> _Found:
    """Images with the numbers in their .cls files."""
    found = []
    for listing in listings:
        seen: dict[str, str] = {}
        for member in listing.images:
            # Of names with several dots, the label may have all but the last part.
            stem = member.name.rpartition(".")[0]
            key = stem if stem in listing.labels else member.key
            text = listing.labels.get(key)
            if text is None:
                raise InputError(f"{listing.path}: {member.name} has no .cls with a class number; {_HELP}")
            if not (text.isascii() and text.isdecimal() and len(text) <= 9):
                raise InputError(f"{listing.path}: {key}.cls holds {text[:20]!r}, not a class number; {_HELP}")
            if key in seen:
                raise InputError(f"{listing.path}: {key}.cls is beside two images, {seen[key]} and {member.name}")
            seen[key] = member.name
            found.append((int(text), listing.path, member))
        listing.left_out["labels in tar files without an image"] += len(listing.labels.keys() - seen)
    return found, "a number in a .cls file"


def _by_inner(listings: list[_Listing]) -> _Found:
    """Images of tar files inside others, their offsets in the outer ones."""
    found = []
    for listing in listings:
        listing.left_out["images beside the tar files of a tar file"] += len(listing.images)
        for outer in sorted(listing.inner):
            name, inside = outer.name, _Listing(listing.path)
            try:
                with listing.path.open("rb") as file:
                    file.seek(outer.offset)
                    _look(file, inside)
            except (OSError, ValueError, OverflowError, MemoryError) as error:
                raise InputError(f"{listing.path}: {name} cannot be read as a tar file: {error}") from None
            if inside.labels or inside.inner:
                raise InputError(
                    f"{listing.path}: {name} is no class's own tar file; unpack {listing.path} and give its folder"
                )
            _check_unlabelled(inside)
            listing.left_out += inside.left_out
            stem, end = PurePosixPath(name).stem, outer.offset + outer.size
            found += [
                (stem, listing.path, member._replace(name=f"{name}/{member.name}"))
                for member in inside.images
                if member.offset + member.size <= end  # of one that lacks its end, what follows would be its own
            ]
    return found, "a tar file in the tar file"
