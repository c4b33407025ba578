"""Which checkpoint of a run is exported."""

import json
import shutil

import pytest

from helpers.older_run import OLD
from moe_dit.export import export_checkpoint, load_export


@pytest.fixture
def taken_back(tmp_path):
    """The recorded run at step 3, which `latest` names, with a checkpoint of step 9 left over from before."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    left = shutil.copytree(run / "checkpoints/step_00000003", run / "checkpoints/step_00000009")
    description = json.loads((left / "state.json").read_text())
    description |= {"step": 9, "recipe": description["recipe"] | {"name": "left"}}
    (left / "state.json").write_text(json.dumps(description))
    assert (run / "checkpoints/latest").read_text() == "step_00000003\n"
    return run


def test_latest_says_which_checkpoint_is_exported(taken_back, tmp_path):
    export_checkpoint(taken_back, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "digits"
    (taken_back / "checkpoints/latest").write_text("step_00000009\n")
    export_checkpoint(taken_back, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "left"
