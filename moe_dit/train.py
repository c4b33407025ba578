"""The training loop: from a recipe and a DeepSpeed JSON to a run folder, continuing where it stopped."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_dit import preflight, watchdog
from moe_dit.cluster.outcome import gives_up
from moe_dit.data import Latents, batches, check_manifest, training_inputs
from moe_dit.data.index import ensure_index
from moe_dit.data.order import window_for
from moe_dit.events import events, record
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.optimizer import optimizer_kind
from moe_dit.parallel.deepspeed_config import Parallelism, load_parallelism
from moe_dit.plan import most_images_per_second, parameters
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import parse_recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import InputError, Interrupted, Stop
from moe_dit.runtime.files import remove_unfinished, write_json, write_yaml
from moe_dit.runtime.lock import lock_folder
from moe_dit.runtime.machine import commit, machine, now
from moe_dit.runtime.progress import console, say, task
from moe_dit.runtime.rank_log import RankLog
from moe_dit.runtime.stopping import GRACE_SECONDS, StopRequest, was_restarted
from moe_dit.runtime.within import within
from moe_dit.schema import differences
from moe_dit.status import read_status, write_status
from moe_dit.times import LOAD_EVERY, NUMBERS, RankTimes, StepTimes, slots
from moe_dit.watchdog import Watchdog

if TYPE_CHECKING:
    from moe_dit.checkpoint import Checkpointer
    from moe_dit.checkpoint_files import Damaged
    from moe_dit.engine import Engine
    from moe_dit.lineage import Start
    from moe_dit.looks import Looks
    from moe_dit.metrics import Metrics, Report

# A continued run must be the same experiment: with these changed it would not be.
SAME_ON_RESUME = ("seed", "global_batch_size", "model", "flow", "ema")
TELLING_SECONDS = 10.0  # for a line of the watchdog's to be written
ENDING_SECONDS = 10.0  # for the ranks of a run that was just killed to end


def train(recipe: Recipe, ds_file: str, run: Path, resume: str = "auto") -> None:
    """Train a recipe until its last step.

    Args:
        recipe: what to train; its data.path is the shards to read.
        ds_file: the DeepSpeed JSON.
        run: folder for the results.
        resume: "auto" (continue the run if it has a checkpoint), "never" (refuse if it has one), or a checkpoint to
            begin from (:func:`moe_dit.lineage.choose`).

    Raises:
        InputError: whatever cannot work is found here, before anything is written.
        Interrupted: it was told to stop, and has saved.
        Stop: the loss is not finite any more, or a checkpoint could not be written.
    """
    recipe, parallelism, manifest = ranks.agreed(lambda: _check(recipe, ds_file))
    patience = ranks.agreed(watchdog.patience)
    # Shards of before there was an index, and foreign ones, are indexed once a node.
    ranks.agreed(lambda: ensure_index(manifest) is None if ranks.world().local_rank == 0 else None)

    # DeepSpeed and TensorBoard take seconds to import: bad input should not have to wait for them.
    from moe_dit.checkpoint import Checkpointer
    from moe_dit.engine import Engine, start_ranks
    from moe_dit.initial_weights import load_initial_weights
    from moe_dit.parallel.expert_layers import expert_group

    ranks.agreed(lambda: _check_beginning(recipe, run, resume))
    request = StopRequest()
    request.watch_launchers()
    device = ranks.device()
    start_ranks()
    looks = None
    if recipe.looks.every:
        from moe_dit.looks import Looks  # brings in evaluation, which a run without looks need not wait for

        looks = Looks(recipe, run, device, parallelism.micro_batch_size)
    with ExitStack() as held:
        # Rank 0 alone decides what is continued: ranks that each looked might see different moments.
        start = ranks.from_rank_0(lambda: _open_run(recipe, run, resume, held))
        told = held.enter_context(_Told(run))
        log = held.enter_context(ranks.agreed(lambda: RankLog(run, device)))
        watch = Watchdog(log, told.stands_still, patience, device.type == "cuda")
        held.callback(watch.close)
        gone = ranks.silence()
        if gone is not None:
            gone.tell = lambda line: told.stands_still(line, told.step, True)
            gone.last = watch.last
        preflight.check_shards(manifest)
        watch.sign("the check before the first step", ends=True)
        shared = expert_group(parallelism.ep_size) if parallelism.ep_size > 1 else None
        preflight.check(run, device, shared, log)
        watch.sign("the start")
        recipe = ranks.agreed(lambda: _with_window(recipe, manifest, start))
        engine = Engine(recipe, parallelism, device)
        keep = recipe.checkpoint
        checkpointer = Checkpointer(run, keep.keep, keep.milestone_every, keep.write_gb_per_second)
        start, first_step = _load(engine, checkpointer, start, recipe, run, resume)
        if recipe.initial_weights is not None and start.checkpoint is None:
            load_initial_weights(engine, Path(recipe.initial_weights))
        bytes_held = engine.bytes_held_by_rank()
        ranks.on_rank_0(lambda: _write_start(run, recipe, engine, first_step))
        metrics = ranks.on_rank_0(lambda: _open_record(engine, run, start, first_step, bytes_held))
        for note in start.notes:
            say(note)
        headline = _headline(recipe, parallelism, manifest, start.checkpoint, engine)
        say(headline)
        told.started(first_step, headline)
        eats = partial(most_images_per_second, recipe, device.type)
        stream = batches(recipe, manifest, parallelism.micro_batch_size, first_step, ranks.world(), eats)
        waits = Waits(stream)
        micro_batches = _micro_batches(engine, waits, Latents.of(recipe, manifest))
        try:
            last_step = _loop(
                engine, micro_batches, waits, checkpointer, metrics, looks, request, told, watch, log, first_step
            )
        finally:
            stream.close()
            checkpointer.close()
            if metrics is not None:
                metrics.close()
        watch.sign("the end", last_step)
        last = f"step {last_step}, saved in {checkpointer.confirm(last_step)}"
        ranks.barrier()  # nobody leaves before all have saved: a launcher ends every rank when the first one goes
        if gone is not None:
            gone.close()
        if last_step < recipe.steps:
            stopped = Interrupted(f"stopped as asked after {last}; the same command continues", everywhere=True)
            stopped.ends_torchrun = request.ends_torchrun()
            raise stopped
    say(f"done: {last}")


def _check(recipe: Recipe, ds_file: str) -> tuple[Recipe, Parallelism, Manifest]:
    """What can be checked at once: the recipe, completed from its shards; how the work is spread; the shards."""
    optimizer_kind(recipe.optimizer.name)
    parallelism = load_parallelism(ds_file, recipe, ranks.world().size)
    manifest = read_manifest(recipe.data.path, cache_gb=recipe.data.cache_gb)
    check_manifest(manifest, recipe)
    return _resolve(recipe, manifest), parallelism, manifest


def _check_beginning(recipe: Recipe, run: Path, resume: str) -> None:
    """Where the run's numbers go, and what it begins from."""
    from moe_dit.initial_weights import check_initial_weights
    from moe_dit.sinks import check_sinks

    check_sinks(recipe)
    if recipe.initial_weights is not None and _resumed(recipe, run, resume).checkpoint is None:
        check_initial_weights(recipe)  # a run that continues needs them no more


def _open_run(recipe: Recipe, run: Path, resume: str, held: ExitStack) -> "Start":
    """Hold the run's folder until ``held`` ends, clear what a kill left, and decide what is continued."""

    def patience() -> float:
        # One that was told to stop saves first.
        return GRACE_SECONDS if read_status(run).get("state") == "stopping" else ENDING_SECONDS

    _resumed(recipe, run, resume)  # refuse before the folder is touched
    held.enter_context(lock_folder(run, "another training run", patience))
    remove_unfinished(run)
    remove_unfinished(run / "checkpoints")
    if was_restarted() and (why := gives_up(list(events(run)))):
        raise Stop(why)
    return _resumed(recipe, run, resume)


def _load(
    engine: "Engine", checkpointer: "Checkpointer", start: "Start", recipe: Recipe, run: Path, resume: str
) -> tuple["Start", int]:
    """Fill the engine from what the run starts from, or from the one before where that turns out to be damaged."""
    from moe_dit.checkpoint_files import Damaged

    damaged: dict[Path, Damaged] = {}
    first_step = 0
    while start.checkpoint is not None:
        try:
            first_step = checkpointer.load(engine, start.checkpoint)
            break
        except Damaged as error:  # on every rank alike
            damaged[start.checkpoint] = error
            start = ranks.from_rank_0(lambda: _resumed(recipe, run, resume, damaged))
    checkpointer.history = start.history
    return start, first_step


def _open_record(engine: "Engine", run: Path, start: "Start", first_step: int, bytes_held: list[dict]) -> "Metrics":
    """Begin, or go on with, what a run's folder says of it."""
    from moe_dit.checkpoint_files import name_of
    from moe_dit.lineage import set_latest, write_history
    from moe_dit.metrics import Metrics

    _write_config(run, engine.recipe, engine.parallelism.json)
    write_json(run / "memory.json", bytes_held)
    # The record first: a kill in between must not leave the steps of another branch in the record of the new one.
    metrics = Metrics(run, first_step, engine.recipe, start.records)
    if start.own:
        # Before anything is saved: a requeued job goes on from here too.
        set_latest(run / "checkpoints", name_of(first_step))
    write_history(run, start.history)
    return metrics


class _Told:
    """Keeps a run's status.json and events.jsonl true to what happens in its block; ``step``: what has been done."""

    def __init__(self, run: Path):
        self.run = run
        self.step = 0
        self.speaks = ranks.world().rank == 0

    def __enter__(self) -> "_Told":
        if self.speaks:
            write_status(self.run, "training")
        return self

    def started(self, step: int, headline: str) -> None:
        """Training begins behind ``step`` steps."""
        self.step = step
        if self.speaks:
            record(self.run, "started", headline, step)

    def stands_still(self, line: str, step: int, ends: bool) -> None:
        """A rank's watchdog says who waits where, from its thread: rank 0's, or another's for it."""
        # Perhaps it is the terminal or the folder that does not answer.
        within(
            TELLING_SECONDS,
            lambda: console.print(line, markup=False, soft_wrap=True),
            lambda: self._note_standing(line, step, ends),
        )

    def _note_standing(self, line: str, step: int, ends: bool) -> None:
        with ExitStack() as held, suppress(OSError):
            if ends and not self.speaks:
                # Rank 0, which holds the folder, says itself how it ends, unless it is gone. It may run again already.
                try:
                    held.enter_context(lock_folder(self.run, "rank 0"))
                    ends = read_status(self.run).get("state") == "training"
                except InputError:
                    ends = False
            record(self.run, "failed" if ends else "hang", line, step)
            if ends:
                write_status(self.run, "failed", exit_status=1, message=line)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self.speaks:
            return
        if error is None:
            write_status(self.run, "done", exit_status=0)
            record(self.run, "done", step=self.step)
        elif isinstance(error, Interrupted):
            write_status(self.run, "stopped", exit_status=error.status, message=str(error))
            record(self.run, "stopped", str(error), self.step)
        else:
            message = f"{type(error).__name__}: {error}"
            write_status(self.run, "failed", exit_status=getattr(error, "status", 1), message=message)
            record(self.run, "failed", message, self.step)


class Waits:
    """An iterator that keeps how long was waited for what it gives."""

    def __init__(self, stream: Iterator[Any]):
        self._stream = stream
        self._seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self._stream)
        finally:
            self._seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Seconds since the last time."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _micro_batches(
    engine: "Engine", stream: Iterator[dict[str, torch.Tensor]], latents: Latents
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """This rank's training inputs on its device, step by step."""
    while True:
        step = []
        for batch in islice(stream, engine.parallelism.accumulation):
            on_device = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
            step.append(training_inputs(engine.recipe, on_device, latents))
        yield step


def _loop(
    engine: "Engine",
    micro_batches: Iterator[list[dict[str, torch.Tensor]]],
    waits: Waits,
    checkpointer: "Checkpointer",
    metrics: "Metrics | None",
    looks: "Looks | None",
    request: StopRequest,
    told: _Told,
    watch: Watchdog,
    log: RankLog,
    first_step: int,
) -> int:
    """Train from ``first_step`` until the recipe's last step or a request to stop; returns the last step, saved."""
    from moe_dit.metrics import Reports

    recipe = engine.recipe
    reports = Reports(engine.device)
    times = StepTimes(engine.device)
    engine.measure(times)
    all_times = RankTimes(told.run) if metrics is not None else None
    if looks is not None:
        looks.alive = lambda: watch.sign("a look", step)
    step = first_step
    watch.sign("step", step)
    with task("training", recipe.steps, first_step) as progress:
        while step < recipe.steps:
            numbers = times.take() if (step + 1) % LOAD_EVERY == 0 else None
            if numbers is not None:
                log.write(f"step {step + 1}: " + ", ".join(map("{} {:.4g}".format, NUMBERS, numbers)))
            times.begin(step)
            inputs = next(micro_batches)
            own_times = None if numbers is None else slots(numbers, engine.device)
            # A save that failed ends the run too, and every rank must know in the same step.
            result = engine.train_step(step, inputs, request.asked or checkpointer.failed(), own_times)
            norm = engine.gradient_norm()
            waited = waits.take()
            reports.push(step + 1, engine.learning_rate(step), engine.loss_names, result, norm, waited)
            times.end(waited)
            step += 1
            told.step = step
            save = step % recipe.checkpoint.every == 0 or step == recipe.steps
            stop = False
            note = ""
            found: dict[int, dict] = {}
            if looks is not None and step % recipe.looks.every == 0:
                watch.sign("a look", step)
                found[step], pictures = looks.look(engine, step)
                reports.restart_clock()
                for name, picture in pictures.items():
                    if metrics is not None:
                        metrics.picture(name, picture, step)
            # Before a save every report is looked at, so that nothing that is not finite can be saved.
            while due := list(reports.take(everything=save or stop or bool(found))):
                for report in due:
                    _check_finite(report, recipe, told.run)
                    stop = stop or report.stop
                    note = metrics.add(report, found.get(report.step)) if metrics is not None else ""
                    if all_times is not None and report.times is not None:
                        all_times.add(report)
            progress.advance(1, note)
            if save or stop:
                watch.sign("a save", step)
                if metrics is not None:
                    metrics.flush()
                    if stop:
                        write_status(told.run, "stopping", step=step)
                checkpointer.save(engine, step, hurry=stop)
                reports.restart_clock()
            if stop:
                break
            watch.sign("step", step)
    watch.sign("the last save", step)
    checkpointer.wait()
    return step


def _check_finite(report: "Report", recipe: Recipe, run: Path) -> None:
    """Stop a run whose numbers have left the finite ones, before they reach a checkpoint."""
    loss = report.losses["loss"]
    if math.isfinite(loss) and math.isfinite(report.grad_norm):
        return
    from moe_dit.lineage import newest

    last = newest(run / "checkpoints")
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    first, end = ((report.step - n) * recipe.global_batch_size for n in (1, 0))
    raise Stop(
        f"{what} at step {report.step}, positions {first} to {end - 1} of the run; nothing was saved since "
        f"{last or 'the start'}",
        everywhere=True,
    )


def _resolve(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Put what the shards decide into the recipe, so that a run's config.yaml says everything; paths whole."""
    data = replace(recipe.data, path=str(manifest.folder.resolve()) if manifest.remote is None else manifest.place)
    if data.kind == "latents":
        latents = Latents.of(recipe, manifest)
        data = replace(data, latent_scale=latents.scale, latent_shift=latents.shift, vae=data.vae or manifest.vae)
        data = replace(data, vae_sha256=manifest.vae_sha256 or data.vae_sha256)
    weights = None if recipe.initial_weights is None else str(Path(recipe.initial_weights).resolve())
    return replace(recipe, data=data, initial_weights=weights)


def _with_window(recipe: Recipe, manifest: Manifest, start: "Start") -> Recipe:
    """The recipe with its order of samples decided: by the run that is continued, which must keep it, or the shards."""
    from moe_dit.checkpoint_files import read_description

    window = recipe.data.window_gb
    if start.checkpoint is None:
        window = window_for(manifest, window)
    else:
        kept = read_description(start.checkpoint)["recipe"]["data"].get("window_gb")
        if window not in ("auto", kept):
            raise InputError(
                f"{start.checkpoint} was trained with data.window_gb {kept}, not {window}; continue it with "
                f"{'null' if kept is None else kept}, or give another --out for another experiment"
            )
        window = kept
    return replace(recipe, data=replace(recipe.data, window_gb=window))


def _resumed(recipe: Recipe, run: Path, resume: str, damaged: "Mapping[Path, Damaged] | None" = None) -> "Start":
    """Where to begin, as ``resume`` says; InputError where that is a checkpoint that cannot continue this recipe."""
    from moe_dit.checkpoint_files import read_description
    from moe_dit.lineage import choose

    start = choose(run, resume, damaged)
    if start.checkpoint is not None:
        description = read_description(start.checkpoint)
        _check_same(recipe, description, start.checkpoint)
        if not start.own and description["step"] == recipe.steps:
            raise InputError(
                f"{start.checkpoint} has done all of the {recipe.steps} steps asked for; give more --steps"
            )
    return start


def _check_same(recipe: Recipe, description: dict, checkpoint: Path) -> None:
    """Refuse to continue another experiment, and a run that is longer than asked for."""
    # Read as a recipe, so that a key which the run is older than has its default.
    ours = recipe.to_dict()
    theirs = parse_recipe(description["recipe"], str(checkpoint)).to_dict()
    for key in SAME_ON_RESUME:
        for path, new, old in differences(ours[key], theirs[key], key):
            raise InputError(
                f"{checkpoint} was trained with {path} {old}, not {new}; continue it with {old}, "
                f"or give another --out for another experiment"
            )
    ours, theirs = ours["data"]["vae_sha256"], theirs["data"]["vae_sha256"]
    if None not in (ours, theirs) and ours != theirs:
        raise InputError(
            f"{checkpoint} was trained on latents of another VAE ({theirs[:12]}..., not {ours[:12]}...); give the same "
            "shards, or another --out for another experiment"
        )
    if description["step"] > recipe.steps:
        raise InputError(f"{checkpoint} has done {description['step']} steps, more than the {recipe.steps} asked for")


def _write_config(run: Path, recipe: Recipe, ds_config: dict) -> None:
    comment = "# Everything resolved: `--recipe` takes this file, `--ds` the ds_config.json beside it.\n"
    write_yaml(run / "config.yaml", recipe.to_dict(), comment)
    write_json(run / "ds_config.json", ds_config, indent=2)


def _write_start(run: Path, recipe: Recipe, engine: "Engine", first_step: int) -> None:
    """Add what this start computes with to RUN/starts.json, which the report shows."""
    total, activated = parameters(recipe)
    parallelism = engine.parallelism
    start = machine(engine.device) | {"date": now(), "commit": commit(), "first_step": first_step}
    start |= {"precision": "bf16" if engine.bf16 else "fp32", "zero_stage": parallelism.zero_stage}
    start |= {"expert_parallel": parallelism.ep_size, "parameters": total, "activated": activated}
    file = run / "starts.json"
    try:
        before = list(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: a note is no reason not to train
        before = []
    write_json(file, [*before, start], indent=1)


def _headline(recipe: Recipe, parallelism, manifest: Manifest, checkpoint: Path | None, engine) -> str:
    ranks = f"{parallelism.world_size} ranks" if parallelism.world_size > 1 else "1 rank"
    start = f"continuing {checkpoint}" if checkpoint else f"from {recipe.initial_weights or 'the start'}"
    return (
        f"{recipe.name} on {ranks} ({engine.device.type}, {'bf16' if engine.bf16 else 'fp32'}), ZeRO "
        f"{engine.parallelism.zero_stage}, EP {parallelism.ep_size}, batch {recipe.global_batch_size} = "
        f"{parallelism.world_size} x {parallelism.micro_batch_size} x {parallelism.accumulation}, "
        f"{manifest.samples} samples, {start}; a rank holds "
        + ", ".join(f"{size / 1e6:.1f} MB {what}" for what, size in engine.bytes_held().items())
    )
