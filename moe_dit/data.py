"""Reading shards: which sample stands at which position of a run, and the batches of a rank.

The order is a pure function: position p of a run is sample permutation(seed, p // n)[p % n] of n. Whoever needs a
position looks its sample up and reads just those bytes of a tar file, so any number of ranks and workers share an
epoch without a sample lost or doubled, and a run goes on in the middle of one at once.
"""

import io
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moe_dit.manifest import Manifest
from moe_dit.randomness import Stream, normal, permutation, uniform
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World
from moe_dit.runtime.stopping import signals_held


def check_manifest(manifest: Manifest, recipe: Recipe) -> None:
    """Refuse shards that are not what the recipe's network takes (InputError)."""
    model = recipe.model
    data = recipe.data
    if manifest.kind != data.kind:
        raise InputError(f"{manifest.folder} holds {manifest.kind}, but recipe {recipe.name} trains on {data.kind}")
    moments = manifest.kind == "latents" and manifest.posterior
    want = [model.in_channels * (2 if moments else 1), model.input_size, model.input_size]
    if list(manifest.sample_shape) != want:
        means = "mean and log variance of " if moments else ""
        hint = "encode images of the size that fits"
        if manifest.sample_shape[0] != want[0]:
            hint = f"encode with a VAE of {model.in_channels} channels, or change model.in_channels"
        raise InputError(
            f"{manifest.folder} holds samples of shape {manifest.sample_shape}, but recipe {recipe.name} "
            f"takes {want} ({means}model.in_channels, model.input_size twice); {hint}"
        )
    if len(manifest.classes) > model.num_classes:
        raise InputError(
            f"{manifest.folder} has {len(manifest.classes)} classes, but model.num_classes of recipe {recipe.name} "
            f"is {model.num_classes}"
        )
    if manifest.kind != "latents":
        return
    if data.latent_scale and manifest.scale and not np.isclose(data.latent_scale, manifest.scale):
        raise InputError(
            f"{manifest.folder} was encoded by a VAE of scale {manifest.scale}, but data.latent_scale of recipe "
            f"{recipe.name} is {data.latent_scale}"
        )
    if data.latent_shift is not None and manifest.scale and not np.isclose(data.latent_shift, manifest.shift):
        raise InputError(
            f"{manifest.folder} was encoded by a VAE of shift {manifest.shift}, but data.latent_shift of recipe "
            f"{recipe.name} is {data.latent_shift}"
        )
    if not data.latent_scale and not manifest.scale:
        raise InputError(
            f"{manifest.folder} was encoded by a VAE that names no scale of its latents; set data.latent_scale to 1 / "
            f"their standard deviation (and data.latent_shift to their mean)"
        )


@dataclass(frozen=True)
class Latents:
    """What stored latents are, and how they become the network's input: (latent - shift) * scale."""

    scale: float = 1.0
    shift: float = 0.0
    posterior: bool = True  # stored as moments, from which a latent is drawn

    @classmethod
    def of(cls, recipe: Recipe, manifest: Manifest) -> "Latents":
        """Those of shards; scale and shift as the recipe says, or else the manifest."""
        scale = recipe.data.latent_scale or manifest.scale
        shift = recipe.data.latent_shift
        return cls(scale or 1.0, manifest.shift if shift is None else shift, manifest.posterior)


class ShardReader:
    """Random access to the samples of a folder of shards, by index in [0, samples)."""

    MAX_OPEN = 256  # well under the usual limit of 1024 open files

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._ends = list(accumulate(shard["samples"] for shard in manifest.shards))
        self._indices: dict[int, dict[str, np.ndarray]] = {}
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.samples

    def members(self, index: int) -> "Members":
        """The files of sample ``index``."""
        number = bisect_right(self._ends, index)
        shard = self.manifest.shards[number]
        path = self.manifest.folder / shard["name"]
        if number not in self._indices:
            self._indices[number] = self._index(path, shard["samples"])
        row = index - (self._ends[number] - shard["samples"])
        places = {extension: places[row] for extension, places in self._indices[number].items()}
        return Members(path, self._file(number, path), places, len(self.manifest.classes))

    def _file(self, number: int, path: Path) -> BinaryIO:
        if number not in self._files:
            try:
                self._files[number] = open(path, "rb", buffering=0)
            except OSError as error:
                raise InputError(f"shard {path} cannot be read: {error}") from None
            if len(self._files) > self.MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def _index(self, path: Path, samples: int) -> dict[str, np.ndarray]:
        """Where each sample's files lie in a tar: extension -> int64 [samples, 2] of offset and size."""
        # Arrays rather than objects: ImageNet's index must fit into every loader process.
        index: dict[str, np.ndarray] = {}
        rows: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    row = rows.setdefault(key, len(rows))
                    if row < samples:
                        places = index.setdefault(extension, np.zeros((samples, 2), np.int64))
                        places[row] = member.offset_data, member.size
        except Exception as error:  # tarfile raises whatever a damaged header leads it to
            raise InputError(f"shard {path} cannot be read: {error}") from None
        if len(rows) != samples:
            raise InputError(f"shard {path} holds {len(rows)} samples, its manifest says {samples}")
        return index

    def __getstate__(self):  # open files stay with their process
        return {**self.__dict__, "_files": OrderedDict()}


@dataclass(frozen=True)
class Members:
    """The files of one sample inside a shard."""

    path: Path
    file: BinaryIO
    places: dict[str, np.ndarray]  # extension -> offset, size
    classes: int  # of the shards

    def place(self, extension: str) -> tuple[int, int]:
        """Offset and size of one file in the shard."""
        offset, size = (int(n) for n in self.places.get(extension, (0, 0)))
        if not size:
            raise InputError(f"shard {self.path}: a sample has no .{extension}")
        return offset, size

    def read(self, extension: str) -> bytes:
        """The bytes of one file."""
        offset, size = self.place(extension)
        data = os.pread(self.file.fileno(), size, offset)
        if len(data) != size:
            raise InputError(f"shard {self.path} ends inside a sample")
        return data

    def label(self) -> int:
        """The class index."""
        text = self.read("cls").strip()
        if not text.isdigit() or len(text) > 18 or int(text) >= self.classes:
            raise InputError(f"shard {self.path}: a label is {text[:20]!r}, not below {self.classes}")
        return int(text)

    def array(self, extension: str) -> np.ndarray:
        """A .npy, or an image as uint8 [C, H, W]."""
        data = io.BytesIO(self.read(extension))
        try:
            if extension.endswith("npy"):
                return np.load(data)
            return np.asarray(Image.open(data).convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # decoders raise whatever they meet
            raise InputError(f"shard {self.path}: .{extension} is damaged: {error}") from None


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(seed, epoch, n)


class TrainingSamples(Dataset):
    """The run's samples by position.

    A batch is a dict of "x" (moments or latents float16, pixels uint8), "y" and "position".
    Errors come back as values, since a DataLoader would bury an exception's one line in a worker's traceback.
    """

    def __init__(self, reader: ShardReader, seed: int, horizontal_flip: float):
        self.reader = reader
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor] | InputError:
        try:
            return self._batch(positions)
        except InputError as error:
            return error

    def _batch(self, positions: list[int]) -> dict[str, torch.Tensor]:
        n = len(self.reader)
        manifest = self.reader.manifest
        where = torch.tensor(positions)
        flips = (uniform(self.seed, Stream.FLIP, where) < self.horizontal_flip).tolist()
        arrays = []
        labels = []
        for position, flip in zip(positions, flips, strict=True):
            members = self.reader.members(int(_order(self.seed, position // n, n)[position % n]))
            if manifest.kind == "latents":
                array = members.array("latent_flip.npy" if flip else "latent.npy")
            else:
                image = members.array("png")
                array = image[:, :, ::-1] if flip else image
            if list(array.shape) != manifest.sample_shape:
                raise InputError(
                    f"shard {members.path}: a sample has shape {list(array.shape)}, its manifest says "
                    f"{manifest.sample_shape}"
                )
            arrays.append(array)
            labels.append(members.label())
        return {"x": torch.from_numpy(np.stack(arrays)), "y": torch.tensor(labels), "position": where}


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


def _as_is(batch):
    return batch


def batches(
    recipe: Recipe, manifest: Manifest, micro_batch_size: int, first_step: int, world: World
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This rank's micro-batches from ``first_step`` to the recipe's last, read ahead by worker processes."""
    samples = TrainingSamples(ShardReader(manifest), recipe.seed, recipe.data.horizontal_flip)
    positions = Positions(first_step, recipe.steps, recipe.global_batch_size, micro_batch_size, world)
    loader = DataLoader(
        samples,
        batch_sampler=positions,
        collate_fn=_as_is,
        num_workers=recipe.data.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if recipe.data.workers else None,
        # Workers must not inherit a CUDA context or gloo's threads.
        multiprocessing_context="forkserver" if recipe.data.workers else None,
    )
    with signals_held():
        # It unblocks two of the signals as it starts (Python 3.11), so it has to be there before the workers.
        resource_tracker.ensure_running()
    with signals_held():
        loaded = iter(loader)
    for batch in loaded:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Settings(NamedTuple):
    """What of a recipe and its shards decides training inputs."""

    seed: int
    num_classes: int
    label_dropout: float
    latents: tuple[bool, float, float] | None  # posterior, shift, scale; None: pixels


def training_inputs(
    recipe: Recipe, batch: dict[str, torch.Tensor], latents: Latents, backend: Any = "inductor"
) -> dict[str, torch.Tensor]:
    """A batch as the network's training inputs, everything random drawn from each sample's position.

    On GPUs all draws are compiled as one function, unless the recipe says ``compile: none``: uniform draws are the
    same, normal ones to 5e-7.

    Args:
        batch: from :func:`batches`, on the device that computes.
        latents: what latents in the batch are; of no concern to pixels.
        backend: torch.compile's. One that is given is used on CPUs too.

    Returns:
        x float32 [N, C, side, side] (latents: shifted and scaled, where there is a posterior a draw from it; pixels:
        in [-1, 1]), y int64 [N] with dropped labels replaced by the null class, noise as x, u float32 [N] uniform in
        [0, 1) for the time, and the samples' position in the run.
    """
    of_latents = (latents.posterior, latents.shift, latents.scale) if recipe.data.kind == "latents" else None
    settings = _Settings(recipe.seed, recipe.model.num_classes, recipe.flow.label_dropout, of_latents)
    compiled = batch["x"].is_cuda and recipe.compile != "none"
    draw = _compiled(backend) if compiled or backend != "inductor" else _inputs
    x, y, noise, u = draw(settings, batch["x"], batch["y"], batch["position"])
    return {"x": x, "y": y, "noise": noise, "u": u, "position": batch["position"]}


def _inputs(settings: _Settings, x: torch.Tensor, y: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seed = settings.seed
    if settings.latents is not None:
        posterior, shift, scale = settings.latents
        x = x.float()
        if posterior:
            mean, log_variance = x.chunk(2, dim=1)
            draw = normal(seed, Stream.LATENT, position, tuple(mean.shape[1:]))
            # The clamp is diffusers' own (DiagonalGaussianDistribution).
            x = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * draw
        x = (x - shift) * scale
    else:
        x = x.float() / 127.5 - 1
    dropped = uniform(seed, Stream.LABEL_DROP, position) < settings.label_dropout
    y = torch.where(dropped, settings.num_classes, y)
    noise = normal(seed, Stream.NOISE, position, tuple(x.shape[1:]))
    return x, y, noise, uniform(seed, Stream.TIME, position)


@cache
def _compiled(backend: Any) -> Any:
    return torch.compile(_inputs, dynamic=False, fullgraph=True, backend=backend)
