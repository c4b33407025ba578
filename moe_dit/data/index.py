"""The index of a folder of shards: each sample's label, and where its files lie in a tar, with a checksum of each.

One file beside the shards, ``index-<digest of the manifest's list of shards>.npy``: a plain numpy array with a record a
sample, in the shards' order. It is mapped into memory, so all processes of a node share one copy and opening it takes
no time. Encoding writes it; for shards that lack one it is made once (:func:`ensure_index`). A record of latents takes
52 bytes, one of pixels 36: 67 MB and 46 MB for ImageNet.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from torch.utils.data import Dataset

from moe_dit.data import tar
from moe_dit.manifest import Manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import new_file, write_bytes
from moe_dit.runtime.loading import read
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.reading import open_file
from moe_dit.store import cache

IMAGE = "image"  # stands for the extension of a sample's image, whatever that is
IMAGE_EXTENSIONS = (
    *("jpeg", "jpg", "jpe", "jfif", "png", "apng", "webp", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "avif"),
)
MEMBERS = {"latents": ("cls", "latent.npy", "latent_flip.npy"), "pixels": ("cls", IMAGE)}
_PLACE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])


def record_type(kind: str) -> np.dtype:
    """A sample's record: ``label``, and offset [bytes], size [bytes] and CRC-32 by member; size 0: it is not there."""
    return np.dtype([("label", "<i4"), *((member, _PLACE) for member in MEMBERS[kind])])


def index_name(shards: Iterable[dict[str, Any]]) -> str:
    """The file's name, which a changed list of shards changes."""
    listed = [[shard["name"], shard["samples"], shard["bytes"], shard["sha256"]] for shard in shards]
    return f"index-{hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]}.npy"


def scan_shard(path: Path, kind: str, samples: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Read a whole tar file: its samples' records [samples] and their keys, in order.

    Args:
        path: the shard.
        kind: "latents" or "pixels".
        samples: how many there should be; None: any number.

    Raises:
        InputError: it cannot be read, holds another number of samples, or a label is not a number.
    """
    members = MEMBERS[kind]
    rows: dict[str, list[Any]] = {}
    try:
        with open_file(path) as file:
            for member in tar.members(file):
                is_image = kind == "pixels" and member.extension in IMAGE_EXTENSIONS
                extension = IMAGE if is_image else member.extension
                if extension not in members:
                    continue
                file.seek(member.offset)
                content = file.read(member.size)
                if len(content) != member.size:
                    raise ValueError("it ends inside a sample")
                row = rows.setdefault(member.key, [-1, *[(0, 0, 0)] * len(members)])
                place = 1 + members.index(extension)
                if row[place] != (0, 0, 0):
                    raise ValueError(f"the sample {member.key} has two files .{extension}, one of them {member.name}")
                row[place] = member.offset, member.size, zlib.crc32(content)
                if extension == "cls":
                    row[0] = _label(path, content)
    except (OSError, ValueError, OverflowError, MemoryError) as error:  # sizes of a damaged header are any numbers
        raise InputError(f"shard {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if samples is not None and len(rows) != samples:
        raise InputError(f"shard {path} holds {len(rows)} samples, its manifest says {samples}")
    return np.array([tuple(row) for row in rows.values()], record_type(kind)), list(rows)


def incomplete(records: np.ndarray, keys: list[str], kind: str) -> str | None:
    """What a shard's samples lack, as :func:`scan_shard` found them; None where they are whole.

    Latents of other programs may all be without their mirrors.
    """
    for member in MEMBERS[kind]:
        lacking = records[member]["size"] == 0
        if lacking.any() and not (member == "latent_flip.npy" and lacking.all()):
            what = "image" if member == IMAGE else f".{member}"
            return f"a sample has no {what}: {keys[int(lacking.argmax())]}"
    return None


def _label(path: Path, content: bytes) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > 9:
        raise InputError(f"shard {path}: a label is {text[:20]!r}, not a class number")
    return int(text)


def write_index(folder: Path, manifest: Manifest, parts: Iterable[np.ndarray]) -> Path:
    """Write the index of a manifest's shards into a folder, from each shard's records; OSError where it cannot be."""
    path = folder / index_name(manifest.shards)
    with new_file(path) as file:
        dtype = record_type(manifest.kind)
        header = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": (manifest.samples,)}
        npy_format.write_array_header_2_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())
    return path


def open_index(manifest: Manifest) -> np.memmap | None:
    """Map the index of a manifest's shards; None where there is none.

    Raises:
        InputError: there is one, but it is damaged.
    """
    name = index_name(manifest.shards)
    dtype = record_type(manifest.kind)
    if manifest.remote is not None and not os.path.isfile(manifest.folder / name):
        with suppress(FileNotFoundError):
            write_bytes(manifest.folder / name, manifest.remote.read(name))
    for path in (manifest.folder / name, cache() / "indexes" / name):
        if not os.path.isfile(path):
            continue
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
            problem = None if index.dtype == dtype and index.shape == (manifest.samples,) else "it is of other samples"
        except Exception as error:  # numpy raises whatever a damaged header leads it to
            problem = str(error).splitlines()[0]
        if problem:
            raise InputError(
                f"the index {path} is damaged ({problem}); delete it, and it is made again "
                f"(python -m data_prep.index {manifest.folder})"
            )
        return index
    return None


def ensure_index(manifest: Manifest, workers: int | None = None) -> np.memmap:
    """The index of a manifest's shards, made where there is none; kept in their folder if that can be written.

    Raises:
        InputError: a shard or the index is damaged, or there is nowhere to keep an index.
    """
    found = open_index(manifest)
    if found is None:
        _keep(manifest, scan_shards(manifest, workers))
        found = open_index(manifest)
        assert found is not None
    return found


def _keep(manifest: Manifest, parts: list[np.ndarray]) -> None:
    failed = ""
    for folder in (manifest.folder, cache() / "indexes"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_index(folder, manifest, parts)
            return
        except OSError as error:
            failed += f"; {folder}: {error.strerror}"
    raise InputError(f"the index of {manifest.folder} cannot be kept anywhere{failed}")


def scan_shards(manifest: Manifest, workers: int | None = None) -> list[np.ndarray]:
    """Each shard's records, read by several processes where there are many shards."""
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)))
    count = len(manifest.shards)
    if count < 16 or workers < 2:
        workers = 0
    else:
        say(f"{manifest.folder} has no index; making one, once")
    each = [[number] for number in range(count)]
    found: list[np.ndarray] = []
    parts = read(_Shards(manifest), workers, "cores, by taskset", batch_sampler=each)
    with closing(parts), task("indexing shards", count) as progress:
        for part in parts:
            found += part
            progress.advance()
    return found


class _Shards(Dataset):
    """The records of each shard."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def __getitem__(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        return scan_shard(self.manifest.local(shard), self.manifest.kind, shard["samples"])[0]
