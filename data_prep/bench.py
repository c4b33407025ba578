"""What reading shards costs, beside other ways to keep the same samples: samples a second of one loader process.

The same samples are written as one file each (.npz of latents as the published code keeps them, .png of pixels), and as
one flat array, which is the limit: no file system, no tar, no check. Every way is read by a DataLoader with the same
workers, in turns, the flat array and ours in the same random order. Files are warm: they were just written.
"""

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from data_prep.shards import MOST_WORKERS, positive
from moe_dit.data import Positions, ShardReader, TrainingSamples
from moe_dit.data.loader import packed
from moe_dit.data.order import FullOrder
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_json
from moe_dit.runtime.loading import read
from moe_dit.runtime.progress import task
from moe_dit.runtime.ranks import World

EXAMPLES = """\
  python -m data_prep.bench data/imagenet256_latents
  python -m data_prep.bench data/imagenet256_pixels --workers 0 1 4 --samples 2048 --json pixels.json
"""

PNG_LEVEL = 6  # of .png files, as most programs write them


class Files(Dataset):
    """Samples kept as a file each."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        arrays, labels = zip(*(self._read(self.paths[index]) for index in indices), strict=True)
        return {"x": torch.from_numpy(np.stack(arrays)), "y": torch.tensor(labels)}

    def _read(self, path: Path) -> tuple[np.ndarray, int]:
        if path.suffix == ".npz":
            with np.load(path) as sample:
                return sample["latent"], int(sample["label"])
        return np.asarray(Image.open(path)).transpose(2, 0, 1), int(path.stem.rpartition("_")[2])


class Flat(Dataset):
    """Samples kept as one array."""

    def __init__(self, folder: Path, order: np.ndarray):
        self.folder, self.order = folder, order
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __getitems__(self, places: list[int]) -> dict[str, torch.Tensor]:
        if self._arrays is None:  # each process maps them itself
            self._arrays = np.load(self.folder / "x.npy", mmap_mode="r"), np.load(self.folder / "y.npy")
        x, y = self._arrays
        chosen = self.order[places]
        return {"x": torch.from_numpy(x[chosen]), "y": torch.from_numpy(y[chosen])}


def decoded(kind: str, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """A sample of webdataset's as tensors."""
    if kind == "latents":
        return torch.from_numpy(sample["latent.npy"]), sample["cls"]
    image = next(value for key, value in sample.items() if isinstance(value, np.ndarray))
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), sample["cls"]


def collated(samples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "y": torch.tensor(y)}


def write_others(reader: ShardReader, count: int, folder: Path) -> tuple[list[Path], np.ndarray]:
    """Write the first samples as files and as a flat array; gives the files, and the samples' places in the array."""
    latents = reader.manifest.kind == "latents"
    paths, step = [], 256
    shape = (count, *reader.manifest.sample_shape)
    flat = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16 if latents else np.uint8, shape)
    labels = np.empty(count, np.int64)
    with task("writing the other ways", count) as progress:
        for start in range(0, count, step):
            indices = np.arange(start, min(start + step, count))
            x, y = reader.read(indices, np.zeros(len(indices), bool))
            flat[indices], labels[indices] = x.numpy(), y.numpy()
            for index, array, label in zip(indices.tolist(), x.numpy(), y.tolist(), strict=True):
                paths.append(folder / (f"{index:08d}.npz" if latents else f"{index:08d}_{label}.png"))
                if latents:
                    np.savez(paths[-1], latent=array, label=label)
                else:
                    Image.fromarray(array.transpose(1, 2, 0)).save(paths[-1], compress_level=PNG_LEVEL)
            progress.advance(len(indices))
    flat.flush()
    np.save(folder / "y.npy", labels)
    return paths, np.random.default_rng(0).permutation(count)


def ways(reader: ShardReader, count: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What makes the dataset of each way, by its name."""
    manifest = reader.manifest
    paths, order = write_others(reader, count, folder)
    urls = [str(manifest.folder / shard["name"]) for shard in manifest.shards]

    def stock() -> Any:
        shards = webdataset.WebDataset(urls, shardshuffle=len(urls) > 1 and 100, empty_check=False)
        return shards.shuffle(1000).decode("rgb8").map(partial(decoded, manifest.kind))

    file = ".npz" if manifest.kind == "latents" else f".png (level {PNG_LEVEL})"
    return {
        "these shards": lambda: TrainingSamples(ShardReader(manifest), 0, 0.0, FullOrder(0, count)),
        f"one {file} a sample": lambda: Files(paths),
        "webdataset's own pipeline": stock,
        "one flat array (the limit)": lambda: Flat(folder, order),
    }


def batches(dataset: Any, count: int, batch: int, workers: int) -> Generator[Any, None, None]:
    """As training reads them."""
    how: dict[str, Any] = {"prefetch_factor": 4 if workers else None}
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return read(dataset, workers, "--workers", collated, batch_size=batch, **how)
    positions = Positions(0, count // batch, batch, batch, World())
    return read(dataset, workers, "--workers", packed, batch_sampler=positions, **how)


def time_of(dataset: Any, count: int, batch: int, workers: int) -> tuple[float, float]:
    """Seconds to the first batch, and samples a second after it."""
    begin = time.perf_counter()
    seen = 0
    first = begin
    with closing(batches(dataset, count, batch, workers)) as found:
        for samples in found:
            if not seen:
                first = time.perf_counter()
            seen += len(samples["y"])
            if seen >= count - batch:
                break
        end = time.perf_counter()
    return first - begin, (seen - batch) / (end - first)


def measure(manifest: Manifest, samples: int, batch: int, workers: list[int], rounds: int) -> dict[str, Any]:
    """Every way with every number of workers, in turns; medians over the rounds."""
    reader = ShardReader(manifest)
    count = min(samples, len(reader))
    if count < 4 * batch:
        raise InputError(f"{manifest.folder} has {count} samples; the bench needs {4 * batch}, or a smaller --batch")
    with tempfile.TemporaryDirectory() as scratch:
        makers = ways(reader, count, Path(scratch))
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        with task("reading", rounds * len(makers) * len(workers)) as progress:
            for _ in range(rounds):
                for name, make in makers.items():
                    for number in workers:
                        found.setdefault((name, number), []).append(time_of(make(), count, batch, number))
                        progress.advance(1, name)
    results = [
        {
            "way": name,
            "workers": number,
            "first_batch_seconds": statistics.median(first for first, _ in times),
            "samples_per_second": statistics.median(rate for _, rate in times),
        }
        for (name, number), times in found.items()
    ]
    return {"kind": manifest.kind, "sample_shape": manifest.sample_shape, "samples": count, "batch": batch} | {
        "results": results,
        "check_microseconds": check_cost(manifest),
    }


def check_cost(manifest: Manifest) -> float:
    """Microseconds that a sample's checksum takes."""
    size = int(np.prod(manifest.sample_shape)) * (2 if manifest.kind == "latents" else 1)
    data = np.zeros(size, np.uint8).data
    begin = time.perf_counter()
    for _ in range(1000):
        zlib.crc32(data)
    return (time.perf_counter() - begin) * 1e3


def show(result: dict[str, Any], folder: Path) -> None:
    title = (
        f"{folder}: {result['samples']:,} {result['kind']} of {result['sample_shape']}, batches of {result['batch']}"
    )
    table = Table("way", title=title, title_justify="left")
    for column in ("workers", "first batch", "samples/s", "of these shards"):
        table.add_column(column, justify="right")
    ours = {row["workers"]: row["samples_per_second"] for row in result["results"] if row["way"] == "these shards"}
    for row in result["results"]:
        rate, number = row["samples_per_second"], row["workers"]
        first = f"{row['first_batch_seconds']:.2f} s"
        table.add_row(row["way"], str(number), first, f"{rate:,.0f}", f"{rate / ours[number]:.2f}")
    console = Console(width=110, highlight=False)
    console.print(table)
    console.print(f"of a sample's time in these shards, its checksum takes {result['check_microseconds']:.1f} us")


def main() -> None:
    parser = Parser("Measures what reading a folder of shards costs, beside other ways to keep samples.", EXAMPLES)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="a folder with manifest.json")
    add("--workers", type=int, nargs="+", default=[1], metavar="N", help="loader processes, one or several (1)")
    add("--samples", type=positive, default=4096, metavar="N", help="the first so many (4096)")
    add("--batch", type=positive, default=64, metavar="N", help="samples a batch (64)")
    add("--rounds", type=positive, default=3, metavar="N", help="of every way, in turns (3)")
    add("--json", type=Path, metavar="FILE", help="write what was measured")
    args = parser.parse_args()
    for number in args.workers:
        if not 0 <= number <= MOST_WORKERS:
            raise InputError(f"--workers {number}: it should be 0 to {MOST_WORKERS}")
    if args.json:
        check_new_file(args.json, lambda _: True)
    result = measure(read_manifest(args.shards), args.samples, args.batch, args.workers, args.rounds)
    show(result, args.shards)
    if args.json:
        with explained(str(args.json)):
            write_json(args.json, result)


if __name__ == "__main__":
    run(main)
