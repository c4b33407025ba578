"""What several test files need: real digits as latents and as pixels, and the runs that others are held against."""

import os
from pathlib import Path

import pytest

from budget import Budget

# What imports torch is imported where it is used: of several test processes the first runs no test. Before:
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # test processes that each take every core slow each other down several times


def pytest_configure(config):
    config.pluginmanager.register(Budget(config))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all test processes of this run of pytest have in common, for :func:`helpers.once`."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def latents(shared) -> Path:
    """All digits as latent shards, through an autoencoder fitted for a few steps."""
    from data_prep import digits
    from helpers import call, once

    def make(folder: Path) -> None:
        digits.write_images(folder / "images")
        digits.write_autoencoder(folder / "images", folder / "vae", steps=60, seed=0)
        flags = (
            f"--images {folder}/images --vae {folder}/vae --size 32 --shard-size 512 --out {folder}/shards --workers 0"
        )
        assert call("data_prep.encode_latents", *flags.split()) == 0

    return once(shared, "latents", make) / "shards"


@pytest.fixture(scope="session")
def pixels(shared) -> Path:
    """All digits as pixel shards."""
    from data_prep import digits
    from helpers import call, once

    def make(folder: Path) -> None:
        digits.write_images(folder / "images")
        flags = f"--images {folder}/images --size 32 --out {folder}/shards --workers 0"
        assert call("data_prep.pack_pixels", *flags.split()) == 0

    return once(shared, "pixels", make) / "shards"


@pytest.fixture(scope="session")
def plain(latents):
    """The same steps in one plain torch process: losses, gradient norms and EMA."""
    from dataclasses import replace

    import torch

    from helpers import STEPS
    from moe_dit import build_model, load_recipe
    from moe_dit.data import Latents, batches, training_inputs
    from moe_dit.flow import Flow
    from moe_dit.manifest import read_manifest
    from moe_dit.runtime.ranks import World

    recipe = replace(load_recipe("digits"), steps=STEPS)
    manifest, model = read_manifest(latents), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    history, norms = [], []
    for batch in batches(recipe, manifest, recipe.global_batch_size, 0, World()):
        inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
        loss = Flow().loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=inputs["u"])["loss"]
        adam.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item())
        adam.step()
        for name, weight in model.named_parameters():
            ema[name] = 0.995 * ema[name] + 0.005 * weight.detach()
        history.append(loss.item())
    return history, norms, ema


@pytest.fixture(scope="session")
def two_ranks(latents, shared) -> Path:
    """An uninterrupted run of STEPS steps on 2 expert-parallel ranks; to be read, not changed."""
    from helpers import STEPS, finish, once, start_training

    def make(folder: Path) -> None:
        flags = ["--steps", str(STEPS), "--set", "checkpoint.every=4"]
        finish(start_training(2, "zero2_ep2", latents, folder / "run", *flags), folder / "run")

    return once(shared, "two_ranks", make) / "run"
