"""The one way to write to disk: a file or folder appears under its name whole and durable, or not at all.

It is written under a temporary name beside its place, flushed to the disk (its folder too, which holds the name), and
renamed. A stop at any moment leaves the old one or the new one. Temporary names start with a dot and end in ``.tmp``;
:func:`remove_unfinished` clears what a kill left.
"""

import errno
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from moe_dit.runtime.errors import InputError, Stop
from moe_dit.runtime.notes import reason, tell

PATIENCE = 90.0  # seconds until all nodes see what one wrote, at most: NFS's longest, by default, and half as much


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_until_seen(path: Path, size: int | None = None, seconds: float = PATIENCE) -> None:
    """Wait for what another node has made: a network file system may show it, or how long it is, only some time later.

    NFS and its like answer from what a node last knew of a folder, for up to 60 seconds.

    Args:
        path: a file or folder that is known to be there.
        size: of the file, in bytes; None where any will do.
        seconds: to wait at most.

    Raises:
        OSError: it was not seen in time.
    """
    end = time.monotonic() + seconds
    pause = 0.01
    while True:
        try:
            with suppress(FileNotFoundError), os.scandir(path.parent):
                pass  # opening a folder lets NFS ask the server for its names anew
            found = path.stat().st_size
            if size is None or found >= size:
                return
            what = f"has {found} bytes of {size}"
        except FileNotFoundError:
            what = "is not there"
        if time.monotonic() >= end:
            raise OSError(f"{path} was written by another rank, but after {seconds:.0f} s it {what} for this one")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written before it gets its name; each process has its own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces ``path`` when the block ends well.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # it has its name, or the error that says why it has not
            temporary.unlink()


def open_to_append(path: Path) -> int:
    """A descriptor that reads, and writes at a file's end; the file is made where there is none.

    A file that has other names too, as in a copy of its folder by hard links, becomes one of its own first: what is
    added here is not theirs.

    Raises:
        OSError: it cannot be opened, or made one of its own.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file")
    if found.st_nlink > 1:
        os.close(descriptor)
        with open(path, "rb") as old, new_file(path) as new:
            shutil.copyfileobj(old, new)
        descriptor = os.open(path, flags, 0o666)
    return descriptor


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file (see :func:`new_file`)."""
    with new_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, UTF-8 (see :func:`new_file`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a value as JSON (see :func:`new_file`); ``options`` are json.dumps'."""
    write_text(path, json.dumps(value, **{"indent": 1} | options) + "\n")


def write_yaml(path: Path, value: Any, comment: str = "") -> None:
    """Write a value as YAML in its own order, after a comment (see :func:`new_file`)."""
    write_text(path, comment + yaml.safe_dump(value, sort_keys=False))


def check_new_file(path: Path, ours: Callable[[Path], bool]) -> None:
    """Complain before the work, rather than after it, where its result cannot be written or would replace another's.

    Args:
        path: where the result is to go.
        ours: whether a file is an earlier result of the same kind, which may be replaced.

    Raises:
        InputError: there is something else at ``path``, or its folder is missing or cannot be written.
    """
    if os.path.islink(path):
        raise InputError(f"{path} is a symbolic link, and would be replaced; give the file itself as --out")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the name of a file as --out")
    if os.path.lexists(path):
        if not os.path.isfile(path):
            raise InputError(f"{path} is not a file; give another --out")
        if path.stat().st_size and not ours(path):
            raise InputError(f"{path} exists, and this command did not write it; move it away, or give another --out")
    if not os.path.isdir(path.parent):
        raise InputError(f"there is no folder {path.parent} for --out {path}; make it first")
    with explained(str(path)):
        temporary_name(path).touch()
        temporary_name(path).unlink()


@contextmanager
def new_folder(path: Path, ours: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to fill, which gets the name ``path`` when the block ends well.

    Args:
        path: the folder's final name; its parents are made.
        ours: patterns of the files that such a folder holds. One that is there is replaced if it holds nothing else.

    Raises:
        InputError: there is something at ``path`` that may not be replaced; said before the block begins.
        OSError: it cannot be written.
    """
    path = Path(os.path.abspath(path))  # "." and ".." are no names
    check_replaceable(path, ours)
    temporary = temporary_name(path)
    made = [parent for parent in path.parents if not parent.exists()]
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process of the same number left it
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_replaceable(path, ours)
        publish_folder(temporary, path)
        remove_unfinished(path.parent, f"{path.name}.old.*")  # what could not be removed the last time
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: in use
                parent.rmdir()


def check_replaceable(path: Path, ours: Sequence[str]) -> None:
    """Raise InputError where ``path`` is not a folder, or one with other things in it than files named in ``ours``."""
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link, and would be replaced; give the folder itself as --out")
    if not path.is_dir():
        raise InputError(f"{path} exists and is not a folder; give another --out")
    if path.is_mount() or path.samefile(Path.cwd()):
        raise InputError(f"{path} is in use as a folder, and cannot be replaced; give a new folder in it as --out")
    others = sorted(entry.name for entry in path.iterdir() if not _is_file_of(entry, ours))
    if others or not ours:
        what = f"holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}" if others else "exists already"
        raise InputError(f"{path} {what}, and would be replaced; move it away, or give another --out")


def _is_file_of(entry: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder's entry is a plain file of one of these names: a link of this name is somebody else's."""
    named = any(fnmatchcase(entry.name, pattern) for pattern in patterns)
    return named and entry.is_file() and not entry.is_symlink()


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a filled folder to the disk and rename it to ``path``; a folder that is there goes away whole."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    old = put_aside(path) if os.path.lexists(path) else None
    try:
        os.replace(temporary, path)
    except OSError as error:
        if old is None:
            raise
        try:
            os.replace(old, path)
        except OSError:
            what = f"{error.strerror}; what was at {path} is now {old}"
            raise OSError(error.errno, what) from error
        raise
    sync(path.parent)
    if old is not None:
        discard(old)


def remove_folder(path: Path) -> None:
    """Remove what is superfluous, so that a kill in the middle leaves no half of it under its name.

    Of a link only the link goes. Where something cannot be removed one line says so, and nothing else follows.
    """
    try:
        aside = put_aside(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _say_left(path, error)
    else:
        discard(aside)


def discard(path: Path) -> None:
    """Remove a file, or a folder with all that it holds; what cannot be removed is told of, and stays.

    It may be in use: NFS keeps what a reader has open under a name of its own, and so the folder that holds it.
    :func:`remove_unfinished` tries what has a temporary name again.
    """
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _say_left(path, error)


def _say_left(path: Path, error: OSError) -> None:
    tell(path.parent, error, f"cannot remove {path}: {reason(error)}; it stays for now, and will be tried again")


def put_aside(path: Path) -> Path:
    """Rename what is to go; gives its new place. OSError where it stays."""
    aside = path.with_name(f".{path.name}.old.{uuid.uuid4().hex[:8]}.tmp")
    os.replace(path, aside)
    return aside


def remove_unfinished(folder: Path, pattern: str = "*") -> None:
    """Remove what a killed write or :func:`discard` left in ``folder``; ``pattern`` is of the final names."""
    for leftover in folder.glob(f".{pattern}.tmp"):
        discard(leftover)


@contextmanager
def explained(what: Path | str, kind: type[Stop] = InputError) -> Iterator[None]:
    """Turn an OSError of the block into a Stop of this kind: "cannot write WHAT: the reason"."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {what}: {error.strerror or error}") from error
