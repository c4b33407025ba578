"""What grows in a run of weeks: some hundred tiny steps, and ten thousand, looked at from outside."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, forks, losses
from helpers.older_run import SHARDS
from helpers.small import step

TINY = [
    *("model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.num_experts=4"),
    *("model.moe.expert_width=32", "global_batch_size=4"),
]
NOISE = 64 * 4096  # bytes: 1% of a small process is a few pages


def looked_at(process: psutil.Process) -> dict[str, list[int]]:
    """Of a rank and the processes that it started: resident bytes, those that no file backs, files, threads."""
    found: dict[str, list[int]] = {"resident": [], "anonymous": [], "files": [], "threads": []}
    for member in (process, *sorted(process.children(recursive=True), key=lambda child: child.pid)):
        memory = member.memory_info()
        found["resident"].append(memory.rss)
        found["anonymous"].append(memory.rss - memory.shared)
        found["files"].append(member.num_fds())
        found["threads"].append(member.num_threads())
    return found


def watched(start, run: Path, steps: int, every: float, *changes: str) -> list[tuple[int, dict[str, list[int]]]]:
    """Train for so many steps; gives what was seen of the processes, each time with the steps recorded by then.

    Args:
        start: starts a command line, as subprocess.Popen does.
        every: seconds between looks.
        changes: of the recipe.
    """
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(SHARDS), "--out", str(run), "--steps", str(steps)]
    command += [part for setting in (*TINY, *changes) for part in ("--set", setting)]
    samples = []
    with open(f"{run}.log", "w") as log, start(command, cwd=ROOT, env=ENV, stderr=log) as process:
        rank = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(every)
            with suppress(FileNotFoundError, psutil.Error):
                samples.append(((run / "metrics.jsonl").read_bytes().count(b"\n"), looked_at(rank)))
    assert process.returncode == 0, Path(f"{run}.log").read_text()[-3000:]
    assert len(losses(run)) == steps
    return samples


def least(samples: list[tuple[int, dict[str, list[int]]]], first: int, last: int) -> dict[str, list[int]]:
    """The least of each number in a part of a run: a sample that falls into a save has its copy of the state."""
    part = [found for step, found in samples if first <= step < last]
    assert len(part) > 3
    return {key: [min(values) for values in zip(*(found[key] for found in part), strict=True)] for key in part[0]}


def test_hundreds_of_steps_take_no_more_files_and_threads_than_dozens(tmp_path):
    run = tmp_path / "run"
    samples = watched(forks.Popen, run, 240, 0.02, "checkpoint.every=20")
    early, late = least(samples, 40, 120), least(samples, 160, 240)
    assert late["files"] == early["files"] and late["threads"] == early["threads"]
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", step(200), step(220), step(240)]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.long
def test_ten_thousand_steps_take_no_more_than_a_thousand(tmp_path):
    """Memory within 1%, as many open files, as many checkpoints; in the rank and in the processes that read for it."""
    run = tmp_path / "run"
    # A true interpreter: of a forked one's memory much is its parent's until it is touched.
    samples = watched(subprocess.Popen, run, 10_000, 0.5, "checkpoint.every=500", "data.workers=auto")
    early, late = least(samples, 1000, 3000), least(samples, 8000, 9950)
    assert len(early["files"]) > 1 and late["files"][0] == early["files"][0], (early, late)
    for before, after in zip(early["files"], late["files"], strict=True):
        assert after <= before + 4, (early, late)  # a reader's batches on their way; there were 14 saves between
    for key in ("resident", "anonymous"):
        for before, after in zip(early[key], late[key], strict=True):
            assert after < 1.01 * before + NOISE, (key, early, late)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00009000", "step_00009500", "step_00010000"]
    assert not list(run.rglob("*.tmp"))
