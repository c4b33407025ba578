"""From a recipe to its network, and from a folder back to one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from moe_dit.models import FAMILIES, Network, NetworkConfig
from moe_dit.models.initialization import initialize
from moe_dit.recipe import Recipe
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import read_json
from moe_dit.schema import differences
from moe_dit.weight_files import load_weights

# What config.json lacks where an earlier version wrote it; the defaults mean what that version did.
LATER_KEYS = {
    *("positions", "norm", "interleave", "dense_first"),
    *("moe.score", "moe.auxiliary_losses", "moe.dropout"),
}


def build_model(recipe: str | Recipe, device: torch.device | str = "cpu") -> Network:
    """Build a recipe's network, with its initial weights (none on the meta device).

    Args:
        recipe: a recipe, its name or its YAML file.
        device: where the weights go; "meta" costs no memory and is instant.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    model = _on_meta(asdict(recipe.model), f"the network of recipe {recipe.name}")
    return model if str(device) == "meta" else initialize(model, recipe.seed, device)


def load_model(folder: str | Path) -> Network:
    """Load an exported model (config.json and safetensors) as a plain torch module in eval mode, on the CPU.

    Raises:
        InputError: the folder is not an exported model, or does not hold just its network's weights.
    """
    arguments = asdict(load_settings(folder))
    network = _on_meta(arguments, f"the network of {folder}")
    load_weights(network, Path(folder))
    return network.eval()


def _on_meta(arguments: dict[str, Any], what: str) -> Network:
    """A network without weights, of a recipe's ``model`` section."""
    try:
        with torch.device("meta"):
            return FAMILIES[arguments.pop("family")].network(**arguments)
    except RuntimeError as error:  # torch counts elements in 64 bits, and tables lie in this machine's memory
        raise InputError(f"{what} is too large: {str(error).splitlines()[0]}") from None


def to_compute(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Put a network where it is to be computed with, in eval mode and in its recipe's precision there; the same object.

    In bf16 its weights are bf16, all of them as in training, and its buffers float32. (Autocast over float32 weights
    would be another function: its norms are float32, and hand experts rows that their grouped product does not take.)
    """
    model.to(device).eval()
    if recipe.in_bf16(device.type):
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    return model


def load_settings(folder: str | Path) -> NetworkConfig:
    """The settings of an exported model's network: a recipe's ``model`` section, from config.json alone.

    Raises:
        InputError: the folder is not an exported model.
    """
    family, config = _read_config(Path(folder))
    try:
        settings = TypeAdapter(FAMILIES[family].config).validate_python({"family": family, **config})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{folder}/config.json: {key} is wrong for a {family} network: {problem['msg']}") from None
    for key, _, ours in differences(config, asdict(settings)):
        # Every key is written, and what one means that is not there is known of those alone that came later.
        if key != "family" and key not in LATER_KEYS and _lacks(config, key):
            raise InputError(f"{folder}/config.json: {key} is missing; a {family} network's default would be {ours}")
    for key, message in settings.problems():
        raise InputError(f"{folder}/config.json: {key} {message}")
    return settings


def _lacks(config: Any, key: str) -> bool:
    """Whether nested dicts have no such dotted key."""
    *sections, last = key.split(".")
    for section in sections:
        config = config.get(section)
    return isinstance(config, dict) and last not in config


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family of an exported model, and its constructor's arguments."""
    file = folder / "config.json"
    try:
        config = read_json(file)
        name = config["_class_name"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is not an exported model: it has no config.json; jobs/export.py makes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read as a model's configuration: {error}") from None
    families = {family.network.__name__: key for key, family in FAMILIES.items()}
    if not isinstance(name, str) or name not in families:
        raise InputError(f"{file}: _class_name is {name!r}; it should be one of {', '.join(families)}")
    return families[name], {key: value for key, value in config.items() if not key.startswith("_")}
