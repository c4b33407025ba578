"""Training of the other families: a pixel model is the same run on any topology; DiffMoE's ranks share thresholds."""

import json
from pathlib import Path

import pytest
import torch
from helpers import finish, start_training

from moe_dit import load_model
from moe_dit.export import export_checkpoint


def train(ranks: int, ds: str, shards: Path, run: Path, *flags: str) -> list[dict]:
    finish(start_training(ranks, ds, shards, run, *flags), run)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
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


@pytest.mark.slow
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
