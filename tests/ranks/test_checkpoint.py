"""Saves of whole runs: on a full disk, beside training, killed, and none that fails without a word."""

import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, TIMEOUT, ds_file, export, forks, kill, losses, small, wait_for, wait_for_step
from helpers.older_run import SHARDS
from helpers.small import latest, step, train, train_here
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.randomness import permutation


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/proc/none/such")
    done = train_here(run, "--steps=1")
    line = f"error: {run}/checkpoints is not a folder; move it away, or give another --out\n"
    assert (done.returncode, done.stderr) == (2, line)


LOSES_A_FILE = """
from moe_dit.checkpoint import Checkpointer
publish = Checkpointer._publish
def and_lose(self, description, temporary, final):
    publish(self, description, temporary, final)
    (final / LOST).unlink()
Checkpointer._publish = and_lose
"""


@pytest.mark.parametrize("file", ["__0_0.distcp", "../latest"])
def test_a_run_whose_last_checkpoint_is_gone_is_not_done(tmp_path, file):
    done = train_here(tmp_path / "run", "--steps=1", code=f"LOST = {file!r}{LOSES_A_FILE}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: step 1 was reached, but it is not saved: ")


BESIDE_A_SAVE = """
import sys, torch
from moe_dit.engine import Engine, start_ranks
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe
start_ranks()
small = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
small += ["global_batch_size=4", "max_micro_batch_size=2", "precision=" + sys.argv[2]]
recipe = load_recipe("digits", small)
engine = Engine(recipe, load_parallelism(sys.argv[1], recipe, 1), torch.device("cpu"))
batch = {"x": torch.ones(2, 4, 8, 8), "noise": torch.zeros(2, 4, 8, 8), "u": torch.full((2,), 0.5)}
batch |= {"y": torch.arange(2), "position": torch.arange(2)}

def state():
    return torch.cat([tensor for piece in engine.pieces() for tensor in piece.tensors.values()])

class Copied:  # in place of torch.cuda.Event
    def __init__(self):
        self.before, self.waited = state(), []
    def wait(self):
        boundary = engine.deepspeed_engine.is_gradient_accumulation_boundary()
        self.waited.append((torch.equal(state(), self.before), boundary))
    def changed(self):
        return not torch.equal(state(), self.before)

engine.train_step(0, [batch, batch])  # from here on all kinds of state change
first = Copied()
engine.keep_until(first)
engine.train_step(1, [batch, batch])
assert first.waited == [(True, True)] and first.changed(), first.waited  # after all forward and backward passes
second = Copied()
engine.keep_until(second)
with engine.averaged_weights():
    assert [same for same, _ in second.waited] == [True] and second.changed()
engine.train_step(2, [batch, batch])
assert len(first.waited) == len(second.waited) == 1
print("well")
"""


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_nothing_changes_the_state_before_a_save_has_copied_it(tmp_path, stage, precision):
    command = [sys.executable, "-c", BESIDE_A_SAVE, str(ds_file(tmp_path, stage, 1)), precision]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout.endswith("well\n"), done.stderr


def test_a_killed_run_goes_on_from_its_newest_checkpoint(shared, tmp_path):
    run, whole = tmp_path / "run", small.on_two_ranks(shared)
    flags = ["--steps=12", "--set=checkpoint.every=4"]
    process = small.start(run, *flags, ranks=2, code=small.stands_still(10))
    try:
        wait_for_step(run, 8, process)  # whose save may be under way; that of step 4 too, on a busy machine
        wait_for((run / "checkpoints/latest").exists, "a checkpoint", Path(f"{run}.log"))
    finally:
        kill(process)
    assert 8 <= len((run / "metrics.jsonl").read_text().splitlines()) <= 10
    # what a kill in the middle of a save leaves behind, and a half-written line of metrics
    (run / "checkpoints" / ".step_00000007.tmp").mkdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert "continuing" in train(run, *flags, ranks=2)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", step(4), step(8), step(12)]
    assert latest(run) == step(12)


WHEN_SAVED = """
import time
from pathlib import Path
from moe_dit.data.reader import ShardReader
read, calls = ShardReader.read, 0
def wait(reader, *which):
    global calls
    calls += 1
    while calls == 6 and "step_00000004" not in LATEST.read_text():
        time.sleep(0.01)
    return read(reader, *which)
ShardReader.read = wait
"""


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    shards, run = shutil.copytree(SHARDS, tmp_path / "shards"), tmp_path / "run"
    reader = ShardReader(read_manifest(shards))
    # The sample at position 5 * 16 + 7 of the run gets moments that are not numbers.
    members = reader.members(int(permutation(0, 0, len(reader))[5 * 16 + 7]))
    offset, size = members.place("latent.npy")
    with open(shards / members.path.name, "r+b") as file:
        file.seek(offset + size - 100)
        file.write(b"\xff\x7f" * 50)
    for index in shards.glob("index-*.npy"):  # its checksums would tell
        index.unlink()
    # The save after step 4 is complete before step 6 is read: small steps are faster than saves.
    code = WHEN_SAVED.replace("LATEST", f"Path({str(run / 'checkpoints/latest')!r})")
    start = small.start(run, "--steps=12", "--set=checkpoint.every=2", "--data", str(shards), ranks=2, code=code)
    try:
        assert start.wait(TIMEOUT) == 1
    finally:
        kill(start)
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" not in log
    line = next(line for line in log.splitlines() if line.startswith("error: "))
    assert "the loss is nan at step 6, positions 80 to 95" in line and step(4) in line
    assert latest(run) == step(4)
    assert not (run / "checkpoints" / step(6)).exists()


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    run = tmp_path / "run"
    train(run, "--steps=2", "--set=checkpoint.every=2")
    # A limit on a file's size makes the kernel refuse to write on, as a full disk does.
    limit = (run / "checkpoints" / step(2) / "__0_0.distcp").stat().st_size // 2
    done = train_here(run, "--steps=50", "--set=checkpoint.every=2", code=f"LIMIT = {limit}{FULL}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint ") and "MB free on that disk" in last and step(2) in last
    assert latest(run) == step(2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", step(2)]
    train(run, "--steps=4", "--set=checkpoint.every=2")
    assert latest(run) == step(4)


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    """More of this, on two ranks, is in tests/ranks/test_matrix.py."""
    run = tmp_path / "run"
    process = small.start(run, "--steps=20000", "--set=checkpoint.every=1")
    try:
        wait_for_step(run, 8, process)
    finally:
        kill(process)
    named = run / "checkpoints" / latest(run)
    assert all(torch.isfinite(weight).all() for weight in export(named, tmp_path / "model", "ema").parameters())


DIES = """
import os
from moe_dit.checkpoint import dcp
save = dcp.save
dcp.save = lambda *given, **more: os._exit(9) if os.environ["SLURM_PROCID"] == "1" else save(*given, **more)
"""


def test_a_rank_that_dies_in_a_save_is_no_failure_that_all_met(tmp_path):
    run = tmp_path / "run"
    process = small.start(run, "--steps=1", ranks=2, code=DIES)
    try:
        assert process.wait(TIMEOUT) == 9
    finally:
        kill(process)
    # All would end torchrun, which could start them anew.
    (line,) = [line for line in Path(f"{run}.log").read_text().splitlines() if "error: " in line]
    assert line.startswith(f"error: rank 0 ({socket.gethostname()}): checkpoint {run / 'checkpoints' / step(1)} could")
