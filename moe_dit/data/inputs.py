"""What shards must be for a recipe, and a batch of them as the network's training inputs."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_dit.graphs import compiled
from moe_dit.manifest import Manifest
from moe_dit.randomness import Stream, normal, uniform
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError


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
    if data.vae_sha256 is not None and manifest.vae_sha256 not in (None, data.vae_sha256):
        raise InputError(
            f"{manifest.folder} was encoded by another VAE than data.vae_sha256 of recipe {recipe.name} names: "
            f"{manifest.vae_sha256[:12]}..., not {data.vae_sha256[:12]}..."
        )
    if not data.latent_scale and not manifest.scale:
        raise InputError(
            f"{manifest.folder} was encoded by a VAE that names no scale of its latents; set data.latent_scale to 1 / "
            f"their standard deviation (and data.latent_shift to their mean)"
        )


def untrained_labels(manifest: Manifest, recipe: Recipe) -> str | None:
    """What to say where the network has labels that no shard holds; None where it has none."""
    classes, labels = len(manifest.classes), recipe.model.num_classes
    if not 0 < classes < labels:
        return None
    which = f"label {classes} is" if labels == classes + 1 else f"labels {classes} to {labels - 1} are"
    return (
        f"{manifest.folder} has {classes} classes, and model.num_classes is {labels}: {which} never trained, and "
        f"sampling draws from all {labels}; --set model.num_classes={classes} leaves the others out"
    )


def check_guidance(recipe: Recipe, cfg_scale: float, cure: str) -> None:
    """Refuse guidance by a null class that was never trained (InputError).

    Args:
        recipe: the network's.
        cfg_scale: of the guidance, 1: none.
        cure: what to do instead.
    """
    # Weights to begin from may have been trained with one.
    if cfg_scale != 1 and not recipe.flow.label_dropout and recipe.initial_weights is None:
        raise InputError(
            f"guidance of cfg_scale {cfg_scale:g} goes by the null class, which is never trained with "
            f"flow.label_dropout 0; {cure}"
        )


def untrained_guidance(recipe: Recipe) -> str | None:
    """What to say where a recipe samples with guidance by a null class that it does not train; None where it does."""
    try:
        check_guidance(recipe, recipe.sampling.cfg_scale, "sample with --cfg-scale 1")
    except InputError as error:
        return f"sampling.cfg_scale: {error}"
    return None


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
        batch: from :func:`moe_dit.data.loader.batches`, on the device that computes.
        latents: what latents in the batch are; of no concern to pixels.
        backend: torch.compile's. One that is given is used on CPUs too.

    Returns:
        x float32 [N, C, side, side] (latents: shifted and scaled, where there is a posterior a draw from it; pixels:
        in [-1, 1]), y int64 [N] with dropped labels replaced by the null class, noise as x, u float32 [N] uniform in
        [0, 1) for the time, and the samples' position in the run.
    """
    of_latents = (latents.posterior, latents.shift, latents.scale) if recipe.data.kind == "latents" else None
    settings = _Settings(recipe.seed, recipe.model.num_classes, recipe.flow.label_dropout, of_latents)
    on_gpu = batch["x"].is_cuda and recipe.compile != "none"
    draw = _compiled(settings, backend) if on_gpu or backend != "inductor" else _inputs
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
        x = x.contiguous().float() / 127.5 - 1
    dropped = uniform(seed, Stream.LABEL_DROP, position) < settings.label_dropout
    y = torch.where(dropped, settings.num_classes, y)
    noise = normal(seed, Stream.NOISE, position, tuple(x.shape[1:]))
    return x, y, noise, uniform(seed, Stream.TIME, position)


@cache
def _compiled(settings: _Settings, backend: Any) -> Any:
    """:func:`_inputs` for such settings, which its graphs hold as constants."""
    return compiled(_inputs, backend)
