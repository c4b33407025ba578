"""Being told to stop, under the real launchers: however it is told, a run finishes its step, saves, and says so."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, STEPS, free_port, kill, losses, ranks_of, wait_for_step
from helpers.tasks import environments

TERM, USR1, INT, HUP, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGKILL

LAUNCH = "deepspeed.launcher.launch"


def start(launcher: str, latents: Path, run: Path, workers: int) -> list[subprocess.Popen]:
    """Two ranks that would train on and on; "tasks" starts each by itself, as srun does."""
    flags = ["--ds", "ds_configs/zero2_ep2.json", "--recipe", "digits", "--data", str(latents), "--out", str(run)]
    flags += ["--steps", "5000", "--set", "checkpoint.every=4000", "--set", f"data.workers={workers}"]
    port = str(free_port())
    each = [ENV]
    if launcher == "deepspeed":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    elif launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:
        command = [sys.executable]
        each = environments(2, port, ENV)
    with open(f"{run}.log", "a") as log:
        return [
            subprocess.Popen(
                [*command, "jobs/train.py", *flags], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
            for env in each
        ]


@pytest.mark.parametrize(
    ("launcher", "number", "target", "workers", "status"),
    [
        # DeepSpeed's runner and torchrun die of what they do not handle; their ranks see it, and save.
        ("deepspeed", TERM, "launcher", 0, -TERM),
        ("deepspeed", USR1, "launcher", 2, -USR1),
        ("deepspeed", TERM, "rank", 0, 75),
        ("deepspeed", USR1, "group", 2, -USR1),
        ("deepspeed", KILL, "launcher", 0, -KILL),
        ("torchrun", TERM, "launcher", 2, -USR1),
        ("torchrun", USR1, "launcher", 0, -USR1),
        ("torchrun", TERM, "rank", 0, -USR1),
        # What SLURM's --signal does to the tasks of srun.
        ("tasks", USR1, "all", 2, 75),
    ],
)
def test_told_to_stop_in_any_way_it_saves(two_ranks, latents, tmp_path, launcher, number, target, workers, status):
    run = tmp_path / "run"
    processes = start(launcher, latents, run, workers)
    try:
        wait_for_step(run, 4, processes[0])
        ranks = [rank for process in processes for rank in ranks_of(process)]
        assert len(ranks) == 2
        if target == "group":
            os.killpg(processes[0].pid, number)
        else:
            told = {"launcher": processes, "rank": ranks[1:], "all": processes}[target]
            for process in told:
                process.send_signal(number)
        assert [process.wait(120) for process in processes] == [status] * len(processes)
        _, left = psutil.wait_procs(ranks, timeout=120)
        assert not left
    finally:
        for process in processes:
            kill(process)
    log = Path(f"{run}.log").read_text()
    done = len(losses(run))
    assert 4 <= done < 4000
    assert (run / "checkpoints/latest").read_text() == f"step_{done:08d}\n"
    assert log.count(f"stopped as asked after step {done}, saved in") == 1
    assert "Traceback" not in log
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    both = min(done, STEPS)
    assert losses(run)[:both] == pytest.approx(losses(two_ranks)[:both], rel=1e-6)


def launchers(runner):
    """The second launchers of a deepspeed command; another child may end while it is looked at."""
    found = []
    for child in psutil.Process(runner).children():
        with suppress(psutil.NoSuchProcess):
            if LAUNCH in child.cmdline():
                found.append(child)
    return found


def test_ranks_of_a_launcher_that_died_before_they_began_end_too(latents, tmp_path):
    run = tmp_path / "run"
    (runner,) = start("deepspeed", latents, run, 0)
    try:
        while not (family := launchers(runner.pid)):
            time.sleep(0.01)
        runner.kill()
        _, left = psutil.wait_procs(family, timeout=120)  # the second launcher ends when its ranks have
        assert not left
    finally:
        kill(runner)
    assert (run / "checkpoints/latest").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("number", [INT, HUP])
def test_a_terminal_that_asks_or_closes_is_a_request_too(latents, tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(run), "--steps", "5000"]
    # Tests started in the background or under nohup inherit signals that are ignored.
    heeded = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heeded
    )
    assert process.stderr is not None
    try:
        wait_for_step(run, 2, process)
        process.stderr.close()  # nobody reads what it says any more
        process.send_signal(number)
        assert process.wait(60) == 75
    finally:
        kill(process)
    assert (run / "checkpoints/latest").read_text() == f"step_{len(losses(run)):08d}\n"


def test_a_run_waits_for_one_that_is_saving(latents, tmp_path):
    """A launcher that was told to stop may be gone before its ranks: the same command must not be refused then."""
    run = tmp_path / "run"
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", "--data", str(latents), "--out", str(run)]
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); time.sleep(14)"
    run.mkdir()
    (run / "status.json").write_text('{"state": "stopping"}')
    process = subprocess.Popen([sys.executable, "-c", holder, str(run / ".lock")])
    time.sleep(0.5)
    command = [sys.executable, "jobs/train.py", *flags, "--steps", "1"]
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, timeout=120)
    assert process.wait() == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done"
