"""Checkpoint files of the published code, turned into model folders."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from moe_dit.build import build_model
from moe_dit.export import new_model_folder
from moe_dit.recipe import Recipe
from moe_dit.reference.weights import check_state, conversions
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import task
from moe_dit.runtime.reading import check_regular

WEIGHTS = ("ema", "model", "model_ema1", "model_ema2")  # state dicts of published files
SHARD = 500 * 2**20  # bytes of weights that an import holds at once beside the file


def import_checkpoint(file: Path, recipe: Recipe, weights: str, folder: Path, shard: int = SHARD) -> None:
    """Turn a checkpoint of the published code into a model folder.

    The file is read by mapping it into memory, and its tensors are converted and written in shards, so that memory
    holds no second copy of the network.

    Args:
        file: what torch.save wrote: a dict with the state dicts "model" and "ema", or "model_ema1" and "model_ema2".
        recipe: of the same network.
        weights: which of them.
        folder: where to write.
        shard: largest file of weights, in bytes.

    Raises:
        InputError: the file is damaged, holds other than tensors and plain values, or is of another network.
    """
    state = _read_checkpoint(file, weights)
    model: Any = build_model(recipe, device="meta")
    try:
        check_state(model, state)
    except InputError as error:
        raise InputError(f"{file} does not fit recipe {recipe.name}: {error}") from None
    plan = conversions(model)
    split = split_torch_state_dict_into_shards(
        model.state_dict(), filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=shard
    )
    with new_model_folder(folder, recipe) as new, task("importing", len(plan)) as progress:
        model.save_config(new)
        for name, keys in split.filename_to_tensors.items():
            save_file({key: plan[key].convert(state) for key in keys}, new / name, metadata={"format": "pt"})
            progress.advance(len(keys))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (new / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read_checkpoint(file: Path, weights: str) -> dict[str, torch.Tensor]:
    """The state dict ``weights`` of a checkpoint file, its tensors mapped from the file."""
    try:
        check_regular(file)
        # The published DSMoE puts its command line's arguments beside the weights; no other class may be in the file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"no file {file}") from None
    except Exception as error:  # torch raises many kinds for what is no file of its own
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise InputError(f"{file} holds objects of {foreign[1]}, and is not loaded: they could run code") from None
        reason = isinstance(error, OSError) and error.strerror
        reason = reason or (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"{file} is damaged or not from torch.save: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{file} should hold a dict with the weights by name, not a {type(checkpoint).__name__}")
    state = checkpoint.get(weights)
    if not isinstance(state, dict):
        held = [key for key in WEIGHTS if key in checkpoint]
        raise InputError(f"{file} has no weights named {weights}; it has {', '.join(held) or 'none that are known'}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{file}: {weights} holds {name}, which is not a tensor with a name")
        if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
            raise InputError(f"{file}: {weights} holds {name}, which is not a plain tensor of floating-point numbers")
    return state
