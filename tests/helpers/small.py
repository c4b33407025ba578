"""The small run of tests/golden/run_format_1 as this version trains it, and what continues it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import ENV, ROOT, TIMEOUT, finish, forks, free_port, losses, once, standing_still, start_training
from helpers.older_run import FLAGS, OLD, SHARDS

SMALL = [f"--set={flag}" for flag in FLAGS if "checkpoint" not in flag]
LOSSES = json.loads((OLD / "losses.json").read_text())  # of its eight steps, recorded once and for all


def flags_of(run: Path, ds: str = "zero1_ep1") -> list[str]:
    """The training command's flags for it."""
    return ["--ds", str(ROOT / f"ds_configs/{ds}.json"), "--recipe", "digits", *SMALL, "--data", str(SHARDS),
            "--out", str(run)]  # fmt: skip


def train(run: Path, *flags: str, ranks: int = 1) -> str:
    """Train it, or go on with it, to its end; gives its output."""
    before = Path(f"{run}.log").read_text() if Path(f"{run}.log").exists() else ""
    ds = "zero1_ep1" if ranks == 1 else "zero2_ep2"
    return finish(start_training(ranks, ds, SHARDS, run, *SMALL, *flags), run)[len(before) :]


def train_here(run: Path, *flags: str, code: str = "", **how: Any) -> subprocess.CompletedProcess:
    """The same on one rank, for what may end otherwise; its process first runs ``code``; ``how``: of forks.run."""
    command = [sys.executable, *_script(code), *flags_of(run), *flags]
    return forks.run(
        command, **{"cwd": ROOT, "env": ENV, "capture_output": True, "text": True, "timeout": TIMEOUT} | how
    )


def start(
    run: Path, *flags: str, ranks: int = 1, code: str = "", launcher: Sequence[str] = ("tests/helpers/tasks.py",)
) -> subprocess.Popen:
    """Start to train it, or to go on with it; output goes to RUN.log.

    Args:
        code: what each rank runs first.
        launcher: what starts several ranks (:func:`launcher_named`).
    """
    tasks = [*launcher, str(ranks), str(free_port())] if ranks > 1 else []
    ds = "zero1_ep1" if ranks == 1 else "zero2_ep2"
    with open(f"{run}.log", "a") as log:
        command = [sys.executable, *tasks, *_script(code), *flags_of(run, ds), *flags]
        return forks.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log)


def _script(code: str) -> list[str]:
    """What comes before the training command's flags."""
    return ["-c", code + RUN_TRAINING] if code else ["jobs/train.py"]


RUN_TRAINING = """
import runpy, sys
sys.argv[0] = "jobs/train.py"
runpy.run_path("jobs/train.py", run_name="__main__")
"""


def stands_still(after: int) -> str:
    """Code for a rank that trains so many steps, and then reads for ever."""
    return standing_still("moe_dit.data.reader:ShardReader", "read", after)


def eight_steps(shared: Path) -> Path:
    """A run of its eight steps with a checkpoint at every second; tests take a copy."""

    def make(folder: Path) -> None:
        train(folder / "run", "--steps=8", "--set=checkpoint.every=2", "--set=checkpoint.keep=9")
        assert losses(folder / "run") == pytest.approx(LOSSES, rel=1e-6)

    return once(shared, "eight_steps", make) / "run"


def on_two_ranks(shared: Path) -> Path:
    """Twelve steps of it that nobody interrupts, on two expert-parallel ranks, with a checkpoint at every fourth."""

    def make(folder: Path) -> None:
        train(folder / "run", "--steps=12", "--set=checkpoint.every=4", ranks=2)
        assert losses(folder / "run")[:8] == pytest.approx(LOSSES, rel=1e-5)

    return once(shared, "small_on_two_ranks", make) / "run"


def branched(shared: Path) -> Path:
    """The eight steps, gone back to step 4 and trained on to 5 and 7 with another learning rate."""
    whole = eight_steps(shared)

    def make(folder: Path) -> None:
        run = shutil.copytree(whole, folder / "run")
        back = ["--resume", str(run / "checkpoints" / "step_00000004"), "--steps=7"]
        train(run, *back, "--set=optimizer.lr=0.01", "--set=checkpoint.every=5", "--set=checkpoint.keep=9")
        assert names(run) == [step(n) for n in (2, 4, 5, 6, 7, 8)]

    return once(shared, "branched", make) / "run"


def step(number: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{number:08d}"


def names(run: Path) -> list[str]:
    """A run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def latest(run: Path) -> str:
    """The checkpoint that a run's ``latest`` names."""
    return (run / "checkpoints" / "latest").read_text().strip()


def assert_stopped_as_asked(run: Path, shared: Path) -> None:
    """A run on two ranks that was told to stop once saved its last step, said so once, and is the undisturbed one."""
    log, done = Path(f"{run}.log").read_text(), len(losses(run))
    assert 4 <= done < 50000
    assert latest(run) == step(done)
    assert log.count(f"stopped as asked after step {done}, saved in") == 1
    assert "Traceback" not in log
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    both = min(done, 12)
    assert losses(run)[:both] == pytest.approx(losses(on_two_ranks(shared))[:both], rel=1e-6)


def copy(run: Path, folder: Path) -> Path:
    """A copy of a run, FOLDER/run, to be changed."""
    return shutil.copytree(run, folder / "run")


def flip(file: Path, byte: int, change: int = 1) -> None:
    """Change a byte of a file."""
    data = bytearray(file.read_bytes())
    data[byte] ^= change
    file.write_bytes(data)


LAUNCHER = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers.tasks import main
os.environ |= GIVEN
sys.exit(main())
"""
# By which ranks know that there was one, if it ended before they began.
GIVEN = {"deepspeed": {"CROSS_RANK": "0"}, "torchrun": {"TORCHELASTIC_RUN_ID": "none"}}


def launcher_named(name: str, folder: Path) -> list[str]:
    """What starts forked ranks as tests/helpers/tasks.py does, and is known to them as a launcher of this name."""
    (folder / name).write_text(LAUNCHER.replace("GIVEN", repr(GIVEN.get(name, {}))))
    return [str(folder / name)]
