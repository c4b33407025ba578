"""Upcycling: a dense model made a mixture of experts that computes the same function (Komatsuzaki et al., 2212.05055).

A SwiGLU is a sum over its hidden units, so it can be cut: every routed expert takes one half of a dense block's units,
the shared expert the other half. A token's routing weights sum to ``routed_scale``, so the routed experts, alike at
first, give their half together once the weights that leave it are divided by that scale. The router and the units that
an expert has beyond its half keep their drawn weights; those units add nothing at first, for the weights that leave
them are zero. They differ from expert to expert, and so do the tokens an expert gets: that is what tells alike experts
apart in training.

Halves, also where one expert could hold every unit. Counting each unit half in the shared and half in the routed
experts would be the same function too, but of twins that learn alike, with half as many new units.
"""

import os
from pathlib import Path
from typing import Any

import torch

from moe_dit.build import build_model, load_model, load_settings
from moe_dit.classes import model_classes
from moe_dit.export import new_model_folder
from moe_dit.initial_weights import check_same_network
from moe_dit.models import Network
from moe_dit.models.moe import MoE, SwiGLU
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say


def upcycle_model(dense: Path, recipe: Recipe, folder: Path) -> None:
    """Turn a dense model folder into one of a mixture's.

    Args:
        dense: a model folder.
        recipe: the mixture's: the same network but for its experts.
        folder: where to write.

    Raises:
        InputError: no mixture of this recipe computes the dense model's function; nothing is written.
    """
    check_upcycling(dense, recipe)
    if os.path.exists(folder) and os.path.samefile(dense, folder):
        raise InputError(f"{folder} is the dense model, and would be replaced; give another --out")
    with new_model_folder(folder, recipe, model_classes(dense)) as new:
        say(f"drawing the mixture's new weights and filling in those of {dense}")  # minutes for billions of them
        mixture: Any = upcycle(load_model(dense), recipe)
        mixture.save_pretrained(new)


def check_upcycling(dense: Path, recipe: Recipe) -> None:
    """Refuse what :func:`upcycle` cannot do with a dense model folder and a recipe (InputError)."""
    moe = recipe.token_choice
    if moe is None:
        raise InputError(
            f"recipe {recipe.name} has no experts that tokens choose; give one of such a mixture, as jitmoe_b_16_e16"
        )
    mixture = build_model(recipe, device="meta")
    mlp = mixture.get_submodule("blocks.0.mlp")
    if not isinstance(mlp, SwiGLU):
        raise InputError(
            f"recipe {recipe.name}: the dense blocks of {type(mixture).__name__} are two-layer MLPs with biases, which "
            f"its experts (SwiGLU without biases) cannot compute; a JiT, whose blocks are SwiGLU, can be upcycled"
        )
    if moe.top_k == 1:
        raise InputError(
            f"recipe {recipe.name}: model.moe.top_k is 1, and the weight of a single expert is its score, which no "
            f"fixed factor undoes; it should be 2 or more, whose weights sum to routed_scale"
        )
    if not moe.shared_expert:
        raise InputError(
            f"recipe {recipe.name}: model.moe.shared_expert is false, and such a layer adds its input to the experts' "
            f"sum, which the dense one does not; it should be true"
        )
    settings = load_settings(dense)
    if getattr(settings, "moe", None) is not None:
        raise InputError(f"{dense} has experts already; give a dense model")
    check_same_network(settings, recipe, dense, ignored=frozenset({"moe"}))
    units = mlp.gate_proj.out_features
    if units > 2 * moe.expert_width:
        raise InputError(
            f"recipe {recipe.name}: model.moe.expert_width is {moe.expert_width}; a routed and the shared expert must "
            f"hold the {units} hidden units of a dense block between them: at least {-(-units // 2)}"
        )


@torch.no_grad()
def upcycle(dense: Network, recipe: Recipe) -> Network:
    """The recipe's mixture with the function of a dense network (float32, CPU, eval mode).

    Args:
        dense: float32; :func:`check_upcycling` says what fits.
        recipe: the mixture's; its seed draws what the dense network does not say.
    """
    mixture = build_model(recipe).eval()
    layers = {name: module for name, module in mixture.named_modules() if isinstance(module, MoE)}
    for name, layer in layers.items():
        _divide(dense.get_submodule(name), layer)
    inside = tuple(f"{name}." for name in layers)
    theirs = dense.state_dict()
    for name, value in mixture.state_dict().items():
        if not name.startswith(inside):
            value.copy_(theirs[name])
    return mixture


def _divide(mlp: Any, layer: Any) -> None:
    """Give the first half of a SwiGLU's units to every routed expert of a MoE layer, and the rest to the shared one."""
    experts = layer.experts
    shared = layer.shared_experts
    half = mlp.gate_proj.out_features // 2
    rest = mlp.gate_proj.out_features - half
    for source, target, weight, bias in (
        (mlp.gate_proj, shared.gate_proj, experts.gate_proj, experts.gate_bias),
        (mlp.up_proj, shared.up_proj, experts.up_proj, experts.up_bias),
    ):
        weight[:, :half] = source.weight[:half]
        bias[:, :half] = source.bias[:half]
        target.weight[:rest] = source.weight[half:]
        target.bias[:rest] = source.bias[half:]
    source = mlp.down_proj
    target = shared.down_proj
    experts.down_proj.zero_()[:, :, :half] = source.weight[:, :half] / layer.router.routed_scale
    experts.down_bias.zero_()
    target.weight.zero_()[:, :rest] = source.weight[:, half:]
    target.bias.copy_(source.bias)
