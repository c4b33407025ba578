"""The training loop: from a recipe and a DeepSpeed JSON to a run folder, continuing where it stopped."""

import fcntl
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe_dit import distributed
from moe_dit.data import batches, check_manifest, training_inputs
from moe_dit.deepspeed_config import load_parallelism
from moe_dit.errors import InputError, Interrupted, Stop
from moe_dit.launcher import end_with_launcher
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.progress import say, task
from moe_dit.recipe import Recipe
from moe_dit.signals import StopRequest

if TYPE_CHECKING:
    from moe_dit.metrics import Report

# A continued run must be the same experiment: with these changed it would not be.
SAME_ON_RESUME = ("seed", "global_batch_size", "model", "flow", "ema")


def train(recipe: Recipe, ds_file: str, run: Path, resume: str = "auto") -> None:
    """Train a recipe until its last step.

    Args:
        recipe: what to train; its data.path is the shards to read.
        ds_file: the DeepSpeed JSON.
        run: folder for the results.
        resume: "auto" (continue the run if it has a checkpoint), "never" (refuse if it has one), or a checkpoint.

    Raises:
        InputError: whatever cannot work is found here, before ranks start and anything is written.
        Interrupted: it was told to stop, and has saved.
        Stop: the loss is not finite any more, or a checkpoint could not be written.
    """
    world = distributed.world()
    parallelism = load_parallelism(ds_file, recipe, world.size)
    manifest = read_manifest(recipe.data.path)
    check_manifest(manifest, recipe)
    recipe = _resolve(recipe, manifest)

    # DeepSpeed takes seconds to import: bad input should not have to wait for it.
    from moe_dit.checkpoint import Checkpointer, find_checkpoint, name_of, read_facts, remove_unfinished, set_latest
    from moe_dit.engine import Engine, start_ranks
    from moe_dit.metrics import Metrics, Reports

    checkpoint = _checkpoint_to_resume(run, resume, find_checkpoint)
    if checkpoint is not None:
        _check_same(recipe, read_facts(checkpoint), checkpoint)
    end_with_launcher()
    lock = _lock(run) if world.rank == 0 else None
    device = distributed.device()
    start_ranks()
    request = StopRequest()
    engine = Engine(recipe, parallelism, device)
    held = engine.bytes_held_by_rank()
    if world.rank == 0:
        _write_config(run, recipe, parallelism.json)
        (run / "memory.json").write_text(json.dumps(held, indent=1) + "\n")
        remove_unfinished(run)
    checkpointer = Checkpointer(run, recipe.checkpoint.keep, recipe.checkpoint.milestone_every)
    first_step = checkpointer.load(engine, checkpoint) if checkpoint else 0
    if checkpoint and world.rank == 0 and checkpoint.parent == checkpointer.folder:
        set_latest(checkpointer.folder, checkpoint.name)
    say(_headline(recipe, parallelism, manifest, checkpoint, engine))

    metrics = Metrics(run, first_step, recipe.global_batch_size) if world.rank == 0 else None
    reports, stream = Reports(device), batches(recipe, manifest, parallelism.micro_batch_size, first_step, world)
    stopping = False
    with task("training", recipe.steps, first_step) as progress:
        for step in range(first_step, recipe.steps):
            micro = []
            for _ in range(parallelism.accumulation):
                batch = {key: value.to(device, non_blocking=True) for key, value in next(stream).items()}
                micro.append(training_inputs(recipe, batch, recipe.data.latent_scale or 1.0))
            result = engine.train_step(step, micro, stop=request.asked or checkpointer.failed())
            reports.push(step + 1, engine.learning_rate(step), result, engine.gradient_norm())
            saving = (step + 1) % recipe.checkpoint.every == 0 or step + 1 == recipe.steps
            note = ""
            # Before a save everything is looked at, so that nothing that is not finite can be saved.
            for report in reports.take(everything=saving or stopping):
                _check_finite(report, recipe, run)
                stopping = stopping or report.stop
                if metrics is not None:
                    note = metrics.add(report)
            progress.advance(1, note)
            if stopping:
                for report in reports.take(everything=True):
                    _check_finite(report, recipe, run)
                    if metrics is not None:
                        metrics.add(report)
            if saving or stopping:
                if metrics is not None:
                    metrics.flush()
                checkpointer.save(engine, step + 1)
            if stopping:
                break
    checkpointer.wait()
    if metrics is not None:
        metrics.close()
    last = f"{checkpointer.folder / name_of(step + 1)}" if first_step < recipe.steps else checkpoint
    distributed.barrier()  # nobody leaves before all have saved: a launcher ends every rank when the first one goes
    distributed.stop()
    if lock is not None:
        lock.close()
    if stopping and step + 1 < recipe.steps:
        raise Interrupted(f"stopped as asked after step {step + 1}; saved {last}; the same command continues")
    say(f"done: step {recipe.steps}, {last}")


def _check_finite(report: "Report", recipe: Recipe, run: Path) -> None:
    """Stop a run whose numbers have left the finite ones, before they reach a checkpoint."""
    if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
        return
    from moe_dit.checkpoint import complete_checkpoints, newest

    last = newest(complete_checkpoints(run / "checkpoints"))
    what = f"the loss is {report.loss}" if not math.isfinite(report.loss) else "the gradient is not finite"
    first, end = ((report.step - n) * recipe.global_batch_size for n in (1, 0))
    raise Stop(
        f"{what} at step {report.step}, positions {first} to {end - 1} of the run; nothing was saved since "
        f"{last or 'the start'}"
    )


def _resolve(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Put what the shards decide into the recipe, so that a run's config.yaml says everything."""
    path = str(manifest.folder.resolve())
    return replace(
        recipe, data=replace(recipe.data, path=path, latent_scale=recipe.data.latent_scale or manifest.scale)
    )


def _checkpoint_to_resume(run: Path, resume: str, find_checkpoint) -> Path | None:
    if resume not in ("auto", "never"):
        checkpoint = find_checkpoint(Path(resume))
        if checkpoint is None:
            raise InputError(f"--resume {resume}: no checkpoint there; give auto, never, a run or a checkpoint folder")
        return checkpoint
    checkpoint = find_checkpoint(run)
    if checkpoint is not None and resume == "never":
        raise InputError(f"--resume never, but {run} has {checkpoint.name}; give another --out, or --resume auto")
    return checkpoint


def _check_same(recipe: Recipe, facts: dict, checkpoint: Path) -> None:
    """Refuse to continue another experiment, and a run that is longer than asked for."""
    ours, theirs = recipe.to_dict(), facts["recipe"]
    for key in SAME_ON_RESUME:
        for path, new, old in _differences(ours.get(key), theirs.get(key), key):
            raise InputError(
                f"{checkpoint} was trained with {path} {old}, not {new}; continue it with {old}, "
                f"or give another --out for another experiment"
            )
    if facts["step"] > recipe.steps:
        raise InputError(f"{checkpoint} has done {facts['step']} steps, more than the {recipe.steps} asked for")


def _differences(new, old, path: str):
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted(new.keys() | old.keys()):
            yield from _differences(new.get(key), old.get(key), f"{path}.{key}")
    elif new != old:
        yield path, new, old


def _lock(run: Path):
    """Hold the run folder, so that two runs started at once cannot write into each other."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
    except OSError as error:
        raise InputError(f"cannot write into {run}: {error}") from None
    # The ranks of a run that was just killed may take a moment to end.
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.5)
    raise InputError(f"another training run is writing into {run}; give another --out")


def _write_config(run: Path, recipe: Recipe, ds_config: dict) -> None:
    text = "# Everything resolved: `--recipe` takes this file, `--ds` the ds_config.json beside it.\n"
    (run / "config.yaml").write_text(text + yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    (run / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")


def _headline(recipe: Recipe, parallelism, manifest: Manifest, checkpoint: Path | None, engine) -> str:
    ranks = f"{parallelism.world_size} ranks" if parallelism.world_size > 1 else "1 rank"
    start = f"continuing {checkpoint}" if checkpoint else "from the start"
    return (
        f"{recipe.name} on {ranks} ({engine.device.type}, {'bf16' if engine.bf16 else 'fp32'}), ZeRO "
        f"{parallelism.zero_stage}, EP {parallelism.ep_size}, batch {recipe.global_batch_size} = "
        f"{parallelism.world_size} x {parallelism.micro_batch_size} x {parallelism.accumulation}, "
        f"{manifest.samples} samples, {start}; a rank holds "
        + ", ".join(f"{size / 1e6:.1f} MB {what}" for what, size in engine.bytes_held().items())
    )
