"""Do a two-rank run harm at random moments, again and again, and see that nothing is lost and nobody waits.

    python tests/tools/faults.py --data SHARDS [--faults 100] [--launcher torchrun deepspeed] [--seed 0] [--out FOLDER]

A run that saves every three steps meets, chosen at random, a SIGKILL (a rank, its launcher, or everything at once), a
rank that stands still for 5 to 20 s, a loader process that dies, a full disk for 10 s, and a rename that fails. After
each it must train again, or end and say why in one line, but where all that could speak was killed, and until then not
hang for 60 s; where it has ended the same command starts it again. `latest` must name a checkpoint that loads, of no
earlier step than before; at the end the run's losses must be those of a run that met nothing. About twenty seconds a
fault on two cores. Exit status 1 if anything is off.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moe_dit.build import build_model
from moe_dit.checkpoint_files import read_state
from moe_dit.recipe_file import load_recipe
from moe_dit.records import Records

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import ENV, ROOT, TIMEOUT, finish, free_port, kill, losses, ranks_of, wait_for, wait_for_step
from helpers.faults import fault, library

SMALL = ["--set=model.depth=2", "--set=global_batch_size=16", "--set=checkpoint.every=3", "--set=data.workers=1"]
LIMIT = 60.0  # seconds in which something of a run must move until it trains again, or has ended
SAVED = 6  # steps, in which a save has failed if it was to
KINDS = ("kill rank", "kill launcher", "kill everything", "stand still", "loader", "full disk", "rename")
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=100", "--master_port"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port"],
}


@dataclass(frozen=True)
class Starts:
    """How runs are started: by which launcher, and where what makes their disk fail is."""

    data: Path
    launcher: str
    faults: Path

    def start(self, run: Path, steps: int) -> subprocess.Popen:
        lib = str(library(self.faults))
        env = ENV | fault("write mkdir fsync rename", f"{run}/*", self.faults / "log", "ENOSPC")
        env |= {"FAULT_WHILE": str(self.faults / "now"), "PYTHONPATH": str(ROOT)}
        launcher = [sys.executable, *LAUNCHERS[self.launcher], str(free_port())]
        flags = ["--ds=ds_configs/zero2_ep2.json", "--recipe=digits", "--data", str(self.data), "--out", str(run)]
        command = [*launcher, "jobs/train.py", *flags, "--steps", str(steps), *SMALL]
        with open(f"{run}.log", "a") as log:
            return subprocess.Popen(
                command, env=env | {"LD_PRELOAD": lib}, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )


def last_step(run: Path) -> int:
    """The newest step that a run has recorded, 0 before the first."""
    with suppress(OSError), Records(run / "metrics.jsonl") as found:
        return next((record["step"] for record in found.last()), 0)
    return 0


def family_of(process: subprocess.Popen) -> list[psutil.Process]:
    """A launcher and all that it started."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def trains_on(
    run: Path, process: subprocess.Popen, family: list[psutil.Process], doomed: Sequence[psutil.Process] = ()
) -> bool:
    """Whether a run trains on, or has ended and left nobody.

    Fails where it does neither, and nothing of it moves for the limit: no step is done, and no process begins or ends.

    Args:
        family: what must have ended with its launcher.
        doomed: what cannot train on; what takes its place may.
    """
    end = time.monotonic() + TIMEOUT
    deadline, before = 0.0, None
    lowest = last_step(run)
    while True:
        step, members = last_step(run), family_of(process)
        if process.poll() is None and step > lowest + SAVED and not any(map(_there, doomed)):
            return True
        lowest = min(lowest, step)  # records of steps that are done again are cut as a run is started again
        left = list(filter(_there, family))
        if process.poll() is not None and not left:
            return False
        now = (step, {member.pid for member in (*members, *left)})
        if now != before:
            deadline, before = min(time.monotonic() + LIMIT, end), now
        assert time.monotonic() < deadline, f"it neither trains nor has ended: {left}"
        time.sleep(0.2)


def _there(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def send(processes: list[psutil.Process], number: int) -> None:
    """Send a signal to those that are there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextmanager
def failing(faults: Path, *operations: str):
    """In the block these operations on the run's files fail."""
    (faults / "now").mkdir(exist_ok=True)
    (faults / "log").unlink(missing_ok=True)
    for operation in operations:
        (faults / "now" / operation).touch()
    try:
        yield
    finally:
        shutil.rmtree(faults / "now")


def strike(kind: str, process: subprocess.Popen, chosen: random.Random, faults: Path) -> Sequence[psutil.Process]:
    """Do it; returns when it is over, and what it broke may go on; gives what cannot."""
    wait_for(lambda: process.poll() is not None or len(ranks_of(process)) == 2, "two ranks", None)
    rank = chosen.choice(ranks_of(process))
    doomed = []
    if kind == "kill rank":
        send([rank], signal.SIGKILL)
        doomed = [rank]
    elif kind == "kill launcher":
        send([psutil.Process(process.pid)], signal.SIGKILL)
    elif kind == "kill everything":
        # But for what removes multiprocessing's semaphores then: this machine would keep them in shared memory.
        send([member for member in family_of(process) if "resource_tracker" not in _line(member)], signal.SIGKILL)
    elif kind == "stand still":
        send([rank], signal.SIGSTOP)
        time.sleep(chosen.uniform(5, 20))
        send([rank], signal.SIGCONT)
    elif kind == "loader":
        # The workers are the children of a rank's fork server, which is its child.
        (worker,) = [child for server in rank.children() for child in server.children()]
        send([worker], signal.SIGKILL)
        doomed = [rank]
    elif kind == "full disk":
        with failing(faults, "write", "mkdir"):
            time.sleep(10)
    else:
        with failing(faults, "rename"):
            deadline = time.monotonic() + 10
            while not (faults / "log").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
    return doomed


def told(kind: str, said: str) -> str:
    """The line that says why a run has ended; fails where there is none, or a rank's traceback instead."""
    assert "[rank" not in said or "Traceback" not in said, said[-5000:]
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "stopped as asked"))]
    if kind == "kill everything":
        return "nobody could say so"
    assert lines, said[-5000:]
    return lines[0]


def check_latest(run: Path, before: int) -> int:
    """The step of `latest`, whose checkpoint must load whole and be no older than before; 0 where nothing is saved."""
    latest = run / "checkpoints/latest"
    if not latest.exists():
        assert before == 0, f"latest named step {before}, and is gone"
        return 0
    checkpoint = run / "checkpoints" / latest.read_text().strip()
    names = {
        name: weight.numel() for name, weight in build_model(load_recipe(str(run / "config.yaml"))).named_parameters()
    }
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    state = {f"{kind}/{name}": torch.full((size,), torch.nan) for kind in kinds for name, size in names.items()}
    read_state(state, checkpoint)
    assert all(tensor.isfinite().all() for tensor in state.values()), f"{checkpoint} has holes"
    step = int(checkpoint.name.removeprefix("step_"))
    assert step >= before, f"latest went back from step {before} to {step}"
    return step


def harm(starts: Starts, out: Path, count: int, chosen: random.Random) -> float:
    """Train a run among so many faults; gives the largest relative difference of its losses from undisturbed ones."""
    run, whole, log = out / "harmed", out / "whole", out / "harmed.log"
    kinds = [kind for _ in range(-(-count // len(KINDS))) for kind in chosen.sample(KINDS, len(KINDS))][:count]
    process = None
    step = 0
    try:
        for number, kind in enumerate(kinds, start=1):
            if process is None:
                process, begin = starts.start(run, 10**6), log.stat().st_size if log.exists() else 0
                wait_for_step(run, last_step(run) + 1, process)
            time.sleep(chosen.uniform(0, 3))
            family = family_of(process)
            start, begin = time.monotonic(), log.stat().st_size
            doomed = strike(kind, process, chosen, starts.faults)
            over = time.monotonic()
            goes_on = trains_on(run, process, family, doomed)
            what = "trained on" if goes_on else f"ended: {told(kind, log.read_text()[begin:])[:100]}"
            assert goes_on or kind != "stand still", what
            if not goes_on:
                process = None
                step = check_latest(run, step)
            took = time.monotonic() - over
            # Only where a launcher has started ranks anew may it be more: on a slow machine they take as long to start.
            assert took < LIMIT or (goes_on and kind != "stand still"), f"{what}, after {took:.0f} s"
            seconds = f"{over - start:.0f} s, then {took:.1f} s"
            print(f"{starts.launcher}, fault {number}: {kind}, {seconds}; {what}", flush=True)
    finally:
        if process is not None:
            family = family_of(process)
            kill(process)
            _, left = psutil.wait_procs(family, timeout=LIMIT)
            assert not left, left
    step = max(check_latest(run, step), 1)
    finish(starts.start(run, step + 3), run, 600)
    finish(starts.start(whole, step + 3), whole, 3600)
    return max(abs(a - b) / abs(b) for a, b in zip(losses(run), losses(whole), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="the digits' latent shards")
    parser.add_argument("--faults", type=int, default=100, help="in all (default 100)")
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="(default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and faults (default 0)")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    args = parser.parse_args()
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, launcher in enumerate(args.launcher):
            out = (args.out or Path(temporary)) / launcher
            shutil.rmtree(out, ignore_errors=True)
            (out / "faults").mkdir(parents=True)
            count = args.faults // len(args.launcher) + (number < args.faults % len(args.launcher))
            starts = Starts(args.data.absolute(), launcher, out / "faults")
            differences.append(harm(starts, out, count, random.Random(args.seed + number)))
            steps = len(losses(out / "harmed"))
            print(f"{launcher}: {count} faults, {steps} steps: losses differ by {differences[-1]:.1e}", flush=True)
    sys.exit(max(differences) > 1e-6)


if __name__ == "__main__":
    main()
