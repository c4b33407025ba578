"""The training loop: from a recipe and a DeepSpeed JSON to a run folder, continuing where it stopped."""

import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_dit import preflight, watchdog
from moe_dit.cluster.outcome import gives_up
from moe_dit.continuing import Asked, Named, kept_window
from moe_dit.data import Latents, batches, check_manifest, training_inputs
from moe_dit.data.index import ensure_index
from moe_dit.data.inputs import check_guidance, untrained_guidance, untrained_labels
from moe_dit.data.order import window_for
from moe_dit.events import events, own, record
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.optimizer import optimizer_kind
from moe_dit.parallel.deepspeed_config import Parallelism, load_parallelism
from moe_dit.plan import most_images_per_second, parameters
from moe_dit.recipe import Recipe
from moe_dit.run_folder import CONFIG_COMMENT, check_run_folder, clear_unfinished
from moe_dit.runtime import ranks
from moe_dit.runtime.errors import Followed, InputError, Interrupted, Stop, left_behind
from moe_dit.runtime.files import explained, write_json, write_yaml
from moe_dit.runtime.lock import lock_folder
from moe_dit.runtime.machine import commit, machine, now
from moe_dit.runtime.notes import noted
from moe_dit.runtime.progress import console, say, task
from moe_dit.runtime.rank_log import RankLog
from moe_dit.runtime.reading import read_json
from moe_dit.runtime.stopping import StopRequest, was_restarted
from moe_dit.runtime.within import within
from moe_dit.status import patience, read_status, write_status
from moe_dit.times import LOAD_EVERY, NUMBERS, RankTimes, StepTimes, slots
from moe_dit.watchdog import Watchdog

if TYPE_CHECKING:
    from moe_dit.checkpoint import Checkpointer
    from moe_dit.checkpoint_files import Damaged
    from moe_dit.engine import Engine
    from moe_dit.lineage import Start
    from moe_dit.looks import Looks
    from moe_dit.metrics import Metrics, Report

TELLING_SECONDS = 10.0  # for a line of the watchdog's to be written
CLOSING_SECONDS = 5.0  # for trackers of a run that failed to finish


def train(recipe: Recipe, ds_file: str, run: Path, resume: str, named: Named) -> None:
    """Train a recipe until its last step.

    Args:
        recipe: what to train; its data.path is the shards to read.
        ds_file: the DeepSpeed JSON.
        run: folder for the results.
        resume: "auto" (continue the run if it has a checkpoint), "never" (refuse if it has one), or a checkpoint to
            begin from (:func:`moe_dit.lineage.choose`).
        named: keys that the command names, which may differ from what is continued (:mod:`moe_dit.continuing`).

    Raises:
        InputError: whatever cannot work is found here, before anything is written.
        Interrupted: it was told to stop, and has saved.
        Stop: the loss is not finite any more, or a checkpoint could not be written.
    """
    recipe, parallelism, manifest = ranks.agreed(lambda: _check(recipe, ds_file))
    watchful = ranks.agreed(watchdog.patience)
    # Shards of before there was an index, and foreign ones, are indexed once a node.
    ranks.agreed(lambda: ensure_index(manifest) is None if ranks.world().local_rank == 0 else None)

    # DeepSpeed and TensorBoard take seconds to import: bad input should not have to wait for them.
    from moe_dit.checkpoint import Checkpointer
    from moe_dit.engine import Engine, start_ranks
    from moe_dit.initial_weights import load_initial_weights
    from moe_dit.parallel.expert_layers import expert_group

    bf16 = recipe.in_bf16("cuda" if torch.cuda.is_available() else "cpu")
    asked = Asked(recipe, parallelism.world_size, bf16, manifest.content(), named)
    ranks.agreed(lambda: _check_beginning(asked, run, resume))
    request = StopRequest()
    request.watch_launchers()
    device = ranks.device()
    start_ranks()
    looks = None
    if recipe.looks.every:
        from moe_dit.looks import Looks  # brings in evaluation, which a run without looks need not wait for

        looks = Looks(recipe, run, device, parallelism.micro_batch_size, manifest.classes)
    with ExitStack() as held:
        # Rank 0 alone decides what is continued: ranks that each looked might see different moments.
        start = ranks.from_rank_0(lambda: _open_run(asked, run, resume, held))
        record_of = held.enter_context(_Record())  # closed when it is told how the run ended
        told = held.enter_context(_Told(run, start.history[-1].attempt))
        log = held.enter_context(ranks.agreed(lambda: RankLog(run, device)))
        watch = Watchdog(log, told.stands_still, watchful, device.type == "cuda")
        held.callback(watch.close)
        gone = ranks.silence()
        if gone is not None:
            gone.tell = lambda line: told.stands_still(line, told.step, True)
            gone.last = watch.last
        preflight.check_shards(manifest)
        watch.sign("the check before the first step", ends=True)
        shared = expert_group(parallelism.ep_size) if parallelism.ep_size > 1 else None
        preflight.check(run, device, shared, log, told.start)
        watch.sign("the start")
        recipe = ranks.agreed(lambda: _with_window(recipe, manifest, start))
        engine = Engine(recipe, parallelism, device)
        keep = recipe.checkpoint
        checkpointer = Checkpointer(run, keep.keep, keep.milestone_every, keep.write_gb_per_second)
        checkpointer.data = asked.data
        start, first_step = _load(engine, checkpointer, start, asked, run, resume)
        if recipe.initial_weights is not None and start.checkpoint is None:
            load_initial_weights(engine, Path(recipe.initial_weights))
        bytes_held = engine.bytes_held_by_rank()
        if first_step < recipe.steps:  # else nothing is trained that would differ
            ranks.on_rank_0(lambda: _write_start(run, recipe, engine, first_step, start.changes))
        metrics = ranks.on_rank_0(lambda: _open_record(engine, run, start, first_step, bytes_held))
        record_of.metrics = metrics
        for note in (untrained_labels(manifest, recipe), untrained_guidance(recipe), *start.notes, *start.changes):
            if note is not None:
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
                metrics.flush()
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
    if recipe.looks.every and (recipe.looks.samples or recipe.looks.score_samples):
        cure = "--set sampling.cfg_scale=1, or leave looks.samples and looks.score_samples at 0"
        check_guidance(recipe, recipe.sampling.cfg_scale, cure)
    return _resolve(recipe, manifest), parallelism, manifest


def _check_beginning(asked: Asked, run: Path, resume: str) -> None:
    """Where the run's numbers go, and what it begins from."""
    from moe_dit.initial_weights import check_initial_weights
    from moe_dit.sinks import check_sinks

    check_sinks(asked.recipe)
    if asked.recipe.initial_weights is not None and _resumed(asked, run, resume).checkpoint is None:
        check_initial_weights(asked.recipe, asked.data["classes"])  # a run that continues needs them no more


def _open_run(asked: Asked, run: Path, resume: str, held: ExitStack) -> "Start":
    """Hold the run's folder until ``held`` ends, clear what a kill left, and decide what is continued."""
    known = check_run_folder(run)
    _resumed(asked, run, resume)  # refuse before the folder is touched
    held.enter_context(lock_folder(run, "another training run", lambda: patience(run)))
    if known:
        clear_unfinished(run)
    if was_restarted() and (why := gives_up(own(events(run)))):
        raise Stop(why)
    return _resumed(asked, run, resume)


def _load(
    engine: "Engine", checkpointer: "Checkpointer", start: "Start", asked: Asked, run: Path, resume: str
) -> tuple["Start", int]:
    """Fill the engine from what the run starts from, or from the one before where that turns out to be damaged."""
    from moe_dit.checkpoint_files import Damaged, Pruned

    damaged: dict[Path, Damaged] = {}
    first_step = 0
    while start.checkpoint is not None:
        try:
            first_step = checkpointer.load(engine, start.checkpoint)
            break
        except Damaged as error:  # on every rank alike
            if isinstance(error, Pruned):  # of another run, which trains
                say(f"{error}; taking a newer one")
            damaged[start.checkpoint] = error
            start = ranks.from_rank_0(lambda: _resumed(asked, run, resume, damaged))
    checkpointer.history = start.history
    return start, first_step


def _open_record(engine: "Engine", run: Path, start: "Start", first_step: int, bytes_held: list[dict]) -> "Metrics":
    """Begin, or go on with, what a run's folder says of it."""
    from moe_dit.checkpoint_files import name_of
    from moe_dit.lineage import set_latest, write_history
    from moe_dit.metrics import Metrics

    trains = first_step < engine.recipe.steps
    if trains:
        with explained(run / "config.yaml", Stop):
            _write_config(run, engine.recipe, engine.parallelism.json)
        with noted(run / "memory.json"):
            write_json(run / "memory.json", bytes_held)
    # The record first: a kill in between must not leave the steps of another branch in the record of the new one.
    metrics = Metrics(run, first_step, engine.recipe, start.records)
    with explained(f"the history of {run}", Stop):
        if start.own:
            # Before anything is saved: a requeued job goes on from here too.
            set_latest(run / "checkpoints", name_of(first_step))
        write_history(run, start.history)
    for change in start.changes if trains else ():
        record(run, "changed", change, first_step, start.history[-1].attempt)
    return metrics


class _Record:
    """Closes a run's metrics and sinks behind its block, in which they are opened.

    A tracker may take minutes to finish. Where a run fails the line that says why comes first, and launchers end the
    ranks that are left: then no tracker is waited for.
    """

    def __init__(self) -> None:
        self.metrics: Metrics | None = None

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self.metrics is not None and error is None:
            self.metrics.close()
        elif self.metrics is not None:
            within(CLOSING_SECONDS, self.metrics.close)


class _Told:
    """Keeps a run's status.json and events.jsonl true to what happens in its block; ``step``: what has been done.

    Args:
        run: the run's folder, which rank 0 holds.
        start: a name of this start's own.
    """

    def __init__(self, run: Path, start: str):
        self.run = run
        self.start = start
        self.step = 0
        self.speaks = ranks.world().rank == 0

    def __enter__(self) -> "_Told":
        if self.speaks:
            write_status(self.run, "training", self.start)
        return self

    def started(self, step: int, headline: str) -> None:
        """Training begins behind ``step`` steps."""
        self.step = step
        if self.speaks:
            record(self.run, "started", headline, step, self.start)

    def stopping(self) -> None:
        """It was told to stop, and saves."""
        if self.speaks:
            write_status(self.run, "stopping", self.start, step=self.step)

    def stands_still(self, line: str, step: int, ends: bool) -> None:
        """A rank's watchdog says who waits where, from its thread: rank 0's, or another's for it."""
        # Perhaps it is the terminal or the folder that does not answer.
        within(
            TELLING_SECONDS,
            lambda: console.print(line, markup=False, soft_wrap=True),
            lambda: self._note_standing(line, step, ends),
        )

    def _note_standing(self, line: str, step: int, ends: bool) -> None:
        with ExitStack() as held:
            if ends and not self.speaks:
                # Rank 0, which holds the folder, says itself how it ends, unless it is gone. It may run again already.
                try:
                    held.enter_context(lock_folder(self.run, "rank 0"))
                    ends = read_status(self.run).get("state") == "training"
                except InputError:
                    ends = False
            # It may have lost the folder to a start that took over, of which this rank is none.
            if not self.speaks and read_status(self.run).get("start") != self.start:
                return
            record(self.run, "failed" if ends else "hang", line, step, self.start)
            if ends:
                write_status(self.run, "failed", self.start, exit_status=1, message=line)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        now = {} if error is None else read_status(self.run)
        mine = now.get("start") == self.start  # else a start that took over has the folder
        if mine and left_behind(error) and now.get("state") == "failed":
            raise Followed("another rank failed") from None
        # What one rank alone has met, the others will never hear of; of several, the first says so.
        alone = mine and now.get("state") != "failed" and isinstance(error, Stop) and not error.everywhere
        if not self.speaks and not alone:
            return
        if error is None:
            write_status(self.run, "done", self.start, exit_status=0)
            record(self.run, "done", step=self.step, start=self.start)
        elif isinstance(error, Interrupted):
            write_status(self.run, "stopped", self.start, exit_status=error.status, message=str(error))
            record(self.run, "stopped", str(error), self.step, self.start)
        else:
            message = f"{type(error).__name__}: {error}"
            if not self.speaks:
                message = f"rank {ranks.world().rank} ({socket.gethostname()}): {error}"
            status = getattr(error, "status", 1)
            write_status(self.run, "failed", self.start, exit_status=status, message=message)
            record(self.run, "failed", message, self.step, self.start)


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
    all_times = RankTimes(told.run, told.start) if metrics is not None else None
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
                        told.stopping()
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
    from moe_dit.lineage import newest_told

    last = newest_told(run / "checkpoints")
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    first, end = ((report.step - n) * recipe.global_batch_size for n in (1, 0))
    raise Stop(
        f"{what} at step {report.step}, positions {first} to {end - 1} of the run; nothing was saved since {last}",
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
    elif window == "auto":
        window = kept_window(read_description(start.checkpoint))
    return replace(recipe, data=replace(recipe.data, window_gb=window))


def _resumed(asked: Asked, run: Path, resume: str, damaged: "Mapping[Path, Damaged] | None" = None) -> "Start":
    """Where to begin, as ``resume`` says; InputError where that is a checkpoint that cannot continue this recipe."""
    from moe_dit.checkpoint_files import read_description
    from moe_dit.lineage import choose

    start = choose(run, resume, damaged)
    if start.checkpoint is None:
        return start
    description, steps = read_description(start.checkpoint), asked.recipe.steps
    start = replace(start, changes=asked.changes(description, start.checkpoint, start.own))
    if description["step"] > steps:
        raise InputError(f"{start.checkpoint} has done {description['step']} steps, more than the {steps} asked for")
    if not start.own and description["step"] == steps:
        raise InputError(f"{start.checkpoint} has done all of the {steps} steps asked for; give more --steps")
    return start


def _write_config(run: Path, recipe: Recipe, ds_config: dict) -> None:
    write_yaml(run / "config.yaml", recipe.to_dict(), CONFIG_COMMENT)
    write_json(run / "ds_config.json", ds_config, indent=2)


def _write_start(run: Path, recipe: Recipe, engine: "Engine", first_step: int, changes: Sequence[str]) -> None:
    """Add what this start computes, and with what, to RUN/starts.json, which the report shows."""
    total, activated = parameters(recipe)
    parallelism = engine.parallelism
    start = machine(engine.device) | {"date": now(), "commit": commit(), "first_step": first_step}
    start |= {"precision": "bf16" if engine.bf16 else "fp32", "zero_stage": parallelism.zero_stage}
    start |= {"expert_parallel": parallelism.ep_size, "parameters": total, "activated": activated}
    start |= {"changes": list(changes), "recipe": recipe.to_dict()}
    file = run / "starts.json"
    try:
        before = list(read_json(file))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: a note is no reason not to train
        before = []
    with noted(file):
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
