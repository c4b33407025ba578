"""An autoencoder's latents of 512 pixels, from images by way of a trained network to a sample."""

import sys

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from helpers import ENV, ROOT, TIMEOUT, call, export, forks
from helpers.autoencoders import kl, write_images
from moe_dit.manifest import read_manifest
from moe_dit.randomness import Stream, normal


def test_512_pixels_in_latent_space(tmp_path):
    """From images to a sample: 64 x 64 latents by a downsampling of 8."""
    torch.manual_seed(0)
    kl(4, layers_per_block=1, scaling_factor=0.7, shift_factor=0.1).save_pretrained(tmp_path / "vae")
    images, shards = write_images(tmp_path / "images", 560, 512), tmp_path / "shards"
    call("data_prep.encode_latents", "--images", images, "--vae", tmp_path / "vae", "--size", 512, "--out", shards)
    assert read_manifest(shards).sample_shape == [8, 64, 64]

    sizes = ["model.input_size=64", "model.depth=2", "model.hidden_size=16", "model.num_heads=2"]
    sizes += ["model.moe.num_experts=4", "model.moe.expert_width=8", "model.num_classes=2", "data.vae=null"]
    flags = [f"--data={shards}", f"--out={tmp_path / 'run'}", "--steps=2", "--recipe=digits"]
    flags += [part for key in [*sizes, "global_batch_size=2"] for part in ("--set", key)]
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", *flags]
    forks.run(command, cwd=ROOT, env=ENV, check=True, timeout=TIMEOUT)
    network = export(tmp_path / "run", tmp_path / "model", "model")
    data = yaml.safe_load((tmp_path / "model/recipe.yaml").read_text())["data"]
    assert (data["latent_scale"], data["latent_shift"], data["vae"]) == (0.7, 0.1, str(tmp_path / "vae"))

    flags = ("--num", 1, "--steps", 1, "--cfg-scale", 1, "--out", tmp_path / "samples")
    call("eval.sample", "--model", tmp_path / "model", *flags)
    z = normal(0, Stream.SAMPLE_NOISE, torch.tensor([0]), (4, 64, 64))
    with torch.no_grad():
        x = z + network(z, torch.zeros(1), torch.tensor([0]))[:, :4]
        image = AutoencoderKL.from_pretrained(tmp_path / "vae").decode(x / 0.7 + 0.1).sample[0].clamp(-1, 1)
    got = np.asarray(Image.open(tmp_path / "samples/images/000000_0.png"))
    assert got.shape == (512, 512, 3)
    assert np.abs(got - ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1
