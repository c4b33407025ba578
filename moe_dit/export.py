"""Exports: one folder with config.json, safetensors and recipe.yaml, loadable without DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from moe_dit.build import build_model, load_model
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe, parse_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_folder, write_yaml

RECIPE_FILE = "recipe.yaml"
# Exactly what save_pretrained writes: a person's own files beside it are never replaced with it.
MODEL_FILES = (
    "config.json",
    SAFETENSORS_WEIGHTS_NAME,
    SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "-?????-of-?????.safetensors"),
    SAFE_WEIGHTS_INDEX_NAME,
    RECIPE_FILE,
)


@contextmanager
def new_model_folder(folder: Path, recipe: Recipe) -> Iterator[Path]:
    """A folder to write a model into; with its recipe it appears under its name only when complete.

    Raises:
        InputError: the folder exists and holds other things than a model, or cannot be written.
    """
    with explained(f"the model folder {folder}"), new_folder(folder, MODEL_FILES) as temporary:
        yield temporary
        write_yaml(temporary / RECIPE_FILE, recipe.to_dict())


def save_export(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write a model folder (see :func:`new_model_folder`)."""
    with new_model_folder(folder, recipe) as temporary:
        model.save_pretrained(temporary)


def load_export(folder: str | Path) -> tuple[nn.Module, Recipe]:
    """A model folder's network (eval mode, CPU) and recipe; InputError where it is not one."""
    model = load_model(folder)
    if not (Path(folder) / RECIPE_FILE).is_file():
        raise InputError(f"{folder} has no {RECIPE_FILE}; jobs/export.py writes one")
    return model, load_recipe(str(Path(folder) / RECIPE_FILE))


def export_checkpoint(run_or_checkpoint: Path, weights: str, folder: Path) -> None:
    """Turn a checkpoint (or a run's newest) into a model folder.

    Args:
        run_or_checkpoint: a run's folder, or one of its checkpoints.
        weights: "ema", "ema2" (the second average) or "model" (the float32 master weights).
        folder: where to write.
    """
    from moe_dit.checkpoint_files import read_description, read_state
    from moe_dit.lineage import find_checkpoint

    checkpoint = find_checkpoint(run_or_checkpoint)
    if checkpoint is None:
        raise InputError(f"{run_or_checkpoint} has no checkpoint; give a run folder or one of its checkpoints")
    recipe = parse_recipe(read_description(checkpoint)["recipe"], str(checkpoint))
    if weights == "ema2" and recipe.ema.second_decay is None:
        raise InputError(f"{checkpoint} keeps one average only: its recipe has no ema.second_decay; give --weights ema")
    model = build_model(recipe, device="meta").to_empty(device="cpu")
    kind = "weight" if weights == "model" else weights
    targets = {f"{kind}/{name}": weight.detach().view(-1) for name, weight in model.named_parameters()}
    names = dict(model.named_parameters()).keys()
    targets |= {f"buffer/{name}": value for name, value in model.state_dict().items() if name not in names}
    with torch.no_grad():
        read_state(targets, checkpoint)
    save_export(model, recipe, folder)
