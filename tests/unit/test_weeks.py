"""What grows in a run of weeks: ten thousand tiny steps, looked at from outside."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from helpers import ENV, ROOT, losses

TINY = [
    *("model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.num_experts=4"),
    *("model.moe.expert_width=32", "global_batch_size=4", "data.workers=auto", "checkpoint.every=500"),
]
NOISE = 64 * 4096  # bytes: 1% of a small process is a few pages


def looked_at(process: psutil.Process) -> dict[str, list[int]]:
    """Of a rank and the processes that it started: bytes that are resident, those that no file backs, open files."""
    found: dict[str, list[int]] = {"resident": [], "anonymous": [], "files": []}
    for member in (process, *sorted(process.children(recursive=True), key=lambda child: child.pid)):
        memory = member.memory_info()
        found["resident"].append(memory.rss)
        found["anonymous"].append(memory.rss - memory.shared)
        found["files"].append(member.num_fds())
    return found


def watched(shards: Path, run: Path, steps: int) -> list[tuple[int, dict[str, list[int]]]]:
    """Train for so many steps; gives what was seen of the processes, each time with the steps recorded by then."""
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(shards), "--out", str(run), "--steps", str(steps)]
    command += [part for setting in TINY for part in ("--set", setting)]
    samples = []
    with open(f"{run}.log", "w") as log, subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=log) as process:
        rank = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(1)
            with suppress(FileNotFoundError, psutil.Error):
                samples.append(((run / "metrics.jsonl").read_bytes().count(b"\n"), looked_at(rank)))
    assert process.returncode == 0, Path(f"{run}.log").read_text()[-3000:]
    return samples


def least(samples: list[tuple[int, dict[str, list[int]]]], first: int, last: int) -> dict[str, list[int]]:
    """The least of each number in a part of a run: a sample that falls into a save has its copy of the state."""
    part = [found for step, found in samples if first <= step < last]
    assert len(part) > 3
    return {key: [min(values) for values in zip(*(found[key] for found in part), strict=True)] for key in part[0]}


def test_ten_thousand_steps_take_no_more_than_a_thousand(latents, tmp_path):
    """Memory within 1%, as many open files, as many checkpoints; in the rank and in the processes that read for it."""
    run = tmp_path / "run"
    samples = watched(latents, run, 10_000)
    assert len(losses(run)) == 10_000
    early, late = least(samples, 1000, 3000), least(samples, 8000, 9950)
    assert len(early["files"]) > 1
    assert late["files"] == early["files"]
    for key in ("resident", "anonymous"):
        for before, after in zip(early[key], late[key], strict=True):
            assert after < 1.01 * before + NOISE, (key, early, late)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00009000", "step_00009500", "step_00010000"]
    assert not list(run.rglob("*.tmp"))
