"""Where a run's numbers and pictures go beside metrics.jsonl: TensorBoard, and trackers installed on request."""

import importlib
import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import write_text
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


class TensorBoard:
    """Files in RUN/tensorboard."""

    def __init__(self, run: Path, first_step: int, recipe: Recipe):
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._writer.add_image(f"looks/{name}", image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Weights & Biases, and trackio, which has the same calls. One run here is one run there, by its folder's name."""

    module = ""

    def __init__(self, run: Path, first_step: int, recipe: Recipe):
        self._library = importlib.import_module(self.module)
        options = self.options(run)
        self._library.init(project=PROJECT, name=run.name, config=recipe.to_dict(), resume="allow", **options)

    def options(self, run: Path) -> dict[str, Any]:
        """Further arguments of the library's init."""
        return {}

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._library.log(values, step=step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._library.log({name: self._library.Image(image)}, step=step)

    def close(self) -> None:
        self._library.finish()


class WeightsAndBiases(_Tracker):
    """wandb, from `pip install wandb`; its own environment variables (WANDB_MODE, ...) apply."""

    module = "wandb"

    def options(self, run: Path) -> dict[str, Any]:
        """The id by which W&B knows a run that continues, kept in the run's folder."""
        file = run / "wandb_id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex)
        return {"id": read_bytes(file, 1000).decode(), "dir": str(run)}


class Trackio(_Tracker):
    """trackio, from `pip install trackio`: local and free."""

    module = "trackio"


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


def open_sinks(recipe: Recipe, run: Path, first_step: int) -> list[Sink]:
    """The sinks of a run, of which ``first_step`` steps were done before."""
    return [SINKS[name](run, first_step, recipe) for name in recipe.metrics.sinks]
