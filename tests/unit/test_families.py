"""Training of the other families: a pixel model is the same run on any topology; DiffMoE's ranks share thresholds."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from helpers import finish, start_training
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import export_checkpoint
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.runtime.ranks import World


def train(ranks: int, ds: str, shards: Path, run: Path, *flags: str) -> list[dict]:
    finish(start_training(ranks, ds, shards, run, *flags), run)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_pixel_model_trains_alike_on_one_rank_and_on_two_that_share_its_experts(pixels, tmp_path):
    flags = ("--recipe", "digits_pixels", "--steps", "4", "--set", "optimizer.warmup_steps=2")
    one = train(1, "zero1_ep1", pixels, tmp_path / "one", *flags)
    two = train(2, "zero2_ep2", pixels, tmp_path / "two", *flags)
    assert [r["lr"] for r in one] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    exported = {}
    for run in ("one", "two"):
        for weights in ("model", "ema", "ema2"):
            export_checkpoint(tmp_path / run, weights, tmp_path / "models" / run / weights)
            exported[run, weights] = load_model(tmp_path / "models" / run / weights).state_dict()
    for weights in ("model", "ema", "ema2"):
        for name, value in exported["one", weights].items():
            torch.testing.assert_close(exported["two", weights][name], value, rtol=1e-3, atol=1e-5)
    name = "blocks.1.mlp.experts.down_bias"
    # Weights start at 0 and move; the slower average lags behind more.
    norms = [exported["one", weights][name].norm() for weights in ("ema", "ema2", "model")]
    assert 0 < norms[0] < norms[1] < norms[2]


def test_diffmoe_trains_on_two_ranks_and_continues(latents, tmp_path):
    flags = ("--recipe", "digits_diffmoe", "--set", "checkpoint.every=2")
    whole = train(2, "zero1_ep1", latents, tmp_path / "whole", *flags, "--steps", "4")
    half = tmp_path / "whole/checkpoints/step_00000002"
    records = train(2, "zero1_ep1", latents, tmp_path / "run", *flags, "--steps", "4", "--resume", str(half))
    assert [r["step"] for r in records] == [3, 4]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in whole[2:]], rel=1e-6)
    assert {r["moe_imbalance"] for r in whole} == {1.0}
    export_checkpoint(tmp_path / "whole", "ema", tmp_path / "model")
    threshold = load_model(tmp_path / "model").state_dict()["blocks.1.mlp.expert_threshold"]
    # An exponential mean of quantiles near one half, from 0: 0.5 (1 - 0.95^4).
    assert threshold.mean().item() == pytest.approx(0.5 * (1 - 0.95**4), rel=0.3)


@pytest.fixture(scope="module")
def diffmoe_in_micro_batches(latents):
    """Three steps of four micro-batches in one plain process: losses, and the thresholds after.

    Each micro-batch finds the thresholds as the step found them, and the step leaves the mean of what they left.
    """
    recipe = load_recipe("digits_diffmoe", ["global_batch_size=32", "max_micro_batch_size=8"])
    manifest, model = read_manifest(latents), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertChoiceMoE)]
    stream, losses = batches(replace(recipe, steps=3), manifest, 8, 0, World()), []
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
        losses.append(loss)
    return losses, {name: value for name, value in model.named_buffers() if name.endswith("expert_threshold")}


@pytest.mark.parametrize(("ranks", "mode"), [(1, "blocks"), (1, "experts"), (2, "none")])
def test_thresholds_move_once_a_step(diffmoe_in_micro_batches, latents, tmp_path, ranks, mode):
    """However a step is cut into micro-batches and ranks, and whether layers are computed twice."""
    losses, thresholds = diffmoe_in_micro_batches
    flags = ["global_batch_size=32", "max_micro_batch_size=8", f"activation_checkpointing={mode}"]
    flags = ["--recipe", "digits_diffmoe", "--steps", "3", *(f"--set={flag}" for flag in flags)]
    got = train(ranks, "zero1_ep1", latents, tmp_path / "run", *flags)
    assert [record["loss"] for record in got] == pytest.approx(losses, rel=1e-5)
    export_checkpoint(tmp_path / "run", "model", tmp_path / "model")
    state = load_model(tmp_path / "model").state_dict()
    assert len(thresholds) == 3
    for name, want in thresholds.items():
        torch.testing.assert_close(state[name], want, rtol=1e-5, atol=0)
