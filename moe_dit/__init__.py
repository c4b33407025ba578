"""moe-dit: training of diffusion mixture-of-experts models.

``build_model(recipe)`` gives a recipe's network, ``load_model(folder)`` an exported one; both are plain torch modules.
``load_recipe(name_or_file)`` reads a :class:`Recipe`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dit.build import build_model, load_model
    from moe_dit.recipe import Recipe
    from moe_dit.recipe_file import load_recipe

__all__ = ["Recipe", "build_model", "load_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: packing pixels or reading a manifest should not wait for diffusers and timm.
    if name in ("build_model", "load_model"):
        from moe_dit import build

        return getattr(build, name)
    if name == "load_recipe":
        from moe_dit import recipe_file

        return recipe_file.load_recipe
    if name == "Recipe":
        from moe_dit import recipe

        return recipe.Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
