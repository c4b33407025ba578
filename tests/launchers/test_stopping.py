"""Being told to stop under true launchers: a run finishes its step, saves, and says so."""

import json
import os
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, TIMEOUT, free_port, kill, ranks_of, started, wait_for_step
from helpers.small import assert_stopped_as_asked, flags_of

TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL
LAUNCH = "deepspeed.launcher.launch"


def start(launcher: str, run: Path, workers: int = 0) -> subprocess.Popen:
    """Two ranks that would train on and on; "launch" is what DeepSpeed's runner starts on a node."""
    here = urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launchers = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
        "launch": ["-m", LAUNCH, f"--world_info={here}", "--master_addr", "127.0.0.1"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--shutdown-timeout", "300"],
    }
    command = [sys.executable, *launchers[launcher], "--master_port", str(free_port())]
    command += ["jobs/train.py", *flags_of(run, "zero2_ep2"), "--steps=100000", "--set=checkpoint.every=50000"]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            [*command, f"--set=data.workers={workers}"],
            cwd=ROOT, env=ENV, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "number", "target", "workers", "status"),
    [
        # DeepSpeed's runner dies of what it does not handle; its ranks see it, and save.
        ("deepspeed", TERM, "launcher", 0, -TERM),
        # torchrun tells its ranks, and what they have started, and they end it.
        ("torchrun", TERM, "launcher", 2, -USR1),
        # The same under what tests/ranks/test_stopping.py has stand-ins for.
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("deepspeed", USR1, "group", 0, -USR1),
                ("deepspeed", USR1, "launcher", 2, -USR1),
                ("deepspeed", KILL, "launcher", 0, -KILL),
                ("deepspeed", TERM, "rank", 0, 75),
                ("torchrun", USR1, "launcher", 0, -USR1),
                ("torchrun", TERM, "rank", 0, -USR1),
            ]
        ),
    ],
)
def test_told_to_stop_in_any_way_it_saves(shared, tmp_path, launcher, number, target, workers, status):
    run = tmp_path / "run"
    process = start(launcher, run, workers)
    try:
        wait_for_step(run, 4, process)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        if target == "group":
            os.killpg(process.pid, number)
        else:
            (ranks[1] if target == "rank" else process).send_signal(number)
        assert process.wait(TIMEOUT) == status
        _, left = psutil.wait_procs(ranks, timeout=TIMEOUT)
        assert not left
    finally:
        kill(process)
    assert_stopped_as_asked(run, shared)


def test_a_rank_that_dies_takes_the_others_down(tmp_path):
    launcher = start("launch", tmp_path / "run")
    try:
        wait_for_step(tmp_path / "run", 1, launcher)
        ranks = ranks_of(launcher)
        next(rank for rank in ranks if "--local_rank=1" in rank.cmdline()).kill()
        assert launcher.wait(TIMEOUT) != 0
        _, left = psutil.wait_procs(ranks, timeout=TIMEOUT)
        assert not left
    finally:
        kill(launcher)


def test_ranks_of_a_launcher_that_died_before_they_began_end_too(tmp_path):
    run = tmp_path / "run"
    runner = start("deepspeed", run)
    try:
        while not (family := started(runner, LAUNCH)):
            time.sleep(0.01)
        runner.kill()
        _, left = psutil.wait_procs(family, timeout=TIMEOUT)  # the second launcher ends when its ranks have
        assert not left
    finally:
        kill(runner)
    assert (run / "checkpoints/latest").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
