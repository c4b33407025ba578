"""What the tests and tests/matrix.py share: starting the real commands, waiting for them, reading what they left."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from moe_dit import build_model, load_model
from moe_dit.events import events
from moe_dit.runtime import command

ROOT = Path(__file__).parent.parent
STEPS = 12  # of the runs that others are held against
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def project_files() -> list[str]:
    """The project's files as they stand: those that git knows, and new ones that it does not ignore."""
    found = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    return [name for name in found.split("\0") if name and (ROOT / name).is_file()]


def ds_file(folder: Path, stage: int, ep: int, **zero) -> Path:
    """A DeepSpeed JSON of ZeRO's stage and the degree of expert parallelism."""
    path = folder / f"zero{stage}_ep{ep}.json"
    sections = {"expert_parallel": {"enabled": True, "autoep_size": ep}, "zero_optimization": {"stage": stage, **zero}}
    path.write_text(json.dumps(sections))
    return path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_training(
    ranks: int, ds: str | Path, shards: Path, run: Path, *flags: str, launcher: str = "tasks"
) -> subprocess.Popen:
    """A training command, in a process group of its own; output goes to RUN.log.

    Args:
        ds: the name of a file in ds_configs, or a path.
        launcher: "deepspeed", as in the README; "tasks", as under srun, which starts in a third of the time.
    """
    port = str(free_port())
    command = [sys.executable]
    if launcher == "deepspeed":
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    elif ranks > 1:
        command += ["tests/tasks.py", str(ranks), port, sys.executable]
    file = ds if isinstance(ds, Path) else f"ds_configs/{ds}.json"
    command += ["jobs/train.py", "--ds", str(file), "--recipe", "digits", "--data", str(shards), "--out", str(run)]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen([*command, *flags], cwd=ROOT, env=ENV, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, run: Path, timeout: float = 300) -> str:
    """Wait for a training command to end well; gives its output."""
    try:
        status = process.wait(timeout)
    finally:
        kill(process)
    log = Path(f"{run}.log").read_text()
    assert status == 0, log[-5000:]
    return log


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all its ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks of a training command: itself, or what its launcher started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return [member for member in family if "jobs/train.py" in member.cmdline()[1:3]]


def records(run: Path) -> list[dict]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, key: str = "loss") -> list[float]:
    """A number of each step of a run, which must have a record of every step, once."""
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record[key] for record in found]


def export(run: Path, out: Path, weights: str):
    """The command that exports a run; gives the model."""
    command = [sys.executable, "jobs/export.py", str(run), "--weights", weights, "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, env=ENV)
    return load_model(out)


def state_of(run: Path, step: int, kind: str, recipe: str = "digits") -> dict[str, torch.Tensor]:
    """A kind of training state of each weight, flattened, from a run's checkpoint."""
    from moe_dit.checkpoint import read_state  # brings in DeepSpeed, which not every test file needs

    shapes = {name: weight.shape for name, weight in build_model(recipe, device="meta").named_parameters()}
    state = {f"{kind}/{name}": torch.empty(shape.numel()) for name, shape in shapes.items()}
    read_state(state, run / "checkpoints" / f"step_{step:08d}")
    return {name.removeprefix(f"{kind}/"): value for name, value in state.items()}


def wait_for_step(run: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    """Wait until a run has recorded a step; metrics are flushed every second, so this may be late, never early."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def wait_for(true, what: str, log: Path, timeout: float = 400) -> None:
    """Wait until something is true of a run that writes a log."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s\n{log.read_text()[-6000:]}"
        time.sleep(0.1)


def told(run: Path) -> list[str]:
    """The kinds of what happened to a run, in order."""
    return [event["what"] for event in events(run)]


def last_step(run: Path) -> int:
    """The newest step that a run has recorded, 0 before the first."""
    return records(run)[-1]["step"] if (run / "metrics.jsonl").exists() and records(run) else 0


def call(module: str, *arguments):
    """Run a command in this process; gives its exit status."""
    before, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        command.run(importlib.import_module(module).main)
    except SystemExit as done:
        return done.code
    finally:
        sys.argv = before
