"""A run that was begun by an earlier version of the project continues to the losses it would have had."""

import json
import shutil

import pytest

from helpers import finish, losses, start_training
from helpers.older_run import FLAGS, OLD


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero2_ep2"), (1, "zero1_ep1")])
def test_format_1_continues(tmp_path, ranks, ds):
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    flags = [f"--set={flag}" for flag in FLAGS] if ranks == 2 else ["--recipe", str(OLD / "run" / "config.yaml")]
    log = finish(start_training(ranks, ds, OLD / "shards", run, "--steps", "8", *flags), run)
    assert "continuing" in log and "step_00000003" in log
    assert losses(run) == pytest.approx(json.loads((OLD / "losses.json").read_text()), rel=1e-6)
