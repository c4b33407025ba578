"""Kill a two-rank run at random moments, again and again, and see that nothing is lost.

    python tests/tools/kills.py --data SHARDS [--kills 200] [--seed 0] [--out FOLDER] [--forked]

A run that saves every few steps is started by DeepSpeed's launcher and gets a SIGKILL: its launcher, one rank, or
everything at once, one time in five while it starts, else in its first seconds of training. After each, `latest` must
name a checkpoint that loads, of no earlier step than before; at the end the run's losses must be those of a run that
nobody killed, to 1e-6. About fifteen seconds a kill on two cores; with --forked about three, where a stand-in of the
launcher forks the ranks. Exit status 1 if anything is off.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moe_dit.build import build_model
from moe_dit.checkpoint_files import read_state
from moe_dit.recipe_file import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import TIMEOUT, finish, kill, losses, ranks_of, small, start_training, wait_for, wait_for_step

TARGETS = ("launcher", "rank", "everything")
SMALL = ["--set", "model.depth=2", "--set", "global_batch_size=16", "--set", "checkpoint.every=3"]


@dataclass(frozen=True)
class Starts:
    """How runs are started.

    Attributes:
        starting: seconds of a start in which kills fall.
        training: seconds after the first step in which they fall.
    """

    data: Path
    forked: bool
    starting: float
    training: float

    def start(self, run: Path, steps: int) -> subprocess.Popen:
        flags = [*SMALL, "--steps", str(steps)]
        if self.forked:
            launcher = small.launcher_named("deepspeed", run.parent)
            process = small.start(run, *flags, "--data", str(self.data), ranks=2, launcher=launcher)
            # A rank without the other waits for it for minutes: DeepSpeed's second launcher would start both.
            wait_for(lambda: len(ranks_of(process)) == 2, "two ranks", Path(f"{run}.log"))
            return process
        return start_training(2, "zero2_ep2", self.data, run, *flags, launcher="deepspeed")


def wait_for_new_step(run: Path, saved: int, process: subprocess.Popen) -> None:
    """Wait until a run has done a step after those that were saved."""
    wait_for_step(run, saved + 1, process)
    # Records of steps that will be done again are cut at the start; until then they are the killed run's.
    while (
        process.poll() is None and (run / "metrics.jsonl").stat().st_mtime <= psutil.Process(process.pid).create_time()
    ):
        time.sleep(0.02)


def strike(process: subprocess.Popen, target: str, chosen: random.Random) -> None:
    """Kill the target, and wait until all that belonged to the run has ended by itself."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ranks = ranks_of(process)
    if target == "everything":
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
    elif target == "rank" and ranks:
        chosen.choice(ranks).send_signal(signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT)
    _, left = psutil.wait_procs(family, timeout=TIMEOUT)
    assert not left, f"still running two minutes after the {target} was killed: {left}"


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


def compare(starts: Starts, run: Path, out: Path) -> float:
    """The largest relative difference of the run's losses from those of a run that nobody killed."""
    got = losses(run)
    whole = out / "whole"
    finish(starts.start(whole, len(got)), whole, 3600)
    return max(abs(a - b) / abs(b) for a, b in zip(got, losses(whole), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="the digits' latent shards")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and targets (default 0)")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--forked", action="store_true", help="ranks forked by a stand-in, of a smaller network")
    args = parser.parse_args()
    starts = Starts(args.data, args.forked, *((1.5, 0.5) if args.forked else (8.0, 4.0)))
    chosen = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        run = out / "killed"
        shutil.rmtree(run, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        step = 0
        for number in range(1, args.kills + 1):
            target = chosen.choice(TARGETS)
            starting = chosen.random() < 0.2
            moment = chosen.uniform(0, starts.starting if starting else starts.training)
            process = starts.start(run, 10**6)
            try:
                if not starting:
                    wait_for_new_step(run, step, process)
                time.sleep(moment)
                assert process.poll() is None, f"the run ended by itself, see {run}.log"
                strike(process, target, chosen)
            finally:
                kill(process)
            step = check_latest(run, step)
            when = f"{moment:.1f} s after {'the start' if starting else 'a first step'}"
            print(f"kill {number}: {target}, {when}; latest is step {step}", flush=True)
        finish(starts.start(run, step + 3), run, 600)
        error = compare(starts, run, out)
    print(f"{args.kills} kills, {step + 3} steps: losses differ by {error:.1e} from the run that nobody killed")
    sys.exit(error > 1e-6)


if __name__ == "__main__":
    main()
