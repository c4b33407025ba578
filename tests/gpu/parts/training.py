"""The digits: through the engine beside a CPU's curve, saved and loaded, and by the commands that people run."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from moe_dit.checkpoint import Checkpointer
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.engine import Engine
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime import ranks
from parts.context import ONE_RANK, PACKED, Context, worst

STEPS = 20
# Of each step's loss, relative, beside the CPU's float32. In bf16 tokens choose other experts now and then.
CURVE = {"fp32": 2e-3, "bf16": 5e-2}


def run(context: Context) -> None:
    command = start_command(context)
    manifest = read_manifest(PACKED / "shards")
    want = json.loads((PACKED / "curve.json").read_text())["loss"]
    for precision, most in CURVE.items():
        with context.attempt(f"20 steps, {precision}"):
            losses = first_steps(context, manifest, precision)
            context.check(
                f"{precision}: 20 losses beside the CPU's, largest relative difference", far(losses, want), most
            )
            context.tell(f"{precision}: last loss", losses[-1], note=f"the CPU's {want[-1]:.4f}")
    with context.attempt("save and load"):
        save_and_load(context, manifest)
    finish_command(context, *command)


def far(losses: list[float], want: list[float]) -> float:
    """The largest relative difference of losses from what they should be."""
    return worst({str(step): abs(a - b) / b for step, (a, b) in enumerate(zip(losses, want, strict=True))})[1]


def digits(precision: str) -> Recipe:
    """What the curve is of."""
    return load_recipe("digits", [f"precision={precision}", "compile=none", "data.workers=0"])


def first_steps(context: Context, manifest: Manifest, precision: str) -> list[float]:
    """The losses that the curve has."""
    with context.engine(digits(precision)) as engine:
        return train(engine, manifest, 0, STEPS)


def train(engine: Engine, manifest: Manifest, first: int, last: int) -> list[float]:
    """The losses of some steps."""
    stream = batches(engine.recipe, manifest, engine.parallelism.micro_batch_size, first, ranks.world())
    latents = Latents.of(engine.recipe, manifest)
    losses = []
    for step, batch in enumerate(islice(stream, last - first), first):
        there = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
        losses.append(engine.train_step(step, [training_inputs(engine.recipe, there, latents)])["terms"][0])
    stream.close()
    return torch.stack(losses).tolist()


def save_and_load(context: Context, manifest: Manifest) -> None:
    """A run that is saved, goes on while it is written, and is continued by another engine."""
    recipe = digits("bf16")
    run = context.scratch("saved")
    with context.engine(recipe) as engine, context.engine(recipe) as second:
        save_and_load_into(context, manifest, run, engine, second)


def save_and_load_into(context: Context, manifest: Manifest, run: Path, engine: Engine, second: Engine) -> None:
    """Of one engine into another."""
    checkpointer = Checkpointer(run, keep=3)
    train(engine, manifest, 0, 4)
    for step in (4, 8):  # the first takes memory
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        checkpointer.save(engine, step)
        context.tell(
            f"training stands for a save, the {'first' if step == 4 else 'second'}", time.perf_counter() - start, "s"
        )
        want = train(engine, manifest, step, step + 4)
    checkpointer.wait()
    again = Checkpointer(run, keep=3)
    for step in (4, 8):
        found = again.load(second, run / "checkpoints" / f"step_{step:08d}")
        context.check(f"step that was loaded, less {step}", abs(found - step), 0)
    got = train(second, manifest, 8, 12)
    context.check("losses after loading, largest relative difference", far(got, want), 1e-6)
    for each in (checkpointer, again):
        each.close()


def start_command(context: Context) -> tuple[subprocess.Popen, Path]:
    """Begin jobs/train.py as people start it: loader processes, compiled blocks, looks, saves."""
    run = context.scratch("run")
    steps = 6 if context.dry else 200
    flags = [
        "--ds",
        ONE_RANK,
        "--recipe",
        "digits",
        "--data",
        str(PACKED / "shards"),
        "--out",
        str(run),
        "--steps",
        str(steps),
    ]
    changes = [f"checkpoint.every={steps // 2}", f"looks.every={steps}", "looks.samples=20", "data.workers=2"]
    changes += [f"data.vae={PACKED / 'vae'}"]
    changes += ["sampling.steps=2"] if context.dry else []
    command = [sys.executable, "jobs/train.py", *flags, *(word for change in changes for word in ("--set", change))]
    return subprocess.Popen(command, env=context.environment), run


def wait_or_stop(context: Context, process: subprocess.Popen) -> int | None:
    """Wait for a training command, and tell it to stop when its time is over; its status, or None where it goes on."""
    for seconds in (max(1.0, context.left() - 20 + (80 if context.dry else 0)), 20):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
    process.kill()
    return None


def finish_command(context: Context, process: subprocess.Popen, run: Path) -> None:
    """What jobs/train.py left; then the commands that make samples of it."""
    with context.attempt("jobs/train.py"):
        if (status := wait_or_stop(context, process)) is None:
            raise TimeoutError("it neither trains to its end nor stops when it is told to")
        context.tell("jobs/train.py: exit status", status, note="75: stopped as told, when its time was over")
        context.check("jobs/train.py: ends otherwise than done or stopped as told", float(status not in (0, 75)), 0)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first, last = (sum(r["loss"] for r in part) / len(part) for part in (records[:5], records[-20:]))
        context.tell("jobs/train.py: loss of the first and the last steps", f"{first:.4f}, {last:.4f}")
        if not context.dry:
            context.check("jobs/train.py: last loss over the first", last / first, 0.75)
        speeds = sorted(r["images_per_second"] for r in records if r.get("images_per_second"))
        context.tell("jobs/train.py: median speed", speeds[len(speeds) // 2], "images/s")
        grids = len(list((run / "looks").glob("*.png")))
        context.check_least("jobs/train.py: grids of samples", grids, float(status == 0))
        if not context.time_for("export and eval.sample", 10):
            return
        model, samples = context.scratch("model"), context.scratch("samples")
        more = ["--vae", str(PACKED / "vae"), *(["--steps", "2"] if context.dry else ["--capture"])]
        number = "8" if context.dry else "100"
        for command in (
            ["jobs/export.py", str(run), "--weights", "ema", "--out", str(model)],
            ["-m", "eval.sample", "--model", str(model), "-n", number, "--out", str(samples), *more],
        ):
            done = subprocess.run(
                [sys.executable, *command], env=context.environment, timeout=max(20.0, context.left() + 20)
            )
            context.check(f"{command[0] if command[0] != '-m' else command[1]}: exit status", done.returncode, 0)
        context.check_least("images sampled", len(list((samples / "images").glob("*.png"))), int(number))
