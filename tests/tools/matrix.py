"""One run in every topology: trains, kills, continues and compares, and prints a table.

    python tests/tools/matrix.py --data SHARDS [--pixels SHARDS] [--out FOLDER] [--steps 30]
        [--only losses,resume,kills] [--kills 20] [--small]

Losses must agree with the first topology's to 1e-5 relative over the first 5 steps and to 1e-3 over all; a run that was
killed and continued must agree to 1e-6 in its own topology and to 1e-3 in another, its EMA as well; and a kill at any
moment of a save must leave a checkpoint that loads. Takes about 20 minutes on two cores, two with --small;
tests/ranks/test_train.py keeps the fast part.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moe_dit.build import build_model
from moe_dit.checkpoint_files import read_state
from moe_dit.export import export_checkpoint
from moe_dit.lineage import find_checkpoint
from moe_dit.recipe_file import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import finish, kill, last_step, losses, start_training, wait_for, wait_for_step
from helpers.small import SMALL

TOPOLOGIES = [(1, 1, 1), (2, 1, 2), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 2, 2), (4, 4, 2), (4, 4, 3)]
PIXEL_TOPOLOGIES = [(1, 1, 1), (2, 2, 2), (2, 2, 3)]
# A checkpoint of the small network, a megabyte and a half, takes a second: training is not over before a kill can fall.
SLOW = ["--set", "checkpoint.write_gb_per_second=0.0015"]

console = Console()


def name(topology: tuple[int, int, int]) -> str:
    return "ranks {} EP {} ZeRO {}".format(*topology)


def start(topology, data: Path, run: Path, steps: int, *more: str, recipe: str = "digits", every: int = 10):
    """Start a run of a topology; ``more``: flags."""
    ranks, ep, zero = topology
    ds = run.with_suffix(".json")
    ds.parent.mkdir(parents=True, exist_ok=True)
    config = {"expert_parallel": {"enabled": True, "autoep_size": ep}, "zero_optimization": {"stage": zero}}
    ds.write_text(json.dumps(config))
    flags = ["--recipe", recipe, "--steps", str(steps), "--set", f"checkpoint.every={every}"]
    return start_training(ranks, ds, data, run, *flags, *more)


def worst(got: list[float], want: list[float]) -> float:
    if len(got) != len(want):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def ema_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    recipe = load_recipe(str(run / "config.yaml"))
    shapes = {key: weight.shape for key, weight in build_model(recipe, device="meta").named_parameters()}
    state = {f"ema/{key}": torch.empty(shape.numel()) for key, shape in shapes.items()}
    read_state(state, checkpoint)
    return state


def ema_error(run: Path, reference: Path) -> float:
    got, want = ema_of(run), ema_of(reference)
    return max(((got[key] - want[key]).norm() / want[key].norm().clamp_min(1e-3)).item() for key in want)


class Results:
    def __init__(self, title: str, columns: list[str]):
        self.table, self.bad = Table(*columns, "", title=title), 0

    def add(self, *cells: str, good: bool) -> None:
        self.bad += not good
        self.table.add_row(*cells, "ok" if good else "OFF")
        console.print(*cells, "ok" if good else "OFF")


def compare_losses(title: str, topologies, data: Path, out: Path, steps: int, recipe: str, more: list[str]) -> Results:
    results = Results(title, ["topology", "first 5 steps", "all steps"])
    for topology in topologies:
        run = out / f"{recipe}_{'_'.join(map(str, topology))}"
        if not (run / "checkpoints" / f"step_{steps:08d}").exists():
            finish(start(topology, data, run, steps, *more, recipe=recipe), run, 3600)
        got, want = losses(run), losses(out / f"{recipe}_1_1_1")
        five, all_ = worst(got[:5], want[:5]), worst(got, want)
        results.add(name(topology), f"{five:.1e}", f"{all_:.1e}", good=five <= 1e-5 and all_ <= 1e-3)
    return results


def compare_resumed(data: Path, out: Path, steps: int, more: list[str]) -> Results:
    """Kill a (2, 2, 2) run, then continue a copy of it in each topology."""
    results = Results("continued after SIGKILL", ["continued on", "losses", "EMA", "allowed"])
    first, whole = (2, 2, 2), out / "digits_2_2_2"
    killed = out / "killed"
    shutil.rmtree(killed, ignore_errors=True)
    process = start(first, data, killed, steps, *more, *(SLOW if more else []))
    try:
        latest = killed / "checkpoints/latest"
        wait_for(latest.exists, "the first checkpoint", Path(f"{killed}.log"))
        wait_for_step(killed, steps // 2, process)
    finally:
        kill(process)
    assert last_step(killed) < steps
    for topology in TOPOLOGIES:
        run = out / f"continued_{'_'.join(map(str, topology))}"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(killed, run)
        finish(start(topology, data, run, steps, *more), run, 3600)
        allowed = 1e-6 if topology == first else 1e-3
        error, ema = worst(losses(run), losses(whole)), ema_error(run, whole)
        cells = name(topology), f"{error:.1e}", f"{ema:.1e}", f"{allowed:.0e}"
        results.add(*cells, good=error <= allowed and ema <= allowed)
    return results


def has_moved(latest: Path, seen: str) -> bool:
    return latest.exists() and latest.read_text() != seen


def kill_while_saving(data: Path, out: Path, kills: int, more: list[str]) -> Results:
    """Save after every step, so that a kill at any moment meets a save, and look at what `latest` names."""
    results = Results("SIGKILL during a save", ["kill", "latest", "unfinished"])
    generator = random.Random(0)
    run = out / "kills"
    shutil.rmtree(run, ignore_errors=True)
    for number in range(kills):
        process = start((2, 2, 2), data, run, 1_000_000, *more, every=1)
        seen = (run / "checkpoints/latest").read_text() if number else ""
        try:
            wait_for(partial(has_moved, run / "checkpoints/latest", seen), "another save", Path(f"{run}.log"))
            time.sleep(generator.uniform(0, 0.2 if more else 1.0))
        finally:
            kill(process)
        named = (run / "checkpoints/latest").read_text().strip()
        unfinished = [path.name for path in (run / "checkpoints").glob(".*.tmp")]
        with tempfile.TemporaryDirectory() as folder:
            export_checkpoint(run / "checkpoints" / named, "ema", Path(folder) / "model")
        results.add(f"{number + 1}", named, ", ".join(unfinished) or "-", good=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="the digits' latent shards")
    parser.add_argument("--pixels", type=Path, metavar="SHARDS", help="the digits' pixel shards")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", default="losses,resume,kills", help="what to do (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="during saves (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a smaller network of the digits")
    args = parser.parse_args()
    more = [*SMALL, "--set=optimizer.lr=0.01"] if args.small else []  # else its losses hardly move in so few steps
    parts = args.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        results = []
        if "losses" in parts:
            results.append(compare_losses("digits", TOPOLOGIES, args.data, out, args.steps, "digits", more))
            if args.pixels:
                title, steps = "digits_pixels", args.steps
                results.append(compare_losses(title, PIXEL_TOPOLOGIES, args.pixels, out, steps, "digits_pixels", more))
        if "resume" in parts:
            results.append(compare_resumed(args.data, out, args.steps, more))
        if "kills" in parts:
            results.append(kill_while_saving(args.data, out, args.kills, more))
        for result in results:
            console.print(result.table)
    sys.exit(any(result.bad for result in results))


if __name__ == "__main__":
    main()
