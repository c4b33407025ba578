"""Checkpoints that are damaged, foreign or of a branch that was left, and what a run continues from."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, StorageMeta

from helpers import ENV, ROOT, ds_file, finish, kill, losses, records, start_training, wait_for_step
from helpers.older_run import FLAGS, OLD
from moe_dit.checkpoint import Checkpointer, FlatSlice, _host_memory, _Writer
from moe_dit.checkpoint_files import (
    Attempt,
    Damaged,
    check_complete,
    read_description,
    read_index,
    read_state,
    sizes_of,
    step_of,
    write_description,
)
from moe_dit.engine import Piece
from moe_dit.lineage import State, choose, common_step, complete_checkpoints, find_checkpoint, superfluous
from moe_dit.metrics import Metrics
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError, Stop
from moe_dit.runtime.pace import Pace
from moe_dit.runtime.ranks import World

SMALL = [f"--set={flag}" for flag in FLAGS if "checkpoint" not in flag]
LOSSES = json.loads((OLD / "losses.json").read_text())  # of its eight steps, recorded once and for all


def train(run: Path, *flags: str, ranks: int = 1) -> str:
    """The small run of tests/golden, or what continues it, to its end; gives its output."""
    before = Path(f"{run}.log").read_text() if Path(f"{run}.log").exists() else ""
    ds = "zero1_ep1" if ranks == 1 else "zero2_ep2"
    return finish(start_training(ranks, ds, OLD / "shards", run, *SMALL, *flags), run)[len(before) :]


def train_here(run: Path, *flags: str) -> subprocess.CompletedProcess:
    """The same, for what may end otherwise."""
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", *SMALL]
    command += ["--data", str(OLD / "shards"), "--out", str(run), *flags]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory) -> Path:
    """A run of eight steps with a checkpoint at every second; tests take a copy."""
    run = tmp_path_factory.mktemp("eight") / "run"
    train(run, "--steps=8", "--set=checkpoint.every=2", "--set=checkpoint.keep=9")
    assert losses(run) == pytest.approx(LOSSES, rel=1e-6)
    return run


@pytest.fixture(scope="module")
def branched(eight_steps, tmp_path_factory) -> Path:
    """It, after going back to step 4 and training on to 5 and 7 with another learning rate."""
    run = shutil.copytree(eight_steps, tmp_path_factory.mktemp("branched") / "run")
    back = ["--resume", str(run / "checkpoints" / "step_00000004"), "--steps=7"]
    train(run, *back, "--set=optimizer.lr=0.01", "--set=checkpoint.every=5", "--set=checkpoint.keep=9")
    assert names(run) == [step(n) for n in (2, 4, 5, 6, 7, 8)]
    return run


def step(number: int) -> str:
    return f"step_{number:08d}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def copy(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / "run")


def flip(file: Path, byte: int, change: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= change
    file.write_bytes(data)


# --- no success without a checkpoint ----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_fails_the_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/proc/none/such")  # no disk of which to tell the free space
    done = train_here(run, "--steps=1")
    assert done.returncode == 1 and "done" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint ") and "could not be written: " in last and "File exists" in last


LOSES_A_FILE = """
import runpy, sys
from moe_dit.checkpoint import Checkpointer, FlatSlice, _Writer
publish, lost = Checkpointer._publish, sys.argv[1]
def and_lose(self, description, temporary, final):
    publish(self, description, temporary, final)
    (final / lost).unlink()
Checkpointer._publish = and_lose
sys.argv[:2] = ["jobs/train.py"]
runpy.run_path("jobs/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("file", ["__0_0.distcp", "../latest"])
def test_a_run_whose_last_checkpoint_is_gone_is_not_done(tmp_path, file):
    usual = ["--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits", "--data", str(OLD / "shards")]
    command = [sys.executable, "-c", LOSES_A_FILE, file, *usual, *SMALL, "--out", str(tmp_path / "run"), "--steps=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: step 1 was reached, but it is not saved: ")


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_of(device: torch.device) -> SimpleNamespace:
    """As much of an engine as is saved: nothing, of a recipe."""
    topology = SimpleNamespace(world_size=1, ep_size=1, zero_stage=1)
    pieces, buffers = (lambda owned_only: iter([])), dict
    return SimpleNamespace(
        device=device, recipe=load_recipe("digits"), parallelism=topology, pieces=pieces, buffers=buffers
    )


def test_a_save_has_failed_until_it_is_done(one_rank, tmp_path, monkeypatch, capsys):
    """Even where it ends in the middle of its own handling of an error; that error is told too."""
    monkeypatch.setattr("moe_dit.checkpoint.cause_of", lambda error: 1 / 0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cpu")), 3)  # a checkpoint without tensors is not complete
    with pytest.raises(Stop, match=r"step_00000003 was not written to its end"):
        checkpointer.wait()
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert checkpointer.failed()
    with pytest.raises(Stop, match="was not written"):
        checkpointer.save(engine_of(torch.device("cpu")), 4)


def test_a_save_that_nobody_waits_for_tells_of_its_failure(one_rank, tmp_path, monkeypatch, capsys):
    """A run that ends for another reason closes what saves, and no more."""
    monkeypatch.setattr("moe_dit.checkpoint.cause_of", lambda error: 1 / 0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cpu")), 3)
    checkpointer.close()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_checkpoint_at_a_pace_has_the_same_bytes(one_rank, tmp_path):
    slept: list[float] = []
    for name, pace in (("free", None), ("paced", Pace(1e6, lambda: 0.0, slept.append))):
        (tmp_path / name).mkdir()
        state = {"weight/a": FlatSlice(torch.arange(5000.0), 0, 5000)}
        dcp.save(state, storage_writer=_Writer(tmp_path / name, pace))
    free, paced = (tmp_path / name / "__0_0.distcp" for name in ("free", "paced"))
    assert free.read_bytes() == paced.read_bytes() and free.stat().st_size > 20_000
    # by a clock that stands still, the last wait is for all that was written
    written = sum(path.stat().st_size for path in (tmp_path / "paced").iterdir())
    assert slept[-1] == pytest.approx(written / 1e6)


def test_ranks_share_a_bandwidth(one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_dit.checkpoint.world", lambda: World(1, 1, 4))
    monkeypatch.setattr("moe_dit.checkpoint._connect", lambda group: None)
    rates = []
    monkeypatch.setattr("moe_dit.checkpoint.Pace", rates.append)
    Checkpointer(tmp_path, 1, write_gb_per_second=2.0)
    assert rates == [0.5e9]
    Checkpointer(tmp_path, 1)
    assert rates == [0.5e9]


def test_the_checkpoint_thread_works_on_its_ranks_gpu(one_rank, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((threading.current_thread(), device)))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cuda", 3)), 1)
    with pytest.raises(Stop):
        checkpointer.wait()
    ((thread, device),) = calls
    assert thread is not threading.main_thread() and device == torch.device("cuda", 3)


def test_all_saves_are_of_one_thread(one_rank, tmp_path):
    """glibc gives a new thread memory that does not go back (tests/test_weeks.py sees it in thousands of steps)."""
    threads = []
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer._publish = lambda *arguments: threads.append(threading.current_thread())
    for step in (1, 2, 3):
        checkpointer.save(engine_of(torch.device("cpu")), step)
    checkpointer.wait()
    assert len(threads) == 3 and set(threads) == {threads[0]} and threads[0] is not threading.main_thread()


def test_saves_right_after_each_other_do_not_mix(one_rank, tmp_path, monkeypatch):
    """Each overwrites the host memory of the one before, and training the state, while that one would be written."""
    monkeypatch.setattr("moe_dit.checkpoint.BLOCK", 1000)
    lengths = {"a": 300, "b": 500, "c": 4000, "d": 600}  # two in a block, one that is larger, and one
    state = {name: {kind: torch.zeros(n // 2) for kind in "xy"} for name, n in lengths.items()}
    engine = engine_of(torch.device("cpu"))
    engine.pieces = lambda owned_only: iter(Piece(name, 5000, 3, tensors) for name, tensors in state.items())
    checkpointer, blocks, prepare = Checkpointer(tmp_path, keep=1), [], _Writer.prepare_local_plan
    checkpointer._publish = lambda description, temporary, final: temporary.rename(final)
    monkeypatch.setattr(_Writer, "prepare_local_plan", lambda self, plan: time.sleep(0.3) or prepare(self, plan))

    def value(step: int, name: str, kind: str) -> torch.Tensor:
        return torch.arange(len(state[name][kind])) + float(crc32(f"{step}{name}{kind}".encode()) % 1_000_000)

    for step in (1, 2, 3):
        for name, tensors in state.items():
            for kind, tensor in tensors.items():
                tensor.copy_(value(step, name, kind))
        checkpointer.save(engine, step)
        blocks.append([copy.untyped_storage().data_ptr() for copy in checkpointer._staging.copies])
    for tensors in state.values():
        torch._foreach_zero_(list(tensors.values()))
    checkpointer.wait()
    assert blocks[0] == blocks[1] == blocks[2] and len(set(blocks[0])) == 4
    for step in (1, 2, 3):
        for name, tensors in state.items():
            for kind, tensor in tensors.items():
                target = {f"{kind}/{name}": FlatSlice(torch.zeros(len(tensor)), 3, 5000)}
                dcp.load(target, checkpoint_id=tmp_path / "checkpoints" / f"step_{step:08d}")
                assert torch.equal(target[f"{kind}/{name}"].data_1d, value(step, name, kind)), (step, name, kind)


def test_what_writes_a_checkpoint_does_not_wait_for_a_gpu(one_rank, tmp_path, monkeypatch):
    """As torch's loader of tensors on GPUs would, for the stream in which training computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dcp.filesystem, "_OverlappingCpuLoader", lambda *arguments, **options: 1 / 0)
    dcp.save({"weight/a": FlatSlice(torch.arange(5.0), 0, 5)}, storage_writer=_Writer(tmp_path, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can pin memory")
def test_memory_that_cannot_be_pinned_is_plain_and_told_once(monkeypatch, capsys):
    monkeypatch.setattr("moe_dit.checkpoint.BLOCK", 10)
    memory = list(_host_memory([4, 6, 7, 20], pinned=True))
    assert [len(part) for part in memory] == [4, 6, 7, 20]
    assert len({part.untyped_storage().data_ptr() for part in memory}) == 3
    assert capsys.readouterr().err.count("no pinned host memory") == 1


BESIDE_A_SAVE = """
import sys, torch
from moe_dit.engine import Engine, start_ranks
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe
start_ranks()
recipe = load_recipe("digits", ["global_batch_size=4", "max_micro_batch_size=2", "precision=" + sys.argv[2]])
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
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("well\n"), done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_checkpoint_thread_does_not_touch_the_first_gpu(one_rank, tmp_path):
    seen = []
    engine = engine_of(torch.device("cuda", 1))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer._publish = lambda *arguments: seen.append(torch.cuda.current_device())
    checkpointer.save(engine, 1)
    checkpointer.wait()
    assert seen == [1]


# --- branches ---------------------------------------------------------------------------------------------------------


def test_going_back_prunes_the_branch_that_was_left_and_nothing_foreign(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    foreign = ["step_00000012.bak", "step_12", "step_of_mine"]
    for name in foreign:
        shutil.copytree(folder / step(2), folder / name)
    back = ["--resume", str(folder / step(4)), "--set=optimizer.lr=0.01", "--set=checkpoint.keep=2"]
    log = train(run, *back, "--set=checkpoint.every=2", "--steps=6")
    assert names(run) == sorted([step(4), step(6), *foreign])  # not 8, which is the newest by its step
    assert latest(run) == step(6)
    description, _ = check_complete(folder / step(6))
    first, second = description["history"]
    assert (first.first_step, first.asked, second.first_step, second.asked) == (0, False, 4, True)
    assert json.loads((run / "history.json").read_text()) == [asdict(first), asdict(second)]
    # What the branch that was left had recorded is kept beside.
    assert "the records of steps 5 to 8 moved" in log
    superseded = [json.loads(line) for line in (run / "metrics_superseded.jsonl").read_text().splitlines()]
    assert [record["step"] for record in superseded] == [5, 6, 7, 8]
    assert [record["loss"] for record in superseded] == pytest.approx(LOSSES[4:], rel=1e-6)
    assert losses(run)[:5] == pytest.approx(LOSSES[:5], rel=1e-6)
    assert losses(run)[5] != pytest.approx(LOSSES[5], rel=1e-6)  # the other learning rate


def test_an_unreadable_checkpoint_gives_way_to_an_ancestor_only(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    assert find_checkpoint(run) == folder / step(7)
    flip(folder / step(7) / ".metadata", 1000)
    assert find_checkpoint(run) == folder / step(5)
    flip(folder / step(5) / ".metadata", 1000)
    start = choose(run)
    assert start.checkpoint == folder / step(4)  # not 6, which is of the branch that was left
    assert [line.split(":")[0] for line in start.notes] == [
        f"checkpoint {folder / step(number)} cannot be read" for number in (7, 5)
    ]
    for number in (2, 4):
        flip(folder / step(number) / ".metadata", 1000)
    with pytest.raises(InputError, match=r"can be continued .*; of branches that were left there are step_00000006,"):
        choose(run)


def test_the_history_of_a_checkpoint_that_lost_it_is_known_to_the_run(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    (folder / step(7) / "state.json").write_text("{")
    assert find_checkpoint(run) == folder / step(5)
    shutil.rmtree(folder / step(5))
    assert find_checkpoint(run) == folder / step(4)
    shutil.rmtree(folder / step(7))  # which latest names
    assert find_checkpoint(run) == folder / step(4)


def test_what_two_moments_have_in_common():
    a, b, c = Attempt("a", 0), Attempt("b", 40, asked=True), Attempt("c", 80)
    on_a, on_b, later = State([a], 100), State([a, b], 60), State([a, b, c], 90)
    old = State([], 50)  # of a version that kept no history
    assert common_step(on_a, on_b) == 40
    assert common_step(State([a], 30), on_b) == 30
    assert common_step(on_b, later) == 60
    assert common_step(State([a, b], 85), later) == 80
    assert common_step(old, State([Attempt("n", 50)], 70)) == 50
    assert common_step(old, State([Attempt("n", 20)], 70)) == 20
    assert common_step(State([Attempt("n", 20)], 70), State([Attempt("m", 30)], 90)) == 20


def test_pruning_keeps_milestones_and_the_newest_of_the_branch(branched):
    folder = branched / "checkpoints"
    description, _ = check_complete(folder / step(7))
    state = State.of(description)
    # The branch that was left has 6 and 8; 2, 4, 5 and 7 lead to the newest.
    assert [step_of(path.name) for path in superfluous(folder, state, 5, 0)] == [6]
    assert [step_of(path.name) for path in superfluous(folder, state, 3, 0)] == [6, 8, 2]
    assert [step_of(path.name) for path in superfluous(folder, state, 1, 4)] == [6, 2, 5]


# --- latest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "note"),
    [(b"", "is empty"), (b"step_000\xff", "names 'step_000\ufffd'"), (b"step_00000099\n", "which is not there")],
)
def test_a_damaged_latest_does_not_begin_again(eight_steps, tmp_path, content, note):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_bytes(content)
    start = choose(run)
    assert start.checkpoint == run / "checkpoints" / step(8)
    assert len(start.notes) == 1 and note in start.notes[0]


def test_latest_says_which_of_a_branchs_checkpoints_is_meant(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_text(f"{step(4)}\n")
    assert find_checkpoint(run) == choose(run).checkpoint == run / "checkpoints" / step(4)
    flip(run / "checkpoints" / step(4) / "state.json", 100)  # then the one before it, not one after it
    assert find_checkpoint(run) == choose(run).checkpoint == run / "checkpoints" / step(2)


def test_a_run_with_an_empty_latest_continues_and_keeps_its_record(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    (run / "checkpoints" / "latest").write_text("")
    log = train(run, "--steps=9")
    assert "latest is empty" in log and f"continuing {run / 'checkpoints' / step(8)}" in log
    assert losses(run)[:8] == losses(eight_steps)
    assert len(losses(run)) == 9 and latest(run) == step(9)
    assert not (run / "metrics_superseded.jsonl").exists()


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        shutil.rmtree(checkpoint)
    before = (run / "metrics.jsonl").read_bytes()
    done = train_here(run, "--steps=9")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"or remove {run / 'checkpoints' / 'latest'} to begin again" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoints" / "latest").unlink()
    log = train(run, "--steps=1")
    assert "the records of steps 1 to 8 moved" in log and "from the start" in log
    assert (run / "metrics_superseded.jsonl").read_bytes() == before


def test_records_that_are_cut_are_kept_beside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}', '{"step": 3, "loss": 3.0}', '{"step": 3, "lo']
    recipe = load_recipe("digits", ["metrics.sinks=[]"])
    for times in (1, 2):
        path.write_text("\n".join(lines))
        Metrics(tmp_path, 2, recipe, 2).close()
        assert path.read_text().splitlines() == lines[:2]
        assert (tmp_path / "metrics_superseded.jsonl").read_text().splitlines() == lines[2:] * times
    Metrics(tmp_path, 2, recipe, 2).close()
    assert path.read_text().splitlines() == lines[:2]


# --- --resume CHECKPOINT ----------------------------------------------------------------------------------------------


def test_a_requeued_job_goes_back_once(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    back = ["--resume", os.path.relpath(folder / step(4), ROOT), "--set=optimizer.lr=0.01", "--set=checkpoint.keep=1"]
    # Killed before it has saved, it goes back again ...
    process = start_training(1, "zero1_ep1", OLD / "shards", run, *SMALL, *back, "--steps=100000")
    try:
        deadline = time.monotonic() + 120
        while losses(run)[:8] == losses(eight_steps) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # until the record of the old branch is cut
        wait_for_step(run, 6, process)
    finally:
        kill(process)
    assert latest(run) == step(4)
    log = train(run, *back, "--steps=6")
    assert f"continuing {folder / step(4)}" in log
    branch = losses(run)
    # ... and then not any more, though the checkpoint that it went back to is pruned.
    assert names(run) == [step(6)]
    log = train(run, *back, "--steps=8")
    assert "was gone back to before" in log and f"continuing {folder / step(6)}" in log
    assert losses(run)[:6] == branch
    # It is no command for a checkpoint that never was there.
    done = train_here(run, "--resume", str(folder / step(5)), "--steps=9")
    assert done.returncode == 2 and "no checkpoint there" in done.stderr.splitlines()[-1]


def test_going_back_again_to_the_same_step_takes_another_word(branched, tmp_path):
    run = copy(branched, tmp_path)
    folder = run / "checkpoints"
    assert choose(run, str(folder / step(4))).checkpoint == folder / step(7)
    # Another branch, which did not come of going back to 4: one does go back.
    (folder / "latest").write_text(step(8))
    start = choose(run, str(folder / step(4)))
    assert start.checkpoint == folder / step(4) and start.history[-1].asked and start.records == 4
    # From one branch to the end of another: the record is theirs up to where they parted.
    (folder / "latest").write_text(step(7))
    start = choose(run, str(folder / step(8)))
    assert start.checkpoint == folder / step(8) and start.records == 4
    # By hand, as often as one likes.
    (folder / "latest").write_text(step(4))
    start = choose(run)
    assert start.checkpoint == folder / step(4) and not start.history[-1].asked


def test_another_runs_checkpoint_is_for_a_run_without_any(eight_steps, branched, tmp_path):
    other = tmp_path / "run"
    begin = ["--resume", str(eight_steps / "checkpoints" / step(6)), "--set=checkpoint.every=1"]
    log = train(other, *begin, "--steps=7")
    assert f"continuing {eight_steps / 'checkpoints' / step(6)}" in log
    assert [record["step"] for record in records(other)] == [7]
    log = train(other, *begin, "--steps=8")  # the requeued job
    assert f"continuing {other / 'checkpoints' / step(7)}" in log
    assert [record["loss"] for record in records(other)] == pytest.approx(LOSSES[6:], rel=1e-6)
    # What a run without a checkpoint has recorded leads nowhere.
    assert choose(tmp_path / "unsaved", begin[1]).records == 0
    # Aimed at a run that went its own way, it takes nothing from it.
    run = copy(branched, tmp_path / "own")
    before = (run / "metrics.jsonl").read_bytes()
    start = choose(run, begin[1])
    assert start.checkpoint == run / "checkpoints" / step(7) and start.records == 7
    assert "is for a run without checkpoints" in start.notes[0]
    assert choose(run, str(tmp_path / "nowhere")).checkpoint == start.checkpoint  # the other one may be gone
    assert (run / "metrics.jsonl").read_bytes() == before
    # A checkpoint with nothing left to train would be a run without a checkpoint.
    done = train_here(tmp_path / "new", "--resume", str(eight_steps / "checkpoints" / step(8)), "--steps=8")
    assert done.returncode == 2 and "has done all of the 8 steps" in done.stderr.splitlines()[-1]


# --- damage, and strangers --------------------------------------------------------------------------------------------


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as commands read it."""
    _, index = check_complete(checkpoint)
    state = {name: torch.full(size, torch.nan) for name, size in sizes_of(index).items()}
    read_state(state, checkpoint, index=index)
    return state


def flips(data: bytes, count: int):
    """Copies of a file with one random byte changed, and its place."""
    generator = random.Random(8)
    for _ in range(count):
        place = generator.randrange(len(data))
        changed = bytearray(data)
        changed[place] ^= generator.randrange(1, 256)
        yield place, bytes(changed)


@pytest.fixture(params=["new", "before checksums"])
def whole(request, eight_steps, tmp_path) -> Path:
    source = eight_steps / "checkpoints" / step(8) if request.param == "new" else OLD / "run/checkpoints" / step(3)
    return shutil.copytree(source, tmp_path / source.name)


def test_a_changed_byte_of_the_index_never_loads_wrong(whole):
    truth = everything(whole)
    outcomes = Counter()
    new = "index_sha256" in (whole / "state.json").read_text()
    for _, changed in flips((whole / ".metadata").read_bytes(), 600):
        (whole / ".metadata").write_bytes(changed)
        try:
            got = everything(whole)
        except Damaged as error:
            outcomes["refused"] += 1
            assert str(error).startswith(f"checkpoint {whole} cannot be read: ") and "\n" not in str(error)
        else:  # a byte that means nothing
            outcomes["loaded"] += 1
            assert got.keys() == truth.keys() and all(torch.equal(got[name], truth[name]) for name in truth)
    assert outcomes["refused"] == 600 if new else outcomes["refused"] > 500


def test_a_changed_byte_of_the_description_is_noticed(whole):
    truth, _ = check_complete(whole)
    new = "sha256" in (whole / "state.json").read_text()
    for _, changed in flips((whole / "state.json").read_bytes(), 600):
        (whole / "state.json").write_bytes(changed)
        try:
            got, _ = check_complete(whole)
        except Damaged as error:
            assert "\n" not in str(error)
        else:  # before there were checksums a value could become another one
            assert not new or got == truth


def test_a_changed_byte_of_a_record_is_noticed(whole):
    """torch.load reads most of them without a word: it is built without the check of a zip archive's checksums."""
    _, index = check_complete(whole)
    file = whole / "__0_0.distcp"
    data, truth = file.read_bytes(), everything(whole)
    unnoticed_by_torch = 0
    for byte, changed in flips(data, 300):
        file.write_bytes(changed)
        slices = ((key.fqn, place) for key, place in index.storage_data.items() if place.file == file.name)
        name, place = next(found for found in slices if found[1].offset <= byte < found[1].offset + found[1].length)
        record = slice(place.offset, place.offset + place.length)
        try:
            plain, good = (torch.load(io.BytesIO(of[record]), weights_only=True) for of in (changed, data))
            unnoticed_by_torch += not torch.equal(plain, good)
        except Exception:
            pass
        state = {name: torch.full_like(truth[name], torch.nan)}
        try:
            read_state(state, whole, index=index)
        except Damaged as error:
            assert f"{file.name}: the record at byte {place.offset} is damaged" in str(error) and "\n" not in str(error)
        else:  # padding, and dates of the archive
            assert torch.equal(state[name], truth[name])
    assert unnoticed_by_torch > 50


@pytest.mark.parametrize("file", [".metadata", "state.json"])
def test_damaged_files_are_one_line_and_the_checkpoint_before(eight_steps, tmp_path, file):
    run = copy(eight_steps, tmp_path)
    flip(run / "checkpoints" / step(8) / file, 700)
    log = train(run, "--steps=8")
    line = f"checkpoint {run / 'checkpoints' / step(8)} cannot be read: {file}: "
    assert log.count(line) == 1 and "taking the one before it" in log and "Traceback" not in log
    assert f"continuing {run / 'checkpoints' / step(6)}" in log
    assert losses(run) == pytest.approx(LOSSES, rel=1e-6)


def test_ranks_that_meet_a_damaged_record_take_the_checkpoint_before_together(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    damaged = run / "checkpoints" / step(8)
    _, index = check_complete(damaged)
    place = next(place for key, place in index.storage_data.items() if key.fqn == "ema/x_embedder.proj.weight")
    record = (damaged / place.file).read_bytes()[place.offset : place.offset + place.length]
    flip(damaged / place.file, place.offset + record.index(b"data/0") + 300)
    log = train(run, "--steps=8", ranks=2)
    assert f"checkpoint {damaged} cannot be read: __0_0.distcp: the record at byte" in log
    assert f"continuing {run / 'checkpoints' / step(6)}" in log and "Traceback" not in log
    assert losses(run) == pytest.approx(LOSSES, rel=1e-5)


def test_the_step_is_that_of_the_folder(eight_steps, tmp_path):
    run = copy(eight_steps, tmp_path)
    folder = run / "checkpoints"
    shutil.rmtree(folder / step(8))
    (folder / step(6)).rename(folder / step(8))
    assert choose(run).checkpoint == folder / step(4)
    assert "its step is 6" in choose(run).notes[0]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (open, "{}", "w")])
def test_an_index_that_would_run_code_does_not(eight_steps, tmp_path, call):
    run = copy(eight_steps, tmp_path)
    checkpoint = run / "checkpoints" / step(8)
    ran = tmp_path / "ran"
    function, *arguments = call
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    whole.planner_data = Call(function, *(argument.format(ran) for argument in arguments))
    for index in (whole, whole.planner_data):
        stranger(checkpoint, index)
        with pytest.raises(Damaged, match=r"\.metadata: it holds .* could run code"):
            everything(checkpoint)
        assert find_checkpoint(run) == run / "checkpoints" / step(6)
    assert not ran.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # it would have
    assert ran.exists()


def stranger(checkpoint: Path, index) -> None:
    """Write another index, as someone would who keeps to the format: with its checksum."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    description = json.loads((checkpoint / "state.json").read_text())
    for key in ("format", "sha256", "index_sha256"):
        description.pop(key, None)
    write_description(checkpoint, description)


def test_an_index_leads_to_no_other_files_and_no_pickled_values(eight_steps, tmp_path):
    checkpoint = copy(eight_steps, tmp_path) / "checkpoints" / step(8)
    good = (checkpoint / ".metadata").read_bytes()

    index = pickle.loads(good)
    secret = shutil.copy(checkpoint / "__0_0.distcp", tmp_path / "secret.distcp")
    for place in index.storage_data.values():
        place.relative_path = f"../../../{secret.name}"
    stranger(checkpoint, index)
    with pytest.raises(Damaged, match=r"'\.\./\.\./\.\./secret\.distcp' is no file of a checkpoint"):
        everything(checkpoint)

    index = pickle.loads(good)
    index.state_dict_metadata["weight/x_embedder.proj.weight"] = BytesStorageMetadata()
    stranger(checkpoint, index)
    with pytest.raises(Damaged, match=r"BytesStorageMetadata, which is no part of an index"):
        everything(checkpoint)

    # Setting an attribute of a class, here of torch's own, is no way out either.
    attack = pickle.dumps(pickle.loads(good), protocol=2)[:-1]
    attack += b"ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}\x8c\x04nameK\x01s\x86b0."
    (checkpoint / ".metadata").write_bytes(attack)
    pickle.loads(attack)
    assert StorageMeta.name == 1
    del StorageMeta.name
    description = read_description(checkpoint)
    del description["index_sha256"]
    with pytest.raises(Damaged):
        read_index(checkpoint, description)
    assert not hasattr(StorageMeta, "name")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index.state_dict_metadata.pop("ema/final_layer.linear.bias"), "but no such slice"),
        (lambda index: index.storage_data.pop(next(iter(index.storage_data))), "no record holds weight/"),
        (lambda index: move(index, 1), "weight/x_embedder.proj.weight"),
        (lambda index: rename(index, "ema/final_layer.linear.bias", "ema/other"), "it has no ema/final_layer"),
        (lambda index: share(index), "__0_0.distcp"),
    ],
)
def test_an_index_that_does_not_describe_each_element_once_is_refused(eight_steps, tmp_path, change, reason):
    """Without its checksum, as of an earlier version."""
    checkpoint = copy(eight_steps, tmp_path) / "checkpoints" / step(8)
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    stranger(checkpoint, index)
    with pytest.raises(Damaged) as error:
        check_complete(checkpoint)
    assert reason in str(error.value)


def move(index, by: int) -> None:
    tensor = index.state_dict_metadata["weight/x_embedder.proj.weight"]
    key = next(key for key in index.storage_data if key.fqn == "weight/x_embedder.proj.weight")
    offsets = torch.Size([key.offset[0] + by])
    index.storage_data[MetadataIndex(key.fqn, offsets)] = index.storage_data.pop(key)
    tensor.chunks[0].offsets = offsets


def rename(index, old: str, new: str) -> None:
    index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
    for key in [key for key in index.storage_data if key.fqn == old]:
        index.storage_data[MetadataIndex(new, key.offset)] = index.storage_data.pop(key)


def share(index) -> None:
    """Let two slices of one size lie at one place."""
    biases = [f"ema/c_embedder.time.linear_{number}.bias" for number in (1, 2)]
    first, second = (key for key in index.storage_data if key.fqn in biases)
    index.storage_data[first] = index.storage_data[second]


def test_an_enum_s_member_is_read_as_older_pythons_pickle_it():
    """Python 3.11.0 to 3.11.3 write getattr(enum, name); getattr of anything else is refused."""
    from moe_dit import checkpoint_files

    enum = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    member = b"cbuiltins\ngetattr\n(" + enum + b"S'TORCH_CONTIGUOUS_FORMAT'\ntR."
    assert checkpoint_files._Unpickler(io.BytesIO(member)).load().arguments == ("TORCH_CONTIGUOUS_FORMAT",)
    other = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR."
    with pytest.raises(ValueError, match="could run code"):
        checkpoint_files._Unpickler(io.BytesIO(other)).load()
