"""What grows in a run of weeks: some hundred tiny steps, and ten thousand, looked at from outside."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, kill, losses, wait_for
from helpers.older_run import SHARDS
from helpers.small import RUN_TRAINING, flags_of, step

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


def watched(run: Path, steps: int, *changes: str) -> list[tuple[int, dict[str, list[int]]]]:
    """Train for so many steps; gives what was seen of the processes, each time with the steps recorded by then.

    A true interpreter: of a forked one's memory much is its parent's until it is touched.
    """
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(SHARDS), "--out", str(run), "--steps", str(steps)]
    command += [part for setting in (*TINY, *changes) for part in ("--set", setting)]
    samples = []
    with open(f"{run}.log", "w") as log, subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=log) as process:
        rank = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.5)
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


# Before these batches, each in the middle between two saves, the rank waits until it has been looked at.
STOPS = """
import sys, time
from pathlib import Path
from moe_dit.data.reader import ShardReader
read, calls = ShardReader.read, 0
run = Path(sys.argv[sys.argv.index("--out") + 1])
def stop(reader, *which):
    global calls
    calls += 1
    while calls in (90, 230) and not (run / f"seen_{calls}").exists():
        (run / f"waits_{calls}").touch()
        time.sleep(0.01)
    return read(reader, *which)
ShardReader.read = stop
"""


def test_hundreds_of_steps_take_no_more_files_and_threads_than_dozens(tmp_path):
    run = tmp_path / "run"
    flags = [*flags_of(run), "--steps=240", *(f"--set={setting}" for setting in TINY), "--set=checkpoint.every=20"]
    log = Path(f"{run}.log")
    with open(log, "w") as out:
        process = forks.Popen([sys.executable, "-c", STOPS + RUN_TRAINING, *flags], cwd=ROOT, env=ENV, stderr=out)

    def waits(call: int) -> None:
        wait_for((run / f"waits_{call}").exists, f"batch {call}", log)
        wait_for(lambda: not list(run.rglob("*.tmp")), "the end of a save", log)

    def held() -> tuple[list[int], list[int]]:
        found = looked_at(psutil.Process(process.pid))
        return found["files"], found["threads"]

    try:
        waits(90)
        early = min(held() for _ in range(50) if not time.sleep(0.02))  # the save before may still be closing files
        (run / "seen_90").touch()
        waits(230)
        wait_for(lambda: held() == early, f"{early}, files and threads", log)
        (run / "seen_230").touch()
        assert process.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    finally:
        kill(process)
    assert len(losses(run)) == 240
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", step(200), step(220), step(240)]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.long
def test_ten_thousand_steps_take_no_more_than_a_thousand(tmp_path):
    """Memory within 1%, as many open files, as many checkpoints; in the rank and in the processes that read for it."""
    run = tmp_path / "run"
    samples = watched(run, 10_000, "checkpoint.every=500", "data.workers=auto")
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
