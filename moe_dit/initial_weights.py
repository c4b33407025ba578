"""Beginning a run from the weights of a model folder: an export, an imported or an upcycled model.

A rank reads its own pieces of the tensors and no more: a share of the experts, and under ZeRO a share of every weight.
They are set where a checkpoint's would be, in the float32 master weights and averages: DeepSpeed makes those from
weights that it has rounded to the precision they compute in: no matter for drawn weights, but a loss for these.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from moe_dit.build import build_model, load_settings
from moe_dit.models import NetworkConfig
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.schema import differences, is_under

if TYPE_CHECKING:
    from moe_dit.engine import Engine

# What acts in training alone: a network with other values of these computes the same function.
TRAINING_KEYS = {"attn_dropout", "proj_dropout", "moe.dropout", "moe.auxiliary_losses", "capacity_loss_weight"}


def check_initial_weights(recipe: Recipe) -> None:
    """Hold the model folder ``recipe.initial_weights`` against the recipe's network, reading no weights.

    Raises:
        InputError: it is no model folder, or of another network.
    """
    folder = Path(recipe.initial_weights or "")
    check_same_network(load_settings(folder), recipe, folder)
    model: Any = build_model(recipe, device="meta")
    with open_weights(folder) as weights:
        for name, value in model.state_dict().items():
            if name not in weights:
                raise InputError(f"{folder} has no weights {name}, which recipe {recipe.name} needs")
            if (shape := weights[name].get_shape()) != list(value.shape):
                raise InputError(
                    f"{folder} has {name} of shape {shape}, but recipe {recipe.name} needs {list(value.shape)}"
                )


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


@contextmanager
def open_weights(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The tensors of a model folder by name, as safetensors' slices: nothing is read before it is asked for.

    Raises:
        InputError: the folder has no weights, or its files cannot be read.
    """
    with ExitStack() as stack:
        try:
            index = folder / SAFE_WEIGHTS_INDEX_NAME
            if index.is_file():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            else:
                names = [SAFETENSORS_WEIGHTS_NAME]
            files = [stack.enter_context(safe_open(folder / name, "pt")) for name in names]
            tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118  # no dict
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise InputError(f"the weights in {folder} cannot be read: {error}") from None
        yield tensors


def read_flat(tensor: Any, start: int, numel: int) -> torch.Tensor:
    """Elements [start, start + numel) of a flattened tensor, reading the rows (of dimension 0) that they lie in.

    Args:
        tensor: safetensors' slice of a tensor with at least one dimension.
        start: offset of the first element.
        numel: how many.
    """
    row = math.prod(tensor.get_shape()[1:])
    first = start // row
    last = -(-(start + numel) // row)
    return tensor[first:last].flatten()[start - first * row :][:numel]
