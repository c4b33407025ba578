"""The training loop: from a recipe and a DeepSpeed JSON to a run folder, continuing where it stopped."""

import fcntl
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from moe_dit.data import batches, check_manifest, training_inputs
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import InputError, Interrupted, Stop
from moe_dit.runtime.progress import say, task
from moe_dit.runtime.stopping import StopRequest, end_with_launcher
from moe_dit.schema import differences

if TYPE_CHECKING:
    from moe_dit.checkpoint import Checkpointer
    from moe_dit.engine import Engine
    from moe_dit.metrics import Metrics, Report

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
    world = ranks.world()
    parallelism = load_parallelism(ds_file, recipe, world.size)
    manifest = read_manifest(recipe.data.path)
    check_manifest(manifest, recipe)
    recipe = _resolve(recipe, manifest)

    # DeepSpeed takes seconds to import: bad input should not have to wait for it.
    from moe_dit.checkpoint import Checkpointer, name_of, remove_unfinished, set_latest
    from moe_dit.engine import Engine, start_ranks
    from moe_dit.initial_weights import check_initial_weights, load_initial_weights
    from moe_dit.metrics import Metrics

    if recipe.initial_weights is not None and _resumed(recipe, run, resume) is None:
        check_initial_weights(recipe)  # a run that continues needs them no more
    end_with_launcher()
    device = ranks.device()
    start_ranks()
    request = StopRequest()
    locks = []

    def open_run() -> Path | None:
        """Decide on rank 0 alone what is continued: ranks that each looked might see different moments."""
        _resumed(recipe, run, resume)  # refuse before the folder is touched
        locks.append(_lock(run))
        remove_unfinished(run)
        return _resumed(recipe, run, resume)

    checkpoint = ranks.from_rank_0(open_run)
    engine = Engine(recipe, parallelism, device)
    checkpointer = Checkpointer(run, recipe.checkpoint.keep, recipe.checkpoint.milestone_every)
    first_step = checkpointer.load(engine, checkpoint) if checkpoint else 0
    if recipe.initial_weights is not None and not checkpoint:
        load_initial_weights(engine, Path(recipe.initial_weights))
    held, metrics = engine.bytes_held_by_rank(), None
    if world.rank == 0:
        if checkpoint and checkpoint.parent == checkpointer.folder:
            set_latest(checkpointer.folder, checkpoint.name)
        _write_config(run, recipe, parallelism.json)
        (run / "memory.json").write_text(json.dumps(held, indent=1) + "\n")
        metrics = Metrics(run, first_step, recipe.global_batch_size)
    say(_headline(recipe, parallelism, manifest, checkpoint, engine))
    stream = batches(recipe, manifest, parallelism.micro_batch_size, first_step, world)
    try:
        last_step = _loop(engine, stream, checkpointer, metrics, request, run, first_step)
    finally:
        if metrics is not None:
            metrics.close()
    ranks.barrier()  # nobody leaves before all have saved: a launcher ends every rank when the first one goes
    ranks.stop()
    for lock in locks:
        lock.close()
    last = f"step {last_step}, saved in {checkpointer.folder / name_of(last_step)}"
    if last_step < recipe.steps:
        raise Interrupted(f"stopped as asked after {last}; the same command continues")
    say(f"done: {last}")


def _loop(
    engine: "Engine",
    stream: Iterator[dict[str, torch.Tensor]],
    checkpointer: "Checkpointer",
    metrics: "Metrics | None",
    request: StopRequest,
    run: Path,
    first_step: int,
) -> int:
    """Train from ``first_step`` until the recipe's last step or a request to stop; returns the last step, saved."""
    from moe_dit.metrics import Reports

    recipe, reports, step = engine.recipe, Reports(engine.device), first_step
    with task("training", recipe.steps, first_step) as progress:
        while step < recipe.steps:
            micro = []
            for _ in range(engine.parallelism.accumulation):
                batch = {key: value.to(engine.device, non_blocking=True) for key, value in next(stream).items()}
                micro.append(training_inputs(recipe, batch, recipe.data.latent_scale or 1.0))
            # A save that failed ends the run too, and every rank must know in the same step.
            result = engine.train_step(step, micro, stop=request.asked or checkpointer.failed())
            reports.push(step + 1, engine.learning_rate(step), result, engine.gradient_norm())
            step += 1
            save, stop, note = step % recipe.checkpoint.every == 0 or step == recipe.steps, False, ""
            # Before a save every report is looked at, so that nothing that is not finite can be saved.
            while due := list(reports.take(everything=save or stop)):
                for report in due:
                    _check_finite(report, recipe, run)
                    stop = stop or report.stop
                    note = metrics.add(report) if metrics is not None else ""
            progress.advance(1, note)
            if save or stop:
                if metrics is not None:
                    metrics.flush()
                checkpointer.save(engine, step)
            if stop:
                break
    checkpointer.wait()
    return step


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
    """Put what the shards decide into the recipe, so that a run's config.yaml says everything; paths whole."""
    data = replace(
        recipe.data,
        path=str(manifest.folder.resolve()),
        latent_scale=recipe.data.latent_scale or manifest.scale,
    )
    weights = None if recipe.initial_weights is None else str(Path(recipe.initial_weights).resolve())
    return replace(recipe, data=data, initial_weights=weights)


def _resumed(recipe: Recipe, run: Path, resume: str) -> Path | None:
    """The checkpoint that ``resume`` means, if any; InputError where it cannot continue this recipe."""
    from moe_dit.checkpoint import find_checkpoint, read_facts

    checkpoint = find_checkpoint(run if resume in ("auto", "never") else Path(resume))
    if checkpoint is None:
        if resume not in ("auto", "never"):
            raise InputError(f"--resume {resume}: no checkpoint there; give auto, never, a run or a checkpoint folder")
        return None
    if resume == "never":
        raise InputError(f"--resume never, but {run} has {checkpoint.name}; give another --out, or --resume auto")
    _check_same(recipe, read_facts(checkpoint), checkpoint)
    return checkpoint


def _check_same(recipe: Recipe, facts: dict, checkpoint: Path) -> None:
    """Refuse to continue another experiment, and a run that is longer than asked for."""
    ours, theirs = recipe.to_dict(), facts["recipe"]
    for key in SAME_ON_RESUME:
        for path, new, old in differences(ours.get(key), theirs.get(key), key):
            raise InputError(
                f"{checkpoint} was trained with {path} {old}, not {new}; continue it with {old}, "
                f"or give another --out for another experiment"
            )
    if facts["step"] > recipe.steps:
        raise InputError(f"{checkpoint} has done {facts['step']} steps, more than the {recipe.steps} asked for")


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
    start = f"continuing {checkpoint}" if checkpoint else f"from {recipe.initial_weights or 'the start'}"
    return (
        f"{recipe.name} on {ranks} ({engine.device.type}, {'bf16' if engine.bf16 else 'fp32'}), ZeRO "
        f"{parallelism.zero_stage}, EP {parallelism.ep_size}, batch {recipe.global_batch_size} = "
        f"{parallelism.world_size} x {parallelism.micro_batch_size} x {parallelism.accumulation}, "
        f"{manifest.samples} samples, {start}; a rank holds "
        + ", ".join(f"{size / 1e6:.1f} MB {what}" for what, size in engine.bytes_held().items())
    )
