"""Other people's files: what a run replaces and removes, and copies of runs."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from helpers.older_run import OLD
from moe_dit.events import events, record
from moe_dit.metrics import Metrics
from moe_dit.recipe_file import load_recipe
from moe_dit.run_folder import check_run_folder, clear_unfinished
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.rank_log import RankLog
from moe_dit.sinks import kept_id
from moe_dit.status import read_status, write_status

FOREIGN = {
    "config.yaml": "my: own\n",
    "status.json": '{"mine": 1}\n',
    "events.jsonl": '{"what": 1}\n',
    "metrics.jsonl": "[1, 2]\n",
    "starts.json": "[1]\n",
    "history.json": "{",
    "memory.json": "[]",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_no_run_wrote_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text(FOREIGN[name])
    with pytest.raises(InputError, match=rf"holds {name}, which no training run wrote; move it away, or give another"):
        check_run_folder(tmp_path)


def test_another_programs_checkpoints_are_not_taken_for_a_runs(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("global_step100")
    with pytest.raises(InputError, match=r"holds checkpoints/latest, which no training run wrote"):
        check_run_folder(tmp_path)


def test_a_run_is_known_whatever_of_it_is_damaged(tmp_path):
    assert not check_run_folder(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    assert not check_run_folder(tmp_path)
    assert check_run_folder(OLD / "run")  # of an earlier version
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    (run / "config.yaml").write_text("my: own")
    (run / "metrics.jsonl").write_bytes(bytes(100))
    assert check_run_folder(run)  # by its checkpoint
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"holds config\.yaml, which no training run wrote"):
        check_run_folder(run)
    early = tmp_path / "killed early"
    early.mkdir()
    write_status(early, "training")
    (early / ".lock").touch()
    (early / "metrics.jsonl").touch()
    assert check_run_folder(early)


OTHERS = {
    "a trainer's": {"metrics.jsonl": '{"step": 1, "loss": 2.0}', "config.yaml": "lr: 1"},
    "its checkpoint": {"checkpoints/step_00000003/model.pt": "mine"},
    "a checkpoint that is a file": {"checkpoints/step_00000003": "mine"},
    "a run's status, another's settings": {
        "status.json": '{"state": "done", "time": 1.0}',
        "config.yaml": "my: own",
    },
    "a status beside": {"status.json": '{"state": "done", "mine": 1}'},
    "a recipe of the same keys": {"config.yaml": "model: 1\nflow: 2\noptimizer: 3\nema: 4\nmax_micro_batch_size: 5\n"},
    "a picture": {"looks/step_00000003.png": "mine"},
    "checkpoints that are a file": {"checkpoints": "mine"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_like_a_runs_is_refused(case, tmp_path):
    for name, text in OTHERS[case].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"which no training run wrote|is not a folder"):
        check_run_folder(tmp_path)


def test_only_a_runs_own_unfinished_files_are_removed(tmp_path):
    ours = [".status.json.7.tmp", ".config.yaml.8.tmp", "checkpoints/.step_00000003.tmp", "checkpoints/.latest.9.tmp",
            "checkpoints/.step_00000003.old.0a1b2c3d.tmp", "looks/.step_00000004.png.7.tmp"]  # fmt: skip
    theirs = [
        ".notes.tmp",
        ".cache.tmp/data",
        "checkpoints/.mine.tmp",
        "checkpoints/.step_backup.tmp",
        ".config.yaml.mine.tmp",
    ]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_unfinished(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(theirs)


def test_a_copy_by_hard_links_writes_nothing_into_the_original(tmp_path):
    original, copied = tmp_path / "original", tmp_path / "copied"
    shutil.copytree(OLD / "run", original)
    record(original, "queued")
    write_status(original, "training")
    (original / "logs").mkdir()
    (original / "logs" / "rank_00000.log").write_text("before\n")
    (original / "metrics_superseded.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    shutil.copytree(original, copied, copy_function=os.link)
    metrics = Metrics(copied, 2, load_recipe("digits", ["metrics.sinks=[]"]), 2)  # of three steps
    metrics._unwritten = [b'{"step": 3, "loss": 2.0}\n']
    metrics.close()
    record(copied, "started")
    write_status(copied, "failed")
    with RankLog(copied, torch.device("cpu")) as log:
        log.write("after")
    assert before == {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    assert (copied / "metrics.jsonl").read_text().endswith('{"step": 3, "loss": 2.0}\n')
    assert (copied / "metrics_superseded.jsonl").read_text().count("\n") == 2
    assert [event["what"] for event in events(copied)][-2:] == ["queued", "started"]
    assert read_status(copied)["state"] == "failed"


def test_a_copied_run_is_another_to_a_tracker_and_a_moved_one_is_not(tmp_path, capsys):
    def name(folder: str, new: str) -> str:
        return kept_id(tmp_path / folder / "wandb_id", new)

    (tmp_path / "a").mkdir()
    assert name("a", "first") == name("a", "second") == "first"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().err == ""
    assert name("b", "third") == name("b", "fourth") == "third"
    assert "is a copy of" in capsys.readouterr().err
    os.rename(tmp_path / "a", tmp_path / "c")
    assert name("c", "fifth") == name("c", "sixth") == "first"
    (tmp_path / "a").symlink_to(tmp_path / "c")  # the same folder by another path
    assert name("a", "seventh") == "first"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "wandb_id").write_text("eighth")  # of an earlier version
    assert name("old", "ninth") == name("old", "tenth") == "eighth"


def test_a_link_that_is_superfluous_goes_and_what_it_leads_to_stays(tmp_path):
    from moe_dit.runtime.files import discard, remove_folder

    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "state.json").write_text("{}")
    for remove in (remove_folder, discard):
        (tmp_path / "link").symlink_to(archive)
        remove(tmp_path / "link")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]
    remove_folder(tmp_path / "not there")
    assert (archive / "state.json").read_text() == "{}"


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    from moe_dit.runtime import files

    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace = os.replace

    def refusing(source, target):
        if Path(source).name == "new":
            raise OSError(30, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refusing)
    with pytest.raises(OSError, match="Read-only"):
        files.publish_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "old"
