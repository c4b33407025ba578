"""Beginning a run from the weights of a model folder: an export, an imported or an upcycled model.

A rank reads its own pieces of the tensors and no more: a share of the experts, and under ZeRO a share of every weight.
They are set where a checkpoint's would be, in the float32 master weights and averages: DeepSpeed makes those from
weights that it has rounded to the precision they compute in: no matter for drawn weights, but a loss for these.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_dit.build import build_model, load_settings
from moe_dit.classes import differing, model_classes
from moe_dit.models import NetworkConfig
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say
from moe_dit.schema import differences, is_under
from moe_dit.weight_files import check_weights, open_weights, read_flat

if TYPE_CHECKING:
    from moe_dit.engine import Engine

# What acts in training alone: a network with other values of these computes the same function.
TRAINING_KEYS = {"attn_dropout", "proj_dropout", "moe.dropout", "moe.auxiliary_losses", "capacity_loss_weight"}


def check_initial_weights(recipe: Recipe, classes: Sequence[str] | None = None) -> None:
    """Hold the model folder ``recipe.initial_weights`` against the recipe's network, reading no weights.

    Args:
        recipe: names the folder.
        classes: the names of those that are trained; where the folder's are others, a line says so, for to begin with
            what another model has learned may be just what is meant.

    Raises:
        InputError: it is no model folder, or of another network.
    """
    folder = Path(recipe.initial_weights or "")
    check_same_network(load_settings(folder), recipe, folder)
    model: Any = build_model(recipe, device="meta")
    with open_weights(folder) as weights:
        check_weights(weights, model.state_dict(), folder, f"recipe {recipe.name}")
    theirs = model_classes(folder)
    if classes is not None and theirs is not None and classes != theirs:
        new, old = differing(classes, theirs)
        say(f"begins from {folder}, with {new} instead of {old}: its labels are of other classes")


def check_same_network(settings: NetworkConfig, recipe: Recipe, folder: Path, ignored: frozenset = frozenset()) -> None:
    """Refuse a model folder whose network is another function of its weights than the recipe's (InputError).

    Args:
        settings: the folder's (:func:`moe_dit.build.load_settings`).
        recipe: to hold it against.
        folder: its name, for the message.
        ignored: keys and sections of the ``model`` section that may differ, besides those that act in training alone.
    """
    ours = recipe.to_dict()["model"]
    theirs = asdict(settings)
    if ours["family"] != theirs["family"]:
        raise InputError(f"{folder} is a {theirs['family']} network, but recipe {recipe.name} is {ours['family']}")
    for key, our, their in differences(ours, theirs):
        if not is_under(key, TRAINING_KEYS | ignored):
            raise InputError(
                f"{folder} is of another network than recipe {recipe.name}: its {key} is {their}, the recipe's "
                f"model.{key} {our}; they should be equal"
            )


def load_initial_weights(engine: "Engine", folder: Path) -> None:
    """Set an engine's master weights and their averages, and the network's buffers, from a model folder.

    The folder is one that :func:`check_initial_weights` has accepted.
    """
    kinds = ["weight", *engine.recipe.ema.decays]
    with open_weights(folder) as weights, torch.no_grad():
        for piece in engine.pieces():
            values = read_flat(weights[piece.name], piece.start, len(piece.tensors["weight"]))
            for kind in kinds:
                piece.tensors[kind].copy_(values)
        for name, buffer in engine.buffers().items():
            buffer.copy_(weights[name][:])
    engine.set_step(0)
