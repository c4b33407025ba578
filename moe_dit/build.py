"""From a recipe to its network, and from a folder back to one."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from moe_dit.models import FAMILIES, Network
from moe_dit.models.initialization import initialize
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError


def build_model(recipe: str | Recipe, device: torch.device | str = "cpu") -> Network:
    """Build a recipe's network, with its initial weights (none on the meta device).

    Args:
        recipe: a recipe, its name or its YAML file.
        device: where the weights go; "meta" costs no memory and is instant.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    arguments = asdict(recipe.model)
    with torch.device("meta"):
        model = FAMILIES[arguments.pop("family")].network(**arguments)
    return model if str(device) == "meta" else initialize(model, recipe.seed, device)


def load_model(folder: str | Path) -> Network:
    """Load an exported model (config.json and safetensors) as a plain torch module in eval mode, on the CPU.

    Raises:
        InputError: the folder is not an exported model.
    """
    config = Path(folder) / "config.json"
    try:
        name = json.loads(config.read_text())["_class_name"]
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not an exported model: it has no config.json; jobs/export.py makes one"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{config} cannot be read as a model's configuration: {error}") from None
    families = {family.network.__name__: family.network for family in FAMILIES.values()}
    if name not in families:
        raise InputError(f"{config}: _class_name is {name!r}; it should be one of {', '.join(families)}")
    try:
        return families[name].from_pretrained(folder, low_cpu_mem_usage=False).eval()
    except Exception as error:  # diffusers raises many kinds for a wrong folder
        raise InputError(f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
