"""Where the time of a step goes, by kernel, and what the host launches and waits for."""

from collections import Counter
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from moe_dit.build import build_model
from moe_dit.plan import launches
from parts.context import Context

CASES = (("dsmoe_s_e16", 64), ("dsmoe_l_e16", 16))
STEPS = 2
LARGEST = 25
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def run(context: Context) -> None:
    for name, batch in CASES:
        what = f"{name}, {batch} images"
        if context.time_for(what, 12):
            with context.attempt(what):
                look(context, what, name, batch)


def is_work(event: Any, on_gpu: bool) -> bool:
    """Whether an event is a kernel or a copy (on a CPU: an operation), not a name that code gave to some time."""
    named = getattr(event, "is_user_annotation", False)
    named = named or event.name.startswith(("ProfilerStep", "##", "Torch-Compiled"))
    return (event.device_type == DeviceType.CUDA) == on_gpu and not named


def look(context: Context, what: str, name: str, batch: int) -> None:
    """Profile two steps."""
    recipe = context.recipe(name, "precision=bf16", batch=batch)
    engine = context.engine(recipe)
    inputs = context.inputs(recipe, recipe.global_batch_size)
    for step in range(3):
        engine.train_step(step, [inputs])
    on_gpu = context.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=kinds) as seen:
        for step in range(3, 3 + STEPS):
            engine.train_step(step, [inputs])
        if on_gpu:
            torch.cuda.synchronize()
    kernels = [event for event in seen.events() if is_work(event, on_gpu)]
    table = Counter[str]()
    counts = Counter[str]()
    for event in kernels:
        table[event.name] += event.time_range.elapsed_us()
        counts[event.name] += 1
    lines = [
        f"{us / STEPS:10.1f} us a step, {counts[kernel] / STEPS:6.1f} times  {kernel}"
        for kernel, us in table.most_common()
    ]
    (context.out / f"profile_{name}.txt").write_text("\n".join(lines) + "\n")
    for kernel, us in table.most_common(LARGEST if on_gpu else 3):
        context.tell(f"{what}: {kernel[:100]}", us / STEPS, "us a step", f"{counts[kernel] / STEPS:.0f} times")
    if not on_gpu:
        return
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    whole = end - spans[0][0]
    context.tell(f"{what}: a step", whole / STEPS / 1e3, "ms, profiled")
    context.tell(f"{what}: the GPU is idle", 1 - busy / whole, "of it")
    calls = Counter(e.name for e in seen.events() if e.device_type == DeviceType.CPU)
    planned = launches(recipe, build_model(recipe, device="meta"), 1, 1)
    context.tell(f"{what}: launches", sum(calls[call] for call in LAUNCHES) / STEPS, "a step", f"counted {planned:.0f}")
    context.tell(f"{what}: kernels and copies", len(kernels) / STEPS, "a step")
    for call in WAITS:
        expected = " (one of them is this script's)" if call == "cudaDeviceSynchronize" else ""
        context.tell(f"{what}: {call}", calls[call], f"in {STEPS} steps", expected)
