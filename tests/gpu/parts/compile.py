"""Compiles what the part speed trains, so that it finds the kernels in torch's cache."""

from parts.context import Context
from parts.speed import CASES


def run(context: Context) -> None:
    for name, batch, _, _ in CASES:
        with context.attempt(f"{name}, {batch} images"):
            recipe = context.recipe(name, "precision=bf16", batch=batch)
            with context.engine(recipe) as engine:
                engine.train_step(0, [context.inputs(recipe, recipe.global_batch_size)])
