"""moe-dit: training of diffusion mixture-of-experts models.

``build_model(recipe)`` gives a recipe's network, ``load_model(folder)`` an exported one; both are plain torch modules.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dit.build import build_model, load_model
    from moe_dit.recipe import Recipe, load_recipe

__all__ = ["Recipe", "build_model", "load_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: a command that only refuses its input should not wait for torch and diffusers.
    if name in ("build_model", "load_model"):
        from moe_dit import build

        return getattr(build, name)
    if name in ("Recipe", "load_recipe"):
        from moe_dit import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
