"""Training DiffMoE: its ranks share thresholds, which move once a step and continue."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from helpers import finish, losses, records, start_training
from helpers.small_runs import TINY, begin, sets, train
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.runtime.ranks import World

DEEPER = [*TINY, "model.depth=4"]  # two layers of experts
MICRO = [*DEEPER, "max_micro_batch_size=4"]  # four of a step


def test_diffmoe_trains_on_two_ranks_and_continues(latents, tmp_path):
    flags = [
        "--recipe=digits_diffmoe",
        "--steps=4",
        *sets(["model.depth=2", "global_batch_size=16", "checkpoint.every=2"]),
    ]
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start_training(2, "zero1_ep1", latents, whole, *flags), whole)
    half = whole / "checkpoints/step_00000002"
    finish(start_training(2, "zero1_ep1", latents, run, *flags, "--resume", str(half)), run)
    assert [record["step"] for record in records(run)] == [3, 4]
    assert [record["loss"] for record in records(run)] == pytest.approx(losses(whole)[2:], rel=1e-6)
    assert set(losses(whole, "moe_imbalance")) == {1.0}
    export_checkpoint(tmp_path / "whole", "ema", tmp_path / "model")
    threshold = load_model(tmp_path / "model").state_dict()["blocks.1.mlp.expert_threshold"]
    # An exponential mean of quantiles near one half, from 0: 0.5 (1 - 0.95^4).
    assert threshold.mean().item() == pytest.approx(0.5 * (1 - 0.95**4), rel=0.3)


@pytest.fixture(scope="module")
def diffmoe_in_micro_batches(latents):
    """Three steps of four micro-batches in one plain process: losses, and the thresholds after.

    Each micro-batch finds the thresholds as the step found them, and the step leaves the mean of what they left.
    """
    recipe = load_recipe("digits_diffmoe", MICRO)
    manifest, model = read_manifest(latents), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertChoiceMoE)]
    stream, history = batches(replace(recipe, steps=3), manifest, 4, 0, World()), []
    for _ in range(3):
        adam.zero_grad()
        found = [layer.expert_threshold.clone() for layer in layers]
        left, loss = [torch.zeros_like(threshold) for threshold in found], 0.0
        for batch in islice(stream, 4):
            inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
            for layer, threshold in zip(layers, found, strict=True):
                layer.expert_threshold.copy_(threshold)
            part = Flow().loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=inputs["u"])["loss"] / 4
            part.backward()
            loss += part.item()
            for layer, threshold in zip(layers, left, strict=True):
                threshold += layer.expert_threshold / 4
        for layer, threshold in zip(layers, left, strict=True):
            layer.expert_threshold.copy_(threshold)
        adam.step()
        history.append(loss)
    return history, {name: value for name, value in model.named_buffers() if name.endswith("expert_threshold")}


@pytest.mark.parametrize(("ranks", "mode"), [(1, "blocks"), (1, "experts"), (2, "none")])
def test_thresholds_move_once_a_step(diffmoe_in_micro_batches, latents, tmp_path, ranks, mode):
    """However a step is cut into micro-batches and ranks, and whether layers are computed twice."""
    history, thresholds = diffmoe_in_micro_batches
    run, flags = tmp_path / "run", sets([*MICRO, f"activation_checkpointing={mode}"])
    finish(start_training(ranks, "zero1_ep1", latents, run, "--recipe=digits_diffmoe", "--steps=3", *flags), run)
    assert losses(run) == pytest.approx(history, rel=1e-5)
    export_checkpoint(run, "model", tmp_path / "model")
    state = load_model(tmp_path / "model").state_dict()
    assert len(thresholds) == 2
    for name, want in thresholds.items():
        torch.testing.assert_close(state[name], want, rtol=1e-5, atol=0)


def test_thresholds_of_expert_choice_continue(tmp_path):
    """Predictors that say 3/4 or 1/2 for every token: a threshold goes a twentieth of the way there a step."""
    keys = [*TINY, "checkpoint.every=1", "optimizer.lr=1e-30"]

    def predictions(model):
        layer = model.blocks[1].mlp
        layer.capacity_predictor[2].weight.zero_()
        layer.capacity_predictor[2].bias.copy_(torch.tensor([3.0] + 7 * [1.0]).log())
        layer.expert_threshold.fill_(0.9)

    begin(tmp_path / "begin", "digits_diffmoe", keys, 0.2, predictions)
    flags = ["--recipe=digits_diffmoe", *sets([*keys, f"initial_weights={tmp_path / 'begin'}"])]
    for steps in (1, 2):
        train(tmp_path / "run", steps, *flags)
        export_checkpoint(tmp_path / "run", "model", tmp_path / str(steps))
        got = load_model(tmp_path / str(steps)).state_dict()["blocks.1.mlp.expert_threshold"]
        kept = 0.95**steps
        want = [0.9 * kept + 0.75 * (1 - kept)] + 7 * [0.9 * kept + 0.5 * (1 - kept)]
        assert got.tolist() == pytest.approx(want, abs=1e-6)
