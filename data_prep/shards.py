"""Writing a folder of WebDataset shards with its manifest, by any number of ranks, continuing after any stop.

What is in a shard depends on the images and the shard size alone, never on how many ranks shared the work or on how
often it was stopped: images are put in one fixed shuffled order, shard k holds the k-th run of ``shard_size`` of them
and belongs to rank k % size, and batches do not cross shards. A shard appears under its name only when complete; the
manifest appears last, so its presence means that the folder is complete.
"""

import argparse
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import webdataset

from data_prep.images import list_images
from moe_dit import randomness
from moe_dit.manifest import FORMAT, MANIFEST
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file, remove_unfinished, write_json
from moe_dit.runtime.lock import lock_folder
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.ranks import from_rank_0, world

SETTINGS = ".settings.json"
LARGEST = 8192  # pixels along a side
MOST_WORKERS = 512
MEMBERS = {"latents": {"cls", "latent.npy", "latent_flip.npy"}, "pixels": {"cls", "png"}}

# How a person calls what is in the settings file.
_SETTING_NAMES = {
    "kind": "the command (latents or pixels)",
    "size": "--size",
    "shard_size": "--shard-size",
    "images": "--images (other files in it)",
    "vae": "--vae (other weights)",
}


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or len(text) > 18 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text[:30]}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that encode_latents and pack_pixels share."""
    parser.add_argument("--images", required=True, metavar="DIR", help="holds one folder of images a class")
    parser.add_argument("--out", required=True, type=Path, metavar="SHARDS", help="folder to write")
    parser.add_argument("--size", type=positive, default=256, help="side of the centre crop in pixels (256)")
    parser.add_argument("--shard-size", type=positive, default=1024, help="samples a shard (1024)")
    parser.add_argument("--workers", type=int, help="processes that read images, a rank (chosen by data and cores)")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that no machine could take (InputError)."""
    if args.size > LARGEST:
        raise InputError(f"--size {args.size}: it should be at most {LARGEST}")
    if args.workers is not None and not 0 <= args.workers <= MOST_WORKERS:
        raise InputError(f"--workers {args.workers}: it should be 0 to {MOST_WORKERS}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading and checking


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_keys(path: Path, kind: str) -> list[str]:
    """The samples' keys in a shard, in order; ValueError where a sample lacks a member or the tar file is broken."""
    members: dict[str, set[str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, set()).add(extension)
    except Exception as error:  # tarfile raises whatever a damaged header leads it to
        raise ValueError(f"not a whole tar file ({error})") from error
    for key, extensions in members.items():
        if extensions != MEMBERS[kind]:
            raise ValueError(f"sample {key} has {sorted(extensions)} instead of {sorted(MEMBERS[kind])}")
    return list(members)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def join() -> None:
    """Join the ranks; those that finish early will wait for the slowest."""
    ranks.start(timeout=timedelta(days=2))


def write_shards(
    args: argparse.Namespace,
    read: Callable[[str], Any],
    encode: Callable[[Any], list[dict[str, bytes]]],
    *,
    kind: str,
    sample_shape: list[int],
    batch: int,
    vae: str | None = None,
    vae_hash: str | None = None,
    scale: float | None = None,
    shift: float | None = None,
    posterior: bool | None = None,
) -> None:
    """Write every image below ``args.images`` to shards in ``args.out``; each rank calls it.

    Args:
        args: what :func:`add_arguments` reads.
        read: from a file's path to a tensor or bytes; runs in the reading processes.
        encode: from a batch of what ``read`` gives (tensors stacked, bytes listed) to each sample's members but
            ``cls``, as extension -> content.
        kind, sample_shape, vae, scale, shift, posterior: for the manifest.
        batch: images handed to ``encode`` at once.
        vae_hash: hash of the VAE's weights; another one may not continue the folder.

    Raises:
        InputError: the images cannot be listed or read, or the folder is in use, holds something else or was begun
            with other settings.
    """
    join()
    paths, labels, classes = from_rank_0(lambda: list_images(args.images))
    listing = "\n".join(os.path.relpath(path, args.images) for path in paths)
    settings = {
        "kind": kind,
        "size": args.size,
        "shard_size": args.shard_size,
        "images": hashlib.sha256(os.fsencode(listing)).hexdigest(),
        "vae": vae_hash,
    }
    with ExitStack() as held:
        from_rank_0(lambda: held.enter_context(lock_folder(args.out, "another command")) and None)
        if from_rank_0(lambda: _prepare(args.out, settings)):
            say(f"{args.out} is complete already: {len(paths)} samples; nothing to do")
            return
        records = _write_my_shards(args, kind, paths, labels, read, encode, batch)
        if world().size > 1:
            gathered: list[Any] = [None] * world().size
            torch.distributed.all_gather_object(gathered, records)
            records = sorted((record for part in gathered for record in part), key=lambda record: record["name"])
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "size": args.size,
            "samples": len(paths),
            "classes": classes,
            "source": args.images,
            "vae": vae,
            "scale": scale,
            "shift": shift,
            "posterior": posterior,
            "sample_shape": sample_shape,
            "shards": records,
        }
        from_rank_0(lambda: _write_json(args.out / MANIFEST, manifest))
    say(f"{args.out}: {len(records)} shards, {len(paths)} samples, {len(classes)} classes")


def _prepare(folder: Path, settings: dict[str, Any]) -> bool:
    """Make the folder ready to be begun or continued; True where it is complete already."""
    path = folder / SETTINGS
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}; give another --out") from error
        differing = [name for key, name in _SETTING_NAMES.items() if found.get(key) != settings[key]]
        if differing:
            raise InputError(
                f"{folder} was begun with other settings: {', '.join(differing)}; give the same again, or another --out"
            )
    else:
        if any(folder.glob("*.tar")) or (folder / MANIFEST).exists():
            raise InputError(f"{folder} holds shards that this command did not begin; give another --out")
        _write_json(path, settings)
    for name in ("shard-*", f"{MANIFEST}*", f"{SETTINGS}*"):  # other hidden files are not ours
        remove_unfinished(folder, name)
    return (folder / MANIFEST).exists()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with explained(str(path)):
        write_json(path, value)


class _Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[str], read: Callable[[str], Any]):
        self.paths = paths
        self.read = read

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(self.paths[index])
        except InputError as error:
            # Handed over as a value: raised, it would reach the main process wrapped in the worker's traceback.
            return error


def _collate(samples: list[Any]) -> Any:
    problem = next((sample for sample in samples if isinstance(sample, InputError)), None)
    return problem or (torch.stack(samples) if isinstance(samples[0], torch.Tensor) else samples)


def _write_my_shards(args, kind, paths, labels, read, encode, batch) -> list[dict[str, Any]]:
    """Write this rank's missing shards; gives the manifest's records of all of this rank's shards."""
    order = randomness.permutation(0, 0, len(paths)).tolist()
    mine = {
        f"shard-{k:06d}.tar": order[k * args.shard_size : (k + 1) * args.shard_size]
        for k in world().share(-(-len(order) // args.shard_size))
    }
    records = {name: _record(args.out / name, kind, indices) for name, indices in mine.items()}
    todo = {name: indices for name, indices in mine.items() if records[name] is None}
    batches = [indices[i : i + batch] for indices in todo.values() for i in range(0, len(indices), batch)]
    loader = torch.utils.data.DataLoader(
        _Files(paths, read),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=_workers(len(paths)) if args.workers is None else args.workers,
        pin_memory=torch.cuda.is_available() and kind == "latents",
    )
    # One iterator for all shards, so that reading goes on while a shard is closed.
    loaded = iter(loader)
    total = sum(map(len, mine.values()))
    where = f" (rank 0 of {world().size})" if world().size > 1 else ""
    with task(f"writing samples{where}", total, done=total - sum(map(len, todo.values()))) as progress:
        for name, indices in todo.items():
            with explained(str(args.out / name)), new_file(args.out / name) as file, _tar(file) as tar:
                for i in range(0, len(indices), batch):
                    samples = next(loaded)
                    if isinstance(samples, InputError):
                        raise samples
                    for index, members in zip(indices[i : i + batch], encode(samples), strict=True):
                        tar.write({"__key__": _key(index), "cls": str(labels[index]).encode(), **members})
                    progress.advance(len(indices[i : i + batch]))
            records[name] = _record(args.out / name, kind, indices)
            if records[name] is None:
                raise InputError(f"{args.out / name} does not read back as it was written; is the disk sound?")
    return [record for record in records.values() if record is not None]


def _tar(file: Any) -> webdataset.TarWriter:
    # Nothing that differs from run to run goes in, so that equal samples are equal bytes.
    return webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)


def _key(index: int) -> str:
    """A sample's key: its place in the sorted list of images."""
    return f"{index:08d}"


def _record(path: Path, kind: str, indices: Iterable[int]) -> dict[str, Any] | None:
    """The manifest's record of a shard, or None where it is not there whole."""
    try:
        keys = read_keys(path, kind)
    except ValueError:
        return None
    if keys != [_key(index) for index in indices]:
        return None
    return {"name": path.name, "samples": len(keys), "bytes": path.stat().st_size, "sha256": sha256(path)}


def _workers(samples: int) -> int:
    """Reading processes a rank: none where starting them takes longer than the work, else a share of the cores."""
    if samples < 4096:
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(cores, 8)
