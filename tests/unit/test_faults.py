"""Training that is killed, told to stop, fed rubbish or left without disk, under the real launcher."""

import os
import runpy
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from helpers import ENV, ROOT, STEPS, export, finish, kill, losses, ranks_of, start_training, wait_for_step
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.randomness import permutation


def test_a_killed_run_goes_on_from_its_newest_checkpoint(two_ranks, latents, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", str(STEPS), "--set", "checkpoint.every=4"]
    process = start_training(2, "zero2_ep2", latents, run, *flags)
    wait_for_step(run, 6, process)
    kill(process)
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 6 <= done < STEPS
    # what a kill in the middle of a save leaves behind, and a half-written line of metrics
    (run / "checkpoints" / ".step_00000008.tmp").mkdir(exist_ok=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    log = finish(start_training(2, "zero2_ep2", latents, run, *flags), run)
    assert "continuing" in log
    assert losses(run) == pytest.approx(losses(two_ranks), rel=1e-6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000012"


def test_two_runs_into_one_folder_are_refused(latents, tmp_path):
    run = tmp_path / "run"
    first = start_training(1, "zero1_ep1", latents, run, "--steps", "1000")
    try:
        wait_for_step(run, 1, first)
        before = (run / "config.yaml").read_bytes()
        error = refused("--data", latents, "--out", run, "--ds", "ds_configs/zero1_ep1.json")
        assert "another training run is writing" in error
        assert (run / "config.yaml").read_bytes() == before
    finally:
        kill(first)


def refused_early(capfd, *flags) -> str:
    """As :func:`refused`, in this process: for what is refused before ranks start."""
    before, sys.argv = sys.argv, ["jobs/train.py", "--recipe", "digits", *map(str, flags)]
    try:
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "jobs/train.py"), run_name="__main__")
    finally:
        sys.argv = before
    error = capfd.readouterr().err
    assert done.value.code == 2
    assert error.count("\n") == 1 and error.startswith("error: "), error
    return error


def refused(*flags) -> str:
    """Start one rank without a launcher: must exit 2 with one line; gives it."""
    command = [sys.executable, "jobs/train.py", "--recipe", "digits", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data", "nowhere"], "no folder of shards nowhere"),
        (["--recipe", "digitz"], "did you mean digits?"),
        (["--ds", "ds_configs/zero9.json"], "no DeepSpeed configuration ds_configs/zero9.json; there are"),
        (["--ds", "ds_configs/zero2_ep8.json"], "start a multiple of 8 (deepspeed --num_gpus 8 ...)"),
        (["--ds", "ds_configs/zero2_ep16.json"], "does not divide the 8 experts of recipe digits"),
        (["--set", "model.moe.num_experts=6", "--ds", "ds_configs/zero2_ep8.json"], "choose one of 1, 2, 3, 6"),
        (["--steps", "0"], "--steps 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--set", "model.num_classes=3"], "has 10 classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(latents, tmp_path, monkeypatch, capfd, flags, line):
    monkeypatch.chdir(ROOT)
    usual = ["--ds", "ds_configs/zero1_ep1.json", "--data", latents, "--out", tmp_path / "run"]
    assert line in refused_early(capfd, *usual, *flags)
    assert not (tmp_path / "run").exists()


def test_bad_input_of_the_whole_command(latents, tmp_path):
    usual = ["--ds", "ds_configs/zero1_ep1.json", "--out", tmp_path / "run"]
    assert "no checkpoint there" in refused(*usual, "--data", latents, "--resume", "nowhere")
    assert "no folder of shards nowhere" in refused(*usual, "--data", "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ('{"train_batch_size": 8}', "train_batch_size is decided by the recipe"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4; it should be 0, 1, 2 or 3"),
        ('{"expert_parallel": {"enabled": true, "autoep_size": 0}}', "it should be a positive integer"),
        ('{"expert_parallel": {"enabled": true, "top_k": 2}}', "not top_k; remove it"),
    ],
)
def test_a_wrong_deepspeed_file(latents, tmp_path, capfd, content, line):
    (tmp_path / "ds.json").write_text(content)
    assert line in refused_early(capfd, "--ds", tmp_path / "ds.json", "--data", latents, "--out", tmp_path / "run")


def test_a_truncated_shard(latents, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    shards = shutil.copytree(latents, tmp_path / "shards")
    os.truncate(shards / "shard-000000.tar", 5000)
    error = refused_early(capfd, "--ds", "ds_configs/zero1_ep1.json", "--data", shards, "--out", tmp_path / "run")
    assert "shard-000000.tar has 5000 bytes instead of" in error


def test_another_experiment_cannot_continue_a_run(two_ranks, latents):
    before = sorted(path.stat().st_mtime_ns for path in two_ranks.rglob("*"))
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--data", latents, "--out", two_ranks]
    assert "model.depth 6, not 4" in refused(*flags, "--set", "model.depth=4")
    assert "give another --out, or --resume auto" in refused(*flags, "--resume", "never")
    assert "more than the 3 asked for" in refused(*flags, "--steps", "3")
    assert sorted(path.stat().st_mtime_ns for path in two_ranks.rglob("*")) == before


def damage(checkpoint):
    for part in checkpoint.glob("*.distcp"):
        os.truncate(part, 100)


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(two_ranks, latents, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    damage(run / "checkpoints" / "step_00000012")
    log = finish(start_training(2, "zero2_ep2", latents, run, "--steps", str(STEPS)), run)
    assert "step_00000012 cannot be read" in log and "Traceback" not in log
    assert "continuing" in log and "step_00000008" in log
    assert losses(run) == pytest.approx(losses(two_ranks), rel=1e-6)


def test_no_readable_checkpoint_is_one_line(two_ranks, latents, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    for checkpoint in (run / "checkpoints").glob("step_*"):
        damage(checkpoint)
    flags = ["--ds", "ds_configs/zero1_ep1.json", "--data", latents]
    command = [sys.executable, "jobs/train.py", "--recipe", "digits", *map(str, flags), "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint in")
    named = run / "checkpoints" / "step_00000008"
    assert "step_00000008 cannot be read" in refused(*flags, "--out", tmp_path / "other", "--resume", named)


def test_told_to_stop_it_saves_and_exits_75(plain, latents, tmp_path):
    run, done = tmp_path / "run", 0
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(run), "--steps", "1000", "--set", "checkpoint.every=500"]
    command += ["--set", "checkpoint.write_gb_per_second=0.000001"]  # half a day, which a run told to stop has not
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the second continues the first
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
        try:
            wait_for_step(run, done + 2, process)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 75, err
        assert err.splitlines()[-1].startswith("stopped as asked after step ") and "Traceback" not in err
        assert len(losses(run)) > done
        done = len(losses(run))
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{done:08d}"
    both = min(done, STEPS)
    assert losses(run)[:both] == pytest.approx(plain[0][:both], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(latents, tmp_path):
    shards, run = shutil.copytree(latents, tmp_path / "shards"), tmp_path / "run"
    reader = ShardReader(read_manifest(latents))
    # The sample at position 5 * 64 + 7 of the run gets moments that are not numbers.
    members = reader.members(int(permutation(0, 0, len(reader))[5 * 64 + 7]))
    offset, size = members.place("latent.npy")
    with open(shards / members.path.name, "r+b") as file:
        file.seek(offset + size - 100)
        file.write(b"\xff\x7f" * 50)
    for index in shards.glob("index-*.npy"):  # its checksums would tell
        index.unlink()
    start = start_training(2, "zero2_ep2", shards, run, "--steps", "12", "--set", "checkpoint.every=2")
    assert start.wait(120) == 1
    kill(start)
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" not in log
    line = next(line for line in log.splitlines() if line.startswith("error: "))
    assert "the loss is nan at step 6, positions 320 to 383" in line and "step_00000004" in line
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert not (run / "checkpoints" / "step_00000006").exists()


def test_a_rank_that_dies_takes_the_others_down(latents, tmp_path):
    run = tmp_path / "run"
    launcher = start_training(2, "zero2_ep2", latents, run, "--steps", "2000", launcher="deepspeed")
    try:
        wait_for_step(run, 1, launcher)
        ranks = ranks_of(launcher)
        next(rank for rank in ranks if "--local_rank=1" in rank.cmdline()).kill()
        assert launcher.wait(60) != 0
        _, left = psutil.wait_procs(ranks, timeout=10)
        assert not left
    finally:
        kill(launcher)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(latents, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(run), "--set", "checkpoint.every=2"]
    subprocess.run([*command, "--steps", "2"], cwd=ROOT, env=ENV, check=True, timeout=120, capture_output=True)
    # A limit on a file's size makes the kernel refuse to write on, as a full disk does.
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 2000; exec "$@"', "bash", *command, "--steps", "50"]
    done = subprocess.run(limited, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint ") and "MB free on that disk" in last and "step_00000002" in last
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    subprocess.run([*command, "--steps", "4"], cwd=ROOT, env=ENV, check=True, timeout=120, capture_output=True)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(latents, tmp_path):
    """The whole of this, twenty moments on two ranks, is in tests/tools/matrix.py."""
    run = tmp_path / "run"
    process = start_training(1, "zero1_ep1", latents, run, "--steps", "2000", "--set", "checkpoint.every=1")
    try:
        wait_for_step(run, 8, process)
    finally:
        kill(process)
    named = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert all(torch.isfinite(weight).all() for weight in export(named, tmp_path / "model", "ema").parameters())


def test_random_kills_lose_nothing(latents):
    """A small part of tests/tools/kills.py."""
    command = [sys.executable, "tests/tools/kills.py", "--data", str(latents), "--kills", "5", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
