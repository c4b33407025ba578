"""Runs begin from the weights that they are given."""

import shutil

import pytest
import torch

from helpers import finish, losses, start_training
from helpers.small_jit import MIXTURE, flags_from, recipe, save_mixture
from moe_dit import load_model
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint
from moe_dit.flow import build_flow
from moe_dit.manifest import read_manifest
from moe_dit.runtime.ranks import World


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model")


def test_a_run_begins_from_given_weights_on_any_topology(mixture, pixels, tmp_path):
    folder = shutil.copytree(mixture, tmp_path / "model")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start_training(2, "zero2_ep2", pixels, two, *flags_from(folder)), two)
    log = finish(start_training(1, "zero1_ep1", pixels, one, *flags_from(folder)), one)
    assert f"from {folder}" in log
    assert len(losses(one)) == 2 and losses(two) == pytest.approx(losses(one), rel=1e-6)

    plain, manifest = recipe(*MIXTURE), read_manifest(pixels)
    flow, model = build_flow(plain), load_model(folder).train()
    inputs = training_inputs(
        plain, next(batches(plain, manifest, plain.global_batch_size, 0, World())), Latents.of(plain, manifest)
    )
    with torch.no_grad():
        loss = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=flow.times(inputs["u"]))["loss"]
    assert losses(one)[0] == pytest.approx(loss.item(), rel=1e-6)

    shutil.rmtree(folder)  # a run that continues has no more need of it
    finish(start_training(1, "zero1_ep1", pixels, one, *flags_from(folder, steps=3)), one)
    assert len(losses(one)) == 3


def test_master_weights_averages_and_biases_are_the_given_ones_to_the_last_bit(mixture, pixels, tmp_path):
    """In bf16, where DeepSpeed rounds what it is given; a step too small to be seen leaves everything in its place."""
    run, still = tmp_path / "run", ["--set", "precision=bf16", "--set", "optimizer.lr=1e-30"]
    finish(start_training(2, "zero2_ep2", pixels, run, *flags_from(mixture, steps=1), *still), run)
    want = load_model(mixture).state_dict()
    for weights in ("model", "ema", "ema2"):
        export_checkpoint(run, weights, tmp_path / weights)
        for name, value in load_model(tmp_path / weights).state_dict().items():
            assert torch.equal(value, want[name]), name
