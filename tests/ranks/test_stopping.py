"""Being told to stop: however it is told, a run finishes its step, saves, and says so."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, ranks_of, small, wait_for_step
from helpers.small import LOSSES, assert_stopped_as_asked, flags_of, latest, launcher_named, step

TERM, USR1, INT, HUP, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGKILL


def test_told_to_stop_it_saves_and_exits_75(tmp_path):
    run, done = tmp_path / "run", 0
    flags = ["--steps=100000", "--set=checkpoint.every=50000"]
    flags += ["--set=checkpoint.write_gb_per_second=0.000001"]  # half an hour, which a run told to stop has not
    command = [sys.executable, "jobs/train.py", *flags_of(run), *flags]
    for number in (TERM, USR1):  # the second continues the first
        process = forks.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
        try:
            wait_for_step(run, done + 2, process)
            process.send_signal(number)
            _, err = process.communicate(timeout=TIMEOUT)
        finally:
            kill(process)
        assert process.returncode == 75, err
        assert err.splitlines()[-1].startswith("stopped as asked after step ") and "Traceback" not in err
        assert len(losses(run)) > done
        done = len(losses(run))
        assert latest(run) == step(done)
    assert losses(run)[:8] == pytest.approx(LOSSES[:done], rel=1e-5)


@pytest.mark.parametrize(
    ("launcher", "number", "target", "status"),
    [
        # What SLURM's --signal does to the tasks of srun.
        ("srun", USR1, "ranks", 75),
        # Some launchers pass on to no other rank what one was sent.
        ("srun", TERM, "rank", 75),
        # A launcher that dies without a word to its ranks; tests/launchers has true ones.
        ("deepspeed", KILL, "launcher", -KILL),
        ("torchrun", USR1, "launcher", -USR1),
    ],
)
def test_told_to_stop_in_any_way_it_saves(shared, tmp_path, launcher, number, target, status):
    run = tmp_path / "run"
    flags = ["--steps=100000", "--set=checkpoint.every=50000"]
    process = small.start(run, *flags, ranks=2, launcher=launcher_named(launcher, tmp_path))
    try:
        wait_for_step(run, 4, process)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        for told in {"launcher": [process], "rank": ranks[1:], "ranks": ranks}[target]:
            told.send_signal(number)
        ended = process.wait(TIMEOUT)
        _, left = psutil.wait_procs(ranks, timeout=TIMEOUT)
        assert not left
    finally:
        kill(process)
    assert ended == status, Path(f"{run}.log").read_text()
    assert_stopped_as_asked(run, shared)


HEEDED = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


@pytest.mark.parametrize("number", [INT, HUP])
def test_a_terminal_that_asks_or_closes_is_a_request_too(tmp_path, number):
    run = tmp_path / "run"
    script = ["-c", HEEDED + small.RUN_TRAINING]  # under nohup tests inherit that it is ignored
    command = [sys.executable, *script, *flags_of(run), "--steps=100000", "--set=checkpoint.every=50000"]
    process = forks.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        wait_for_step(run, 2, process)
        process.stderr.close()  # nobody reads what it says any more
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 75
    finally:
        kill(process)
    assert latest(run) == step(len(losses(run)))
