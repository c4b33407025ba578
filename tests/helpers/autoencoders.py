"""Autoencoders of each kind with few random weights, and images for them."""

from pathlib import Path

import numpy as np
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image


def kl(stages, **settings):
    """An AutoencoderKL that halves stages - 1 times."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    return AutoencoderKL(block_out_channels=[8] * stages, norm_num_groups=4, **blocks, **settings)


def flux_like():
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return kl(4, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **quant)


def dc():
    channels = {f"{part}_block_out_channels": (8, 8, 16, 16, 32, 32) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1,) * 6 for part in ("encoder", "decoder")}
    return AutoencoderDC(
        in_channels=3, latent_channels=32, attention_head_dim=8, scaling_factor=0.41, **channels, **layers
    )


def tiny():
    stages = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
    return AutoencoderTiny(**stages, **blocks, scaling_factor=0.7, shift_factor=-0.2)


def vq():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return VQModel(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=6, vq_embed_dim=5, **blocks)


def write_images(folder: Path, width: int, height: int) -> Path:
    """Four smooth random images in two classes."""
    generator = np.random.default_rng(0)
    for i in range(4):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder
