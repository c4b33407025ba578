"""Speed and memory of the real training step, beside the published form and the plan."""

import torch

from moe_dit import bench
from moe_dit.plan import GPUS, make_plan, measure_activations, step_seconds
from moe_dit.recipe import Recipe
from parts.context import Context

# Recipe, images a step, whether beside the published form (of L only 16 images of both fit 80 GB), and the
# seconds that an H200 took, its blocks compiled before.
CASES = (
    ("dsmoe_s_e16", 64, True, 25),
    ("dsmoe_b_e16", 64, True, 25),
    ("dsmoe_l_e16", 16, True, 30),
    ("dsmoe_l_e16", 96, False, 20),
    ("dsmoe_s_e16", 256, False, 15),
    ("dsmoe_b_e16", 256, False, 15),
)
PAIRS, STEADY = 5, 20
SHEET = 989e12  # dense bf16 FLOP/s of an H100 and an H200, by the vendor's data sheet


def run(context: Context) -> None:
    for name, batch, published, seconds in CASES:
        what = f"{name}, {batch} images"
        if context.time_for(what, seconds):
            with context.attempt(what):
                measure(context, what, context.recipe(name, "precision=bf16", batch=batch), published)


def measure(context: Context, what: str, recipe: Recipe, published: bool) -> None:
    """One case."""
    parallelism = context.parallelism(recipe)
    manifest = bench.made_up_shards(
        recipe, context.scratch(f"{recipe.name}_{recipe.global_batch_size}"), 2 * recipe.global_batch_size
    )
    pairs, steady = (2, 2) if context.dry else (PAIRS, STEADY)
    result = bench.bench(recipe, parallelism, manifest, bench.Clock(context.device), pairs, published, steady)
    ours, seconds = result["ours"], result["steady_seconds"]
    context.tell(f"{what}: a step", seconds * 1e3, "ms")
    context.tell(f"{what}: speed", recipe.global_batch_size / seconds, "images/s")
    context.tell(
        f"{what}: share of the sheet's 989 TFLOP/s",
        recipe.global_batch_size * result["flops_per_image"] / seconds / SHEET,
    )
    for part, spent in ours["parts"].items():
        context.tell(f"{what}: {part}", spent * 1e3, "ms")
    context.tell(f"{what}: the square product beside it", result["matrix_peak"] / 1e12, "TFLOP/s")
    context.tell(f"{what}: eval's plain network", result["sampling_images_per_second"], "images/s")
    tell_plan(context, what, recipe, seconds)
    tell_memory(context, what, recipe, ours["memory_peak"])
    if published:
        context.tell(f"{what}: published form, a step", result["published"]["seconds"]["median"] * 1e3, "ms")
        spread = result["speedup_spread"]
        context.tell(
            f"{what}: ours is faster", result["speedup"], "times", f"{spread['low']:.2f} to {spread['high']:.2f}"
        )
        context.tell(f"{what}: published form's memory", result["published"]["memory_peak"] / 1e9, "GB")
        for quantity, (mine, other) in result["agreement"].items():
            name = f"{what}: {quantity} beside the published form, relative"
            context.check(name, abs(mine - other) / abs(other), 5e-2, note=f"{mine:.5g}, {other:.5g}")


def tell_plan(context: Context, what: str, recipe: Recipe, seconds: float) -> None:
    """A step's time over the plan's."""
    parallelism = context.parallelism(recipe)
    kind = torch.cuda.get_device_name() if context.device.type == "cuda" else ""
    gpu = next((key for key in GPUS if key.split("-")[0].upper() in kind.upper()), "h100-80g")
    parts = step_seconds(make_plan(recipe, parallelism), gpu, parallelism)
    note = ", ".join(f"{part} {spent * 1e3:.1f}" for part, spent in parts.items() if spent)
    context.tell(f"{what}: a step over the plan's", seconds / parts["step"], note=f"planned for a {gpu}, ms: {note}")


def tell_memory(context: Context, what: str, recipe: Recipe, peak: float) -> None:
    """A peak of memory beside the plan's, which has all but the CUDA context, buffers and the allocator's slack."""
    parallelism = context.parallelism(recipe)
    plan = make_plan(recipe, parallelism, recipe.in_bf16("cuda"), measure_activations(recipe))
    planned = (
        plan.weights + plan.gradients + plan.master + plan.state + plan.activations[recipe.activation_checkpointing]
    )
    context.tell(f"{what}: memory at its peak", peak / 1e9, "GB", f"planned {planned / 1e9:.2f}")
    context.check(f"{what}: memory over the plan's", peak / planned, 1.1, measured=True)
