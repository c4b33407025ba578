"""What a part is given: the device, its time, and where its results go; and what several parts build."""

import gc
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import Line, write

from moe_dit.bench import moved
from moe_dit.build import build_model
from moe_dit.engine import Engine, start_ranks
from moe_dit.models.initialization import initialize
from moe_dit.parallel.deepspeed_config import Parallelism, load_parallelism
from moe_dit.parallel.expert_layers import apply_expert_parallelism
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe

PACKED = Path(__file__).parents[3] / ".gpu"  # what pack.py makes
ONE_RANK = "ds_configs/zero1_ep1.json"
# What stands for a recipe in a dry run.
TINY = {"dsmoe": "digits", "jitmoe": "digits_pixels", "diffmoe": "digits_diffmoe"}
TINY_CHANGES = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]


class Broken(Exception):
    """The process's CUDA context can no longer be used."""


class Context:
    """A part's surroundings.

    Attributes:
        device: where it computes.
        dry: tiny, on a CPU.
        out: folder of the results.
    """

    def __init__(self, part: str, out: Path, deadline: float, dry: bool):
        self.part = part
        self.out = out
        self.dry = dry
        self.tests = Path(__file__).parents[2]
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self._deadline = deadline

    def left(self) -> float:
        """Seconds of this part's share of the time."""
        return self._deadline - time.time()

    def time_for(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left (on a GPU); where not, a line says that ``name`` is skipped."""
        if self.left() >= (0 if self.dry else seconds):
            return True
        self.tell(name, "skipped", note=f"takes about {seconds:.0f} s, {max(0.0, self.left()):.0f} are left")
        return False

    def tell(self, name: str, value: Any, unit: str = "", note: str = "") -> None:
        """A figure that nothing is asked of."""
        write(self.out, Line(self.part, name, value, unit, note=note))

    def check(
        self, name: str, value: float, most: float, unit: str = "", note: str = "", measured: bool = False
    ) -> None:
        """A figure that should be at most ``most``; NaN never is. One that is measured means nothing in a dry run."""
        if measured and self.dry:
            return self.tell(name, value, unit, note)
        write(self.out, Line(self.part, name, value, unit, f"<= {most:g}", bool(value <= most), note))

    def check_least(self, name: str, value: float, least: float, unit: str = "", note: str = "") -> None:
        """A figure that should be at least ``least``."""
        write(self.out, Line(self.part, name, value, unit, f">= {least:g}", bool(value >= least), note))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails in the block is a check that does not hold, and the part goes on.

        Raises:
            Broken: no CUDA call can work any more.
        """
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            write(self.out, Line(self.part, name, "raised", bound="ends", ok=False, note=first_line(error)))
            if not self.alive():
                raise Broken(f"{name}: {first_line(error)}") from None
        self.clear()
        print(f"{self.part}: {name}: {time.perf_counter() - began:.1f} s", flush=True)

    def alive(self) -> bool:
        """Whether the process can still use its GPU: some errors stay with a CUDA context for ever."""
        try:
            self.wait()
        except Exception:
            return False
        return True

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def scratch(self, name: str) -> Path:
        """The path of a folder for what is not a result; it is not there yet."""
        return Path(tempfile.mkdtemp(prefix="gpu_")) / name

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that is started: one rank by itself, whatever this process has joined."""
        left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        return {key: value for key, value in os.environ.items() if key not in left_out}

    def clear(self) -> None:
        """Give back what is not used any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tell_memory(self) -> None:
        """What the part has left behind, when all that it built should be gone."""
        self.clear()
        if self.device.type == "cuda":
            self.tell("memory that is held at the end", torch.cuda.memory_allocated() / 1e9, "GB")

    # --- what parts build ---------------------------------------------------------------------------------------------

    def recipe(self, name: str, *changes: str, batch: int = 0) -> Recipe:
        """A recipe whose step is one micro-batch of ``batch`` images, read by no process of its own."""
        changes = ("data.workers=0", *changes)
        if self.dry:
            family = name.split("_")[0]
            kept = [change for change in changes if not change.startswith("model.")]
            more = ["model.in_context_start=1"] if family == "jitmoe" else []
            recipe = load_recipe(TINY[family], [*TINY_CHANGES, *more, "compile=none", *kept])
            batch = min(batch, 4)
        else:
            recipe = load_recipe(name, list(changes))
        return replace(recipe, global_batch_size=batch, max_micro_batch_size=batch) if batch else recipe

    def parallelism(self, recipe: Recipe) -> Parallelism:
        """One rank under ZeRO 1."""
        start_ranks()
        return load_parallelism(ONE_RANK, recipe, 1)

    @contextmanager
    def engine(self, recipe: Recipe) -> Iterator[Engine]:
        """The engine of one rank, in the block alone."""
        engine = Engine(recipe, self.parallelism(recipe), self.device)
        try:
            yield engine
        finally:
            engine.close()

    def one_rank(self, recipe: Recipe, dtype: torch.dtype) -> Any:
        """The network as one rank trains it, without an engine around it, its weights moved off their first values."""
        model = build_model(recipe, device="meta").train()
        start_ranks()
        apply_expert_parallelism(model, 1)
        for weight in moved(initialize(model, recipe.seed, self.device)).parameters():
            weight.data = weight.data.to(dtype)
        return model

    def inputs(self, recipe: Recipe, count: int) -> dict[str, torch.Tensor]:
        """Training inputs on the device, of noise in the form of data."""
        model = recipe.model
        generator = torch.Generator().manual_seed(0)
        shape = count, model.in_channels, model.input_size, model.input_size
        position = torch.arange(count, device=self.device)
        x, noise = (torch.randn(shape, generator=generator).to(self.device) for _ in range(2))
        u = torch.rand(count, generator=generator).to(self.device)
        return {"x": x, "noise": noise, "u": u, "y": position % model.num_classes, "position": position}

    def seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """The median time of a piece of work on the device, of several after one that is not counted."""
        if self.device.type != "cuda":
            spent = []
            for _ in range(3):
                start = time.perf_counter()
                work()
                spent.append(time.perf_counter() - start)
            return statistics.median(spent[1:])
        work()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The largest error and what it is of; one that is no finite number comes before all others."""
    return max(errors.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of what it should be."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def first_line(error: BaseException) -> str:
    """An error in a line."""
    text = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
