"""What computes, and which code: facts of a run or a measurement, for who reads of it later."""

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from moe_dit.runtime import ranks


def machine(device: torch.device) -> dict[str, Any]:
    """What computes: its kind, never its name in a network."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        kind = found[1] if found else platform.processor()
    return {
        "device": device.type,
        "machine": kind,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world().size,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """The commit of the code that runs, with "+" behind it where files differ from it; None outside of git."""
    folder = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(folder)]
        digest = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return digest.stdout.strip() + ("+" if changed.stdout.strip() else "")


def now() -> str:
    """Date and time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
