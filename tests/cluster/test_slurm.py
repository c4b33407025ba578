"""The job scripts on a real SLURM of two nodes, as a user submits them, with a site's file that says CPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, TIMEOUT, finish, last_step, losses, start_training, told, wait_for
from moe_dit.events import events
from tools.slurm import Slurm, missing

pytestmark = [
    pytest.mark.skipif(
        bool(missing()), reason=f"there is no SLURM here ({', '.join(missing())}): apt-get install slurm-wlm munge"
    ),
]

SITE = """\
GPUS_PER_NODE=0
RANKS_PER_NODE=1
CPUS_PER_NODE=2
MEMORY=0
GPU=h100-80g
TIME=10
SAVE_SECONDS=20
JOIN_SECONDS=60
enter() { export PATH="$TEST_HOST" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1; [ -z "$NOBODY_SETS_THIS" ]; }
IN=()
SRUN=(--comment=container)
IMAGES=/nowhere
VAE=/nowhere
REFERENCE=/nowhere
INCEPTION=none
"""
SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
SMALL = [word for change in [*SMALL, "global_batch_size=16"] for word in ("--set", change)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The cluster; a socket's path must be short, so it does not lie below pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Slurm(folder) as running:
            running.env |= {"TEST_PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}
            site = tmp_path_factory.mktemp("site") / "site.sh"
            site.write_text(SITE)
            running.env["SITE"] = str(site)
            # As where Python is only in the container that flags of srun lead into: the node's own fails.
            host = tmp_path_factory.mktemp("host")
            inside = f'case "$*" in *--comment=container*) PATH=$TEST_PATH ;; esac; exec {shutil.which("srun")} "$@"'
            for name, does in (("python", "exit 97"), ("srun", inside)):
                (host / name).write_text(f"#!/bin/sh\n{does}\n")
                (host / name).chmod(0o755)
            running.env["TEST_HOST"] = f"{host}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(slurm, *arguments) -> subprocess.CompletedProcess:
    """jobs/submit.py with the site's file."""
    command = [sys.executable, "jobs/submit.py", "--site", slurm.env["SITE"], *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENV | slurm.env, capture_output=True, text=True, timeout=TIMEOUT)


def train_job(
    slurm: Slurm,
    run: Path,
    latents: Path,
    steps: int,
    *flags: str,
    nodes: int = 2,
    ds: str = "zero2_ep2",
    more: Sequence[str] = (),
) -> str:
    """Submit the training script by hand, as its head says; gives the job's number."""
    own = ["--gpus-per-node=0", "--cpus-per-task=2", f"--nodes={nodes}", f"--output={run}.out", *flags]
    training = ["--ds", f"ds_configs/{ds}.json", "--recipe", "digits", "--data", str(latents), "--out", str(run)]
    return slurm.sbatch(*own, "jobs/slurm/train.sbatch", *training, "--steps", str(steps), *SMALL, *more, cwd=ROOT)


# On however fast a machine two steps take a second: a save waits for the one before, whose 0.9 MB take two.
SLOW = ["--set", "checkpoint.every=4", "--set", "checkpoint.write_gb_per_second=0.00045"]


@pytest.fixture(scope="module")
def chain(slurm, latents, tmp_path_factory) -> tuple[list[tuple[str, str, str]], Path]:
    """Jobs that encode, train on both nodes, and evaluate: what submit.py says of each, and their folder."""
    folder = tmp_path_factory.mktemp("chain") / "a $(b) 'c' %j é"
    flags = ["--recipe", "digits", "--nodes", 2, "--ds", "ds_configs/zero2_ep2.json", "--steps", 12]
    flags += ["--images", latents.parent / "images", "--vae", latents.parent / "vae", "--size", 32]
    flags += ["--set", f"data.vae={latents.parent / 'vae'}", *SMALL, "--data", folder / "shards"]
    flags += ["--reference", latents.parent / "images", "--protocol", "fidelity", "--out", folder / "run"]
    done = submit(
        slurm, "chain", *flags, "--output", f"{str(folder).replace('%', '%%')}/%x.out", "--", "-n", 40, "--steps", 2
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"(\w+): job (\d+)(?:, when (\d+) has succeeded)?", done.stderr), folder


@pytest.fixture(scope="module")
def failing(slurm, latents, tmp_path_factory) -> tuple[str, Path]:
    """A job with a learning rate that no loss survives, and its run; it fails while other tests wait."""
    run = tmp_path_factory.mktemp("failing") / "run"
    return train_job(slurm, run, latents, 20, nodes=1, ds="zero1_ep1", more=["--set", "optimizer.lr=1e30"]), run


def lose_a_node(slurm: Slurm, job: str, run: Path, at_once: bool = False) -> None:
    """A slurmd is killed; SLURM sees it after SlurmdTimeout, or is told so."""
    wait_for((run / "checkpoints/latest").exists, "a checkpoint", Path(f"{run}.out"))
    slurm.kill_node("n2")
    if at_once:
        slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=killed")
    slurm.until_node("n2", "DOWN", 150)
    slurm.start_node("n2")  # what ran there is ended, for the job has lost the node


lose_a_node_at_once = partial(lose_a_node, at_once=True)


def run_out_of_time(slurm: Slurm, job: str, run: Path) -> None:
    """SLURM looks at limits twice a minute, and signals jobs that end within 270 s and half a minute more."""
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={slurm.minutes(job) + 5}")
    wait_for(lambda: told(run)[-1] == "requeued", "a signal", Path(f"{run}.out"))
    assert slurm.wait(job, states=("PENDING",)) == "PENDING"
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def signal_all(slurm: Slurm, job: str, run: Path) -> None:
    slurm.run("scancel", "--signal=USR1", job)


def end_the_step(slurm: Slurm, job: str, run: Path) -> None:
    """TERM is what SLURM sends when it ends a step; agents that heard nothing would start their ranks once more."""
    slurm.run("scancel", "--signal=TERM", job)


def requeue(slurm: Slurm, job: str, run: Path) -> None:
    slurm.run("scontrol", "requeue", job)


SAVED = ["started", "stopped", "requeued"]


# What each way leaves of events, where that does not depend on who notices first.
# Until SLURM sees that a slurmd is gone, two minutes at most, both ranks train on.
@pytest.mark.parametrize(
    ("ways", "steps"),
    [
        ({lose_a_node_at_once: None, run_out_of_time: SAVED}, 120),
        pytest.param(
            *({lose_a_node: None, signal_all: SAVED, end_the_step: SAVED, requeue: SAVED}, 400),
            marks=pytest.mark.long,
        ),
    ],
    ids=["lost-late", "others"],
)
def test_a_job_that_is_stopped_in_every_way_ends_as_if_nobody_had(slurm, latents, tmp_path, request, ways, steps):
    run, whole = tmp_path / "run", tmp_path / "whole"
    job = train_job(slurm, run, latents, steps, "--time=60", "--signal=B:USR1@270", more=SLOW)
    log = Path(f"{run}.out")
    finish(start_training(2, "zero2_ep2", latents, whole, "--steps", str(steps), *SMALL), whole)

    stops: list[str] = []

    def trains() -> bool:
        return told(run) == [*stops, "started"] and last_step(run) > list(events(run))[-1]["step"] + 3

    for starts, (stop, leaves) in enumerate(ways.items(), start=2):
        wait_for(trains, "3 steps", log)
        stop(slurm, job, run)
        if stop is lose_a_node_at_once:  # from now on both nodes stay
            for other in ("failing", "chain"):  # jobs of the other tests, which run while this one's waits
                request.getfixturevalue(other)
        wait_for(lambda starts=starts: told(run).count("started") == starts, f"start {starts}", log)
        assert leaves in (None, told(run)[len(stops) : -1])
        stops = told(run)[:-1]
    assert all(event["step"] > 0 for event in list(events(run))[1:] if event["what"] == "started")

    assert slurm.wait(job, 900) == "COMPLETED", log.read_text()[-6000:]
    assert "gave up" not in told(run) and told(run)[-1] == "done"
    assert int(slurm.show(job)["Restarts"]) >= sum(leaves is not None for leaves in ways.values())
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


def test_the_chain_finishes_in_order(slurm, chain):
    """Each begins when the one before has succeeded."""
    said, folder = chain
    assert [(job, after) for job, _, after in said] == [
        ("encode", ""),
        ("train", said[0][1]),
        ("evaluate", said[1][1]),
    ]
    logs = lambda: "\n".join(log.read_text()[-3000:] for log in folder.glob("*.out"))  # noqa: E731
    assert [slurm.wait(number) for _, number, _ in said] == ["COMPLETED"] * 3, logs()
    jobs = [slurm.show(number) for _, number, _ in said]
    assert jobs[0]["EndTime"] <= jobs[1]["StartTime"] and jobs[1]["EndTime"] <= jobs[2]["StartTime"]
    assert [job["NumNodes"] for job in jobs] == ["2"] * 3
    assert "1797 samples: all good" in (folder / "encode-digits.out").read_text()
    assert len(losses(folder / "run")) == 12
    scores = json.loads((folder / "run/samples/step_00000012/metrics.json").read_text())
    assert scores["num_samples"] == 40 and scores["fid"] > 0


def test_ranks_that_srun_starts_find_each_other(slurm, latents, tmp_path):
    """Without a launcher, on nodes whose names are no hosts': two ranks on each."""
    run = tmp_path / "run"
    training = (
        f"--ds ds_configs/zero2_ep2.json --recipe digits --data {latents} --out {run} --steps 6 {' '.join(SMALL)}"
    )
    command = f"export OMP_NUM_THREADS=1; PATH=$TEST_PATH; srun python jobs/train.py {training}"
    own = ["--nodes=2", "--ntasks-per-node=2", f"--output={run}.out", "--wrap", command]
    assert slurm.wait(slurm.sbatch(*own, cwd=ROOT)) == "COMPLETED", Path(f"{run}.out").read_text()
    assert "digits on 4 ranks" in Path(f"{run}.out").read_text() and len(losses(run)) == 6


def test_a_run_that_fails_twice_in_the_same_way_stops(slurm, failing):
    """The second time at the same step is the last."""
    job, run = failing
    assert slurm.wait(job) == "FAILED"
    log = Path(f"{run}.out").read_text()
    assert told(run) == ["started", "failed", "restarted", "started", "failed", "gave up"], log[-10_000:]
    assert slurm.show(job)["Restarts"] == "0"  # the second time was in the same allocation
    assert re.search(r"give up: failed twice in the same way at step \d+: Stop: the (loss|gradient) is", log), log


def test_a_job_that_is_cancelled_stays_so(slurm, latents, tmp_path):
    """scancel without a signal is no preemption: all is saved, and nothing is queued again."""
    run = tmp_path / "run"
    job = train_job(slurm, run, latents, 100_000, nodes=1, ds="zero1_ep1")
    wait_for(lambda: last_step(run) > 3, "step 3", Path(f"{run}.out"))
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    log = Path(f"{run}.out")
    wait_for(lambda: "ends, as SLURM was asked to" in log.read_text(), "the script's end", log)
    wait_for(lambda: "stopped" in told(run), "a save", log)
    assert told(run) == ["started", "stopped"]
    assert slurm.show(job)["Restarts"] == "0"


@pytest.mark.long
def test_jobs_into_one_folder_leave_the_first_alone(slurm, latents, tmp_path):
    """An array of two jobs that train the same: one does, and goes on when a rank dies; the other and a third give up.

    Both begin before there is a folder to be held, and torchrun makes 1 of the status of what is refused.
    """
    run, other = tmp_path / "run", tmp_path / "other"
    log = lambda job: Path(f"{run}.{job}.out")  # noqa: E731
    array = train_job(slurm, run, latents, 1_000_000, "--array=0-1", f"--output={run}.%a.out", more=SLOW)
    jobs = [f"{array}_0", f"{array}_1"]
    wait_for(lambda: "FAILED" in map(slurm.state, jobs), "one that gives up", log(0))
    first = 0 if slurm.state(jobs[0]) == "RUNNING" else 1
    assert slurm.state(jobs[first]) == "RUNNING" and told(run) == ["started"]
    assert log(1 - first).read_text().count("give up: another training run is writing into") == 1
    assert "restarted" not in told(run) and slurm.show(jobs[1 - first])["Restarts"] == "0"

    wait_for((run / "checkpoints/latest").exists, "a checkpoint", log(first))
    third = train_job(slurm, run, latents, 1_000_000, f"--output={other}.out", nodes=1, ds="zero1_ep1")
    assert slurm.wait(third) == "FAILED"
    assert re.search(r"error: another training run is writing into \S+; wait for it", Path(f"{other}.out").read_text())
    assert told(run) == ["started"]

    for process in psutil.process_iter(["cmdline", "environ"]):
        words, given = process.info["cmdline"] or [], process.info["environ"] or {}
        if "jobs/train.py" in words[1:4] and str(run) in words and given.get("RANK") == "0":
            process.kill()
    wait_for(lambda: told(run)[1:].count("started") == 1, "another start", log(first))
    begun = list(events(run))[-1]["step"]
    wait_for(lambda: last_step(run) > begun, "a step", log(first))
    slurm.run("scancel", "--batch", "--signal=USR1", jobs[first])  # its script tells its step
    wait_for(lambda: told(run)[-1] == "requeued", "an end", log(first))
    assert slurm.wait(jobs[first], states=("PENDING",)) == "PENDING"
    slurm.run("scancel", jobs[first])
    assert slurm.show(jobs[1 - first])["Restarts"] == "0"  # the array's number is one job's too
    assert {event["job"] for event in events(run)} == {f"test/{slurm.show(jobs[first])['JobId']}"}
    assert "gave up" not in told(run)
