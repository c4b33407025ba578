"""Which checkpoint of a run is exported."""

from helpers.older_run import taken_back
from moe_dit.export import export_checkpoint, load_export


def test_latest_says_which_checkpoint_is_exported(tmp_path):
    run = taken_back(tmp_path)
    export_checkpoint(run, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "digits"
    (run / "checkpoints/latest").write_text("step_00000009\n")
    export_checkpoint(run, "ema", tmp_path / "model")
    assert load_export(tmp_path / "model")[1].name == "left"
