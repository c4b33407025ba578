"""A run that was begun by an earlier version of the project continues to the losses it would have had."""

import json
import shutil

import pytest
from helpers import ROOT, finish, losses, start_training

OLD = ROOT / "tests/golden/run_format_1"
# The flags that the old command was given; its config.yaml says the same.
FLAGS = [
    "model.depth=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.moe.expert_width=16",
    "global_batch_size=16",
]
FLAGS += ["checkpoint.every=3", "optimizer.warmup_steps=4", "balance.rate=0.01", "optimizer.clip_grad_norm=1.0"]
FLAGS += ["ema.second_decay=0.9"]


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero2_ep2"), (1, "zero1_ep1")])
def test_format_1_continues(tmp_path, ranks, ds):
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    flags = [f"--set={flag}" for flag in FLAGS] if ranks == 2 else ["--recipe", str(OLD / "run" / "config.yaml")]
    log = finish(start_training(ranks, ds, OLD / "shards", run, "--steps", "8", *flags), run)
    assert "continuing" in log and "step_00000003" in log
    assert losses(run) == pytest.approx(json.loads((OLD / "losses.json").read_text()), rel=1e-6)
