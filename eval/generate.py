"""From sample indices to images: a function of (model, settings, index), whatever rank or batch it is computed in.

Sample i's noise and label are drawn from (seed, i) alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from data_prep.autoencoder import decode, hash_weights, latent_space, load_vae
from moe_dit.data.inputs import check_guidance
from moe_dit.flow import build_flow
from moe_dit.randomness import Stream, normal, uniform
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to sample; resolved, so nothing is None but what concerns latents in pixel space."""

    seed: int
    method: str
    steps: int
    cfg_scale: float
    cfg_interval: tuple[float, float]
    labels: str
    vae: str | None
    latent_scale: float | None
    latent_shift: float | None  # None in exports made before there was one: 0

    @classmethod
    def of_recipe(cls, recipe: Recipe, seed: int) -> "Sampling":
        """A recipe's own."""
        settings = recipe.sampling
        latents = recipe.data.kind == "latents"
        return cls(
            seed=seed,
            method=settings.method,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            cfg_interval=(settings.cfg_interval[0], settings.cfg_interval[1]),
            labels=settings.labels,
            vae=recipe.data.vae if latents else None,
            latent_scale=recipe.data.latent_scale if latents else None,
            latent_shift=recipe.data.latent_shift if latents else None,
        )


def resolve(args, recipe: "Recipe") -> Sampling:
    """Flags over the recipe's defaults, checked."""
    latents = recipe.data.kind == "latents"
    flags = {key: getattr(args, key) for key in ("method", "steps", "cfg_scale", "labels")}
    flags |= {"vae": args.vae if latents else None, "cfg_interval": args.cfg_interval and tuple(args.cfg_interval)}
    given = {key: value for key, value in flags.items() if value is not None}
    sampling = replace(Sampling.of_recipe(recipe, args.seed), **given)
    low, high = sampling.cfg_interval
    for good, complaint in (
        (args.num >= 1, f"--num is {args.num}; it should be at least 1"),
        (args.batch is None or args.batch >= 1, f"--batch is {args.batch}; it should be at least 1"),
        (0 <= args.seed < 2**63, f"--seed is {args.seed}; it should be at least 0 and below 2^63"),
        (sampling.steps >= 1, f"--steps is {sampling.steps}; it should be at least 1"),
        (0 <= sampling.cfg_scale < float("inf"), f"--cfg-scale is {sampling.cfg_scale}; it should be at least 0"),
        (0 <= low <= high <= 1, f"--cfg-interval is {low} {high}; it should be 0 <= LO <= HI <= 1"),
        (latents or args.vae is None, "--vae has no use: the model makes pixels; leave it out"),
        (not latents or sampling.latent_scale is not None, "the model's recipe.yaml has no data.latent_scale; add it"),
        (not latents or sampling.vae is not None, "the recipe names no VAE to decode its latents; give --vae"),
    ):
        if not good:
            raise InputError(complaint)
    check_guidance(recipe, sampling.cfg_scale, "give --cfg-scale 1")
    return sampling


def labels_for(indices: torch.Tensor, sampling: Sampling, num_classes: int) -> torch.Tensor:
    """The label of each sample index, int64 [N]."""
    if sampling.labels == "balanced":
        return indices % num_classes
    draws = uniform(sampling.seed, Stream.SAMPLE_LABEL, indices).double()
    return (draws * num_classes).long()


def load_decoder(sampling: Sampling, recipe: Recipe) -> nn.Module | None:
    """The VAE that decodes the model's samples, float32, on the CPU; None in pixel space."""
    if sampling.vae is None:
        return None
    vae = load_vae(sampling.vae)
    channels = latent_space(vae).channels
    if channels != recipe.model.in_channels:
        raise InputError(
            f"the VAE {sampling.vae} has {channels} latent channels and the model makes "
            f"{recipe.model.in_channels}; give the VAE that encoded the training data with --vae"
        )
    known = recipe.data.vae_sha256
    if known is not None and hash_weights(vae) != known:
        raise InputError(
            f"the VAE {sampling.vae} is another one than that which encoded the training data (SHA-256 of its weights "
            f"{hash_weights(vae)[:12]}..., not {known[:12]}...); give that one with --vae"
        )
    return vae


def image_size(recipe: Recipe, vae: nn.Module | None) -> int:
    """Side of the images that the model's samples become."""
    return recipe.model.input_size * (latent_space(vae).factor if vae is not None else 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 of the same shape; the rounding that FID is computed on."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as numbers in [0, 255] that are not rounded, as DiffMoE's sampler has them."""
    return (images.float() * 127.5 + 128).clamp(0, 255)


@torch.no_grad()
def generate(
    model: nn.Module,
    recipe: Recipe,
    sampling: Sampling,
    vae: Any,
    indices: torch.Tensor,
    rounded: bool = True,
) -> torch.Tensor:
    """The samples of these indices (int64 [N] on the model's device): images uint8 [N, 3, H, W].

    Not ``rounded``, they are float32 (:func:`to_floats`).

    The model computes in the precision of its weights (moe_dit.build.to_compute), the sampler and the VAE in float32.
    """
    shape = (recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size)
    z = normal(sampling.seed, Stream.SAMPLE_NOISE, indices, shape)
    x = build_flow(recipe).sample(
        model,
        z,
        labels_for(indices, sampling, recipe.model.num_classes),
        steps=sampling.steps,
        method=sampling.method,
        cfg_scale=sampling.cfg_scale,
        cfg_interval=sampling.cfg_interval,
    )
    if vae is not None and sampling.latent_scale is not None:
        x = decode(vae, x / sampling.latent_scale + (sampling.latent_shift or 0.0))
    if not torch.isfinite(x).all():
        raise InputError("the model's samples are not finite; was it trained to divergence?")
    return to_uint8(x) if rounded else to_floats(x)
