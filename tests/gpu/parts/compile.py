"""Compiles what the part speed trains, so that it finds the kernels in torch's cache."""

from moe_dit.recipe import Recipe
from parts.context import Context
from parts.speed import CASES


def run(context: Context) -> None:
    for name, batch, _, _ in CASES:
        with context.attempt(f"{name}, {batch} images"):
            step(context, context.recipe(name, "precision=bf16", batch=batch))


def step(context: Context, recipe: Recipe) -> None:
    with context.engine(recipe) as engine:
        engine.train_step(0, [context.inputs(recipe, recipe.global_batch_size)])
