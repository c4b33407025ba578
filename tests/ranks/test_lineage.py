"""What a run continues from: branches that were left, damage, ``latest``, and --resume with a checkpoint."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helpers import ROOT, TIMEOUT, kill, losses, records, small, start_training, state_of, wait_for_step
from helpers.older_run import SHARDS
from helpers.small import LOSSES, SMALL, copy, flip, latest, names, step, train, train_here
from moe_dit import checkpoint_files, lineage, load_model
from moe_dit.checkpoint_files import check_complete, step_of
from moe_dit.data.index import ensure_index
from moe_dit.events import events
from moe_dit.export import export_checkpoint
from moe_dit.lineage import State, choose, complete_checkpoints, find_checkpoint, superfluous
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError


@pytest.fixture
def eight_steps(shared) -> Path:
    return small.eight_steps(shared)


@pytest.fixture
def branched(shared) -> Path:
    return small.branched(shared)


def test_going_back_prunes_the_branch_that_was_left_and_nothing_foreign(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    foreign = ["step_00000012.bak", "step_12", "step_of_mine"]
    for name in foreign:
        shutil.copytree(folder / step(2), folder / name)
    back = ["--resume", str(folder / step(4)), "--set=optimizer.lr=0.01", "--set=checkpoint.keep=2"]
    log = train(run, *back, "--set=checkpoint.every=2", "--steps=6")
    assert names(run) == sorted([step(4), step(6), *foreign])  # not 8, which is the newest by its step
    assert latest(run) == step(6)
    description, _ = check_complete(folder / step(6))
    first, second = description["history"]
    assert (first.first_step, first.asked, second.first_step, second.asked) == (0, False, 4, True)
    assert json.loads((run / "history.json").read_text()) == [asdict(first), asdict(second)]
    # What the branch that was left had recorded is kept beside.
    assert "the records of steps 5 to 8 moved" in log
    superseded = [json.loads(line) for line in (run / "metrics_superseded.jsonl").read_text().splitlines()]
    assert [record["step"] for record in superseded] == [5, 6, 7, 8]
    assert [record["loss"] for record in superseded] == pytest.approx(LOSSES[4:], rel=1e-6)
    assert losses(run)[:5] == pytest.approx(LOSSES[:5], rel=1e-6)
    assert losses(run)[5] != pytest.approx(LOSSES[5], rel=1e-6)  # the other learning rate


def test_an_unreadable_checkpoint_gives_way_to_an_ancestor_only(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    assert find_checkpoint(run) == folder / step(7)
    flip(folder / step(7) / ".metadata", 1000)
    assert find_checkpoint(run) == folder / step(5)
    flip(folder / step(5) / ".metadata", 1000)
    start = choose(run)
    assert start.checkpoint == folder / step(4)  # not 6, which is of the branch that was left
    assert [line.split(":")[0] for line in start.notes] == [
        f"checkpoint {folder / step(number)} cannot be read" for number in (7, 5)
    ]
    for number in (2, 4):
        flip(folder / step(number) / ".metadata", 1000)
    with pytest.raises(InputError, match=r"can be continued .*; of branches that were left there are step_00000006,"):
        choose(run)


def test_the_history_of_a_checkpoint_that_lost_it_is_known_to_the_run(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    (folder / step(7) / "state.json").write_text("{")
    assert find_checkpoint(run) == folder / step(5)
    shutil.rmtree(folder / step(5))
    assert find_checkpoint(run) == folder / step(4)
    shutil.rmtree(folder / step(7))  # which latest names
    assert find_checkpoint(run) == folder / step(4)


def test_pruning_keeps_milestones_and_the_newest_of_the_branch(branched):
    folder = branched / "checkpoints"
    description, _ = check_complete(folder / step(7))
    state = State.of(description)
    # The branch that was left has 6 and 8; 2, 4, 5 and 7 lead to the newest.
    assert [step_of(path.name) for path in superfluous(folder, state, 5, 0)] == [6]
    assert [step_of(path.name) for path in superfluous(folder, state, 3, 0)] == [6, 8, 2]
    assert [step_of(path.name) for path in superfluous(folder, state, 1, 4)] == [6, 2, 5]


@pytest.mark.parametrize(
    ("content", "note"),
    [(b"", "is empty"), (b"step_000\xff", "names 'step_000\ufffd'"), (b"step_00000099\n", "which is not there")],
)
def test_a_damaged_latest_does_not_begin_again(eight_steps, tmp_path, content, note):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_bytes(content)
    start = choose(run)
    assert start.checkpoint == run / "checkpoints" / step(8)
    assert len(start.notes) == 1 and note in start.notes[0]


def test_latest_says_which_of_a_branchs_checkpoints_is_meant(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_text(f"{step(4)}\n")
    assert find_checkpoint(run) == choose(run).checkpoint == run / "checkpoints" / step(4)
    flip(run / "checkpoints" / step(4) / "state.json", 100)  # then the one before it, not one after it
    assert find_checkpoint(run) == choose(run).checkpoint == run / "checkpoints" / step(2)


def test_a_run_with_an_empty_latest_continues_and_keeps_its_record(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_text("")
    log = train(run, "--steps=9")
    assert "latest is empty" in log and f"continuing {run / 'checkpoints' / step(8)}" in log
    assert losses(run)[:8] == losses(eight_steps)
    assert len(losses(run)) == 9 and latest(run) == step(9)
    assert not (run / "metrics_superseded.jsonl").exists()


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        shutil.rmtree(checkpoint)
    before = (run / "metrics.jsonl").read_bytes()
    done = train_here(run, "--steps=9")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"or remove {run / 'checkpoints' / 'latest'} to begin again" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoints" / "latest").unlink()
    log = train(run, "--steps=1")
    assert "the records of steps 1 to 8 moved" in log and "from the start" in log
    assert (run / "metrics_superseded.jsonl").read_bytes() == before


def test_a_requeued_job_goes_back_once(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    back = ["--resume", os.path.relpath(folder / step(4), ROOT), "--set=optimizer.lr=0.01", "--set=checkpoint.keep=1"]
    # Killed before it has saved, it goes back again ...
    process = start_training(
        1, "zero1_ep1", SHARDS, run, *SMALL, *back, "--steps=100000", "--set=checkpoint.every=50000"
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while losses(run)[:8] == losses(eight_steps) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # until the record of the old branch is cut
        wait_for_step(run, 6, process)
    finally:
        kill(process)
    assert latest(run) == step(4)
    log = train(run, *back, "--steps=6")
    assert f"continuing {folder / step(4)}" in log
    branch = losses(run)
    # ... and then not any more, though the checkpoint that it went back to is pruned.
    assert names(run) == [step(6)]
    log = train(run, *back, "--steps=8")
    assert "was gone back to before" in log and f"continuing {folder / step(6)}" in log
    assert losses(run)[:6] == branch
    # It is no command for a checkpoint that never was there.
    done = train_here(run, "--resume", str(folder / step(5)), "--steps=9")
    assert done.returncode == 2 and "no checkpoint there" in done.stderr.splitlines()[-1]


def test_going_back_again_to_the_same_step_takes_another_word(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    assert choose(run, str(folder / step(4))).checkpoint == folder / step(7)
    # Another branch, which did not come of going back to 4: one does go back.
    (folder / "latest").write_text(step(8))
    start = choose(run, str(folder / step(4)))
    assert start.checkpoint == folder / step(4) and start.history[-1].asked and start.records == 4
    # From one branch to the end of another: the record is theirs up to where they parted.
    (folder / "latest").write_text(step(7))
    start = choose(run, str(folder / step(8)))
    assert start.checkpoint == folder / step(8) and start.records == 4
    # By hand, as often as one likes.
    (folder / "latest").write_text(step(4))
    start = choose(run)
    assert start.checkpoint == folder / step(4) and not start.history[-1].asked


def test_another_runs_checkpoint_is_for_a_run_without_any(eight_steps, branched, tmp_path):
    other = tmp_path / "run"
    begin = ["--resume", str(eight_steps / "checkpoints" / step(6)), "--set=checkpoint.every=1"]
    log = train(other, *begin, "--steps=7")
    assert f"continuing {eight_steps / 'checkpoints' / step(6)}" in log
    assert [record["step"] for record in records(other)] == [7]
    log = train(other, *begin, "--steps=8")  # the requeued job
    assert f"continuing {other / 'checkpoints' / step(7)}" in log
    assert [record["loss"] for record in records(other)] == pytest.approx(LOSSES[6:], rel=1e-6)
    # What a run without a checkpoint has recorded leads nowhere.
    assert choose(tmp_path / "unsaved", begin[1]).records == 0
    # Aimed at a run that went its own way, it takes nothing from it.
    run = copy(branched, tmp_path / "own")
    before = (run / "metrics.jsonl").read_bytes()
    start = choose(run, begin[1])
    assert start.checkpoint == run / "checkpoints" / step(7) and start.records == 7
    assert "is for a run without checkpoints" in start.notes[0]
    assert choose(run, str(tmp_path / "nowhere")).checkpoint == start.checkpoint  # the other one may be gone
    assert (run / "metrics.jsonl").read_bytes() == before
    # A checkpoint with nothing left to train would be a run without a checkpoint.
    done = train_here(tmp_path / "new", "--resume", str(eight_steps / "checkpoints" / step(8)), "--steps=8")
    assert done.returncode == 2 and "has done all of the 8 steps" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("file", [".metadata", "state.json", "__0_0.distcp"])
def test_damaged_files_are_one_line_and_the_checkpoint_before(eight_steps, tmp_path, file):
    run = copy(eight_steps, tmp_path)
    damaged = run / "checkpoints" / step(8) / file
    if file == "__0_0.distcp":
        os.truncate(damaged, 100)
    else:
        flip(damaged, 700)
    log = train(run, "--steps=8")
    line = f"checkpoint {run / 'checkpoints' / step(8)} cannot be read: {file}"
    assert log.count(line) == 1 and "taking the one before it" in log and "Traceback" not in log
    assert f"continuing {run / 'checkpoints' / step(6)}" in log
    assert losses(run) == pytest.approx(LOSSES, rel=1e-6)


def test_ranks_that_meet_a_damaged_record_take_the_checkpoint_before_together(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    damaged = run / "checkpoints" / step(8)
    _, index = check_complete(damaged)
    place = next(place for key, place in index.storage_data.items() if key.fqn == "ema/x_embedder.proj.weight")
    record = (damaged / place.file).read_bytes()[place.offset : place.offset + place.length]
    flip(damaged / place.file, place.offset + record.index(b"data/0") + 300)
    log = train(run, "--steps=8", ranks=2)
    assert f"checkpoint {damaged} cannot be read: __0_0.distcp: the record at byte" in log
    assert f"continuing {run / 'checkpoints' / step(6)}" in log and "Traceback" not in log
    assert losses(run) == pytest.approx(LOSSES, rel=1e-5)


def test_the_step_is_that_of_the_folder(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    shutil.rmtree(folder / step(8))
    (folder / step(6)).rename(folder / step(8))
    assert choose(run).checkpoint == folder / step(4)
    assert "its step is 6" in choose(run).notes[0]


def refused(run: Path, *flags: str) -> str:
    """The training command, which must exit 2 with one line; gives it."""
    done = train_here(run, *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_no_readable_checkpoint_is_one_line(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    for part in run.rglob("*.distcp"):
        os.truncate(part, 100)
    done = train_here(run)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint in")
    named = run / "checkpoints" / step(6)
    assert f"{step(6)} cannot be read" in refused(tmp_path / "other", "--resume", str(named))


def test_bad_input_of_the_whole_command(tmp_path):
    assert "no checkpoint there" in refused(tmp_path / "run", "--resume", "nowhere")
    assert "no folder of shards nowhere" in refused(tmp_path / "run", "--data", "nowhere")
    assert not (tmp_path / "run").exists()


def test_another_experiment_cannot_continue_a_run(eight_steps):
    before = sorted(path.stat().st_mtime_ns for path in eight_steps.rglob("*"))
    assert "model.depth 2, not 4" in refused(eight_steps, "--set=model.depth=4")
    assert "give another --out, or --resume auto" in refused(eight_steps, "--resume", "never")
    assert "more than the 3 asked for" in refused(eight_steps, "--steps", "3")
    assert sorted(path.stat().st_mtime_ns for path in eight_steps.rglob("*")) == before


def test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_a_newer_one(
    eight_steps, tmp_path, monkeypatch, capsys
):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    (folder / "latest").write_text(step(4) + "\n")
    read = checkpoint_files.read_state

    def pruning(targets, checkpoint, *more):
        if checkpoint.name == step(4):  # the run has saved two more steps, and keeps one
            (folder / "latest").write_text(step(6) + "\n")
            shutil.rmtree(folder / step(4))
        read(targets, checkpoint, *more)

    monkeypatch.setattr(checkpoint_files, "read_state", pruning)
    export_checkpoint(run, "model", tmp_path / "model")
    line = f"checkpoint {folder / step(4)} is not there any more: its run has pruned it since (checkpoint.keep)"
    assert f"{line}; taking a newer one\n" in capsys.readouterr().err
    want = state_of(run, 6, "weight", str(run / "config.yaml"))
    assert all(
        torch.equal(value.flatten(), want[key]) for key, value in load_model(tmp_path / "model").named_parameters()
    )
    # One that was named itself is what is meant.
    (folder / "latest").write_text(step(8) + "\n")
    monkeypatch.setattr(
        checkpoint_files, "read_state", lambda targets, path: (shutil.rmtree(path), read(targets, path))
    )
    with pytest.raises(checkpoint_files.Pruned, match=r"step_00000006 is not there any more: its run has pruned it"):
        export_checkpoint(folder / step(6), "model", tmp_path / "model")


def test_the_newest_checkpoint_may_be_pruned_while_it_is_looked_for(eight_steps, tmp_path, monkeypatch):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    (folder / "latest").write_text(step(2) + "\n")
    check = lineage.check_complete

    def pruning(checkpoint):
        if checkpoint.name == step(2):
            (folder / "latest").write_text(step(8) + "\n")
            for number in (2, 4, 6):
                shutil.rmtree(folder / step(number), ignore_errors=True)
        return check(checkpoint)

    monkeypatch.setattr(lineage, "check_complete", pruning)
    assert find_checkpoint(run) == folder / step(8)


AS_BEFORE = ["--set=checkpoint.every=2", "--set=checkpoint.keep=9"]


def changed(run: Path) -> list[str]:
    """What the run's events say that it goes on with."""
    return [event["message"] for event in events(run) if event["what"] == "changed"]


def test_another_rate_is_named_and_told_and_not_taken_back_without_a_word(eight_steps, tmp_path):
    """Shards in another place, of the same content, are no change."""
    run = copy(eight_steps, tmp_path)
    data = ["--data", str(shutil.copytree(SHARDS, tmp_path / "moved"))]
    log = train(run, "--steps=9", *AS_BEFORE, *data, "--set=optimizer.lr=0.01")
    told = ["goes on with steps 9 instead of 8", "goes on with optimizer.lr 0.01 instead of 0.001"]
    assert changed(run) == told
    assert [log.count(line) for line in told] == [1, 1]
    starts = json.loads((run / "starts.json").read_text())
    assert [start["recipe"]["optimizer"]["lr"] for start in starts] == [0.001, 0.01]
    assert [start["changes"] for start in starts] == [[], told]
    description, _ = check_complete(run / "checkpoints" / step(9))
    assert (description["precision"], description["data"]["samples"]) == ("fp32", 96)

    line = refused(run, "--steps=10", *AS_BEFORE, *data)
    assert f"{step(9)} was trained with optimizer.lr 0.01, not 0.001; keep it with --set optimizer.lr=0.01," in line
    train(run, "--steps=9", *AS_BEFORE, *data, "--allow-change", "optimizer.lr")  # nothing is left to train otherwise
    assert (changed(run), len(json.loads((run / "starts.json").read_text()))) == (told, 2)
    train(run, "--steps=10", *AS_BEFORE, *data, "--allow-change", "optimizer.lr")
    more = ["goes on with steps 10 instead of 9", "goes on with optimizer.lr 0.001 instead of 0.01"]
    assert changed(run) == [*told, *more]


def test_other_data_is_named_and_told(eight_steps, tmp_path):
    run, other = copy(eight_steps, tmp_path), shutil.copytree(SHARDS, tmp_path / "other")
    flags = ["--steps=9", *AS_BEFORE, "--data", str(other)]
    manifest = json.loads((other / "manifest.json").read_text())
    classes = manifest["classes"]
    (other / "manifest.json").write_text(json.dumps(manifest | {"classes": ["1", "0", *classes[2:]]}))
    assert f"{step(8)} was trained with data.classes '0', not '1' as class 0; keep it with" in refused(run, *flags)
    (other / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][1:], "samples": 48}))
    ensure_index(read_manifest(other))  # else a line says that it is made
    assert "was trained with data.samples 96, not 48;" in refused(run, *flags)
    assert not changed(run)
    log = train(run, *flags, "--allow-change=data")
    told = "goes on with data.samples 48 instead of 96"
    assert changed(run) == ["goes on with steps 9 instead of 8", told] and log.count(told) == 1
    # Another run may begin from a checkpoint with data of its own, and is told so.
    new = tmp_path / "new"
    begin = ["--resume", str(eight_steps / "checkpoints" / step(6)), "--steps=7", *AS_BEFORE, "--data", str(other)]
    train(new, *begin)
    assert changed(new) == ["goes on with steps 7 instead of 8", told]
