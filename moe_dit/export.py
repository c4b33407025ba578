"""Exports: one folder with config.json, safetensors and recipe.yaml, loadable without DeepSpeed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from moe_dit.build import build_model, load_model, load_settings
from moe_dit.classes import CLASSES_FILE, model_classes
from moe_dit.initial_weights import check_same_network
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe, parse_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_folder, write_json, write_yaml
from moe_dit.runtime.progress import say

RECIPE_FILE = "recipe.yaml"
# Exactly what is written: a person's own files beside it are never replaced with it.
MODEL_FILES = (
    "config.json",
    SAFETENSORS_WEIGHTS_NAME,
    SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "-?????-of-?????.safetensors"),
    SAFE_WEIGHTS_INDEX_NAME,
    RECIPE_FILE,
    CLASSES_FILE,
)


@contextmanager
def new_model_folder(folder: Path, recipe: Recipe, classes: Sequence[str] | None = None) -> Iterator[Path]:
    """A folder to write a model into; with its recipe it appears under its name only when complete.

    A model folder that is there is replaced.

    Args:
        folder: its name.
        recipe: the model's.
        classes: the names of its classes in the order of the labels; None: they are not known.

    Raises:
        InputError: the folder exists and holds other things than such a model, or cannot be written; said before the
            block begins.
    """
    with explained(f"the model folder {folder}"), new_folder(folder, MODEL_FILES) as temporary:
        _check_replaced(folder)
        yield temporary
        write_yaml(temporary / RECIPE_FILE, recipe.to_dict())
        if classes is not None:
            write_json(temporary / CLASSES_FILE, list(classes))


def _check_replaced(folder: Path) -> None:
    """Raise InputError where a folder's files have a model's names, and are another program's model, or none."""
    if not os.path.isdir(folder) or not any(folder.iterdir()):
        return
    try:
        load_settings(folder)
        model_classes(folder)
        ours = os.path.isfile(folder / RECIPE_FILE)
    except InputError:
        ours = False
    if not ours:
        raise InputError(f"{folder} holds files that are no exported model, and would be replaced; give another --out")


def save_export(model: Any, recipe: Recipe, folder: Path, classes: Sequence[str] | None = None) -> None:
    """Write a model folder (see :func:`new_model_folder`)."""
    with new_model_folder(folder, recipe, classes) as temporary:
        model.save_pretrained(temporary)


def load_export(folder: str | Path) -> tuple[nn.Module, Recipe]:
    """A model folder's network (eval mode, CPU) and recipe; InputError where it is not one."""
    recipe = export_recipe(folder)
    return load_model(folder), recipe


def export_recipe(folder: str | Path) -> Recipe:
    """A model folder's recipe, without its weights; InputError where it is not one."""
    settings = load_settings(folder)
    if not os.path.isfile(Path(folder) / RECIPE_FILE):
        raise InputError(f"{folder} has no {RECIPE_FILE}; jobs/export.py writes one")
    recipe = load_recipe(str(Path(folder) / RECIPE_FILE))
    check_same_network(settings, recipe, Path(folder))
    return recipe


def export_checkpoint(run_or_checkpoint: Path, weights: str, folder: Path) -> None:
    """Turn a checkpoint (or a run's newest) into a model folder.

    Args:
        run_or_checkpoint: a run's folder, or one of its checkpoints.
        weights: "ema", "ema2" (the second average) or "model" (the float32 master weights).
        folder: where to write.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, or the folder cannot be written.
    """
    from moe_dit.checkpoint_files import Pruned

    while True:
        found = checkpoint_recipe(run_or_checkpoint, weights)
        try:
            with new_model_folder(folder, found[1], checkpoint_classes(found[0])) as new:
                checkpoint_model(*found, weights).save_pretrained(new)
            return
        except Pruned as error:
            if found[0] == run_or_checkpoint:
                raise
            say(f"{error}; taking a newer one")


def checkpoint_recipe(run_or_checkpoint: Path, weights: str) -> tuple[Path, Recipe]:
    """A checkpoint, or a run's newest, and its recipe.

    Raises:
        InputError: there is none, it cannot be read, or keeps no such weights.
    """
    from moe_dit.checkpoint_files import read_description
    from moe_dit.lineage import find_checkpoint

    checkpoint = find_checkpoint(run_or_checkpoint) if os.path.isdir(run_or_checkpoint) else None
    if checkpoint is None:
        raise InputError(f"{run_or_checkpoint} has no checkpoint; give a run folder or one of its checkpoints")
    recipe = parse_recipe(read_description(checkpoint)["recipe"], str(checkpoint))
    if weights == "ema2" and recipe.ema.second_decay is None:
        raise InputError(f"{checkpoint} keeps one average only: its recipe has no ema.second_decay; give --weights ema")
    return checkpoint, recipe


def checkpoint_classes(checkpoint: Path) -> list[str] | None:
    """The names of the classes that a checkpoint was trained with; None where it does not say (InputError: damaged)."""
    from moe_dit.checkpoint_files import read_description

    data = read_description(checkpoint).get("data")
    return data["classes"] if data else None


def checkpoint_model(checkpoint: Path, recipe: Recipe, weights: str) -> Any:
    """A checkpoint's network on the CPU, with weights as :func:`export_checkpoint` names them."""
    from moe_dit.checkpoint_files import read_state

    model: Any = build_model(recipe, device="cpu")
    kind = "weight" if weights == "model" else weights
    targets = {f"{kind}/{name}": weight.detach().view(-1) for name, weight in model.named_parameters()}
    names = dict(model.named_parameters()).keys()
    targets |= {f"buffer/{name}": value for name, value in model.state_dict().items() if name not in names}
    with torch.no_grad():
        read_state(targets, checkpoint)
    return model.eval()
