"""The speed of the real training step of a recipe, beside the same network as the published code computes it.

Both train in one process, step by step in turns, so that what disturbs one disturbs the other: ours through the engine,
with data, draws, optimizer and averages; the published form (:mod:`moe_dit.reference.loop`) in float32 (TF32 on GPUs)
with torch's draws, torch's AdamW and a loop of averages. Between them stands the fastest square matrix product, which
says what the machine gives at that moment. Before anything is timed both take the same first step, and must agree: from
weights that are moved off their initial values, whose gates and last layer are zero and give experts no gradient.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset

from moe_dit.build import build_model, to_compute
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.engine import Engine
from moe_dit.flow import build_flow
from moe_dit.manifest import FORMAT, MANIFEST, Manifest
from moe_dit.models.dropout import dropouts
from moe_dit.parallel.deepspeed_config import Parallelism
from moe_dit.plan import most_images_per_second, training_flops
from moe_dit.randomness import fill_weight
from moe_dit.recipe import Recipe
from moe_dit.reference.loop import published_form
from moe_dit.runtime import ranks
from moe_dit.runtime.clock import moment, seconds_between
from moe_dit.runtime.errors import Stop
from moe_dit.runtime.files import write_json
from moe_dit.runtime.machine import machine
from moe_dit.runtime.progress import task

PARTS = ("data and draws", "forward", "backward", "optimizer", "averages", "other")
WARM_UP = 2  # steps of each before timing, the one that is compared among them
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of the square products that give the matrix peak
LONG_PRODUCT = 2.0  # seconds after which none is tried again, nor a larger one: a CPU without bf16 would take minutes
TOLERANCE = 1e-3  # of the first step's loss and gradient norm, in float32
MOVED = 0.02  # standard deviation of what is added to initial weights


class Clock:
    """Times the parts of a step.

    Args:
        device: where they compute; a GPU's parts are timed by its own events.
        now: the clock in seconds; ``time.perf_counter``, or ``time.process_time`` where others use the machine.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self.device = device
        self.now = now
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done in the block belongs to a part."""
        start = moment(self.device, self.now)
        yield
        self._marks.append((name, start, moment(self.device, self.now)))

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Every call of an object's method belongs to a part."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time a piece of work, until the device has done it."""
        self.wait()
        start = self.now()
        work()
        self.wait()
        return self.now() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last time, once the device has done them."""
        self.wait()
        found: dict[str, float] = {}
        for name, start, end in self._marks:
            found[name] = found.get(name, 0.0) + seconds_between(start, end)
        self._marks.clear()
        return found


class Memory:
    """The peak of memory during a step: the device's, or this process's, of which Linux keeps a mark to be reset."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def start(self) -> int:
        """Begin; gives the bytes in use."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return self.peak()

    def peak(self) -> int:
        """The most bytes in use since."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


def made_up_shards(recipe: Recipe, folder: Path, samples: int) -> Manifest:
    """Shards of noise in the form of a recipe's, for a bench that was given none."""
    model = recipe.model
    generator = torch.Generator().manual_seed(0)
    side = model.input_size
    latents = recipe.data.kind == "latents"
    shape = [model.in_channels * (2 if latents else 1), side, side]
    folder.mkdir(parents=True, exist_ok=True)
    name = "shard-000000.tar"
    with webdataset.TarWriter(str(folder / name)) as tar:
        for i in range(samples):
            sample: dict[str, Any] = {"__key__": f"{i:06d}", "cls": i % model.num_classes}
            if latents:
                moments = torch.randn(shape, generator=generator)
                moments[model.in_channels :] -= 3  # log variances of a posterior that is narrow, as a VAE's are
                for extension in ("latent.npy", "latent_flip.npy"):
                    sample[extension] = moments.half().numpy()
            else:
                sample["png"] = torch.rand(side, side, model.in_channels, generator=generator).numpy()
            tar.write(sample)
    values: dict[str, Any] = {
        "kind": recipe.data.kind,
        "samples": samples,
        "classes": [str(i) for i in range(model.num_classes)],
        "sample_shape": shape,
        "scale": recipe.data.latent_scale or 1.0,
        "shards": [{"name": name, "samples": samples, "bytes": (folder / name).stat().st_size, "sha256": ""}],
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **values})
    return Manifest(folder, **values)


@torch.no_grad()
def move(name: str, start: int, weight: torch.Tensor) -> None:
    """Add noise to the elements of a logical weight from ``start`` on: the same, however it is cut into slices."""
    noise = torch.empty(weight.shape, device=weight.device)
    fill_weight(noise, 1, name, start, "normal", MOVED)
    weight += noise


def moved(network: Any) -> Any:
    """A network whose weights are all moved (:func:`move`); the same object."""
    for name, weight in network.named_parameters():
        move(name, 0, weight)
    return network


class Ours:
    """The engine's step."""

    def __init__(self, recipe: Recipe, parallelism: Parallelism, manifest: Manifest, clock: Clock):
        self.clock = clock
        self.recipe = recipe
        self.engine = Engine(recipe, parallelism, clock.device)
        for piece in self.engine.pieces():
            move(piece.name, piece.start, piece.tensors["weight"])
        self.engine.set_step(0)
        self.latents = Latents.of(recipe, manifest)
        eats = partial(most_images_per_second, recipe, clock.device.type)
        self.stream = batches(recipe, manifest, parallelism.micro_batch_size, 0, ranks.world(), eats)
        self.done = 0
        for owner, method, part in (
            (self.engine.flow, "loss", "forward"),
            (self.engine.deepspeed_engine, "backward", "backward"),
            (self.engine.deepspeed_engine, "step", "optimizer"),
            (self.engine.ema, "update", "averages"),
        ):
            clock.watch(owner, method, part)

    def inputs(self, batch: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Of the next batch, or of one that was read before."""
        batch = next(self.stream) if batch is None else batch
        batch = {key: value.to(self.clock.device, non_blocking=True) for key, value in batch.items()}
        return training_inputs(self.recipe, batch, self.latents)

    def step(self) -> dict[str, torch.Tensor]:
        with self.clock.part("data and draws"):
            inputs = self.inputs()
        return self.first(inputs)

    def first(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = self.engine.train_step(self.done, [inputs])
        self.done += 1
        return result

    def held(self) -> int:
        """Bytes of weights and training state."""
        return sum(self.engine.bytes_held().values())


class Published:
    """The published code's step."""

    def __init__(self, recipe: Recipe, parallelism: Parallelism, manifest: Manifest, clock: Clock):
        self.clock = clock
        self.recipe = recipe
        self.flow = build_flow(recipe)
        self.network: Any = published_form(moved(build_model(recipe, clock.device)))
        self.model = self.network
        if parallelism.world_size > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.network, find_unused_parameters=True)
        settings = recipe.optimizer
        self.weights = list(self.network.parameters())
        betas = (settings.betas[0], settings.betas[1])
        self.optimizer = torch.optim.AdamW(self.weights, settings.lr, betas, weight_decay=settings.weight_decay)
        self.averages = {
            decay: [weight.detach().clone() for weight in self.weights] for decay in recipe.ema.decays.values()
        }
        self.latents = Latents.of(recipe, manifest)
        eats = partial(most_images_per_second, recipe, clock.device.type)
        self.stream = batches(recipe, manifest, parallelism.micro_batch_size, 0, ranks.world(), eats)

    def step(self) -> None:
        with self.clock.part("data and draws"):
            inputs = self.inputs()
        self.loss_of(inputs)
        self.finish()

    def inputs(self) -> dict[str, torch.Tensor]:
        """As :func:`moe_dit.data.training_inputs`, with torch's own draws."""
        batch = {key: value.to(self.clock.device, non_blocking=True) for key, value in next(self.stream).items()}
        x, y = batch["x"].float(), batch["y"]
        if self.recipe.data.kind == "pixels":
            x = x.contiguous() / 127.5 - 1
        else:
            if self.latents.posterior:
                mean, log_variance = x.chunk(2, dim=1)
                x = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * torch.randn_like(mean)
            x = (x - self.latents.shift) * self.latents.scale
        dropped = torch.rand(len(x), device=x.device) < self.recipe.flow.label_dropout
        y = torch.where(dropped, self.recipe.model.num_classes, y)
        return {"x": x, "y": y, "noise": torch.randn_like(x), "u": torch.rand(len(x), device=x.device)}

    def loss_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, with its gradients left in the weights."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # TF32, where there is such a thing
        try:
            with self.clock.part("forward"):
                t = self.flow.times(inputs["u"])
                losses = self.flow.loss(self.model, inputs["x"], inputs["y"], noise=inputs["noise"], t=t)
            with self.clock.part("backward"):
                losses["loss"].backward()
        finally:
            torch.set_float32_matmul_precision(precision)
        return losses["loss"].detach()

    def finish(self) -> None:
        with self.clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with self.clock.part("averages"), torch.no_grad():
            for decay, averages in self.averages.items():
                for average, weight in zip(averages, self.weights, strict=True):
                    average.mul_(decay).add_(weight, alpha=1 - decay)

    def held(self) -> int:
        """Bytes of weights and training state."""
        return sum(weight.nbytes for weight in self.weights) * (3 + len(self.averages))


@dataclass(frozen=True)
class Spread:
    """What is said of repeated measurements: the median, and the quarters on both sides of it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


class MatrixPeak:
    """The rate of the fastest square matrix product."""

    def __init__(self, device: torch.device, bf16: bool):
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.pairs = [
            tuple(torch.randn(n, n, device=device, dtype=dtype) for _ in range(3)) for n in SIDES[device.type]
        ]

    def measure(self, clock: Clock) -> float:
        """FLOP/s now."""
        rates = []
        for a, b, out in self.pairs:
            for _ in range(3):
                seconds = clock.seconds(partial(torch.mm, a, b, out=out))
                rates.append(2 * len(a) ** 3 / seconds)
                if seconds > LONG_PRODUCT:
                    return max(rates)
        return max(rates)


def bench(
    recipe: Recipe,
    parallelism: Parallelism,
    manifest: Manifest,
    clock: Clock,
    pairs: int,
    published: bool,
    steady: int = 0,
) -> dict[str, Any]:
    """Time a recipe's training step.

    Args:
        recipe: its steps must be enough for WARM_UP and ``pairs``; a step is one micro-batch a rank.
        parallelism: how it is spread; its world size is the number of ranks that have joined.
        manifest: of the shards to read.
        clock: on the device that computes.
        pairs: steps of each that are timed.
        published: whether the published form is timed beside ours.
        steady: steps of ours that follow one another without waiting, as in training, of one batch that is read
            before: in training other processes read; 0: "steady_seconds" is left out.

    Returns:
        What was measured: numbers under their names, "ours" and "published" with their seconds (:class:`Spread`),
        seconds by part, share of the peak and bytes of memory; "pairs", seconds of ours and of the published form, and
        the matrix peak in FLOP/s, for each pair; "steady_seconds", a step's. Images a second, FLOPs and memory are this
        rank's.

    Raises:
        Stop: the two forms do not compute the same.
    """
    ours = Ours(recipe, parallelism, manifest, clock)
    theirs = Published(recipe, parallelism, manifest, clock) if published else None
    peak = MatrixPeak(clock.device, ours.engine.bf16)
    agreement = _warm_up(ours, theirs)
    sides: list[Ours | Published] = [ours] if theirs is None else [ours, theirs]
    parts: dict[Any, list[dict[str, float]]] = {side: [] for side in sides}
    seconds: dict[Any, list[float]] = {side: [] for side in sides}
    memory: dict[Any, int] = {}
    peaks = []
    watch = Memory(clock.device)
    with task("pairs of steps", pairs) as progress:
        for i in range(pairs):
            for side in sides if i % 2 == 0 else reversed(sides):
                before = watch.start()
                clock.take()
                spent = clock.seconds(side.step)
                found = clock.take()
                parts[side].append(found | {"other": spent - sum(found.values())})
                seconds[side].append(spent)
                memory[side] = max(memory.get(side, 0), watch.peak() - before)
            peaks.append(peak.measure(clock))
            progress.advance(1, f"{recipe.global_batch_size / seconds[ours][-1]:.1f} images/s")
    batch = parallelism.micro_batch_size
    flops = training_flops(recipe, build_model(recipe, device="meta")) * batch

    def told(side: Ours | Published) -> dict[str, Any]:
        spent = seconds[side]
        rate = Spread.of([flops / s for s in spent])
        shares = Spread.of([flops / s / p for s, p in zip(spent, peaks, strict=True)])
        return {
            "seconds": Spread.of(spent).to_dict(),
            "images_per_second": batch / statistics.median(spent),
            "flops_per_second": rate.median,
            "share_of_peak": shares.median,
            "parts": {part: statistics.median(found.get(part, 0.0) for found in parts[side]) for part in PARTS},
            "memory_held": side.held(),
            "memory_peak": side.held() + memory[side],
        }

    result: dict[str, Any] = {
        "recipe": recipe.name,
        "batch": batch,
        "precision": "bf16" if ours.engine.bf16 else "fp32",
        "zero_stage": parallelism.zero_stage,
        "expert_parallel": parallelism.ep_size,
        **machine(clock.device),
        "flops_per_image": flops / batch,
        "matrix_peak": statistics.median(peaks),
        "images_per_second": batch / statistics.median(seconds[ours]),
        **_sampling(recipe, clock, batch),
        "ours": told(ours),
        "pairs": [[seconds[side][i] for side in sides] + [peaks[i]] for i in range(pairs)],
    }
    if steady:
        result["steady_seconds"] = _steady(ours, steady)
    if theirs is not None:
        ratios = Spread.of([b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)])
        result |= {"speedup": ratios.median, "speedup_spread": ratios.to_dict(), "published": told(theirs)}
        result |= {"agreement": agreement}
    if parallelism.world_size > 1:
        result["all_to_all_bytes_per_second"] = _all_to_all(recipe, ours, clock)
    ours.engine.close()
    return result


def _steady(ours: Ours, steps: int) -> float:
    """Seconds a step, where none is waited for."""
    batch = next(ours.stream)

    def work() -> None:
        for _ in range(steps):
            ours.first(ours.inputs(batch))

    return ours.clock.seconds(work) / steps


def _warm_up(ours: Ours, theirs: Published | None) -> dict[str, list[float]]:
    """A few steps of both on the same inputs; the last one's losses and gradient norms, which must agree in float32."""
    found: dict[str, list[float]] = {}
    for _ in range(WARM_UP):
        inputs = ours.inputs()
        loss = ours.first(inputs)["terms"][0].item()
        found = {"loss": [loss], "gradient_norm": [float(ours.engine.gradient_norm())]}
        if theirs is not None:
            loss_of = theirs.loss_of(inputs)
            if ranks.world().size > 1:
                torch.distributed.all_reduce(loss_of)
            found["loss"].append(loss_of.item() / ranks.world().size)
            gradients = [weight.grad for weight in theirs.weights if weight.grad is not None]
            found["gradient_norm"].append(torch.nn.utils.get_total_norm(gradients).item())
            theirs.optimizer.param_groups[0]["lr"] = ours.engine.learning_rate(ours.done - 1)  # as it warms up
            theirs.finish()
    exact = not ours.engine.bf16 and not dropouts(ours.engine.model)
    if theirs is not None and exact:
        for what, (mine, other) in found.items():
            if not abs(mine - other) <= TOLERANCE * abs(other):
                raise Stop(f"the engine's {what} is {mine}, the published form's {other}: they do not compute the same")
    return found


@torch.no_grad()
def _sampling(recipe: Recipe, clock: Clock, batch: int) -> dict[str, float]:
    """Images a second that eval.sample makes on a rank, by the recipe's own settings: it runs the plain network."""
    settings, model = recipe.sampling, recipe.model
    flow = build_flow(recipe)
    network: Any = to_compute(build_model(recipe, clock.device), recipe, clock.device)
    counted = _Counted(network)
    shape = (model.in_channels, model.input_size, model.input_size)
    label = torch.zeros(1, dtype=torch.int64)
    low, high = settings.cfg_interval
    how: Any = {"method": settings.method, "cfg_scale": settings.cfg_scale, "cfg_interval": (low, high)}
    flow.sample(counted, torch.zeros(1, *shape), label, steps=settings.steps, **how)
    n = batch * (2 if settings.cfg_scale != 1 else 1)  # both halves of guidance at once
    z = torch.randn(n, *shape, device=clock.device)
    t = torch.rand(n, device=clock.device)
    y = torch.arange(n, device=clock.device) % model.num_classes
    spent = min(clock.seconds(lambda: flow.velocity(network, z, t, y)) for _ in range(3))
    return {"sampling_evaluations": counted.samples, "sampling_images_per_second": n / spent / counted.samples}


class _Counted:
    """Stands for a network, and counts the samples it is asked for."""

    def __init__(self, network: Any):
        self.num_classes = network.num_classes
        self.couples_samples = network.couples_samples
        self.samples = 0

    def __call__(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.samples += len(z)
        return torch.zeros_like(z)


def _all_to_all(recipe: Recipe, ours: Ours, clock: Clock) -> float:
    """Bytes a second that a rank sends to the others, in an exchange as large as a mixture's of one micro-batch."""
    moe = recipe.token_choice
    rows = ours.engine.parallelism.micro_batch_size * recipe.model.tokens * (moe.top_k if moe is not None else 1)
    size = ranks.world().size
    dtype = torch.bfloat16 if ours.engine.bf16 else torch.float32
    out, given = (
        torch.ones(-(-rows // size) * size, recipe.model.hidden_size, device=clock.device, dtype=dtype)
        for _ in range(2)
    )
    spent = [clock.seconds(lambda: torch.distributed.all_to_all_single(out, given)) for _ in range(6)][1:]
    return given.nbytes * (size - 1) / size / statistics.median(spent)
