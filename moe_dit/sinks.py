"""Where a run's numbers and pictures go beside metrics.jsonl: TensorBoard, and trackers installed on request."""

import importlib
import importlib.util
import math
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import write_text
from moe_dit.runtime.notes import noted
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import read_bytes

PROJECT = "moe-dit"  # the name that trackers show runs under


class Sink(Protocol):
    """What receives a run's record, on rank 0. It is made of (the run's folder, steps done before, the recipe)."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step, by name."""

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Take a picture, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Finish: everything taken is written."""


def _silent(args: threading.ExceptHookArgs, before: Callable[..., Any] = threading.excepthook) -> None:
    """TensorBoard's thread (2.21) raises a disk's error into the open; its writer raises it again where it is told."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        before(args)


class TensorBoard:
    """Files in RUN/tensorboard."""

    def __init__(self, run: Path, first_step: int, recipe: Recipe):
        threading.excepthook = _silent
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._writer.add_image(f"looks/{name}", image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Weights & Biases, and trackio, which has the same calls. One run here is one run there."""

    module = ""

    def __init__(self, run: Path, first_step: int, recipe: Recipe):
        self._library = importlib.import_module(self.module)
        options = self.options(run, first_step)
        self._library.init(project=PROJECT, config=recipe.to_dict(), resume="allow", **options)

    def options(self, run: Path, first_step: int) -> dict[str, Any]:
        """Further arguments of the library's init."""
        raise NotImplementedError

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._library.log(values, step=step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._library.log({name: self._library.Image(image)}, step=step)

    def close(self) -> None:
        self._library.finish()


class WeightsAndBiases(_Tracker):
    """wandb, from `pip install wandb`; its own environment variables (WANDB_MODE, ...) apply."""

    module = "wandb"

    def options(self, run: Path, first_step: int) -> dict[str, Any]:
        return {"name": run.name, "id": kept_id(run / "wandb_id", uuid.uuid4().hex), "dir": str(run)}


class Trackio(_Tracker):
    """trackio, from `pip install trackio`: local and free. It knows a run by its name alone."""

    module = "trackio"

    def options(self, run: Path, first_step: int) -> dict[str, Any]:
        # A run that an earlier version began goes on under its folder's name.
        old = first_step and not (run / "trackio_id").exists()
        return {"name": kept_id(run / "trackio_id", run.name if old else f"{run.name}-{uuid.uuid4().hex[:8]}")}


def kept_id(file: Path, new: str) -> str:
    """The name by which a tracker knows a run that continues, kept in the run's folder; ``new`` where there is none.

    The file's second line is the folder. A run that was moved keeps its name. A copy gets a new one: it is one where
    the folder that the file names has the same name in its file still.
    """
    here = str(file.parent.resolve())
    lines = _lines(file)
    if lines:
        before = Path(lines[1]) if len(lines) > 1 else file.parent  # earlier versions did not keep it
        copied = str(before) != here and _lines(before / file.name)[:1] == lines[:1] and not before.samefile(here)
        if copied:
            say(f"{file.parent} is a copy of {before}: it becomes another run for {file.stem.removesuffix('_id')}")
        else:
            new = lines[0]
    if lines != [new, here]:
        write_text(file, f"{new}\n{here}\n")
    return new


def _lines(file: Path) -> list[str]:
    """A file's lines; none where there is none."""
    try:
        return read_bytes(file, 10_000).decode().splitlines()
    except (OSError, ValueError):
        return []


SINKS: dict[str, Callable[[Path, int, Recipe], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_sinks(recipe: Recipe) -> None:
    """Raise InputError where a sink of the recipe is unknown or not installed."""
    for name in recipe.metrics.sinks:
        if name not in SINKS:
            raise InputError(f"metrics.sinks has {name!r}; choose of {', '.join(SINKS)}")
        module = getattr(SINKS[name], "module", None)
        if module is not None and importlib.util.find_spec(module) is None:
            raise InputError(f"metrics.sinks has {name}, which is not installed: pip install {module}")


class Sinks:
    """All sinks of a run, of which ``first_step`` steps were done before.

    They are notes (:mod:`moe_dit.runtime.notes`): one that fails, as trackers' servers do, is left alone for a minute,
    and then opened anew.
    """

    SECONDS = 60.0

    def __init__(self, recipe: Recipe, run: Path, first_step: int):
        self._recipe = recipe
        self._run = run
        self._step = first_step
        self._open: dict[str, Sink] = {}
        self._failed: dict[str, float] = {}  # until when they are left alone, in monotonic seconds
        self._each(lambda sink: None)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Give a step's numbers to each."""
        self._each(lambda sink: sink.numbers(values, step))
        self._step = step

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Give a picture, uint8 [H, W, 3], to each."""
        self._each(lambda sink: sink.picture(name, image, step))

    def close(self) -> None:
        """Finish."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name in self._recipe.metrics.sinks:
            now = time.monotonic()
            if now < self._failed.get(name, -math.inf):
                continue
            self._failed[name] = math.inf
            with noted(name, Exception):
                if name not in self._open:
                    self._open[name] = SINKS[name](self._run, self._step, self._recipe)
                call(self._open[name])
                del self._failed[name]
            if name in self._failed:
                self._open.pop(name, None)
                # Training stands meanwhile: a server that takes a minute to say nothing is asked once an hour.
                self._failed[name] = now + max(self.SECONDS, 60 * (time.monotonic() - now))
