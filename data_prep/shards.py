"""Writing a folder of WebDataset shards with its manifest, by any number of ranks, continuing after any stop.

What is in a shard depends on the images and the shard size alone, never on how many ranks shared the work or on how
often it was stopped: images are put in one fixed shuffled order, shard k holds the k-th run of ``shard_size`` of them
and belongs to rank k % size, and batches do not cross shards. An image that cannot be read is left out of its shard and
listed in errors.jsonl. A shard appears under its name only when complete; the manifest appears last, so its presence
means that the folder is complete.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import torch
import webdataset

from data_prep.classes import read_names
from data_prep.source import BrokenImage, Source
from data_prep.sources import open_source
from moe_dit.data import pixels
from moe_dit.data.index import MEMBERS as INDEXED
from moe_dit.data.index import scan_shard, write_index
from moe_dit.manifest import FORMAT, MANIFEST, Manifest
from moe_dit.runtime import loading, ranks
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import discard, explained, new_file, remove_unfinished, write_json, write_text
from moe_dit.runtime.lock import lock_folder
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.ranks import from_rank_0, world
from moe_dit.runtime.reading import open_file, read_json

ENOUGH = 1000  # images of which no tenth may be broken
SETTINGS = ".settings.json"
ERRORS = "errors.jsonl"
LARGEST = 8192  # pixels along a side
MOST_WORKERS = 512

# How a person calls what is in the settings file.
_SETTING_NAMES = {
    "kind": "the command (latents or pixels)",
    "size": "--size",
    "shard_size": "--shard-size",
    "images": "--images (other files in it, or other labels)",
    "classes": "--classes",
    "vae": "--vae (other weights)",
    "precision": "--precision",
    "keep": "--keep",
    "png_level": "--png-level",
}
_BEFORE = {"precision": "fp32", "keep": "moments", "png_level": 6}  # what folders of before these flags were made with


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or len(text) > 18 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text[:30]}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that encode_latents and pack_pixels share."""
    add = parser.add_argument
    add(
        "--images",
        required=True,
        metavar="PATH_or_URL",
        help="a folder of class folders; ImageNet's tar of class tars; parquet or arrow files; shards of raw images",
    )
    add("--out", required=True, type=Path, metavar="SHARDS", help="folder to write")
    add("--classes", type=Path, metavar="FILE", help="the classes' names in the order of their labels, one a line")
    add("--split", metavar="NAME", help="of a folder whose files' names tell of several: train, validation or test")
    add("--size", type=positive, default=256, help="side of the centre crop in pixels (256)")
    add("--shard-size", type=positive, default=1024, help="samples a shard (1024)")
    add("--workers", type=int, help="processes that read images, a rank (chosen by data and cores)")
    add("--strict", action="store_true", help=f"stop at the first image that cannot be read, instead of {ERRORS}")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that no machine could take, and places that are no folders (InputError)."""
    if "://" in str(args.out) or ":/" in str(args.out):
        raise InputError(f"--out {args.out}: shards are written to a folder of this machine; copy them from there")
    if args.size > LARGEST:
        raise InputError(f"--size {args.size}: it should be at most {LARGEST}")
    if args.workers is not None and not 0 <= args.workers <= MOST_WORKERS:
        raise InputError(f"--workers {args.workers}: it should be 0 to {MOST_WORKERS}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading and checking


def sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def join() -> None:
    """Join the ranks; those that finish early will wait for the slowest."""
    ranks.start(timeout=timedelta(days=2))


def write_shards(
    args: argparse.Namespace,
    read: Callable[[str | bytes], Any],
    encode: Callable[[Any], Any],
    members: Callable[[Any], dict[str, bytes]],
    *,
    kind: str,
    sample_shape: list[int],
    batch: int,
    settings: dict[str, Any] | None = None,
    vae: str | None = None,
    vae_sha256: str | None = None,
    scale: float | None = None,
    shift: float | None = None,
    posterior: bool | None = None,
) -> None:
    """Write every image of ``args.images`` to shards in ``args.out``; each rank calls it.

    Args:
        args: what :func:`add_arguments` reads.
        read: from a file's path or bytes to a tensor or bytes; runs in the reading processes.
        encode: from a batch of what ``read`` gives (tensors stacked, bytes listed) to what is kept of each, or a
            :class:`Broken` for one that cannot be.
        members: from that, of one, to a sample's members but ``cls``, as extension -> content; runs beside ``encode``.
        kind, sample_shape, vae, vae_sha256, scale, shift, posterior: for the manifest.
        batch: images handed to ``encode`` at once.
        settings: what else decides the samples; other ones may not continue the folder.

    Raises:
        InputError: the images cannot be listed, too many cannot be read (or one, with ``args.strict``), or the folder
            is in use, holds something else or was begun with other settings.
    """
    join()
    source = from_rank_0(lambda: open_source(args.images, read_names(args.classes), args.split))
    settings = {
        "kind": kind,
        "size": args.size,
        "shard_size": args.shard_size,
        "images": source.fingerprint(),
        "vae": None,
        "classes": None if args.classes is None else source.classes,
    } | (settings or {})
    left_out = {what: count for what, count in sorted(source.left_out.items()) if count}
    with ExitStack() as held:
        from_rank_0(lambda: held.enter_context(lock_folder(args.out, "another command")) and None)
        if from_rank_0(lambda: _prepare(args.out, settings)):
            say(f"{args.out} is complete already; nothing to do")
            return
        told = [f"{args.images}: {len(source)} images of {len(source.classes)} classes; {source.told}"]
        told += [f"{args.images}: {count} {what} are left out" for what, count in left_out.items()]
        mine = _write_my_shards(args, kind, source, read, encode, members, batch, told)
        gathered: list[Any] = [mine]
        if world().size > 1:
            gathered = [None] * world().size
            torch.distributed.all_gather_object(gathered, mine)
        done = sorted((shard for part in gathered for shard in part), key=lambda shard: shard.name)
        shards = [shard for shard in done if shard.record is not None]
        if not shards:
            raise InputError(f"--images {args.images}: none of its images can be used: {done[0].broken[0][1]}")
        broken = sorted((i, reason) for shard in done for i, reason in shard.broken)
        samples = sum(len(shard.index) for shard in shards)
        values = {
            "kind": kind,
            "samples": samples,
            "classes": source.classes,
            "sample_shape": sample_shape,
            "scale": scale,
            "shards": [shard.record for shard in shards],
        }
        more = {"size": args.size, "source": args.images, "vae": vae, "vae_sha256": vae_sha256}
        more |= {"shift": shift, "posterior": posterior, "left_out": left_out}

        def finish() -> None:
            with explained(str(args.out)):
                lines = (json.dumps({"image": source.name(i), "reason": reason}) + "\n" for i, reason in broken)
                write_text(args.out / ERRORS, "".join(lines))
                write_index(args.out, Manifest(args.out, **values), [shard.index for shard in shards])
            manifest = {"format": FORMAT, "size": args.size} | values | more | {"errors": len(broken)}
            _write_json(args.out / MANIFEST, manifest)
            for leftover in args.out.glob(".*.broken.json"):
                discard(leftover)

        from_rank_0(finish)
    say(f"{args.out}: {len(shards)} shards, {samples} samples, {len(source.classes)} classes")
    if broken:
        say(f"{len(broken)} images could not be used; {args.out / ERRORS} lists them")


def _prepare(folder: Path, settings: dict[str, Any]) -> bool:
    """Make the folder ready to be begun or continued; True where it is complete already."""
    path = folder / SETTINGS
    if os.path.exists(path):
        try:
            found = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {error}; give another --out") from error
        differing = [
            _SETTING_NAMES[key] for key, value in settings.items() if found.get(key, _BEFORE.get(key)) != value
        ]
        if differing:
            raise InputError(
                f"{folder} was begun with other settings: {', '.join(differing)}; give the same again, or another --out"
            )
    else:
        if any(folder.glob("*.tar")) or os.path.exists(folder / MANIFEST):
            raise InputError(f"{folder} holds shards that this command did not begin; give another --out")
        _write_json(path, settings)
    for name in ("shard-*", f"{MANIFEST}*", f"{SETTINGS}*"):  # other hidden files are not ours
        remove_unfinished(folder, name)
    return os.path.exists(folder / MANIFEST)


def begun_with(folder: Path, key: str, new: Any) -> Any:
    """A setting that was left to the command: the folder's if it was begun already, else ``new``."""
    try:
        return read_json(folder / SETTINGS).get(key, _BEFORE[key])
    except (OSError, ValueError, AttributeError):  # what is wrong is said when it is opened to write
        return new


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with explained(str(path)):
        write_json(path, value)


@dataclass
class _Shard:
    """One shard's outcome; without a record where no image of it could be read."""

    name: str
    record: dict[str, Any] | None  # for the manifest
    index: Any  # its samples' records for the index
    broken: list[list[Any]]  # images that could not be read: number and reason


@dataclass(frozen=True)
class Broken:
    """What stands for an image that cannot be kept."""

    reason: str


class _Images(torch.utils.data.Dataset):
    """A source's images as ``read`` gives them; those that cannot be read as the reason."""

    def __init__(self, source: Source, read: Callable[[str | bytes], Any], strict: bool):
        self.source = source
        self.read = read
        self.strict = strict

    def __getitem__(self, index: int) -> Any:
        try:
            file = self.source.read(index)
        except BrokenImage as error:
            return self._broken(index, str(error))
        try:
            return self.read(file)
        except InputError as error:
            return self._broken(index, pixels.reason(error.__cause__ or error))

    def _broken(self, index: int, reason: str) -> Broken:
        if self.strict:
            raise InputError(f"cannot read the image {self.source.name(index)}: {reason}")
        return Broken(reason)


def _add_reasons(reasons: list[str | None], kept: list[Any]) -> None:
    """Put the reasons of images that could be read and not be kept among those that could not be read."""
    made = iter(kept)
    for place, reason in enumerate(reasons):
        if reason is None and isinstance(one := next(made), Broken):
            reasons[place] = one.reason


def _collate(samples: list[Any]) -> Any:
    """What could be read, stacked where it is tensors, and each sample's reason or None."""
    whole = [sample for sample in samples if not isinstance(sample, Broken)]
    reasons = [sample.reason if isinstance(sample, Broken) else None for sample in samples]
    return (torch.stack(whole) if whole and isinstance(whole[0], torch.Tensor) else whole), reasons


def _write_my_shards(args, kind, source, read, encode, members, batch, told) -> list[_Shard]:
    """Write this rank's missing shards, and say ``told`` where that begins; gives all of this rank's."""
    order = source.order().tolist()
    mine = {
        f"shard-{k:06d}.tar": order[k * args.shard_size : (k + 1) * args.shard_size]
        for k in world().share(-(-len(order) // args.shard_size))
    }
    found = {name: _finished(args.out / name, kind, indices) for name, indices in mine.items()}
    todo = {name: indices for name, indices in mine.items() if found[name] is None}
    batches = [indices[i : i + batch] for indices in todo.values() for i in range(0, len(indices), batch)]
    workers = _workers(len(source)) if args.workers is None else args.workers
    # One iterator for all shards, so that reading goes on while a shard is closed.
    loaded = loading.read(
        _Images(source, read, args.strict),
        workers,
        "--workers",
        _collate,
        pin=torch.cuda.is_available() and kind == "latents",
        forked=True,
        batch_sampler=batches,
    )
    total = sum(map(len, mine.values()))
    where = f" (rank 0 of {world().size})" if world().size > 1 else ""
    clock = _Clock()
    seen = broken = 0
    with (
        closing(loaded),
        task(f"writing samples{where}", total, done=total - sum(map(len, todo.values()))) as progress,
        _Beside() as side,
    ):
        for name, indices in todo.items():
            side.begin(partial(_write_shard, args.out / name, kind, source.labels, members, indices))
            for i in range(0, len(indices), batch):
                numbers = indices[i : i + batch]
                with clock:
                    whole, reasons = next(loaded)
                kept = list(encode(whole)) if len(whole) else []
                _add_reasons(reasons, kept)
                kept = [one for one in kept if not isinstance(one, Broken)]
                seen += len(reasons)
                broken += len(reasons) - len(kept)
                if len(kept) < len(reasons):
                    number, last = next((n, why) for n, why in zip(numbers, reasons, strict=True) if why)
                    if args.strict:
                        raise InputError(f"cannot use the image {source.name(number)}: {last}")
                    if seen >= ENOUGH and 10 * broken > seen:
                        raise InputError(f"--images {args.images}: {broken} of {seen} cannot be used, the last: {last}")
                    if broken == len(source):
                        raise InputError(f"--images {args.images}: none of its images can be used: {last}")
                while told:  # what cannot begin is one line of its own
                    say(told.pop(0))
                side.give((numbers, reasons, kept))
                progress.advance(len(reasons))
            side.end()
        written = side.results()
    found |= {shard.name: shard for shard in written}
    if kind == "latents":
        clock.advise(workers)
    return [shard for shard in found.values() if shard is not None]


class _Clock:
    """How much of the time was waited in its blocks."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.waited = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.waited += time.monotonic() - self._since

    def advise(self, workers: int) -> None:
        """Say how many workers would do, where the autoencoder waited for images."""
        spent = time.monotonic() - self.begin
        if spent > 60 and self.waited > 0.2 * spent:
            enough = math.ceil(max(1, workers) * spent / (spent - self.waited)) + 1
            say(f"the autoencoder waited for images {self.waited / spent:.0%} of the time; try --workers {enough}")


class _Stopped(Exception):
    """The main thread goes no further."""


class _Beside:
    """A thread that writes shards beside the autoencoder, two batches behind it at most."""

    def __enter__(self) -> "_Beside":
        self._pool = ThreadPoolExecutor(1)
        self._queue: Queue = Queue(2)
        self._jobs: list[Future] = []
        return self

    def begin(self, work: Callable[[Iterator[Any]], _Shard]) -> None:
        """A shard's writing begins, with what :meth:`give` will give."""
        self._queue = Queue(2)
        self._jobs.append(self._pool.submit(work, iter(self._queue.get, None)))

    def give(self, item: Any) -> None:
        """Hand over; raises what writing this or an earlier shard raised."""
        while True:
            for job in self._jobs:
                if job.done():
                    job.result()
            try:
                return self._queue.put(item, timeout=1)
            except Full:
                continue

    def end(self) -> None:
        """The shard has got everything."""
        self.give(None)

    def results(self) -> list[_Shard]:
        """All shards, when they are written."""
        return [job.result() for job in self._jobs]

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:  # the thread may be waiting for more
            with suppress(Empty):
                while True:
                    self._queue.get_nowait()
            self._queue.put(_Stopped())
        self._pool.shutdown()


def _write_shard(path, kind, labels, members, indices, batches: Iterator[Any]) -> _Shard:
    """Write one shard of batches of numbers, reasons (None: it could be read) and what is kept of those read."""
    broken: list[list[Any]] = []
    with explained(str(path)), suppress(_Nothing), new_file(path) as file:
        with _tar(file) as tar:
            for item in batches:
                if isinstance(item, _Stopped):
                    raise item
                numbers, reasons, kept = item
                left = iter(kept)
                for index, reason in zip(numbers, reasons, strict=True):
                    if reason is not None:
                        broken.append([index, reason])
                        continue
                    tar.write({"__key__": _key(index), "cls": str(labels[index]).encode(), **members(next(left))})
        if broken:  # before the shard appears: a kill in between must not lose them
            write_json(_broken_file(path), broken)
        if len(broken) == len(indices):
            raise _Nothing
    shard = _finished(path, kind, indices)
    if shard is None:
        raise InputError(f"{path} does not read back as it was written; is the disk sound?")
    return shard


class _Nothing(Exception):
    """A shard without samples, which does not appear."""


def _broken_file(path: Path) -> Path:
    """Where a shard's broken images are kept until all shards are written."""
    return path.with_name(f".{path.name}.broken.json")


def _finished(path: Path, kind: str, indices: Iterable[int]) -> _Shard | None:
    """A shard that is there whole; None where it is not."""
    broken: list[list[Any]] = []
    aside = _broken_file(path)
    try:
        if os.path.exists(aside):
            broken = [[int(index), str(reason)] for index, reason in read_json(aside)]
    except (OSError, ValueError, TypeError):
        return None
    left = {index for index, _ in broken}
    keys = [_key(index) for index in indices if index not in left]
    if not keys:
        return _Shard(path.name, None, None, broken)
    try:
        index, found = scan_shard(path, kind)
    except InputError:
        return None
    if found != keys or not all(index[member]["size"].all() for member in INDEXED[kind]):
        return None
    record = {"name": path.name, "samples": len(keys), "bytes": path.stat().st_size, "sha256": sha256(path)}
    return _Shard(path.name, record, index, broken)


def _tar(file: Any) -> webdataset.TarWriter:
    # Nothing that differs from run to run goes in, so that equal samples are equal bytes.
    return webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)


def _key(index: int) -> str:
    """A sample's key: its place in the sorted list of images."""
    return f"{index:08d}"


def _workers(samples: int) -> int:
    """Reading processes a rank: none where starting them takes longer than the work, else a share of the cores."""
    if samples < 4096:
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(cores, 8)
