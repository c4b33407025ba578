"""A training command that cannot work says so in one line, and writes nothing."""

import os
import shutil

import pytest

from helpers import ROOT, refused
from helpers.older_run import SHARDS
from helpers.small import flags_of


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data", "nowhere"], "no folder of shards nowhere"),
        (["--recipe", "digitz"], "did you mean digits?"),
        (["--ds", "ds_configs/zero9.json"], "no DeepSpeed configuration ds_configs/zero9.json; there are"),
        (["--ds", "ds_configs/zero2_ep8.json"], "start a multiple of 8 (deepspeed --num_gpus 8 ...)"),
        (["--ds", "ds_configs/zero2_ep16.json"], "does not divide the 8 experts of recipe digits"),
        (["--set", "model.moe.num_experts=6", "--ds", "ds_configs/zero2_ep8.json"], "choose one of 1, 2, 3, 6"),
        (["--steps", "0"], "--steps 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--set", "model.num_classes=3"], "has 10 classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capfd, flags, line):
    assert line in refused(capfd, "jobs/train.py", *flags_of(tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ('{"train_batch_size": 8}', "train_batch_size is decided by the recipe"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4; it should be 0, 1, 2 or 3"),
        ('{"expert_parallel": {"enabled": true, "autoep_size": 0}}', "it should be a positive integer"),
        ('{"expert_parallel": {"enabled": true, "top_k": 2}}', "not top_k; remove it"),
    ],
)
def test_a_wrong_deepspeed_file(tmp_path, capfd, content, line):
    (tmp_path / "ds.json").write_text(content)
    assert line in refused(capfd, "jobs/train.py", *flags_of(tmp_path / "run"), "--ds", tmp_path / "ds.json")


def test_a_truncated_shard(tmp_path, capfd):
    shards = shutil.copytree(SHARDS, tmp_path / "shards")
    os.truncate(shards / "shard-000000.tar", 5000)
    error = refused(capfd, "jobs/train.py", *flags_of(tmp_path / "run"), "--data", shards)
    assert "shard-000000.tar has 5000 bytes instead of" in error
