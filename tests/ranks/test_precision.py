"""Looks in bf16."""

import numpy as np
from PIL import Image

from helpers import call, export, finish, start_training
from helpers.networks import network
from moe_dit import load_recipe
from moe_dit.export import save_export

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]


def test_a_look_in_bf16_is_what_sampling_the_export_gives(latents, tmp_path):
    """To the grey level: weights, buffers and arithmetic are those of training."""
    run = tmp_path / "run"
    recipe = load_recipe("digits", SMALL)
    save_export(network(recipe), recipe, tmp_path / "begin")
    settings = [
        *SMALL,
        f"initial_weights={tmp_path / 'begin'}",
        "precision=bf16",
        "global_batch_size=16",
        "sampling.steps=3",
        "looks.every=4",
        "looks.samples=10",
    ]
    settings += [f"data.vae={latents.parent / 'vae'}"]
    flags = ["--steps", "4", *(f"--set={setting}" for setting in settings)]
    finish(start_training(1, "zero1_ep1", latents, run, *flags), run)
    export(run, tmp_path / "model", "ema")
    assert call("eval.sample", "--model", tmp_path / "model", "--num", 10, "--out", tmp_path / "samples") == 0
    want = np.asarray(Image.open(tmp_path / "samples" / "samples.png")).astype(int)
    got = np.asarray(Image.open(run / "looks" / "step_00000004.png")).astype(int)
    assert got.shape == want.shape and abs(got - want).max() <= 2
