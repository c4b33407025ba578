"""Two commands and one folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, small, wait_for, wait_for_step
from helpers.small import LOSSES, train_here

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
        before = (run / "config.yaml").read_bytes()
        done = train_here(run, code=f"TRIES = {str(tmp_path / 'tries')!r}{TRIES}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: another training run is writing")
        assert (run / "config.yaml").read_bytes() == before
    finally:
        kill(first)


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_waits_for_one_that_is_saving(tmp_path):
    """A launcher that was told to stop may be gone before its ranks: the same command must not be refused then."""
    run, tries = tmp_path / "run", tmp_path / "tries"
    run.mkdir()
    (run / "status.json").write_text('{"state": "stopping"}')
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = forks.Popen([sys.executable, "-c", HOLDER, str(run / ".lock")], cwd=ROOT, env=ENV, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
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
