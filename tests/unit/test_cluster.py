"""What a job decides when its ranks have ended; that a run goes on with what is left; what jobs/submit.py refuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, call, ds_file, finish, free_port, kill, last_step, losses, start_training, told, wait_for
from moe_dit import load_recipe
from moe_dit.cluster.outcome import EARLY, SILENT, decide, gives_up
from moe_dit.cluster.sizes import fits, node_range
from moe_dit.cluster.submit import checkpoint_bytes, fill
from moe_dit.events import events, record
from moe_dit.status import write_status

SMALL = ["--set", "model.depth=2", "--set", "global_batch_size=16"]


def history(*told: tuple) -> list[dict]:
    """Events from (what, step, message)."""
    return [{"time": 0.0, "what": what, "step": step, "message": message} for what, step, message in told]


START = ("started", 100, "")
NAN = ("failed", 120, "Stop: the loss is nan at step 120")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([START, NAN], None),
        ([START, NAN, START, NAN], "failed twice in the same way at step 120: Stop: the loss is nan at step 120"),
        ([START, NAN, START, ("failed", 121, "Stop: the loss is nan at step 121")], None),
        ([START, NAN, START, ("failed", 120, "OSError: disk")], None),
        ([START, NAN, ("queued", None, "SLURM job 7"), START, NAN], None),
        ([START, NAN, START, ("stopped", 119, ""), START, NAN], None),
        # Ports and addresses are other ones each time.
        (
            [
                START,
                ("failed", 9, "RuntimeError: closed by [1.2.3.4]:50"),
                START,
                ("failed", 9, "RuntimeError: closed by [1.2.3.5]:61"),
            ],
            "failed twice in the same way at step 9: RuntimeError: closed by [1.2.3.5]:61",
        ),
        ([("failed", None, EARLY), ("failed", None, EARLY)], f"failed twice in the same way: {EARLY}"),
        ([START, ("failed", 130, SILENT), START, ("failed", 130, SILENT)], None),
        ([START, ("failed", 130, SILENT)] * 3, f"{SILENT}, 3 times since its last checkpoint (step 100)"),
        # torchrun ended its ranks, which could not say so.
        ([START, START, START, ("failed", 130, SILENT)], f"{SILENT}, 3 times since its last checkpoint (step 100)"),
        ([START, ("failed", 130, SILENT), ("started", 200, ""), ("failed", 210, SILENT)] * 2, None),
    ],
)
def test_a_run_that_does_not_get_on_is_given_up(told, why):
    assert gives_up(history(*told)) == why


@pytest.fixture
def run(tmp_path):
    """A run's folder that has recorded seven steps, and a line that a kill cut short."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']))
    return folder


def test_what_follows_from_how_a_run_ended(run):
    began = int(time.time())  # as `date +%s`
    record(run, "started", "", 0)
    assert decide(run, began, 137, False, 1) == ("again", f"{SILENT} (status 137)")
    assert [(e["what"], e["step"], e["message"]) for e in events(run)][1:] == [("failed", 7, SILENT)]
    assert decide(run, began, 137, True, 1)[0] == "requeue"
    write_status(run, "stopped", exit_status=75, message="saved")
    assert decide(run, began, 1, False, 1) == ("requeue", "saved")
    write_status(run, "failed", exit_status=2, message="InputError: bad shard")
    assert decide(run, began, 1, False, 1) == ("give up", "InputError: bad shard")
    write_status(run, "failed", exit_status=1, message="OSError: disk")
    assert decide(run, began, 1, False, 1) == ("again", "OSError: disk")
    write_status(run, "done", exit_status=0)
    assert decide(run, began, 1, False, 1)[0] == "done"


def test_an_older_end_is_not_taken_for_this_one(run):
    """status.json and events of a start before say nothing of this one, which never came to its own."""
    write_status(run, "done", exit_status=0)
    record(run, "started", "", 0)
    began = time.time() + 1
    assert decide(run, began, 1, False, 1)[0] == "again"
    told = list(events(run))[-1]
    assert (told["what"], told["message"], told["step"]) == ("failed", EARLY, None)
    assert decide(run, began + 1, 1, False, 2) == ("give up", f"failed twice in the same way: {EARLY}")


def test_a_run_that_never_began_is_tried_twice(tmp_path):
    assert decide(tmp_path / "none", 0.0, 1, False, 1)[0] == "again"
    assert decide(tmp_path / "none", 0.0, 1, False, 2) == ("give up", EARLY)


@pytest.mark.parametrize(
    ("nodes", "ranks", "span"),
    [(1, 1, None), (2, 1, (2, 2)), (3, 1, (2, 2)), (4, 1, (4, 4)), (2, 2, (1, 2)), (3, 2, (1, 2)), (8, 2, (8, 8))],
)
def test_numbers_of_nodes_that_divide(tmp_path, nodes, ranks, span):
    """digits: batches of 64, 8 experts; two expert-parallel ranks."""
    assert node_range(load_recipe("digits"), str(ds_file(tmp_path, 2, 2)), nodes, ranks) == span


def test_what_divides(tmp_path):
    recipe = load_recipe("digits")
    assert [n for n in range(1, 17) if fits(recipe, str(ds_file(tmp_path, 2, 2)), n)] == [2, 4, 8, 16]


# --- restarts ---------------------------------------------------------------------------------------------------------


def agent(port: int, shards: Path, run: Path, steps: int) -> subprocess.Popen:
    """One node's torchrun with two ranks, started as jobs/slurm/job.sh does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command += ["--rdzv-conf=last_call_timeout=10,join_timeout=180"]
    command += ["--signals-to-handle=SIGHUP,SIGINT", "--shutdown-timeout=300", "jobs/train.py", "--recipe", "digits"]
    command += ["--ds", "ds_configs/zero2_ep2.json", "--data", str(shards), "--out", str(run), "--steps", str(steps)]
    command += [*SMALL, "--set", "checkpoint.every=20"]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log, start_new_session=True)


def of_agent(process: subprocess.Popen) -> list[psutil.Process]:
    """An agent's ranks."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [member for member in found if "jobs/train.py" in member.cmdline()[1:4]]


def test_a_run_goes_on_with_the_nodes_that_are_left(latents, tmp_path):
    """Two agents of two ranks: a rank is killed, and all start again; then an agent and its ranks, and two go on."""
    run, whole, port = tmp_path / "run", tmp_path / "whole", free_port()
    log = Path(f"{run}.log")
    agents = [agent(port, latents, run, 150)]
    try:
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(("127.0.0.1", port)) == 0, "the agents' store", log, 180)
        agents.append(agent(port, latents, run, 150))

        wait_for(lambda: last_step(run) >= 25, "step 25", log, 180)
        assert "digits on 4 ranks" in log.read_text()
        of_agent(agents[1])[0].send_signal(signal.SIGKILL)
        wait_for(lambda: told(run).count("started") == 2 and last_step(run) >= 45, "a second start", log, 180)
        assert log.read_text().count("digits on 4 ranks") == 2
        killed = time.monotonic()
        os.killpg(agents[1].pid, signal.SIGKILL)
        for rank in of_agent(agents[1]):
            rank.send_signal(signal.SIGKILL)
        wait_for(lambda: told(run).count("started") == 3, "a third start", log, 180)
        print(f"two ranks of four were killed; the other two went on {time.monotonic() - killed:.0f} s later")
        assert agents[0].wait(180) == 0, log.read_text()[-5000:]
    finally:
        for process in agents:
            kill(process)
    assert log.read_text().count("digits on 2 ranks") == 1
    finish(start_training(2, "zero2_ep2", latents, whole, "--steps", "150", *SMALL), whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


# --- jobs/submit.py ---------------------------------------------------------------------------------------------------

SITE = """\
GPUS_PER_NODE=0; RANKS_PER_NODE=2; CPUS_PER_NODE=4; MEMORY=0; GPU=a100-40g; TIME=10; SAVE_SECONDS=20
IMAGES=/nowhere; VAE=/nowhere; REFERENCE=/nowhere; INCEPTION=/nowhere
"""


@pytest.fixture
def site(tmp_path):
    file = tmp_path / "site.sh"
    file.write_text(SITE)
    return file


@pytest.fixture
def good(latents, tmp_path):
    """A training job that can work."""
    flags = ["train", "--recipe", "digits", "--ds", "ds_configs/zero2_ep2.json", "--data", latents]
    return [*flags, "--set", f"data.vae={latents.parent / 'vae'}", "--out", tmp_path / "a run"]


def submit(site: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/submit.py", "--site", site, *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture
def refused(site, capfd):
    """The one line that jobs/submit.py, in this process, says of what it refuses."""

    def refused(*arguments) -> str:
        assert call("jobs.submit", "--site", site, *arguments) == 2
        out, err = capfd.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and not out
        return err.removeprefix("error: ").removesuffix("\n")

    return refused


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--nodes", 3], "3 x 2 = 6 ranks: global_batch_size 64 of recipe digits is not a multiple of the 6 ranks; "
                         "with 2 ranks a node it divides on 1, 2, 4, 8, 16"),
        (["--data", "/nowhere"], "no folder of shards /nowhere; python -m data_prep.encode_latents (or pack_pixels) "),
        (["--set", "data.vae=/nowhere/vae"], "there is no VAE /nowhere/vae: no folder, and no name of the hub such as "
                                             "stabilityai/sd-vae-ft-mse; give --set data.vae=NAME_or_DIR"),
        (["--nodes", 0], "--nodes 0: it should be at least 1"),
        (["--spare", -1], "--spare -1: it should be at least 0"),
        (["--recipe", "digit"], "no recipe named 'digit'; did you mean digits?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_not_submitted(good, refused, tmp_path, change, line):
    assert refused(*good, *change).startswith(line)
    assert not (tmp_path / "a run").exists()


def test_a_vae_that_the_hub_does_not_give_is_not_submitted(good, site):
    done = submit(site, *good, "--set", "data.vae=some/vae")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: there is no VAE some/vae: no folder and not in the hub's cache here, and the hub cannot be asked "
        "(OfflineModeIsEnabled); give --set data.vae=NAME_or_DIR\n"
    )


def test_what_does_not_fit_is_not_submitted(site, refused, tmp_path):
    """30 blocks of 16 experts, all on each of two 40 GB GPUs: 3.1e9 x 2 bytes of weights, 4 of gradients' sums, ..."""
    site.write_text(SITE.replace("GPUS_PER_NODE=0", "GPUS_PER_NODE=2"))
    flags = ["train", "--recipe", "dsmoe_3b_e16", "--ds", "ds_configs/zero1_ep1.json"]
    line = refused(*flags, "--data", tmp_path, "--out", tmp_path / "run")
    assert line.startswith("dsmoe_3b_e16 on 2 ranks does not fit a a100-40g: it would hold ")
    assert line.endswith(
        "of 40.0 GB; use more nodes, a --ds file of a higher ZeRO stage, or a smaller --set max_micro_batch_size"
    )


def test_two_checkpoints_must_have_room(good, refused, tmp_path):
    """A file system of 64 MB in memory, which the digits' checkpoints of 45 MB fill."""
    # weight, two moments and the average in float32, and a bias for each of 3 x 8 experts
    assert checkpoint_bytes(load_recipe("digits")) == 4 * (4 * 2_806_176 + 24)
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        line = refused(*good, "--out", small / "runs/run", "--dry-run")
    finally:
        subprocess.run(["umount", small], check=True)
    assert line == (
        f"no room for 2 checkpoints of 44.9 MB in {small}/runs/run: 67.1 MB are free there; make room, or give "
        "another --out"
    )


def test_a_dry_run_prints_what_would_be_submitted(good, latents, site, tmp_path):
    flags = ["--nodes", 2, "--spare", 1, "--time", "1:00", "--dry-run"]
    done = submit(site, *good, *flags, "--", "--resume", "never")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "#SBATCH --job-name=train-digits",
        "#SBATCH --nodes=3",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=1:00",
        "#SBATCH --signal=B:USR1@20",
        "export SPARE_NODES=1",
        f"export SITE={site}",
        f"set -- --ds ds_configs/zero2_ep2.json --recipe digits --data {latents} --out '{tmp_path}/a run' "
        f"--resume auto --set data.vae={latents.parent}/vae --resume never",
        'train "$@"',
    ):
        assert lines.count(line) == 1, line
    assert not any(line.startswith("#SBATCH --gpus-per-node") for line in lines)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert not (tmp_path / "a run").exists()


def test_without_slurm_nothing_is_submitted(good, refused, tmp_path, monkeypatch):
    """A PATH that leads to bash and env alone."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert refused(*good) == "there is no sbatch here: run this on a login node of the cluster, or see --dry-run"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("GPUS_PER_NODE=8\n", "does not set RANKS_PER_NODE; jobs/slurm/site.sh says what it means"),
        (SITE.replace("CPUS_PER_NODE=4", "CPUS_PER_NODE=many"), "CPUS_PER_NODE is 'many'; it should be a whole number"),
        ("if\n", "cannot be read by bash: "),
    ],
)
def test_a_wrong_site_is_told_of(good, site, refused, text, line):
    site.write_text(text)
    assert line in refused(*good)


def test_a_template_is_filled_in():
    template = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --gpus-per-node=8\n#SBATCH --requeue\n\nrun\n"
    filled = fill(template, {"nodes": "3", "gpus-per-node": None, "mem": "0"}, ["--out", "a b"], {"SITE": "/x/site.sh"})
    assert filled == (
        "#!/bin/bash\n#SBATCH --nodes=3\n#SBATCH --requeue\n#SBATCH --mem=0\n\nset -- --out 'a b'\n"
        "export SITE=/x/site.sh\n\nrun\n"
    )
