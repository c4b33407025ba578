"""The one way to write to disk: a file or folder appears under its name whole and durable, or not at all.

It is written under a temporary name beside its place, flushed to the disk (its folder too, which holds the name), and
renamed. A stop at any moment leaves the old one or the new one. Temporary names start with a dot and end in ``.tmp``;
:func:`remove_unfinished` clears what a kill left.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from moe_dit.runtime.errors import InputError


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        temporary.unlink(missing_ok=True)


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


@contextmanager
def new_folder(path: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A folder to fill, which gets the name ``path`` when the block ends well; ``path`` must not exist by then.

    Args:
        path: the folder's final name; its parents are made.
        check: called with the filled folder before it gets its name.

    Raises:
        OSError: it cannot be written.
    """
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish_folder(temporary, path, check)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Flush a filled folder to the disk, check it, and rename it to ``path``, which must not exist or be empty."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    if check is not None:
        check(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in the middle leaves no half of it under its name."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def remove_unfinished(folder: Path, pattern: str = "*") -> None:
    """Remove what a killed write left in ``folder``; ``pattern`` is of the final names."""
    for leftover in folder.glob(f".{pattern}.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an OSError of the block into an InputError: "cannot write WHAT: the reason"."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {what}: {error.strerror or error}", local=True) from error
