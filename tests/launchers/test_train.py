"""The training command by DeepSpeed's launcher and by itself; torchrun starts it in test_stopping.py."""

import subprocess
import sys

import pytest

from helpers import ENV, ROOT, TIMEOUT, finish, forks, losses, start_training
from helpers.small_runs import SHARDS, SMALL, sets, train_plainly
from moe_dit import load_recipe


def test_deepspeed_starts_it(plain, latents, tmp_path):
    """Expert-parallel, on digits' own network, as in the README."""
    run = tmp_path / "run"
    finish(start_training(2, "zero2_ep2", latents, run, "--steps", "3", launcher="deepspeed"), run)
    assert losses(run) == pytest.approx(plain[0][:3], rel=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(plain[1][:3], rel=1e-4)


def test_one_rank_needs_no_launcher(tmp_path):
    """The command for a small network, as somebody would type it."""
    run = tmp_path / "run"
    command = ["jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe=digits", "--steps=2"]
    command += ["--data", str(SHARDS), "--out", str(run), *sets(SMALL)]
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENV, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            forks.kill(process)
    assert process.returncode == 0, output[-5000:]
    assert losses(run) == pytest.approx(train_plainly(load_recipe("digits", SMALL), SHARDS, 2).losses, rel=1e-5)
