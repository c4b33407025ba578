"""Elastic agents, as jobs/slurm/job.sh starts them on each node: a run goes on with the nodes that are left."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT, TIMEOUT, finish, free_port, kill, losses, ranks_of, start_training, told, wait_for

STEPS = 120
SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
SMALL = [word for change in [*SMALL, "global_batch_size=16"] for word in ("--set", change)]


def agent(port: int, shards: Path, run: Path) -> subprocess.Popen:
    """One node's torchrun with two ranks, started as jobs/slurm/job.sh does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2"]
    command += ["--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command += ["--rdzv-conf=last_call_timeout=10,join_timeout=180"]
    command += [
        "--signals-to-handle=SIGHUP,SIGINT",
        "--shutdown-timeout=300",
        "jobs/train.py",
        "--recipe",
        "digits",
    ]
    command += ["--ds", "ds_configs/zero2_ep2.json", "--data", str(shards), "--out", str(run), "--steps", str(STEPS)]
    command += [*SMALL, "--set", "checkpoint.every=20"]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log, start_new_session=True)


def saved(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 before the first."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0


@pytest.mark.long  # in the ten minutes SLURM loses a node (tests/cluster), and torchrun a rank (test_joining.py)
def test_a_run_goes_on_with_the_nodes_that_are_left(latents, tmp_path):
    """Two agents: a rank is killed, and all start again; then an agent and its ranks, and the other's go on."""
    run, whole, port = tmp_path / "run", tmp_path / "whole", free_port()
    log = Path(f"{run}.log")
    agents = [agent(port, latents, run)]
    try:
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(("127.0.0.1", port)) == 0, "the agents' store", log)
        agents.append(agent(port, latents, run))

        # Just after a save: a rank that dies during one makes it fail, which ends the run on all nodes.
        wait_for(lambda: saved(run) >= 20, "a checkpoint", log)
        assert "digits on 4 ranks" in log.read_text()
        ranks_of(agents[1])[0].send_signal(signal.SIGKILL)
        begun = saved(run)
        wait_for(lambda: told(run).count("started") == 2 and saved(run) > begun, "a second start", log)
        assert log.read_text().count("digits on 4 ranks") == 2
        theirs = ranks_of(agents[1])
        os.killpg(agents[1].pid, signal.SIGKILL)
        for rank in theirs:
            rank.send_signal(signal.SIGKILL)
        wait_for(lambda: told(run).count("started") == 3, "a third start", log)
        assert agents[0].wait(TIMEOUT) == 0, log.read_text()[-5000:]
    finally:
        for process in agents:
            kill(process)
    assert log.read_text().count("digits on 2 ranks") == 1
    finish(start_training(1, "zero1_ep1", latents, whole, "--steps", str(STEPS), *SMALL), whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)
