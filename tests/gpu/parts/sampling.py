"""Sampling as eval.sample does it: the plain network, captured, compiled; and the VAE's decoder."""

from typing import Any

import torch
from diffusers import AutoencoderKL

from data_prep.autoencoder import decode
from eval.captured import captured
from moe_dit.bench import moved
from moe_dit.build import build_model, to_compute
from moe_dit.parallel.compile import compile_blocks
from parts.context import Context

# Stable Diffusion's, with weights that mean nothing.
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
IMAGES = 128  # both halves of guidance: 256 at once


def run(context: Context) -> None:
    for name in ("dsmoe_s_e16", "dsmoe_b_e16"):
        with context.attempt(name):
            network(context, name)
    with context.attempt("VAE"):
        decoder(context)


@torch.no_grad()
def network(context: Context, name: str) -> None:
    """Images a second: an evaluation of both halves of guidance is one of 250."""
    recipe = context.recipe(name, "precision=bf16", batch=2 * IMAGES)
    count = recipe.global_batch_size
    model = to_compute(moved(build_model(recipe, context.device)), recipe, context.device)
    shape = recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size
    z = torch.randn(count, *shape, device=context.device)
    t = torch.rand(count, device=context.device)
    y = torch.arange(count, device=context.device) % recipe.model.num_classes
    steps = recipe.sampling.steps

    def told(how: str, work: Any) -> None:
        seconds = context.seconds(lambda: work(z, t, y), 5)
        context.tell(f"{name}, {how}: an evaluation of {count}", seconds * 1e3, "ms")
        context.tell(f"{name}, {how}: {steps} Euler steps with guidance", count / 2 / seconds / steps, "images/s")

    told("plain", model)
    if context.device.type == "cuda":
        told("captured", captured(model, recipe, context.device))
    if context.time_for(f"{name}, compiled", 15):
        want = model(z, t, y)
        compile_blocks(model, backend="aot_eager" if context.dry else "inductor")
        told("compiled", model)
        context.tell(f"{name}, compiled: output beside plain", ((model(z, t, y) - want).norm() / want.norm()).item())


@torch.no_grad()
def decoder(context: Context) -> None:
    """Latents to images of 256 pixels, in float32, with TF32 as cuDNN would by itself, and in bf16."""
    sizes = {**VAE, "block_out_channels": (32,) * 4} if context.dry else VAE
    vae = AutoencoderKL(**sizes).to(context.device).eval()
    latents = torch.randn(2 if context.dry else 32, 4, *[4 if context.dry else 32] * 2, device=context.device)
    exact = decode(vae, latents)
    context.tell("VAE, float32", len(latents) / context.seconds(lambda: decode(vae, latents), 2), "images/s")
    torch.backends.cudnn.allow_tf32 = True
    rough = torch.cat([vae.decode(part).sample for part in latents.split(16)])
    context.tell("VAE, TF32: largest difference of values in [-1, 1]", (rough - exact).abs().max().item())
    rate = len(latents) / context.seconds(lambda: [vae.decode(part) for part in latents.split(16)], 2)
    context.tell("VAE, TF32", rate, "images/s")
    low = vae.bfloat16()
    rate = len(latents) / context.seconds(lambda: [low.decode(part.bfloat16()) for part in latents.split(16)], 2)
    context.tell("VAE, bf16", rate, "images/s")
