"""Random access to the samples of a folder of shards, each checked against the index as it is read."""

import io
import math
import os
import resource
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch.utils.data import get_worker_info

from moe_dit.data import stored_png
from moe_dit.data.index import IMAGE, ensure_index
from moe_dit.data.pixels import UnfitImage, read_picture, reason
from moe_dit.manifest import Manifest
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import open_file

RETRIES = (0.1, 1.0, 5.0)  # seconds between tries of a read that failed
MOST_OPEN = 4096  # shards open in a process, and at most a quarter of the files that the system lets it open
_READ_AHEAD = 8 << 20  # bytes read at once, ahead of use
_CHECKED = 1.0  # seconds between two looks whether an open shard was deleted


class ShardReader:
    """Random access to the samples of a folder of shards, by index in [0, samples).

    Args:
        manifest: of the shards. Where they have no index, it is made (:func:`moe_dit.data.index.ensure_index`).
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.index = ensure_index(manifest)
        self._ends = np.cumsum([shard["samples"] for shard in manifest.shards])
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._ahead = ReadAhead(self._local)
        self._header = _npy_header(tuple(manifest.sample_shape))
        self._header_crc = zlib.crc32(self._header)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:  # open files, threads and maps stay with their process
        return {"manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["manifest"])  # type: ignore[misc]

    def close(self) -> None:
        """Close files and end reading ahead."""
        self._ahead.close()
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    def __del__(self):
        with suppress(AttributeError):  # of one that was never whole
            self.close()

    def members(self, index: int) -> "Members":
        """The files of sample ``index``."""
        return Members(self, self._shard(index), self.index[index])

    def ahead(self, shards: list[int]) -> None:
        """Begin to read whole shards, in order, into the system's cache; what an earlier call wanted is dropped."""
        self._ahead.want(shards)

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples as stored, or their mirror images.

        Args:
            indices: int64 [N].
            flips: bool [N], whose mirror image is wanted.

        Returns:
            x [N, *sample_shape], latents as they are stored (float16), or uint8 pixels with channels last in memory;
            y int64 [N].

        Raises:
            InputError: a shard cannot be read, or a sample is not what the index says.
        """
        x = self._latents(indices, flips) if self.manifest.kind == "latents" else self._pixels(indices, flips)
        if x is None:
            samples = [self._sample(index, flip) for index, flip in zip(indices.tolist(), flips, strict=True)]
            x = torch.from_numpy(np.stack(samples))
        return x, torch.from_numpy(self.index["label"][indices].astype(np.int64))

    def _pixels(self, indices: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        channels, height, width = self.manifest.sample_shape
        x = _room((len(indices), height, width, channels), np.dtype(np.uint8))
        rows = x.numpy()
        for i, index in enumerate(indices.tolist()):
            rows[i] = self._sample(index, flips[i])
        return x.permute(0, 3, 1, 2)

    def _latents(self, indices: np.ndarray, flips: np.ndarray) -> torch.Tensor | None:
        """Latents read straight into a batch; None where one is not as encoding writes them, or cannot be read."""
        records = self.index[indices]
        straight, mirrored = records["latent.npy"], records["latent_flip.npy"]
        offsets, sizes, crcs = (np.where(flips, mirrored[key], straight[key]).tolist() for key in straight.dtype.names)
        labels, cls = records["label"].tolist(), records["cls"]
        label_offsets, label_sizes = cls["offset"].tolist(), cls["size"].tolist()
        shards = self._shard(indices).tolist()
        x = _room((len(indices), *self.manifest.sample_shape), np.dtype(np.float16))
        rows: Any = x.numpy().reshape(len(x), -1).view(np.uint8)  # a row's memory is written in place
        header = bytearray(len(self._header))
        whole = len(header) + x[0].nbytes
        classes = len(self.manifest.classes)
        try:
            for i, shard in enumerate(shards):
                file = self._file(shard)
                if (
                    sizes[i] != whole
                    or os.preadv(file, [header, rows[i]], offsets[i]) != whole
                    or header != self._header
                    or zlib.crc32(rows[i], self._header_crc) != crcs[i]
                    or not 0 <= labels[i] < classes
                    or os.pread(file, label_sizes[i], label_offsets[i]).strip() != b"%d" % labels[i]
                ):
                    return None
        except OSError:  # read again, with patience
            return None
        return x

    def _sample(self, index: int, flip: bool) -> np.ndarray:
        """One sample, latents [C, H, W] or an image [H, W, C], with all that can be said against it."""
        members = self.members(index)
        if self.manifest.kind == "latents":
            array = members.array("latent_flip.npy" if flip else "latent.npy")
        else:
            array = members.image()
            array = array[:, ::-1] if flip else array
        shape = list(array.shape) if self.manifest.kind == "latents" else [array.shape[2], *array.shape[:2]]
        if shape != self.manifest.sample_shape:
            raise InputError(
                f"shard {members.path}: a sample has shape {shape}, its manifest says {self.manifest.sample_shape}"
            )
        members.label()
        return array

    # --- files --------------------------------------------------------------------------------------------------------

    def _shard(self, indices: Any) -> Any:
        return np.searchsorted(self._ends, indices, side="right")

    def path(self, shard: int) -> Path:
        """Where shard number ``shard`` lies, or is kept."""
        return self.manifest.folder / self.manifest.shards[shard]["name"]

    def _local(self, shard: int) -> Path:
        return self.manifest.local(self.manifest.shards[shard])

    def _file(self, shard: int) -> int:
        """The descriptor of an open shard."""
        file = self._files.get(shard)
        now = time.monotonic()
        if file is None:
            if len(self._files) >= _most_open():
                os.close(self._files.popitem(last=False)[1].descriptor)
            try:
                with open_file(self._local(shard)) as opened:
                    file = _OpenFile(os.dup(opened.fileno()), now)
            except FileNotFoundError:
                if self.manifest.remote is not None:  # put out of the cache this moment
                    return self._file(shard)
                raise InputError(f"shard {self.path(shard)} is gone; was it deleted while it was read?") from None
            self._files[shard] = file
        elif now - file.checked > _CHECKED and self.manifest.remote is None:
            if not os.fstat(file.descriptor).st_nlink:
                raise InputError(f"shard {self.path(shard)} was deleted or replaced while it was read")
            file.checked = now
        self._files.move_to_end(shard)
        return file.descriptor

    def bytes_at(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; a read that fails is tried again."""
        for wait in (*RETRIES, None):
            try:
                data = os.pread(self._file(shard), size, offset)
                break
            except OSError as error:
                if wait is None:
                    raise InputError(f"shard {self.path(shard)} cannot be read: {error.strerror or error}") from None
                if shard in self._files:  # a file handle of a server may have gone stale
                    os.close(self._files.pop(shard).descriptor)
                time.sleep(wait)
        if len(data) != size:
            raise InputError(f"shard {self.path(shard)} ends inside a sample")
        return data


def _room(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
    """A tensor to fill; in a loader's worker in shared memory, so that it is not copied again to be sent."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    if get_worker_info() is None:
        return torch.empty(shape, dtype=kind)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's default_collate does
    return torch.empty(0, dtype=kind).set_(storage, 0, shape)  # type: ignore[call-overload]


@dataclass
class _OpenFile:
    descriptor: int
    checked: float  # when it was seen to be in its folder


@cache
def _most_open() -> int:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(16, min(MOST_OPEN, most // 4))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the values in a .npy file of float16 that numpy writes."""
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()


@dataclass(frozen=True)
class Members:
    """The files of one sample inside a shard."""

    reader: ShardReader
    shard: int
    record: np.void  # of the index

    @property
    def path(self) -> Path:
        """The shard."""
        return self.reader.path(self.shard)

    def place(self, member: str) -> tuple[int, int]:
        """Offset and size of one file in the shard."""
        found = self.record[member] if member in (self.record.dtype.names or ()) else None
        if found is None or not found["size"]:
            raise InputError(f"shard {self.path}: a sample has no .{member}")
        return int(found["offset"]), int(found["size"])

    def read(self, member: str) -> bytes:
        """The bytes of one file, checked."""
        data = self.reader.bytes_at(self.shard, *self.place(member))
        if zlib.crc32(data) != self.record[member]["crc"]:
            raise InputError(
                f"shard {self.path}: a sample's .{member} is damaged, it is not what was indexed; "
                f"python -m data_prep.verify {self.reader.manifest.folder} checks all"
            )
        return data

    def label(self) -> int:
        """The class index."""
        classes = len(self.reader.manifest.classes)
        text = self.read("cls").strip()
        if not text.isdigit() or len(text) > 18 or int(text) >= classes:
            raise InputError(f"shard {self.path}: a label is {text[:20]!r}, not below {classes}")
        if int(text) != self.record["label"]:
            raise InputError(f"shard {self.path}: a label is {text[:20]!r}, the index says {self.record['label']}")
        return int(text)

    def array(self, member: str) -> np.ndarray:
        """The values of a .npy file."""
        return self._decoded(member, np.load)

    def image(self) -> np.ndarray:
        """The image, uint8 [H, W, 3]."""
        return self._decoded(IMAGE, _pixels)

    def _decoded(self, member: str, decode: Callable[[BinaryIO], np.ndarray]) -> np.ndarray:
        data = self.read(member)
        try:
            return decode(io.BytesIO(data))
        except UnfitImage as error:
            raise InputError(f"shard {self.path}: an image is not read: {error}") from None
        except Exception as error:  # decoders raise whatever they meet
            raise InputError(f"shard {self.path}: .{member} is damaged: {reason(error)}") from None


def _pixels(file: BinaryIO) -> np.ndarray:
    stored = stored_png.decode(file.read())
    return np.asarray(read_picture(file)) if stored is None else stored


class ReadAhead:
    """A thread that reads shards from end to end before they are used, so that a disk reads them in one run."""

    def __init__(self, paths: Callable[[int], Path]):
        self._path = paths
        self._wanted: list[int] = []
        self._done: OrderedDict[int, None] = OrderedDict()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def want(self, shards: list[int]) -> None:
        """Read these next, in order; those that were read lately are left out."""
        with self._changed:
            self._wanted = [shard for shard in shards if shard not in self._done]
            for shard in self._wanted:
                self._done[shard] = None
            while len(self._done) > 4 * len(shards):
                self._done.popitem(last=False)
            self._changed.notify()
        if self._wanted and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        buffer = bytearray(_READ_AHEAD)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard = self._wanted.pop(0)
            # What cannot be read is said by whoever needs it.
            with suppress(OSError, InputError), open_file(self._path(shard)) as file:
                while file.readinto(buffer) and not self._closed:
                    pass
