"""What computes: versions, and the rates that everything else is held against."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import digest

from moe_dit.runtime.machine import commit, machine
from parts.context import PACKED, Context

PACKAGES = ("triton", "torchvision", "deepspeed", "diffusers", "timm", "webdataset", "numpy")


def run(context: Context) -> None:
    device = context.device
    found = machine(device)
    context.tell("gpu", found["machine"])
    context.tell("date", found["date"])
    context.tell("torch", torch.__version__)
    context.tell("commit", packed_commit(context.tests.parent) or commit() or "unknown")
    words = os.environ.get("GPU_SH_COMMAND", shlex.join(sys.argv)).split()
    context.tell("command", " ".join(word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in words))
    context.tell("python", sys.version.split()[0])
    for name in PACKAGES:
        try:
            context.tell(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            context.tell(name, "not installed")
    context.tell("cores", found["cores"])
    context.tell("products in float32 are allowed to be", torch.get_float32_matmul_precision())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        context.tell("memory", properties.total_memory / 1e9, "GB")
        context.tell("multiprocessors", properties.multi_processor_count)
        context.tell("cuda", str(torch.version.cuda))
        context.tell("cudnn", str(torch.backends.cudnn.version()))
        context.tell("nccl", ".".join(map(str, torch.cuda.nccl.version())))

    for what in (copies, host_copies, products, launches, driver):
        with context.attempt(what.__name__):
            what(context)


def driver(context: Context) -> None:
    """What nvidia-smi tells."""
    if context.device.type == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
        context.tell("driver, largest clock, power limit", told)


def packed_commit(root: Path) -> str | None:
    """The commit of this code, if pack.py saw just this code: where it was copied to, .git may be absent or older."""
    file = PACKED / "code.json"
    packed = json.loads(file.read_text()) if file.exists() else {}
    return packed["commit"] if packed.get("digest") == digest(root) else None


def copies(context: Context) -> None:
    """The memory's rate."""
    given = torch.empty(8 << 20 if context.dry else 4 << 30, dtype=torch.uint8, device=context.device)
    copy = torch.empty_like(given)
    rate = 2 * given.nbytes / context.seconds(lambda: copy.copy_(given))
    context.tell("copies on the device, read and written", rate / 1e9, "GB/s")


def host_copies(context: Context) -> None:
    """The rate between device and host."""
    if context.device.type != "cuda":
        return
    size = 1 << 30
    there = torch.empty(size, dtype=torch.uint8, device=context.device)
    pinned, plain = (torch.empty(size, dtype=torch.uint8, pin_memory=pin) for pin in (True, False))
    for what, work in (
        ("to pinned memory", lambda: pinned.copy_(there, non_blocking=True)),
        ("from pinned memory", lambda: there.copy_(pinned, non_blocking=True)),
        ("to pageable memory", lambda: plain.copy_(there)),
    ):
        context.tell(f"copies {what}", size / context.seconds(work, 3) / 1e9, "GB/s")


def products(context: Context) -> None:
    """What large square products reach."""
    n = 256 if context.dry else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=context.device, dtype=dtype) for _ in range(2))
        rate = 2 * n**3 / context.seconds(partial(torch.mm, a, b), 5)
        context.tell(f"product of {n} x {n}, {str(dtype)[6:]}", rate / 1e12, "TFLOP/s")


def launches(context: Context) -> None:
    """What the host takes to launch a kernel, and to read a number."""
    x = torch.zeros(1, device=context.device)
    works: list[tuple[str, Any, int]] = [("launch zero_", x.zero_, 5000), ("launch +", partial(torch.add, x, x), 5000)]
    for name, work, count in [*works, ("read a number", x.item, 200)]:
        work()
        context.wait()
        start = time.perf_counter()
        for _ in range(count):
            work()
        context.tell(f"the host's time to {name}", (time.perf_counter() - start) / count * 1e6, "us")
        context.wait()
