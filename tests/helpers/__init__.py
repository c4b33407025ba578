"""What tests share: starting the real commands (helpers.forks), waiting for them, reading what they left."""

import fcntl
import functools
import importlib
import itertools
import json
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from textwrap import dedent, indent

import psutil
import torch

from helpers import forks
from helpers.forks import ENV, ROOT, kill
from moe_dit import build_model, load_model
from moe_dit.events import events
from moe_dit.runtime import command

STEPS = 12  # of the runs that others are held against
TIMEOUT = 400  # seconds after which what a test waits for has hung, on however busy a machine


def project_files() -> list[str]:
    """The project's files as they stand: those that git knows, and new ones that it does not ignore."""
    found = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    return [name for name in found.split("\0") if name and (ROOT / name).is_file()]


def copy_project(folder: Path, but: str | None = None) -> None:
    """Copy the project's files, but for those whose path begins so."""
    for name in project_files():
        if but is None or not name.startswith(but):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def ds_file(folder: Path, stage: int, ep: int, **zero) -> Path:
    """A DeepSpeed JSON of ZeRO's stage and the degree of expert parallelism."""
    path = folder / f"zero{stage}_ep{ep}.json"
    sections = {"expert_parallel": {"enabled": True, "autoep_size": ep}, "zero_optimization": {"stage": stage, **zero}}
    path.write_text(json.dumps(sections))
    return path


_held: list[socket.socket] = []  # as long as this process lives


@functools.cache
def _ports() -> Iterator[int]:
    """A hundred ports, over and over, that no other process of a suite on this machine is given."""
    for first in range(10_000, 20_000, 100):
        held = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            held.bind(f"\0moe-dit ports from {first}")
            _held.append(held)
            return itertools.cycle(range(first, first + 100))
    raise RuntimeError("a hundred processes on this machine run tests already")


def free_port() -> int:
    """A port of this machine that nobody listens on.

    What listens there starts seconds later: the next port is another, and all are below those that the system gives to
    whoever connects. Jobs of tests/cluster have those from 20,000.
    """
    while True:
        port = next(_ports())
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port


def start_training(
    ranks: int, ds: str | Path, shards: Path, run: Path, *flags: str, launcher: str = "tasks"
) -> subprocess.Popen:
    """A training command, in a session of its own; output goes to RUN.log.

    Args:
        ds: the name of a file in ds_configs, or a path.
        launcher: "tasks", forked as srun starts tasks; "deepspeed", as in the README, which starts true interpreters.
    """
    port = str(free_port())
    file = ds if isinstance(ds, Path) else f"ds_configs/{ds}.json"
    command = ["jobs/train.py", "--ds", str(file), "--recipe", "digits", "--data", str(shards), "--out", str(run)]
    how: dict = {"cwd": ROOT, "env": ENV, "start_new_session": True}
    with open(f"{run}.log", "a") as log:
        how |= {"stdout": log, "stderr": log}
        if launcher == "deepspeed":
            runner = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
            return subprocess.Popen([sys.executable, *runner, *command, *flags], **how)
        tasks = ["tests/helpers/tasks.py", str(ranks), port] if ranks > 1 else []
        return forks.Popen([sys.executable, *tasks, *command, *flags], **how)


def finish(process: subprocess.Popen, run: Path, timeout: float = TIMEOUT) -> str:
    """Wait for a training command to end well; gives its output."""
    try:
        status = process.wait(timeout)
    finally:
        kill(process)
    log = Path(f"{run}.log").read_text()
    assert status == 0, log[-5000:]
    return log


def started(process: subprocess.Popen, word: str) -> list[psutil.Process]:
    """A process and all that it started, where this word follows the interpreter on the command line."""
    found = []
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
            # What was forked has its command line as one word.
            if word in " ".join(member.cmdline()).split()[1:4]:
                found.append(member)
    return found


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks of a training command: itself, or what its launcher started."""
    return started(process, "jobs/train.py")


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
    forks.run(command, check=True, cwd=ROOT, env=ENV)
    return load_model(out)


def state_of(run: Path, step: int, kind: str, recipe: str = "digits") -> dict[str, torch.Tensor]:
    """A kind of training state of each weight, flattened, from a run's checkpoint."""
    from moe_dit.checkpoint import read_state  # brings in DeepSpeed, which not every test file needs

    shapes = {name: weight.shape for name, weight in build_model(recipe, device="meta").named_parameters()}
    state = {f"{kind}/{name}": torch.empty(shape.numel()) for name, shape in shapes.items()}
    read_state(state, run / "checkpoints" / f"step_{step:08d}")
    return {name.removeprefix(f"{kind}/"): value for name, value in state.items()}


def wait_for_step(run: Path, step: int, process: subprocess.Popen, timeout: float = TIMEOUT) -> None:
    """Wait until a run has recorded a step; metrics are flushed every second, so this may be late, never early."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def wait_for(true, what: str, log: Path | None, timeout: float = TIMEOUT) -> None:
    """Wait until something is true, for example of a run that writes a log."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            told = f"\n{log.read_text()[-6000:]}" if log else ""
            raise AssertionError(f"{what}: not within {timeout} s{told}")
        time.sleep(0.05)


def told(run: Path) -> list[str]:
    """The kinds of what happened to a run, in order."""
    return [event["what"] for event in events(run)]


def last_step(run: Path) -> int:
    """The newest step that a run has recorded, 0 before the first."""
    return records(run)[-1]["step"] if (run / "metrics.jsonl").exists() and records(run) else 0


def call(name: str, *arguments):
    """Run a command in this process, a module or a script of jobs/; gives its exit status."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    limit, command.limit_the_end = command.limit_the_end, lambda status: None  # this process goes on
    try:
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            command.run(importlib.import_module(name).main)
    except SystemExit as done:
        return done.code
    finally:
        sys.argv, command.limit_the_end = before, limit


def refused(captured, name: str, *arguments, harmless: Path | None = None) -> str:
    """Run a command in this process (:func:`call`) that must exit 2 with one line; gives it, with its end.

    Args:
        captured: pytest's capfd or capsys.
        harmless: a folder in which it makes and removes nothing.
    """
    before = harmless and sorted(harmless.rglob("*"))
    captured.readouterr()
    status = call(name, *arguments)
    out, err = captured.readouterr()
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
    assert (harmless and sorted(harmless.rglob("*"))) == before
    return err


def run_ranks(
    commands: list[list[str]], folders: list[Path], timeout: float = TIMEOUT, **more: str
) -> list[subprocess.CompletedProcess]:
    """One process a rank, each with its own command and folder to run in; ``more`` of the environment is as given."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def one(rank: int) -> subprocess.CompletedProcess:
        env = ENV | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)} | more
        return forks.run(commands[rank], cwd=folders[rank], env=env, capture_output=True, text=True, timeout=timeout)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(one, range(len(commands))))


def run_scripts(body: str, ranks: int, folder: Path, **more: str) -> list[subprocess.CompletedProcess]:
    """The same Python on each rank, as a command's main; it knows ``rank``."""
    script = folder / "script.py"
    script.write_text(
        "from moe_dit.runtime import command, ranks\n"
        "from moe_dit.runtime.errors import InputError, Stop\n"
        "def main():\n"
        "    ranks.start()\n"
        "    rank = ranks.world().rank\n" + indent(dedent(body), "    ") + "\ncommand.run(main)\n"
    )
    return run_ranks([[sys.executable, str(script)]] * ranks, [folder] * ranks, **more)


def half_done(module: str, owner: str, name: str, after: int) -> list[str]:
    """``python -m MODULE`` that stands still for ever in the call of a function that follows the first so many.

    Args:
        owner: what has the function, as pkgutil.resolve_name knows it.
    """
    return [sys.executable, "-c", standing_still(owner, name, after) + dedent(f"""
        import runpy
        runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
    """)]  # fmt: skip


def standing_still(owner: str, name: str, after: int) -> str:
    """Code by which a function that was called so many times waits for ever."""
    return dedent(f"""
        import pkgutil, threading
        owner = pkgutil.resolve_name({owner!r})
        def stand(*given, left=iter(range({after})), call=owner.{name}, **more):
            return threading.Event().wait() if next(left, None) is None else call(*given, **more)
        owner.{name} = stand
    """)


def once(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, once for all test processes: the others wait for it. It is not to be changed."""
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()  # fails where an earlier attempt has: what it met is no longer told
            make(folder)
            done.touch()
    return folder
