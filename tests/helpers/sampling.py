"""A tiny latent model with a VAE of its own, and the images that are sampled from it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from eval.images import read_image, sample_images
from moe_dit import build_model
from moe_dit.export import save_export
from moe_dit.recipe_file import load_recipe

SIZE, CLASSES = 16, 10  # of the images; latents are half as wide


def write_model(folder: Path) -> None:
    """An exported model, ``model``, and its VAE, ``vae``, both of random weights."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, sample_size=SIZE, **blocks)
    vae.save_pretrained(folder / "vae")
    tiny = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "model.moe.num_experts=4"]
    tiny += ["model.moe.expert_width=8", "sampling.steps=3", "data.latent_scale=0.5", f"data.vae={folder / 'vae'}"]
    recipe = load_recipe("digits", tiny)
    network = build_model(recipe)
    with torch.no_grad():
        for weight in network.parameters():  # the last layer starts as zeros: samples would all be noise
            weight.add_(0.1 * torch.randn_like(weight))
    save_export(network, recipe, folder / "model")


def pictures(folder: Path) -> dict[str, torch.Tensor]:
    """The samples in a folder of eval.sample, by their files' names."""
    return {image.file.name: read_image(image).int() for image in sample_images(folder / "images")}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Equal up to one grey level: kernels may round otherwise with another number of threads."""
    assert got.keys() == want.keys()
    assert max((got[name] - want[name]).abs().max().item() for name in want) <= 1
