"""Two commands and one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, small, wait_for, wait_for_step
from helpers.small import LOSSES, train_here
from moe_dit.cluster.outcome import decide, note_begin
from moe_dit.events import JOB, events, record
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.lock import Held, lock_folder
from moe_dit.status import read_status, write_status

# Nobody waits for a run that goes on; each try to lock leaves a byte in a file beside the run.
TRIES = """
import fcntl, moe_dit.status
moe_dit.status.ENDING_SECONDS = 0.0
lockf = fcntl.lockf
def counted(*arguments):
    with open(TRIES, "a") as file:
        file.write(".")
    lockf(*arguments)
fcntl.lockf = counted
"""


def test_two_runs_into_one_folder_are_refused(tmp_path):
    run = tmp_path / "run"
    first = small.start(run, "--steps=20000", "--set=checkpoint.every=2", code=small.stands_still(after=3))
    try:
        wait_for_step(run, 1, first)
        names = ("config.yaml", "events.jsonl", "status.json", "starts.json", "history.json", "ranks.json")
        content = lambda: [(run / name).read_bytes() for name in names if (run / name).exists()]  # noqa: E731
        before = content()
        done = train_here(run, code=f"TRIES = {str(tmp_path / 'tries')!r}{TRIES}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: another training run is writing")
        assert content() == before
        start = json.loads((run / "history.json").read_text())[-1]["attempt"]
        assert {event["start"] for event in events(run)} == {start} == {read_status(run)["start"]}
    finally:
        kill(first)


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def hold(run: Path) -> subprocess.Popen:
    """A process that holds a run's folder until it is written to."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = forks.Popen([sys.executable, "-c", HOLDER, str(run / ".lock")], cwd=ROOT, env=ENV, **pipes)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A run that job c/1 trains, whose folder a process of it holds; and that process. Nobody waits for others."""
    monkeypatch.setattr("moe_dit.status.ENDING_SECONDS", 0.0)
    monkeypatch.setenv(JOB, "c/1")
    run = tmp_path / "run"
    run.mkdir()
    record(run, "started", "", 3, "a")
    write_status(run, "training", "a")
    holder = hold(run)
    yield run, holder
    kill(holder)


@pytest.mark.parametrize("job", ["c/2", ""], ids=["another job", "by hand"])
@pytest.mark.parametrize("status", [1, 2, 137])
def test_a_job_beside_a_run_that_trains_writes_nothing_and_gives_up(held, monkeypatch, job, status):
    """Whatever torchrun makes of the status, and whether it is told to make room."""
    run, _ = held
    monkeypatch.setenv(JOB, job)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
    with pytest.raises(Held, match=f"^another training run is writing into {run}; wait for it, or give another --out$"):
        note_begin(run, 1, True, "SLURM job 2")
    for attempt, leaving in ((1, False), (2, True)):
        decision = decide(run, 0.0, status, leaving, attempt, note=True)
        assert decision[0] == "give up" and decision[1].startswith("another training run is writing into")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == before


def test_a_job_waits_for_its_own_ranks(held, monkeypatch):
    """Their launcher has ended, and they are saving: what they say then is what counts."""
    run, holder = held

    def end(_: float) -> None:
        if holder.poll() is None:
            write_status(run, "stopped", "a", message="saved")
            record(run, "stopped", "saved", 5, "a")
            holder.communicate("")

    monkeypatch.setattr("moe_dit.runtime.lock.time.sleep", end)
    assert decide(run, 0.0, 1, False, 1, note=True) == ("requeue", "saved")
    assert [event["what"] for event in events(run)] == ["started", "stopped", "requeued"]


def test_a_job_that_is_to_make_room_does_not_wait(held):
    """Its own ranks are saving still; where they have not ended, nothing is noted."""
    run, _ = held
    assert decide(run, 0.0, 1, True, 1, note=True) == ("requeue", "told to make room")
    assert [event["what"] for event in events(run)] == ["started"]


def test_a_run_waits_for_one_that_is_saving(tmp_path):
    """A launcher that was told to stop may be gone before its ranks: the same command must not be refused then."""
    run, tries = tmp_path / "run", tmp_path / "tries"
    run.mkdir()
    (run / "status.json").write_text('{"state": "stopping", "time": 1.0}')
    holder = hold(run)
    try:
        waiting = small.start(run, "--steps=1", code=f"TRIES = {str(tries)!r}{TRIES}")
        try:

            def tried() -> bool:
                return tries.exists() and tries.stat().st_size > 1

            wait_for(lambda: tried() or waiting.poll() is not None, "a second try", Path(f"{run}.log"))
            assert tried(), Path(f"{run}.log").read_text()
            holder.communicate("")
            assert waiting.wait(TIMEOUT) == 0
        finally:
            kill(waiting)
    finally:
        kill(holder)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert losses(run) == pytest.approx(LOSSES[:1], rel=1e-6)


def test_a_copy_by_hard_links_has_a_lock_of_its_own(tmp_path):
    run, copied = tmp_path / "run", tmp_path / "copied"
    lock_folder(run, "another").close()
    shutil.copytree(run, copied, copy_function=os.link)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = forks.Popen([sys.executable, "-c", HOLDER, str(run / ".lock")], cwd=ROOT, env=ENV, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another is writing into"):  # or into what it is a copy of
            lock_folder(copied, "another")
    finally:
        kill(holder)
    at_once = HOLDER.replace("LOCK_EX)", "LOCK_EX | fcntl.LOCK_NB)")
    with lock_folder(copied, "another"):
        holder = forks.Popen([sys.executable, "-c", at_once, str(run / ".lock")], cwd=ROOT, env=ENV, **pipes)
        try:
            assert holder.stdout.readline() == "held\n"
        finally:
            kill(holder)
