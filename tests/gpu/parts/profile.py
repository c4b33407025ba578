"""Where the time of a step goes: by kernel, and on the host, which launches them."""

import cProfile
import io
import pstats
import time
from collections import Counter
from typing import Any

from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

from moe_dit.build import build_model
from moe_dit.engine import Engine
from moe_dit.plan import launches
from moe_dit.recipe import Recipe
from parts.context import Context

CASES = (("dsmoe_s_e16", 64), ("dsmoe_l_e16", 16))
STEPS = 2  # that are profiled
STEADY = 8  # that are timed without
LARGEST = 25
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def run(context: Context) -> None:
    for name, batch in CASES:
        what = f"{name}, {batch} images"
        recipe = context.recipe(name, "precision=bf16", batch=batch)
        if context.time_for(what, 12):
            with context.attempt(what):
                look(context, what, recipe)


def look(context: Context, what: str, recipe: Recipe) -> None:
    """Of one recipe."""
    with context.engine(recipe) as engine:
        look_at(context, what, recipe, engine)


def look_at(context: Context, what: str, recipe: Recipe, engine: Engine) -> None:
    """Time some steps, and profile others."""
    inputs = context.inputs(recipe, recipe.global_batch_size)

    def steps(count: int) -> None:
        for _ in range(count):
            engine.train_step(0, [inputs])

    steps(3)
    context.wait()
    start = time.perf_counter()
    steps(STEADY)
    given = time.perf_counter() - start
    context.wait()
    seconds = (time.perf_counter() - start) / STEADY
    context.tell(
        f"{what}: a step", seconds * 1e3, "ms", f"the host has given it to the GPU in {given / STEADY * 1e3:.1f}"
    )
    on_gpu = context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        with record_function("these steps"):
            steps(STEPS)
        context.wait()
    kernels = [event for event in seen.events() if is_work(event, on_gpu)]
    times, counts = Counter[str](), Counter[str]()
    for event in kernels:
        times[event.name] += event.time_range.elapsed_us()
        counts[event.name] += 1
    for kernel, us in times.most_common(LARGEST if on_gpu else 3):
        name = kernel if len(kernel) < 100 else f"{kernel[:50]}...{kernel[-45:]}"
        context.tell(f"{what}: {name}", us / STEPS, "us a step", f"{counts[kernel] / STEPS:.0f} times")
    rows = [
        f"{us / STEPS:10.1f} us a step, {counts[kernel] / STEPS:6.1f} times  {kernel}"
        for kernel, us in times.most_common()
    ]
    (context.out / f"kernels_{recipe.name}.txt").write_text("\n".join(rows) + "\n")
    if on_gpu:
        tell_kernels(context, what, recipe, seen.events(), kernels, seconds)
    tell_host(context, recipe, lambda: steps(STEPS))


def is_work(event: Any, on_gpu: bool) -> bool:
    """Whether an event is a kernel or a copy (on a CPU: an operation), not a name that code gave to some time."""
    named = getattr(event, "is_user_annotation", False)
    named = named or event.name.startswith(("ProfilerStep", "##", "Torch-Compiled", "these steps"))
    return (event.device_type == DeviceType.CUDA) == on_gpu and not named


def tell_kernels(context: Context, what: str, recipe: Recipe, events: Any, kernels: list[Any], seconds: float) -> None:
    """How long the GPU is busy, and how often the host speaks to it."""
    busy, end = 0.0, 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end))
        end = max(end, event.time_range.end)
    busy /= STEPS
    context.tell(f"{what}: kernels of a step", busy / 1e3, "ms")
    context.tell(f"{what}: the GPU is idle", 1 - busy / 1e6 / seconds, "of a step")
    (ours,) = [e.time_range for e in events if e.name == "these steps" and e.device_type == DeviceType.CPU]
    inside = (e for e in events if e.device_type == DeviceType.CPU and ours.start <= e.time_range.start <= ours.end)
    calls = Counter(event.name for event in inside)
    planned = launches(recipe, build_model(recipe, device="meta"), 1, 1)
    context.tell(f"{what}: launches", sum(calls[call] for call in LAUNCHES) / STEPS, "a step", f"planned {planned:.0f}")
    context.tell(f"{what}: kernels and copies", len(kernels) / STEPS, "a step")
    context.check(f"{what}: calls that wait for the GPU", sum(calls[call] for call in WAITS) / STEPS, 0, "a step")


def tell_host(context: Context, recipe: Recipe, work: Any) -> None:
    """OUT/host_RECIPE.txt: the functions of Python that the host's main thread spends a step in."""
    found = cProfile.Profile()
    found.runcall(work)
    text = io.StringIO()
    for order in ("tottime", "cumulative"):
        pstats.Stats(found, stream=text).sort_stats(order).print_stats(60)
    (context.out / f"host_{recipe.name}.txt").write_text(text.getvalue())
