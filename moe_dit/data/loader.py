"""The batches of a rank: the samples at its positions of a run, read ahead by worker processes."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from moe_dit.data.order import FullOrder, Order, make_order, window_for
from moe_dit.data.reader import ShardReader
from moe_dit.manifest import Manifest
from moe_dit.randomness import Stream, host_uniform
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.loading import read
from moe_dit.runtime.progress import say
from moe_dit.runtime.ranks import World


class TrainingSamples(Dataset):
    """The run's samples by position.

    A batch is a dict of "x" (moments or latents float16, pixels uint8), "y" and "position".

    Args:
        reader: of the shards.
        seed: of the run.
        horizontal_flip: probability of a mirror image.
        order: which sample stands where; None: a permutation of all.
        reads_ahead: whether this is the one that reads whole shards ahead, for all processes of its node.
    """

    def __init__(
        self,
        reader: ShardReader,
        seed: int,
        horizontal_flip: float,
        order: Order | None = None,
        reads_ahead: bool = False,
    ):
        self.reader = reader
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.order = order or FullOrder(seed, len(reader))
        self.reads_ahead = reads_ahead

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        where = np.array(positions)
        worker = get_worker_info()
        if self.reads_ahead and (worker is None or worker.id == 0):
            self.reader.ahead(self.order.shards_ahead(positions[0]))
        flips = host_uniform(self.seed, Stream.FLIP, where) < self.horizontal_flip
        x, y = self.reader.read(self.order.samples(where), flips)
        return {"x": x, "y": y, "position": torch.from_numpy(where)}


class Positions:
    """The positions of each micro-batch of one rank, from a step on.

    Step s is positions [s * B, (s + 1) * B); its micro-batch m on rank r is the (m * ranks + r)-th equal part.
    """

    def __init__(self, first_step: int, steps: int, global_batch_size: int, micro_batch_size: int, world: World):
        self.first = first_step
        self.steps = steps
        self.batch = global_batch_size
        self.micro = micro_batch_size
        self.world = world

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(
            self.first * self.batch + self.world.rank * self.micro,
            self.steps * self.batch,
            self.world.size * self.micro,
        ):
            yield list(range(start, start + self.micro))


Batch: TypeAlias = dict[str, torch.Tensor]


def packed(batch: Batch) -> dict[str, Any]:
    """A batch as a worker sends it: a tensor takes a file in shared memory, which is much for some dozen numbers."""
    return {key: value if key == "x" else value.numpy() for key, value in batch.items()}


def unpacked(batch: dict[str, Any]) -> Batch:
    """A batch as it was before it was packed, in pinned memory where there is a GPU."""
    tensors = {key: value if key == "x" else torch.from_numpy(value) for key, value in batch.items()}
    if not torch.cuda.is_available():
        return tensors
    return {key: value if key == "x" else value.pin_memory() for key, value in tensors.items()}


def workers_for(samples: TrainingSamples, positions: list[int], eats: float) -> int:
    """How many loader processes feed a rank that takes ``eats`` images a second at most.

    One process's rate is measured on a micro-batch. Twice as many as the rates say, since disks and cores are shared;
    at least one, and one less than the rank has cores.
    """
    where = np.array(positions)
    indices, flips = samples.order.samples(where), np.zeros(len(where), bool)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        samples.reader.read(indices, flips)
        seconds.append(time.perf_counter() - start)
    reads = len(where) / min(seconds[1:])
    workers = max(1, min(math.ceil(2 * eats / reads), ranks.cores() - 1))
    say(f"loader processes a rank: {workers} (one reads {reads:.0f} images/s; at most {eats:.0f} are trained on)")
    return workers


def batches(
    recipe: Recipe,
    manifest: Manifest,
    micro_batch_size: int,
    first_step: int,
    world: World,
    eats: Callable[[], float] = lambda: 1.0,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This rank's micro-batches from ``first_step`` to the recipe's last, read ahead by worker processes.

    ``data.window_gb`` "auto" stands for what :func:`moe_dit.data.order.window_for` says, and ``data.workers`` "auto"
    for what :func:`workers_for` says.

    Args:
        eats: gives the images a second that this rank trains on at most; asked where workers are "auto".
    """
    reader = ShardReader(manifest)
    order = make_order(manifest, recipe.seed, window_for(manifest, recipe.data.window_gb))
    samples = TrainingSamples(reader, recipe.seed, recipe.data.horizontal_flip, order, world.local_rank == 0)
    positions = Positions(first_step, recipe.steps, recipe.global_batch_size, micro_batch_size, world)
    workers = recipe.data.workers
    if workers == "auto":
        first = next(iter(positions), None)
        workers = 0 if first is None else workers_for(samples, first, eats())
    loaded = read(
        samples,
        workers,
        "data.workers",
        packed,
        pin=torch.cuda.is_available(),
        batch_sampler=positions,
        prefetch_factor=4 if workers else None,
    )
    try:
        with closing(loaded):
            for batch in loaded:
                yield unpacked(batch)
    finally:
        reader.close()
