"""The largest recipe on one GPU: does it fit as planned, recomputing its blocks, and without."""

import time

import torch

from moe_dit.build import build_model
from moe_dit.engine import Engine
from moe_dit.plan import training_flops
from moe_dit.recipe import Recipe
from parts.context import Context
from parts.speed import SHEET, tell_memory, tell_plan

BATCH, STEPS = 16, 3


def run(context: Context) -> None:
    for mode, seconds in (("none", 33), ("blocks", 12)):
        what = f"dsmoe_3b_e16, {BATCH} images, recomputed: {mode}"
        if context.time_for(what, seconds):
            with context.attempt(what):
                measure(context, what, mode)


def measure(context: Context, what: str, mode: str) -> None:
    """One way of keeping activations."""
    recipe = context.recipe("dsmoe_3b_e16", "precision=bf16", f"activation_checkpointing={mode}", batch=BATCH)
    start = time.perf_counter()
    with context.engine(recipe) as engine:
        train(context, what, recipe, engine, time.perf_counter() - start)


def train(context: Context, what: str, recipe: Recipe, engine: Engine, began: float) -> None:
    """Steps of an engine that has just begun; ``began``: the seconds that it took."""
    on_gpu = context.device.type == "cuda"
    context.tell(f"{what}: seconds until the engine is there", began, "s")
    inputs = context.inputs(recipe, recipe.global_batch_size)
    start = time.perf_counter()
    engine.train_step(0, [inputs])
    context.wait()
    context.tell(f"{what}: first step", time.perf_counter() - start, "s")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for step in range(1, 1 + STEPS):
        loss = engine.train_step(step, [inputs])["terms"][0]
    context.wait()
    seconds = (time.perf_counter() - start) / STEPS
    context.check(f"{what}: loss is finite", float(not torch.isfinite(loss)), 0)
    context.tell(f"{what}: a step", seconds * 1e3, "ms")
    context.tell(f"{what}: speed", recipe.global_batch_size / seconds, "images/s")
    tell_plan(context, what, recipe, seconds)
    flops = training_flops(recipe, build_model(recipe, device="meta")) * recipe.global_batch_size
    context.tell(f"{what}: share of the sheet's 989 TFLOP/s", flops / seconds / SHEET)
    if on_gpu:
        tell_memory(context, what, recipe, torch.cuda.max_memory_allocated())
        context.tell(f"{what}: memory that the allocator took", torch.cuda.max_memory_reserved() / 1e9, "GB")
