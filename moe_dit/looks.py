"""Looks at a run while it trains: a grid of samples, a held-out loss by time, and scores, from the averaged weights.

They are made on the training ranks from the EMA as it stands, every ``looks.every`` steps. What is drawn follows from
the recipe's seed and fixed indices, so that looks of one run, and of two, can be compared; training goes on as if
nothing had been.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from eval import features as image_features
from eval import score as scoring
from eval.generate import Sampling, generate, image_size, labels_for, load_decoder
from eval.protocols import PROTOCOLS
from eval.reference import Reference, labels_in
from moe_dit.classes import labels_among, translated
from moe_dit.data import Latents, ShardReader, TrainingSamples, check_manifest, training_inputs
from moe_dit.engine import Engine
from moe_dit.manifest import read_manifest
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.files import new_file
from moe_dit.runtime.notes import noted
from moe_dit.runtime.progress import say

COLUMNS = 8  # of the grid, where its labels are drawn at random


def share(count: int) -> tuple[list[int], int]:
    """This rank's share of the indices below ``count``, and how many of them are its own.

    Ranks that share experts must call the network equally often, so every rank gets equally many; the last ones of some
    ranks are repetitions, which only keep step.
    """
    world = ranks.world()
    own = list(world.share(count))
    return own + [0] * (-(-count // world.size) - len(own)), len(own)


class _Evened:
    """A network whose batches are filled up to a multiple of ``size`` with repetitions of their samples.

    What is compiled then has graphs for two batch sizes, with guidance's doubled batches and without, where each count
    of samples and its last batch asked for graphs of their own. It is not for networks that couple samples.
    """

    def __init__(self, network: Any, size: int):
        self.network = network
        self.size = size
        self.num_classes = network.num_classes

    def __call__(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        fill = torch.arange(-(-len(z) // self.size) * self.size, device=z.device) % len(z)
        return self.network(z[fill], t[fill], y[fill])[: len(z)]


class Looks:
    """What is looked at, made ready once.

    Args:
        recipe: its section ``looks`` says what.
        run: pictures go to RUN/looks.
        device: where this rank computes.
        micro_batch_size: samples computed at once, at most.
        classes: the names of those that are trained, in the order of the labels.

    Raises:
        InputError: the VAE, the held-out shards or the reference cannot be used.
    """

    def __init__(self, recipe: Recipe, run: Path, device: torch.device, micro_batch_size: int, classes: Sequence[str]):
        self.recipe = recipe
        self.folder = run / "looks"
        self.device = device
        self.classes = classes
        settings = recipe.looks
        held_out = settings.held_out_samples if settings.held_out else 0
        largest = max(held_out, settings.samples, settings.score_samples, 1)
        self.batch = min(micro_batch_size, len(share(largest)[0]))
        self.sampling = Sampling.of_recipe(recipe, recipe.seed)
        self.vae: Any = None
        if settings.samples or settings.score_samples:
            self.vae = ranks.first_on_rank_0(lambda: load_decoder(self.sampling, recipe))
        self.alive: Callable[[], None] = lambda: None  # called now and then: a look takes as long as it takes
        self._held_out = ranks.agreed(lambda: list(self._read_held_out(settings.held_out)))
        self._truth: Any = None
        if settings.score_samples:
            self._extractor = self._make_extractor(image_size(recipe, self.vae))

    def look(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Look at the averaged weights after ``step`` steps; every rank calls it.

        Returns:
            numbers for the step's record and pictures (uint8 [H, W, 3]) by name; on rank 0, elsewhere nothing.
        """
        numbers: dict[str, Any] = {}
        pictures: dict[str, np.ndarray] = {}
        if self.vae is not None:
            self.vae.to(self.device)
        with torch.no_grad(), engine.averaged_weights() as network:
            if not network.couples_samples:
                network = _Evened(network, self.batch)
            if self._held_out:
                numbers |= self._held_out_loss(engine, network)
            if self.recipe.looks.samples:
                pictures["samples"] = self._grid(network)
            if self.recipe.looks.score_samples:
                numbers |= self._scores(network)
        if self.vae is not None:
            self.vae.to("cpu")
        if ranks.world().rank:
            return {}, {}
        for name, picture in pictures.items():
            path = self.folder / (f"step_{step:08d}.png" if name == "samples" else f"step_{step:08d}_{name}.png")
            with noted(self.folder):
                self.folder.mkdir(exist_ok=True)
                with new_file(path) as file:
                    Image.fromarray(picture).save(file, "PNG")
        return numbers, pictures

    # --- held-out loss ------------------------------------------------------------------------------------------------

    def _read_held_out(self, folder: str | None) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """This rank's batches of held-out samples as training inputs on the CPU, and how many of each are its own."""
        if folder is None:
            return
        manifest = read_manifest(folder)
        check_manifest(manifest, self.recipe)
        places = labels_among(manifest.classes, self.classes, f"looks.held_out {folder}", "the training data")
        # Labels are never dropped; everything random is drawn by a sample's place in the held-out set.
        recipe = replace(self.recipe, flow=replace(self.recipe.flow, label_dropout=0.0))
        samples = TrainingSamples(ShardReader(manifest), recipe.seed, 0.0)
        latents = Latents.of(recipe, manifest)
        positions, own = share(min(self.recipe.looks.held_out_samples, manifest.samples))
        for start in range(0, len(positions), self.batch):
            part = positions[start : start + self.batch]
            batch = samples.__getitems__(part)
            batch["y"] = translated(batch["y"], places)
            yield training_inputs(recipe, batch, latents), min(len(part), max(0, own - start))

    def _held_out_loss(self, engine: Engine, network: Any) -> dict[str, Any]:
        buckets = self.recipe.looks.time_buckets
        sums = torch.zeros(2, buckets, dtype=torch.float64, device=self.device)
        for stored, own in self._held_out:
            inputs = {key: value.to(self.device) for key, value in stored.items()}
            bucket = inputs["position"] % buckets  # every part of [0, 1] gets its share of the samples
            t = (bucket + inputs["u"]) / buckets
            errors = engine.flow.errors(network, inputs["x"], inputs["y"], noise=inputs["noise"], t=t)
            values = torch.stack([errors, torch.ones_like(errors)])[:, :own].double()
            sums.index_add_(1, bucket[:own], values)
        torch.distributed.all_reduce(sums)
        error, count = sums.cpu()
        by_time = [round(value, 6) for value in (error / count.clamp_min(1)).tolist()]
        return {"held_out_loss": (error.sum() / count.sum()).item(), "held_out_loss_by_time": by_time}

    # --- samples ------------------------------------------------------------------------------------------------------

    def _samples(
        self, network: Any, count: int, keep_step: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's samples, on the device: their indices below ``count`` (int64 [n]) and images uint8 [n, 3, H, W].

        Every rank gets equally many batches; repetitions that keep step come last, and only if asked for.
        """
        indices, own = share(count)
        for start in range(0, len(indices), self.batch):
            part = torch.tensor(indices[start : start + self.batch], device=self.device)
            self.alive()
            images = generate(network, self.recipe, self.sampling, self.vae, part)
            kept = len(part) if keep_step else max(0, own - start)
            yield part[:kept], images[:kept]

    def _gathered(self, value: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor | None:
        """Rows of all ranks in the order of their indices, on rank 0's CPU; None elsewhere."""
        parts = ranks.gathered((indices.cpu(), value.cpu()))
        if parts is None:
            return None
        whole = torch.empty(count, *value.shape[1:], dtype=value.dtype)
        for part, rows in parts:
            whole[part] = rows
        return whole

    def _grid(self, network: Any) -> np.ndarray:
        """The grid of the first samples, on rank 0; elsewhere nothing."""
        count = self.recipe.looks.samples
        indices, images = (torch.cat(parts) for parts in zip(*self._samples(network, count), strict=True))
        whole = self._gathered(images, indices, count)
        if whole is None:
            return np.empty(0)
        classes = self.recipe.model.num_classes
        columns = classes if self.sampling.labels == "balanced" and classes <= 10 else COLUMNS
        return make_grid(list(whole), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()

    # --- scores -------------------------------------------------------------------------------------------------------

    def _make_extractor(self, size: int) -> image_features.Extractor:
        """What features the scores compare; every rank helps with those of the real images."""
        settings = self.recipe.looks
        assert settings.reference is not None
        reference = Reference(Path(settings.reference), settings.inception, PROTOCOLS["fidelity"])
        fitted = settings.inception is None
        self._places = ranks.agreed(lambda: labels_in(reference.path, self.classes, reference.images.classes, fitted))
        extractor = reference.extractor(None, size, self.device)
        self._truth = reference.survey(extractor, size)
        return extractor

    def _scores(self, network: Any) -> dict[str, Any]:
        count = self.recipe.looks.score_samples
        # A rank without samples of its own speaks of arrays too, by one that keeps step.
        found = [
            (indices, self._extractor(images)) for indices, images in self._samples(network, count, keep_step=True)
        ]
        own = torch.cat([indices for indices, _ in found])
        kept = len(range(count)[ranks.world().rank :: ranks.world().size])
        arrays: dict[str, Any] = {
            name: self._gathered(torch.cat([arrays[name] for _, arrays in found])[:kept], own[:kept], count)
            for name in found[0][1]
        }
        if ranks.world().rank:
            return {}
        labels = labels_for(torch.arange(count), self.sampling, self.recipe.model.num_classes)
        made = image_features.Features(arrays, labels)
        result = scoring.compute(made, self._truth, self._extractor, places=self._places)
        say(f"look: FID {result['fid']:.4g} of {count} samples")
        wanted = ("fid", "inception_score", "kid", "precision", "recall", "label_agreement")
        return {f"look_{name}": result[name] for name in wanted if result.get(name) is not None}
