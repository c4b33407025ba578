"""moe-dit: training of diffusion mixture-of-experts models.

``build_model(recipe)`` gives a recipe's network, ``load_model(folder)`` an exported one; both are plain torch modules.
"""

from moe_dit.build import build_model, load_model
from moe_dit.recipe import Recipe, load_recipe

__all__ = ["Recipe", "build_model", "load_model", "load_recipe"]
